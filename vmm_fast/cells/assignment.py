"""Assigning new cells to the clusters of a trained model.

Genes are matched by name. A cell of a batch that the model knows is encoded as of that batch, one
of a new batch as of all known batches in equal shares: the model knows nothing about a new batch,
so none is preferred. Categories of covariates are taken likewise. Weights for new ones can be
trained first (:mod:`vmm_fast.cells.mapping`); what the model knows stays as it was.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix
from scvi import REGISTRY_KEYS

from vmm_fast._errors import InputError
from vmm_fast._files import check_archive
from vmm_fast._folder import folder_of_model
from vmm_fast._text import joined
from vmm_fast.cells import frames
from vmm_fast.cells.columns import column_of, numbers_of
from vmm_fast.cells.elements import notes_on_omissions
from vmm_fast.cells.integration import (
    assigned,
    dendrogram,
    latent_means,
    set_clusters,
)
from vmm_fast.cells.mapping import OfCells, map_cells
from vmm_fast.cells.names import notes_on_genes
from vmm_fast.cells.quiet import quiet
from vmm_fast.cells.reading import counts_of
from vmm_fast.cells.selection import EARLIER, cells_of_each_category, notes_on_cell_names
from vmm_fast.cells.settings import usual_epochs
from vmm_fast.cells.store import CellStore
from vmm_fast.cells.writing import NOVELTY, RESERVED, write_adata, write_clustered
from vmm_fast.scvi.columns import UNKNOWN, registered_columns
from vmm_fast.scvi.loading import CellBatches, CellSource, MemoryCells
from vmm_fast.scvi.model import VMMSCANVI, VMMSCVI
from vmm_fast.scvi.saved import check_model

NOT_CALIBRATED = (
    f"obs[{NOVELTY!r}] is NaN: the model was saved before models had novelty; load it with its "
    "cells, call calibrate_novelty() and save it again"
)
COARSE = (
    f"obs[{NOVELTY!r}] is coarse: it is compared with that of {{}} held-out cells, in steps of "
    "{:.2g}"
)
FEW = 100  # held-out cells
MOST_MISSING = 0.05  # share of the model's genes that may be taken as 0


class SavedModel(NamedTuple):
    """A loaded model, its folder, and the genes and columns that new cells are matched with.

    ``layer`` names the layer that had its cells' counts; ``columns`` are those of obs, as
    :func:`vmm_fast.scvi.columns.registered_columns` returns them.
    """

    model: VMMSCVI | VMMSCANVI
    folder: Path
    genes: pd.Index
    layer: str | None
    columns: dict[str, dict[str, np.ndarray | None]]


def find_model(path: str, *, trust: bool = False, **cut: Any) -> SavedModel:
    """Load the model in a folder that ``vmm-fast integrate`` or ``VMMSCVI.save`` wrote.

    Unless ``trust``, the file must hold tensors and tables alone, since others could run code when
    they are read. ``cut`` says where to cut the tree of clusters, as in
    :func:`vmm_fast.clusters.find_clusters`; by default the model's clusters stay.

    Raises InputError if there is no model, or it has no clusters, or it needs more than the counts,
    batch and covariates of a cell.
    """
    folder = folder_of_model(path)
    damaged = InputError(f"{path}: model.pt in it is damaged or of no scvi-tools model")
    try:
        if trust:
            check_archive(folder / "model.pt")
        else:
            check_model(folder / "model.pt", "--trust")
    except OSError as error:
        raise InputError(f"{path}: model.pt cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    try:
        with quiet():
            registry = VMMSCVI.load_registry(str(folder), trust=True)
            genes = VMMSCVI.prepare_query_anndata(None, str(folder), True, trust=True)
        name, setup = registry["model_name"], registry["setup_args"]
    except Exception:  # pickle raises many kinds
        raise damaged from None
    kinds = {kind.__name__: kind for kind in (VMMSCVI, VMMSCANVI)}
    if name not in kinds:
        raise InputError(f"{path}: must be a model of {' or '.join(kinds)}, but is of {name}")
    if setup.get("size_factor_key"):
        raise InputError(
            f"{path}: must be a model without size factors, but has them; use "
            f"{name}.load_query_data"
        )
    layer = setup["layer"]
    try:
        columns = registered_columns(registry)
        with quiet():
            cells = cells_of_each_category(columns, genes, layer)
            model = kinds[name].load(str(folder), cells, trust=True)
    except MemoryError:
        raise
    except Exception:  # scvi-tools raises many kinds for a file whose parts do not fit together
        raise damaged from None
    for name, values in model.module.named_parameters():
        if not values.isfinite().all():
            raise InputError(f"{path}: model.pt must hold finite numbers, but {name} has others")
    if model.module.prior is None:
        raise InputError(f"{path}: must be a model with clusters, but is of N(0, I)")
    if model.module.tree is None:
        raise InputError(
            f"{path}: must be a model with clusters, but was saved before models had them; load it "
            "with its cells, call find_clusters() and save it again"
        )
    if any(value is not None for value in cut.values()):
        try:
            clusters = model.module.other_clusters(**cut)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
        model.module.cluster_of_component.copy_(clusters.of_component)
    return SavedModel(model, folder, genes, layer, columns)


# --- cells that fit the model ---


class MatchedCells(NamedTuple):
    """Cells with the genes of a model, ready to be assigned, and notes on how they were matched.

    ``columns`` has the index of each cell's batch and of its categories, and its numbers; see
    :func:`vmm_fast.scvi.columns.cell_columns`. Those that the model does not know are counted on
    from those that it knows.
    """

    counts: CellSource
    columns: dict[str, np.ndarray]
    notes: list[str]


def match(
    cells: AnnData | CellStore, saved: SavedModel, layer: str | None = None, train: bool = False
) -> MatchedCells:
    """Return cells with the model's genes, batches and covariates.

    Counts are those of ``layer``, by default the model's layer if the cells have it, else X; a
    store has its own. ``train`` says what notes say of new batches. Raises InputError if the cells
    do not fit the model. The values of a store are checked later, when they are read.
    """
    more: list[str] = []
    source: CellSource
    if isinstance(cells, CellStore):
        source, more = cells, notes_on_omissions("obs and var", ["counts", *cells.others])
        earlier = set(RESERVED) & cells.dtypes.keys() or "obsm/X_vmm" in cells.others
    else:
        if layer is None and saved.layer in cells.layers:
            layer = saved.layer
        source = MemoryCells(csr_matrix(counts_of(cells, layer, np.float32), dtype=np.float32))
        earlier = set(RESERVED) & set(cells.obs) or "X_vmm" in cells.obsm
    at, notes = _genes(cells.var_names, saved.genes)
    columns, of_columns = _columns(cells, saved.columns, train)
    notes = [*notes_on_genes(cells.var_names), *notes, *of_columns]
    notes += [*([EARLIER] if earlier else []), *notes_on_cell_names(cells), *more]
    held_out = int(saved.model.module.novelty_cells[0].isfinite().sum())
    if held_out < FEW:
        notes.append(COARSE.format(held_out, 1 / (held_out + 1)) if held_out else NOT_CALIBRATED)
    return MatchedCells(_OfGenes(source, at), columns, notes)


def _genes(have: pd.Index, genes: pd.Index) -> tuple[np.ndarray, list[str]]:
    """Return the column of each gene of the model in the cells, -1 for missing ones; and notes."""
    at = have.get_indexer(genes)
    missing = genes[at < 0]
    if not len(missing):
        return at, []
    first, are = joined(missing, 5), "is" if len(missing) == 1 else "are"
    number = f"{len(missing):,} of the model's {len(genes):,} genes {are}"
    if len(missing) > MOST_MISSING * len(genes):
        raise InputError(
            f"must have the model's genes, {number} missing, more than {MOST_MISSING:.0%}: {first}"
        )
    return at, [f"{number} missing, taken as 0: {first}"]


class _OfGenes:
    """A CellSource with the genes in columns `at` of another; -1 stands for counts of 0."""

    def __init__(self, cells: CellSource, at: np.ndarray):
        self.n_obs, self.n_vars = cells.n_obs, len(at)
        self.nbytes, self.run = cells.nbytes, cells.run
        self._cells, self._at = cells, np.where(at < 0, cells.n_vars, at)

    def read(self, starts: np.ndarray, stops: np.ndarray) -> csr_matrix:
        counts = self._cells.read(starts, stops)
        # One empty column behind the others stands for all missing genes.
        counts.resize(counts.shape[0], self._cells.n_vars + 1)
        return counts[:, self._at]


def _columns(
    cells: AnnData | CellStore, registered: dict[str, dict[str, np.ndarray | None]], train: bool
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return a model's batches and covariates of the cells, and notes; labels play no part."""
    found: dict[str, np.ndarray] = {}
    notes: list[str] = []
    for key, columns in registered.items():
        if key == REGISTRY_KEYS.LABELS_KEY:
            continue
        what = "batch" if key == REGISTRY_KEYS.BATCH_KEY else "category"
        parts = []
        for name, categories in columns.items():
            if name == f"_scvi_{key}":  # the model has none
                parts.append(np.zeros(cells.n_obs, dtype=np.int32))
            elif categories is None:
                if not _has(cells, name):
                    raise InputError(
                        f"must have {name!r} in obs, numbers that the model was trained with; add "
                        "that column"
                    )
                parts.append(numbers_of(column_of(cells, name, name), f"{name!r} of obs:"))
            else:
                known = pd.Index(categories, dtype=object)
                codes, more = _codes(cells, name, what, known, train)
                parts.append(codes)
                notes += more
        if parts:
            found[key] = np.stack(parts, 1)
    return found, notes


def _has(cells: AnnData | CellStore, key: str) -> bool:
    return key in (cells.dtypes if isinstance(cells, CellStore) else cells.obs)


def _codes(
    cells: AnnData | CellStore, key: str, what: str, known: pd.Index, train: bool
) -> tuple[np.ndarray, list[str]]:
    """Return the index of each cell's batch or category in the model, and notes.

    Unknown ones are counted on. Without that column all cells are of an unknown one.
    """
    several = "batches" if what == "batch" else "categories"
    how = f"cells are encoded as of all known {several} in equal shares"
    how = f", whose {'weights are trained' if train else how}"
    n_obs = cells.n_obs
    if not _has(cells, key):
        note = f"obs has no {key!r}, the model's {several}: all cells are taken as of a new {what}"
        return np.full(n_obs, len(known), dtype=np.int32), [note + how]
    given = column_of(cells, key, key)
    if missing := int((given.codes < 0).sum()):
        raise InputError(
            f"{key!r} of obs: every cell must have a {what}, {missing:,} of {n_obs:,} have none"
        )
    at = frames.find(given.categories, known)
    unknown = [i for i in pd.unique(given.codes) if at[i] < 0]
    at[unknown] = len(known) + np.arange(len(unknown))
    codes, new = at.astype(np.int32)[given.codes], [str(given.categories[i]) for i in unknown]
    if not new:
        return codes, []
    are = f"a {what}" if len(new) == 1 else f"{len(new)} {several}"
    where = "" if what == "batch" else f" of {key!r}"
    return codes, [f"{are} that the model does not know{where}: {joined(new, 5)}{how}"]


def _of_known(
    columns: dict[str, np.ndarray], registered: dict[str, dict[str, np.ndarray | None]]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return columns in which what the model does not know is UNKNOWN, and which cells have that.

    These cells are rows in ascending order.
    """
    found, new = dict(columns), np.zeros(len(columns[REGISTRY_KEYS.BATCH_KEY]), dtype=bool)
    for key in {REGISTRY_KEYS.BATCH_KEY, REGISTRY_KEYS.CAT_COVS_KEY} & columns.keys():
        numbers = [len(known) for known in registered[key].values() if known is not None]
        unknown = columns[key] >= numbers
        found[key] = np.where(unknown, UNKNOWN, columns[key])
        new |= unknown.any(1)
    return found, np.flatnonzero(new)


# --- their clusters ---


@dataclass(frozen=True)
class Found:
    """Assigned cells: the model, and the cells' embedding z [cells, D], clusters and novelty.

    Clusters are columns of obs, as :func:`vmm_fast.cells.integration.assigned` returns them, and
    novelty is one more. ``trained`` tells the epochs and cells that new weights were trained with.
    """

    saved: SavedModel
    z: np.ndarray
    clusters: pd.DataFrame
    trained: dict[str, int]

    def write(self, cells: AnnData | CellStore, path: Path) -> None:
        """Write the cells with embedding and clusters to an .h5ad file, whole or not at all.

        Cells in memory get them as well, and are written whole; of a store, only obs and var are
        written. Raises InputError if the disk is too small or fills up, or a file of the store has
        changed.
        """
        uns: dict[str, Any] = {"vmm": {"model": str(self.saved.folder.resolve()), **self.trained}}
        uns |= dendrogram(self.saved.model, self.clusters)
        if isinstance(cells, CellStore):
            write_clustered(cells, path, self.z, self.clusters, cells.var, uns)
        else:
            set_clusters(cells, self.z, self.clusters)
            cells.uns.update(uns)
            with quiet():
                write_adata(path, cells)


def assign(
    cells: MatchedCells, saved: SavedModel, *, train: int | None = None, progress: bool = False
) -> Found:
    """Return the embedding of cells from :func:`match`, their clusters and their novelty.

    With `train`, weights of batches and categories that the model does not know are trained first,
    for so many epochs, or for as many as is usual if it is 0; other cells are where they would be
    without. With `progress` it is shown on stderr. Raises InputError if cells on disk can no longer
    be read, or their values are not counts, and what :func:`vmm_fast.cells.mapping.map_cells`
    raises.
    """
    trained: dict[str, int] = {}
    bar = progress and sys.stderr.isatty()
    columns, rows = _of_known(cells.columns, saved.columns)
    new = OfCells(cells.counts, rows), {key: x[rows] for key, x in cells.columns.items()}
    try:
        if train is not None:
            epochs = train or usual_epochs(max(1, len(rows)))
            trained = {"epochs": epochs, "trained_cells": len(rows)}
            mapped = map_cells(*new, saved, epochs, progress=progress)
        with quiet():
            z, rarity = _embedded(saved.model, cells.counts, columns, bar)
            if trained:
                z[rows], rarity[:, rows] = _embedded(mapped, *new, bar)
            clusters = assigned(saved.model, z)
    except ValueError as error:
        if "near enough" not in str(error):
            raise
        raise InputError(
            "cells must be like those of the training, but some are encoded too far from them "
            "for a density: look for continuous covariates that are far from the training's"
        ) from error
    module = saved.model.module
    clusters[NOVELTY] = module.novelty(rarity).numpy() if module.calibrated else np.nan
    return Found(saved, z, clusters, trained)


def _embedded(
    model: VMMSCVI | VMMSCANVI, counts: CellSource, columns: dict[str, np.ndarray], progress: bool
) -> tuple[np.ndarray, torch.Tensor]:
    """Return z [cells, D] of cells, and their ``rarity`` [3, cells]."""
    batches = CellBatches(counts, columns, np.array([0]), np.array([counts.n_obs]))
    rarity_of, rarity = model.module.rarity(), torch.full((3, batches.number), torch.nan)
    done = 0

    def compare(tensors: dict[str, torch.Tensor], z: torch.Tensor) -> None:
        nonlocal done
        rarity[:, done : done + len(z)] = rarity_of(tensors, z)
        done += len(z)

    return latent_means(model, batches, progress=progress, found=compare), rarity
