"""Reading slices of rows of a data frame on disk, as anndata writes obs and var.

Several files make one frame of the columns that they have in common. Categories are united, and
numbers get a dtype that holds all. A column of numbers in one file and strings in another becomes
one of strings, in which 2, 2.0, "2" and "2.0" are all "2".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd
from anndata.io import read_elem

from vmm_fast.cells.elements import summarize_error

ROWS = 1 << 16  # values of a column that are read together
PANDAS_3 = int(pd.__version__.split(".")[0]) >= 3
STRINGS = np.dtype(object)  # strings without missing values; pd.StringDtype() allows missing ones


def encoding_of(element: Any) -> str:
    """Return anndata's name for the encoding of an element."""
    found: str | None = element.attrs.get("encoding-type")
    if found is None:
        raise ValueError("it was written by an anndata older than 0.8")
    return found


def dtypes_of(frame: Any) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return pandas' dtype of each readable column, and the other columns with the reasons.

    Every value is read once, so that a damaged column is found now, not when results are written.
    Raises ValueError if no column can be read in slices.
    """
    encoding = encoding_of(frame)
    if encoding != "dataframe" or "__categories" in frame:
        raise ValueError("it was written by an anndata older than 0.8")
    found, faults, rows = {}, [], rows_of(frame)
    for key in map(str, frame.attrs["column-order"]):
        if key in frame:
            encoding_of(frame[key])
        try:
            dtype = _dtype(frame, key)
            if (number := _rows(frame[key])) != rows:
                raise LookupError(f"it must have {rows} values, but has {number}")
            for start in range(0, rows, ROWS):
                read_slice(frame, key, dtype, start, start + ROWS)
            found[key] = dtype
        except MemoryError:
            raise
        except Exception as error:  # every kind of column raises its own
            faults.append((f"column {key!r} of obs", summarize_error(error)))
    return found, faults


def _dtype(frame: Any, key: str) -> Any:
    if key not in frame:
        raise LookupError("it is not there, or a link to nothing")
    column = frame[key]
    encoding = encoding_of(column)
    if len(getattr(column, "shape", "1")) > 1:
        raise TypeError(f"it must have one dimension, but has the shape {column.shape}")
    if encoding == "categorical":
        # pd.Index converts them as pandas does everywhere.
        categories = pd.Index(np.asarray(read_elem(column["categories"])))
        return pd.CategoricalDtype(categories, bool(column.attrs["ordered"]))
    if encoding == "string-array":
        return STRINGS
    if encoding == "nullable-string-array":
        # pandas 3 has a second dtype of text, in which NaN is what is missing.
        nan = column.attrs.get("na-value") == "NaN" and PANDAS_3
        return pd.StringDtype(na_value=np.nan) if nan else pd.StringDtype()
    if encoding in ("nullable-integer", "nullable-boolean"):
        return pd.array(np.empty(0, column["values"].dtype)).dtype
    if encoding == "array" and column.dtype.kind in "biuf":
        return column.dtype
    if encoding == "array" and column.dtype.kind == "S":
        return STRINGS
    raise TypeError(f"it is stored as {encoding} of {getattr(column, 'dtype', 'several')}")


def rows_of(frame: Any) -> int:
    """Return the number of rows of a frame."""
    return _rows(frame[frame.attrs["_index"]])


def _rows(column: Any) -> int:
    if not hasattr(column, "shape"):
        column = column["codes" if "codes" in column else "values"]
    return int(column.shape[0])


def read_index(frame: Any, start: int, stop: int) -> np.ndarray:
    """Return the names of rows start to stop as str [stop - start], whatever the index holds."""
    index = frame[frame.attrs["_index"]]
    if "codes" in getattr(index, "keys", tuple)():
        categories = np.asarray(pd.Index(read_elem(index["categories"])).astype(str), object)
        names: np.ndarray = categories[index["codes"][start:stop]]
        return names
    values = index if hasattr(index, "shape") else index["values"]
    if values.dtype.kind in "biuf":
        return np.asarray(pd.Index(values[start:stop]).astype(str), object)
    return _strings(values, start, stop)


def read_slice(frame: Any, key: str, dtype: Any, start: int, stop: int) -> Any:
    """Return rows start to stop of a column as pandas values of a dtype from :func:`dtypes_of`."""
    column = frame[key]
    if isinstance(dtype, pd.CategoricalDtype):
        return pd.Categorical.from_codes(column["codes"][start:stop], dtype=dtype)
    if dtype == STRINGS:
        return _strings(column, start, stop)
    if isinstance(dtype, pd.StringDtype):
        values = _strings(column["values"], start, stop)
        values[column["mask"][start:stop]] = pd.NA
        return pd.array(values, dtype=dtype)
    if isinstance(dtype, np.dtype):
        return column[start:stop]
    masked = pd.arrays.BooleanArray if dtype.kind == "b" else pd.arrays.IntegerArray
    return masked(column["values"][start:stop], column["mask"][start:stop])


def _strings(array: Any, start: int, stop: int) -> np.ndarray:
    """Return a slice of an array of text; bytes that are not UTF-8 are replaced."""
    if hasattr(array, "asstr"):  # HDF5
        array = array.asstr("utf-8", "replace")
    values = np.asarray(array[start:stop])
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8", "replace")
    return values.astype(object)


def common_dtype(dtypes: Sequence[Any]) -> Any:
    """Return the dtype that can hold the values of all these dtypes."""
    first = dtypes[0]
    if all(dtype == first for dtype in dtypes):
        return first
    if all(isinstance(dtype, pd.CategoricalDtype) for dtype in dtypes):
        indices = [dtype.categories for dtype in dtypes]
        united = indices[0].append(indices[1:]).unique()
        if united.inferred_type.startswith("mixed"):
            united = pd.Index(pd.unique(np.concatenate([_plain(i) for i in indices])))
        return pd.CategoricalDtype(united)
    if not all(dtype.kind in "biuf" for dtype in dtypes):
        return pd.StringDtype()
    plain = [getattr(dtype, "numpy_dtype", dtype) for dtype in dtypes]
    wide = reduce(np.promote_types, plain)
    if wide.kind == "f" or plain == list(dtypes):
        return wide
    return pd.array(np.empty(0, wide)).dtype


def cast(values: Any, dtype: Any, mixed: bool = False) -> Any:
    """Return values of a column in its common dtype.

    `mixed` says that the common dtype is text, but that of some files is not.
    """
    if isinstance(dtype, pd.CategoricalDtype):
        names = values.categories
        at = dtype.categories.get_indexer(_plain(names) if mixed else names)
        return pd.Categorical.from_codes(np.append(at, -1)[values.codes], dtype=dtype)
    if mixed:
        return pd.array(_plain(values), dtype=dtype)
    if values.dtype == dtype:
        return values
    return pd.Series(values).astype(dtype).array


def of_text(dtype: Any) -> bool:
    """Return whether values of this dtype, or its categories, are text."""
    if isinstance(dtype, pd.CategoricalDtype):
        return dtype.categories.inferred_type in ("string", "empty")
    return dtype == STRINGS or isinstance(dtype, pd.StringDtype)


def _plain(values: Any) -> np.ndarray:
    """Return values as text, whole numbers without a fraction: "2" for 2.0 and "2.0", too."""
    text = pd.Series(values).astype("string").str.replace(r"^(-?\d+)\.0$", r"\1", regex=True)
    plain: np.ndarray = text.to_numpy(object)
    return plain


def find(values: pd.Index, known: pd.Index) -> np.ndarray:
    """Return the positions of values among the known ones, -1 for unknown ones.

    If types differ, they are compared as text, and numbers and text are the same: 2, 2.0, "2" and
    "2.0". If all are text, "2" and "2.0" differ.
    """
    if values.inferred_type == known.inferred_type == "string":
        found: np.ndarray = known.get_indexer(values)
        return found
    places: dict[str, int] = {}
    for names in (map(str, known), _plain(known)):
        for place, name in enumerate(names):
            places.setdefault(name, place)
    pairs = zip(map(str, values), _plain(values), strict=True)
    return np.array([places.get(exact, places.get(plain, -1)) for exact, plain in pairs], int)
