"""Atlases of cells on disk: time and memory of every step against their number, and stock SCVI.

Atlases are those of :mod:`bench.atlas`. Every step runs in a process of its own, whose peak of
resident memory is the step's. Seconds are without the import of libraries.

- prepare: ``vmm-fast prepare`` of a gzipped .h5ad.
- loader: an epoch of batches as training takes them, with nothing done to them; and scDataset's of
  the same file, which shuffles as many cells together, in blocks of 64, but does not read ahead.
- integrate: ``vmm-fast integrate``, one epoch from disk, embedding and clusters written; and of
  this the training alone.
- EM iteration: exact EM of the trained prior over the embedding on disk; see
  :mod:`bench.embedding`, and next to scikit-learn's at the largest size.
- training epoch: stock SCVI and VMMSCVI in memory, in turns, CPU seconds on one thread; Lightning,
  loader and logging included, the warm-up under N(0, I) left out.
- resume: a run that is killed several times, at random moments, and one that is not: the largest
  difference between their parameters, on one thread.
- shuffling: the loss of cells of the same batches that no atlas has, after the same number of steps
  with cells in memory, all of them shuffled; from disk, runs and windows shuffled; and from disk in
  the order in which they lie, only windows shuffled, to see what is lost where shuffling is poor.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import alone, atlas, embedding
from bench.records import Row
from bench.timing import quantiles
from vmm_fast._folder import RUN

PREPARE, LOADER, INTEGRATE, TRAINING = "prepare", "loader", "integrate", "training from disk"
EM = "EM iteration"
GROWING = (PREPARE, LOADER, TRAINING, INTEGRATE, EM)
EPOCH, RESUME, SHUFFLING = "training epoch", "resume", "shuffling"
STOCK, VMM, NORMAL = "SCVI", "VMM", "same network, N(0, I)"
PRIORS = {VMM: "vmm", NORMAL: "normal"}
SCDATASET, SCIKIT_LEARN = "scDataset", "GaussianMixture"
SCDATASET_BLOCK = 64  # cells
IN_MEMORY, ON_DISK, IN_ORDER = "in memory", "from disk", "from disk, in order"
COMPARED_CELLS = 100_000  # with whose memory that of more is
ATLASES = Path(__file__).parents[1] / "build" / "atlases"


class Plan(NamedTuple):
    """Sizes and repeats."""

    cells: tuple[int, ...]  # in the atlases on disk
    batch_size: int  # of training from disk
    iterations: int  # of EM
    peer_points: int  # that scikit-learn takes at most
    epoch_cells: int
    epoch_batches: tuple[int, ...]
    repeats: int
    resume_cells: int
    resume_epochs: int
    kills: int
    shuffle_cells: int
    shuffle_epochs: int
    seeds: int
    held_out: int


FULL = Plan(
    cells=(10_000, 100_000, 1_000_000),
    batch_size=512,
    iterations=10,
    peer_points=100_000,
    epoch_cells=20_000,
    epoch_batches=(128, 512),
    repeats=5,
    resume_cells=20_000,
    resume_epochs=20,
    kills=5,
    shuffle_cells=100_000,
    shuffle_epochs=5,
    seeds=3,
    held_out=10_000,
)
QUICK = Plan(
    cells=(400,),
    batch_size=32,
    iterations=2,
    peer_points=200,
    epoch_cells=300,
    epoch_batches=(32,),
    repeats=1,
    resume_cells=400,
    resume_epochs=2,
    kills=1,
    shuffle_cells=400,
    shuffle_epochs=2,
    seeds=1,
    held_out=100,
)
# A run of vmm-fast that is a minute long but has many checkpoints, and draws no report.
OFTEN_SAVED = """
import sys
from vmm_fast import cli
from vmm_fast.scvi import integration, report
integration.CHECKPOINT_SECONDS = 1
report.write_report = lambda *arguments: None
sys.exit(cli.main())
"""


# --- steps, each in its own process ---


def _vmm_fast(*arguments: object) -> dict[str, float]:
    """Seconds of a command of vmm-fast."""
    import vmm_fast.scvi.integration  # noqa: F401  (takes seconds to import)
    from vmm_fast import cli

    start = time.perf_counter(), time.process_time()
    if code := cli.main([str(argument) for argument in arguments]):
        raise RuntimeError(f"vmm-fast {arguments[0]} gave {code}")
    return {
        "seconds": time.perf_counter() - start[0],
        "cpu_seconds": time.process_time() - start[1],
    }


def prepare(path: str, out: str) -> dict[str, Any]:
    """Convert to the layout that is read fastest."""
    return _vmm_fast("prepare", path, "--out", out, "--overwrite")


def integrate(arguments: Sequence[str], out: str) -> dict[str, Any]:
    """Train, write embedding and clusters."""
    timing = _vmm_fast("integrate", *arguments, "--out", out, "--overwrite")
    return {**timing, **training_seconds(out)}


def training_seconds(out: str) -> dict[str, Any]:
    """What of a run, whose results are there, was training."""
    import h5py

    with h5py.File(Path(out) / "cells.h5ad") as file:
        return {"training_seconds": float(file["uns/vmm/training_seconds"][()])}


def epochs(
    cells: int, batch_sizes: Sequence[int], repeats: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """CPU seconds of an epoch of every model, which take turns, by batch size and model."""
    import logging
    import warnings

    import scvi
    import torch
    from lightning.pytorch.callbacks import Callback
    from scvi.model import SCVI

    from vmm_fast.scvi import VMMSCVI

    class Clock(Callback):
        def on_train_start(self, *args: Any) -> None:
            self.start = time.process_time()

        def on_train_end(self, *args: Any) -> None:
            self.seconds = time.process_time() - self.start

    warnings.simplefilter("ignore")
    scvi.settings.verbosity = logging.ERROR
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    adata = atlas.Atlas().in_memory(cells)
    found = {}
    for batch_size in batch_sizes:
        models = {}
        for name in (STOCK, VMM, NORMAL):
            kind = SCVI if name == STOCK else VMMSCVI
            kind.setup_anndata(adata, batch_key="batch")
            scvi.settings.seed = 0
            models[name] = SCVI(adata) if name == STOCK else VMMSCVI(adata, prior=PRIORS[name])
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(1 + repeats):
            for name, model in models.items():
                clock = Clock()
                model.train(
                    1,
                    batch_size=batch_size,
                    accelerator="cpu",
                    plan_kwargs={} if name == STOCK else {"prior_warmup": 0},
                    callbacks=[clock],
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    logger=False,
                )
                seconds[name].append(clock.seconds)
        # The first turn warms up.
        found[str(batch_size)] = {name: quantiles(values[1:]) for name, values in seconds.items()}
    return found


def difference(one: str, other: str) -> dict[str, Any]:
    """Largest difference between the parameters of two models."""
    import torch

    states = [
        torch.load(Path(folder) / "model" / "model.pt", weights_only=False)["model_state_dict"]
        for folder in (one, other)
    ]
    if states[0].keys() != states[1].keys():
        raise RuntimeError(f"{one} and {other} hold different parameters")
    largest = 0.0
    for name, value in states[0].items():
        if torch.is_tensor(value) and value.numel():
            gap = (value.double() - states[1][name].double()).abs().max()
            largest = max(largest, float(gap))
    return {"difference": largest}


def load(path: str, batch_size: int) -> dict[str, Any]:
    """Take an epoch of batches and do nothing with them."""
    from vmm_fast.scvi import CellStore
    from vmm_fast.scvi.loading import CellBatches

    with CellStore(path) as store:
        start = time.perf_counter(), time.process_time()
        codes = store.column("batch").codes
        starts = np.arange(0, store.n_obs, store.run)
        stops = np.minimum(starts + store.run, store.n_obs)
        batches = CellBatches(store, codes, starts, stops, batch_size=batch_size, seed=0)
        return _loaded((batch["X"] for batch in batches), start)


def load_scdataset(path: str, batch_size: int) -> dict[str, Any]:
    """As :func:`load`, with scDataset."""
    import h5py
    import torch
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
        batches = scDataset(
            Counts(),
            BlockShuffling(block_size=SCDATASET_BLOCK),
            batch_size,
            fetch_factor=max(1, WINDOW // batch_size),
            batch_transform=lambda cells: torch.from_numpy(cells.toarray()),
            seed=0,
        )
        return _loaded(batches, start)


def _loaded(batches: Iterable[Any], start: tuple[float, float]) -> dict[str, Any]:
    """Take all batches; seconds since the start, and CPU seconds."""
    cells = sum(len(batch) for batch in batches)
    return {
        "seconds": time.perf_counter() - start[0],
        "cpu_seconds": time.process_time() - start[1],
        "loaded": cells,
    }


def shuffle(
    path: str, order: str, epochs: int, batch_size: int, held_out: int, seed: int
) -> dict[str, Any]:
    """Train on cells in an order; negative ELBO, in nats, of cells that are not in the file."""
    import scvi

    from vmm_fast.scvi import VMMSCVI, CellStore
    from vmm_fast.scvi.integration import quiet
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
        model.train(
            epochs,
            datamodule=CellDataModule(source, codes, batch_size=batch_size, held_out=0, seed=seed),
            accelerator="cpu",
            enable_progress_bar=False,
            logger=False,
        )
        scvi.settings.seed = 0
        return {"loss": -float(model.get_elbo())}


# --- rows ---


def _row(mode: str, provider: str, cells: int, threads: int, **more: Any) -> Row:
    fixed = {"part": "atlas", "dtype": "float32", "threads": threads, "genes": atlas.GENES}
    return {**fixed, "mode": mode, "provider": provider, "cells": cells, **more}


def _rate(row: Row) -> Row:
    return {**row, "cells/s": row["cells"] / row["seconds"]}


def rows(plan: Plan, folder: Path, threads: int) -> Iterator[Row]:
    """Every step at every size, then what is measured at one."""
    folder.mkdir(parents=True, exist_ok=True)
    yield from _epoch_rows(plan)
    for cells in plan.cells:
        yield from _size_rows(plan, folder, cells, threads)
    yield _resume_row(plan, folder)
    yield from _shuffling_rows(plan, folder, threads)


def make(folder: Path, cells: int) -> Path:
    """Write the atlas of so many cells, unless it is there; refuse one of other real cells."""
    from vmm_fast.scvi import CellStore

    path = folder / f"{cells}.h5ad"
    if not path.exists():
        atlas.write(path, cells)
    with CellStore(path) as store:
        if list(store.var_names) != list(atlas.Atlas().gene_names):
            raise RuntimeError(
                f"{path}: is drawn from other cells than VMM_FAST_DATA has; remove it"
            )
    return path


def _epoch_rows(plan: Plan) -> Iterator[Row]:
    found = alone.run(
        epochs,
        threads=1,
        cells=plan.epoch_cells,
        batch_sizes=plan.epoch_batches,
        repeats=plan.repeats,
    )
    for size in plan.epoch_batches:
        timings = found[str(size)]
        for name, timing in timings.items():
            ratio = round(timing["p50"] / timings[STOCK]["p50"], 3)
            yield _row(EPOCH, name, plan.epoch_cells, 1, B=size, **{"times stock": ratio}, **timing)


def _size_rows(plan: Plan, folder: Path, cells: int, threads: int) -> Iterator[Row]:
    path, prepared = make(folder, cells), folder / f"{cells}-prepared.h5ad"
    done = alone.run(prepare, threads=threads, path=str(path), out=str(prepared))
    sizes = {"bytes": path.stat().st_size, "bytes_prepared": prepared.stat().st_size}
    yield _rate(_row(PREPARE, VMM, cells, threads, **done, **sizes))
    size = plan.batch_size
    done = alone.run(load, threads=threads, path=str(prepared), batch_size=size)
    yield _rate(_row(LOADER, VMM, cells, threads, B=size, **done))
    if importlib.util.find_spec("scdataset") is None:
        yield _row(LOADER, SCDATASET, cells, threads, B=size, absent="not installed")
    else:
        done = alone.run(load_scdataset, threads=threads, path=str(prepared), batch_size=size)
        yield _rate(_row(LOADER, SCDATASET, cells, threads, B=size, **done))
    arguments = _integrate_arguments(prepared, size, 1)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        results = f"{out}/results"
        done = alone.run(integrate, threads=threads, arguments=arguments, out=results)
        seconds = done.pop("training_seconds")
        yield _rate(_row(INTEGRATE, VMM, cells, threads, B=size, **done))
        yield _rate(_row(TRAINING, VMM, cells, threads, B=size, seconds=seconds))
        embedding.save(Path(results))
        trained = {"results": results, "cells": str(prepared)}
        done = alone.run(embedding.fit, threads=threads, **trained, iterations=plan.iterations)
        yield _rate(_row(EM, VMM, cells, threads, **done))
        if cells == max(plan.cells):
            options = {"most": plan.peer_points, "repeats": plan.repeats}
            done = alone.run(embedding.peer, threads=threads, **trained, **options)
            yield _rate(_row(EM, SCIKIT_LEARN, cells, threads, **done))


def _integrate_arguments(path: Path, batch_size: int, epochs: int) -> list[str]:
    options = {"--memory": 0, "--epochs": epochs, "--batch-size": batch_size}
    named = [str(text) for option in options.items() for text in option]
    return [str(path), "--batch-key", "batch", "--accelerator", "cpu", *named]


def _resume_row(plan: Plan, folder: Path) -> Row:
    path = make(folder, plan.resume_cells)
    command = [sys.executable, "-c", OFTEN_SAVED, "integrate"]
    command += _integrate_arguments(path, plan.batch_size, plan.resume_epochs)
    with tempfile.TemporaryDirectory(dir=folder) as results:
        left_alone, killed = f"{results}/alone", f"{results}/killed"
        _finish([*command, "--out", left_alone])
        seconds = alone.run(training_seconds, threads=1, out=left_alone)["training_seconds"]
        rng = np.random.default_rng(0)
        lives = (seconds * rng.uniform(0, 0.4, plan.kills)).tolist()
        kills = kill_and_resume([*command, "--out", killed], lives)
        found = alone.run(difference, threads=1, one=left_alone, other=killed)
    more = {"B": plan.batch_size, "seconds": seconds, "kills": kills, **found}
    return _row(RESUME, VMM, plan.resume_cells, 1, **more)


def kill_and_resume(command: list[str], lives: Sequence[float]) -> int:
    """Kill a run after each of these seconds of training and let it go on, at last to its end.

    Parameters
    ----------
    command : list of str
        Ends with the run's folder.
    lives : sequence of float

    Returns
    -------
    int
        How often it was killed: less often than asked if it ended before.
    """
    for kills, seconds in enumerate(lives):
        process = _start(command)
        _await_training(process, Path(command[-1], RUN))
        try:
            _, stderr = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        else:
            _check(process, stderr)
            return kills
    _finish(command)
    return len(lives)


def _start(command: list[str]) -> subprocess.Popen[str]:
    """Start a run, or let it go on if it has begun in its folder."""
    began = Path(command[-1], RUN).exists()
    return subprocess.Popen(
        [*command, "--resume"] if began else command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=alone.environment(1),
    )


def _await_training(process: subprocess.Popen[str], record: Path) -> None:
    """Wait until a run has read its input, when it writes its record."""
    start = time.time()
    while process.poll() is None and not (record.exists() and record.stat().st_mtime > start):
        time.sleep(0.05)


def _finish(command: list[str]) -> None:
    process = _start(command)
    _check(process, process.communicate()[1])


def _check(process: subprocess.Popen[str], stderr: str) -> None:
    if process.returncode:
        raise RuntimeError(f"{process.args!r} failed: {stderr.strip()[-2000:]}")


def _shuffling_rows(plan: Plan, folder: Path, threads: int) -> Iterator[Row]:
    path = make(folder, plan.shuffle_cells)
    for order in (IN_MEMORY, ON_DISK, IN_ORDER):
        losses = [
            alone.run(
                shuffle,
                threads=threads,
                path=str(path),
                order=order,
                epochs=plan.shuffle_epochs,
                batch_size=plan.batch_size,
                held_out=plan.held_out,
                seed=seed,
            )["loss"]
            for seed in range(plan.seeds)
        ]
        more = {"B": plan.batch_size, "epochs": plan.shuffle_epochs, "losses": losses}
        yield _row(SHUFFLING, order, plan.shuffle_cells, threads, **more)


def exponent(rows: Sequence[Row]) -> float:
    """Slope of log seconds against the log of the number of cells."""
    x, y = (np.log([row[name] for row in rows]) for name in ("cells", "seconds"))
    return float(np.polyfit(x, y, 1)[0])


def least_gain(row: Row) -> float:
    """How much an iteration of EM has raised the objective at least; below 0 where it fell."""
    return float(np.diff(row["objective"]).min())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options that no other part has."""
    parser.add_argument("--cells", nargs="+", type=int, help="in the atlases on disk")
    parser.add_argument(
        "--atlases", type=Path, default=ATLASES, help="folder to keep them in (default: build/)"
    )


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Rows for the command line's options; none where scvi-tools is not installed."""
    try:
        import scvi  # noqa: F401
    except ImportError:
        print('atlas is left out: pip install "vmm-fast[scvi]"')
        return
    plan = QUICK if args.quick else FULL
    if args.cells:
        plan = plan._replace(cells=tuple(sorted(args.cells)))
    yield from rows(plan, args.atlases, args.threads)
