"""Converting any file of cells to one .h5ad that is read fast in runs: ``vmm-fast prepare``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix

from vmm_fast._checks import MOST
from vmm_fast._errors import InputError
from vmm_fast.cells.elements import list_other_elements, notes_on_omissions
from vmm_fast.cells.frames import STRINGS
from vmm_fast.cells.reading import ANNDATA, counts_of, kind_of, read_cells
from vmm_fast.cells.store import CannotStream, CellStore
from vmm_fast.cells.writing import ROWS, H5adWriter, notes_on_writing, write_h5ad

VALUES = 1 << 23  # approximate number of values that are in memory together


class Prepared(NamedTuple):
    """Size of the file that was written, and notes."""

    n_obs: int
    n_vars: int
    nbytes: int
    notes: list[str]


class _TooLarge(Exception):
    """Raised for a count that does not fit in uint16."""


def prepare(
    path: Path,
    out: Path,
    layer: str | None = None,
    modality: str | None = None,
    *,
    progress: bool = False,
    tell: Callable[[str], object] = str,
) -> Prepared:
    """Write counts, obs and var of cells to one .h5ad, whole or not at all.

    Of a file of several modalities one is taken. A file that :class:`CellStore` reads is read in
    parts; all others are read into memory. `tell` is called with each note, on what is changed or
    left out, before anything is written. Raises InputError if the cells cannot be read, values are
    not counts, or the disk is too small.
    """
    source, notes = _open(path, layer, modality)
    step = min(ROWS, max(1, VALUES // max(1, source.nbytes // 8 // source.n_obs)))
    columns = {"var": source.var, "dtypes": source.dtypes, "index_name": source.index_name}

    def fill(writer: H5adWriter, dtype: type) -> None:
        with cells_bar(source.n_obs, progress) as bar:
            for start in range(0, source.n_obs, step):
                stop = min(start + step, source.n_obs)
                counts = source.read(start, stop, np.int64)
                counts.sum_duplicates()
                largest = counts.data.max(initial=0)
                if largest > MOST:
                    raise InputError(
                        f"{path}: counts of a gene that occurs again in a cell must add up to at "
                        f"most {MOST:,}, but add up to {largest:,}"
                    )
                if dtype is np.uint16 and largest >= 1 << 16:
                    raise _TooLarge
                writer.append(source.obs(start, stop), counts)
                bar.update(stop - start)

    with source:
        notes = (
            notes
            + notes_on_omissions("counts, obs and var", source.others)
            + notes_on_writing(source)
        )
        for note in notes:
            tell(note)
        for dtype in (np.uint16, np.int32):
            with suppress(_TooLarge):
                size = write_h5ad(
                    out, source.n_obs, fill=partial(fill, dtype=dtype), counts=dtype, **columns
                )
                break
        return Prepared(source.n_obs, source.n_vars, size, notes)


def _open(
    path: Path, layer: str | None, modality: str | None
) -> tuple[CellStore | _InMemory, list[str]]:
    kind = kind_of(path)
    if kind in (*ANNDATA, "shards"):
        try:
            store = CellStore(path, layer, modality=modality)
            return store, store.notes
        except CannotStream:
            if kind == "shards":
                raise
    cells = read_cells(str(path), layer, modality)
    try:
        source = _InMemory(cells.adata, layer)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return source, cells.notes + source.notes


class _InMemory:
    """Cells in memory, with the interface of a :class:`CellStore`."""

    def __init__(self, adata: AnnData, layer: str | None) -> None:
        self._counts = csr_matrix(counts_of(adata, layer))
        self.notes: list[str] = []
        self._obs = _storable(adata.obs, "obs", self.notes)
        self.var = _storable(adata.var, "var", self.notes)
        self.n_obs, self.n_vars = adata.shape
        self.nbytes = 8 * self._counts.nnz
        self.dtypes = dict(self._obs.dtypes)
        self.index_name = self._obs.index.name
        counts = "X" if layer is None else f"layers/{layer}"
        self.others = list_other_elements(partial(getattr, adata), counts)

    def __enter__(self) -> _InMemory:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def read(self, start: int, stop: int, dtype: Any) -> csr_matrix:
        return self._counts[start:stop].astype(dtype)

    def obs(self, start: int, stop: int) -> pd.DataFrame:
        return self._obs.iloc[start:stop]


def _storable(frame: pd.DataFrame, where: str, notes: list[str]) -> pd.DataFrame:
    """Return a frame whose columns are categories, numbers or strings; others become strings."""
    found = frame.copy(deep=False)
    for key in frame:
        values = frame[key]
        if isinstance(values.dtype, pd.CategoricalDtype | pd.StringDtype):
            continue
        if values.dtype == STRINGS and pd.api.types.infer_dtype(values, skipna=False) == "string":
            continue
        if values.dtype.kind not in "biuf":
            found[key] = values.map(str, na_action="ignore").astype("string")
            if not all(isinstance(value, str) for value in values.dropna()):
                notes.append(f"column {key!r} of {where} is written as text")
        elif isinstance(values.dtype, pd.Float32Dtype | pd.Float64Dtype):
            found[key] = values.astype(values.dtype.numpy_dtype)
    return found


def cells_bar(cells: int, progress: bool) -> Any:
    """Return a progress bar on stderr that counts cells; hidden unless `progress`."""
    from tqdm import tqdm

    return tqdm(
        total=cells,
        disable=not progress,
        bar_format="cells {n_fmt}/{total_fmt} |{bar}| {rate_fmt}, ETA {remaining}",
        unit=" cells",
        unit_scale=True,
        dynamic_ncols=True,
    )
