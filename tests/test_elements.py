"""Elements of an .h5ad or zarr that cannot be read are left out, with a note that names them."""

import time

import numpy as np
import pytest

pytest.importorskip("scvi", reason="scvi-tools is not installed")

import anndata
import h5py
import zarr
from test_reading import COUNTS, make_cells

from vmm_fast._errors import InputError
from vmm_fast.cells import elements, writing
from vmm_fast.cells.preparing import prepare
from vmm_fast.cells.reading import counts_of, read_cells
from vmm_fast.cells.store import CellStore

pytestmark = pytest.mark.filterwarnings("ignore")

LATIN = "é".encode("latin-1")


@pytest.fixture
def file(tmp_path):
    """Return an .h5ad file in which every element is valid."""
    adata = make_cells()
    adata.obs["batch"] = ["a", "b"] * 6
    adata.var["length"] = np.arange(9)
    adata.layers["twice"] = 2 * adata.X
    adata.obsm["X_pca"] = np.arange(24.0).reshape(12, 2)
    adata.uns["log1p"], adata.uns["n"] = {"base": None}, {"m": {"k": 3}}
    adata.raw = adata.copy()
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    return path


def put(group, key, value, encoding="array"):
    """Write an element with the attributes that anndata's format requires."""
    group.create_dataset(key, data=value)
    group[key].attrs.update({"encoding-type": encoding, "encoding-version": "0.2.0"})


def put_column(frame, key, value, **options):
    put(frame, key, value, **options)
    frame.attrs["column-order"] = np.array([*frame.attrs["column-order"], key], object)


def assert_all_else_is_read(adata):
    assert adata.X.toarray().tolist() == COUNTS.tolist()
    assert list(adata.obs["batch"]) == ["a", "b"] * 6 and list(adata.var["length"]) == [*range(9)]
    assert adata.layers["twice"].toarray().tolist() == (2 * COUNTS).tolist()
    assert adata.raw.X.toarray().tolist() == COUNTS.tolist()
    assert adata.obsm["X_pca"].tolist() == np.arange(24.0).reshape(12, 2).tolist()
    assert adata.uns["log1p"] == {"base": None} and adata.uns["n"]["m"] == {"k": 3}


def spoil(opened):
    """Write elements that cannot be read; return their names."""
    opened["uns/soft"] = h5py.SoftLink("/nowhere")
    opened["obsm/external"] = h5py.ExternalLink("no.h5", "/x")
    opened["uns"].create_dataset("latin", data=LATIN, dtype=h5py.string_dtype())
    opened["uns/latin"].attrs.update({"encoding-type": "string", "encoding-version": "0.2.0"})
    put(opened["layers"], "short", np.ones((5, 9)))
    opened["raw/varm/soft"] = h5py.SoftLink("/nowhere")
    opened["uns/loop"] = h5py.SoftLink("/uns")
    opened["zz"] = 1
    return ["uns/latin", "uns/loop", "uns/soft", "layers/short", "obsm/external", "raw/varm/soft"]


def test_what_cannot_be_read_is_left_out_by_name(file):
    assert read_cells(str(file)).notes == []
    with h5py.File(file, "r+") as opened:
        names = [*spoil(opened), "zz"]
    cells = read_cells(str(file))
    assert_all_else_is_read(cells.adata)
    explained, more = cells.notes[:-1], cells.notes[-1]
    assert [note.split(" cannot be read and is left out: ")[0] for note in explained] == names[:3]
    assert explained[1].endswith("it is a link to a group that is read already")
    assert more == f"4 more cannot be read either: {', '.join(names[3:])}"
    with CellStore(file) as store:
        assert store.notes == [] and {"layers/short", "obsm/X_pca"} <= set(store.others)
        assert store.read(0, 12).toarray().tolist() == COUNTS.tolist()


def test_columns_that_cannot_be_read(file):
    with h5py.File(file, "r+") as opened:
        put_column(opened["obs"], "plane", np.ones((12, 2)))
        put_column(opened["var"], "plane", np.ones((9, 2)))
        put_column(opened["obs"], "short", np.ones(5))
        put_column(opened["obs"], "bytes", np.array([f"é{i}".encode() for i in range(12)], "S"))
        opened["obs"].attrs["column-order"] = [*opened["obs"].attrs["column-order"], "absent"]
    cells = read_cells(str(file))
    assert_all_else_is_read(cells.adata)
    assert list(cells.adata.obs) == ["batch", "bytes"] and list(cells.adata.var) == ["length"]
    texts = [f"é{i}" for i in range(12)]
    assert list(cells.adata.obs["bytes"]) == texts
    assert cells.notes == [
        "column 'plane' of obs cannot be read and is left out: it must have 12 values, but has "
        "12 x 2",
        "column 'short' of obs cannot be read and is left out: it must have 12 values, but has 5",
        "column 'absent' of obs cannot be read and is left out: it is not there, or a link to "
        "nothing",
        "1 more cannot be read either: column 'plane' of var",
    ]
    with CellStore(file) as store:
        assert list(store.dtypes) == ["batch", "bytes"] and list(store.var) == ["length"]
        assert list(store.obs(0, 12)["bytes"]) == texts
        assert [note.split(" cannot")[0] for note in store.notes[:3]] == [
            "column 'plane' of obs",
            "column 'short' of obs",
            "column 'absent' of obs",
        ]


def test_columns_that_are_no_text_are_prepared_as_text_or_named(file, tmp_path):
    with h5py.File(file, "r+") as opened:
        put_column(opened["obs"], "complex", np.arange(12) * 1j)
    out = tmp_path / "out.h5ad"
    left_out = "column 'complex' of obs cannot be read and is left out: it is stored as array of "
    (note, kept) = prepare(file, out).notes
    assert note == f"{left_out}complex128" and kept.startswith("counts, obs and var alone are kept")
    adata = anndata.read_h5ad(file)
    adata.X = adata.X.tocsc()  # which is read into memory
    adata.write_h5ad(file)
    notes = []
    assert prepare(file, out, tell=notes.append).notes == notes
    assert notes[0] == "column 'complex' of obs is written as text"
    assert list(anndata.read_h5ad(out).obs["complex"]) == [str(i * 1j) for i in range(12)]


def test_notes_come_before_anything_is_written(file, tmp_path):
    seen = []
    out = tmp_path / "out.h5ad"
    prepare(file, out, tell=lambda note: seen.append((note, [*tmp_path.iterdir()] == [file])))
    assert seen == [
        ("counts, obs and var alone are kept, not raw, layers/twice, obsm/X_pca, uns", True)
    ]
    assert out.exists()


@pytest.mark.parametrize("element", ["X", "layers/twice"])
def test_counts_alone_are_needed(file, element):
    with h5py.File(file, "r+") as opened:
        del opened[element]["indices"]
    layer, other = ("twice", None) if element == "X" else (None, "twice")
    cells = read_cells(str(file), layer)
    expected = COUNTS if layer is None else 2 * COUNTS
    assert counts_of(cells.adata, layer).toarray().tolist() == expected.tolist()
    assert cells.notes[0].startswith(f"{element} cannot be read and is left out: ")
    with pytest.raises(InputError, match=r"cells.h5ad: is damaged .*indices"):
        read_cells(str(file), other)


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.parametrize("kind", ["csr", "csc"])
def test_half_precision_is_read_as_single(tmp_path, suffix, kind):
    adata = make_cells()
    adata.layers["half"] = adata.X.asformat(kind)
    path = tmp_path / f"a.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    if suffix == "h5ad":
        opened = h5py.File(path, "r+")
        write = opened["layers/half"].create_dataset
    else:
        opened = zarr.open_group(path, use_consolidated=False)
        write = opened["layers/half"].create_array
    values = opened["layers/half/data"][:].astype(np.float16)
    del opened["layers/half/data"]
    write("data", data=values)
    if suffix == "h5ad":
        opened.close()
    found = read_cells(str(path)).adata.layers["half"]
    assert found.dtype == np.float32 and found.toarray().tolist() == COUNTS.tolist()


def test_infinite_values_of_half_precision_are_no_counts(tmp_path):
    adata = make_cells()
    adata.X = adata.X.toarray().astype(np.float16)
    assert counts_of(adata, None, np.float32).tolist() == COUNTS.tolist()
    adata.X[2, 3] = np.inf
    with pytest.raises(InputError, match="X must hold counts, whole numbers from 0, has inf in"):
        counts_of(adata, None, np.float32)


def test_uns_that_is_no_group_is_left_out(file):
    with h5py.File(file, "r+") as opened:
        del opened["uns"]
        put(opened, "uns", np.arange(3))
    cells = read_cells(str(file))
    assert cells.adata.uns == {} and cells.adata.X.toarray().tolist() == COUNTS.tolist()
    why = "it must be a group, but is stored as ndarray"
    assert cells.notes == [f"uns cannot be read and is left out: {why}"]


def test_what_is_nested_too_deep_is_left_out(file):
    with h5py.File(file, "r+") as opened:
        group = opened["uns"]
        for _ in range(400):
            group = group.create_group("d")
            group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
            put(group, "value", 1, encoding="numeric-scalar")
    start = time.perf_counter()
    cells = read_cells(str(file))
    assert writing.notes_on_writing(cells.adata) == []
    assert time.perf_counter() - start < 10
    (note,) = cells.notes
    deepest = elements.DEPTH * "/d"
    assert note == f"uns{deepest} cannot be read and is left out: it is nested more than 32 deep"
    inner = cells.adata.uns
    for _ in range(elements.DEPTH - 1):
        inner = inner["d"]
        assert inner["value"] == 1
    assert list(inner) == ["value"]


def test_links_that_multiply_are_read_once(file):
    with h5py.File(file, "r+") as opened:
        group = opened["uns"]
        for _ in range(30):  # a billion paths
            inside = group.create_group("a")
            group["b"] = inside
            group = inside
    cells = read_cells(str(file))
    assert_all_else_is_read(cells.adata)
    assert cells.notes[-1].startswith("27 more cannot be read either: uns")
    assert cells.notes[0].endswith("it is a link to a group that is read already")


def test_chunks_that_a_layer_lacks(tmp_path):
    adata = make_cells()
    adata.layers["twice"] = 2 * adata.X
    adata.write_zarr(tmp_path / "a.zarr")
    (chunk,) = (
        path for path in (tmp_path / "a.zarr/layers/twice/data").rglob("*") if path.name == "0"
    )
    chunk.unlink()
    cells = read_cells(str(tmp_path / "a.zarr"))
    assert cells.adata.X.toarray().tolist() == COUNTS.tolist()
    assert cells.notes == ["layers/twice cannot be read and is left out: layer twice lacks chunks"]
    with pytest.raises(InputError, match="layer twice lacks chunks"):
        read_cells(str(tmp_path / "a.zarr"), "twice")


def test_bytes_that_are_no_text(file):
    with h5py.File(file, "r+") as opened:
        put_column(opened["obs"], "latin", np.array([LATIN] * 12, "S"))
        put(opened["uns"], "latin", np.array([LATIN], "S"))
    cells = read_cells(str(file))
    assert_all_else_is_read(cells.adata)
    assert cells.notes[0].startswith(
        "column 'latin' of obs cannot be read and is left out: 'utf-8'"
    )
    with CellStore(file) as store:
        assert list(store.obs(0, 12)["latin"]) == ["\ufffd"] * 12
