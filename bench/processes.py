"""Training of VMM-scVI in two processes against one, at the same number of cells a step.

Every process has one thread and its own share of the cells, which lie in memory; gradients are
averaged by Lightning's DDP over gloo. Runs of one process and of several take turns. A run's first
epoch, in which processes wait for one another to start, is left out. Where other jobs keep cores
busy, processes wait for one another much longer than they compute: the first one's CPU seconds show
what a step would take them, at best, if every one of them had a core to itself.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from bench.measurement import SCVI, Check, Measurement, Run
from bench.records import Row
from bench.scvi_epoch import SILENT
from bench.scvi_step import random_cells
from bench.tables import duration, table
from bench.timing import quantiles

MODE, ONE = "scVI training", "1 process"


class Plan(NamedTuple):
    """The cells, how many make a step in all processes together, and how long is trained."""

    cells: int
    genes: int
    batches: tuple[int, ...]
    epochs: int  # that are timed
    repeats: int


FULL, QUICK = Plan(8192, 2000, (256, 1024), 3, 3), Plan(64, 20, (16,), 1, 1)


def train(rank: int, folder: str, processes: int, batch_size: int, plan: Plan) -> None:
    """Train in this process; the first writes the seconds, wall and CPU, of every epoch."""
    from lightning.pytorch.callbacks import Callback

    from vmm_fast.cells.quiet import quiet
    from vmm_fast.scvi import VMMSCVI, CellDataModule
    from vmm_fast.scvi.loading import MemoryCells

    class Clock(Callback):
        seconds: list[tuple[float, float]] = []  # noqa: RUF012  (there is one of it)

        def on_train_epoch_start(self, *_: Any) -> None:
            self.start = time.perf_counter(), time.process_time()

        def on_train_epoch_end(self, *_: Any) -> None:
            wall, cpu = self.start
            self.seconds.append((time.perf_counter() - wall, time.process_time() - cpu))

    torch.set_num_threads(1)
    strategy = "auto"
    if processes > 1:
        os.environ["LOCAL_RANK"] = str(rank)
        group = f"file://{folder}/group"
        dist.init_process_group("gloo", init_method=group, rank=rank, world_size=processes)
        strategy = "ddp_find_unused_parameters_true"
    adata = random_cells(plan.cells, plan.genes)
    torch.manual_seed(rank)
    cells, batches = MemoryCells(adata.X), adata.obs["batch"].astype(int).to_numpy()
    share = batch_size // processes
    with quiet():
        VMMSCVI.setup_anndata(adata, batch_key="batch")
        VMMSCVI(adata, n_components=min(100, plan.cells)).train(
            1 + plan.epochs,
            datamodule=CellDataModule(cells, batches, batch_size=share, held_out=0),
            devices=processes,
            strategy=strategy,
            plan_kwargs={"prior_warmup": 0},
            callbacks=[Clock()],
            **SILENT,
        )
    if rank == 0:
        np.save(f"{folder}/seconds.npy", Clock.seconds[1:])
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def seconds(processes: int, batch_size: int, plan: Plan) -> list[list[float]]:
    """Return wall and CPU seconds of each epoch of a run."""
    # Packages are imported once for all processes.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["vmm_fast.scvi"])
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            train,
            (folder, processes, batch_size, plan),
            nprocs=processes,
            start_method="forkserver",
        )
        return np.load(Path(folder) / "seconds.npy").tolist()


def rows(run: Run) -> Iterator[Row]:
    """Yield a row for each number of processes and cells a step; seconds are of a step."""
    plan = run.choose(FULL, QUICK)
    for size in plan.batches:
        epochs: dict[int, list[list[float]]] = {1: [], max(2, run.args.threads): []}
        for _ in range(plan.repeats):
            for processes, found in epochs.items():
                found += seconds(processes, size, plan)
        one_wall, one_cpu = np.median(epochs[1], 0).tolist()
        for processes, found in epochs.items():
            wall, cpu = np.median(found, 0).tolist()
            yield {
                "threads": 1,
                "mode": MODE,
                "provider": ONE if processes == 1 else f"{processes} processes",
                "B": size,
                "genes": plan.genes,
                "cells/s": round(plan.cells / wall),
                "times as fast": round(one_wall / wall, 3),
                "times as fast, by CPU": round(one_cpu / cpu, 3),
                "cpu_seconds": cpu * size / plan.cells,
                "load": os.getloadavg()[0],
                **quantiles([epoch * size / plan.cells for epoch, _ in found]),
            }


def checks(rows: Sequence[Row]) -> Iterator[Check]:
    """Yield how many times as fast several processes are as one."""
    reason = (
        "Pseudo-cells, Adam and the average of 4 MB of gradients cost a process the same for half "
        "of the cells. Next: pseudo-cells shared out among the processes."
    )
    for row in rows:
        if row["provider"] != ONE:
            target = f"{MODE}, {row['provider']} against one"
            yield Check(target, f"B = {row['B']}", row["times as fast"], 1.0, reason=reason)


def tables(rows: Sequence[Row]) -> str:
    """Return wall and CPU time of a step in several processes."""
    lines = (
        (
            str(row["B"]),
            row["provider"],
            duration(row["p50"]),
            f"{row['times as fast']:.2f}",
            duration(row["cpu_seconds"]),
            f"{row['times as fast, by CPU']:.2f}",
            f"{row['load']:.1f}",
        )
        for row in rows
    )
    head = ("cells a step", "in", "time", "times as fast", "CPU time of one", "by CPU", "load")
    return table(head, lines)


MEASUREMENT = Measurement(
    "processes",
    "training of VMM-scVI in two processes against one",
    rows,
    needs=SCVI,
    checks=checks,
    heading="Several processes",
    introduction="Processes of one thread each, cells in memory, the same number of cells a step "
    "in all together. *By CPU* is what it would be if each had a core to itself.",
    tables=tables,
)
