"""Mini-batches of cells in memory or on disk: shuffled for training, or in order.

Single cells at random places are slow to read from disk, runs of consecutive ones are not. An epoch
puts the runs in random order, reads some hundred of them together as a window, and takes the cells
of a window in random order. In memory a run is one cell, so that all cells are shuffled. The next
window is read while the network trains on this one. Cells on disk that fit into one window are read
once: then their order, and the model, are those of cells in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from lightning import LightningDataModule
from scipy.sparse import csr_matrix, issparse, vstack
from scvi import REGISTRY_KEYS
from torch import Tensor

from vmm_fast._checks import check_integer, not_counts
from vmm_fast._errors import InputError
from vmm_fast.scvi.columns import cell_columns

__all__ = ["CellBatches", "CellDataModule", "CellSource", "MemoryCells", "window_of"]

WINDOW = 16_384  # most cells that are shuffled together
VALUES = 1 << 23  # most counts above 0 in a window; four windows are in memory at a time
LEAST_RUNS = 100
LEAST_BATCH = 3  # cells: with fewer the statistics of batch normalisation are meaningless


class CellSource(Protocol):
    """Protocol of a source of counts: :class:`MemoryCells`, :class:`vmm_fast.cells.CellStore`.

    Attributes
    ----------
    n_obs, n_vars : int
        Number of cells and of genes.
    nbytes : int
        Size of the counts as CSR of float32.
    run : int
        Number of consecutive cells that are read together in random order.
    """

    n_obs: int
    n_vars: int
    nbytes: int
    run: int

    def read(self, starts: np.ndarray, stops: np.ndarray) -> csr_matrix:
        """Return the counts, float32, of the runs of cells, one after the other."""
        ...


class MemoryCells:
    """Cells in memory, as a :class:`CellSource`.

    Parameters
    ----------
    counts : csr_matrix [cells, G]
    """

    run = 1

    def __init__(self, counts: csr_matrix):
        self.counts = counts
        self.n_obs, self.n_vars = counts.shape
        self.nbytes = 8 * counts.nnz

    def read(self, starts: np.ndarray, stops: np.ndarray) -> csr_matrix:
        """Return the counts of the runs of cells, one after the other."""
        return self.counts[_rows(starts, stops)]


def window_of(cells: CellSource) -> int:
    """Return how many cells to keep in memory together, by how many counts they have."""
    return max(1, min(WINDOW, VALUES * cells.n_obs // max(1, cells.nbytes // 8)))


def _read_whole(cells: CellSource, genes: np.ndarray | None) -> csr_matrix | None:
    """Return the counts of all cells, of these genes, if they fit into one window; else None."""
    if cells.n_obs > WINDOW:
        return None
    parts: list[csr_matrix] = []
    step, values = window_of(cells), 0
    for start in range(0, max(1, cells.n_obs), step):
        part = cells.read(np.array([start]), np.array([min(start + step, cells.n_obs)]))
        parts.append(part if genes is None else part[:, genes])
        values += parts[-1].nnz
        if values > VALUES:
            return None
    return vstack(parts, format="csr")


def _rows(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Return the indices of the cells in the runs, one run after the other."""
    lengths = stops - starts
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


class CellBatches:
    """Mini-batches of cells as scvi-tools' modules take them; every pass has its own order.

    A pass goes over all cells once. ``seed`` and the number of the pass determine its order.
    ``state_dict`` says how far a pass has come. After ``load_state_dict`` the pass goes on there,
    and does not read again what came before.

    Parameters
    ----------
    cells : CellSource
    columns : dict of str to ndarray [cells, n]
        Batches, labels and covariates, as :func:`vmm_fast.scvi.columns.cell_columns` returns them.
    starts, stops : ndarray of int
        Runs of cells to take.
    genes : ndarray of int, optional
        Columns to take; all by default.
    batch_size : int
    seed : int or None
        None keeps the cells in order.
    rank, world_size : int
        Index of this process, and number of processes that share each pass. All get the same number
        of cells, so that up to ``world_size - 1`` cells are left out of a pass.
    number_of_pass : callable
        Returns the number of the pass; called when a pass begins.

    Raises
    ------
    InputError
        If there are fewer cells than processes.
    """

    def __init__(
        self,
        cells: CellSource,
        columns: dict[str, np.ndarray],
        starts: np.ndarray,
        stops: np.ndarray,
        *,
        genes: np.ndarray | None = None,
        batch_size: int = 128,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        number_of_pass: Callable[[], int] = int,
    ):
        self.cells, self.columns, self.genes = cells, columns, genes
        self.starts, self.stops = starts, stops
        self.batch_size = check_integer("batch_size", batch_size)
        self.seed = seed
        number = int((stops - starts).sum())
        if number < world_size:
            raise InputError(
                f"world_size must be at most {number}, the cells to share, but is {world_size}: "
                f"process {rank} would have none"
            )
        self.number = number // world_size  # in this process
        self._first = rank * self.number
        self._number_of_pass = number_of_pass
        self._pass = self._done = 0
        self._loaded = {"pass": 0, "done": 0}

    def __len__(self) -> int:
        """Return the number of mini-batches of a pass."""
        whole, rest = divmod(self.number, self.batch_size)
        left_out = self.seed is not None and whole and rest < LEAST_BATCH
        return whole + (rest > 0 and not left_out)

    def state_dict(self) -> dict[str, int]:
        """Return the number of the pass, and how many of its mini-batches are done."""
        return {"pass": self._pass, "done": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the pass of a state from `state_dict` go on where that state was taken."""
        self._loaded = state

    def _shuffled(self, number: int, *which: int) -> np.ndarray:
        """Return a random order of `number` things; without a seed, the order as it is."""
        if self.seed is None:
            return np.arange(number)
        return np.random.default_rng([self.seed, self._pass, *which]).permutation(number)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Begin a pass, or go on with the loaded one; yield its mini-batches."""
        # Lightning advances the epoch between this call and the first batch, and may call it twice.
        self._pass = self._number_of_pass()
        self._done = self._loaded["done"] if self._loaded["pass"] == self._pass else 0
        if self._done == len(self):
            return
        order = self._shuffled(len(self.starts))
        starts, stops = self.starts[order], self.stops[order]
        ends = np.cumsum(stops - starts)

        def read(window: int) -> tuple[csr_matrix, dict[str, np.ndarray]]:
            """Return counts and columns of the cells of a window, in the order of the pass."""
            low = self._first + window * size
            high = min(low + size, self._first + self.number)
            runs = slice(np.searchsorted(ends, low, "right"), np.searchsorted(ends, high) + 1)
            some, until = starts[runs].copy(), stops[runs].copy()
            some[0] = until[0] - (ends[runs][0] - low)
            until[-1] -= ends[runs][-1] - high
            counts, rows = self.cells.read(some, until), _rows(some, until)
            if self.genes is not None:
                counts = counts[:, self.genes]
            order = self._shuffled(len(rows), low)
            rows = rows[order]
            columns = {key: values[rows] for key, values in self.columns.items()}
            return (counts if self.seed is None else counts[order]), columns

        per_window = max(1, window_of(self.cells) // self.batch_size)
        size = per_window * self.batch_size
        with ThreadPoolExecutor(1) as reader:
            reading = reader.submit(read, self._done // per_window)
            while self._done < len(self):
                window = self._done // per_window
                counts, columns = reading.result()
                if (window + 1) * per_window < len(self):
                    reading = reader.submit(read, window + 1)
                first = self._done % per_window * self.batch_size
                for at in range(first, counts.shape[0], self.batch_size):
                    if self._done == len(self):  # a rest that is too small for a batch
                        break
                    self._done += 1
                    cells = slice(at, at + self.batch_size)
                    yield _tensors(counts[cells], {k: x[cells] for k, x in columns.items()})


def _tensors(counts: csr_matrix, columns: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Return a mini-batch as scvi-tools' loaders do: dense counts, indices and numbers."""
    found = {REGISTRY_KEYS.X_KEY: torch.from_numpy(counts.toarray())}
    for key, values in columns.items():
        measured = key in (REGISTRY_KEYS.CONT_COVS_KEY, REGISTRY_KEYS.PROTEIN_EXP_KEY)
        dtype = np.float32 if measured else np.int64
        found[key] = torch.from_numpy(values.astype(dtype))
    return found


def _checked(proteins: Any) -> Any:
    """Return proteins, or raise ValueError if they are in memory and are no array of counts."""
    dense = isinstance(proteins, np.ndarray)
    if isinstance(proteins, pd.DataFrame) or issparse(proteins) or (dense and proteins.ndim != 2):
        shape = f" of {proteins.ndim} dimensions" if dense else ""
        raise ValueError(
            "proteins must be a dense array of counts [cells, n], but is a "
            f"{type(proteins).__name__}{shape}; .to_numpy() of a table is one, and .toarray() of a "
            "sparse matrix"
        )
    if dense:
        if proteins.dtype.kind not in "iuf":
            raise ValueError(f"proteins must hold counts, but holds {proteins.dtype}")
        for start in range(0, len(proteins), WINDOW):
            part = proteins[start : start + WINDOW]
            if wrong := not_counts(part.reshape(-1), np.float32):
                cell = start + wrong[0] // part.shape[1]
                raise ValueError(f"proteins must hold counts, but {wrong[1]} in cell {cell}")
    return proteins


class CellDataModule(LightningDataModule):
    """Cells in memory or on disk, for ``train(datamodule=..)`` of scvi-tools' models.

    The model is made with an AnnData that has some of the cells and all categories of batches,
    labels and covariates, such as :meth:`vmm_fast.cells.CellStore.sample` returns::

        store = CellStore("atlas.h5ad")
        keys = ["batch", "donor", "age"]
        some = store.sample(20_000, keys)
        VMMSCVI.setup_anndata(
            some,
            batch_key="batch",
            categorical_covariate_keys=["donor"],
            continuous_covariate_keys=["age"],
        )
        model = VMMSCVI(some)
        cells = CellDataModule(store, **model.encode_obs(store.columns(keys)), batch_size=512)
        model.train(10, datamodule=cells)

    Parameters
    ----------
    cells : CellSource
    batches : ndarray of int [cells]
        Index of each cell's batch.
    labels : ndarray of int [cells], optional
        Index of each cell's label, the last for unlabelled cells; by default all are 0.
    categorical : ndarray of int [cells, number of categorical covariates], optional
        Index of each cell's category.
    continuous : ndarray of float [cells, number of continuous covariates], optional
    proteins : ndarray, StoredRows or OtherModality [cells, number of proteins], optional
        Their counts, in memory or what ``CellStore.obsm`` or ``other_modality`` returns.
    genes : ndarray of int, optional
        Columns to take; all by default.
    batch_size : int
        In each process.
    held_out : float
        Share of the cells, in [0, 1), that is held out for the validation loss, in whole runs.
    seed : int
        Determines which cells are held out, and the order of the others.

    Raises
    ------
    ValueError
        If a column is not of all cells, or if proteins in memory are no counts.
    InputError
        If cells on disk that fit into one window cannot be read.

    Attributes
    ----------
    n_train, n_val : int
        Number of training cells, and of held-out cells.
    columns : dict of str to ndarray
        Batches, labels, covariates and proteins by scvi-tools' keys; the model must have the same.
    batch_size, seed : int
        Those that were given.
    """

    def __init__(
        self,
        cells: CellSource,
        batches: np.ndarray,
        *,
        labels: np.ndarray | None = None,
        categorical: np.ndarray | None = None,
        continuous: np.ndarray | None = None,
        proteins: Any = None,
        genes: np.ndarray | None = None,
        batch_size: int = 128,
        held_out: float = 0.1,
        seed: int = 0,
    ):
        super().__init__()
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out must be in [0, 1), but is {held_out!r}")
        self.columns = cell_columns(batches, labels, categorical, continuous)
        if proteins is not None:
            self.columns[REGISTRY_KEYS.PROTEIN_EXP_KEY] = _checked(proteins)
        for key, values in self.columns.items():
            if len(values) != cells.n_obs:
                raise ValueError(
                    f"{key} must be of all {cells.n_obs} cells, but there are {len(values)}"
                )
        self.batch_size, self.seed = check_integer("batch_size", batch_size), seed
        self.n_obs, self.n_vars = cells.n_obs, cells.n_vars if genes is None else len(genes)
        if cells.run > 1 and (counts := _read_whole(cells, genes)) is not None:
            cells, genes = MemoryCells(counts), None
            if proteins is not None:
                rows = np.arange(cells.n_obs)
                self.columns[REGISTRY_KEYS.PROTEIN_EXP_KEY] = proteins[rows]
        self._pass_over = partial(
            CellBatches, cells, self.columns, genes=genes, batch_size=self.batch_size
        )
        # There must be enough runs to hold some out, and to mix many in a mini-batch.
        self._run = max(1, min(cells.run, cells.n_obs // LEAST_RUNS))
        starts = np.arange(0, cells.n_obs, self._run)
        order = np.random.default_rng([seed]).permutation(len(starts))
        held = int(np.ceil(held_out * len(starts)))
        self._held_out, self._trained = np.sort(order[:held]), np.sort(order[held:])
        self.n_val = self._number(self._held_out)
        self.n_train = self._number(self._trained)

    def _stops(self, runs: np.ndarray) -> np.ndarray:
        stops: np.ndarray = np.minimum((runs + 1) * self._run, self.n_obs)
        return stops

    def _number(self, runs: np.ndarray) -> int:
        return int((self._stops(runs) - runs * self._run).sum())

    def _batches_of(self, runs: np.ndarray, seed: int | None) -> CellBatches:
        trainer = self.trainer
        assert trainer is not None
        return self._pass_over(
            runs * self._run,
            self._stops(runs),
            seed=seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            number_of_pass=lambda: trainer.current_epoch,
        )

    def train_dataloader(self) -> CellBatches:
        """Return mini-batches of the training cells, shuffled."""
        return self._batches_of(self._trained, self.seed)

    def val_dataloader(self) -> CellBatches | list[CellBatches]:
        """Return mini-batches of the held-out cells, in order; an empty list if there are none."""
        return self._batches_of(self._held_out, None) if self.n_val else []

    def all_cells(self) -> CellBatches:
        """Return mini-batches of all cells in order, training cells and held-out ones."""
        return self._pass_over(np.array([0]), np.array([self.n_obs]))

    def held_out_cells(self, most: int) -> CellBatches:
        """Return mini-batches of about so many held-out cells; of training cells if none are."""
        runs = self._held_out if self.n_val else self._trained
        runs = runs[:: max(1, self._number(runs) // most)]
        return self._pass_over(runs * self._run, self._stops(runs))
