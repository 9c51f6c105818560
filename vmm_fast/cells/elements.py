"""Reading the elements of .h5ad and .zarr one by one, so that a damaged one spoils no other.

Counts, and the names in obs and var, must be readable. Any other element is left out, with a note
that names it, if it cannot be read, does not fit the cells or genes, or is nested too deeply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData
from anndata.experimental import read_dispatched
from scipy.sparse import csc_matrix, csr_matrix

from vmm_fast._errors import InputError
from vmm_fast._text import joined

DEPTH = 32  # most groups within groups in uns: deeper ones take minutes to write
MOST_REASONS = 3  # most elements that are left out with the reason in the note
ALIGNED = ("layers", "obsm", "varm", "obsp", "varp")
SPARSE = {"csr_matrix": csr_matrix, "csc_matrix": csc_matrix}


def summarize_error(error: Exception) -> str:
    """Return a library's error in one line."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def left_out(faults: list[tuple[str, str]]) -> list[str]:
    """Return notes on elements that cannot be read, given their names and the reasons."""
    notes = [f"{name} cannot be read and is left out: {why}" for name, why in faults[:MOST_REASONS]]
    if more := [name for name, _ in faults[MOST_REASONS:]]:
        notes.append(f"{len(more):,} more cannot be read either: {joined(more)}")
    return notes


def read_elements(group: Any, layer: str | None) -> tuple[AnnData, list[str]]:
    """Return the cells in an opened file or zarr group, and notes on what is left out.

    obs and var in it must be groups. Counts are those of `layer` or, if there is none, of X. Raises
    an exception of any kind if the counts, or obs or var as a whole, cannot be read.
    """
    try_to = Attempts()
    names = set(group)  # includes broken links
    obs, var = (_frame(_child(group, name), name, try_to) for name in ("obs", "var"))
    uns = try_to("uns", _uns, group, try_to) if "uns" in names else {}
    cells = AnnData(obs=obs, var=var, uns={} if uns is FAULT else uns)
    places = {name: _within(group, name, try_to) for name in ALIGNED if name in names}
    layers = places.get("layers", [])
    needed = f"layers/{layer}" if f"layers/{layer}" in layers else "X"
    for where in (*(["X"] if "X" in names else []), *chain(*places.values())):
        read = _set_x if where == "X" else _set
        if where == needed:
            read(cells, group, where)
        else:
            try_to(where, read, cells, group, where)
    if "raw" in names:
        try_to("raw", _set_raw, cells, group, try_to)
    known = {"obs", "var", "uns", "X", "raw", *ALIGNED}
    try_to.faults += [(name, "AnnData has no such part") for name in group if name not in known]
    return cells, left_out(try_to.faults)


def read_var(group: Any) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """Return var of a file, and the names of columns that are left out, with the reasons."""
    try_to = Attempts()
    return _frame(_child(group, "var"), "var", try_to), try_to.faults


FAULT = object()  # stands for an element that cannot be read; None would be a valid element


class Attempts:
    """Calls functions that read elements, and records the elements that fail."""

    def __init__(self) -> None:
        self.faults: list[tuple[str, str]] = []

    def __call__(self, where: str, read: Callable[..., Any], *arguments: Any) -> Any:
        """Return what ``read`` returns, or FAULT if it fails."""
        try:
            return read(*arguments)
        except MemoryError:
            raise
        except Exception as error:  # every kind of element raises its own
            self.faults.append((where, summarize_error(error)))
            return FAULT


def _child(group: Any, name: str) -> Any:
    if name not in group:
        raise ValueError("it is not there, or a link to nothing")
    return group[name]


def _within(group: Any, name: str, try_to: Attempts) -> list[str]:
    """Return the names of the elements in a group, such as "obsm/X_pca"."""
    found = try_to(name, lambda: list(_child(group, name).keys()))
    return [] if found is FAULT else [f"{name}/{key}" for key in found]


def _read(element: Any) -> Any:
    """Return an element as anndata reads it; sparse matrices have a dtype that scipy supports."""
    return read_dispatched(element, _as_held)


def _as_held(read: Any, name: str, element: Any, *, iospec: Any) -> Any:
    """Return an element; sparse matrices get the machine's byte order, and float32 for float16.

    Java writes another byte order. scipy supports neither that nor float16.
    """
    make = SPARSE.get(iospec.encoding_type)
    if make is None:
        return read(element)
    shape = tuple(map(int, element.attrs["shape"]))
    if isinstance(element, zarr.Group) and lacks_chunks(element, shape[make is csr_matrix]):
        raise InputError(f"{element.name.strip('/').replace('layers/', 'layer ')} lacks chunks")
    parts = (np.asarray(element[key][:]) for key in ("data", "indices", "indptr"))
    data, *places = (part.astype(part.dtype.newbyteorder("="), copy=False) for part in parts)
    if data.dtype == np.float16:
        data = data.astype(np.float32)
    return make((data, *places), shape=shape)


def _uns(group: Any, try_to: Attempts) -> dict[str, Any] | None:
    found = _Nested(try_to)(group, "uns", "uns")
    if not isinstance(found, dict | None):
        raise ValueError(f"it must be a group, but is stored as {type(found).__name__}")
    return found


def _set_x(cells: AnnData, group: Any, where: str) -> None:
    matrix = _read(_child(group, where))
    if matrix is not None:
        _check_shape(matrix, cells.shape)
        cells.X = matrix


def _set(cells: AnnData, group: Any, where: str) -> None:
    name, key = where.split("/", 1)
    getattr(cells, name)[key] = _read(_child(group, where))


def _set_raw(cells: AnnData, group: Any, try_to: Attempts) -> None:
    if _child(group, "raw").attrs.get("encoding-type") == "null":
        return
    var = _frame(_child(group, "raw/var"), "raw/var", try_to)
    matrix = _read(_child(group, "raw/X"))
    _check_shape(matrix, (cells.n_obs, len(var)))
    raw = AnnData(matrix, cells.obs[[]], var)
    for where in _within(group, "raw/varm", try_to) if "raw/varm" in group else ():
        try_to(where, _set, raw, group["raw"], where.removeprefix("raw/"))
    cells.raw = raw


def _check_shape(values: Any, shape: tuple[int, ...]) -> None:
    if np.shape(values) != shape:
        expected, found = (" x ".join(map(str, s)) for s in (shape, np.shape(values)))
        raise ValueError(f"it must have {expected} values, but has {found}")


def _frame(group: Any, where: str, try_to: Attempts) -> pd.DataFrame:
    """Return obs or var, read column by column."""
    if group.attrs.get("encoding-version") != "0.2.0":
        return _read(group)  # old versions of anndata refer from one column to another
    index = str(group.attrs["_index"])
    names = _as_text(_read(_child(group, index)))
    keys = list(map(str, group.attrs["column-order"]))
    columns = {
        key: try_to(f"column {key!r} of {where}", _column, group, key, len(names)) for key in keys
    }
    found = {key: values for key, values in columns.items() if values is not FAULT}
    frame = pd.DataFrame(found, index=names)
    frame.index.name = None if index == "_index" else index
    return frame


def _column(group: Any, key: str, rows: int) -> Any:
    values = _as_text(_read(_child(group, key)))
    _check_shape(values, (rows,))
    return values


def _as_text(values: Any) -> Any:
    """Return an array of bytes as text; other values are unchanged."""
    if values.dtype.kind != "S" or values.ndim != 1:
        return values
    return np.array([value.decode() for value in values.tolist()], object)


class _Nested:
    """Reads nested groups: to a limited depth, and each once, even if several links lead to it."""

    def __init__(self, try_to: Attempts) -> None:
        self._try_to, self._seen = try_to, set[Any]()

    def __call__(self, group: Any, name: str, where: str, depth: int = 0) -> Any:
        element = _child(group, name)
        is_dict = hasattr(element, "keys") and element.attrs.get("encoding-type", "dict") == "dict"
        if not is_dict or "h5sparse_format" in element.attrs:
            return _read(element)
        if isinstance(element, h5py.Group):
            if element in self._seen:
                raise ValueError("it is a link to a group that is read already")
            self._seen.add(element)
        if depth == DEPTH:
            raise ValueError(f"it is nested more than {DEPTH} deep")
        found = {}
        for key in element:
            inside = f"{where}/{key}"
            value = self._try_to(inside, self, element, key, inside, depth + 1)
            if value is not FAULT:
                found[str(key)] = value
        return found


def lacks_chunks(matrix: Any, width: int) -> bool:
    """Return whether a sparse matrix of zarr has lost chunks, which zarr would read as zeros.

    `width` is the length of the dimension that the indices are along. zarr does not store chunks of
    zeros, either. Indices can have such chunks if no row or column has two values in a chunk; ends
    of rows if the matrix has no values; values only if they are stored zeros.
    """
    data, indices, indptr = (matrix[name] for name in ("data", "indices", "indptr"))
    if not all(isinstance(part, zarr.Array) for part in (data, indices, indptr)):
        return False

    def lacks(part: Any) -> bool:
        return bool(part.nchunks_initialized < part.nchunks)

    if lacks(data) or (lacks(indptr) and data.shape[0] > 0):
        return True
    if width == 1 or not lacks(indices):
        return False
    # A value behind another of the same row or column has a higher index than 0, if sorted.
    ends = indptr[:].astype(np.int64)
    step = indices.chunks[0]
    for at in range(0, indices.shape[0], step):
        part = indices[at : at + step]
        inside = np.unique(np.clip(ends, at, at + len(part)))
        if not part.any() and len(inside) - 1 < len(part):
            return True
    return False


def list_other_elements(element: Callable[[str], Any], counts: str) -> list[str]:
    """Return the names of the elements that cells have besides these counts, obs and var.

    `element` returns the element of a name, such as "obsm", or None; `counts` is "X" or
    "layers/NAME".
    """
    found = [name for name in ("X", "raw") if element(name) is not None]
    for name in ("layers", "obsm", "obsp", "varm", "varp"):
        # From anndata 0.13 on, X is a layer, too, and has no name there.
        found += [f"{name}/{key}" for key in element(name) or () if key is not None]
    if len(element("uns") or ()):
        found.append("uns")
    return [name for name in found if name != counts]


def notes_on_omissions(kept: str, others: Sequence[str]) -> list[str]:
    """Return a note that names the elements that a result leaves out, if there are any."""
    return [f"{kept} alone are kept, not {joined(others)}"] if others else []
