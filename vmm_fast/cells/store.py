"""Cells on disk, too many for memory: runs of consecutive cells are read, as CSR counts.

For a run, one slice of the CSR matrix's values is read, and one of its indices. Only the position
at which each cell starts is kept in memory (8 bytes a cell).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix

from vmm_fast._checks import not_counts
from vmm_fast._errors import InputError
from vmm_fast._text import joined
from vmm_fast.cells import frames
from vmm_fast.cells.elements import lacks_chunks, left_out, list_other_elements, read_var
from vmm_fast.cells.formats import visible
from vmm_fast.cells.obsm import OtherModality, StoredRows
from vmm_fast.cells.opened import Opened
from vmm_fast.cells.reading import (
    ANNDATA,
    check_shape,
    check_unique,
    describe_choices,
    kind_of,
    names_of_genes,
    no_column,
    notes_on_chunks,
    open_zarr,
    unreadable,
)

MOST_OPEN = 64  # most files open at once; each has a cache of two chunks
CACHE = 1 << 20  # bytes of each array that HDF5 caches


class CannotStream(InputError):
    """Raised for cells that cannot be read in parts, but perhaps into memory as a whole."""


class CellStore:
    """Cells on disk, from which runs of consecutive cells are read.

    Parameters
    ----------
    path : str or Path
        ``.h5ad``, a ``.zarr`` folder, or a folder of ``.h5ad`` files (shards), which are taken in
        the order of their names. Shards must have the genes of the first, in any order. obs has
        the columns that are common to all. With `modality` also ``.h5mu``, as MuData writes it.
    layer : str, optional
        Layer with the counts; default X.
    preferred : str, optional
        Layer to use if `layer` is not given and the first file has this one.
    modality : str, optional
        The modality of a file of several, such as ``"rna"``; obs is its own, not that of all.

    Attributes
    ----------
    files : tuple of Path
    layer : str or None
        Layer that is read; None for X.
    n_obs, n_vars : int
    var_names : pandas.Index
    var : pandas.DataFrame
        That of the first file, as is `index_name`, the name of the index of obs.
    dtypes : dict
        pandas' types of the columns of obs.
    nbytes : int
        Size of the counts in memory, as CSR of float32 with int32 indices; an upper bound if they
        are stored dense.
    others : list of str
        Names of the elements besides these counts, obs and var, such as ``"obsm/X_pca"``.
    notes : list of str
        On what is left out, or read differently from what one may expect.

    Raises
    ------
    CannotStream
        If the cells cannot be read one by one; an InputError.
    InputError
        If the file is of another kind, damaged, or without counts, or if a shard has other genes.
        Every method that reads raises it as well, and also if a file has changed since it was
        opened.

    Notes
    -----
    Several threads may use one store; they take turns.
    """

    run = 64  # fewer together are slower to read, more are shuffled less well

    def __init__(
        self,
        path: str | os.PathLike[str],
        layer: str | None = None,
        *,
        preferred: str | None = None,
        modality: str | None = None,
    ) -> None:
        self.path, self.layer, self._preferred = Path(path), layer, preferred
        self._modality, self._beside = modality, list[CellStore]()
        kind = kind_of(self.path)
        if kind == "shards":
            self.files = tuple(visible(self.path, "*.h5ad"))
        elif kind in ANNDATA:
            self.files = (self.path,)
        else:
            raise CannotStream(
                f"{path}: must be .h5ad, .zarr or a folder of .h5ad files to be read in parts; "
                "vmm-fast prepare makes one of it"
            )
        self._lock = threading.RLock()
        self._open: OrderedDict[Path, Opened] = OrderedDict()
        self.shards: list[_Shard] = []
        self.others: list[str] = []
        self.notes: list[str] = []
        try:
            for file in self.files:
                if kind == "shards":
                    kind_of(file)
                self.shards.append(self._read_shard(file))
            self._unite()
        except BaseException:
            self.close()
            raise

    def _unite(self) -> None:
        """Set what all files together have: sizes, and columns of obs."""
        self._starts = np.cumsum([0] + [shard.n_obs for shard in self.shards])
        self.n_obs, self.n_vars = int(self._starts[-1]), len(self.var_names)
        try:
            check_shape(self.n_obs, self.n_vars)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None
        self.nbytes = 8 * (self.n_obs + 1 + sum(shard.values for shard in self.shards))
        names = [set(shard.dtypes) for shard in self.shards]
        self.dtypes = {
            key: frames.common_dtype([shard.dtypes[key] for shard in self.shards])
            for key in self.shards[0].dtypes
            if all(key in those for those in names)
        }
        self._mixed = {
            key
            for key in self.dtypes
            if frames.of_text(self.dtypes[key])
            and not all(frames.of_text(shard.dtypes[key]) for shard in self.shards)
        }
        every = set().union(*names)
        # For each column that only some files have: the first file that lacks it.
        self._lacks = {
            key: file
            for file, those in reversed(list(zip(self.files, names, strict=True)))
            for key in every - those
        }
        if self._lacks:
            columns = [f"{key} ({self._lacks[key].name} has none)" for key in sorted(self._lacks)]
            self.notes.append(
                f"columns of obs that not all files have are left out: {joined(columns)}"
            )

    def __enter__(self) -> CellStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()
            for other in self._beside:
                other.close()

    # --- files ---

    @property
    def _element(self) -> str:
        return "X" if self.layer is None else f"layers/{self.layer}"

    @property
    def _where(self) -> str:
        return "X" if self.layer is None else f"layers[{self.layer!r}]"

    def _opened(self, file: Path) -> Opened:
        """Return the opened file; if too many are open, close the least recently used."""
        if file not in self._open:
            if len(self._open) == MOST_OPEN:
                self._open.popitem(last=False)[1].close()
            in_folder = file.is_dir()
            root = open_zarr(file) if in_folder else h5py.File(file, "r", rdcc_nbytes=CACHE)
            self._open[file] = Opened(root, self._modality)
        self._open.move_to_end(file)
        return self._open[file]

    @contextmanager
    def _reading(self, file: Path, stamp: Any = None) -> Iterator[Opened]:
        """Provide the opened file; errors inside become InputErrors that name it."""
        with self._lock:
            try:
                if stamp is not None and self._stamp(file) != stamp:
                    raise InputError("has changed since it was opened")
                yield self._opened(file)
            except FileNotFoundError:
                raise InputError(f"{file}: was removed since it was opened") from None
            except InputError as error:
                raise type(error)(f"{file}: {error}") from None
            except (MemoryError, KeyboardInterrupt):
                raise
            except Exception as error:  # HDF5, zarr and each codec raise their own
                kind = ".zarr" if file.is_dir() else file.suffix.lower()
                raise InputError(f"{file}: {unreadable(error, kind)}") from None

    def reading(self, shard: _Shard) -> AbstractContextManager[Opened]:
        """Provide the opened file of a shard, unless it has changed."""
        return self._reading(shard.file, shard.stamp)

    def _stamp(self, file: Path) -> tuple[tuple[int, int], ...]:
        """Return times and sizes of files, which differ if the counts or the file have changed."""
        places = [file]
        if file.is_dir():  # of zarr: chunks are new files in the folders of arrays
            group = file if self._modality is None else file / "mod" / self._modality
            arrays = [group / self._element / name for name in ("", "data", "indices")]
            places += [array / name for array in arrays for name in ("", "c", "zarr.json")]
            places += sorted((group / self._element / "c").glob("*"))  # by rows, of a dense array
        found = [place.stat() for place in places if place == file or place.exists()]
        return tuple((stat.st_mtime_ns, stat.st_size) for stat in found)

    def _read_shard(self, file: Path) -> _Shard:
        with self._reading(file) as opened:
            group = opened.group
            stamp = self._stamp(file)
            layers = group.get("layers", ())
            usual = self._preferred
            if not self.shards and self.layer is None and usual is not None and usual in layers:
                self.layer = usual
            if self.layer is not None and self.layer not in layers:
                raise InputError(
                    f"--layer {self.layer}: must be one of the layers, {describe_choices(layers)}"
                )
            for name in ("obs", "var"):
                if name not in group:
                    raise CannotStream(
                        f"cannot be read in parts, it lacks {name}; {self._prepared(file)}"
                    )
            try:
                dtypes, faults = frames.dtypes_of(group["obs"])
                var, more_faults = read_var(group)
                genes, notes = names_of_genes(var)
                notes = left_out(faults + more_faults) + notes
                encoding = (
                    frames.encoding_of(group[self._element]) if self._element in group else ""
                )
            except ValueError as error:
                raise CannotStream(
                    f"cannot be read in parts, {error}; {self._prepared(file)}"
                ) from None
            if encoding in ("", "null"):
                raise CannotStream(f"{self._where} must hold counts, but is absent")
            if encoding == "csc_matrix":
                raise CannotStream(
                    f"{self._where} is stored by genes (CSC), cells cannot be read one by one; "
                    f"{self._prepared(file)}"
                )
            if encoding not in ("csr_matrix", "array"):
                raise CannotStream(f"{self._where} must be a matrix of counts, but is a {encoding}")
            there = {name: group[name] for name in group if name in group}  # no links to nothing
            there = {n: e for n, e in there.items() if e.attrs.get("encoding-type") != "null"}
            others = list_other_elements(there.get, self._element) + opened.beside()
            self.others += [name for name in others if name not in self.others]
            matrix = group[self._element]
            n_obs = frames.rows_of(group["obs"])
            shape = tuple(map(int, matrix.attrs.get("shape", getattr(matrix, "shape", ()))))
            if shape != (n_obs, len(genes)):
                raise InputError(f"{self._where} must be {n_obs} x {len(genes)}, but is {shape}")
            indptr, values = None, n_obs * len(genes)
            if encoding == "csr_matrix":
                indptr, data, indices = matrix["indptr"][:], matrix["data"], matrix["indices"]
                indptr, values = indptr.astype(np.int64), data.shape[0]
                if (
                    len(indptr) != n_obs + 1
                    or (indptr[0], indptr[-1]) != (0, values)
                    or (np.diff(indptr) < 0).any()
                    or indices.shape[0] != values
                    or indices.dtype.kind not in "iu"
                ):
                    raise InputError(f"{self._where} is no valid CSR matrix")
                if lacks_chunks(matrix, len(genes)):
                    raise InputError(f"{self._where} lacks chunks")
            self.notes += notes_on_chunks(matrix, self._where)
            dtype = data.dtype if indptr is not None else matrix.dtype
            if dtype.kind not in "iuf":
                raise CannotStream(f"{self._where} must hold counts, holds {dtype}")
            if not self.shards:
                index = group["obs"].attrs["_index"]
                self.var = var.set_axis(genes.rename(var.index.name), axis=0)
                self.index_name = None if index == "_index" else str(index)
            if len(more := var.columns.difference(self.var.columns, sort=False)):
                first = self.shards[0].file.name
                notes = [*notes, f"columns of var that {first} lacks are left out: {joined(more)}"]
            self.notes += [note for note in notes if note not in self.notes]
            return _Shard(file, stamp, n_obs, values, indptr, dtypes, self._take_genes(genes))

    def _prepared(self, file: Path) -> str:
        """Return the advice for a file that cannot be read in parts, for an error message."""
        if file == self.path:
            option = "" if self._modality is None else f" --modality {self._modality}"
            return f"vmm-fast prepare{option} makes a file that can"
        return f"replace {file.name} by what vmm-fast prepare makes of it alone"

    def _take_genes(self, genes: pd.Index) -> np.ndarray | None:
        """Return the columns of a shard's genes in the store; None if the order is the same."""
        if not self.shards:
            check_unique(genes)
            self.var_names = genes
        if genes.equals(self.var_names):
            return None
        faults = [
            f"{what} {len(names):,}: {joined(names, 5)}"
            for what, names in (
                ("lacks", self.var_names.difference(genes, sort=False)),
                ("has others,", genes.difference(self.var_names, sort=False)),
                ("has twice", genes[genes.duplicated()]),
            )
            if len(names)
        ]
        if faults:
            raise InputError(f"must have the genes of {self.files[0].name}, {'; '.join(faults)}")
        columns: np.ndarray = self.var_names.get_indexer(genes).astype(np.int32)
        return columns

    # --- counts ---

    def read(self, starts: Any, stops: Any, dtype: Any = np.float32) -> csr_matrix:
        """Read runs of cells.

        Parameters
        ----------
        starts, stops : int or array of int [runs]
            The cells of each run, ``range(start, stop)``.
        dtype : dtype, default float32
            Type of the result; it must hold every count exactly (float32 up to 2^24).

        Returns
        -------
        csr_matrix
            [sum(stops - starts), n_vars], in the order given; indices may be unsorted.

        Raises
        ------
        InputError
            If values are not counts, or a file has changed, vanished or is damaged.
        """
        lengths, parts = [np.zeros(1, np.int64)], []
        for shard, start, stop in self.runs(np.atleast_1d(starts), np.atleast_1d(stops)):
            with self.reading(shard) as opened:
                length, part = self._slice(shard, opened, start, stop)
                self._check(shard, opened.group, start, length, part, dtype)
            if shard.take is not None:
                part = part[0], shard.take[part[1]]
            lengths.append(length)
            parts.append(part)
        indptr = np.cumsum(np.concatenate(lengths))
        data, indices = np.empty(indptr[-1], dtype), np.empty(indptr[-1], np.int32)
        at = 0
        for values, genes in parts:
            data[at : at + len(values)], indices[at : at + len(values)] = values, genes
            at += len(values)
        return csr_matrix((data, indices, indptr), (len(indptr) - 1, self.n_vars))

    def runs(self, starts: np.ndarray, stops: np.ndarray) -> Iterator[tuple[_Shard, int, int]]:
        """Yield runs as shard, start and stop: adjacent ones joined, then cut between shards."""
        if len(starts) and not ((starts >= 0) & (starts <= stops) & (stops <= self.n_obs)).all():
            raise ValueError(f"runs must lie within the {self.n_obs} cells")
        joined: list[list[int]] = []
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            if joined and joined[-1][1] == start:
                joined[-1][1] = stop
            elif start < stop:
                joined.append([start, stop])
        for start, stop in joined:
            number = int(np.searchsorted(self._starts, start, side="right")) - 1
            while start < stop:
                first, end = int(self._starts[number]), int(self._starts[number + 1])
                if start < end:
                    yield self.shards[number], start - first, min(stop, end) - first
                start, number = max(start, min(stop, end)), number + 1

    def _slice(self, shard: _Shard, opened: Opened, start: int, stop: int) -> tuple[Any, Any]:
        """Return how many values each cell has, and all values with their genes, as stored."""
        if shard.indptr is None:
            rows = opened[self._element][start:stop]
            at, genes = rows.nonzero()
            return np.bincount(at, minlength=stop - start), (rows[at, genes], genes)
        first, last = shard.indptr[start], shard.indptr[stop]
        length = np.diff(shard.indptr[start : stop + 1])
        genes = opened[f"{self._element}/indices"][first:last]
        if len(genes) and not (genes.min() >= 0 and genes.max() < self.n_vars):
            raise InputError(f"{self._where} is damaged, has a gene beyond its {self.n_vars}")
        return length, (opened[f"{self._element}/data"][first:last], genes)

    def _check(
        self,
        shard: _Shard,
        group: Any,
        start: int,
        length: np.ndarray,
        part: tuple[Any, Any],
        dtype: Any,
    ) -> None:
        """Raise InputError for values that are not counts, or that the dtype does not hold."""
        values, genes = part
        wrong = not_counts(values, dtype)
        if wrong is None:
            return
        at, fault = wrong
        cell = start + int(np.searchsorted(length.cumsum(), at, side="right"))
        name = frames.read_index(group["obs"], cell, cell + 1)[0]
        gene = genes[at] if shard.take is None else shard.take[genes[at]]
        raise InputError(
            f"{self._where} must hold counts, whole numbers from 0, {fault} in cell {name!r}, "
            f"gene {self.var_names[gene]!r}{self._cure(shard, group)}"
        )

    def _cure(self, shard: _Shard, group: Any) -> str:
        """Return the advice where to find counts, judged by the first cells; empty if nowhere."""
        options = {"X": "leave --layer out"}
        options |= {f"layers/{name}": f"--layer {name}" for name in group.get("layers", ())}
        options["raw/X"] = "write adata.raw.to_adata() to a file and give that"
        for element, option in options.items():
            if element == self._element or element not in group:
                continue
            matrix = group[element]
            values = matrix["data"][: frames.ROWS] if "shape" in matrix.attrs else matrix[:64]
            if values.dtype.kind in "iuf" and not_counts(values.reshape(-1)) is None:
                return f"; {element.replace('layers/', 'layer ')} holds counts: {option}"
        return ""

    # --- obs ---

    def obs_names(self, start: int, stop: int) -> np.ndarray:
        """Return the names of cells start to stop, str [stop - start]; they may be repeated."""
        parts = [np.empty(0, object)]
        for shard, first, last in self.runs(np.array([start]), np.array([stop])):
            with self.reading(shard) as opened:
                parts.append(frames.read_index(opened.group["obs"], first, last))
        return np.concatenate(parts)

    def obs(self, start: int, stop: int, keys: list[str] | None = None) -> pd.DataFrame:
        """Return obs of cells start to stop: all columns that are common to all files, or `keys`.

        A column has the same dtype and categories in every slice.
        """
        columns = {key: self._slices(key, start, stop) for key in keys or self.dtypes}
        return pd.DataFrame(
            {
                key: parts[0] if len(parts) == 1 else pd.concat(map(pd.Series, parts)).array
                for key, parts in columns.items()
            },
            index=pd.Index(self.obs_names(start, stop), name=self.index_name),
        )

    def _slices(self, key: str, start: int, stop: int) -> list[Any]:
        dtype, parts = self.dtypes[key], []
        for shard, first, last in self.runs(np.array([start]), np.array([stop])):
            with self.reading(shard) as opened:
                part = frames.read_slice(opened.group["obs"], key, shard.dtypes[key], first, last)
            parts.append(frames.cast(part, dtype, key in self._mixed))
        return parts

    def column(self, key: str, option: str = "column") -> pd.Categorical:
        """Return a column of obs as categories, for the cells of all files.

        Parameters
        ----------
        key : str
        option : str
            What to call the column in an error.

        Returns
        -------
        pandas.Categorical
            [n_obs]; in memory, a few bytes a cell.
        """
        if key in self._lacks:
            raise InputError(
                f"{option} {key}: must be a column of obs in every file, but is none in "
                f"{self._lacks[key].name}"
            )
        if key not in self.dtypes:
            raise no_column(option, key, self.dtypes)
        parts = []
        for start in range(0, self.n_obs, frames.ROWS):
            for part in self._slices(key, start, min(start + frames.ROWS, self.n_obs)):
                parts.append(pd.Categorical(part))
        dtype = frames.common_dtype([part.dtype for part in parts])
        if not isinstance(self.dtypes[key], pd.CategoricalDtype):
            dtype = pd.CategoricalDtype(dtype.categories.sort_values())
        codes = [frames.cast(part, dtype).codes for part in parts]
        found = pd.Categorical.from_codes(np.concatenate(codes), dtype=dtype)
        return found.remove_unused_categories()

    def columns(self, keys: Sequence[str]) -> pd.DataFrame:
        """Return columns of obs as :meth:`column` does, without the names of the cells."""
        index = pd.RangeIndex(self.n_obs)
        return pd.DataFrame({key: self.column(key) for key in keys}, index=index)

    # --- both ---

    def obsm(self, key: str) -> StoredRows:
        """Return counts in obsm, such as those of proteins, whose rows are read from disk."""
        return StoredRows(self, key)

    def other_modality(self, name: str, layer: str | None = None) -> OtherModality:
        """Return counts of another modality of the same cells, whose rows are read from disk.

        The file is one of several modalities, of which this store has one. The counts are in
        `layer` of the other; default X.
        """
        other = CellStore(self.path, layer, modality=name)
        self._beside.append(other)
        return OtherModality(self, other)

    def sample(
        self, number: int, keys: Sequence[str] = (), seed: int = 0, *, obsm: Sequence[str] = ()
    ) -> AnnData:
        """Return a random sample of the cells, drawn in runs, to make a model with.

        Parameters
        ----------
        number : int
            Approximate number of cells; all, if there are not more.
        keys : sequence of str
            Columns of obs to include, as categories; also categories of cells that are not drawn.
        seed : int
        obsm : sequence of str
            Arrays of obsm to include; see :meth:`obsm`.

        Returns
        -------
        AnnData
            Counts in X, the keys in obs, and in ``uns["rows"]`` each cell's row in the store.
        """
        starts = np.arange(0, self.n_obs, self.run)
        chosen = min(-(-number // self.run), len(starts))
        starts = np.sort(np.random.default_rng(seed).choice(starts, chosen, replace=False))
        stops = np.minimum(starts + self.run, self.n_obs)
        pairs = list(zip(starts.tolist(), stops.tolist(), strict=True))
        rows = np.concatenate([np.arange(*pair) for pair in pairs])
        names = np.concatenate([self.obs_names(*pair) for pair in pairs])
        obs = self.columns(keys).iloc[rows].set_axis(pd.Index(names))
        var = pd.DataFrame(index=self.var_names)
        more = {key: self.obsm(key)[rows] for key in obsm}
        return AnnData(self.read(starts, stops), obs, var, uns={"rows": rows}, obsm=more)


@dataclass(frozen=True)
class _Shard:
    """What is known of one file of cells since it was first opened."""

    file: Path
    stamp: Any
    n_obs: int
    values: int
    indptr: np.ndarray | None = field(repr=False)  # None where rows are dense
    dtypes: dict[str, Any]  # of the columns of obs
    take: np.ndarray | None  # columns of its genes in the store
