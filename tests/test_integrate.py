"""The commands vmm-fast integrate and assign: results complete and consistent, bad input told."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from support import (
    cells_of,
    complaint,
    files_of_at_most,
    integrated,
    make_cells,
    model_of,
    written,
)

pytest.importorskip("scvi", reason="scvi-tools is not installed")

import anndata
import h5py
import scanpy
from anndata import AnnData
from scipy.sparse import csc_matrix, csr_matrix

from vmm_fast import cli
from vmm_fast.cells import integration, reading, report, selection, writing
from vmm_fast.cells.settings import Settings
from vmm_fast.scvi import VMMSCVI

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("no_report")]

FILES = {"run.json", "checkpoint.ckpt", *integration.RESULTS}
PLANE = report._plane
STOPS = {
    signal.SIGINT: (130, "interrupted"),
    signal.SIGTERM: (143, "terminated"),
    signal.SIGHUP: (129, "hung up"),
}


def resume(path, out, *options):
    command = ["integrate", str(path), "--out", str(out), "--resume", "--accelerator", "cpu"]
    return cli.main([*command, *map(str, options)])


@pytest.fixture
def finished(trained, tmp_path):
    """Return a copy of the results, and their input."""
    return shutil.copytree(trained, tmp_path / "finished"), trained.parent / "cells.h5ad"


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def same_results(one, other):
    a, b = (cells_of(out) for out in (one, other))
    np.testing.assert_array_equal(a.obsm["X_vmm"], b.obsm["X_vmm"])
    assert a.obs.equals(b.obs)
    assert (one / "clusters.csv").read_bytes() == (other / "clusters.csv").read_bytes()
    states = [
        torch.load(out / "model" / "model.pt", weights_only=False)["model_state_dict"]
        for out in (one, other)
    ]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def table(out):
    """Return the names and the clusters in clusters.csv."""
    with open(out / "clusters.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["cell"] for row in rows], [row["cluster"] for row in rows]


def stop(*arguments, **options):
    raise KeyboardInterrupt


# --- runs ---


def test_integrate(h5ad, tmp_path, capsys, with_report):
    before, out = h5ad.read_bytes(), tmp_path / "out"
    options = ["--batch-key", "batch", "--labels-key", "type", "--genes", 15, "--components", 8]
    assert integrated(h5ad, out, *options) == 0
    shown = capsys.readouterr()
    first, *_, last, embedding, report = shown.err.splitlines()  # no bar: stderr is no terminal
    assert (embedding, report[-18:]) == ("embedding the cells", "drawing the report")
    assert re.fullmatch(r"epoch 1/\d+, ELBO -\d+\.\d, warm-up, 0:\d\d min left", first)
    assert re.fullmatch(r"epoch (\d+)/\1, ELBO -\d.*, \d active components?, 0:00 min left", last)
    assert "60 cells x 20 genes, 2 batches, trained on the 15 genes" in shown.out
    assert re.search(r"^ARI, by type +-?\d\.\d{3}$", shown.out, re.MULTILINE)
    assert re.search(r"^non-empty components +\d of 8$", shown.out, re.MULTILINE)
    assert {path.name for path in out.iterdir()} == FILES
    assert h5ad.read_bytes() == before

    source, adata = anndata.read_h5ad(h5ad), cells_of(out)
    assert adata.obs_names.equals(source.obs_names) and adata.var_names.equals(source.var_names)
    assert (adata.X != source.X).nnz == 0
    assert list(adata.obs) == [*source.obs, *writing.COLUMNS]
    settings = adata.uns["vmm"]
    assert settings["batch_key"] == "batch" and settings["components"] == 8
    assert settings["clusters_used"] == len(adata.obs["vmm_cluster"].cat.categories)
    assert set(settings["scores"]) == {"ari", "nmi"}

    # The model is the one that the columns are of.
    genes = adata.var_names[adata.var["vmm_gene"]]
    assert len(genes) == 15 == settings["genes"]
    model = VMMSCVI.load(out / "model", source[:, genes].copy(), accelerator="cpu")
    np.testing.assert_array_equal(model.get_latent_representation(), adata.obsm["X_vmm"])
    clusters = model.get_clusters()
    np.testing.assert_array_equal(adata.obs["vmm_cluster"].astype(int), clusters)
    best = model.get_cluster_probabilities().max(1)
    np.testing.assert_allclose(adata.obs["vmm_cluster_probability"], best, rtol=1e-5)
    entropy = model.get_cluster_entropy()
    np.testing.assert_array_equal(adata.obs["vmm_cluster_entropy"], entropy)
    assert (np.diff(np.bincount(clusters, minlength=8)) <= 0).all()  # numbered by size
    assert len(model.history["elbo_train"]) == 2

    np.testing.assert_array_equal(adata.obs["vmm_component"].astype(int), model.get_components())
    assert table(out) == (list(source.obs_names), list(adata.obs["vmm_cluster"]))
    page = (out / "report.html").read_text()
    assert "60 cells, 20 genes, 2 batches" in page
    assert page.count("<img ") == 6  # cluster, batch, label, entropy, tree, curves


def test_a_run_is_cut_elsewhere_without_training(finished, tmp_path, capsys):
    out, source = finished
    before = cells_of(out)
    finest = before.uns["vmm"]["components_used"]
    assert resume(source, out, "--clusters", 1) == 0
    one = cells_of(out)
    assert one.uns["vmm"]["clusters_used"] == 1 and "dendrogram_vmm_cluster" not in one.uns
    capsys.readouterr()
    assert resume(source, out, "--clusters", finest) == 0
    found = cells_of(out)
    expected = model_of(out).get_clusters()
    count = expected.max() + 1
    note = f"note: {count} clusters, not {finest}: more would leave" in capsys.readouterr().out
    assert note == (count < finest) and count > 1
    np.testing.assert_array_equal(found.obs["vmm_cluster"].astype(int), expected)
    np.testing.assert_array_equal(found.obsm["X_vmm"], before.obsm["X_vmm"])
    assert list(found.obs["vmm_component"]) == list(before.obs["vmm_component"])
    tree = found.uns["dendrogram_vmm_cluster"]
    assert tree["linkage"].shape == (count - 1, 4)
    assert list(tree["categories_ordered"]) == [str(i) for i in tree["categories_idx_ordered"]]
    scanpy.pl.dendrogram(found, "vmm_cluster", show=False)


SURROUNDINGS = (
    "SLURM_JOB_ID=1 SLURM_JOB_NAME=job SLURM_NTASKS=2 SLURM_PROCID=1 SLURM_LOCALID=1 "
    "SLURM_NODEID=0 SLURM_NODELIST=n",
    "SLURM_JOB_ID=1 SLURM_NTASKS=4 SLURM_NTASKS_PER_NODE=2 SLURM_NNODES=2 SLURM_NODELIST=n",
    # Of another launcher than torchrun, which sets TORCHELASTIC_RUN_ID.
    "LOCAL_RANK=1 RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=1",
)


def test_neither_labels_nor_the_surroundings_change_a_run(h5ad, plain, tmp_path, monkeypatch):
    for number, variables in enumerate(SURROUNDINGS):
        with monkeypatch.context() as patch:
            for variable in variables.split():
                patch.setenv(*variable.split("=", 1))
            before = os.environ.get("SLURM_JOB_NAME")
            assert integrated(h5ad, tmp_path / str(number), "--labels-key", "type") == 0
            assert os.environ.get("SLURM_JOB_NAME") == before
        same_results(plain, tmp_path / str(number))


def test_numba_gets_a_cache_where_nothing_can_be_written_to(monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", "own")
    monkeypatch.setattr(cli.cells, "_can_be_written", lambda folder: False)
    cli.cells._require_scvi()
    assert os.environ["NUMBA_CACHE_DIR"] == "own"
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    cli.cells._require_scvi()
    assert os.listdir(os.environ["NUMBA_CACHE_DIR"]) == []


def test_the_example_needs_no_file(tmp_path, capsys, monkeypatch):
    cells = make_cells()
    cells.obs["bulk_labels"] = cells.obs["type"]
    monkeypatch.setattr(reading, "example", lambda: reading.LoadedCells(cells))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["integrate", "--example", "--epochs", "1", "--accelerator", "cpu"]) == 0
    assert "ARI, by bulk_labels" in capsys.readouterr().out
    out = tmp_path / "pbmc68k-vmm"
    assert {path.name for path in out.iterdir()} == FILES
    assert json.loads((out / "run.json").read_text())["input"] == "pbmc68k"


def test_the_example_is_of_counts():
    adata = reading.example().adata
    assert adata.shape == (700, 765) and list(adata.obs) == ["bulk_labels", "phase", "percent_mito"]
    assert (adata.X.data == np.rint(adata.X.data)).all() and adata.X.max() == 259


@pytest.mark.slow("UMAP compiles for ten seconds")
def test_the_example(tmp_path, capsys, monkeypatch, with_report):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "_plane", PLANE)
    assert cli.main(["integrate", "--example", "--epochs", "1", "--accelerator", "cpu"]) == 0
    assert "700 cells x 765 genes" in capsys.readouterr().out
    page = (tmp_path / "pbmc68k-vmm" / "report.html").read_text()
    assert "UMAP of the 10 latent dimensions" in page
    assert re.search(
        r"700 cells, 765 genes, 1 batch, \d+ clusters? of \d+ non-empty components?", page
    )
    assert page.count("<img ") == 5  # cluster, label, entropy, tree, curves


def test_options(h5ad, tmp_path):
    given = {"seed": 5, "latent_dim": 3, "components": 4, "batch_size": 20, "genes": 12}
    given |= {"learning_rate": 0.01, "prior_learning_rate": 0.02}
    cells = reading.read_cells(str(h5ad)).adata

    def loss(options):
        settings = Settings.for_cells(cells, **options, epochs=1)
        training, _ = selection.training_cells(cells, settings)
        found = integration.integrate(training, settings, accelerator="cpu")
        assert found.model.adata.shape == (60, 12)
        assert found.model.module.components().centers.shape == (4, 3)
        assert found.z.shape == (60, 3)
        return found.history["elbo_validation"]

    # The others, whose work has no such shape, change the result.
    first = loss(given)
    for name in ("seed", "batch_size", "learning_rate", "prior_learning_rate"):
        assert loss({**given, name: given[name] * 2}) != first, name


@pytest.mark.parametrize("kind", ["zarr", "csc", "dense", "layer"])
def test_kinds_of_files(tmp_path, kind):
    source = make_cells()
    counts, layer = source.X.toarray(), None
    path = tmp_path / f"cells.{kind}"
    if kind == "zarr":
        source.write_zarr(path)
    else:
        if kind == "csc":
            source.X = csc_matrix(source.X)
        elif kind == "dense":
            source.X = counts.astype(np.int32)
        else:
            source.layers["counts"], layer = source.X.copy(), "counts"
            source.X = np.log1p(counts)
        path = written(tmp_path, source)
    adata = reading.read_cells(str(path)).adata
    settings = Settings.for_cells(adata, layer=layer, epochs=1)
    training, _ = selection.training_cells(adata, settings)
    found = training.X if layer is None else training.layers[layer]
    np.testing.assert_array_equal(found.toarray(), counts)
    assert list(training.obs_names) == list(source.obs_names)
    assert list(training.var_names) == list(source.var_names)


def test_odd_cells_are_noted_and_do_not_break_a_run(tmp_path, capsys):
    adata = make_cells()
    counts = adata.X.toarray()
    counts[[3, 7]] = 0
    counts[:, 5] = 0
    adata.X = csr_matrix(counts)
    adata.obs["batch"] = ["alone", *adata.obs["batch"][1:]]
    adata.obs["type"] = [None, *adata.obs["type"][1:]]
    adata.obs_names = ["cell 1", *adata.obs_names[1:]]
    path = written(tmp_path, adata)
    keys = ["--batch-key", "batch", "--labels-key", "type"]
    for options in (keys, [*keys, "--genes", 10, "--overwrite"]):
        assert integrated(path, tmp_path / "out", *options) == 0
        shown = capsys.readouterr().out
        assert "note: a batch of one cell: alone" in shown
        assert "note: 2 cells have no counts at all" in shown
        assert "note: 1 gene has no counts at all" in shown
        assert "note: 1 cell has a name that another has, too; results are in order" in shown
        found = cells_of(tmp_path / "out")
        assert np.isfinite(found.obsm["X_vmm"]).all()
        assert table(tmp_path / "out")[0] == list(found.obs_names) == list(adata.obs_names)
    adata.X = csr_matrix(np.where(np.arange(20) == 6, 4, counts))  # a gene that is constant
    adata.obs["batch"] = "all"
    assert integrated(written(tmp_path, adata), tmp_path / "one", "--batch-key", "batch") == 0
    assert "note: one batch alone" in capsys.readouterr().out


@pytest.mark.parametrize("number, batch_size", [(10, 128), (11, 3)])
def test_few_cells(tmp_path, number, batch_size):
    path = written(tmp_path, make_cells(number))
    assert (
        integrated(path, tmp_path / "out", "--batch-size", batch_size, "--components", number) == 0
    )


# --- stopping and going on ---


def test_resume_equals_an_unbroken_run(h5ad, tmp_path, capsys, monkeypatch):
    on = signal.SIGTERM
    monkeypatch.setattr(integration, "CHECKPOINT_SECONDS", 0)
    whole, broken = tmp_path / "whole", tmp_path / "bro ken"
    options = ["--batch-key", "batch", "--epochs", 4, "--seed", 1, "--batch-size", 16]
    assert integrated(h5ad, whole, *options) == 0
    real = integration.Progress.on_train_epoch_end

    def stopped(self, *args):
        real(self, *args)
        if self.epoch == 3:  # the prior is being trained
            signal.raise_signal(on)

    handlers = [signal.getsignal(number) for number in STOPS]
    capsys.readouterr()
    code, word = STOPS[on]
    with monkeypatch.context() as patch:
        patch.setattr(integration.Progress, "on_train_epoch_end", stopped)
        error = complaint(capsys, integrated(h5ad, broken, *options), code)
    again = f"vmm-fast integrate {h5ad} --out '{broken}' --resume --accelerator cpu"
    assert f"{word}; go on with: {again}" in error
    # Lightning would ignore the next Ctrl-C.
    assert [signal.getsignal(number) for number in STOPS] == handlers
    assert {path.name for path in broken.iterdir()} == {"run.json", "checkpoint.ckpt"}
    (broken / f".cells.h5ad.{'0' * 16}.tmp").write_bytes(b"half")  # as a killed run leaves it
    assert resume(h5ad, broken) == 0
    same_results(whole, broken)
    assert {path.name for path in broken.iterdir()} == FILES


def test_a_finished_run_goes_on_with_labels_and_made_longer(finished):
    out, source = finished
    before = contents(out)
    assert resume(source, out, "--labels-key", "type") == 0
    found = cells_of(out)
    assert "scores" in found.uns["vmm"] and found.uns["vmm"]["epochs"] == 15
    after = contents(out)
    assert all(after[name] == before[name] for name in before if name.name == "clusters.csv")
    assert resume(source, out, "--epochs", 16) == 0
    assert cells_of(out).uns["vmm"]["epochs"] == 16


STOPPED = """
import pathlib, signal, sys, time, torch
# What is started in the background by a script ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
from vmm_fast import cli
from vmm_fast.cells import integration
integration.CHECKPOINT_SECONDS = 0
real = integration.Progress.on_train_epoch_end
def wait_to_be_stopped(self, *args):
    real(self, *args)
    if self.epoch == 3:  # N(0, I) still stands in for the prior
        pathlib.Path("waiting").touch()
        until = time.monotonic() + 100
        # On SIGTERM Lightning ends the run after the step.
        while time.monotonic() < until and not pathlib.Path("go on").exists():
            time.sleep(0.05)
integration.Progress.on_train_epoch_end = wait_to_be_stopped
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow("starts a process that imports scvi-tools")
@pytest.mark.parametrize("on", [signal.SIGKILL, *STOPS])
def test_a_stopped_process_goes_on(h5ad, tmp_path, on):
    options = [h5ad, "--epochs", "8", "--accelerator", "cpu", "--out"]
    command = [sys.executable, "-c", STOPPED, "integrate", *options, "stopped"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    while not (tmp_path / "waiting").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(on)
    time.sleep(0.1)
    process.send_signal(on)  # as the impatient do
    (tmp_path / "go on").touch()
    _, error = process.communicate(timeout=120)
    code, word = STOPS.get(on, (-signal.SIGKILL, None))
    assert process.returncode == code
    if word is not None:
        *progress, last = error.splitlines()
        assert last.startswith(f"vmm-fast: {word}; go on with: ")
        assert all(line.startswith("epoch ") for line in progress)
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    assert resume(h5ad, stopped) == 0
    assert integrated(h5ad, whole, "--epochs", 8) == 0
    same_results(whole, stopped)


def test_a_folder_that_may_not_be_used_stays_as_it_is(finished, tmp_path, capsys):
    out, source = finished
    before = contents(out)

    def refused(message, *options, path=source):
        assert message in complaint(capsys, integrated(path, out, *options, "--epochs", 15))
        assert contents(out) == before

    other = written(tmp_path, make_cells(seed=1), "other.h5ad")
    refused("integrate --resume, or replace it by integrate --overwrite")
    refused("--seed must be 0 as in the run", "--resume", "--seed", 9)
    refused("another input", "--resume", path=other)
    refused("cells.h5ad in it is the input", "--overwrite", path=out / "cells.h5ad")
    checkpoint = out / "checkpoint.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert "checkpoint.ckpt: is damaged" in complaint(capsys, resume(source, out))


def test_existing_results_stay_until_others_take_their_place(finished, capsys, monkeypatch):
    out, source = finished
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(integration.Progress, "on_train_epoch_end", stop)
        complaint(capsys, integrated(source, out, "--overwrite", "--seed", 3), 130)
    after = contents(out)
    changed = {str(name) for name in before if after.get(name) != before[name]}
    assert changed == {"run.json", "checkpoint.ckpt"}
    assert integrated(source, out, "--overwrite", "--seed", 3) == 0
    assert cells_of(out).uns["vmm"]["seed"] == 3


# --- what cannot be used ---


def changed(value, **more):
    adata = make_cells()
    counts = adata.X.toarray()
    counts[7, 2] = value
    adata.X = csr_matrix(counts) if more.get("sparse", True) else counts
    return adata


def bad_files(folder):
    """Name of the case -> (file, what the complaint must say)."""
    cases = {}

    def case(name, adata, message):
        cases[name] = (written(folder, adata, f"{name}.h5ad"), message)

    cases["missing"] = (folder / "nowhere.h5ad", "no such file or folder")
    (folder / "folder").mkdir()
    cases["folder"] = (folder / "folder", "is a folder without matrix.mtx")
    for name, content, message in (
        ("a.h5ad", b"", "is empty"),
        ("b.h5ad", b"\xff\xfegarbage" * 99, "is damaged or no .h5ad file"),
        ("c.h5", b"\xff\xfegarbage" * 99, "is damaged or no .h5 file"),
        ("d.loom", b"\xff\xfegarbage" * 99, "is damaged or no .loom file"),
        ("e.csv", b"1,2", "must be a .h5ad, .h5mu, .h5 or .loom file .* ends in .csv"),
        ("f", b"1,2", "has no suffix"),
        ("g.h5ad", written(folder).read_bytes()[:-5000], "is damaged or no .h5ad file"),
    ):
        (folder / name).write_bytes(content)
        cases[name] = (folder / name, message)
    for name in ("column-order", "_index"):
        case(name, make_cells(), f"must have the attribute '{name}' in its tables")
        with h5py.File(cases[name][0], "a") as file:
            del file["obs"].attrs[name]
    (folder / "h.zarr").mkdir()
    (folder / "h.zarr" / "zarr.json").write_text("{}")
    cases["h.zarr"] = (folder / "h.zarr", "is damaged or no .zarr file")
    (folder / "m").mkdir()
    (folder / "m" / "matrix.mtx").write_text("%%MatrixMarket")
    cases["mtx"] = (folder / "m", "is damaged or no .mtx file")

    place = r"in cell 'cell 7', gene 'gene 2'"
    case("normalised", changed(0.5), f"X must hold counts, .* has 0.5 {place}")
    case("infinite", changed(np.inf, sparse=False), f"has inf {place}")
    layers = changed(0.5)
    layers.layers["counts"], layers.layers["log"] = make_cells().X, layers.X
    case("layers", layers, "these hold counts: --layer counts$")
    raw = make_cells()
    raw.raw = raw.copy()
    raw.X = np.log1p(raw.X.toarray())
    case("raw", raw, r"raw holds counts: write adata.raw.to_adata\(\) to a file")
    case("no X", AnnData(obs=make_cells().obs, var=make_cells().var), "X must hold .* is absent")
    zeros = make_cells()
    zeros.X = csr_matrix(zeros.shape, dtype=np.float32)
    case("zeros", zeros, "must hold counts above 0")
    twice = make_cells()
    twice.var_names = ["same", "same", *twice.var_names[2:]]
    case("genes twice", twice, "gene names must be unique, 1 occurs again, the first .* 'same'")
    case("no cells", make_cells()[:0].copy(), "must hold cells and genes, but has 0 cells")
    case("no genes", make_cells()[:, :0].copy(), "must hold cells and genes, .* 0 genes")
    case("few", make_cells(9), "at least 10 cells to be clustered, but has 9")
    return cases


def test_bad_input(tmp_path, capsys):
    out = tmp_path / "out"
    for name, (path, message) in bad_files(tmp_path).items():
        before = path.read_bytes() if path.is_file() else None
        error = complaint(capsys, integrated(path, out))
        assert str(path) in error, name
        assert re.search(message, error), f"{name}: {error}"
        assert not out.exists(), name
        assert before is None or path.read_bytes() == before


@pytest.mark.parametrize(
    "options, message",
    [
        (["--batch-key", "plate"], "--batch-key plate: must be a column of obs, which are batch, "),
        (["--labels-key", "cell_type"], "--labels-key cell_type: must be a column of obs"),
        (["--layer", "counts"], "--layer counts: must be one of the layers, but there are none"),
        (["--batch-key", "some"], "every cell must have a batch, 2 of 60 have none"),
        (["--batch-key", "barcode"], "--batch-key barcode: .* another value for every cell"),
        (["--components", "61"], "--components must be at most 60, the cells .* is 61"),
        (["--epochs", "0"], "--epochs: must be a whole number of at least 1, but is 0"),
        (["--batch-size", "1"], "--batch-size: must be a whole number of at least 2, but is 1"),
        (["--seed", 2**32], "--seed: must be a whole number from 0 to 4294967295"),
        (["--prior-learning-rate", "0"], "--prior-learning-rate: must be a finite number above 0"),
        (["--memory", "-1"], "--memory: must be a finite number of at least 0, but is -1.0"),
        (["--accelerator", "cuda"], "--accelerator: invalid choice"),
        (["--example"], "either FILE or --example"),
    ],
)
def test_bad_options(tmp_path, capsys, options, message):
    adata = make_cells()
    adata.obs["some"] = [None, None, *adata.obs["batch"][2:]]
    adata.obs["barcode"] = adata.obs_names
    error = complaint(capsys, integrated(written(tmp_path, adata), tmp_path / "out", *options))
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()
    if options == ["--example"]:
        assert "either FILE or --example" in complaint(capsys, cli.main(["integrate"]))


@pytest.mark.parametrize(
    "refusal",
    [
        None,
        "Expected parameter loc to satisfy the constraint Real()",
        "no positive-definite covariance",
    ],
)
def test_divergence_is_told_in_a_line(h5ad, tmp_path, capsys, monkeypatch, refusal):
    if refusal is not None:  # which of them comes first depends on the last bits

        def refuse(*arguments, **options):
            raise ValueError(refusal)

        monkeypatch.setattr(VMMSCVI, "train", refuse)
    error = complaint(capsys, integrated(h5ad, tmp_path / "out", "--learning-rate", 1e30), 1)
    assert re.search("training diverged: .* (nan|-?inf|finite)", error)


def test_a_missing_extra_names_the_cure(h5ad, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "scanpy", None)
    error = complaint(capsys, integrated(h5ad, tmp_path / "out"))
    assert "needs scanpy" in error and "pip install 'vmm-fast[cli,scvi]'" in error


# --- assign ---


def test_results_of_an_earlier_run(trained, tmp_path, capsys):
    again = trained / "cells.h5ad"
    assert "dendrogram_vmm_cluster" in cells_of(trained).uns
    for option in ("--labels-key", "--batch-key"):
        error = complaint(capsys, integrated(again, tmp_path / "out", option, "vmm_cluster"))
        assert f"{option} vmm_cluster: must be another column" in error
    adata = cells_of(trained)
    adata.obs["vmm_label"], adata.obs["vmm_novelty"] = "old", 0.5
    again = written(tmp_path, adata)
    capsys.readouterr()
    options = ("--layer", "counts", "--epochs", 1, "--clusters", 1)
    for out, where in (("memory", ()), ("disk", ("--memory", 0))):
        assert integrated(again, tmp_path / out, *options, *where) == 0
        assert "results of an earlier run" in capsys.readouterr().out
        found = cells_of(tmp_path / out)
        assert "dendrogram_vmm_cluster" not in found.uns
        assert not {"vmm_label", "vmm_novelty"} & set(found.obs)


def test_a_full_disk_before_the_model_is_written(h5ad, tmp_path, capsys, monkeypatch):
    write_model = integration.Integration.write_model

    def full(self, folder):
        with files_of_at_most(20_000):
            write_model(self, folder)

    monkeypatch.setattr(integration.Integration, "write_model", full)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    out = tmp_path / "out"
    error = complaint(capsys, integrated(h5ad, out))
    assert error.startswith(f"vmm-fast: {out / 'model' / 'model.pt'}: cannot be written: ")
    assert not list((out / "model").iterdir())


# --- assign, of cells on disk ---
