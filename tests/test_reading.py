"""Files of cells as programs and people write them: what is read is what they hold, by value."""

import fcntl
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("scvi", reason="scvi-tools is not installed")

import anndata
import h5py
import zarr
from anndata import AnnData
from scipy.sparse import csc_matrix, csr_matrix

from vmm_fast._checks import not_counts
from vmm_fast._errors import InputError
from vmm_fast.cells import assignment, frames, selection
from vmm_fast.cells.names import find_names, notes_on_genes
from vmm_fast.cells.preparing import prepare
from vmm_fast.cells.reading import read_cells
from vmm_fast.cells.settings import Settings
from vmm_fast.cells.store import CellStore

pytestmark = pytest.mark.filterwarnings("ignore")
# A model that knows novelty.
CALIBRATED = SimpleNamespace(module=SimpleNamespace(novelty_cells=torch.zeros(3, 200)))

COUNTS = np.random.default_rng(0).poisson(2, (12, 9))
BARCODES = [f"AAAC-{i}" for i in range(12)]


def make_cells():
    adata = AnnData(csr_matrix(COUNTS.astype(np.float32)))
    adata.obs_names, adata.var_names = BARCODES, [f"gene {i}" for i in range(9)]
    return adata


def read(path):
    """Return the counts, the names of cells and of genes, and the notes."""
    adata, notes = (cells := read_cells(str(path))).adata, cells.notes
    return adata.X.toarray().tolist(), list(adata.obs_names), list(adata.var_names), notes


# --- names ---


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_names_of_genes_in_a_column(tmp_path, suffix):
    adata = make_cells()
    adata.var_names = list(map(str, range(9)))
    adata.var["chromosome"] = "4"
    adata.var["Gene_Symbols"], adata.var["gene_ids"] = ["a"] * 9, [f"id{i}" for i in range(9)]
    path = tmp_path / f"a.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    ids = [f"id{i}" for i in range(9)]  # symbols occur again
    note = "names of genes are those of gene_ids in var, whose own are numbers"
    assert read(path)[2:] == (ids, [note])
    with CellStore(path) as found:
        assert (list(found.var_names), found.notes) == (ids, [note])
        assert list(found.var.index) == ids
    del adata.var["gene_ids"]
    path = tmp_path / f"b.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    assert read(path)[2:] == (list(map(str, range(9))), [])


def test_shards_without_names_are_matched_by_those_that_a_column_has(tmp_path):
    for number, order in enumerate((np.arange(9), np.arange(9)[::-1])):
        adata = make_cells()[:, order].copy()
        adata.var["feature_name"] = list(adata.var_names)
        adata.var_names = list(map(str, range(9)))
        adata.write_h5ad(tmp_path / f"{number}.h5ad")
    with CellStore(tmp_path) as found:
        assert found.read(0, 24).toarray().tolist() == [*COUNTS.tolist(), *COUNTS.tolist()]
        assert len(found.notes) == 1


def test_genes_that_are_only_numbered_are_noted(tmp_path):
    adata = AnnData(csr_matrix(COUNTS.astype(np.float32)))
    adata.write_h5ad(tmp_path / "a.h5ad")
    settings = Settings(
        batch_key=None, layer=None, labels_key=None, genes=None, epochs=1, components=2
    )
    for first, noted in ((0, True), (1, True), (2, False)):
        adata.var_names = [str(i) for i in range(first, first + 9)]
        _, notes = selection.training_cells(adata, settings)
        assert [note for note in notes if "matched by position" in note] == notes[:noted]
        assert notes_on_genes(adata.var_names) == notes[:noted]
    with CellStore(tmp_path / "a.h5ad") as store:
        _, _, notes = selection.training_cells_on_disk(store, settings)
    assert "matched by position" in notes[0]


def test_columns_that_hold_names():
    table = pd.DataFrame({"name": ["a", "b"], "GeneID": ["c", "c"], "Symbol": [1, 2]})
    assert find_names(table, ("symbol", "geneid", "name")) == "GeneID"
    assert find_names(table, ("symbol", "geneid", "name"), unique=True) == "name"
    assert find_names(table.astype("category"), ("geneid",)) == "GeneID"
    assert find_names(table, ("gene",)) is None


@pytest.mark.parametrize("values", ["ints", "floats", "text", "bytes", "categories", "of ints"])
@pytest.mark.parametrize("frame", ["obs", "var"])
def test_an_index_of_every_kind(tmp_path, values, frame):
    number = {"obs": 12, "var": 9}[frame]
    whole = np.arange(100, 100 + number)
    text = np.array([f"x{i}" for i in whole[::-1]], "S")
    categories = pd.Categorical(whole[::-1] if values == "of ints" else text.astype(str))
    path = tmp_path / "a.h5ad"
    make_cells().write_h5ad(path)
    with h5py.File(path, "r+") as file:
        key = file[frame].attrs["_index"]
        del file[frame][key]
        if values in ("categories", "of ints"):
            anndata.io.write_elem(file[frame], key, categories)
            expected = list(map(str, categories))
        else:
            found = {"ints": whole, "floats": whole / 1, "bytes": text, "text": text}[values]
            kind = h5py.string_dtype() if values == "text" else found.dtype
            file[frame].create_dataset(key, data=found, dtype=kind)
            strings = values in ("bytes", "text")
            file[frame][key].attrs["encoding-type"] = "string-array" if strings else "array"
            file[frame][key].attrs["encoding-version"] = "0.2.0"
            expected = [x.decode() if strings else str(x) for x in found.tolist()]
    with CellStore(path) as store:
        found = store.obs_names(0, 12) if frame == "obs" else store.var_names
        assert list(found) == expected
        assert list(store.obs_names(3, 7)) == list(store.obs_names(0, 12))[3:7]
        assert store.n_obs == 12
    assert list(getattr(read_cells(str(path)).adata, f"{frame}_names")) == expected
    prepare(path, tmp_path / "out.h5ad")
    assert list(getattr(anndata.read_h5ad(tmp_path / "out.h5ad"), f"{frame}_names")) == expected


# --- batches ---


WHOLE = [0, 1, 2]


@pytest.mark.parametrize("known", [WHOLE, [0.0, 1.0, 2.0], ["0", "1", "2"], ["0.0", "1.0", "2.0"]])
@pytest.mark.parametrize("given", [WHOLE, [0.0, 1.0, 2.0], ["0", "1", "2"], ["0.0", "1.0", "2.0"]])
def test_batches_are_the_same_by_text_where_types_differ(known, given):
    found = frames.find(pd.Index([*given[::-1], given[0]]), pd.Index(known, dtype=object))
    both_text = isinstance(known[0], str) and isinstance(given[0], str)
    expected = [-1] * 4 if both_text and known != given else [2, 1, 0, 0]
    assert found.tolist() == expected


def test_batches_that_are_true_or_false_or_no_whole_numbers():
    def find(values, known):
        return frames.find(pd.Index(values), pd.Index(known, dtype=object)).tolist()

    assert find([True, False], ["False", "True"]) == [1, 0]
    assert find(["True", "x"], [False, True]) == [1, -1]
    assert find([True, False], [0, 1]) == [-1, -1]
    assert find([0.5, 3.0], ["0.5", "a"]) == [0, -1]
    assert find([2, 10], ["2.0", "2", "10.0"]) == [1, 2]
    assert find([2.0], ["2", "2.0"]) == [1]
    assert find([pd.Timestamp("2024-01-01")], ["2024-01-01 00:00:00"]) == [0]


@pytest.mark.parametrize("categories", [False, True])
def test_batches_of_several_files_are_the_same_by_text(tmp_path, categories):
    columns = (["2", "10"], [10, 2], [2.0, 10.0], ["2.0", "x"], pd.array([2, 7], "Int64"))
    for number, values in enumerate(columns):
        adata = make_cells()
        adata.obs["batch"] = (pd.array if number == 4 else np.array)(values)[np.arange(12) % 2]
        if categories or number == 1:
            adata.obs["batch"] = pd.Categorical(adata.obs["batch"])
        adata.write_h5ad(tmp_path / f"{number}.h5ad")
    expected = [*["2", "10"] * 6, *["10", "2"] * 6, *["2", "10"] * 6, *["2", "x"] * 6]
    expected += ["2", "7"] * 6
    with CellStore(tmp_path) as store:
        assert list(store.column("batch")) == expected
        assert set(store.column("batch").categories) == {"2", "10", "x", "7"}
        assert list(store.obs(0, 60)["batch"]) == expected
        assert list(store.obs(20, 26)["batch"]) == expected[20:26]


def test_texts_stay_as_they_are_where_all_are_texts(tmp_path):
    for number, values in enumerate((["2", "2.0"], pd.array(["2.0", None], "string"))):
        adata = make_cells()
        adata.obs["batch"] = (pd.array if number else np.array)(values)[np.arange(12) % 2]
        with anndata.settings.override(allow_write_nullable_strings=True):
            adata.write_h5ad(tmp_path / f"{number}.h5ad", convert_strings_to_categoricals=False)
    with CellStore(tmp_path) as store:
        assert list(store.column("batch").categories) == ["2", "2.0"]


@pytest.mark.parametrize("on_disk", [False, True])
def test_cells_find_the_batches_of_a_model_by_text(tmp_path, on_disk):
    adata = make_cells()
    genes = adata.var_names
    for values, known in (
        ([0, 1, 7], ["0", "1"]),
        (["0", "1", "x"], [0, 1]),
        ([0.0, 1, 5], [0, 1]),
    ):
        adata.obs["batch"] = np.repeat(values, 4)
        adata.write_h5ad(tmp_path / "a.h5ad")
        columns = {"batch": {"batch": np.array(known, dtype=object)}}
        saved = assignment.SavedModel(CALIBRATED, tmp_path, genes, None, columns)
        with CellStore(tmp_path / "a.h5ad") as store:
            found = assignment.match(store if on_disk else adata, saved)
        expected = [0] * 4 + [1] * 4 + [2] * 4  # the third is the first that is not known
        assert found.columns["batch"][:, 0].tolist() == expected
        assert "a batch that the model does not know" in found.notes[0]


def test_cells_with_numbered_genes_are_matched_by_position_with_a_note(tmp_path):
    adata = AnnData(csr_matrix(COUNTS.astype(np.float32)))
    genes = adata.var_names[[3, 1]]
    columns = {"batch": {"_scvi_batch": np.array([0])}}
    saved = assignment.SavedModel(CALIBRATED, tmp_path, genes, None, columns)
    found = assignment.match(adata, saved)
    assert found.notes == notes_on_genes(adata.var_names) and len(found.notes) == 1
    counts = found.counts.read(np.array([0]), np.array([12])).toarray()
    assert counts.tolist() == COUNTS[:, [3, 1]].tolist()
    with pytest.raises(InputError, match="must have the model's genes, 2 of the model's 2 genes"):
        assignment.match(make_cells(), saved)


# --- faults ---


@pytest.mark.parametrize("on_disk", [False, True])
def test_zeros_that_are_stored_are_no_counts_of_a_cell(tmp_path, on_disk):
    adata = make_cells()
    adata.X.data[: adata.X.indptr[1]] = 0
    adata.write_h5ad(tmp_path / "a.h5ad")
    settings = Settings(
        batch_key=None, layer=None, labels_key=None, genes=None, epochs=1, components=2
    )
    with CellStore(tmp_path / "a.h5ad") as store:
        assert store.read(0, 1).nnz > 0
        if on_disk:
            _, _, notes = selection.training_cells_on_disk(store, settings)
        else:
            _, notes = selection.training_cells(adata, settings)
    assert notes[0] == "1 cell has no counts at all"


def test_a_file_that_another_program_writes_is_not_called_damaged(tmp_path):
    path = tmp_path / "a.h5ad"
    make_cells().write_h5ad(path)
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as HDF5 does
        for read_it in (lambda: read_cells(str(path)), lambda: CellStore(path)):
            with pytest.raises(InputError, match=r"a.h5ad: must be closed .* but is locked; on"):
                read_it()
    assert read(path)[0] == COUNTS.tolist()


def test_columns_of_zarr_that_differ_by_case_alone(tmp_path):
    adata = make_cells()
    for key in ("batch", "other", "Batch"):
        adata.obs[key] = pd.Categorical([f"{key} {i % 2}" for i in range(12)])
    adata.write_zarr(tmp_path / "a.zarr")
    with CellStore(tmp_path / "a.zarr") as store:
        for obs in (read_cells(str(tmp_path / "a.zarr")).adata.obs, store.obs(0, 12)):
            assert list(obs["batch"])[:2] == ["batch 0", "batch 1"]
            assert list(obs["Batch"])[:2] == ["Batch 0", "Batch 1"]


@pytest.mark.parametrize(
    ("suffix", "kind", "dtype"),
    [  # all pairs of a kind with the others
        ("h5ad", csr_matrix, ">f4"),
        ("zarr", csr_matrix, ">i4"),
        ("h5ad", csc_matrix, ">f8"),
        ("zarr", csc_matrix, ">f4"),
        ("h5ad", np.asarray, ">i4"),
        ("zarr", np.asarray, ">f8"),
    ],
)
def test_counts_of_another_byte_order(tmp_path, suffix, kind, dtype):
    adata = make_cells()
    adata.X = adata.layers["twice"] = kind(COUNTS.astype(np.float32))
    adata.obs["batch"], adata.uns["t"] = pd.Categorical(["a", "b"] * 6), "x"
    path = tmp_path / f"a.{suffix}"
    with anndata.settings.override(zarr_write_format=2):
        getattr(adata, f"write_{suffix}")(path)
    hdf5 = suffix == "h5ad"
    file = h5py.File(path, "r+") if hdf5 else zarr.open_group(path, use_consolidated=False)
    for place in ("X", "layers/twice"):
        parts = [place] if kind is np.asarray else [f"{place}/data", f"{place}/indices"]
        for part, order in zip(parts, (dtype, ">i4"), strict=False):
            values, attributes = file[part][:].astype(order), dict(file[part].attrs)
            del file[part]
            if hdf5:
                file.create_dataset(part, data=values)
            else:
                file.create_array(part, data=values)
            file[part].attrs.update(attributes)
    if hdf5:
        file.close()
    found = read_cells(str(path)).adata
    for counts in (found.X, found.layers["twice"]):
        assert csr_matrix(counts, dtype=float).toarray().tolist() == COUNTS.tolist()
    assert list(found.obs["batch"]) == ["a", "b"] * 6 and found.uns["t"] == "x"
    assert list(found.obs_names) == BARCODES


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.float64(2 + 1e-9), "has 2.000000001"),
        (np.float64(1e6 + 0.5), "has 1000000.5"),
        (np.float32(0.1), "has 0.1"),
        (np.float64(1 / 3), "has 0.333333"),
        (np.float64(-1), "has -1"),
        (np.float64(2.0**31), "has 2.14748e+09 (beyond 2,147,483,647)"),
    ],
)
def test_values_that_are_no_counts_are_told_as_they_are(value, message):
    assert not_counts(np.array([1, value], value.dtype)) == (1, message)


def test_a_folder_of_files_in_place_of_one(tmp_path):
    make_cells().write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(
        InputError, match=r"must be one file, but is a folder of .h5ad files: see CellS"
    ):
        read_cells(str(tmp_path))
    shutil.copy(tmp_path / "a.h5ad", tmp_path / "._a.h5ad")  # macOS's hold something else
    with CellStore(tmp_path) as store:
        assert [file.name for file in store.files] == ["a.h5ad"]
