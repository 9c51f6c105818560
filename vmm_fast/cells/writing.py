"""Writing cells as .h5ad in one pass, part by part, so that they need not fit in memory.

The layout is anndata's (https://anndata.readthedocs.io/en/latest/fileformat-prose.html). Counts are
stored as small as they are: in 16 bits where they fit, in chunks that hold about a hundred cells,
with LZF, which is read faster than gzip.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData, settings
from anndata.io import write_elem
from scipy.sparse import csr_matrix

from vmm_fast._errors import InputError
from vmm_fast._files import as_csv, write_atomically
from vmm_fast._stopping import STOPS
from vmm_fast.cells.frames import STRINGS
from vmm_fast.cells.reading import damage_of, layers_of
from vmm_fast.cells.store import CellStore

# Columns of obs in the results.
COLUMNS = ("vmm_cluster", "vmm_cluster_probability", "vmm_cluster_entropy", "vmm_component")
LABEL = "vmm_label"  # another one, if labels were learnt
NOVELTY = "vmm_novelty"  # one of assigned cells
RESERVED = (*COLUMNS, LABEL, NOVELTY)
CHUNK = 1 << 15  # values
FILTERS = {"compression": "lzf", "shuffle": True, "fletcher32": True}
ROWS = 1 << 14  # most cells that are written together


class _Disk(io.RawIOBase):
    """A file that HDF5 can write to without ever failing, since HDF5 crashes if closing it fails.

    The first error is kept for :meth:`check`. All that is written after it is kept in memory.
    """

    def __init__(self, file: Any, path: Path) -> None:
        self.folder, self.size = path.resolve().parent, 0
        self._file, self._at = file.fileno(), 0
        self._error: BaseException | None = None
        self._lost: list[tuple[int, bytes]] = []

    def check(self) -> None:
        """Raise the first error, if there was one."""
        if self._error is not None:
            raise self._error

    @contextmanager
    def keeping_interrupts(self) -> Iterator[None]:
        """Keep interrupts for :meth:`check`, too: a signal may arrive while HDF5 calls this."""
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in STOPS}
            before |= {number: one for number, one in handlers.items() if callable(one)}

        def keep(number: int, frame: Any) -> None:
            try:
                before[number](number, frame)
            except KeyboardInterrupt as stop:
                self._error = stop

        for number in before:
            signal.signal(number, keep)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset if whence == os.SEEK_SET else self.size + offset
        return self._at

    def write(self, data: Any, /) -> int:
        left = bytes(data)
        begin = at = self._at
        self._at += len(left)
        self.size = max(self.size, self._at)
        try:
            while left and self._error is None:
                written = os.pwrite(self._file, left, at)
                left, at = left[written:], at + written
        except OSError as error:
            self._error = error
        if left:
            self._lost.append((at, left))
        return self._at - begin

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        found = os.pread(self._file, len(view), self._at)
        view[: len(found)] = found
        for at, data in self._lost:
            first, last = max(at, self._at), min(at + len(data), self._at + len(view))
            if first < last:
                view[first - self._at : last - self._at] = data[first - at : last - at]
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        self.size = self._at if size is None else size
        try:
            if self._error is None:
                os.truncate(self._file, self.size)
        except OSError as error:
            self._error = error
        return self.size


@contextmanager
def _explain_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into an InputError that says in one line why a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_h5ad(
    path: Path,
    n_obs: int,
    var: pd.DataFrame,
    dtypes: Mapping[str, Any],
    fill: Callable[[H5adWriter], object],
    **options: Any,
) -> int:
    """Write an .h5ad file whole or not at all, and return its size in bytes.

    `fill` is called with the writer, and must append all cells; `dtypes` are those of the columns
    of obs, as in :attr:`CellStore.dtypes`; further arguments are those of :class:`H5adWriter`.
    Raises InputError if the disk is too small or fills up, or the file cannot be written.
    """

    def write(raw: Any) -> None:
        disk = _Disk(raw, path)
        with disk.keeping_interrupts(), h5py.File(disk, "w") as file:
            writer = H5adWriter(disk, file, n_obs, var, dtypes, **options)
            fill(writer)
            writer.finish()
        disk.check()

    with _explain_write_errors(path):
        write_atomically(path, write)
        return path.stat().st_size


def write_adata(path: Path, adata: AnnData) -> list[str]:
    """Write cells in memory to an .h5ad file, whole or not at all; return notes on what it lacks.

    The file is that of ``AnnData.write_h5ad`` with gzip, and here, too, strings in `adata` become
    categories. anndata's own method crashes if the disk is full, and writes nothing if one element
    cannot be written. Here such an element is renamed or left out; see :func:`notes_on_writing`.
    Raises InputError if the disk fills up, or the file cannot be written.
    """
    notes: list[str] = []

    def write(raw: Any) -> None:
        disk = _Disk(raw, path)
        with disk.keeping_interrupts(), h5py.File(disk, "w") as file:
            _Elements(disk.check, notes).write(file, adata)
        disk.check()

    _strings_as_categories(adata)
    with _explain_write_errors(path), settings.override(allow_write_nullable_strings=True):
        write_atomically(path, write)
    return notes


def notes_on_writing(cells: Any) -> list[str]:
    """Return a note on each element of the cells that cannot be written to .h5ad unchanged.

    anndata reads more than it can write: a column called ``_index`` (SeuratDisk makes such), and
    HDF5's null datasets, references and opaque data. To know this before training, everything is
    written to memory, except that one row of each matrix is enough. Of a store, only obs and var
    are checked.
    """
    notes: list[str] = []
    if not isinstance(cells, AnnData):
        _column_names(cells.dtypes, "obs", notes)
        _writable(cells.var, "var", notes)
        return notes
    _strings_as_categories(cells)
    with (
        settings.override(allow_write_nullable_strings=True),
        h5py.File(io.BytesIO(), "w") as file,
    ):
        _Elements(lambda: None, notes, rows=1).write(file, cells)
    return notes


def _strings_as_categories(adata: AnnData) -> None:
    adata.strings_to_categoricals()
    if adata.raw is not None:
        adata.strings_to_categoricals(adata.raw.var)


class _Elements:
    """Writes the elements of an AnnData one by one, so that all others survive one that fails.

    `check` raises an error of the disk, if there was one. A note is added to `notes` for each
    element that is renamed or left out. With `rows`, only the first rows of matrices are written.
    """

    def __init__(
        self, check: Callable[[], object], notes: list[str], *, rows: int | None = None
    ) -> None:
        self._check, self._notes, self._rows = check, notes, rows

    def write(self, file: h5py.File, adata: AnnData) -> None:
        _mark(file, "anndata", "0.1.0")
        self._element(file, "X", adata.X)
        if adata.raw is not None:
            raw = _mark(file.create_group("raw"), "raw", "0.1.0")
            for name in ("X", "var", "varm"):
                value = getattr(adata.raw, name)
                self._element(raw, name, dict(value) if name == "varm" else value)
        for name in ("obs", "var"):
            self._element(file, name, getattr(adata, name))
        self._element(file, "layers", layers_of(adata))
        for name in ("obsm", "varm", "obsp", "varp", "uns"):
            self._element(file, name, dict(getattr(adata, name)))

    def _element(self, group: Any, name: str, value: Any) -> None:
        where = f"{group.name}/{name}".strip("/")
        if value is None and where == "X":
            return
        if isinstance(value, Mapping):
            inside = _mark(group.create_group(name), "dict", "0.1.0")
            for key, one in value.items():
                self._element(inside, key, one)
            return
        if isinstance(value, pd.DataFrame):
            value = _writable(value, where, self._notes)
        try:
            if damage := damage_of(value):
                raise ValueError(damage)
            if self._rows is not None and len(getattr(value, "shape", None) or ()) > 1:
                value = value if isinstance(value, pd.DataFrame) else value[: self._rows]
            write_elem(group, name, value, dataset_kwargs={"compression": "gzip"})
        except MemoryError:
            raise
        except Exception:  # every kind of element raises its own
            self._check()  # if the disk is full, the element is not to blame
            if isinstance(name, str) and name in group:
                del group[name]
            self._notes.append(f"{where} cannot be written to .h5ad and is left out")
        self._check()


def _column_names(names: Iterable[Any], where: str, notes: list[str]) -> list[str]:
    """Return the names of columns in an .h5ad file: text, distinct and never ``_index``."""
    names = list(names)
    texts = [str(name) for name in names]
    used = set(texts)
    found: list[str] = []
    for name, text in zip(names, texts, strict=True):
        new, number = "index" if text == "_index" else text, 0
        while new in found or (new != text and new in used):
            number += 1
            new = f"{text.lstrip('_')}-{number}"
        if new != name:
            notes.append(f"column {name!r} of {where} is written as {new!r}")
        found.append(new)
    return found


def _writable(frame: pd.DataFrame, where: str, notes: list[str]) -> pd.DataFrame:
    """Return a frame as an .h5ad file can hold it, with notes on what is renamed or left out."""
    found = frame.copy(deep=False)
    found.columns = pd.Index(_column_names(frame.columns, where, notes), dtype=object)
    name = found.index.name
    same = name in found and found.index.equals(pd.Index(found[name]))
    # The columns of results are added to obs later.
    if (name in found and not same) or (where == "obs" and name in RESERVED):
        notes.append(f"the index of {where} loses its name, {name!r}, which is a column's")
        found.index = found.index.rename(None)  # a copy: `frame` has the old one
    if not all(isinstance(name, str) for name in found.index):
        found.index = found.index.astype(str)
    for key in list(found):
        if found[key].dtype.kind in "biuf" or _can_be_written(found[key]):
            continue
        text = found[key].map(str, na_action="ignore").astype("string")
        if _can_be_written(text):
            found[key] = text
            notes.append(f"column {key!r} of {where} is written as text")
        else:
            found = found.drop(columns=key)
            notes.append(f"column {key!r} of {where} cannot be written to .h5ad and is left out")
    return found


def _can_be_written(column: pd.Series) -> bool:
    with h5py.File(io.BytesIO(), "w") as file:
        try:
            write_elem(file, "column", column.to_frame("column"))
        except MemoryError:
            raise
        except Exception:  # every dtype raises its own
            return False
    return True


class H5adWriter:
    """Appends cells to an .h5ad file.

    Parameters
    ----------
    disk : _Disk
    file : h5py.File
        The file on that disk.
    n_obs : int
    var : pandas.DataFrame
    dtypes : dict
        Those of the columns of obs.
    counts : dtype, optional
        Type of the counts in X; without it, no X is written.
    latent : int, optional
        Dimensions of obsm["X_vmm"]; without it, no embedding is written.
    index_name : str, optional
        Name of the index of obs.
    uns : dict
    """

    def __init__(
        self,
        disk: _Disk,
        file: h5py.File,
        n_obs: int,
        var: pd.DataFrame,
        dtypes: Mapping[str, Any],
        *,
        counts: Any = None,
        latent: int | None = None,
        index_name: str | None = None,
        uns: Mapping[str, Any] | None = None,
    ) -> None:
        self._disk, self._file, self._n_obs, self._at = disk, file, n_obs, 0
        _mark(file, "anndata", "0.1.0")
        for name in ("layers", "obsm", "obsp", "varm", "varp"):
            write_elem(file, name, {})
        with settings.override(allow_write_nullable_strings=True):  # var may have such columns
            write_elem(file, "var", _writable(var, "var", []))
        write_elem(file, "uns", dict(uns or {}))
        self._obs = _mark(file.create_group("obs"), "dataframe", "0.2.0")
        names = _column_names(dtypes, "obs", [])
        index = index_name if index_name is not None and index_name not in names else "_index"
        self._obs.attrs["_index"] = index
        self._obs.attrs["column-order"] = np.array(names, object if names else float)
        self._columns: dict[str, Any] = {
            key: self._column(name, dtype)
            for name, (key, dtype) in zip(names, dtypes.items(), strict=True)
        }
        self._names = self._array(self._obs, index, STRINGS)
        self._latent = self._array(file["obsm"], "X_vmm", np.float32, latent) if latent else None
        self._matrix = None
        if counts is not None:
            self._matrix = _mark(file.create_group("X"), "csr_matrix", "0.1.0")
            self._matrix.attrs["shape"] = np.array([n_obs, len(var)])
            # Signed, because SciPy warns of unsigned indices.
            genes = np.int16 if len(var) <= 1 << 15 else np.int32
            for name, dtype in (("data", counts), ("indices", genes)):
                self._matrix.create_dataset(
                    name, (0,), dtype, maxshape=(None,), chunks=(CHUNK,), **FILTERS
                )
            self._indptr = np.zeros(n_obs + 1, np.int64)
        file.flush()
        self._begin = disk.size

    def _array(self, group: Any, name: str, dtype: Any, width: int | None = None) -> Any:
        """Create an array with a row for every cell."""
        shape = (self._n_obs,) if width is None else (self._n_obs, width)
        chunks = (min(self._n_obs, CHUNK // (width or 1) or 1), *shape[1:])
        if dtype == STRINGS:  # not compressed: filters would see references to strings only
            found = group.create_dataset(name, shape, h5py.string_dtype(), chunks=chunks)
            return _mark(found, "string-array", "0.2.0")
        found = group.create_dataset(name, shape, dtype, chunks=chunks, **FILTERS)
        return _mark(found, "array", "0.2.0")

    def _column(self, key: str, dtype: Any) -> Any:
        if isinstance(dtype, np.dtype):
            return self._array(self._obs, key, dtype)
        group = self._obs.create_group(key)
        if isinstance(dtype, pd.CategoricalDtype):
            _mark(group, "categorical", "0.2.0").attrs["ordered"] = bool(dtype.ordered)
            write_elem(group, "categories", np.asarray(dtype.categories))
            codes = pd.Categorical.from_codes([], dtype=dtype).codes.dtype
            return self._array(group, "codes", codes)
        if isinstance(dtype, pd.StringDtype):
            _mark(group, "nullable-string-array", "0.1.0")
            group.attrs["na-value"] = "NA" if dtype.na_value is pd.NA else "NaN"
            values: Any = STRINGS
        else:
            kind = "boolean" if dtype.kind == "b" else "integer"
            _mark(group, f"nullable-{kind}", "0.1.0")
            values = dtype.numpy_dtype
        return self._array(group, "values", values), self._array(group, "mask", np.dtype(bool))

    def append(
        self, obs: pd.DataFrame, counts: csr_matrix | None = None, z: np.ndarray | None = None
    ) -> None:
        """Append cells, with counts [cells, genes] with sorted indices, and z [cells, D].

        Raises OSError or InputError if the disk is full, or too small for all cells.
        """
        start, stop = self._at, self._at + len(obs)
        self._at = stop
        self._names[start:stop] = obs.index.to_numpy(object)
        for key, place in self._columns.items():
            values = obs[key].array
            if isinstance(values, pd.Categorical):
                place[start:stop] = values.codes
            elif isinstance(place, tuple):
                missing = np.asarray(values.isna())
                place[0][start:stop] = values.to_numpy(
                    place[0].dtype, na_value="" if place[0].dtype == object else 0
                )
                place[1][start:stop] = missing
            else:
                place[start:stop] = values.to_numpy()
        if self._latent is not None:
            self._latent[start:stop] = z
        if self._matrix is not None:
            assert counts is not None
            values = int(self._indptr[start])
            self._indptr[start + 1 : stop + 1] = values + counts.indptr[1:]
            for name, part in (("data", counts.data), ("indices", counts.indices)):
                array = self._matrix[name]
                array.resize((values + len(part),))
                array[values:] = part.astype(array.dtype)
        self._disk.check()
        self._check_space()

    def _check_space(self) -> None:
        """Raise InputError if the rest will not fit on the disk, judged by what is written."""
        needed = (self._disk.size - self._begin) * (self._n_obs / self._at - 1)
        free = shutil.disk_usage(self._disk.folder).free
        if needed > 1.2 * free:
            raise InputError(
                f"{self._disk.folder}: the disk is too full, about {needed / 1e6:,.1f} MB more are "
                f"needed, {free / 1e6:,.1f} MB are free"
            )

    def finish(self) -> None:
        """Write what is only known at the end: where each cell's counts begin."""
        if self._matrix is not None:
            small = self._indptr[-1] < 2**31
            write_elem(self._matrix, "indptr", self._indptr.astype(np.int32 if small else np.int64))
        self._file.flush()


def _mark(element: Any, encoding: str, encoding_version: str) -> Any:
    element.attrs["encoding-type"] = encoding
    element.attrs["encoding-version"] = encoding_version
    return element


# --- results ---


def write_results(
    store: CellStore,
    folder: Path,
    z: np.ndarray,
    clusters: pd.DataFrame,
    genes: pd.Index,
    uns: Mapping[str, Any],
) -> None:
    """Write cells.h5ad, without counts, and clusters.csv: each whole or not at all.

    See :func:`write_clustered`; `genes` were trained on.
    """
    var = store.var.assign(vmm_gene=store.var_names.isin(genes))
    write_clustered(store, folder / "cells.h5ad", z, clusters, var, uns)
    write_table(
        folder / "clusters.csv",
        clusters,
        ((part, store.obs_names(part.start, part.stop)) for part in _parts(store)),
    )


def _parts(store: CellStore) -> list[slice]:
    return [slice(at, min(at + ROWS, store.n_obs)) for at in range(0, store.n_obs, ROWS)]


def cluster_columns(
    labels: np.ndarray, probability: np.ndarray, entropy: np.ndarray, components: np.ndarray
) -> pd.DataFrame:
    """Return clusters and components as columns of obs, with categories in numerical order."""
    values = (_categories(labels), probability, entropy, _categories(components))
    return pd.DataFrame(dict(zip(COLUMNS, values, strict=True)))


def _categories(numbers: np.ndarray) -> pd.Categorical:
    used, codes = np.unique(numbers, return_inverse=True)
    return pd.Categorical.from_codes(codes, used.astype(str).astype(object))


def write_clustered(
    store: CellStore,
    path: Path,
    z: np.ndarray,
    clusters: pd.DataFrame,
    var: pd.DataFrame,
    uns: Mapping[str, Any],
) -> None:
    """Write obs of a store, its clusters, and z [n_obs, D] as X_vmm to .h5ad, whole or not at all.

    `clusters` come from :func:`cluster_columns`, `uns` is that of the file. Raises InputError if
    the disk is too small or fills up, or a file of the store has changed.
    """
    stale = set(RESERVED) - set(clusters)
    dtypes = {key: kind for key, kind in store.dtypes.items() if key not in stale}
    kept = [key for key in dtypes if key not in clusters]

    def fill(writer: H5adWriter) -> None:
        for part in _parts(store):
            obs = store.obs(part.start, part.stop, kept)
            columns = {key: values.array[part] for key, values in clusters.items()}
            writer.append(obs.assign(**columns), z=z[part])

    write_h5ad(
        path,
        store.n_obs,
        var,
        dtypes | dict(clusters.dtypes),
        fill,
        latent=z.shape[1],
        index_name=store.index_name,
        uns=uns,
    )


def write_markers(path: Path, markers: pd.DataFrame) -> None:
    """Write markers.csv: a line per marker gene of a cluster."""
    rows = (
        [cluster, gene, *(f"{value:.4f}" for value in measured)]
        for cluster, gene, *measured in markers.itertuples(index=False)
    )
    with _explain_write_errors(path):
        write_atomically(path, as_csv(list(markers), rows), text=True)


def write_table(
    path: Path, clusters: pd.DataFrame, parts: Iterable[tuple[slice, Iterable[str]]]
) -> None:
    """Write clusters.csv: a line per cell, in the order of the input, with labels if there are any.

    `clusters` come from :func:`cluster_columns`. Each part is of some of its rows, and has the
    names of these cells.
    """
    header = ["cell", "cluster", "probability", "entropy", "component"]
    learnt = [LABEL] if LABEL in clusters else []
    rows = (
        [cell, cluster, f"{probability:.6f}", f"{entropy:.6f}", *more]
        for part, cells in parts
        for cell, cluster, probability, entropy, *more in zip(
            cells, *(clusters[name].iloc[part] for name in [*COLUMNS, *learnt]), strict=True
        )
    )
    header += ["label"] * len(learnt)
    with _explain_write_errors(path):
        write_atomically(path, as_csv(header, rows), text=True)
