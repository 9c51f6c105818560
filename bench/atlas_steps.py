"""The steps of :mod:`bench.out_of_core`, each of which runs in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import atlas
from bench.steps import SILENT

SCDATASET_BLOCK = 64  # cells
IN_MEMORY, ON_DISK, IN_ORDER = "in memory", "from disk", "from disk, in order"
EM_BATCH = 16_384  # points


def command(arguments: Sequence[str]) -> dict[str, float]:
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
    from vmm_fast.scvi.loading import CellBatches

    with CellStore(path) as store:
        start = time.perf_counter(), time.process_time()
        codes = store.column("batch").codes
        starts = np.arange(0, store.n_obs, store.run)
        stops = np.minimum(starts + store.run, store.n_obs)
        batches = CellBatches(store, codes, starts, stops, batch_size=batch_size, seed=0)
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


def difference(one: str, other: str) -> dict[str, Any]:
    """Return the largest difference between the parameters of two models."""
    states = [
        torch.load(Path(folder) / "model" / "model.pt", weights_only=False)["model_state_dict"]
        for folder in (one, other)
    ]
    if states[0].keys() != states[1].keys():
        raise RuntimeError(f"{one} and {other} hold different parameters")
    gaps = [
        float((value.double() - states[1][name].double()).abs().max())
        for name, value in states[0].items()
        if torch.is_tensor(value) and value.numel()
    ]
    return {"difference": max(gaps)}


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
