"""The cells to train on, and what a user should know about them before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix

from vmm_fast._errors import InputError
from vmm_fast._text import counted
from vmm_fast.cells.columns import training_columns
from vmm_fast.cells.elements import notes_on_omissions
from vmm_fast.cells.names import notes_on_genes
from vmm_fast.cells.quiet import quiet
from vmm_fast.cells.reading import counts_of
from vmm_fast.cells.settings import Settings
from vmm_fast.cells.store import CellStore
from vmm_fast.cells.writing import RESERVED, ROWS
from vmm_fast.scvi.loading import window_of

MANY_GENES = 10_000  # where selecting some is worth a note
SAMPLE = 20_000  # cells drawn from disk for pseudo-cells, the choice of genes and the report
EARLIER = "obs has results of an earlier run, this one's stand in their place"


class OnDisk(NamedTuple):
    """All cells on disk, and which of them the model is made with.

    Attributes
    ----------
    store : CellStore
    obs : DataFrame
        Batches, covariates and labels of all cells.
    genes : ndarray of int or None
        Columns of the store to train on; None for all.
    rows : ndarray of int
        The cells that the model is made with, as rows of the store.
    """

    store: CellStore
    obs: pd.DataFrame
    genes: np.ndarray | None
    rows: np.ndarray


def training_cells(adata: AnnData, settings: Settings) -> tuple[AnnData, list[str]]:
    """Return the cells to train on, with the chosen genes and their batches, and notes on them.

    Raises InputError if the values are not counts, or a key is missing or cannot be used.
    """
    counts = csr_matrix(counts_of(adata, settings.layer, np.float32), dtype=np.float32)
    notes = [EARLIER] if set(RESERVED) & set(adata.obs) else []
    notes += notes_on_genes(adata.var_names)
    obs, of_columns = training_columns(adata, settings)
    notes += of_columns
    depth, detected = counts.sum(1).A1, counts.sum(0).A1
    notes += _notes_on_counts(int((depth == 0).sum()), detected) + notes_on_cell_names(adata)
    whole = make_adata(counts, obs, adata.var_names, settings.layer)
    chosen = _variable_genes(whole, settings)
    if settings.genes is None and adata.n_vars > MANY_GENES:
        notes.append(f"trained on all {adata.n_vars:,} genes; --genes 2000 is faster")
    cells = whole[:, chosen].copy()
    if number := int((counts_in(cells, settings.layer).sum(1).A1 == 0).sum() - (depth == 0).sum()):
        notes.append(f"{number:,} more have none in the genes that are trained on")
    return cells, notes


def training_cells_on_disk(
    store: CellStore, settings: Settings
) -> tuple[AnnData, OnDisk, list[str]]:
    """Return some cells of a store to make the model with, where all of them are, and notes.

    Every cell is read once, so that errors and notes come before training. See
    :func:`training_cells`.
    """
    notes = [EARLIER] if set(RESERVED) & store.dtypes.keys() else []
    notes += notes_on_genes(store.var_names)
    every, of_columns = training_columns(store, settings)
    notes += of_columns
    empty, detected = 0, np.zeros(store.n_vars)
    step = window_of(store)
    for start in range(0, store.n_obs, step):
        stop = min(start + step, store.n_obs)
        counts = store.read(start, stop)
        empty += int((counts.sum(1) == 0).sum())  # zeros may be stored
        detected += counts.sum(0).A1
    notes += _notes_on_counts(empty, detected) + notes_on_cell_names(store)
    notes += notes_on_omissions("obs and var", ["counts", *store.others])
    number = max(SAMPLE, 2 * settings.components)  # pseudo-cells start from some of them
    sample = store.sample(number, seed=settings.seed)
    rows, genes_of = sample.uns["rows"], store.var_names
    obs = every.iloc[rows].set_axis(sample.obs_names)
    chosen = _variable_genes(make_adata(sample.X, obs, genes_of, settings.layer), settings)
    # A view of the sample would lose the categories of batches that none of its cells has.
    some = make_adata(sample.X[:, chosen], obs.copy(), genes_of[chosen], settings.layer)
    on_disk = OnDisk(store, every, None if chosen.all() else np.flatnonzero(chosen), rows)
    return some, on_disk, notes


def _notes_on_counts(empty: int, detected: np.ndarray) -> list[str]:
    """Return notes on cells and genes without counts; refuse counts that are all 0."""
    if not detected.any():
        raise InputError("must hold counts above 0, all are 0")
    notes = []
    if empty:
        notes.append(f"{counted(empty, 'cell has', 'cells have')} no counts at all")
    if number := int((detected == 0).sum()):
        notes.append(f"{counted(number, 'gene has', 'genes have')} no counts at all")
    return notes


def notes_on_cell_names(cells: AnnData | CellStore) -> list[str]:
    """Return a note on cells that share their name with another cell, if there are any."""
    if isinstance(cells, CellStore):
        names = np.empty(cells.n_obs, dtype=np.uint64)
        for start in range(0, cells.n_obs, ROWS):
            part = cells.obs_names(start, min(start + ROWS, cells.n_obs))
            names[start : start + len(part)] = pd.util.hash_array(part, categorize=False)
        same = cells.n_obs - len(np.unique(names))
    else:
        same = int(cells.obs_names.duplicated().sum())
    have = counted(same, "cell has", "cells have")
    return [f"{have} a name that another has, too; results are in order"] if same else []


def make_adata(counts: Any, obs: Any, genes: Any, layer: str | None) -> AnnData:
    """Return an AnnData with the counts in the given layer, or in X, as the input has them."""
    var = pd.DataFrame(index=genes)
    if layer is None:
        return AnnData(counts, obs, var)
    return AnnData(obs=obs, var=var, layers={layer: counts})


def cells_of_each_category(
    columns: Mapping[str, Mapping[str, np.ndarray | None]], genes: Any, layer: str | None
) -> AnnData:
    """Return cells that show every category of a model's columns, all of their counts 1.

    Some models cannot be made without cells; these are enough. ``columns`` are as
    :func:`vmm_fast.scvi.columns.registered_columns` returns them.
    """
    named = [pair for of_key in columns.values() for pair in of_key.items()]
    number = max(len(categories) for _, categories in named if categories is not None)
    obs = pd.DataFrame(
        {
            key: np.zeros(number) if categories is None else np.resize(categories, number)
            for key, categories in named
        }
    ).set_index(pd.RangeIndex(number).map(str))
    return make_adata(csr_matrix(np.ones((number, len(genes)), np.float32)), obs, genes, layer)


def counts_in(adata: AnnData, layer: str | None) -> Any:
    """Return X, or the layer."""
    return adata.X if layer is None else adata.layers[layer]


def _variable_genes(adata: AnnData, settings: Settings) -> np.ndarray:
    if settings.genes is None or settings.genes >= adata.n_vars:
        return np.ones(adata.n_vars, dtype=bool)
    from scanpy.experimental.pp import highly_variable_genes

    with quiet():
        found = highly_variable_genes(
            adata,
            flavor="pearson_residuals",
            n_top_genes=settings.genes,
            batch_key=settings.batch_key,
            layer=settings.layer,
            inplace=False,
        )
    chosen: np.ndarray = found["highly_variable"].to_numpy()
    return chosen
