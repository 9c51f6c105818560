"""Atlases of cells on disk: time and memory of every step against their number, and stock SCVI.

Atlases are those of :mod:`bench.atlas`. Every step runs in a process of its own, whose peak of
resident memory is the step's. Seconds are without the import of libraries.

- prepare: ``vmm-fast prepare`` of a gzipped .h5ad.
- loader: an epoch of batches as training takes them, with nothing done to them; and scDataset's of
  the same file, which shuffles as many cells together, in blocks of 64, but does not read ahead.
- integrate: ``vmm-fast integrate``, one epoch from disk, embedding and clusters written; and of
  this the training alone.
- EM iteration: exact EM of the trained prior over the embedding, which lies on disk; pseudo-cells
  and network are held fixed.
- training epoch: stock SCVI and VMMSCVI in memory, in turns, CPU seconds on one thread; Lightning,
  loader and logging included, the warm-up under N(0, I) left out.
- shuffling: the loss of cells of the same batches that no atlas has, after the same number of steps
  with cells in memory, all of them shuffled; from disk, runs and windows shuffled; and from disk in
  the order in which they lie, only windows shuffled, to see what is lost where shuffling is poor.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench import alone, atlas, steps
from bench.measurement import OPTIONS, SCVI, Check, Measurement, Run, exponent, relative
from bench.records import Row, select
from bench.steps import NORMAL, SILENT, STOCK, VMM
from bench.tables import compared, duration, table
from bench.timing import quantiles

PREPARE, LOADER, INTEGRATE, TRAINING = "prepare", "loader", "integrate", "training from disk"
EM, EPOCH, SHUFFLING = "EM iteration", "training epoch", "shuffling"
GROWING = (PREPARE, LOADER, TRAINING, INTEGRATE, EM)
SCDATASET, SCDATASET_BLOCK = "scDataset", 64  # cells
IN_MEMORY, ON_DISK, IN_ORDER = "in memory", "from disk", "from disk, in order"
EM_BATCH = 16_384  # points
COMPARED_CELLS = 100_000  # with whose memory that of more is
ATLASES = Path(__file__).parents[1] / "build" / "atlases"


class Plan(NamedTuple):
    """Sizes and repeats."""

    cells: tuple[int, ...]  # in the atlases on disk
    batch_size: int  # of training from disk
    iterations: int  # of EM
    epoch: tuple[int, tuple[int, ...], int]  # cells, batch sizes, repeats
    shuffle: tuple[int, int, int, int]  # cells, epochs, seeds, cells held out


FULL = Plan(
    (10_000, 100_000, 1_000_000),
    512,
    10,
    (20_000, (128, 512), 5),
    (100_000, 5, 3, 10_000),
)
QUICK = Plan((400,), 32, 2, (300, (32,), 1), (400, 2, 1, 100))


# --- rows ---


def rows(run: Run) -> Iterator[Row]:
    """Yield every step at every size, then what is measured at one."""
    plan, folder = run.choose(FULL, QUICK), run.args.atlases
    if run.args.cells:
        plan = plan._replace(cells=tuple(sorted(run.args.cells)))
    folder.mkdir(parents=True, exist_ok=True)
    for row in _rows(plan, folder, run.args.threads):
        if row["mode"] in GROWING and "seconds" in row:
            row["cells/s"] = row["cells"] / row["seconds"]
        yield {"genes": atlas.GENES, **row}


def _rows(plan: Plan, folder: Path, threads: int) -> Iterator[Row]:
    yield from _epoch_rows(*plan.epoch)
    for cells in plan.cells:
        for row in _size_rows(plan, folder, cells, threads):
            yield {"provider": VMM, "cells": cells, **row}
    yield from _shuffling_rows(folder, threads, plan.batch_size, *plan.shuffle)


def make(folder: Path, cells: int) -> Path:
    """Write the atlas of so many cells, unless it is there; refuse one of other real cells."""
    from vmm_fast.cells import CellStore

    path = folder / f"{cells}.h5ad"
    if not path.exists():
        atlas.write(path, cells)
    with CellStore(path) as store:
        if list(store.var_names) != list(atlas.Atlas().gene_names):
            raise RuntimeError(
                f"{path}: is drawn from other cells than VMM_FAST_DATA has; remove it"
            )
    return path


def _epoch_rows(cells: int, batch_sizes: Sequence[int], repeats: int) -> Iterator[Row]:
    adata = atlas.Atlas().in_memory(cells)
    for size in batch_sizes:
        models = {name: steps.scvi_model(name, adata) for name in (STOCK, VMM, NORMAL)}
        epochs = steps.epochs(models, size, repeats).items()
        found = {name: quantiles(seconds) for name, seconds in epochs}
        for name, timing in found.items():
            case = {"threads": 1, "mode": EPOCH, "provider": name, "cells": cells, "B": size}
            ratio = round(timing["p50"] / found[STOCK]["p50"], 3)
            yield {**case, "times stock": ratio, **timing}


def _size_rows(plan: Plan, folder: Path, cells: int, threads: int) -> Iterator[Row]:
    path, prepared = make(folder, cells), folder / f"{cells}-prepared.h5ad"
    size = plan.batch_size
    command = ["prepare", str(path), "--out", str(prepared), "--overwrite"]
    done = alone.run(run_command, threads=threads, arguments=command)
    sizes = {"bytes": path.stat().st_size, "bytes_prepared": prepared.stat().st_size}
    yield {"mode": PREPARE, **done, **sizes}
    loaded = {"path": str(prepared), "batch_size": size}
    yield {"mode": LOADER, "B": size, **alone.run(load, threads=threads, **loaded)}
    if importlib.util.find_spec("scdataset") is not None:
        done = alone.run(load_scdataset, threads=threads, **loaded)
        yield {"mode": LOADER, "provider": SCDATASET, "B": size, **done}
    with tempfile.TemporaryDirectory(dir=folder) as out:
        results = f"{out}/results"
        command = ["integrate", *_integrate(prepared, size, 1), "--out", results]
        done = alone.run(run_command, threads=threads, arguments=command)
        yield {"mode": INTEGRATE, "B": size, **done}
        yield {"mode": TRAINING, "B": size, "seconds": save_embedding(Path(results))}
        trained: dict[str, Any] = {"results": results, "cells": str(prepared)}
        trained |= {"iterations": plan.iterations}
        yield {"mode": EM, **alone.run(fit, threads=threads, **trained)}


def _integrate(path: Path, batch_size: int, epochs: int) -> list[str]:
    options = {"--memory": 0, "--epochs": epochs, "--batch-size": batch_size}
    named = [str(text) for option in options.items() for text in option]
    return [str(path), "--batch-key", "batch", "--accelerator", "cpu", *named]


def _shuffling_rows(
    folder: Path, threads: int, size: int, cells: int, epochs: int, seeds: int, held_out: int
) -> Iterator[Row]:
    path = str(make(folder, cells))
    options = {"epochs": epochs, "batch_size": size, "held_out": held_out}
    for order in (IN_MEMORY, ON_DISK, IN_ORDER):
        losses = [
            alone.run(shuffle, threads=threads, path=path, order=order, seed=seed, **options)[
                "loss"
            ]
            for seed in range(seeds)
        ]
        case = {"mode": SHUFFLING, "provider": order, "cells": cells, "B": size}
        yield {**case, "epochs": epochs, "losses": losses}


# --- steps, each of which runs in a process of its own ---


def run_command(arguments: Sequence[str]) -> dict[str, float]:
    """Run a command of vmm-fast; return its seconds, wall and CPU."""
    import vmm_fast.cells.integration  # noqa: F401  (takes seconds to import)
    from vmm_fast import cli

    start = time.perf_counter(), time.process_time()
    if code := cli.main(list(arguments)):
        raise RuntimeError(f"vmm-fast {arguments[0]} gave {code}")
    return _since(start)


def _since(start: tuple[float, float]) -> dict[str, float]:
    return {
        "seconds": time.perf_counter() - start[0],
        "cpu_seconds": time.process_time() - start[1],
    }


def load(path: str, batch_size: int) -> dict[str, Any]:
    """Take an epoch of batches and do nothing with them."""
    from vmm_fast.cells import CellStore
    from vmm_fast.scvi.columns import cell_columns
    from vmm_fast.scvi.loading import CellBatches

    with CellStore(path) as store:
        start = time.perf_counter(), time.process_time()
        codes = store.column("batch").codes
        starts = np.arange(0, store.n_obs, store.run)
        stops = np.minimum(starts + store.run, store.n_obs)
        batches = CellBatches(
            store, cell_columns(codes), starts, stops, batch_size=batch_size, seed=0
        )
        return {"loaded": sum(len(batch["X"]) for batch in batches), **_since(start)}


def load_scdataset(path: str, batch_size: int) -> dict[str, Any]:
    """Take an epoch of batches of scDataset and do nothing with them."""
    import h5py
    from anndata.io import sparse_dataset
    from scdataset import BlockShuffling, scDataset

    from vmm_fast.scvi.loading import WINDOW

    class Counts:
        """The part of a collection that scDataset needs, without an AnnData around it."""

        def __len__(self) -> int:
            return counts.shape[0]

        def __getitem__(self, cells: np.ndarray) -> Any:
            return counts[cells]

    with h5py.File(path) as file:
        start = time.perf_counter(), time.process_time()
        counts = sparse_dataset(file["X"])
        batches: Iterable[Tensor] = scDataset(
            Counts(),
            BlockShuffling(block_size=SCDATASET_BLOCK),
            batch_size,
            fetch_factor=max(1, WINDOW // batch_size),
            batch_transform=lambda cells: torch.from_numpy(cells.toarray()),
            seed=0,
        )
        return {"loaded": sum(len(batch) for batch in batches), **_since(start)}


def save_embedding(results: Path) -> float:
    """Write the embedding to an .npy beside the results; return the seconds of training."""
    import h5py

    with h5py.File(results / "cells.h5ad") as file:
        np.save(results / "embedding.npy", file["obsm/X_vmm"][:])
        return float(file["uns/vmm/training_seconds"][()])


def _trained(results: str, cells: str) -> tuple[Any, Tensor]:
    """Return a trained module, and the points [n, D], which are read as they are used."""
    from vmm_fast.cells import CellStore
    from vmm_fast.cells.quiet import quiet
    from vmm_fast.scvi import VMMSCVI

    with CellStore(cells) as store, quiet():
        model = VMMSCVI.load(f"{results}/model", store.sample(1000, keys=["batch"]))
    # Copied on write: torch warns of memory that must not be written.
    points = torch.from_numpy(np.load(f"{results}/embedding.npy", mmap_mode="c"))
    return model.module, points


def fit(results: str, cells: str, iterations: int) -> dict[str, Any]:
    """Return the seconds of an iteration of EM, and the objective, nats a point, before each."""
    module, points = _trained(results, cells)
    start = time.perf_counter()
    objective = module.prior.fit(
        points.split(EM_BATCH),
        module.encode_pseudo_cells,
        max_iterations=iterations,
        tolerance=-np.inf,
    )
    seconds = (time.perf_counter() - start) / iterations
    sizes = {"J": module.prior.num_components, "D": points.shape[1]}
    return {"seconds": seconds, **sizes, "objective": objective}


def shuffle(
    path: str, order: str, epochs: int, batch_size: int, held_out: int, seed: int
) -> dict[str, Any]:
    """Train on cells in an order; return the negative ELBO, in nats, of cells beyond the file."""
    import scvi

    from vmm_fast.cells import CellStore
    from vmm_fast.cells.quiet import quiet
    from vmm_fast.scvi import VMMSCVI
    from vmm_fast.scvi.loading import CellDataModule, MemoryCells

    with CellStore(path) as store, quiet():
        source: Any = store
        if order == IN_MEMORY:
            source = MemoryCells(store.read(np.array([0]), np.array([store.n_obs])))
        elif order == IN_ORDER:
            store.run = store.n_obs
        codes = store.column("batch").codes
        cells = atlas.Atlas().in_memory(held_out, beyond=store.n_obs)
        scvi.settings.seed = seed
        VMMSCVI.setup_anndata(cells, batch_key="batch")
        model = VMMSCVI(cells, n_components=min(100, held_out // 4))
        data = CellDataModule(source, codes, batch_size=batch_size, held_out=0, seed=seed)
        model.train(epochs, datamodule=data, **SILENT)
        scvi.settings.seed = 0
        return {"loss": -float(model.get_elbo())}


# --- targets, tables ---


MEMORY_REASON = """\
A run keeps obs, the embedding and the clusters of all cells: about 100 MiB for a million."""


def least_gain(row: Row) -> float:
    """Return how much an iteration of EM has raised the objective at least; below 0 if it fell."""
    return float(np.diff(row["objective"]).min())


def checks(rows: Sequence[Row]) -> Iterator[Check]:
    """Yield epochs next to SCVI's, memory, and the loader."""
    yield from steps.scvi_checks(select(rows, mode=EPOCH), "scVI training epoch in memory")
    whole = {row["cells"]: row["peak_bytes"] for row in select(rows, mode=INTEGRATE)}
    if whole:
        cells, target = max(whole), "memory of vmm-fast integrate from disk"
        case = f"{cells:,} cells"
        yield Check(target, case, whole[cells] / 2**30, 3.0, False, " GiB")
        if COMPARED_CELLS in whole and cells > COMPARED_CELLS:
            ratio = whole[cells] / whole[COMPARED_CELLS]
            target += f", against {COMPARED_CELLS:,} cells"
            yield Check(target, case, ratio, 1.10, False, reason=MEMORY_REASON)
    for row in select(rows, mode=LOADER, provider=VMM):
        for training in select(rows, mode=TRAINING, cells=row["cells"]):
            ratio = row["cells/s"] / training["cells/s"]
            yield Check("loader from disk, against training", f"{row['cells']:,} cells", ratio, 2.0)


def tables(rows: Sequence[Row]) -> str:
    """Return time and memory of the steps against cells, then epochs and shuffling."""
    growing = [row for row in rows if row["mode"] in GROWING]
    lines = [
        (
            row["mode"] if row["provider"] == VMM else f"{row['mode']}, {row['provider']}",
            f"{row['cells']:,}",
            duration(row["seconds"]),
            f"{row['cells/s']:,.0f}",
            f"{row['cells'] / row['cpu_seconds']:,.0f}" if "cpu_seconds" in row else "",
            f"{row['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in row else "",
        )
        for row in sorted(growing, key=lambda row: GROWING.index(row["mode"]))
    ]
    head = ("step", "cells", "time", "cells/s", "cells a CPU second", "peak memory")
    steps = {mode: select(growing, mode=mode, provider=VMM) for mode in GROWING}
    fits = [
        f"{mode} n^{exponent(line, 'cells', 'seconds'):.2f}"
        for mode, line in steps.items()
        if len(line) > 1
    ]
    gain = min(map(least_gain, steps[EM]))
    text = f"{table(head, lines)}\nTime grows as {', '.join(fits)}. EM raised its objective by "
    text += f"{gain:.2g} nats a point or more in every iteration.\n"
    if found := relative(rows, STOCK, mode=EPOCH):
        epochs = compared(found, ["B"], lambda row: (str(row["B"]),))
        text += f"\nCPU time of an epoch in memory, over {STOCK}'s in brackets:\n\n{epochs}"
    if not (shuffled := select(rows, mode=SHUFFLING)):
        return text
    lines = [
        (row["provider"], *(f"{loss:.2f}" for loss in row["losses"]), f"{mean(row['losses']):.2f}")
        for row in shuffled
    ]
    head = ("cells", *(f"seed {seed}" for seed in range(len(shuffled[0]["losses"]))), "mean")
    text += f"\nNegative ELBO, nats a cell, of cells not trained on, after {shuffled[0]['epochs']} "
    return text + f"epochs of {shuffled[0]['cells']:,} cells:\n\n{table(head, lines)}"


MEASUREMENT = Measurement(
    "atlas",
    "time and memory against the number of cells on disk, and stock SCVI",
    rows,
    options={
        **OPTIONS,
        "--cells": {"nargs": "+", "type": int, "help": "in the atlases on disk"},
        "--atlases": {
            "type": Path,
            "default": ATLASES,
            "help": "folder to keep them in (default: build/)",
        },
    },
    needs=SCVI,
    checks=checks,
    introduction="Cells of `bench/atlas.py`, 2,000 genes, 15 % of the counts above 0; the top of "
    "`bench/out_of_core.py` says what each step is. Each ran in a process of its own, whose memory "
    "counts with the interpreter and its libraries.",
    tables=tables,
)
