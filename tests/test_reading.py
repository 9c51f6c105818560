"""Files of cells as programs and people write them: what is read is what they hold, by value."""

import fcntl
import gzip
import shutil

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("scvi", reason="scvi-tools is not installed")

import anndata
import h5py
import zarr
from anndata import AnnData
from scipy.io import mmwrite
from scipy.sparse import csc_matrix, csr_matrix

from vmm_fast.data import InputError
from vmm_fast.scvi import assignment, formats, frames, integration
from vmm_fast.scvi.names import find_names, notes_on_genes
from vmm_fast.scvi.preparing import prepare
from vmm_fast.scvi.reading import not_counts, read_cells
from vmm_fast.scvi.store import CannotStream, CellStore

pytestmark = pytest.mark.filterwarnings("ignore")

COUNTS = np.random.default_rng(0).poisson(2, (12, 9))
BARCODES = [f"AAAC-{i}" for i in range(12)]
# Of Drosophila, of pandas' words for what is missing, and of what looks like a number.
NAMES = ["nan", "NA", "null", "None", "N/A", "", "True", "007", 'g"e']
TYPES = [*["Gene Expression"] * 5, "Antibody Capture", "Peaks", "Antibody Capture", "Custom"]
LEFT_OUT = (
    "4 features are left out, since genes alone are read: 2 Antibody Capture, 1 Peaks, 1 Custom"
)


def make_cells():
    adata = AnnData(csr_matrix(COUNTS.astype(np.float32)))
    adata.obs_names, adata.var_names = BARCODES, [f"gene {i}" for i in range(9)]
    return adata


def read(path):
    """The counts, and names of cells and genes, and notes."""
    adata, notes = (cells := read_cells(str(path))).adata, cells.notes
    return adata.X.toarray().tolist(), list(adata.obs_names), list(adata.var_names), notes


# --- 10x ---


def write_mtx(folder, names=NAMES, columns=2, file="features.tsv", prefix="", gz=(), types=TYPES):
    """The three files; those whose names begin so are compressed."""
    folder.mkdir(exist_ok=True)
    mmwrite(folder / f"{prefix}matrix.mtx", csr_matrix(COUNTS.T))
    rows = [
        (f"id{i}", name, kind)[:columns]
        for i, (name, kind) in enumerate(zip(names, types, strict=True))
    ]
    tables = {file: map("\t".join, rows), "barcodes.tsv": BARCODES}
    for name, lines in tables.items():
        (folder / (prefix + name)).write_text("".join(f"{line}\n" for line in lines))
    for path in [path for path in folder.iterdir() if path.name.removeprefix(prefix)[0] in gz]:
        with gzip.open(f"{path}.gz", "wb") as packed:
            packed.write(path.read_bytes())
        path.unlink()
    return folder


@pytest.mark.parametrize("prefix", ["", "GSM1_a_"])
@pytest.mark.parametrize("gz", ["", "mfgb", "m", "fb"])
@pytest.mark.parametrize(("file", "columns"), [("features.tsv", 2), ("genes.tsv", 2)])
def test_folders_of_cell_ranger_starsolo_and_geo(tmp_path, prefix, gz, file, columns):
    folder = write_mtx(tmp_path / "a", columns=columns, file=file, prefix=prefix, gz=gz)
    (folder / f"._{prefix}matrix.mtx").write_bytes(b"of macOS")
    assert read(folder) == (COUNTS.tolist(), BARCODES, NAMES, [])
    ids = read_cells(str(folder)).adata.var["gene_ids"]
    assert list(ids) == [f"id{i}" for i in range(9)]


def test_genes_of_10x_that_are_named_in_other_ways(tmp_path):
    one = write_mtx(tmp_path / "one", columns=1)
    assert read(one)[2] == [f"id{i}" for i in range(9)]
    twice = ["nan", "nan", "", "", "x", "nan", "a", "b", "c"]
    expected = ["nan", "nan-1", "", "-1", "x", "nan-2", "a", "b", "c"]
    note = "3 gene names that occur again got a number: -1, -2, ..."
    found = read(write_mtx(tmp_path / "twice", twice))
    assert found == (COUNTS.tolist(), BARCODES, expected, [note])
    three = write_mtx(tmp_path / "three", columns=3, file="genes.tsv", types=["chr1"] * 9)
    assert read(three) == (COUNTS.tolist(), BARCODES, NAMES, [])
    cut = write_mtx(tmp_path / "cut")
    (cut / "features.tsv").write_text("id0\ta\nid1\n" + "".join(f"i{i}\tb{i}\n" for i in range(7)))
    assert read(cut)[2][:3] == ["a", "", "b0"]
    quoted = write_mtx(tmp_path / "quoted")  # by R
    (quoted / "features.tsv").write_text("".join(f'"id{i}"\t"g{i}"\r\n' for i in range(9)))
    (quoted / "barcodes.tsv").write_text("".join(f'"{name}"\n' for name in BARCODES) + "\n")
    assert read(quoted)[1:3] == (BARCODES, [f"g{i}" for i in range(9)])
    turned = write_mtx(tmp_path / "turned")  # by Python
    mmwrite(turned / "matrix.mtx", csr_matrix(COUNTS))
    assert read(turned) == (COUNTS.tolist(), BARCODES, NAMES, [])


def test_counts_of_mtx_are_exact(tmp_path):
    large = COUNTS.copy()
    large[0, 0] = 2**24 + 1
    folder = write_mtx(tmp_path / "a")
    assert read_cells(str(folder)).adata.X.dtype == np.float32
    mmwrite(folder / "matrix.mtx", csr_matrix(large.T))
    assert read(folder)[0] == large.tolist()


def test_folders_of_10x_that_cannot_be_read(tmp_path):
    folder = write_mtx(tmp_path / "a", prefix="b_")
    write_mtx(folder, prefix="a_")
    with pytest.raises(InputError, match=r"must hold one .* holds a_matrix.mtx, b_matrix.mtx; put"):
        read_cells(str(folder))
    for path in folder.glob("a_*"):
        path.rename(path.with_name(path.name[2:]))
    assert read(folder)[2] == NAMES  # the one without a prefix is meant
    with open(folder / "barcodes.tsv", "a") as file:
        file.write("more\n")
    message = "must be 9 x 13, as features.tsv and barcodes.tsv have lines, but is 9 x 12"
    with pytest.raises(InputError, match=message):
        read_cells(str(folder))
    (folder / "features.tsv").unlink()
    with pytest.raises(InputError, match=r"must hold features.tsv or genes.tsv beside matrix.mtx"):
        read_cells(str(folder))


def write_10x(path, types=TYPES, names=NAMES, genomes=None):
    """Write a .h5 file as Cell Ranger 3 does, or as 2 does where there are `genomes`."""
    with h5py.File(path, "w") as file:
        for name in genomes or ["matrix"]:
            group, counts = file.create_group(name), csr_matrix(COUNTS)
            group["barcodes"], group["shape"] = np.array(BARCODES, "S"), (9, 12)
            for part in ("data", "indices", "indptr"):
                group[part] = getattr(counts, part).astype("i4")
            ids = np.array([f"id{i}" for i in range(9)], "S")
            if genomes:
                group["genes"], group["gene_names"] = ids, np.array(names, "S")
            else:
                group["features/id"], group["features/name"] = ids, np.array(names, "S")
                group["features/feature_type"] = np.array(types, "S")
    return path


@pytest.mark.parametrize("kind", ["h5", "mtx"])
def test_features_that_are_no_genes_are_told(tmp_path, kind):
    def write(name, types):
        if kind == "h5":
            return write_10x(tmp_path / f"{name}.h5", types)
        return write_mtx(tmp_path / name, columns=3, types=types)

    path = write("some", TYPES)
    expected = COUNTS[:, :5].tolist(), BARCODES, NAMES[:5], [LEFT_OUT]
    assert read(path) == expected
    assert prepare(path, tmp_path / "out.h5ad").notes[0] == LEFT_OUT
    assert read(tmp_path / "out.h5ad")[:3] == expected[:3]
    (note,) = read(write("one", [*["Gene Expression"] * 8, "Peaks"]))[3]
    assert note == "1 feature is left out, since genes alone are read: 1 Peaks"
    assert read(write("all", ["Gene Expression"] * 9))[2:] == (NAMES, [])
    with pytest.raises(InputError, match="must hold features of Gene Expression, but holds 9 Peak"):
        read_cells(str(write("none", ["Peaks"] * 9)))


def test_genomes_of_cell_ranger_2(tmp_path):
    path = write_10x(tmp_path / "a.h5", genomes=["hg19"])
    assert read(path) == (COUNTS.tolist(), BARCODES, NAMES, [])
    write_10x(path, genomes=["hg19", "mm10"])
    notes = [
        "the genes of 2 genomes are read: hg19, mm10",
        "9 gene names that occur again got a number: -1, -2, ...",
    ]
    expected = np.concatenate([COUNTS, COUNTS], 1).tolist()
    again = [f"{name}-1" for name in NAMES]
    assert read(path) == (expected, BARCODES, [*NAMES, *again], notes)
    assert list(read_cells(str(path)).adata.var["genome"]) == ["hg19"] * 9 + ["mm10"] * 9
    with h5py.File(path, "r+") as file:  # other cells were found by the other genome
        file["mm10/barcodes"][:6] = [f"other-{i}".encode() for i in range(6)]
    adata = read_cells(str(path)).adata
    assert adata.shape == (18, 18)
    nothing = np.zeros((6, 9))
    for cells, hg19, mm10 in (
        (BARCODES[:6], COUNTS[:6], nothing),
        (BARCODES[6:], COUNTS[6:], COUNTS[6:]),
        ([f"other-{i}"[:7] for i in range(6)], nothing, COUNTS[:6]),
    ):
        assert adata[cells].X.toarray().tolist() == np.concatenate([hg19, mm10], 1).tolist()
    with h5py.File(path, "w") as file:
        file["barcodes"], file["umi"] = [b"a"], [1]
    with pytest.raises(InputError, match=r"must be a feature-barcode .* but holds barcodes, umi$"):
        read_cells(str(path))


def test_what_an_hdf5_file_holds_counts_not_its_suffix(tmp_path):
    path = write_10x(tmp_path / "a.h5ad", ["Gene Expression"] * 9)
    assert read(path) == (COUNTS.tolist(), BARCODES, NAMES, [])
    with pytest.raises(CannotStream):
        CellStore(path)
    path = tmp_path / "b.h5ad"
    make_cells().write_h5ad(path)
    path = path.rename(tmp_path / "b.h5")
    assert read(path)[:2] == (COUNTS.tolist(), BARCODES)
    with CellStore(path) as found:
        assert found.read(0, 12).toarray().tolist() == COUNTS.tolist()
    loom = write_loom(tmp_path / "c.loom").rename(tmp_path / "c.h5")
    assert read(loom)[0] == COUNTS.tolist()


# --- loom ---


def write_loom(path, cells="CellID", genes="Gene", names=NAMES, layers=()):
    text = h5py.string_dtype()
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix", data=COUNTS.T)
        for name in ("row_attrs", "col_attrs", "layers"):
            file.create_group(name)
        if cells:
            file.create_dataset(f"col_attrs/{cells}", data=BARCODES, dtype=text)
            file["col_attrs/depth"], file["col_attrs/plane"] = COUNTS.sum(1), np.ones((12, 2))
        if genes:
            file.create_dataset(f"row_attrs/{genes}", data=names, dtype=text)
            file["row_attrs/Chromosome"] = np.full(9, b"4")
        for name in layers:
            file[f"layers/{name}"] = COUNTS.T // 2
    return path


def test_loom_is_its_main_matrix(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "VALUES", 30)  # some genes at a time
    path = write_loom(tmp_path / "a.loom", layers=["spliced", "unspliced"])
    assert read(path) == (COUNTS.tolist(), BARCODES, NAMES, [])
    adata = read_cells(str(path)).adata
    assert sorted(adata.layers) == ["spliced", "unspliced"]
    assert adata.layers["spliced"].toarray().tolist() == (COUNTS // 2).tolist()
    assert list(adata.obs) == ["depth"] and list(adata.obs["depth"]) == COUNTS.sum(1).tolist()
    assert list(adata.var["Chromosome"]) == ["4"] * 9
    assert adata.obsm["plane"].shape == (12, 2)


def test_loom_is_what_loompy_writes(tmp_path):
    pytest.importorskip("loompy", reason="loompy is not installed")
    adata = make_cells()
    adata.obs["note"] = ["é<&" for _ in BARCODES]
    adata.layers["twice"] = adata.X * 2
    adata.write_loom(tmp_path / "a.loom")
    found = read_cells(str(tmp_path / "a.loom")).adata
    assert found.X.toarray().tolist() == COUNTS.tolist()
    assert found.layers["twice"].toarray().tolist() == (2 * COUNTS).tolist()
    pd.testing.assert_frame_equal(found.obs, adata.obs)
    assert found.var_names.equals(adata.var_names)


@pytest.mark.parametrize(
    ("cells", "genes"),
    [("barcode", "gene_name"), ("cell_id", "target_name"), ("obs_names", "var_names")],
)
def test_names_in_loom_that_others_call_otherwise(tmp_path, cells, genes):
    path = write_loom(tmp_path / "a.loom", cells, genes)
    notes = [
        f"names of cells are those of {cells}, there is no CellID",
        f"names of genes are those of {genes}, there is no Gene",
    ]
    expected = [] if cells == "obs_names" else notes
    assert read(path) == (COUNTS.tolist(), BARCODES, NAMES, expected)


def test_names_in_loom_that_occur_again_or_are_not_there(tmp_path):
    found = read(write_loom(tmp_path / "a.loom", names=["x", "x", *NAMES[2:]]))
    assert found[2] == ["x", "x-1", *NAMES[2:]]
    assert found[3] == ["1 gene name that occurs again got a number: -1, -2, ..."]
    numbers = list(map(str, range(12)))
    found = read(write_loom(tmp_path / "a.loom", genes=None))
    assert found == (COUNTS.tolist(), BARCODES, numbers[:9], [])
    with h5py.File(tmp_path / "a.loom", "r+") as file:
        del file["row_attrs"]
        file["row_attrs/Gene"] = np.arange(100, 109)
    assert read(tmp_path / "a.loom")[2] == [str(i) for i in range(100, 109)]
    found = read(write_loom(tmp_path / "a.loom", None, None))
    assert found == (COUNTS.tolist(), numbers, numbers[:9], [])


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
    settings = integration.Settings(
        batch_key=None, layer=None, labels_key=None, genes=None, epochs=1, components=2
    )
    for first, noted in ((0, True), (1, True), (2, False)):
        adata.var_names = [str(i) for i in range(first, first + 9)]
        _, notes = integration.training_cells(adata, settings)
        assert [note for note in notes if "matched by position" in note] == notes[:noted]
        assert notes_on_genes(adata.var_names) == notes[:noted]
    with CellStore(tmp_path / "a.h5ad") as store:
        _, _, notes = integration.training_cells_on_disk(store, settings)
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
        batches = pd.Index(known, dtype=object)
        saved = assignment.SavedModel(None, tmp_path, genes, None, "batch", batches)
        with CellStore(tmp_path / "a.h5ad") as store:
            found = assignment.match(store if on_disk else adata, saved)
        assert found.batches.tolist() == [0] * 4 + [1] * 4 + [assignment.OF_ALL_BATCHES] * 4
        assert "a batch that the model does not know" in found.notes[0]


def test_cells_with_numbered_genes_are_matched_by_position_with_a_note(tmp_path):
    adata = AnnData(csr_matrix(COUNTS.astype(np.float32)))
    genes = adata.var_names[[3, 1]]
    saved = assignment.SavedModel(None, tmp_path, genes, None, None, pd.Index([0]))
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
    settings = integration.Settings(
        batch_key=None, layer=None, labels_key=None, genes=None, epochs=1, components=2
    )
    with CellStore(tmp_path / "a.h5ad") as store:
        assert store.read(0, 1).nnz > 0
        if on_disk:
            _, _, notes = integration.training_cells_on_disk(store, settings)
        else:
            _, notes = integration.training_cells(adata, settings)
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


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.parametrize("kind", [csr_matrix, csc_matrix, np.asarray])
@pytest.mark.parametrize("dtype", [">f4", ">i4", ">f8"])
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
    ("value", "told"),
    [
        (np.float64(2 + 1e-9), "has 2.000000001"),
        (np.float64(1e6 + 0.5), "has 1000000.5"),
        (np.float32(0.1), "has 0.1"),
        (np.float64(1 / 3), "has 0.333333"),
        (np.float64(-1), "has -1"),
        (np.float64(2.0**31), "has 2.14748e+09 (beyond 2,147,483,647)"),
    ],
)
def test_values_that_are_no_counts_are_told_as_they_are(value, told):
    assert not_counts(np.array([1, value], value.dtype)) == (1, told)


def test_a_folder_of_files_in_place_of_one(tmp_path):
    make_cells().write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(
        InputError, match=r"must be one file, is a folder of .h5ad files: see CellS"
    ):
        read_cells(str(tmp_path))
    shutil.copy(tmp_path / "a.h5ad", tmp_path / "._a.h5ad")  # macOS's hold something else
    with CellStore(tmp_path) as store:
        assert [file.name for file in store.files] == ["a.h5ad"]
