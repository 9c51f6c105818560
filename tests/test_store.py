"""Cells on disk: runs of them read as anndata and scipy read them whole, and every fault told."""

import os
import shutil
import threading

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("scvi", reason="scvi-tools is not installed")

import anndata
import h5py
import zarr
from anndata import AnnData, read_h5ad
from scipy.io import mmwrite
from scipy.sparse import csc_matrix, csr_matrix

from vmm_fast import cli
from vmm_fast._errors import InputError
from vmm_fast.cells import reading, store
from vmm_fast.cells.preparing import prepare
from vmm_fast.cells.reading import counts_of, read_cells
from vmm_fast.cells.store import CannotStream, CellStore

pytestmark = pytest.mark.filterwarnings("ignore")


def make_counts(number, genes, seed=0):
    """Return sparse counts; some cells have none."""
    random = np.random.default_rng(seed)
    counts = random.poisson(random.gamma(0.3, 2.0, genes), (number, genes))
    counts[random.random(number) < 0.2] = 0
    return csr_matrix(counts.astype(np.float32))


def make_cells(number=60, genes=20, seed=0):
    """Return cells with a column of every kind that anndata writes."""
    random = np.random.default_rng(seed)
    adata = AnnData(make_counts(number, genes, seed))
    adata.obs_names = [f"cell {seed}-{i}" for i in range(number)]
    adata.var_names = [f"gene {i}" for i in range(genes)]
    adata.obs["batch"] = pd.Categorical(random.choice([f"b{seed}", "common"], number))
    adata.obs["stage"] = pd.Categorical(
        random.choice(["early", "late", None], number), ["early", "mid", "late"], ordered=True
    )
    adata.obs["text"] = [f"ä {i}" for i in range(number)]
    adata.obs["number"] = random.normal(size=number).astype(np.float32)
    adata.obs["whole"] = random.integers(100, size=number)
    adata.obs["flag"] = random.random(number) < 0.5
    missing = random.random(number) < 0.5
    adata.obs["maybe whole"] = pd.array(adata.obs["whole"], dtype="Int64")
    adata.obs["maybe flag"] = pd.array(adata.obs["flag"], dtype="boolean")
    adata.obs["maybe text"] = pd.array(adata.obs["text"], dtype="string")
    for key in ("maybe whole", "maybe flag", "maybe text"):
        adata.obs.loc[missing, key] = pd.NA
    adata.obs.index.name = "barcode"
    adata.var["symbol"] = [f"S{i}" for i in range(genes)]
    adata.layers["twice"] = adata.X * 2
    return adata


def with_counts(counts):
    adata = make_cells()
    adata.X = counts(adata.X)
    return adata


def make_full_cells():
    """Return cells with something in every place that anndata has."""
    adata = make_cells()
    adata.raw = adata.copy()
    adata.obsm["X_pca"] = np.random.default_rng(0).normal(size=(60, 3))
    adata.obsm["frame"] = pd.DataFrame({"a": np.arange(60)}, index=adata.obs_names)
    adata.varm["loadings"] = np.ones((20, 3))
    adata.obsp["near"], adata.varp["joint"] = csr_matrix((60, 60)), csr_matrix((20, 20))
    adata.uns = {"colors": np.array(["red", "blue"]), "deep": {"a": 1, "b": [1.5, 2]}, "t": "x"}
    return adata


def written(path, adata=None, **options):
    adata = make_cells() if adata is None else adata
    with anndata.settings.override(allow_write_nullable_strings=True):
        if path.suffix == ".zarr":
            adata.write_zarr(path, convert_strings_to_categoricals=False, **options)
        else:
            adata.write_h5ad(path, convert_strings_to_categoricals=False, **options)
    return path


def random_runs(random, number):
    starts = random.integers(number, size=random.integers(1, 12))
    stops = np.minimum(starts + random.integers(number // 2 + 1, size=len(starts)), number)
    if len(starts) > 2:  # one that goes on where another ends
        starts[1], stops[1] = stops[0], number
    return starts, stops


def check_reads(found, dense, seed=0):
    """Compare random ranges of cells with numpy's slices."""
    assert (found.n_obs, found.n_vars) == dense.shape
    random = np.random.default_rng(seed)
    for _ in range(10):
        starts, stops = random_runs(random, found.n_obs)
        counts = found.read(starts, stops)
        counts.check_format(full_check=True)
        assert counts.dtype == np.float32
        expected = [dense[start:stop] for start, stop in zip(starts, stops, strict=True)]
        np.testing.assert_array_equal(counts.toarray(), np.concatenate(expected))


# --- counts ---


@pytest.mark.parametrize(
    ("suffix", "dtypes"), [(".h5ad", ["u1", "u2", "u4", "i4", "i8", "f4", "f8"]), (".zarr", ["u2"])]
)
def test_runs_of_every_dtype(tmp_path, suffix, dtypes):
    for dtype in dtypes:
        adata = AnnData(make_counts(40, 15).astype(dtype))
        with CellStore(written(tmp_path / f"{dtype}{suffix}", adata)) as found:
            check_reads(found, adata.X.toarray())
            assert found.nbytes == 8 * (adata.X.nnz + 41)


@pytest.mark.parametrize("seed", range(6))
def test_runs_of_random_files(tmp_path, seed):
    random = np.random.default_rng(seed)
    number, genes = random.integers(1, 200), random.integers(1, 80)
    adata = AnnData(make_counts(number, genes, seed))
    adata.layers["l"] = adata.X * 3
    if dense := random.random() < 0.4:
        adata.layers["l"] = adata.layers["l"].toarray()
    path = tmp_path / "c.h5ad"
    written(path, adata, compression=[None, "gzip", "lzf"][seed % 3])
    with CellStore(path, "l") as found:
        check_reads(found, adata.X.toarray() * 3, seed)
        assert not dense or found.nbytes >= 8 * adata.X.nnz


def test_no_runs_and_runs_beyond_the_cells(tmp_path):
    with CellStore(written(tmp_path / "c.h5ad")) as found:
        assert found.read([3, 5], [3, 5]).shape == found.read([], []).shape == (0, 20)
        for start, stop in ((-1, 3), (3, 2), (0, 61)):
            with pytest.raises(ValueError, match="must lie within the 60 cells"):
                found.read(start, stop)


def make_shards(tmp_path):
    """Return a folder of three files, genes of the second in another order, and their counts."""
    folder = tmp_path / "shards"
    folder.mkdir()
    parts = [make_cells(number, 20, seed) for seed, number in enumerate((30, 17, 25))]
    for seed, part in enumerate(parts):
        order = np.random.default_rng(1).permutation(20) if seed == 1 else slice(None)
        ordered = part[:, order].copy()
        ordered.X.sort_indices()  # so that in the first file's order they are not
        written(folder / f"{seed}.h5ad", ordered)
    return folder, parts


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path)


@pytest.mark.parametrize("most_open", [1, 64])
def test_shards(shards, most_open, monkeypatch):
    monkeypatch.setattr(store, "MOST_OPEN", most_open)
    folder, parts = shards
    with CellStore(folder) as found:
        assert [file.name for file in found.files] == ["0.h5ad", "1.h5ad", "2.h5ad"]
        check_reads(found, np.concatenate([part.X.toarray() for part in parts]))
        assert list(found.var_names) == list(parts[0].var_names)


def test_the_layer_that_is_preferred(shards):
    folder, parts = shards
    twice = np.concatenate([part.layers["twice"].toarray() for part in parts])
    with CellStore(folder, preferred="twice") as found:
        assert found.layer == "twice" and found.others == ["X"]
        check_reads(found, twice)
    with CellStore(folder, preferred="absent") as found:
        assert found.layer is None and found.others == ["layers/twice"]
        check_reads(found, twice / 2)
    del parts[1].layers["twice"]
    written(folder / "1.h5ad", parts[1])
    with pytest.raises(InputError, match=r"1.h5ad: --layer twice: must be one of the layers"):
        CellStore(folder, preferred="twice")
    del parts[0].layers["twice"]
    written(folder / "0.h5ad", parts[0])
    with CellStore(folder, preferred="twice") as found:  # though the last file has it
        assert found.layer is None
    with pytest.raises(InputError, match="--layer no: must be one of the layers, which are twice"):
        CellStore(folder / "2.h5ad", "no")


def test_two_threads_read(shards):
    folder, parts = shards
    dense = np.concatenate([part.X.toarray() for part in parts])
    faults = []
    with CellStore(folder) as found:

        def read():
            try:
                for seed in range(5):
                    check_reads(found, dense, seed)
            except BaseException as error:
                faults.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        for _ in range(20):
            found.obs(0, 72)
        thread.join()
    assert not faults


# --- obs ---


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_obs_is_anndata_s(tmp_path, suffix):
    adata = make_cells()
    with CellStore(written(tmp_path / f"c{suffix}", adata)) as found:
        for start, stop in ((0, 60), (7, 31)):
            pd.testing.assert_frame_equal(found.obs(start, stop), adata.obs.iloc[start:stop])
            assert list(found.obs_names(start, stop)) == list(adata.obs_names[start:stop])
        assert list(found.obs(0, 3, ["flag"])) == ["flag"]
        for key in adata.obs:
            column = pd.Series(found.column(key))
            assert column.isna().tolist() == adata.obs[key].isna().tolist()
            assert column.dropna().tolist() == adata.obs[key].dropna().tolist()
            assert set(column.cat.categories) == set(column.dropna())
        pd.testing.assert_frame_equal(found.var, adata.var)
        with pytest.raises(
            InputError, match=r"--batch-key b: must be a column of obs, which .* ba"
        ):
            found.column("b", "--batch-key")


def test_obs_of_shards(shards):
    folder, parts = shards
    frames = [part.obs.copy() for part in parts]
    frames[0]["whole"] = frames[0]["whole"] / 2  # numbers widen
    frames[1]["flag"] = "yes"  # and what is text somewhere is text
    frames[1]["maybe whole"] = frames[1]["whole"]
    del frames[2]["number"]
    for seed, frame in enumerate(frames):
        part = anndata.read_h5ad(folder / f"{seed}.h5ad")
        part.obs = frame
        written(folder / f"{seed}.h5ad", part)
    with CellStore(folder) as found:
        obs = found.obs(0, 72)
        pieces = [found.obs(start, min(start + 10, 72)) for start in range(0, 72, 10)]
        pd.testing.assert_frame_equal(pd.concat(pieces), obs)
        batch = found.column("batch")
        assert found.column("whole").categories.is_monotonic_increasing
    assert "number" not in obs
    assert list(batch.categories) == ["b0", "common", "b1", "b2"]
    joined = pd.concat([frame.drop(columns="number", errors="ignore") for frame in frames])
    assert obs["batch"].tolist() == list(batch) == joined["batch"].tolist()
    assert obs["flag"].tolist() == joined["flag"].astype(str).tolist()
    for key in ("stage", "text", "whole", "maybe flag", "maybe text", "maybe whole"):
        pd.testing.assert_series_equal(obs[key], joined[key], check_dtype=key != "maybe whole")


# --- faults ---


@pytest.mark.parametrize(
    ("suffix", "value", "fault"),
    [
        (".zarr", 0.5, "has 0.5"),
        (".h5ad", 0.5, "has 0.5"),
        (".h5ad", -1, "has -1"),
        (".h5ad", np.nan, "has nan"),
        (".h5ad", np.inf, "has inf"),
        (".h5ad", 2.0**31, r"has 2.14748e\+09 \(beyond 2,147,483,647\)"),
    ],
)
def test_values_that_are_no_counts(tmp_path, suffix, value, fault):
    adata = make_cells()
    cell = np.flatnonzero(np.diff(adata.X.indptr))[30]
    at = adata.X.indptr[cell]
    gene = adata.var_names[adata.X.indices[at]]
    adata.X = adata.X.astype(np.float64)
    adata.X.data[at] = value
    path = written(tmp_path / f"c{suffix}", adata)
    with CellStore(path) as found:
        found.read(0, cell)
        where = f" in cell 'cell 0-{cell}', gene '{gene}'; layer twice holds counts: --layer twice$"
        with pytest.raises(InputError, match=rf"^{path}: X must hold counts.*{fault}{where}"):
            found.read([0, 3, cell - 1], [3, 7, 60])
    with CellStore(path, "twice") as found:
        check_reads(found, adata.layers["twice"].toarray())


def test_a_value_in_a_shard_with_genes_in_another_order(shards):
    folder, _ = shards
    with h5py.File(folder / "1.h5ad", "r+") as file:
        file["X/data"][0] = 0.5
    first = anndata.read_h5ad(folder / "1.h5ad")
    cell = first.obs_names[np.flatnonzero(np.diff(first.X.indptr))[0]]
    where = rf"has 0.5 in cell '{cell}', gene '{first.var_names[first.X.indices[0]]}'"
    with CellStore(folder) as found, pytest.raises(InputError, match=where):
        found.read(0, 72)


def test_counts_in_raw_are_pointed_to(tmp_path):
    adata = make_cells()
    adata.raw = adata
    adata.X = adata.X.log1p()
    del adata.layers["twice"]
    message = "; raw/X holds counts: write adata.raw.to_adata"
    path = written(tmp_path / "c.h5ad", adata)
    with CellStore(path) as found, pytest.raises(InputError, match=message):
        found.read(0, 60)


def edited(path, edit, adata=None):
    """Return a file of cells in which something has been changed."""
    with h5py.File(written(path, adata), "r+") as file:
        edit(file)
    return path


def named(names, adata):
    adata.var_names = names
    return adata


# How to make each, and what is said of it when it is opened.
BAD_FILES = {
    "nothing.h5ad": (lambda p: None, "no such file or folder"),
    "empty.h5ad": (lambda p: p.write_bytes(b""), "is empty"),
    "other.h5ad": (lambda p: p.write_bytes(b"no" * 99), "is damaged or no .h5ad file"),
    "cells.csv": (lambda p: p.write_text("1,2"), "must be a .h5ad, .h5mu, .h5 or .loom file"),
    "folder": (lambda p: p.mkdir(), "a folder without matrix.mtx.* and .h5ad files"),
    "cut.h5ad": (lambda p: os.truncate(written(p), 50_000), "is damaged or no .h5ad"),
    "none.h5ad": (lambda p: written(p, make_cells()[:0].copy()), "has 0 cells and 20 genes"),
    "genes.h5ad": (
        lambda p: written(p, named(["same"] * 20, make_cells())),
        "gene names must be uni.* 19 occur",
    ),
    "shape.h5ad": (
        lambda p: edited(p, lambda file: file["X"].attrs.update(shape=[60, 19])),
        r"must be 60 x 20, but is \(60, 19\)",
    ),
    "ends.h5ad": (
        lambda p: edited(p, lambda file: file["X/indptr"].__setitem__(3, 10**6)),
        "X is no valid CSR matrix",
    ),
    "end.h5ad": (
        lambda p: edited(p, lambda file: file["X/indptr"].__setitem__(60, 10**6)),
        "X is no valid CSR matrix",
    ),
}
NOT_IN_PARTS = {
    "csc.h5ad": (lambda p: written(p, with_counts(csc_matrix)), r"\(CSC\).*vmm-fast prepare"),
    "old.h5ad": (
        lambda p: edited(p, lambda file: file["obs"].attrs.pop("encoding-type")),
        "older than 0.8; vmm-fast prep",
    ),
    "10x": (
        lambda p: (p.mkdir(), mmwrite(p / "matrix.mtx", make_cells().X)),
        "must be .h5ad, .zarr or a folder .*; vmm-fast prepare makes",
    ),
    "bool.h5ad": (
        lambda p: written(p, with_counts(lambda counts: counts.toarray() > 0)),
        "X must hold counts, holds bool",
    ),
    "bare.h5ad": (
        lambda p: written(p, AnnData(obs=make_cells().obs)),
        "hold counts, but is absent",
    ),
    "no obs.h5ad": (lambda p: edited(p, lambda file: file.pop("obs")), "in parts, it lacks obs"),
}


@pytest.mark.parametrize("name", [*BAD_FILES, *NOT_IN_PARTS])
def test_a_file_that_is_refused(tmp_path, name):
    make, message = (BAD_FILES | NOT_IN_PARTS)[name]
    make(tmp_path / name)
    with pytest.raises(InputError, match=rf"^{tmp_path / name}: .*{message}") as caught:
        CellStore(tmp_path / name)
    assert (type(caught.value) is CannotStream) == (name in NOT_IN_PARTS)


def test_a_shard_with_other_genes(shards):
    folder, parts = shards
    names = [f"other {i}" if i < 7 else f"gene {i}" for i in range(20)]
    written(folder / "1.h5ad", named(names, parts[1]))
    message = (
        "1.h5ad: must have the genes of 0.h5ad, lacks 7: gene 0, gene 1, gene 2, gene 3, gene 4 "
        "and 2 more; has others, 7: other 0, .*, other 4 and 2 more$"
    )
    with pytest.raises(InputError, match=message):
        CellStore(folder)
    written(folder / "1.h5ad", named(["gene 0", "gene 0", *parts[0].var_names[2:]], parts[1]))
    with pytest.raises(InputError, match=r"lacks 1: gene 1; has twice 1: gene 0$"):
        CellStore(folder)


def test_a_shard_without_a_column(shards):
    folder, parts = shards
    for number in (1, 2):
        del parts[number].obs["flag"]
        written(folder / f"{number}.h5ad", parts[number])
    message = "--batch-key flag: must be a column of obs in every file, but is none in 1.h5ad$"
    with CellStore(folder) as found, pytest.raises(InputError, match=message):
        found.column("flag", "--batch-key")


def test_columns_that_not_all_files_have_are_told(shards, tmp_path):
    folder, parts = shards
    with CellStore(folder) as found:
        assert found.notes == []
    parts[0].obs["first alone"] = 1
    for number in (1, 2):
        del parts[number].obs["flag"]
    parts[2].var["length"] = 1
    for number, part in enumerate(parts):
        written(folder / f"{number}.h5ad", part)
    of_var = "columns of var that 0.h5ad lacks are left out: length"
    note = (
        "columns of obs that not all files have are left out: first alone (1.h5ad has none), flag "
        "(1.h5ad has none)"
    )
    with CellStore(folder) as found:
        assert found.notes == [of_var, note]
        assert {"first alone", "flag"}.isdisjoint(found.obs(0, 5))
    assert prepare(folder, tmp_path / "out.h5ad").notes[:2] == [of_var, note]
    found, notes = cli.cells._on_disk(str(folder), None, None)
    found.close()
    assert notes == ["counts stay on disk, in several files", of_var, note]
    for number in range(30):
        parts[0].obs[f"of it alone {number}"] = 0
    written(folder / "0.h5ad", parts[0])
    with CellStore(folder) as found:
        assert found.notes[1].count(" has none)") == 20 and found.notes[1].endswith(" more")


def test_damaged_columns_are_left_out_before_anything_is_written(shards, tmp_path):
    folder, parts = shards
    with h5py.File(folder / "1.h5ad", "r+") as opened:
        opened["obs/stage/codes"][3] = 100
        opened["obs/maybe flag"].move("mask", "elsewhere")
        opened["obs/batch/categories"][1] = opened["obs/batch/categories"][0]
    with CellStore(folder) as found:
        assert [note.split(": ")[0] for note in found.notes] == [
            *(
                f"column {key!r} of obs cannot be read and is left out"
                for key in ("batch", "stage", "maybe flag")
            ),
            "columns of obs that not all files have are left out",
        ]
        kept = [key for key in parts[0].obs if key not in ("batch", "stage", "maybe flag")]
        assert list(found.dtypes) == kept
    prepare(folder, tmp_path / "out.h5ad")
    found = read_h5ad(tmp_path / "out.h5ad").obs
    assert list(found) == kept
    assert list(found["whole"]) == [value for part in parts for value in part.obs["whole"]]


def test_a_shard_that_cannot_be_read_in_parts_is_to_be_replaced(shards, tmp_path):
    folder, parts = shards
    parts[1].X = csc_matrix(parts[1].X)
    written(folder / "1.h5ad", parts[1])
    message = r"1.h5ad: .*\(CSC\).*; replace 1.h5ad by what vmm-fast prepare makes of it alone$"
    for read in (CellStore, lambda path: prepare(path, tmp_path / "out.h5ad")):
        with pytest.raises(CannotStream, match=message):
            read(folder)
    prepare(folder / "1.h5ad", tmp_path / "out.h5ad")
    (tmp_path / "out.h5ad").replace(folder / "1.h5ad")
    with CellStore(folder) as found:
        check_reads(found, np.concatenate([part.X.toarray() for part in parts]))


def test_a_file_that_changes_or_vanishes(shards):
    folder, _ = shards
    path = folder / "1.h5ad"
    with CellStore(folder) as found:
        found.read(0, 72)
        os.utime(path, ns=(1, 1))
        found.read(0, 30)  # of another shard
        for read in (found.read, found.obs, found.obs_names):
            with pytest.raises(InputError, match=r"1.h5ad: has changed since it was opened"):
                read(28, 40)
        path.unlink()
        with pytest.raises(InputError, match=r"1.h5ad: was removed since it was opened"):
            found.read(28, 40)


def test_a_zarr_folder_that_changes_or_vanishes(tmp_path):
    path = written(tmp_path / "c.zarr")
    with CellStore(path) as found:
        found.read(0, 60)
        os.utime(path / "X" / "data", ns=(1, 1))  # as when a chunk is replaced
        with pytest.raises(InputError, match=r"c.zarr: has changed since it was opened"):
            found.read(0, 1)
        shutil.rmtree(path)
        with pytest.raises(InputError, match=r"c.zarr: was removed since it was opened"):
            found.read(0, 1)


@pytest.mark.parametrize("version", [2, 3])
def test_dense_zarr_that_has_lost_chunks(tmp_path, version):
    adata = make_cells()
    adata.X = adata.X.toarray()
    with anndata.settings.override(zarr_write_format=version):
        path = written(tmp_path / "c.zarr", adata, chunks=(20, 20))
    chunk = path / "X" / zarr.open_group(path, mode="r")["X"].metadata.encode_chunk_key((1, 0))
    with CellStore(path) as found:
        check_reads(found, adata.X)
        assert found.notes == []
    chunk.unlink()
    note = "X lacks 1 of 3 chunks, which are taken for zeros"
    with CellStore(path) as found:
        assert found.notes == [note]
    assert reading.read_cells(str(path)).notes == [note]


def chunk_of(path, part, number):
    """Return the file of a chunk of a zarr array."""
    array = zarr.open_group(path, mode="r")[part]
    return path / part / array.metadata.encode_chunk_key((number % array.nchunks,))


def test_corrupt_chunks(tmp_path):
    path = written(tmp_path / "c.h5ad", compression="gzip")
    with h5py.File(path) as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    with open(path, "r+b") as file:
        file.seek(chunk.byte_offset + 8)
        file.write(b"\xa5" * (chunk.size - 8))
    with CellStore(path) as found:
        with pytest.raises(InputError, match=r"c.h5ad: is damaged .* and cannot be read"):
            found.read(0, 60)
        assert len(found.obs(0, 60)) == 60
    path = written(tmp_path / "c.zarr")
    chunk = chunk_of(path, "X/data", 0)
    chunk.write_bytes(chunk.read_bytes()[:20] + b"\xa5" * 20)
    with CellStore(path) as found, pytest.raises(InputError, match=r"c.zarr: is damaged"):
        found.read(0, 60)


@pytest.mark.parametrize("by_genes", [False, True])
def test_zarr_that_has_lost_a_chunk_is_not_read(tmp_path, by_genes):
    adata = make_cells(400)
    adata.X = (csc_matrix if by_genes else csr_matrix)(adata.X)
    path = written(tmp_path / "c.zarr", adata)
    assert read_cells(str(path)).adata.shape == (400, 20)
    for part in ("data", "indices", "indptr"):
        chunk = chunk_of(path, f"X/{part}", -1)
        content = chunk.read_bytes()
        chunk.unlink()
        for read in (read_cells,) if by_genes else (read_cells, CellStore):
            with pytest.raises(InputError, match=r"c.zarr: X (lacks chunks|is no valid CSR)"):
                read(str(path))
        chunk.write_bytes(content)


def test_chunks_of_zeros_that_zarr_leaves_out_are_not_lost(tmp_path):
    one_gene = AnnData(csr_matrix(np.arange(30)[:, None] % 3))
    no_counts = AnnData(csr_matrix((30, 4), dtype=np.float32))
    first_gene = AnnData(csr_matrix(np.eye(1, 4) * np.ones((30, 1))))
    for number, adata in enumerate((one_gene, no_counts, first_gene)):
        path = written(tmp_path / f"{number}.zarr", adata)
        with CellStore(path) as found:
            np.testing.assert_array_equal(found.read(0, 30).toarray(), adata.X.toarray())
        assert (read_cells(str(path)).adata.X != adata.X).nnz == 0


@pytest.mark.parametrize("value", [20, -1])
def test_a_gene_beyond_the_last(tmp_path, value):
    path = edited(tmp_path / "c.h5ad", lambda file: file["X/indices"].__setitem__(5, value))
    with CellStore(path) as found, pytest.raises(InputError, match="a gene beyond its 20"):
        found.read(0, 60)


@pytest.mark.parametrize("kind, where", [(csr_matrix, "gene beyond its 20"), (csc_matrix, "cell")])
def test_damaged_counts_in_memory(tmp_path, kind, where):
    for array, at, value, message in (
        ("X/indices", 100, 999, f"X is damaged, has a {where}"),
        ("X/indices", 100, -3, f"X is damaged, has a {where}"),
        ("X/indptr", 3, 0, "X is damaged, is no valid CS[RC] matrix"),
    ):
        with h5py.File(written(tmp_path / "c.h5ad", with_counts(kind)), "r+") as file:
            file[array][at] = value
        damaged = read_cells(str(tmp_path / "c.h5ad")).adata
        with pytest.raises(InputError, match=message):
            counts_of(damaged, None)
        with pytest.raises(InputError, match=r"X must hold counts, .* is absent$"):
            counts_of(AnnData(obs=damaged.obs, layers={"other": damaged.X}), None)
    matrix = make_cells().X
    matrix.indptr[-1] -= 1
    with pytest.raises(InputError, match="X is damaged, is no valid CSR matrix"):
        counts_of(AnnData(matrix), None)
