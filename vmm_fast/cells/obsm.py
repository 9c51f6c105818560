"""Counts on disk beside those of genes, such as proteins', of which some rows are read at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vmm_fast._checks import not_counts
from vmm_fast._errors import InputError
from vmm_fast.cells import frames
from vmm_fast.cells.reading import describe_choices

if TYPE_CHECKING:
    from vmm_fast.cells.store import CellStore


class StoredRows:
    """Counts in obsm of a :class:`CellStore`; ``stored[index]`` reads rows as float32 [rows, n].

    Raises
    ------
    InputError
        If a file lacks the array, or it is no dense array of numbers, or has another width than in
        the first file. Reading raises it, too, for values that are no counts.
    """

    def __init__(self, store: CellStore, key: str):
        self._store, self._key, self._where = store, f"obsm/{key}", f"obsm[{key!r}]"
        self.shape = (store.n_obs, -1)
        for shard in store.shards:
            with store.reading(shard) as opened:
                there = opened.group.get("obsm", {})
                if key not in there:
                    raise InputError(
                        f"{self._where} must be an element of obsm, {describe_choices(there)}"
                    )
                found, kind = there[key], frames.encoding_of(there[key])
                if kind != "array" or found.ndim != 2 or found.dtype.kind not in "iuf":
                    raise InputError(
                        f"{self._where} must be a dense array of counts [cells, n], but is a "
                        f"{kind}; a table's .to_numpy() is one"
                    )
                if self.shape[1] not in (-1, found.shape[1]):
                    raise InputError(
                        f"{self._where} must have {self.shape[1]} columns as in the first file, "
                        f"but has {found.shape[1]}"
                    )
                self.shape = (store.n_obs, found.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Return rows in the order that is asked for; consecutive ones are read together."""
        order = _order(rows)
        found, at = np.empty((len(rows), self.shape[1]), np.float32), 0
        for shard, start, stop in self._store.runs(rows[order], rows[order] + 1):
            with self._store.reading(shard) as opened:
                part = opened[self._key][start:stop]
                if wrong := not_counts(part.reshape(-1), np.float32):
                    raise InputError(f"{self._where} must hold counts, {wrong[1]}")
            found[order[at : at + len(part)]] = part
            at += len(part)
        return found


class OtherModality:
    """Counts of another modality of a :class:`CellStore`'s cells, read as :class:`StoredRows` are.

    Attributes
    ----------
    shape : tuple of int
        Of the cells and the features, such as proteins.
    names : pandas.Index
        Those of the features.

    Raises
    ------
    InputError
        If it has other cells, or in another order.
    """

    def __init__(self, store: CellStore, other: CellStore):
        self._counts, self.shape, self.names = other, (other.n_obs, other.n_vars), other.var_names
        if store.n_obs != other.n_obs or not all(
            np.array_equal(store.obs_names(*part), other.obs_names(*part))
            for part in (
                (at, min(at + frames.ROWS, len(self))) for at in range(0, len(self), frames.ROWS)
            )
        ):
            raise InputError(
                f"{store.path}: modalities must have the same cells in the same order, but have "
                "not; keep those that both have, in one order"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Return rows in the order that is asked for; consecutive ones are read together."""
        order = _order(rows)
        found = np.empty((len(rows), self.shape[1]), np.float32)
        found[order] = self._counts.read(rows[order], rows[order] + 1).toarray()
        return found


def _order(rows: np.ndarray) -> np.ndarray:
    """Return the order in which rows are read; raise TypeError unless they are whole numbers."""
    if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "iu" or rows.ndim != 1:
        raise TypeError(f"rows must be an array of int [n], but are {rows!r}")
    return np.argsort(rows)
