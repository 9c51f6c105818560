"""Cells and results that are written: prepared files, cells in memory, and clusters of a store."""

import os
import shutil
import signal
import tracemalloc

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("scvi", reason="scvi-tools is not installed")

import anndata
import h5py
from anndata import AnnData, read_h5ad, settings
from anndata.io import write_elem
from scipy.io import mmwrite
from scipy.sparse import csc_matrix, csr_matrix
from support import files_of_at_most
from test_store import (
    check_reads,
    make_cells,
    make_counts,
    make_full_cells,
    make_shards,
    with_counts,
    written,
)

from vmm_fast import cli
from vmm_fast._errors import InputError
from vmm_fast.cells import preparing, writing
from vmm_fast.cells.frames import rows_of
from vmm_fast.cells.preparing import prepare
from vmm_fast.cells.store import CellStore
from vmm_fast.cells.writing import write_adata, write_results

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path)


# --- prepare ---


def same_cells(path, adata, layer=None):
    """Check that anndata reads the prepared file as it was, in memory and backed."""
    expected = adata.X if layer is None else adata.layers[layer]
    for backed in (None, "r"):
        found = anndata.read_h5ad(path, backed=backed)
        counts = found.X[:] if backed else found.X
        np.testing.assert_array_equal(counts.toarray(), expected.toarray())
        pd.testing.assert_frame_equal(found.obs, adata.obs)
        pd.testing.assert_frame_equal(found.var, adata.var)
        if backed:
            np.testing.assert_array_equal(found.X[5:9].toarray(), expected[5:9].toarray())
            found.file.close()


@pytest.mark.parametrize(
    ("suffix", "layer"), [(".h5ad", None), (".h5ad", "twice"), (".zarr", "twice")]
)
def test_prepare(tmp_path, suffix, layer, monkeypatch):
    monkeypatch.setattr(preparing, "ROWS", 13)
    monkeypatch.setattr(writing, "CHUNK", 32)
    adata = make_cells()
    out = tmp_path / "out.h5ad"
    found = prepare(written(tmp_path / f"c{suffix}", adata), out, layer)
    assert (found.n_obs, found.n_vars, found.nbytes) == (60, 20, out.stat().st_size)
    same_cells(out, adata, layer)
    with h5py.File(out) as file:
        for name, dtype in (("data", np.uint16), ("indices", np.int16)):
            array = file["X"][name]
            assert (array.dtype, array.compression, array.chunks) == (dtype, "lzf", (32,))
            assert array.shuffle and array.fletcher32
    with CellStore(out) as again:
        check_reads(again, (adata.X if layer is None else adata.layers[layer]).toarray())


def test_prepare_by_way_of_memory(tmp_path):
    adata = make_cells()
    prepare(written(tmp_path / "csc.h5ad", with_counts(csc_matrix)), tmp_path / "a.h5ad")
    same_cells(tmp_path / "a.h5ad", adata)
    folder = tmp_path / "mtx"
    folder.mkdir()
    mmwrite(folder / "matrix.mtx", adata.X.T.astype(int))
    (folder / "barcodes.tsv").write_text("".join(f"{name}\n" for name in adata.obs_names))
    (folder / "genes.tsv").write_text(
        "".join(f"id\t{g}\n" for g in [*adata.var_names[1:], "gene 1"])
    )
    (note,) = prepare(folder, tmp_path / "b.h5ad").notes
    assert note == "1 gene name that occurs again got a number: -1, -2, ..."
    found = anndata.read_h5ad(tmp_path / "b.h5ad")
    np.testing.assert_array_equal(found.X.toarray(), adata.X.toarray())
    assert list(found.obs_names) == list(adata.obs_names)


def test_prepare_joins_shards(shards, tmp_path):
    folder, parts = shards
    prepare(folder, tmp_path / "out.h5ad")
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    expected = anndata.concat(parts)
    np.testing.assert_array_equal(found.X.toarray(), expected.X.toarray())
    indices = np.split(found.X.indices, found.X.indptr[1:-1])
    assert all((np.diff(genes) > 0).all() for genes in indices)
    assert list(found.obs_names) == list(expected.obs_names)
    for key in expected.obs:
        assert found.obs[key].astype(str).tolist() == expected.obs[key].astype(str).tolist()


@pytest.mark.parametrize("count", [3, 2**16])
def test_prepare_adds_what_is_stored_twice(tmp_path, count):
    counts = csr_matrix(np.array([[count, 0, 5], [0, 1, 0]], np.float32))
    path = written(tmp_path / "a.h5ad", AnnData(counts))
    with h5py.File(path, "r+") as file:
        for name, values in (
            ("data", np.float32([1, 5, count - 1, 1])),
            ("indices", np.int32([0, 2, 0, 1])),
            ("indptr", np.int32([0, 3, 4])),
        ):
            attributes = dict(file["X"][name].attrs)
            del file["X"][name]
            file["X"].create_dataset(name, data=values).attrs.update(attributes)
    prepare(path, tmp_path / "out.h5ad")
    found = anndata.read_h5ad(tmp_path / "out.h5ad").X
    assert found.data.tolist() == [count, 5, 1] and found.indices.tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("counts", "dtype"),
    [
        ([2**16 - 1], np.uint16),
        ([2**16], np.int32),
        ([2**24 + 1, 2**31 - 1], np.int32),  # no float32
    ],
)
def test_prepare_takes_32_bits_where_16_are_too_few(tmp_path, counts, dtype, monkeypatch):
    monkeypatch.setattr(preparing, "ROWS", 13)
    adata, out = make_cells(), tmp_path / "out.h5ad"
    adata.X = adata.X.astype(np.float64)
    adata.X.data[-len(counts) :] = counts
    prepare(written(tmp_path / "c.h5ad", adata), out)
    same_cells(out, adata)
    with h5py.File(out) as file:
        assert file["X/data"].dtype == dtype


def test_prepare_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "ROWS", 500)
    peaks = []
    for number in (2_000, 16_000):
        adata = AnnData(make_counts(number, 60))
        path = written(tmp_path / f"{number}.h5ad", adata)
        prepare(path, tmp_path / "out.h5ad")  # what is imported on the way is not counted
        tracemalloc.start()
        prepare(path, tmp_path / "out.h5ad")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert number < 16_000 or 8 * adata.X.nnz > 2 * peaks[1]
    assert peaks[1] - peaks[0] < 40 * 14_000  # bytes, of cells: where they start


def test_prepare_command(tmp_path, capsys):
    path, out, new = written(tmp_path / "c.h5ad"), tmp_path / "out.h5ad", tmp_path / "x.h5ad"
    before = path.read_bytes()

    def prepared(*arguments):
        return cli.main(["prepare", *map(str, arguments)])

    assert prepared(path, "--out", out, "--layer", "twice") == 0
    shown = capsys.readouterr()
    first, last = shown.out.splitlines()
    assert first == "note: counts, obs and var alone are kept, not X"
    assert last.startswith("60 cells x 20 genes, 0.1 MB in ") and shown.err == ""
    same_cells(out, make_cells(), "twice")
    assert path.read_bytes() == before
    made = out.read_bytes()
    for arguments, message in (
        ([path, "--out", out], "exists; choose another"),
        ([path, "--out", path, "--overwrite"], "is the input, which is never written"),
        ([path, "--out", tmp_path / "x.zarr"], "must end in .h5ad"),
        ([path, "--out", new, "--layer", "no"], "--layer no: must be one"),
        ([tmp_path / "no", "--out", new], "no such file"),
        ([tmp_path, "--out", new], "lies in the input"),
    ):
        assert prepared(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("vmm-fast: ") and message in error and error.count("\n") == 1
    assert out.read_bytes() == made and path.read_bytes() == before
    assert prepared(path, "--out", out, "--overwrite") == 0
    same_cells(out, make_cells())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.h5ad", "out.h5ad"]


@pytest.mark.parametrize("kind", ["h5ad", "zarr", "shards", "memory"])
def test_prepare_names_what_it_leaves_out(tmp_path, kind):
    bare, full = make_cells(), make_full_cells()
    del bare.layers["twice"], full.obsm["frame"]
    path = tmp_path / {"zarr": "c.zarr", "shards": "c"}.get(kind, "c.h5ad")
    if kind == "shards":
        path.mkdir()
        full.obsm.clear()
        second = bare.copy()
        second.layers["twice"], second.obsm["X_pca"] = second.X * 2, np.zeros((60, 2))
        written(path / "1.h5ad", full)
        written(path / "2.h5ad", second)
    elif kind == "memory":
        full.X, full.layers["twice"] = csc_matrix(full.X), csc_matrix(full.X * 2)
    if kind != "shards":
        written(path, full)

    def named(layer):
        (note,) = prepare(path, tmp_path / "out.h5ad", layer).notes
        begin, _, names = note.partition(", not ")
        assert begin == "counts, obs and var alone are kept"
        return set(names.split(", "))

    others = {"raw", "obsm/X_pca", "obsp/near", "varm/loadings", "varp/joint", "uns"}
    assert named(None) == {"layers/twice", *others}
    assert named("twice") == {"X", *others}
    assert prepare(written(tmp_path / "bare.h5ad", bare), tmp_path / "out.h5ad").notes == []
    for number in range(30):
        bare.layers[f"l{number}"] = bare.X
    (note,) = prepare(written(tmp_path / "bare.h5ad", bare), tmp_path / "out.h5ad").notes
    assert note.count(", ") == 21 and note.endswith(" more")


def test_prepare_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "ROWS", 13)
    adata = make_cells()
    adata.X.data[-1] = 0.5
    path, out = written(tmp_path / "c.h5ad", adata), tmp_path / "out.h5ad"
    out.write_bytes(b"old")
    with pytest.raises(InputError, match=r"has 0.5 in cell"):
        prepare(path, out)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 100))
    too_full = r"the disk is too full, about 0.\d MB more are needed, 0.0"
    with pytest.raises(InputError, match=too_full):
        prepare(path, out)
    assert out.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


@pytest.fixture
def interrupted(monkeypatch):
    """Press Ctrl-C while HDF5 writes."""
    write = writing._Disk.write

    def interrupted(self, data):
        os.kill(os.getpid(), signal.SIGINT)
        return write(self, data)

    monkeypatch.setattr(writing._Disk, "write", interrupted)


def prepare_cells(folder, adata):
    prepare(written(folder.parent / f"{folder.name}-c.h5ad", adata), folder / "out.h5ad")


def write_cells(folder, adata):
    write_adata(folder / "out.h5ad", adata)


def write_clusters(folder, adata):
    with CellStore(written(folder.parent / "c.h5ad", adata)) as cells:
        results = results_of(adata.n_obs)
        write_results(cells, folder, *results, cells.var_names, {})


WRITERS = {prepare_cells: "out.h5ad", write_cells: "out.h5ad", write_clusters: "cells.h5ad"}
every_writer = pytest.mark.parametrize("write", WRITERS)


@pytest.mark.parametrize("genes", [2**15, 2**15 + 1, 2**16 + 1])
def test_genes_are_found_again_however_many_there_are(tmp_path, genes):
    at = [0, 2**15 - 1, genes - 1]
    adata = AnnData(csr_matrix(([1.0, 2, 3], ([0, 1, 2], at)), (3, genes), dtype=np.float32))
    adata.var_names = [f"gene {i}" for i in range(genes)]
    prepare_cells(tmp_path, adata)
    with CellStore(tmp_path / "out.h5ad") as cells:
        assert (cells.read(0, 3) != adata.X).nnz == 0
    assert (anndata.read_h5ad(tmp_path / "out.h5ad").X != adata.X).nnz == 0


@every_writer
@pytest.mark.usefixtures("interrupted")
def test_writing_is_interrupted_between_parts(tmp_path, write):
    folder, handler = tmp_path / "out", signal.getsignal(signal.SIGINT)
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        write(folder, make_cells())
    assert list(folder.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is handler


@every_writer
@pytest.mark.parametrize("size", [500, 50_000, 90_000])
def test_a_disk_that_fills_up(tmp_path, size, write, monkeypatch):
    monkeypatch.setattr(preparing, "ROWS", 100)
    monkeypatch.setattr(writing, "ROWS", 100)
    folder, adata, real = tmp_path / "out", make_cells(1_000, 100), writing.write_atomically
    folder.mkdir()

    def limited(*args, **kwargs):  # not the input
        with files_of_at_most(size):
            real(*args, **kwargs)

    monkeypatch.setattr(writing, "write_atomically", limited)
    with pytest.raises(InputError) as caught:
        write(folder, adata)
    message = "cannot be written: File too large"
    assert str(caught.value) == f"{folder / WRITERS[write]}: {message}"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("bare", [False, True])
def test_cells_in_memory_are_written_as_anndata_does(tmp_path, bare):
    adata = make_full_cells()
    adata.obs["stage"] = ["a", "b", "c"] * 20  # becomes a category
    adata.layers["dense"] = adata.X.toarray()
    if bare:
        adata = AnnData(obs=pd.DataFrame(index=adata.obs_names))
    with settings.override(allow_write_nullable_strings=True):
        adata.copy().write_h5ad(tmp_path / "theirs.h5ad", compression="gzip")
    write_adata(tmp_path / "ours.h5ad", adata)
    ours, theirs = (read_h5ad(tmp_path / f"{name}.h5ad") for name in ("ours", "theirs"))
    assert (ours.X is None) == (ours.raw is None) == bare
    for name in ("obs", "var"):
        pd.testing.assert_frame_equal(getattr(ours, name), getattr(theirs, name))

    def stored(name):
        """Return everything in the file: its attributes, storage and values."""
        found = {}

        def take(key, item):
            found[key] = [(name, str(value)) for name, value in sorted(item.attrs.items())]
            if isinstance(item, h5py.Dataset):
                found[key] += [item.shape, item.dtype, item.compression, np.asarray(item).tolist()]

        with h5py.File(tmp_path / f"{name}.h5ad") as file:
            file.visititems(take)
            take("", file)
        return found

    assert stored("ours") == stored("theirs")


def unwritable_cells(path):
    """Return cells with twelve elements that anndata reads but does not write, and their notes."""
    adata = make_full_cells()
    adata.obs.index.name = "vmm_cluster"
    adata.var["index"] = 1
    adata.raw = adata
    adata.obsm["frame"] = pd.DataFrame({"a": range(60)}, index=adata.obs_names)
    adata.uns["nested"] = {"frame": pd.DataFrame({"a": [1, 2]}), "kept": 7}
    adata.write_h5ad(path)
    frames_in = ("obs", "var", "raw/var", "obsm/frame", "uns/nested/frame")
    with h5py.File(path, "a") as file:
        for name in frames_in:
            rows = rows_of(file[name])
            if file[name].attrs["_index"] == "_index":
                file[name].move("_index", "names")
                file[name].attrs["_index"] = "names"
            write_elem(file[name], "_index", np.arange(rows))
            columns = [*file[name].attrs["column-order"], "_index"]
            file[name].attrs["column-order"] = columns
        uns = file["uns"]
        uns["null"], uns["opaque"], uns["reference"] = (
            h5py.Empty("f"),
            np.void(b"ab"),
            file["X"].ref,
        )
        ragged = uns.create_dataset("nested/ragged", 2, h5py.vlen_dtype(np.int32))
        for element in (uns["null"], uns["opaque"], uns["reference"], ragged):
            element.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    found = read_h5ad(path)
    found.obs["when"] = pd.date_range("2020-01-01", periods=60)
    found.obs["mixed"] = pd.Series([1, "a"] * 30, dtype=object).to_numpy()
    new = ("index", "index-1", "index-1", "index", "index")
    notes = [
        *(
            f"column '_index' of {name} is written as '{to}'"
            for name, to in zip(frames_in, new, strict=True)
        ),
        "the index of obs loses its name, 'vmm_cluster', which is a column's",
        *(f"column '{key}' of obs is written as text" for key in ("when", "mixed")),
        *(
            f"uns/{name} cannot be written to .h5ad and is left out"
            for name in ("null", "opaque", "reference", "nested/ragged")
        ),
    ]
    return found, notes


def test_what_anndata_reads_but_does_not_write_costs_nothing_else(tmp_path):
    adata, notes = unwritable_cells(tmp_path / "cells.h5ad")
    before = AnnData(adata.X, adata.obs.copy(), adata.var.copy())
    of_raw = list(adata.raw.var["_index"])
    assert sorted(writing.notes_on_writing(adata)) == sorted(notes)
    assert sorted(write_adata(tmp_path / "out.h5ad", adata)) == sorted(notes)
    found = read_h5ad(tmp_path / "out.h5ad")
    assert (found.X != before.X).nnz == (found.raw.X != before.X).nnz == 0
    for name in ("obs", "var"):
        ours, theirs = getattr(found, name), getattr(before, name)
        assert list(ours.index) == list(theirs.index)
        new = {"_index": "index-1" if "index" in theirs else "index"}
        theirs = theirs.rename(columns=new)
        for key in theirs:
            assert list(ours[key].map(str)) == list(theirs[key].map(str)), key
    assert list(found.raw.var["index-1"]) == of_raw
    assert list(found.obsm["frame"]["index"]) == list(range(60))
    assert list(found.uns["nested"]["frame"]["index"]) == [0, 1]
    assert found.uns["nested"]["kept"] == 7
    assert set(found.uns) == {"colors", "deep", "t", "nested"}
    assert writing.notes_on_writing(found) == []


@pytest.mark.parametrize("write", [prepare_cells, write_clusters])
def test_columns_that_anndata_does_not_write_from_a_store(tmp_path, write):
    adata = make_cells()
    written(tmp_path / "out-c.h5ad", adata)
    adata.obs["x"], adata.var["x"] = np.arange(adata.n_obs), np.arange(adata.n_vars)
    path = written(tmp_path / "c.h5ad", adata)
    with h5py.File(path, "a") as file:
        for name in ("obs", "var"):
            index = file[name].attrs["_index"]
            file[name].move(index, "names")
            file[name].attrs["_index"] = "names"
            file[name].move("x", "_index")
            columns = [c if c != "x" else "_index" for c in file[name].attrs["column-order"]]
            file[name].attrs["column-order"] = columns
    folder = tmp_path / "out"
    folder.mkdir()
    if write is prepare_cells:
        notes = prepare(path, folder / "out.h5ad").notes
    else:
        with CellStore(path) as cells:
            notes = writing.notes_on_writing(cells)
            write_results(cells, folder, *results_of(adata.n_obs), cells.var_names, {})
    renamed = [f"column '_index' of {name} is written as 'index'" for name in ("obs", "var")]
    assert [note for note in notes if "_index" in note] == renamed
    found = read_h5ad(folder / WRITERS[write])
    for frame, before in ((found.obs, adata.obs), (found.var, adata.var)):
        assert list(frame.index) == list(before.index)
        assert list(frame["index"]) == list(before["x"])


@pytest.mark.parametrize("name", ["layers/other", "raw/X", "obsp/near"])
def test_a_damaged_matrix_that_is_not_trained_on_is_left_out(tmp_path, name):
    adata = make_full_cells()
    adata.layers["other"], adata.obsp["near"] = adata.X.copy(), csr_matrix(np.eye(60))
    path = written(tmp_path / "c.h5ad", adata)
    with h5py.File(path, "a") as file:
        file[name]["indptr"][1] = 10**9
    found = read_h5ad(path)
    note = f"{name} cannot be written to .h5ad and is left out"
    assert note in writing.notes_on_writing(found)
    assert note in write_adata(tmp_path / "out.h5ad", found)
    with h5py.File(tmp_path / "out.h5ad") as file:
        assert name not in file and (file["X/data"][:] == adata.X.data).all()


# --- results ---


def results_of(number):
    random = np.random.default_rng(0)
    z = random.normal(size=(number, 7)).astype(np.float32)
    labels = random.choice([0, 2, 10], number)
    probability, entropy = random.random((2, number)).astype(np.float32)
    components = 2 * labels + random.choice(2, number)
    return z, writing.cluster_columns(labels, probability, entropy, components)


def test_results(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "ROWS", 11)
    folder, parts = shards
    for part, name in zip(parts, sorted(folder.iterdir()), strict=True):
        part.obs["vmm_cluster"] = "of an earlier run"
        written(name, part)
    z, clusters = results_of(72)
    on_disk = np.memmap(tmp_path / "z", np.float32, "w+", shape=z.shape)
    on_disk[:] = z
    with CellStore(folder) as cells:
        before = cells.obs(0, 72).drop(columns="vmm_cluster")
        uns = {"vmm": {"genes": 4, "versions": {"torch": "2"}}, "linkage": np.eye(2, 4)}
        write_results(cells, tmp_path, on_disk, clusters, cells.var_names[3:7], uns)
    found = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert found.X is None and found.uns["vmm"] == uns["vmm"]
    np.testing.assert_array_equal(found.uns["linkage"], uns["linkage"])
    np.testing.assert_array_equal(found.obsm["X_vmm"], z)
    assert list(found.obs["vmm_cluster"].cat.categories) == ["0", "2", "10"]
    pd.testing.assert_frame_equal(found.obs[clusters.columns].reset_index(drop=True), clusters)
    pd.testing.assert_frame_equal(found.obs.drop(columns=list(writing.COLUMNS)), before)
    assert list(found.var_names[found.var["vmm_gene"]]) == [f"gene {i}" for i in range(3, 7)]
    rows = pd.read_csv(tmp_path / "clusters.csv")
    assert list(rows["cell"]) == list(found.obs_names)
    for name, column in zip(rows.columns[1:], clusters, strict=True):
        np.testing.assert_allclose(rows[name], clusters[column].astype(float), atol=1e-6)


def test_results_of_a_file_that_changes_leave_the_old_ones(tmp_path):
    path, folder = written(tmp_path / "c.h5ad"), tmp_path / "out"
    folder.mkdir()
    (folder / "cells.h5ad").write_bytes(b"old")
    with CellStore(path) as cells:
        os.utime(path, ns=(1, 1))
        with pytest.raises(InputError, match=r"c.h5ad: has changed since it was opened"):
            write_results(cells, folder, *results_of(60), cells.var_names, {})
    assert [p.read_bytes() for p in folder.iterdir()] == [b"old"]
