"""Exact EM of a trained prior over the embedding of all cells, which lies on disk.

As a user does it after ``vmm-fast integrate``: ``fit`` of the trained prior, which goes through the
points once an iteration. Weights, precisions and concentration go to their maximisers over all
cells; pseudo-cells and network stand still. Points are read batch by batch from a memory-mapped
.npy, whose pages count as memory while the system keeps them.

scikit-learn's GaussianMixture takes the same mixture and the same points, as many as it has time
for, in memory; the two take turns.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import providers
from bench.timing import sampler, take_turns

BATCH = 16_384  # points


def save(results: Path) -> Path:
    """Write the embedding that ``vmm-fast integrate`` found to an .npy beside its results."""
    import h5py

    path = results / "embedding.npy"
    with h5py.File(results / "cells.h5ad") as file:
        np.save(path, file["obsm/X_vmm"][:])
    return path


def trained(results: str, cells: str) -> Any:
    """Give the model in such results, with some of the cells that it was trained on."""
    from vmm_fast.scvi import VMMSCVI, CellStore
    from vmm_fast.scvi.integration import quiet

    with CellStore(cells) as store, quiet():
        return VMMSCVI.load(f"{results}/model", store.sample(1000, keys=["batch"]))


def mapped(results: str) -> Tensor:
    """Give the points that :func:`save` wrote, [n, D], which are read as they are used."""
    # Copied on write: torch warns of memory that must not be written.
    return torch.from_numpy(np.load(f"{results}/embedding.npy", mmap_mode="c"))


def fit(results: str, cells: str, iterations: int) -> dict[str, Any]:
    """Seconds of an iteration, and the objective, in nats a point, before each."""
    module = trained(results, cells).module
    points = mapped(results)
    start = time.perf_counter()
    objective = module.prior.fit(
        points.split(BATCH),
        module.encode_pseudo_cells,
        max_iterations=iterations,
        tolerance=-np.inf,
    )
    seconds = (time.perf_counter() - start) / iterations
    return {"seconds": seconds, **_sizes(module, points), "objective": objective}


def peer(results: str, cells: str, most: int, repeats: int) -> dict[str, Any]:
    """Seconds of scikit-learn's step for all points, of which it takes so many at most.

    And how many times as fast an iteration over all of them is, from disk.
    """
    module = trained(results, cells).module
    points = mapped(results)
    some = points[:most].clone()
    theirs = providers.sklearn_em(some, module.components()).call
    ours = partial(
        module.prior.fit, points.split(BATCH), module.encode_pseudo_cells, max_iterations=1
    )
    samplers = {"ours": sampler(ours), "theirs": sampler(theirs)}
    timings = take_turns(samplers, repeats=repeats, seconds=0)
    seconds = timings["theirs"]["p50"] * len(points) / len(some)
    return {
        "seconds": seconds,
        **_sizes(module, points),
        "measured": len(some),
        "times as fast": seconds / timings["ours"]["p50"],
    }


def _sizes(module: Any, points: Tensor) -> dict[str, int]:
    return {"J": module.prior.num_components, "D": points.shape[1]}
