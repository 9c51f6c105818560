"""Reading files of 10x Genomics, similar ones, and loom.

Names are text, whatever they look like: *Drosophila* has a gene *nan*. 10x files may also have
antibodies, guides or peaks; only genes are kept.
"""

from __future__ import annotations

import gzip
import html
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData, concat
from scipy.io import mminfo, mmread
from scipy.sparse import csr_matrix, vstack

from vmm_fast._errors import InputError
from vmm_fast._text import counted, joined, not_utf8
from vmm_fast.cells.elements import FAULT, Attempts, left_out
from vmm_fast.cells.names import CELLS, GENES, find_names

GENE = "Gene Expression"  # the type of a feature that is a gene
# Types of features that are not genes, in Cell Ranger, Cell Ranger ATAC and Xenium.
OTHER = re.compile("capture$|control|codeword|^peaks$|^custom$", re.IGNORECASE)
VALUES = 1 << 24  # most values of a dense matrix that are read together


def visible(folder: Path, pattern: str) -> list[Path]:
    """Return the files that match a pattern, sorted, without hidden ones.

    macOS writes a hidden file beside each (``._cells.h5ad``).
    """
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))


# --- 10x, .h5 ---


def kind_of_hdf5(file: Path) -> str | None:
    """Return the suffix that an HDF5 file should have by what it holds, or None if unknown."""
    try:
        with h5py.File(file, "r") as opened:
            if "obs" in opened and "var" in opened:
                return ".h5mu" if "mod" in opened and "obsmap" in opened else ".h5ad"
            matrix = opened.get("matrix")
    except Exception:  # reported later, when the file is read
        return None
    if matrix is None:
        return None
    return ".loom" if isinstance(matrix, h5py.Dataset) else ".h5"


def read_10x_h5(file: Path) -> tuple[AnnData, list[str]]:
    """Return the cells of a feature-barcode matrix with their genes, and notes."""
    notes: list[str]
    with h5py.File(file, "r") as opened:
        groups = [key for key, group in opened.items() if isinstance(group, h5py.Group)]
        genomes = [key for key in groups if {"barcodes", "gene_names"} <= set(opened[key])]
        if genomes:  # Cell Ranger 2 has a group for each genome; 3 has one for all
            parts = [
                _matrix_of(opened[key], opened[key]["genes"], opened[key]["gene_names"])
                for key in genomes
            ]
            notes = []
        elif "matrix" in opened:
            features = opened["matrix/features"]
            adata = _matrix_of(opened["matrix"], features["id"], features["name"])
            for key in features:
                values = features[key]
                if key not in ("id", "name") and getattr(values, "shape", ()) == (adata.n_vars,):
                    key = "feature_types" if key == "feature_type" else key
                    adata.var[key] = _values_of(values)
            notes = []
            if "feature_types" in adata.var:
                keep, notes = _genes_of(adata.var["feature_types"].to_numpy(dtype=object))
                adata = adata if keep.all() else adata[:, keep].copy()
            genomes = list(adata.var.get("genome", pd.Series(dtype=object)).unique())
            parts = [adata]
        else:
            raise InputError(
                "must be a feature-barcode matrix of 10x Genomics, but holds "
                f"{', '.join(opened) or 'nothing'}"
            )
    if len(parts) > 1:
        parts = [concat(parts, axis=1, join="outer", merge="first", label="genome", keys=genomes)]
    (adata,) = parts
    if len(genomes) > 1:
        adata.var_names, more = _with_genomes(adata.var)
        notes += [f"the genes of {len(genomes)} genomes are read: {joined(genomes, 5)}", *more]
    return adata, notes


def _matrix_of(group: Any, ids: Any, names: Any) -> AnnData:
    """Return cells with the counts and names in a group."""
    number, cells = map(int, group["shape"][()])
    parts = tuple(group[name][()] for name in ("data", "indices", "indptr"))
    counts = csr_matrix(parts, shape=(cells, number))
    counts.check_format(full_check=True)
    gene_ids = _values_of(ids).tolist()
    var = pd.DataFrame({"gene_ids": gene_ids}, index=_named(_values_of(names).tolist(), gene_ids))
    return AnnData(_as_float32(counts), pd.DataFrame(index=_values_of(group["barcodes"])), var)


def _values_of(element: Any) -> np.ndarray:
    """Return the values of an array; bytes of text that are not UTF-8 are replaced."""
    values: np.ndarray
    if h5py.check_string_dtype(element.dtype) is None:
        values = element[()]
    else:
        values = element.asstr("utf-8", errors="replace")[()].astype(object)
    return values


def _named(names: Iterable[str], ids: Iterable[str]) -> list[str]:
    """Return the names of genes; if several are empty, their ids replace them."""
    names = list(names)
    several = sum(not name for name in names) > 1
    return [id_ if several and not name else name for name, id_ in zip(names, ids, strict=True)]


def _with_genomes(var: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Return names of genes, with the genome before those of several genomes, and a note."""
    genomes = var["genome"].groupby(var.index).nunique()
    same = set(genomes.index[genomes > 1])
    if not same:
        return list(var.index), []
    names = [f"{x}_{name}" if name in same else name for name, x in var["genome"].items()]
    example = next(name for name in names if name not in var.index)
    found = f"{counted(len(same), 'gene name is', 'gene names are')} of several genomes"
    return names, [f"{found}, so the genome stands before the name: {example!r}"]


def _genes_of(types: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return which features are genes, and notes on the others and on unknown types."""
    keep = np.array([kind == GENE or not OTHER.search(kind) for kind in types])
    if not keep.any():
        raise InputError(f"must hold features of {GENE}, but holds {_listed_types(types)}")
    notes = []
    for these, what in (
        (~keep, "left out, since genes alone are read"),
        (keep & (types != GENE), "of a type that 10x does not have, and taken for genes"),
    ):
        if number := these.sum():
            are = counted(number, "feature is", "features are")
            notes.append(f"{are} {what}: {_listed_types(types[these])}")
    return keep, notes


def _listed_types(types: np.ndarray) -> str:
    numbers = pd.Series(types).value_counts(sort=False)
    return joined([f"{number:,} {kind or 'of no type'}" for kind, number in numbers.items()], 5)


# --- 10x, a folder ---


def matrices(folder: Path) -> list[Path]:
    """Return the matrices in a folder: ``matrix.mtx``, or with a prefix, as GEO has them."""
    return visible(folder, "*matrix.mtx") + visible(folder, "*matrix.mtx.gz")


def read_10x_mtx(folder: Path) -> tuple[AnnData, list[str]]:
    """Return the cells in a folder of Cell Ranger, STARsolo or GEO with their genes, and notes.

    Each of its three files may be compressed or not. The file of genes may have any columns.
    """
    prefixes: dict[str, Path] = {}
    for file in matrices(folder):
        prefixes.setdefault(_bare(file).removesuffix("matrix.mtx"), file)
    if len(prefixes) > 1 and "" not in prefixes:
        raise InputError(
            "must hold one matrix.mtx, but holds "
            f"{joined([f.name for f in prefixes.values()], 5)}; put the files of each into a "
            "folder of its own"
        )
    prefix = "" if "" in prefixes else next(iter(prefixes))
    matrix, notes = prefixes[prefix], []
    rows, columns = mminfo(_unpacked(matrix))[:2]
    features_file = _beside(matrix, prefix, "features.tsv", "genes.tsv")
    if _bare(features_file).endswith("features.tsv"):
        notes += [
            f"{features_file.name} names the genes; {file.name} beside it is not read"
            for file in visible(folder, f"{prefix}genes.tsv*")
        ]
    features = _table(features_file)
    barcodes_file = _beside(matrix, prefix, "barcodes.tsv")
    barcodes = [row[0] for row in _table(barcodes_file)]
    if (rows, columns) not in (shape := (len(features), len(barcodes)), shape[::-1]):
        one_more = {shape[0] - rows, shape[1] - columns} <= {0, 1}
        header = "; leave out a first line that names the columns" if one_more else ""
        raise InputError(
            f"{matrix.name} must be {shape[0]} x {shape[1]}, as {features_file.name} and "
            f"{barcodes_file.name} have lines, but is {rows} x {columns}{header}"
        )
    counts = mmread(_unpacked(matrix))
    counts = csr_matrix(counts.T if (rows, columns) == shape else counts)
    width = max(map(len, features), default=1)
    features = [row + [""] * (width - len(row)) for row in features]
    ids = [row[0] for row in features]
    names = _named([row[min(1, width - 1)] for row in features], ids)
    var = pd.DataFrame({"gene_ids": ids}, index=names)
    adata = AnnData(_as_float32(counts), pd.DataFrame(index=barcodes), var)
    types = np.array([row[2] if width > 2 else "" for row in features], dtype=object)
    # The third column of genes.tsv may be anything.
    if GENE not in types and (width < 3 or _bare(features_file).endswith("genes.tsv")):
        return adata, notes
    keep, of_types = _genes_of(types)
    adata.var["feature_types"] = types
    return (adata if keep.all() else adata[:, keep].copy()), notes + of_types


def _bare(file: Path) -> str:
    return file.name.removesuffix(".gz")


def _beside(matrix: Path, prefix: str, *names: str) -> Path:
    """Return the first of these files that exists, compressed or not."""
    for name in names:
        for suffix in ("", ".gz"):
            file = matrix.with_name(prefix + name + suffix)
            if file.is_file():
                return file
    wanted = " or ".join(prefix + name for name in names)
    raise InputError(f"must hold {wanted} beside {matrix.name}, compressed or not, but lacks it")


def _is_packed(file: Path) -> bool:
    """Return whether a file is compressed: browsers unpack downloads and keep the name."""
    with open(file, "rb") as opened:
        return opened.read(2) == b"\x1f\x8b"


def _unpacked(file: Path) -> Any:
    """Return a file for scipy, which goes by the suffix when it is given a path."""
    packed = _is_packed(file)
    if packed == (file.suffix == ".gz"):
        return str(file)
    return io.BytesIO(gzip.decompress(file.read_bytes()) if packed else file.read_bytes())


def _table(file: Path) -> list[list[str]]:
    """Return the fields of each line, without the quotes that R puts around them."""
    opened: Any = gzip.open if _is_packed(file) else open
    try:
        with opened(file, "rt", encoding="utf-8-sig") as lines:
            rows = [line.rstrip("\n").split("\t") for line in lines]
    except UnicodeDecodeError:
        with open(file, "rb") as again:
            raise InputError(f"{file.name} {not_utf8(again.read(8))}") from None
    while rows and rows[-1] == [""]:
        rows.pop()
    quoted = all(len(x) > 1 and x[0] == x[-1] == '"' for row in rows[:9] for x in row[:1])
    return [[x.strip('"') for x in row] for row in rows] if quoted else rows


def _as_float32(counts: csr_matrix) -> csr_matrix:
    """Return the matrix as float32 if that holds all values exactly, else unchanged."""
    small = counts.astype(np.float32)
    return small if np.array_equal(small.data, counts.data) else counts


# --- loom ---


def read_loom(file: Path) -> tuple[AnnData, list[str]]:
    """Return the main matrix, layers and attributes of a loom file, and notes.

    loompy's attributes with names are CellID and Gene; velocyto and others have different ones.
    A layer or attribute that cannot be read is left out.
    """
    notes = []
    try_to = Attempts()
    with h5py.File(file, "r") as opened:
        matrix = opened["matrix"]
        genes, cells = matrix.shape
        obs, obsm = _attributes(opened, "col_attrs", cells, try_to)
        var, varm = _attributes(opened, "row_attrs", genes, try_to)
        for table, usual, what, expected in (
            (obs, CELLS, "cells", ("CellID", "obs_names")),
            (var, GENES, "genes", ("Gene", "var_names")),
        ):
            key = next((key for key in expected if key in table), None)
            if key is None and (key := find_names(table, usual)) is not None:
                notes.append(f"names of {what} are those of {key}, there is no {expected[0]}")
            if key is not None:
                table.index = pd.Index(table.pop(key).astype(str).to_numpy(object))
        layers = {
            key: try_to(f"layers/{key}", _layer, opened["layers"], key, matrix.shape)
            for key in opened.get("layers", ())
        }
        layers = {key: layer for key, layer in layers.items() if layer is not FAULT}
        counts = _as_float32(_transposed(matrix))
        adata = AnnData(counts, obs, var, layers=layers, obsm=obsm, varm=varm)
        return adata, left_out(try_to.faults) + notes


def _attributes(
    opened: Any, where: str, number: int, try_to: Attempts
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Return attributes as columns of a table, and separately those that are matrices."""
    columns, arrays = {}, {}
    for key in opened.get(where, ()):
        values = try_to(f"{where}/{key}", _attribute, opened[where], key, number)
        if values is FAULT:
            continue
        if values.ndim > 1 and values.shape[1] != 1:
            arrays[key] = values
        else:
            columns[key] = values.reshape(-1)
    return pd.DataFrame(columns, index=pd.RangeIndex(number).astype(str)), arrays


def _attribute(group: Any, key: str, number: int) -> np.ndarray:
    element = _dataset(group, key)
    if (element.shape or ())[:1] != (number,):
        raise ValueError(f"it must have {number} values, but has the shape {element.shape}")
    values: np.ndarray = element[()]
    if h5py.check_string_dtype(element.dtype) is None:
        return values
    values = element.asstr(errors="replace")[()]  # loompy escapes what is not ASCII
    return np.array([html.unescape(x) for x in values.flat], object).reshape(values.shape)


def _layer(group: Any, key: str, shape: tuple[int, ...]) -> csr_matrix:
    layer = _dataset(group, key)
    if layer.shape != shape:
        raise ValueError(f"it must have the shape {shape}, but has {layer.shape}")
    return _transposed(layer)


def _dataset(group: Any, key: str) -> Any:
    if not isinstance(group.get(key), h5py.Dataset):
        raise ValueError("it must be an array, but is a group or a link to nothing")
    return group[key]


def _transposed(matrix: Any) -> csr_matrix:
    """Return a dense matrix on disk, genes in rows, as a sparse one with cells in rows."""
    step = max(1, VALUES // max(1, matrix.shape[1]))
    starts = range(0, matrix.shape[0], step)
    # scipy supports neither another byte order nor float16.
    dtype = matrix.dtype.newbyteorder("=")
    dtype = np.dtype(np.float32) if dtype == np.float16 else dtype
    parts = [csr_matrix(matrix[start : start + step].astype(dtype)) for start in starts]
    return csr_matrix(vstack(parts).T) if parts else csr_matrix(matrix.shape[::-1])
