"""Training of VMM-scVI in two processes against one, at the same number of cells a step.

Every process has one thread and its own share of the cells, which lie in memory; gradients are
averaged by Lightning's DDP over gloo. Runs of one process and of several take turns. A run's first
epoch, in which processes wait for one another to start, is left out. Where other jobs keep cores
busy, processes wait for one another much longer than they compute: the first one's CPU seconds show
what a step would take them, at best, if every one of them had a core to itself.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from bench.records import Row
from bench.timing import quantiles

MODE, ONE = "scVI training", "1 process"


class Plan(NamedTuple):
    """The cells, how many make a step in all processes together, and how long is trained."""

    cells: int
    genes: int
    batches: tuple[int, ...]
    epochs: int  # that are timed
    repeats: int


FULL = Plan(8192, 2000, (256, 1024), 3, 3)
QUICK = Plan(64, 20, (16,), 1, 1)


def train(rank: int, folder: str, processes: int, batch_size: int, plan: Plan) -> None:
    """Train in this process; the first writes the seconds, wall and CPU, of every epoch."""
    import scvi
    from anndata import AnnData
    from lightning.pytorch.callbacks import Callback
    from scipy.sparse import csr_matrix

    from vmm_fast.scvi import VMMSCVI, CellDataModule
    from vmm_fast.scvi.loading import MemoryCells

    class Clock(Callback):
        def __init__(self) -> None:
            self.seconds: list[tuple[float, float]] = []

        def on_train_epoch_start(self, *_: Any) -> None:
            self.start = time.perf_counter(), time.process_time()

        def on_train_epoch_end(self, *_: Any) -> None:
            wall, cpu = self.start
            self.seconds.append((time.perf_counter() - wall, time.process_time() - cpu))

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.verbosity = logging.ERROR
    torch.set_num_threads(1)
    strategy = "auto"
    if processes > 1:
        os.environ["LOCAL_RANK"] = str(rank)
        group = f"file://{folder}/group"
        dist.init_process_group("gloo", init_method=group, rank=rank, world_size=processes)
        strategy = "ddp_find_unused_parameters_true"
    generator = np.random.default_rng(0)
    rates = 0.3 * generator.gamma(0.3, 1, plan.genes)
    counts = csr_matrix(generator.poisson(rates, (plan.cells, plan.genes)).astype(np.float32))
    batches = generator.integers(3, size=plan.cells)
    adata = AnnData(counts)
    adata.obs["batch"] = batches.astype(str)
    torch.manual_seed(rank)
    VMMSCVI.setup_anndata(adata, batch_key="batch")
    clock = Clock()
    VMMSCVI(adata, n_components=min(100, plan.cells)).train(
        1 + plan.epochs,
        datamodule=CellDataModule(
            MemoryCells(counts), batches, batch_size=batch_size // processes, held_out=0
        ),
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        plan_kwargs={"prior_warmup": 0},
        callbacks=[clock],
        enable_progress_bar=False,
        logger=False,
    )
    if rank == 0:
        np.save(f"{folder}/seconds.npy", clock.seconds[1:])
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def seconds(processes: int, batch_size: int, plan: Plan) -> list[list[float]]:
    """Wall and CPU seconds of each epoch of a run."""
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


def rows(plan: Plan, most: int) -> Iterator[Row]:
    """A row for each number of processes and cells a step; seconds are of a step."""
    for size in plan.batches:
        epochs: dict[int, list[list[float]]] = {1: [], most: []}
        for _ in range(plan.repeats):
            for processes, found in epochs.items():
                found += seconds(processes, size, plan)
        medians = {processes: np.median(found, 0) for processes, found in epochs.items()}
        for processes, found in epochs.items():
            wall, cpu = medians[processes].tolist()
            yield {
                "part": "processes",
                "dtype": "float32",
                "threads": 1,
                "mode": MODE,
                "provider": ONE if processes == 1 else f"{processes} processes",
                "B": size,
                "genes": plan.genes,
                "cells/s": round(plan.cells / wall),
                "times as fast": round(medians[1][0] / wall, 3),
                "times as fast, by CPU": round(medians[1][1] / cpu, 3),
                "cpu_seconds": cpu * size / plan.cells,
                "load": os.getloadavg()[0],
                **quantiles([epoch * size / plan.cells for epoch, _ in found]),
            }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options that no other part has: none."""


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Rows for the command line's options; none where scvi-tools is not installed."""
    try:
        import scvi  # noqa: F401
    except ImportError:
        print('processes is left out: pip install "vmm-fast[scvi]"')
        return
    yield from rows(QUICK if args.quick else FULL, max(2, args.threads))
