"""Assigning new cells to the clusters of a trained model, without training.

Genes are matched by name. A cell of a batch that the model knows is encoded as of that batch, one
of a new batch as of all known batches in equal shares: the model knows nothing about a new batch,
so none is preferred.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix
from scvi import REGISTRY_KEYS

from vmm_fast._errors import InputError
from vmm_fast._files import check_archive
from vmm_fast._folder import folder_of_model
from vmm_fast._text import joined
from vmm_fast.cells import frames
from vmm_fast.cells.integration import (
    UNKNOWN_BATCH,
    assigned,
    dendrogram,
    latent_means,
    set_clusters,
)
from vmm_fast.cells.names import notes_on_genes
from vmm_fast.cells.quiet import quiet
from vmm_fast.cells.reading import counts_of
from vmm_fast.cells.selection import EARLIER, make_adata, notes_on_cell_names
from vmm_fast.cells.store import CellStore, notes_on_omissions
from vmm_fast.cells.writing import write_adata, write_clustered
from vmm_fast.scvi.loading import CellBatches, CellSource, MemoryCells
from vmm_fast.scvi.model import VMMSCVI
from vmm_fast.scvi.saved import check_model

HOW = ", whose cells are encoded as of all known batches in equal shares"
MOST_MISSING = 0.05  # share of the model's genes that may be taken as 0


class SavedModel(NamedTuple):
    """A loaded model, its folder, and the genes and batches that new cells are matched with.

    ``layer`` and ``batch_key`` name the layer and column of obs that had its cells' counts and
    batches.
    """

    model: VMMSCVI
    folder: Path
    genes: pd.Index
    layer: str | None
    batch_key: str | None
    batches: pd.Index


def find_model(path: str, *, trust: bool = False, **cut: Any) -> SavedModel:
    """Load the model in a folder that ``vmm-fast integrate`` or ``VMMSCVI.save`` wrote.

    Unless ``trust``, the file must hold tensors and tables alone, since others could run code when
    they are read. ``cut`` says where to cut the tree of clusters, as in
    :func:`vmm_fast.clusters.find_clusters`; by default the model's clusters stay.

    Raises InputError if there is no model, or it has no clusters, or it needs more than the counts
    and batch of a cell.
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
    if name != VMMSCVI.__name__:
        raise InputError(f"{path}: must be a model of VMMSCVI, but is of {name}")
    needed = [key for key, value in setup.items() if key not in ("layer", "batch_key") and value]
    if needed:
        raise InputError(
            f"{path}: must be a model without covariates, labels and size factors, but has "
            f"{', '.join(needed)}; use VMMSCVI.load_query_data"
        )
    layer, key = setup["layer"], setup["batch_key"]
    try:
        field = registry["field_registries"][REGISTRY_KEYS.BATCH_KEY]
        batches = pd.Index(field["state_registry"]["categorical_mapping"], dtype=object)
        # Some models cannot be made without cells: one of each batch is enough.
        counts = csr_matrix(np.ones((len(batches), len(genes)), dtype=np.float32))
        obs = pd.DataFrame({} if key is None else {key: batches}, index=batches.map(str))
        with quiet():
            cells = make_adata(counts, obs, genes, layer)
            model = VMMSCVI.load(str(folder), cells, trust=True)
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
    return SavedModel(model, folder, genes, layer, key, batches)


# --- cells that fit the model ---


class MatchedCells(NamedTuple):
    """Cells with the genes of a model, ready to be assigned, and notes on how they were matched.

    ``batches`` has the index of each cell's batch [cells], UNKNOWN_BATCH if the model does not know
    it.
    """

    counts: CellSource
    batches: np.ndarray
    notes: list[str]


def match(cells: AnnData | CellStore, saved: SavedModel, layer: str | None = None) -> MatchedCells:
    """Return cells with the model's genes and batches.

    Counts are those of ``layer``, by default the model's layer if the cells have it, else X; a
    store has its own. Raises InputError if the cells do not fit the model. The values of a store
    are checked later, when they are read.
    """
    key = saved.batch_key
    more: list[str] = []
    batch: pd.Categorical | None = None
    source: CellSource
    if isinstance(cells, CellStore):
        source, more = cells, notes_on_omissions("obs and var", ["counts", *cells.others])
        earlier = "vmm_cluster" in cells.dtypes or "obsm/X_vmm" in cells.others
        if key in cells.dtypes:
            batch = cells.column(key)
    else:
        if layer is None and saved.layer in cells.layers:
            layer = saved.layer
        source = MemoryCells(csr_matrix(counts_of(cells, layer, np.float32), dtype=np.float32))
        earlier = "vmm_cluster" in cells.obs or "X_vmm" in cells.obsm
        if key in cells.obs:
            batch = pd.Categorical(cells.obs[key])
    at, notes = _genes(cells.var_names, saved.genes)
    batches, of_batches = _batches(batch, cells.n_obs, saved)
    notes = [*notes_on_genes(cells.var_names), *notes, *of_batches]
    notes += [*([EARLIER] if earlier else []), *notes_on_cell_names(cells), *more]
    return MatchedCells(_OfGenes(source, at), batches, notes)


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


def _batches(
    batch: pd.Categorical | None, n_obs: int, saved: SavedModel
) -> tuple[np.ndarray, list[str]]:
    """Return the index of each cell's batch in the model, and notes.

    Without a column of batches (None), all cells are of an unknown batch.
    """
    key = saved.batch_key
    if key is None:
        return np.zeros(n_obs, dtype=np.int32), []
    if batch is None:
        note = f"obs has no {key!r}, the model's batches: all cells are taken as of a new batch"
        return np.full(n_obs, UNKNOWN_BATCH, dtype=np.int32), [note + HOW]
    if missing := int((batch.codes < 0).sum()):
        raise InputError(
            f"{key!r} of obs: every cell must have a batch, {missing:,} of {n_obs:,} have none"
        )
    known = frames.find(batch.categories, saved.batches)
    codes = np.where(known < 0, UNKNOWN_BATCH, known).astype(np.int32)[batch.codes]
    new = [str(batch.categories[i]) for i in pd.unique(batch.codes) if known[i] < 0]
    if not new:
        return codes, []
    unknown = "that the model does not know"
    what = f"a batch {unknown}" if len(new) == 1 else f"{len(new)} batches {unknown}"
    return codes, [f"{what}: {joined(new, 5)}{HOW}"]


# --- their clusters ---


@dataclass(frozen=True)
class Found:
    """Assigned cells: the model, and the cells' embedding z [cells, D] and clusters.

    Clusters are columns of obs, as :func:`vmm_fast.cells.integration.assigned` returns them.
    """

    saved: SavedModel
    z: np.ndarray
    clusters: pd.DataFrame

    def write(self, cells: AnnData | CellStore, path: Path) -> None:
        """Write the cells with embedding and clusters to an .h5ad file, whole or not at all.

        Cells in memory get them as well, and are written whole; of a store, only obs and var are
        written. Raises InputError if the disk is too small or fills up, or a file of the store has
        changed.
        """
        uns = {"vmm": {"model": str(self.saved.folder.resolve())}}
        uns |= dendrogram(self.saved.model, self.clusters)
        if isinstance(cells, CellStore):
            write_clustered(cells, path, self.z, self.clusters, cells.var, uns)
        else:
            set_clusters(cells, self.z, self.clusters)
            cells.uns.update(uns)
            with quiet():
                write_adata(path, cells)


def assign(cells: MatchedCells, saved: SavedModel, *, progress: bool = False) -> Found:
    """Return the embedding of cells from :func:`match` and their clusters.

    With `progress` a bar is shown on stderr. Raises InputError if cells on disk can no longer be
    read, or their values are not counts.
    """
    everything = np.array([0]), np.array([cells.counts.n_obs])
    batches = CellBatches(cells.counts, cells.batches, *everything)
    with quiet():
        z = latent_means(saved.model, batches, progress=progress)
        return Found(saved, z, assigned(saved.model.kept_clusters(), z))
