"""Measure how well cells of types that a model was not trained on are told from others.

Some types are left out of training, and a fifth of the other cells. Scores of a method, for all of
these cells, are compared by the area under the ROC curve, for each of the left-out types by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bench import comparison
from bench.comparison import Comparison
from bench.records import DATA, Row, select
from bench.steps import SILENT
from bench.tables import spread

if TYPE_CHECKING:
    from anndata import AnnData

LEFT_OUT = {
    "pbmc3k": ("B", "CD14+ Mono", "NK"),
    "kang_ifnb_pbmc": ("B", "CD14 Mono", "NK"),
    "mouse_bladder": ("02", "04", "07"),
}
SEEDS = 3
EPOCHS = 60
TOLD = 0.95  # novelty above which a cell is taken to be new
NEIGHBOURS = 15


class Problem(NamedTuple):
    """A trained model, its cells, other cells, and the types of these, "" of those not left out."""

    model: Any
    reference: AnnData
    query: AnnData
    types: np.ndarray


@cache
def problem(dataset: str, seed: int, data: str, epochs: int) -> Problem:
    """Return the problem of a data set and seed, with the model trained."""
    import anndata

    adata = anndata.read_h5ad(Path(data) / f"{dataset}.h5ad")
    types = adata.obs["cell_type"].astype(str).to_numpy()
    types = np.where(np.isin(types, LEFT_OUT[dataset]), types, "")
    query = (types != "") | (np.random.default_rng(seed).random(adata.n_obs) < 0.2)
    reference = adata[~query].copy()
    model = trained(reference, seed, epochs)
    return Problem(model, reference, adata[query].copy(), types[query])


def trained(cells: AnnData, seed: int, epochs: int) -> Any:
    """Return a model that was trained on cells, with its default options."""
    import scvi

    from vmm_fast.cells.quiet import quiet
    from vmm_fast.scvi import VMMSCVI

    with quiet():
        scvi.settings.seed = seed
        VMMSCVI.setup_anndata(cells, batch_key="batch")
        model = VMMSCVI(cells)
        model.train(epochs, **SILENT)
    return model


def novelty(on: Problem) -> np.ndarray:
    """Return the model's novelty."""
    return on.model.get_novelty(on.query)


def density(on: Problem) -> np.ndarray:
    """Return -log p(z)."""
    z = on.model._latents(on.query)
    return -on.model._components().log_prob(z).numpy()


def distance(on: Problem) -> np.ndarray:
    """Return the mean distance to the nearest training cells in the latent space."""
    from sklearn.neighbors import NearestNeighbors

    trained = on.model._latents(on.reference, on.model.train_indices).numpy()
    neighbours = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(trained)
    return neighbours.kneighbors(on.model._latents(on.query).numpy())[0].mean(1)


def entropy(on: Problem) -> np.ndarray:
    """Return the entropy of the cluster probabilities."""
    return on.model.get_cluster_entropy(on.query)


METHODS: dict[str, tuple[str, Callable[[Problem], np.ndarray]]] = {
    "novelty": ("novelty", novelty),
    "density": ("-log p(z)", density),
    "neighbours": (f"distance to {NEIGHBOURS} nearest training cells", distance),
    "entropy": ("entropy of the cluster probabilities", entropy),
}


def score(dataset: str, method: str, seed: int, args: argparse.Namespace) -> Row:
    """Return the area under the ROC curve of each type that was left out.

    Of novelty also return the shares of cells of each type, and of others, that are taken to be
    new.
    """
    on = problem(dataset, seed, args.data, args.epochs)
    scores = METHODS[method][1](on)
    areas = {name: area(scores, on.types, name) for name in LEFT_OUT[dataset]}
    row = {"epochs": args.epochs, "cells": on.reference.n_obs, "query_cells": len(on.types)}
    if method == "novelty":
        above = {name: float((scores[on.types == name] > TOLD).mean()) for name in ("", *areas)}
        row["told"] = {"known": above.pop(""), **above}
    return {**row, "auroc": areas}


def area(scores: np.ndarray, types: np.ndarray, new: str, known: str = "") -> float:
    """Return the area under the ROC curve of the cells of one type against those of another."""
    from sklearn.metrics import roc_auc_score

    either = np.isin(types, (new, known))
    return float(roc_auc_score(types[either] == new, scores[either]))


# --- page ---


def _areas(rows: list[Row]) -> list[float]:
    return [mean(row["auroc"].values()) for row in rows]


def _each(rows: list[Row]) -> str:
    names = rows[0]["auroc"]
    return ", ".join(f"{name} {mean(row['auroc'][name] for row in rows):.2f}" for name in names)


def _told(rows: list[Row]) -> str:
    if "told" not in rows[0]:
        return ""
    known = mean(row["told"]["known"] for row in rows)
    new = mean(mean(row["told"][name] for name in row["auroc"]) for row in rows)
    return f"{known:.1%}, {new:.0%}"


def verdicts(
    rows: list[Row],
    methods: Mapping[str, Any] = METHODS,
    ours: str = "novelty",
    others: Sequence[str] = ("neighbours", "entropy"),
    areas: Callable[[list[Row]], list[float]] = _areas,
) -> list[str]:
    """Return whether our method is above each of the others, in the mean over the data sets."""
    groups = {
        name: [select(rows, method=name, dataset=dataset) for dataset in LEFT_OUT]
        for name in (ours, *others)
    }
    seeds = min(len(same) for every in groups.values() for same in every)
    if not seeds:
        return ["open: some methods have no rows on some data sets"]
    means = {name: mean(mean(areas(same)) for same in every) for name, every in groups.items()}
    found = []
    for name in others:
        verdict = "met" if means[ours] > means[name] else "MISSED"
        found.append(
            f"{verdict if seeds >= SEEDS else f'open (seeds: {seeds} of {SEEDS})'}: AUROC of "
            f"{methods[ours][0]} {means[ours]:.3f} above that of the {methods[name][0]}, "
            f"{means[name]:.3f}"
        )
    return found


COMPARISON = Comparison(
    part="novelty",
    title="Cells of types that were left out of training",
    datasets={name: name for name in LEFT_OUT},
    methods=METHODS,
    score=score,
    columns={
        "AUROC": lambda rows: spread(_areas(rows)),
        "of each type": _each,
        "above .95: known, new": _told,
    },
    legend="Three types are left out of training together, and a fifth of the other cells. AUROC: "
    "how well a score tells the cells of one of these types from those other cells, in the mean "
    "over the types; mean and standard deviation over the seeds. The last column has the shares of "
    "cells with a novelty above .95: of the others, 5 % if it is calibrated, and of the types. "
    "What novelty is made of was chosen on seed 0 of these data sets.",
    versions=("scvi-tools",),
    about=lambda rows: f"{rows[0]['cells']:,} cells to train on, {rows[0]['epochs']} epochs",
    verdicts=verdicts,
)
OPTIONS: dict[str, dict[str, Any]] = {
    "--data": {"default": str(DATA), "help": "folder with the .h5ad files"},
    "--epochs": {"type": int, "default": EPOCHS},
}
MEASUREMENT = comparison.measurement(
    COMPARISON,
    "single cells: how well types that were left out of training are told",
    options={**OPTIONS, **comparison.options(COMPARISON, SEEDS, list(LEFT_OUT))},
    needs=("scvi",),
)
