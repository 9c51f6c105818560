"""Files of a person's own are read value by value: headers, row numbers, labels, damage."""

import zipfile

import numpy as np
import pytest

from vmm_fast.arrays import data, reading_csv
from vmm_fast.arrays.data import InputError, read

X = np.round(np.random.default_rng(0).normal(size=(12, 3)), 3)


def rows(x=X, before=lambda i: "", after=lambda i: "", separator=","):
    return "".join(
        before(i) + separator.join(map(str, row)) + after(i) + "\n" for i, row in enumerate(x)
    )


def table(folder, text, encoding="utf-8"):
    (folder / "x.csv").write_text(text, encoding=encoding, newline="")
    return read(folder / "x.csv")


def refusal(path):
    with pytest.raises(InputError) as error:
        read(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((1, 1), "1 row of 1 column"),
        ((2000, 3), "2,000 rows of 3 columns"),
        ((1, 8, 8), "1 image of 8 x 8 values"),
        ((20, 3, 8, 8), "20 images of 3 x 8 x 8 values"),
    ],
)
def test_one_is_no_plural(shape, text):
    assert data.make_data(np.ones(shape)).describe() == text
    assert data.counted(1, "batch", "batches") == "1 batch"
    assert data.counted(0, "batch", "batches") == "0 batches"


# --- the first line ---


@pytest.mark.parametrize(
    "first, reason",
    [
        ('"400","401.5","403"', "its numbers are quoted"),
        ('"9","8","7"', "its numbers are quoted"),
        ("1,2,3", "count the columns from 1"),
        ("0,1,2", "count the columns from 0"),
        ("400,401.5,NA", "it holds 'NA'"),
        ("\n\n1,2,3", "count the columns from 1"),
    ],
)
def test_a_header_of_numbers_is_no_row(tmp_path, first, reason):
    found = table(tmp_path, f"{first}\n{rows()}")
    assert np.array_equal(found.values, X)
    (note,) = found.notes
    assert note.startswith("the first line is taken for a header: ") and reason in note


@pytest.mark.parametrize("first", [",400,401.5,403", '"","400","401.5","403"', ",0,1,2", ",1,2,3"])
def test_an_empty_first_cell_makes_a_header(tmp_path, first):
    """Check that the column of row names that pandas and R write is left out."""
    for before in (lambda i: f"{i},", lambda i: f'"row {i}",'):
        found = table(tmp_path, f"{first}\n{rows(before=before)}")
        assert np.array_equal(found.values, X) and len(found.notes) == 2


def test_quoted_numbers_in_every_line_are_rows(tmp_path):
    text = "".join(",".join(f'"{v}"' for v in row) + "\n" for row in X)
    assert np.array_equal(table(tmp_path, text).values, X)
    assert np.array_equal(table(tmp_path, f'"4"\n{rows(X[:, :1])}').values, X[:, :1])


def test_other_first_lines_are_rows(tmp_path):
    """Those that rise might be a header: the reader is told."""
    found = table(tmp_path, f"400,401.5,403\n{rows()}")
    assert np.array_equal(found.values, [[400, 401.5, 403], *X])
    risen = "the numbers of the first line rise, but it is taken for a row"
    cure = "if it is a header, quote its numbers"
    assert found.notes[0] == f"{risen}; {cure}"
    found = table(tmp_path, "400,401\n3,1\n")
    assert found.values.tolist() == [[400, 401], [3, 1]] and found.notes == [f"{risen}; {cure}"]
    assert table(tmp_path, "400,500\n3,1\n").notes == []  # as in half of all tables
    found = table(tmp_path, f"9,8,7\n{rows()}")
    assert found.values[0].tolist() == [9, 8, 7]
    assert found.notes[0].startswith("the numbers of the first line fall, but it is taken for a")


@pytest.mark.parametrize(
    ("text", "whole", "decimals"),
    [
        ("1,2\n4{},3\n5,9\n", [[1, 2], [4, 3], [5, 9]], [[4.5, 3], [5, 9]]),
        ("0\n4{}\n5\n", [[0], [4], [5]], [[4.5], [5]]),
        ("1\n4{}\n5\n", [[1], [4], [5]], [[4.5], [5]]),
    ],
)
def test_few_numbers_that_count_are_a_row_above_whole_numbers_alone(
    tmp_path, text, whole, decimals
):
    found = table(tmp_path, text.format(""))
    assert found.values.tolist() == whole
    assert found.notes[0].startswith("the first line may count the columns, but it is taken for a")
    found = table(tmp_path, text.format(".5"))
    assert found.values.tolist() == decimals
    assert found.notes[0].startswith("the first line is taken for a header: its numbers count")


@pytest.mark.parametrize("line", ["sep=;", '"sep=;"', "sep=;\r"])
def test_the_line_in_which_excel_says_what_separates_cells(tmp_path, line):
    found = table(tmp_path, f"{line}\na;b\n1.5;2\n3;4\n")
    assert found.values.tolist() == [[1.5, 2], [3, 4]]
    assert found.notes == ["the first line says what separates the cells, ';'"]
    (tmp_path / "x.csv").write_text(f"{line}\na;b\n1.5;2\nx;4\n")
    assert "line 4, column 'a' must be a number, but is 'x'" in refusal(tmp_path / "x.csv")


# --- numbers ---


@pytest.mark.parametrize(
    "cell", ["1_2", "1_0.5", "1e1_0", "\u0661", "\uff12", "\u22121", "1\u00a0000", "0x10", "-"]
)
def test_only_plain_numbers_are_numbers(tmp_path, cell):
    """Python takes some of these for numbers, but other readers of tables do not."""
    (tmp_path / "x.csv").write_text(f"a,b\n1,2\n3,{cell}\n", encoding="utf-8")
    assert f"line 3, column 'b' must be a number, but is {cell!r}" in refusal(tmp_path / "x.csv")


def test_numbers_as_they_are_written(tmp_path):
    found = table(tmp_path, "a,b\n 1e3 ,-.5\n+2.,1E-2\n\n   \n7,0008\n")
    assert found.values.tolist() == [[1000, -0.5], [2, 0.01], [7, 8]]


def test_commas_in_numbers_are_told(tmp_path):
    for text in ('a,b\n"6,990",1\n', "a;b\n6,99;1\n", "6,99;1,5\n7,5;2,5\n", "a\n6,99\n7,5\n"):
        (tmp_path / "x.csv").write_text(text)
        assert "write numbers as 1234.5, without commas" in refusal(tmp_path / "x.csv")


def test_two_whole_numbers_a_line_may_be_one_with_a_decimal_comma(tmp_path):
    found = table(tmp_path, "6,99\n7,50\n8,05\n")
    assert found.values.tolist() == [[6, 99], [7, 50], [8, 5]]
    assert found.notes == [
        "every line is two whole numbers, the second of 2 digits: they are two columns; if the "
        "comma is a decimal one, write numbers as 1234.5, without commas"
    ]
    for text in ("6,99\n7,5\n", "6,9\n7,5\n", "6.5,99\n7,50\n", "6,99,1\n7,50,1\n"):
        assert table(tmp_path, text).notes == []


def test_whole_numbers_that_float64_rounds_are_refused(tmp_path):
    big = 2**60 + np.arange(20).reshape(10, 2)
    for dtype in ("i8", "u8"):
        np.save(tmp_path / "x.npy", big.astype(dtype))
        error = refusal(tmp_path / "x.npy")
        assert "the array, row 0, column 0 (counted from 0), must hold whole numbers up to" in error
        assert "but has 1152921504606846976; subtract the smallest from its column" in error
    np.save(tmp_path / "x.npy", -big)
    assert "but has -1152921504606846976" in refusal(tmp_path / "x.npy")
    (tmp_path / "x.csv").write_text(f"a,b\n1,2\n3,{2**60 + 1}\n")
    assert "line 3, column 'b', must hold whole numbers" in refusal(tmp_path / "x.csv")
    for cell in (f"{2**53 + 1}", f"-{2**53 + 1}", f" {2**53 + 1}.00"):  # float64 has 2^53
        (tmp_path / "x.csv").write_text(f"a,b\n1,2\n3,{cell}\n")
        assert f"but has {cell.strip()}; subtract" in refusal(tmp_path / "x.csv")
    assert table(tmp_path, f"a,b\n1,{2**53}\n2,-{2**53}\n").values[:, 1].tolist() == [
        2**53,
        -(2**53),
    ]
    np.save(tmp_path / "x.npy", big - 2**60 + 2**53 - 19)
    assert read(tmp_path / "x.npy").values[-1].long().tolist() == [2**53 - 1, 2**53]
    assert table(tmp_path, "a,b\n1e20,2.5e300\n1,2\n").values[0].tolist() == [1e20, 2.5e300]


# --- columns ---


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize(
    "name", ["id", "ID", "index", "Unnamed: 0", "X", "row", "sample_id", "No."]
)
def test_row_numbers_are_left_out(tmp_path, name, start):
    found = table(tmp_path, f"{name},a,b,c\n{rows(before=lambda i: f'{i + start},')}")
    assert np.array_equal(found.values, X)
    (note,) = found.notes
    assert note.startswith(f"column {name!r} ") and "left out" in note
    assert ("put it behind another" in note) == (name in ("X", "row", "No."))


def test_row_numbers_of_other_kinds_are_left_out(tmp_path):
    order = np.random.default_rng(1).permutation(12)
    for text in (
        "Unnamed: 0.1,Unnamed: 0,a,b,c\n" + rows(before=lambda i: f"{i},{11 - i},"),
        "a,b,c,index\n" + rows(after=lambda i: f",{i}"),
        "id,a,b,c\n" + rows(before=lambda i: f"{order[i]},"),  # shuffled
        "patientId,a,b,c\n" + rows(before=lambda i: f"{900 + 3 * i},"),  # a part of the rows
        rows(before=lambda i: f"{i},"),
    ):
        found = table(tmp_path, text)
        assert np.array_equal(found.values, X) and found.notes


def test_other_whole_numbers_are_trained_on(tmp_path):
    for text in (
        "count,a,b,c\n" + rows(before=lambda i: f"{i * i},"),
        "id,a,b,c\n" + rows(before=lambda i: f"{i // 2},"),
        "acid,a,b,c\n" + rows(before=lambda i: f"{2 * i},"),
        "a,b,c,step\n" + rows(after=lambda i: f",{i}"),
    ):
        found = table(tmp_path, text)
        assert found.values.shape == (12, 4) and not found.notes
    assert table(tmp_path, "id\n0\n1\n2\n").values.tolist() == [[0], [1], [2]]
    curve = table(tmp_path, "x,y\n0,5\n1,7\n2,6\n")
    assert curve.values.tolist() == [[0, 5], [1, 7], [2, 6]]


@pytest.mark.parametrize(
    "name",
    ["target", "class", "Class", "species", "True Label", "class_label", "y_true", "cluster"],
)
def test_labels_by_their_usual_names_are_not_trained_on(tmp_path, name):
    found = table(tmp_path, f"a,b,c,{name}\n{rows(after=lambda i: f',{i % 3}')}")
    assert np.array_equal(found.values, X)
    assert found.labels.tolist() == [str(i % 3) for i in range(12)]
    assert found.notes == [f"column {name!r}: taken for the true labels"]
    np.savez(tmp_path / "x.npz", **{"data": X, name: np.arange(12) % 3})
    found = read(tmp_path / "x.npz")
    assert np.array_equal(found.values, X) and found.labels.tolist() == [0, 1, 2] * 4


@pytest.mark.parametrize("label", ["", " ", "NA", "nan", "NULL", "None", "#N/A"])
def test_rows_without_a_label(tmp_path, label):
    (tmp_path / "x.csv").write_text(f"a,b,species\n1,2,u\n3,4,{label}\n")
    said = f"line 3 must have a label, but 'species' is {label.strip() or 'empty'}; fill it in"
    assert said in refusal(tmp_path / "x.csv")
    assert table(tmp_path, "a,label\n1,na\n2,none\n").labels.tolist() == ["na", "none"]


def test_a_capital_x_is_no_coordinate_of_a_small_y(tmp_path):
    found = table(
        tmp_path, "X,a,b,c,y\n" + rows(before=lambda i: f"{i + 1},", after=lambda i: ",u")
    )
    assert np.array_equal(found.values, X) and set(found.labels) == {"u"}


@pytest.mark.parametrize("separator", [" ", "   ", ",", ";", "\t", "|", ", "])
def test_separators(tmp_path, separator):
    for header in ("", separator.join("abc") + "\n"):
        found = table(tmp_path, header + rows(separator=separator))
        assert np.array_equal(found.values, X)


def test_names_hold_other_separators(tmp_path):
    found = table(tmp_path, '"a, m";"b, m";"c, m, n"\n' + rows(separator=";"))
    assert np.array_equal(found.values, X)
    aligned = "".join("".join(f"{v:10.3f}" for v in row) + " \n" for row in X)
    assert np.array_equal(table(tmp_path, aligned).values, X)
    assert table(tmp_path, "my value\n1.5\n2.5\n").values.tolist() == [[1.5], [2.5]]


def test_a_place_is_told_by_its_column(tmp_path):
    (tmp_path / "x.csv").write_text("id,label,a,b\n0,u,1,nan\n")
    assert "has nan in row 0, column 'b'" in refusal(tmp_path / "x.csv")


# --- far-off values ---


def test_values_that_stretch_their_column_are_told(tmp_path):
    x = np.random.default_rng(0).normal(size=(200, 4))
    x[7, 1] = -1e8
    x[9, 1] = 3e7
    np.save(tmp_path / "x.npy", x)
    (note,) = read(tmp_path / "x.npy").notes
    assert note.startswith("row 7, column 1 (counted from 0), has -1e+08, so far out")
    x[7] = 1e8
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    assert read(tmp_path / "x.npy").notes[-1] == "2 more columns have such values"
    text = "a,b,c\n" + rows(np.concatenate([X, X, [[0, 0, 9999]]]))
    (note,) = table(tmp_path, text).notes
    assert note.startswith("row 24, column 'c' (rows are counted from 0), has 9999,")


def test_usual_columns_are_not_told_of(tmp_path):
    draw = np.random.default_rng(0)
    heavy, rare = np.exp(2 * draw.normal(size=300)), np.zeros(300)
    rare[5] = 1
    groups = np.where(np.arange(300) < 30, 1e6, 0) + draw.normal(size=300)
    np.save(tmp_path / "x.npy", np.stack([heavy, rare, groups, np.ones(300)], 1))
    assert read(tmp_path / "x.npy").notes == []


# --- what is too large ---


def test_lines_without_an_end_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reading_csv, "MOST_CHARACTERS", 1000)
    for text in ("1," * 600, "a,b\n1,2\n" + "1" * 2000, "\n" + " " * 1001):
        (tmp_path / "x.csv").write_text(text)
        line = text.count("\n") + 1
        expected = f"line {line} must have at most 1,000 characters, but has more; write each row"
        assert expected in refusal(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text(rows())
    assert np.array_equal(read(tmp_path / "x.csv").values, X)


def test_cells_without_an_end_are_told_by_their_line(tmp_path):
    (tmp_path / "x.csv").write_text('a,label\n1,"u\n' + "2,v\n" * 40_000)
    error = refusal(tmp_path / "x.csv")
    assert (
        "must end a cell of at most 131,072 characters, but it goes on; look for a quote" in error
    )
    (tmp_path / "x.csv").write_text('a,b\n1,"2\n' + "2,3\n" * 400)
    error = refusal(tmp_path / "x.csv")
    assert "column 'b' must be a number, but is '2\\n2,3" in error and len(error) < 300


def declare(file, shape, dtype="<f4"):
    header = {"shape": shape, "fortran_order": False, "descr": dtype}
    np.lib.format.write_array_header_1_0(file, header)


def test_arrays_are_no_larger_than_their_files(tmp_path):
    with open(tmp_path / "x.npy", "wb") as file:
        declare(file, (10**6, 10**6))
        file.write(bytes(100))
    expected = "[1000000, 1000000] of float32 must be 4 TB, but 100 bytes are there"
    assert f"the file is damaged or cut off: {expected}" in refusal(tmp_path / "x.npy")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.write(tmp_path / "x.npy", "x.npy")
    assert f"array 'x' is damaged or cut off: {expected}" in refusal(tmp_path / "x.npz")
    with open(tmp_path / "x.npy", "r+b") as file:
        file.truncate(4 * 10**12 + 128)  # a file of holes
    assert "must fit in memory" in refusal(tmp_path / "x.npy")


def test_what_unpacks_to_far_more_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PACKED_BYTES", 10**6)
    zeros = np.zeros((250_000, 5))
    np.savez_compressed(tmp_path / "x.npz", x=zeros)
    error = refusal(tmp_path / "x.npz")
    assert "array 'x' must not take over 500 times its bytes in the file, but takes 10 MB" in error
    zeros[::100] = np.random.default_rng(0).normal(size=(2500, 5))
    np.savez_compressed(tmp_path / "x.npz", x=zeros)
    assert np.array_equal(read(tmp_path / "x.npz").values, zeros)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_numpys_format(tmp_path, version):
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array(file, X, version=version)
    assert np.array_equal(read(tmp_path / "x.npy").values, X)


def test_numbers_that_only_long_double_holds_are_no_numbers(tmp_path):
    values = np.arange(60.0).reshape(20, 3).astype(np.longdouble)
    np.save(tmp_path / "a.npy", values)
    assert read(tmp_path / "a.npy").values.tolist() == values.tolist()
    values[4, 2] = np.longdouble("1e400")
    if not np.isfinite(values[4, 2]):
        pytest.skip("long double is float64 here")
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(InputError, match="must be finite, but has inf in row 4, column 2"):
        read(tmp_path / "a.npy")


@pytest.mark.parametrize("value, images", [(255, True), (256, False), (0.5, False), (-1, False)])
def test_flattened_images_are_known_by_their_values(tmp_path, value, images):
    x = np.arange(20 * 64).reshape(20, 64) % 17.0
    x[3, 5] = value
    np.save(tmp_path / "x.npy", x)
    data = read(tmp_path / "x.npy")
    assert data.images == images and bool(data.notes) == images
    pictures = data.pictures(data.values)
    assert (None if pictures is None else pictures.shape) == ((20, 8, 8) if images else None)
    np.save(tmp_path / "x.npy", x[:, :63])
    assert not read(tmp_path / "x.npy").images


@pytest.mark.parametrize(
    "text, shape, labels, noted",
    [
        ("1,2\n3,4\n5,6\n", (3, 2), None, True),
        ("a;b\n1;2\n3;4\n", (2, 2), None, False),
        ("1\t2\r\n3\t4\r\n", (2, 2), None, True),
        ("label,a,b\nu,1,2\nv,3,4\n", (2, 2), ["u", "v"], False),
        ('"a","y"\n"1.5","7"\n"2","8"\n', (2, 1), ["7", "8"], False),
        ("x,y\n1,2\n3,4\n", (2, 2), None, True),  # a point in the plane
        (",a,b\n0,1,2\n1,3,4\n", (2, 2), None, True),  # as pandas writes a table
        ("0,1\n5,6\n7,8\n", (2, 2), None, True),  # pandas again: columns without names
        ('"","a"\n"row 1",1\n"row 2",2\n', (2, 1), None, True),  # as R writes a table
    ],
)  # fmt: skip
def test_tables(tmp_path, text, shape, labels, noted):
    (tmp_path / "x.csv").write_text(text)
    data = read(tmp_path / "x.csv")
    assert data.values.shape == shape
    assert (None if data.labels is None else data.labels.tolist()) == labels
    assert bool(data.notes) == noted


def test_no_label_is_trained_on(tmp_path):
    """Columns of labels are left out whatever their name, and the user is told."""
    rows = "\n".join(f"{i % 3},{i % 3},{i / 7},{-i}" for i in range(12))
    (tmp_path / "x.csv").write_text(f"labels,y,a,b\n{rows}\n")
    data = read(tmp_path / "x.csv")
    assert data.values.shape == (12, 2) and len(data.labels) == 12
    assert any("'y' is named like a label too" in note for note in data.notes)
    np.savez(
        tmp_path / "x.npz", x=np.arange(24.0).reshape(12, 2), label=np.arange(12), z=np.ones(3)
    )
    data = read(tmp_path / "x.npz")
    assert data.labels.tolist() == list(range(12)) and data.notes == ["arrays left out: z"]
