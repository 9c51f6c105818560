"""Mini-batches of cells that lie in memory or on disk, shuffled, for training and for passes.

Single cells at random places are slow to read from disk, runs of consecutive ones are not. An epoch
lays the runs end to end in random order, reads some hundred of them together as a window, and takes
the window's cells in random order. In memory a run is one cell, so that all cells are shuffled. The
next window is read while the network trains on this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import numpy as np
import torch
from lightning import LightningDataModule
from scipy.sparse import csr_matrix
from scvi import REGISTRY_KEYS
from torch import Tensor

from vmm_fast.priors.base import check_integer

__all__ = ["CellBatches", "CellDataModule", "CellSource", "MemoryCells", "window_of"]

WINDOW = 16_384  # cells that are shuffled together, at most
VALUES = 1 << 23  # that they have, at most; four windows are in memory at a time
LEAST_RUNS = 100
LEAST_BATCH = 3  # cells: fewer give a batch normalisation nothing to go by


class CellSource(Protocol):
    """Where cells lie: :class:`MemoryCells` or :class:`vmm_fast.scvi.CellStore`.

    Attributes
    ----------
    n_obs, n_vars : int
        Cells and genes.
    nbytes : int
        Of the counts, as CSR of float32.
    run : int
        How many consecutive cells are read together where the order is random.
    """

    n_obs: int
    n_vars: int
    nbytes: int
    run: int

    def read(self, starts: np.ndarray, stops: np.ndarray) -> csr_matrix:
        """Counts, float32, of the runs of cells, one after the other."""
        ...


class MemoryCells:
    """Cells in memory.

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
        """Counts of the runs of cells, one after the other."""
        return self.counts[_rows(starts, stops)]


def window_of(cells: CellSource) -> int:
    """How many cells to have in memory together, whether they have many counts or few."""
    return max(1, min(WINDOW, VALUES * cells.n_obs // max(1, cells.nbytes // 8)))


def _rows(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Indices of the runs' cells, one run after the other."""
    lengths = stops - starts
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


class CellBatches:
    """Mini-batches of cells as scvi-tools' modules take them; every pass is in an order of its own.

    The order is determined by ``seed`` and the pass's number. ``state_dict`` says how far a pass
    has come; after ``load_state_dict`` it goes on there, and what was before is not read again.

    Parameters
    ----------
    cells : CellSource
    batches : ndarray of int [cells]
        Index of each cell's batch.
    starts, stops : ndarray of int
        Runs of cells to take.
    genes : ndarray of int, optional
        Columns to take; all by default.
    batch_size : int
    seed : int or None
        None is the order in which they lie.
    rank, world_size : int
        Which of how many processes takes its share of each pass. All have as many cells, so that
        up to ``world_size - 1`` are left out of a pass.
    number_of_pass : callable
        Asked for it as the pass begins.

    Raises
    ------
    ValueError
        If there are fewer cells than processes.
    """

    def __init__(
        self,
        cells: CellSource,
        batches: np.ndarray,
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
        self.cells, self.batches, self.genes = cells, batches, genes
        self.starts, self.stops = starts, stops
        self.batch_size = check_integer("batch_size", batch_size)
        self.seed = seed
        number = int((stops - starts).sum())
        if number < world_size:
            raise ValueError(
                f"world_size must be at most {number}, the cells to share, but is {world_size}: "
                f"process {rank} would have none"
            )
        self.number = number // world_size  # in this process
        self._first = rank * self.number
        self._number_of_pass = number_of_pass
        self._pass = self._done = 0
        self._loaded = {"pass": 0, "done": 0}

    def __len__(self) -> int:
        """Number of batches of a pass."""
        whole, rest = divmod(self.number, self.batch_size)
        left_out = self.seed is not None and whole and rest < LEAST_BATCH
        return whole + (rest > 0 and not left_out)

    def state_dict(self) -> dict[str, int]:
        """Number of the pass, and how many of its batches have been given."""
        return {"pass": self._pass, "done": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the pass that `state` is of go on where it was given."""
        self._loaded = state

    def _shuffled(self, number: int, *which: int) -> np.ndarray:
        """Order of `number` things: as they are without a seed."""
        if self.seed is None:
            return np.arange(number)
        return np.random.default_rng([self.seed, self._pass, *which]).permutation(number)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Begin a pass, or go on with the one that was loaded."""
        # Lightning counts epochs between this call and the first batch, and may call this twice.
        self._pass = self._number_of_pass()
        self._done = self._loaded["done"] if self._loaded["pass"] == self._pass else 0
        if self._done == len(self):
            return
        order = self._shuffled(len(self.starts))
        starts, stops = self.starts[order], self.stops[order]
        ends = np.cumsum(stops - starts)

        def read(window: int) -> tuple[csr_matrix, np.ndarray]:
            """Counts and batches of the cells of a window, in the order to give them in."""
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
            return (counts if self.seed is None else counts[order]), self.batches[rows[order]]

        per_window = max(1, window_of(self.cells) // self.batch_size)
        size = per_window * self.batch_size
        with ThreadPoolExecutor(1) as reader:
            reading = reader.submit(read, self._done // per_window)
            while self._done < len(self):
                window = self._done // per_window
                counts, batches = reading.result()
                if (window + 1) * per_window < len(self):
                    reading = reader.submit(read, window + 1)
                for at in range(
                    self._done % per_window * self.batch_size, len(batches), self.batch_size
                ):
                    if self._done == len(self):  # a rest that is too small for a batch
                        break
                    self._done += 1
                    cells = slice(at, at + self.batch_size)
                    yield _tensors(counts[cells], batches[cells])


def _tensors(counts: csr_matrix, batches: np.ndarray) -> dict[str, Tensor]:
    """Give a mini-batch as scvi-tools' loaders do: dense counts, and columns of indices."""
    batch = torch.from_numpy(batches.astype(np.int64))[:, None]
    return {
        REGISTRY_KEYS.X_KEY: torch.from_numpy(counts.toarray()),
        REGISTRY_KEYS.BATCH_KEY: batch,
        REGISTRY_KEYS.LABELS_KEY: torch.zeros_like(batch),
    }


class CellDataModule(LightningDataModule):
    """Cells in memory or on disk, for ``train(datamodule=..)`` of scvi-tools' models.

    The model is made of an AnnData with some of the cells and all of their batches, such as
    :meth:`vmm_fast.scvi.CellStore.sample` gives::

        store = CellStore("atlas.h5ad")
        some = store.sample(20_000, keys=["batch"])
        VMMSCVI.setup_anndata(some, batch_key="batch")
        model = VMMSCVI(some)
        cells = CellDataModule(store, store.column("batch").codes, batch_size=512)
        model.train(10, datamodule=cells)

    Parameters
    ----------
    cells : CellSource
    batches : ndarray of int [cells]
        Index of each cell's batch.
    genes : ndarray of int, optional
        Columns to take; all by default.
    batch_size : int
        In each process.
    held_out : float
        Share of the cells, in whole runs, whose loss is the validation's; in [0, 1).
    seed : int
        Of which cells are held out, and of the order of the others.

    Attributes
    ----------
    n_train, n_val : int
        Cells that are trained on, and held out.
    n_batch : int
        Batches, of which the model must have as many.
    batch_size, seed : int
        As given.
    """

    def __init__(
        self,
        cells: CellSource,
        batches: np.ndarray,
        *,
        genes: np.ndarray | None = None,
        batch_size: int = 128,
        held_out: float = 0.1,
        seed: int = 0,
    ):
        super().__init__()
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out must be in [0, 1), but is {held_out!r}")
        if len(batches) != cells.n_obs:
            raise ValueError(
                f"batches must be of all {cells.n_obs} cells, but there are {len(batches)}"
            )
        self.batch_size, self.seed = check_integer("batch_size", batch_size), seed
        self._pass_over = partial(
            CellBatches, cells, batches, genes=genes, batch_size=self.batch_size
        )
        # So many at least that some can be held out and those of a batch are of many runs.
        self._run = max(1, min(cells.run, cells.n_obs // LEAST_RUNS))
        self.n_obs, self.n_vars = cells.n_obs, cells.n_vars if genes is None else len(genes)
        self.n_batch = int(batches.max(initial=-1)) + 1
        starts = np.arange(0, cells.n_obs, self._run)
        order = np.random.default_rng([seed]).permutation(len(starts))
        held = int(np.ceil(held_out * len(starts)))
        self._held_out, self._trained = np.sort(order[:held]), np.sort(order[held:])
        self.n_val = self._number(self._held_out)
        self.n_train = self._number(self._trained)

    def _stops(self, runs: np.ndarray) -> np.ndarray:
        return np.minimum((runs + 1) * self._run, self.n_obs)

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
        """Cells to train on, shuffled."""
        return self._batches_of(self._trained, self.seed)

    def val_dataloader(self) -> CellBatches | list[CellBatches]:
        """Cells held out, in order."""
        return self._batches_of(self._held_out, None) if self.n_val else []

    def all_cells(self) -> CellBatches:
        """Every cell in order, trained on or not."""
        return self._pass_over(np.array([0]), np.array([self.n_obs]))
