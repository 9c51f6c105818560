"""Files of 10x Genomics and loom: what is read is what they hold, by value."""

import gzip
import re

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("scvi", reason="scvi-tools is not installed")

import h5py
from scipy.io import mmwrite
from scipy.sparse import csr_matrix
from test_reading import BARCODES, COUNTS, make_cells, read

from vmm_fast._errors import InputError
from vmm_fast.cells import formats, selection
from vmm_fast.cells.preparing import prepare
from vmm_fast.cells.reading import layers_of, read_cells
from vmm_fast.cells.settings import Settings
from vmm_fast.cells.store import CannotStream, CellStore

pytestmark = pytest.mark.filterwarnings("ignore")

# Of Drosophila, of pandas' words for what is missing, and of what looks like a number.
NAMES = ["nan", "NA", "null", "None", "N/A", "", "True", "007", 'g"e']
TYPES = [*["Gene Expression"] * 5, "Antibody Capture", "Peaks", "Antibody Capture", "Custom"]
LEFT_OUT = (
    "4 features are left out, since genes alone are read: 2 Antibody Capture, 1 Peaks, 1 Custom"
)


# --- 10x ---


def write_mtx(folder, names=NAMES, columns=2, file="features.tsv", prefix="", gz=(), types=TYPES):
    """Write the three files of 10x; ``gz`` holds the initials of those to compress."""
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


@pytest.mark.parametrize(
    ("prefix", "gz", "file"),
    [
        ("", "", "genes.tsv"),
        ("GSM1_a_", "mfgb", "features.tsv"),
        ("", "m", "features.tsv"),
        ("GSM1_a_", "fb", "genes.tsv"),
    ],
)
def test_folders_of_cell_ranger_starsolo_and_geo(tmp_path, prefix, gz, file):
    folder = write_mtx(tmp_path / "a", file=file, prefix=prefix, gz=gz)
    (folder / f"._{prefix}matrix.mtx").write_bytes(b"of macOS")
    assert read(folder) == (COUNTS.tolist(), BARCODES, NAMES, [])
    ids = read_cells(str(folder)).adata.var["gene_ids"]
    assert list(ids) == [f"id{i}" for i in range(9)]


def test_genes_of_10x_that_are_named_in_other_ways(tmp_path):
    one = write_mtx(tmp_path / "one", columns=1)
    assert read(one)[2] == [f"id{i}" for i in range(9)]
    twice = ["nan", "nan", "", "", "x", "nan", "a", "b", "c"]
    expected = ["nan", "nan-1", "id2", "id3", "x", "nan-2", "a", "b", "c"]
    note = "2 gene names that occur again got a number: -1, -2, ..."
    folder = write_mtx(tmp_path / "twice", twice)
    for path in (folder, write_10x(tmp_path / "twice.h5", ["Gene Expression"] * 9, twice)):
        assert read(path) == (COUNTS.tolist(), BARCODES, expected, [note])
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


@pytest.mark.parametrize("kind", ["mtx", "h5", "loom", "h5ad", "zarr"])
def test_counts_are_exact_or_refused(tmp_path, kind):
    """Counts above 2^24 are read and prepared as they are, and not trained on in float32."""
    large = COUNTS.copy()
    large[:2, 0] = 2**24, 2**24 + 1
    large[5, 5] = 2**31 - 1
    path = tmp_path / f"a.{kind}"
    if kind == "mtx":
        write_mtx(path, [f"gene {i}" for i in range(9)])
        assert read_cells(str(path)).adata.X.dtype == np.float32
        mmwrite(path / "matrix.mtx", csr_matrix(large.T))
    elif kind == "h5":
        write_10x(path, ["Gene Expression"] * 9, [f"gene {i}" for i in range(9)], counts=large)
    elif kind == "loom":
        write_loom(path, names=[f"gene {i}" for i in range(9)], counts=large)
    else:
        adata = make_cells()
        adata.X = csr_matrix(large)
        getattr(adata, f"write_{kind}")(path)
    assert read(path)[0] == large.tolist()
    unset = dict.fromkeys(("batch_key", "layer", "labels_key", "genes"))
    settings = Settings(**unset, epochs=1, components=2)
    message = (
        "X must hold counts, whole numbers from 0, has 16,777,217 (of which float32 would make "
        "16,777,216) in cell 'AAAC-1', gene 'gene 0'"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        selection.training_cells(read_cells(str(path)).adata, settings)
    prepare(path, tmp_path / "out.h5ad")
    for stored in [tmp_path / "out.h5ad", *([path] if kind in ("h5ad", "zarr") else [])]:
        with CellStore(stored) as store:
            assert store.read(0, 12, np.int32).toarray().tolist() == large.tolist()
            assert store.read(0, 1).toarray().tolist() == large[:1].tolist()
            with pytest.raises(InputError, match=re.escape(message)):
                store.read(0, 12)


def test_counts_that_add_up_to_too_many_are_not_written(tmp_path):
    adata = make_cells()
    values, genes = np.array([2**31 - 1, 1]), np.array([4, 4])
    adata.X = csr_matrix((values, genes, [0, *[2] * 12]), (12, 9))
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match="at most 2,147,483,647, but add up to 2,147,483,648"):
        prepare(tmp_path / "a.h5ad", tmp_path / "out.h5ad")
    assert not (tmp_path / "out.h5ad").exists()


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


def test_the_content_says_whether_a_file_is_compressed(tmp_path):
    folder = write_mtx(tmp_path / "a", gz="b")
    for name in ("matrix.mtx", "features.tsv"):  # as browsers unpack downloads
        (folder / name).rename(folder / f"{name}.gz")
    (folder / "barcodes.tsv.gz").rename(folder / "barcodes.tsv")
    assert read(folder) == (COUNTS.tolist(), BARCODES, NAMES, [])
    (folder / "matrix.mtx.gz").write_bytes(gzip.compress((folder / "matrix.mtx.gz").read_bytes()))
    (folder / "matrix.mtx.gz").rename(folder / "matrix.mtx")
    assert read(folder) == (COUNTS.tolist(), BARCODES, NAMES, [])
    (folder / "barcodes.tsv").write_bytes("é".encode("latin-1"))
    message = "barcodes.tsv must be text in UTF-8, but is in another encoding: iconv"
    with pytest.raises(InputError, match=message):
        read_cells(str(folder))


def test_of_two_files_of_genes_the_newer_is_read_with_a_note(tmp_path):
    folder = write_mtx(tmp_path / "a")
    lines = (folder / "features.tsv").read_text().splitlines()
    (folder / "genes.tsv").write_text("\n".join(reversed(lines)) + "\n")
    note = "features.tsv names the genes; genes.tsv beside it is not read"
    assert read(folder) == (COUNTS.tolist(), BARCODES, NAMES, [note])


@pytest.mark.parametrize("name", ["features.tsv", "barcodes.tsv"])
def test_a_line_with_names_of_columns_is_no_gene_and_no_cell(tmp_path, name):
    folder = write_mtx(tmp_path / "a")
    (folder / name).write_text("id\n" + (folder / name).read_text())
    with pytest.raises(InputError, match="leave out a first line that names the columns"):
        read_cells(str(folder))


def test_features_of_10x_without_types_are_genes(tmp_path):
    path = write_10x(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        del file["matrix/features/feature_type"]
    assert read(path) == (COUNTS.tolist(), BARCODES, NAMES, [])


def write_10x(path, types=TYPES, names=NAMES, genomes=None, counts=COUNTS, dtype="i4"):
    """Write a .h5 file as Cell Ranger 3 does, or as 2 does where there are `genomes`."""
    with h5py.File(path, "w") as file:
        for name in genomes or ["matrix"]:
            group, matrix = file.create_group(name), csr_matrix(counts)
            group["barcodes"], group["shape"] = np.array(BARCODES, "S"), (9, 12)
            group["data"] = matrix.data.astype(dtype)
            group["indices"], group["indptr"] = matrix.indices, matrix.indptr
            ids = np.array([f"id{i}" for i in range(9)], "S")
            called = [f"{name}_{gene}" for gene in names] if len(genomes or ()) > 1 else names
            if genomes:
                group["genes"], group["gene_names"] = ids, np.array(called, "S")
            else:
                group["features/id"], group["features/name"] = ids, np.array(called, "S")
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
    expected = np.concatenate([COUNTS, COUNTS], 1).tolist()
    names = [f"{genome}_{name}" for genome in ("hg19", "mm10") for name in NAMES]
    notes = ["the genes of 2 genomes are read: hg19, mm10"]
    assert read(path) == (expected, BARCODES, names, notes)
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
    with h5py.File(path, "r+") as file:
        file["mm10/gene_names"][:2] = file["hg19/gene_names"][:2]
    read_again = read_cells(str(path))
    names[:2], names[9:11] = (
        [f"{genome}_{name}" for name in names[:2]] for genome in ("hg19", "mm10")
    )
    assert list(read_again.adata.var_names) == names
    several = "2 gene names are of several genomes, so the genome stands before the name"
    assert read_again.notes == [*notes, f"{several}: {names[0]!r}"]
    with h5py.File(path, "w") as file:
        file["barcodes"], file["umi"] = [b"a"], [1]
    with pytest.raises(InputError, match=r"must be a feature-barcode .* but holds barcodes, umi$"):
        read_cells(str(path))


def test_genomes_of_cell_ranger_3(tmp_path):
    genomes = ["hg19"] * 5 + ["mm10"] * 4
    names = [f"{genome}_{name}" for genome, name in zip(genomes, NAMES, strict=True)]
    path = write_10x(tmp_path / "a.h5", ["Gene Expression"] * 9, names)
    with h5py.File(path, "r+") as file:
        file["matrix/features/genome"] = np.array(genomes, "S")
    notes = ["the genes of 2 genomes are read: hg19, mm10"]
    assert read(path) == (COUNTS.tolist(), BARCODES, names, notes)
    assert list(read_cells(str(path)).adata.var["genome"]) == genomes
    with h5py.File(path, "r+") as file:
        file["matrix/features/name"][5:7] = file["matrix/features/name"][:2]
    found = read_cells(str(path))
    names[5:7] = [f"mm10_{name}" for name in names[:2]]
    names[:2] = [f"hg19_{name}" for name in names[:2]]
    assert list(found.adata.var_names) == names
    assert "2 gene names are of several genomes" in found.notes[1]


@pytest.mark.parametrize("kind", ["h5", "mtx"])
def test_types_of_features_that_10x_does_not_have(tmp_path, kind):
    def write(name, types, names=NAMES):
        if kind == "h5":
            return write_10x(tmp_path / f"{name}.h5", types, names)
        return write_mtx(tmp_path / name, names, 3, types=types)

    taken = "features are of a type that 10x does not have, and taken for genes"
    expected = COUNTS.tolist(), BARCODES, NAMES, [f"9 {taken}: 9 protein_coding"]
    assert read(write("coding", ["protein_coding"] * 9)) == expected
    types = [*["Gene Expression"] * 3, "lncRNA", "lncRNA", "", "Peaks", "Negative Control Probe"]
    counts, _, names, notes = read(write("more", [*types, "antigen capture"]))
    assert (counts, names) == (COUNTS[:, :6].tolist(), NAMES[:6])
    left = "3 features are left out, since genes alone are read: 1 Peaks, 1 Negative Control Probe"
    assert notes == [f"{left}, 1 antigen capture", f"3 {taken}: 2 lncRNA, 1 of no type"]
    (note,) = read(write("many", [f"type {i} {'x' * 200}" for i in range(9)]))[3]
    assert note.endswith(" and 4 more") and len(note) < 700
    # Names that are empty are no names, if there are several.
    found = read(write("empty", ["Gene Expression"] * 9, ["a", "", "b", "", *NAMES[4:8], "c"]))
    assert found[2] == ["a", "id1", "b", "id3", "N/A", "id5", "True", "007", "c"]


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


def write_loom(path, cells="CellID", genes="Gene", names=NAMES, layers=(), counts=COUNTS):
    text = h5py.string_dtype()
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix", data=counts.T)
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
    assert sorted(layers_of(adata)) == ["spliced", "unspliced"]
    assert adata.layers["spliced"].toarray().tolist() == (COUNTS // 2).tolist()
    assert list(adata.obs) == ["depth"] and list(adata.obs["depth"]) == COUNTS.sum(1).tolist()
    assert list(adata.var["Chromosome"]) == ["4"] * 9
    assert adata.obsm["plane"].shape == (12, 2)


def test_loom_is_what_loompy_writes(tmp_path):
    loompy = pytest.importorskip("loompy", reason="loompy is not installed")
    adata = make_cells()
    adata.obs["note"] = ["é<&" for _ in BARCODES]
    layers = {"": COUNTS.T, "twice": 2 * COUNTS.T}
    genes, cells = (
        {"var_names": frame.index.to_numpy(str)} | {key: frame[key].to_numpy(str) for key in frame}
        for frame in (adata.var, adata.obs)
    )
    cells["obs_names"] = cells.pop("var_names")
    loompy.create(str(tmp_path / "a.loom"), layers, genes, cells)
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


def test_parts_of_loom_that_cannot_be_read_are_left_out(tmp_path):
    path = write_loom(tmp_path / "a.loom", layers=["good"])
    with h5py.File(path, "r+") as file:
        file["layers/short"], file["layers/text"] = np.ones((9, 3)), np.full((9, 12), b"x")
        file["col_attrs/one"], file["row_attrs/none"] = 3, h5py.Empty("f4")
        file.create_group("row_attrs/group")
        file["row_attrs/length"] = np.arange(9)
    cells = read_cells(str(path))
    names = ["col_attrs/one", "row_attrs/group", "row_attrs/none"]
    assert [note.split(" cannot")[0] for note in cells.notes[:3]] == names
    assert cells.notes[3] == "2 more cannot be read either: layers/short, layers/text"
    assert read(path)[:3] == (COUNTS.tolist(), BARCODES, NAMES)
    assert list(layers_of(cells.adata)) == ["good"]
    assert list(cells.adata.var["length"]) == list(range(9))


@pytest.mark.parametrize("dtype", [">i4", ">f8", "f2", "u2"])
def test_loom_of_dtypes_that_scipy_lacks(tmp_path, dtype):
    path = write_loom(tmp_path / "a.loom", layers=["twice"])
    with h5py.File(path, "r+") as file:
        del file["matrix"], file["layers/twice"]
        file["matrix"], file["layers/twice"] = COUNTS.T.astype(dtype), 2 * COUNTS.T.astype(dtype)
    assert read(path) == (COUNTS.tolist(), BARCODES, NAMES, [])
    assert read_cells(str(path)).adata.layers["twice"].toarray().tolist() == (2 * COUNTS).tolist()
