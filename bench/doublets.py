"""Measure how well scores find doublets: cells that are the sum of two others.

Pairs of random cells of one batch are added up and join the data before training, as many as a
tenth of the cells; the cells that they are made of stay. Scores are compared by the area under the
ROC curve. Two cells make about twice the counts of one, so that the number of counts finds doublets
by itself: a score must do better to be worth anything.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bench import comparison, novelty
from bench.comparison import Comparison
from bench.novelty import LEFT_OUT, SEEDS, Problem
from bench.records import Row
from bench.tables import spread

if TYPE_CHECKING:
    from anndata import AnnData

SHARE = 0.1  # doublets that are made, of the cells
DIFFERENT, SAME = "different", "same"  # types of the two cells


def pairs(batches: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of pairs of different cells of one batch, for this share of its cells."""
    random = np.random.default_rng(seed)
    found = []
    for batch in np.unique(batches):
        rows = np.flatnonzero(batches == batch)
        number = round(share * len(rows))
        first = random.integers(len(rows), size=number)
        second = (first + random.integers(1, len(rows), size=number)) % len(rows)
        found.append((rows[first], rows[second]))
    first, second = (np.concatenate(part) for part in zip(*found, strict=True))
    return first, second


def added(cells: AnnData, counts: Any, first: np.ndarray, second: np.ndarray) -> AnnData:
    """Return the sums of the counts of pairs of rows, as cells with the columns of the first."""
    import anndata

    obs = cells.obs.iloc[first].reset_index(drop=True).rename(index="doublet {}".format)
    return anndata.AnnData(counts[first] + counts[second], obs, cells.var)


@cache
def problem(dataset: str, seed: int, data: str, epochs: int) -> Problem:
    """Return the problem of a data set and seed, with the model trained on all that is scored."""
    import anndata

    cells = anndata.read_h5ad(Path(data) / f"{dataset}.h5ad")
    types = cells.obs["cell_type"].astype(str).to_numpy()
    first, second = pairs(cells.obs["batch"].to_numpy(), SHARE, seed)
    kinds = np.where(types[first] == types[second], SAME, DIFFERENT)
    every = anndata.concat([cells, added(cells, cells.X, first, second)])
    model = novelty.trained(every, seed, epochs)
    return Problem(model, every, every, np.concatenate([np.full(len(types), ""), kinds]))


def size(cells: AnnData) -> np.ndarray:
    """Return the number of counts of each cell."""
    return np.asarray(cells.X.sum(1)).ravel()


def scrublet(on: Problem) -> np.ndarray:
    """Return scanpy's score of doublets, which needs no model."""
    import scanpy

    # A threshold of its own would need scikit-image; the score does not depend on it.
    cells = on.query.copy()
    scanpy.pp.scrublet(cells, batch_key="batch", threshold=0.5, use_approx_neighbors=False)
    return cells.obs["doublet_score"].to_numpy()


@torch.inference_mode()
def decoded(on: Problem, sized: bool = False) -> np.ndarray:
    """Return the share of doublets near each cell, made of counts that cells are decoded to."""
    batch = torch.from_numpy(on.model.adata_manager.get_from_registry("batch")).long()
    library = torch.from_numpy(size(on.query)).float().log()[:, None]
    torch.manual_seed(0)
    px = on.model.module.generative(on.model._latents(on.query), library, batch)["px"]
    return near(on, px.sample().numpy(), sized)


def sums(on: Problem) -> np.ndarray:
    """Return the share of doublets near each cell, made of the counts of cells themselves."""
    return near(on, on.query.X)


def near(on: Problem, counts: Any, sized: bool = False) -> np.ndarray:
    """Return the share of doublets made of these counts, as many as cells, among neighbours.

    Neighbours are near in the latent space; if sized, the logarithm of the number of counts is one
    more dimension, spread as the others.
    """
    from sklearn.neighbors import NearestNeighbors

    # Not a seed of the doublets that are to be found.
    both = on.query, added(on.query, counts, *pairs(on.query.obs["batch"].to_numpy(), 1.0, 1_000))
    real, made = (on.model._latents(cells).numpy() for cells in both)
    if sized:
        logs = [np.log1p(size(cells)) for cells in both]
        scale = real.std(0).mean() / logs[0].std()
        real, made = (np.c_[z, scale * log] for z, log in zip((real, made), logs, strict=True))
    neighbours = NearestNeighbors(n_neighbors=round(len(real) ** 0.5) + 1)
    neighbours.fit(np.concatenate([real, made]))
    among = neighbours.kneighbors(real, return_distance=False)[:, 1:]  # without the cell itself
    return (among >= len(real)).mean(1)


METHODS: dict[str, tuple[str, Callable[[Problem], np.ndarray]]] = {
    "decoded": ("decoded pairs", decoded),
    "decoded-sized": ("decoded pairs, with the number of counts", partial(decoded, sized=True)),
    "sums": ("pairs of cells' own counts", sums),
    "size": ("number of counts", lambda on: size(on.query)),
    "scrublet": ("score of Scrublet", scrublet),
    **{name: novelty.METHODS[name] for name in ("novelty", "density", "entropy")},
}


def score(dataset: str, method: str, seed: int, args: argparse.Namespace) -> Row:
    """Return the areas under the ROC curve of the doublets against cells, and of the two kinds."""
    on = problem(dataset, seed, args.data, args.epochs)
    scores = METHODS[method][1](on)
    against = {kind: novelty.area(scores, on.types, kind) for kind in (DIFFERENT, SAME)}
    kinds = novelty.area(scores, on.types, DIFFERENT, SAME)
    number = {kind: int((on.types == kind).sum()) for kind in (DIFFERENT, SAME)}
    row = {"epochs": args.epochs, "cells": int((on.types == "").sum()), "doublets": number}
    return {**row, "auroc": {**against, "kinds": kinds}}


# --- page ---


def _areas(rows: list[Row], kind: str = DIFFERENT) -> list[float]:
    return [row["auroc"][kind] for row in rows]


def _about(rows: list[Row]) -> str:
    made = {kind: mean(row["doublets"][kind] for row in rows) for kind in (DIFFERENT, SAME)}
    return (
        f"{rows[0]['cells']:,} cells, {made[DIFFERENT]:.0f} doublets of different types and "
        f"{made[SAME]:.0f} of one, {rows[0]['epochs']} epochs"
    )


COMPARISON = Comparison(
    part="doublets",
    title="Doublets",
    datasets={name: name for name in LEFT_OUT},
    methods=METHODS,
    score=score,
    columns={
        "AUROC, different types": lambda rows: spread(_areas(rows)),
        "one type": lambda rows: spread(_areas(rows, SAME)),
        "different against one": lambda rows: spread(_areas(rows, "kinds")),
    },
    legend="Random pairs of cells of one batch are added up and join the data before training; the "
    "cells that they are made of stay. AUROC: how well a score tells these doublets from cells, "
    "if the two are of different types and if they are of one, and the first kind from the second; "
    "mean and standard deviation over the seeds. Decoded pairs: counts are sampled from what cells "
    "are decoded to, each at its own number of counts, and added up in random pairs, as many as "
    "there are cells; the score is the share of these among the √n nearest neighbours of a cell in "
    "the latent space. The same is tried with the number of counts as one more dimension, and with "
    "the cells' own counts, of which Scrublet makes its pairs, without a model. That cells are "
    "decoded, not components, and at their own number of counts, was chosen on seed 0 of these "
    "data sets. A real doublet seldom has all counts of both cells: their number tells less there.",
    versions=("scvi-tools", "scanpy", "scikit-learn"),
    about=_about,
    verdicts=partial(
        novelty.verdicts,
        methods=METHODS,
        ours="decoded",
        others=("size", "scrublet", "sums"),
        areas=_areas,
    ),
)
MEASUREMENT = comparison.measurement(
    COMPARISON,
    "single cells: how well doublets are found",
    options={**novelty.OPTIONS, **comparison.options(COMPARISON, SEEDS, list(LEFT_OUT))},
    needs=("scvi",),
)
