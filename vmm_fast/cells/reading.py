"""Reading cells from .h5ad, .zarr, .h5, .mtx and .loom, and checking that they can be trained on.

A file is only ever read. An :class:`InputError` says in one line what is wrong with it.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData, read_h5ad
from anndata.io import read_zarr
from scipy.sparse import csr_matrix, issparse

from vmm_fast._checks import not_counts
from vmm_fast._errors import InputError
from vmm_fast._text import counted, joined
from vmm_fast.cells.elements import read_elements, summarize_error
from vmm_fast.cells.formats import (
    kind_of_hdf5,
    matrices,
    read_10x_h5,
    read_10x_mtx,
    read_loom,
    visible,
)
from vmm_fast.cells.names import GENES, find_names, numbered

CHUNK = 1 << 22  # values that are checked together
SUFFIXES = (".h5ad", ".h5mu", ".zarr", ".h5", ".loom")
ANNDATA = (".h5ad", ".h5mu", ".zarr")  # kinds whose elements anndata reads


@dataclass(frozen=True)
class LoadedCells:
    """Cells as read, and notes on how the file was understood."""

    adata: AnnData
    notes: list[str] = field(default_factory=list)


def read_cells(path: str, layer: str | None = None, modality: str | None = None) -> LoadedCells:
    """Read a file or folder of cells into memory.

    Parameters
    ----------
    path : str
        ``.h5ad``, a ``.zarr`` folder, ``.h5`` of 10x Genomics, their folder with ``matrix.mtx``, or
        ``.loom``. The content of an HDF5 file determines its kind, not the suffix.
    layer : str, optional
        Layer with the counts, if there is one; default X. Any other element that cannot be read is
        left out.
    modality : str, optional
        The one to read of a file of several: ``.h5mu``, or a ``.zarr`` folder of MuData.

    Raises
    ------
    InputError
        If the file is of another kind, damaged or empty, or has two genes of the same name.
    """
    file = Path(path)
    kind = kind_of(file)
    if kind == "shards":
        raise InputError(f"{path}: must be one file, but is a folder of .h5ad files: see CellStore")
    if modality is not None and kind not in ANNDATA:
        raise InputError(f"{path}: --modality must be left out, as {kind} has none")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names that are not unique are checked below
            adata, notes = _reader(kind, layer, modality)(file)
    except MemoryError:
        raise
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except ImportError as error:
        raise InputError(f"{path}: {kind} needs {error.name}: pip install {error.name}") from None
    except Exception as error:  # every format raises its own
        raise InputError(f"{path}: {unreadable(error, kind)}") from None
    if kind in ANNDATA:
        adata.var_names, more = names_of_genes(adata.var)
        notes += more
    elif not adata.var_names.is_unique:
        number = int(adata.var_names.duplicated().sum())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that end in a number
            adata.var_names_make_unique()
        names = counted(number, "gene name that occurs", "gene names that occur")
        notes.append(f"{names} again got a number: -1, -2, ...")
    try:
        check_shape(*adata.shape)
        check_unique(adata.var_names)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return LoadedCells(adata, notes)


def kind_of(file: Path) -> str:
    """Return the kind of a file of cells: its suffix, ".mtx" or "shards".

    ".mtx" is a folder of 10x Genomics, "shards" a folder of .h5ad files. Raises InputError if the
    file is absent, empty or of an unknown kind.
    """
    if not file.exists():
        raise InputError(f"{file}: no such file or folder")
    if not os.access(file, os.R_OK):
        raise InputError(f"{file}: cannot be read: permission denied")
    if file.is_dir():
        if matrices(file):
            return ".mtx"
        if any((file / name).is_file() for name in ("zarr.json", ".zgroup")):
            return ".zarr"
        if visible(file, "*.h5ad"):
            return "shards"
        raise InputError(
            f"{file}: is a folder without matrix.mtx, matrix.mtx.gz and .h5ad files, and no zarr "
            "folder"
        )
    if file.stat().st_size == 0:
        raise InputError(f"{file}: is empty")
    kind = file.suffix.lower()
    if kind not in SUFFIXES or kind == ".zarr":
        given = f"ends in {kind}" if kind else "has no suffix"
        raise InputError(
            f"{file}: must be a .h5ad, .h5mu, .h5 or .loom file or a zarr or 10x mtx folder, "
            f"{given}"
        )
    return kind_of_hdf5(file) or kind


def size_of(path: Path) -> int:
    """Return the size in bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def unreadable(error: Exception, kind: str) -> str:
    """Return the message for an error that came up when a file of this kind was read."""
    if "unable to lock file" in str(error):  # HDF5 locks what it writes
        return (
            "must be closed where it is written to, but is locked; on a disk without locks, set "
            "HDF5_USE_FILE_LOCKING=FALSE"
        )
    if missing := re.search(r"can't locate attribute: ('.+?')", str(error)):
        return (
            f"must have the attribute {missing[1]} in its tables, as {kind} files do, but lacks it"
        )
    return f"is damaged or no {kind} file, and cannot be read: {summarize_error(error)}"


def names_of_genes(var: pd.DataFrame) -> tuple[pd.Index, list[str]]:
    """Return the names of genes, and a note if they come from a column, as the index is numbers."""
    names = var.index.astype(str)
    if not numbered(names) or (key := find_names(var, GENES, unique=True)) is None:
        return names, []
    note = f"names of genes are those of {key} in var, whose own are numbers"
    return pd.Index(var[key].to_numpy(object)), [note]


def notes_on_chunks(matrix: Any, where: str) -> list[str]:
    """Return a note if a dense array of zarr lacks chunks: they are lost, or were all zeros."""
    if not isinstance(matrix, zarr.Array):
        return []
    absent = matrix.nchunks - matrix.nchunks_initialized
    if not absent:
        return []
    return [f"{where} lacks {absent:,} of {matrix.nchunks:,} chunks, which are taken for zeros"]


def open_zarr(folder: Path) -> Any:
    """Open a zarr folder for reading.

    Consolidated metadata are not used: zarr loses columns there whose names differ only by case.
    """
    return zarr.open_group(folder, mode="r", use_consolidated=False)


def modality_in(root: Any, name: str | None) -> Any:
    """Return the group of a modality in an opened file; without a name the file, if it has none.

    Raises InputError if the file has no such modality, or several to choose from.
    """
    found = root.get("mod")
    names = list(found.keys()) if hasattr(found, "keys") else []
    if name is None and names and "obsmap" in root:  # which anndata does not write
        first = "rna" if "rna" in names else names[0]
        raise InputError(
            f"must hold one modality, but holds {joined(names)}; vmm-fast prepare --modality "
            f"{first} makes a file of one"
        )
    if name is not None and name not in names:
        raise InputError(
            f"--modality {name}: must be one of the modalities, {describe_choices(names)}"
        )
    return root if name is None else found[name]


def beside_modality(root: Any, name: str) -> list[str]:
    """Return the names of what a file has besides one modality; of all together with a "/"."""
    names = list(root["mod"].keys())
    columns = list(map(str, root["obs"].attrs.get("column-order", ()))) if "obs" in root else []
    shared = [f"/obs/{key}" for key in columns]
    for group in ("obsm", "obsp"):  # where each modality has its rows
        shared += [f"/{group}/{key}" for key in root.get(group, ()) if key not in names]
    shared += ["/uns"] if len(root.get("uns", ())) else []
    return [f"mod/{other}" for other in names if other != name] + shared


def _read_h5ad(file: Path, layer: str | None, modality: str | None) -> tuple[AnnData, list[str]]:
    with h5py.File(file, "r") as opened:
        group = modality_in(opened, modality)
        if modality is not None or not _is_old(group):
            return _elements_of(opened, group, layer, modality)
    return read_h5ad(file), []


def _read_zarr(folder: Path, layer: str | None, modality: str | None) -> tuple[AnnData, list[str]]:
    root = open_zarr(folder)
    group = modality_in(root, modality)
    if modality is None and _is_old(group):
        return read_zarr(group), []
    adata, notes = _elements_of(root, group, layer, modality)
    return adata, notes + notes_on_chunks(group.get("X"), "X")


def _elements_of(
    root: Any, group: Any, layer: str | None, modality: str | None
) -> tuple[AnnData, list[str]]:
    adata, notes = read_elements(group, layer)
    others = [] if modality is None else beside_modality(root, modality)
    return adata, notes + ([f"{modality} alone is read, not {joined(others)}"] if others else [])


def _is_old(group: Any) -> bool:
    """Return whether a file is of the first versions of anndata, which wrote obs as a table."""
    return "raw.X" in group or not all(hasattr(group.get(n), "keys") for n in ("obs", "var"))


def _reader(
    kind: str, layer: str | None, modality: str | None
) -> Callable[[Path], tuple[AnnData, list[str]]]:
    readers: dict[str, Callable[[Path], tuple[AnnData, list[str]]]] = {
        ".h5ad": partial(_read_h5ad, layer=layer, modality=modality),
        ".h5mu": partial(_read_h5ad, layer=layer, modality=modality),
        ".zarr": partial(_read_zarr, layer=layer, modality=modality),
        ".h5": read_10x_h5,
        ".mtx": read_10x_mtx,
        ".loom": read_loom,
    }
    return readers[kind]


def check_shape(cells: int, genes: int) -> None:
    """Raise InputError if there are no cells or no genes."""
    if cells == 0 or genes == 0:
        has = f"{counted(cells, 'cell')} and {counted(genes, 'gene')}"
        raise InputError(f"must hold cells and genes, but has {has}")


def check_unique(names: pd.Index) -> None:
    """Raise InputError if two genes have the same name."""
    if not names.is_unique:
        twice = names[names.duplicated()]
        raise InputError(
            f"gene names must be unique, {len(twice):,} occur{'s' * (len(twice) == 1)} again, the "
            f"first of them {str(twice[0])!r}; see adata.var_names_make_unique()"
        )


def example() -> LoadedCells:
    """Return the 700 blood cells that come with scanpy, as counts; types in obs["bulk_labels"].

    scanpy's raw values are log(1 + 1e4 counts / total), which give the counts back exactly.
    """
    from scanpy.datasets import pbmc68k_reduced

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored = pbmc68k_reduced()
    depth = stored.obs["n_counts"].to_numpy()[:, None]
    counts = np.rint(np.expm1(stored.raw.X.toarray()) * depth / 1e4)
    kept = stored.obs[["bulk_labels", "phase", "percent_mito"]].copy()
    return LoadedCells(AnnData(csr_matrix(counts, dtype=np.float32), kept, stored.raw.var.copy()))


# --- counts ---


def counts_of(adata: AnnData, layer: str | None, dtype: Any = None) -> Any:
    """Return X, or the layer, after checking that it holds counts that `dtype` holds exactly.

    Raises InputError if the matrix is absent or damaged, or has values that are not counts; the
    message says where counts are.
    """
    if layer is not None and layer not in adata.layers:
        raise InputError(
            f"--layer {layer}: must be one of the layers, {describe_choices(layers_of(adata))}"
        )
    matrix = adata.X if layer is None else adata.layers[layer]
    where = "X" if layer is None else f"layers[{layer!r}]"
    if damage := damage_of(matrix):
        raise InputError(f"{where} is damaged, {damage}")
    fault = "is absent" if matrix is None else _no_counts(matrix, adata, dtype)
    if fault is None:
        return matrix
    others = [name for name, x in layers_of(adata).items() if check_counts(x, adata) is None]
    cure = ""
    if others:
        cure = f"; these hold counts: {', '.join(f'--layer {name}' for name in others)}"
    elif layer is not None and adata.X is not None and check_counts(adata.X, adata) is None:
        cure = "; X holds counts: leave --layer out"
    elif adata.raw is not None and check_counts(adata.raw.X, adata) is None:
        cure = "; raw holds counts: write adata.raw.to_adata() to a file and give that"
    raise InputError(f"{where} must hold counts, whole numbers from 0, {fault}{cure}")


def layers_of(adata: AnnData) -> dict[str, Any]:
    """Return the layers by name, without X, which anndata has among them from 0.13 on."""
    return {name: layer for name, layer in adata.layers.items() if name is not None}


def check_counts(matrix: Any, adata: AnnData) -> str | None:
    """Return what is wrong with a matrix, or its first value that is not a count; else None."""
    return damage_of(matrix) or _no_counts(matrix, adata)


def damage_of(matrix: Any) -> str | None:
    """Return what is wrong with the indices of a sparse matrix, or None if they are valid."""
    if not issparse(matrix) or matrix.format not in ("csr", "csc"):
        return None
    major, minor = matrix.shape if matrix.format == "csr" else matrix.shape[::-1]
    indptr, indices = matrix.indptr, matrix.indices
    if (
        len(indptr) != major + 1
        or (indptr[0], indptr[-1]) != (0, len(matrix.data))
        or (indptr[1:] < indptr[:-1]).any()
        or len(indices) != len(matrix.data)
    ):
        return f"is no valid {matrix.format.upper()} matrix"
    if len(indices) and not (indices.min() >= 0 and indices.max() < minor):
        return f"has a {'gene' if matrix.format == 'csr' else 'cell'} beyond its {minor}"
    return None


def _no_counts(matrix: Any, adata: AnnData, dtype: Any = None) -> str | None:
    sparse = issparse(matrix)
    values = matrix.data if sparse else np.asarray(matrix)
    if values.dtype == bool or values.dtype.kind not in "iuf":
        return f"holds {values.dtype}"
    values = values.reshape(-1)
    for start in range(0, len(values), CHUNK):
        wrong = not_counts(values[start : start + CHUNK], dtype)
        if wrong is not None:
            at = start + wrong[0]
            row, gene = _place(matrix, at) if sparse else divmod(at, matrix.shape[1])
            place = f"cell {adata.obs_names[row]!r}"
            if matrix.shape[1] == adata.n_vars:
                place += f", gene {adata.var_names[gene]!r}"
            return f"{wrong[1]} in {place}"
    return None


def _place(matrix: Any, at: int) -> tuple[int, int]:
    """Return the row and column of a stored value of a compressed sparse matrix."""
    major = int(np.searchsorted(matrix.indptr, at, side="right")) - 1
    minor = int(matrix.indices[at])
    return (major, minor) if matrix.format == "csr" else (minor, major)


# --- columns ---


def column(adata: AnnData, option: str, key: str) -> Any:
    """Return a column of obs; if there is none, raise an InputError that lists the columns."""
    if key not in adata.obs:
        raise no_column(option, key, adata.obs)
    return adata.obs[key]


def no_column(option: str, key: str, columns: Any) -> InputError:
    """Return the error for a missing column, which lists the columns that exist."""
    return InputError(f"{option} {key}: must be a column of obs, {describe_choices(columns)}")


def describe_choices(names: Any) -> str:
    """Return the end of an error message, which lists the names to choose from."""
    names = list(names)
    return f"which are {joined(names)}" if names else "but there are none"
