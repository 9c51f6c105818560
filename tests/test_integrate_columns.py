"""vmm-fast integrate and assign with covariates, labels and settings from a file; bad ones told."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from support import assigned, cells_of, complaint, integrated, make_cells, written

pytest.importorskip("scvi", reason="scvi-tools is not installed")

import anndata
from test_integrate import resume, same_results, stop

from vmm_fast import cli
from vmm_fast.cells import integration
from vmm_fast.cells.settings import PRIORS, Settings
from vmm_fast.scvi import VMMSCANVI, VMMSCVI, latent_prior

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("no_report")]

OPTIONS = ["--batch-key", "batch", "--categorical-covariates", "donor", "--components", 6]
OPTIONS += ["--continuous-covariates", "age", "--train-labels", "label", "--likelihood", "nb"]


def with_columns(number=60, seed=0):
    """Return cells with covariates, a third of them without a label: no value, or "Unknown"."""
    adata, random = make_cells(number, seed=seed), np.random.default_rng(1)
    adata.obs["donor"] = [f"d{i}" for i in random.integers(3, size=number)]
    adata.obs["age"] = random.normal(size=number).astype(np.float32)
    label = adata.obs["type"].map({"0": "T", "1": "B"}).astype(object)
    label[np.arange(number) % 6 == 0], label[np.arange(number) % 6 == 1] = None, "Unknown"
    adata.obs["label"] = label
    adata.obs["constant"], adata.obs["each"] = "one", adata.obs_names
    adata.obs["some"] = adata.obs["age"].where(np.arange(number) > 1)
    adata.obs["one label"] = label.where(label != "T")
    adata.obs["no label"] = "Unknown"
    return adata


@pytest.fixture(scope="module")
def results(tmp_path_factory, no_report):
    """Return the results of a run with covariates and labels, in memory and on disk."""
    folder = tmp_path_factory.mktemp("columns")
    path = written(folder, with_columns())
    for name, memory in (("memory", 1), ("disk", 0)):
        options = [*OPTIONS, "--epochs", 15, "--memory", memory]
        options += ["--batch-size", 16, "--learning-rate", 0.02]
        assert integrated(path, folder / name, *options) == 0
    return folder


def test_models_with_covariates_and_labels_are_equal_in_memory_and_on_disk(results):
    same_results(results / "memory", results / "disk")


def test_predicted_labels_are_in_the_table(results):
    table = pd.read_csv(results / "disk" / "clusters.csv", dtype=str)
    assert list(table) == ["cell", "cluster", "probability", "entropy", "component", "label"]
    assert list(table["label"]) == list(cells_of(results / "disk").obs["vmm_label"])


def test_labels_are_learnt_and_the_model_is_the_one_of_the_columns(results):
    found = cells_of(results / "memory")
    label = found.obs["vmm_label"]
    assert list(label.cat.categories) == ["B", "T"]
    known = found.obs["label"].isin(["B", "T"])
    assert (label[known].astype(str) == found.obs["label"][known].astype(str)).mean() > 0.8
    cells = with_columns()
    cells.obs["label"] = cells.obs["label"].fillna("Unknown")
    model = VMMSCANVI.load(results / "memory" / "model", cells, accelerator="cpu")
    np.testing.assert_allclose(model.get_latent_representation(), found.obsm["X_vmm"], atol=1e-5)
    assert list(model.predict()) == list(label)
    assert model.module.gene_likelihood == "nb"
    record = found.uns["vmm"]
    assert list(record["categorical_covariates"]) == ["donor"] and record["unlabelled"] == "Unknown"


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_run_is_repeated_from_its_own_settings(results, tmp_path, where, capsys):
    tomllib = pytest.importorskip("tomllib", reason="Python < 3.11")
    config = results / where / "settings.toml"
    found = tomllib.loads(config.read_text())
    assert found["version"] == 1 and found["on-disk"] == (where == "disk")
    command = ["integrate", results / "cells.h5ad", "--config", config, "--out", tmp_path / "again"]
    capsys.readouterr()
    assert cli.main([*map(str, command), "--accelerator", "cpu", "--json"]) == 0
    same_results(results / where, tmp_path / "again")
    shown = capsys.readouterr()
    summary = json.loads(shown.out)
    assert summary["out"] == str(tmp_path / "again") and summary["cells"] == 60
    assert (
        summary["likelihood"] == "nb" and "40 of 60 cells have one of 2 labels" in summary["notes"]
    )
    assert "note: 40 of 60 cells" in shown.err and "training time" in shown.err
    assert (tmp_path / "again" / "settings.toml").read_text() == config.read_text()


def test_options_overrule_a_file_of_settings(h5ad, tmp_path):
    config = tmp_path / "mine.toml"
    config.write_text('seed = 5\ncomponents = 7\nresolution = 3.0\nprior = "gmm"\n')
    assert integrated(h5ad, tmp_path / "out", "--config", config, "--seed", 2, "--clusters", 1) == 0
    record = cells_of(tmp_path / "out").uns["vmm"]
    assert record["seed"] == 2 and record["components"] == 7 and record["prior"] == "gmm"
    assert record["clusters"] == 1 and "resolution" not in record
    assert len(VMMSCVI.load(tmp_path / "out" / "model", make_cells()).module.prior.centers) == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seeds = 1", "must hold settings alone, but has 'seeds'; leave it out, .* seed, "),
        ('seed = "1"', "seed must be a whole number .* but is '1'; change it or leave it out"),
        ("epochs = 0", "epochs must be a whole number of at least 1, but is 0"),
        ('prior = "normal"', "prior must be one of vmm, gmm, vamp, but is 'normal'"),
        ("categorical-covariates = []", "must have at least 1 values, but has 0"),
        ("version = 2", "must be of version 1, but is of 2: use the vmm-fast that wrote it"),
        ("= 1", "must be a TOML file, but is none"),
        (None, "cannot be read: No such file"),
    ],
)
def test_files_of_settings_that_cannot_be_used(h5ad, tmp_path, capsys, content, message):
    config = tmp_path / "mine.toml"
    if content is not None:
        config.write_text(content)
    error = complaint(capsys, integrated(h5ad, tmp_path / "out", "--config", config))
    assert re.search(f"--config {config}: .*{message}", error), error
    assert not (tmp_path / "out").exists()


def test_settings_are_those_of_the_models():
    rate = latent_prior.PRIOR_LEARNING_RATE
    assert Settings.__dataclass_fields__["prior_learning_rate"].default == rate
    assert {*PRIORS, "normal"} == set(latent_prior.PRIORS)  # N(0, I) has no clusters


@pytest.mark.parametrize("memory", [0, 1])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("categorical", "plate"), "plate: must be a column of obs, which are batch, type, donor"),
        (("categorical", "batch"), "batch: must be another column than that of --batch-key; leave"),
        (("categorical", "donor", "donor"), "donor: must be given once, but is given twice; l"),
        (("categorical", "each"), "each: must name groups, but has another value for every cell"),
        (("categorical", "label"), "label: every cell must have a category, 10 of 60 have none"),
        (
            ("continuous", "donor"),
            "donor: must hold numbers, but holds 'd0'; groups are categorical cov",
        ),
        (("continuous", "some"), "some: every cell must have a finite number, 2 of 60 have none"),
        (("labels", "one label"), "must hold two labels or more, but holds 'B' alone; labels of"),
        (
            ("labels", "no label"),
            "must label some cells, but labels none; .* 'Unknown' are unknown",
        ),
        (("labels", "each"), "each: must name groups of cells, but has another value for every"),
        (("labels", "batch"), "batch: must be another column than that of --batch-key"),
    ],
)
def test_columns_that_cannot_be_used(tmp_path, capsys, options, message, memory):
    kind, *keys = options
    option = "--train-labels" if kind == "labels" else f"--{kind}-covariates"
    path = written(tmp_path, with_columns())
    before = path.read_bytes()
    options = ["--batch-key", "batch", option, *keys, "--memory", memory]
    error = complaint(capsys, integrated(path, tmp_path / "out", *options))
    assert re.search(f"cells.h5ad: {option} {keys[-1]}: .*{message[-30:]}", error), error
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists() and path.read_bytes() == before


def test_a_conflict_of_an_option_and_a_file_names_both(tmp_path, capsys):
    config, path = tmp_path / "mine.toml", written(tmp_path, with_columns())
    config.write_text('batch-key = "batch"\nepochs = 1\n')
    options = ["--config", config, "--categorical-covariates", "batch"]
    error = complaint(capsys, integrated(path, tmp_path / "out", *options))
    conflict = "--categorical-covariates batch: must be another column than that of --batch-key"
    assert f"{conflict}; leave it out (--batch-key as in {config})\n" in error
    options += ["--batch-key", "batch"]
    error = complaint(capsys, integrated(path, tmp_path / "out", *options))
    assert error.endswith(f"{conflict}; leave it out\n")


def test_odd_columns_are_noted(tmp_path, capsys):
    adata = with_columns()
    adata.obs["age"] *= 1000
    adata.obs.loc[adata.obs_names[2], "label"] = "rare"
    options = ["--train-labels", "label", "--labels-key", "label"]
    options += ["--categorical-covariates", "constant", "--continuous-covariates", "age"]
    assert integrated(written(tmp_path, adata), tmp_path / "out", *options) == 0
    shown = capsys.readouterr().out
    for note in (
        "constant has one value alone, as a covariate it tells nothing",
        r"age has values up to \d+\.?\d*: scale it to about 1",
        "40 of 60 cells have one of 3 labels",
        "a label of fewer than 3 cells: rare",
        "scores are of labels that were trained on, those of label",
    ):
        assert re.search(f"^note: {note}", shown, re.MULTILINE), note


def test_a_labelled_run_is_resumed(tmp_path, capsys, monkeypatch):
    path, whole, broken = written(tmp_path, with_columns()), tmp_path / "whole", tmp_path / "broken"
    options = [*OPTIONS, "--batch-size", 16]
    assert integrated(path, whole, *options) == 0
    with monkeypatch.context() as patch:
        patch.setattr(integration.Progress, "on_train_epoch_end", stop)
        complaint(capsys, integrated(path, broken, *options, "--checkpoint-steps", 3), 130)
    assert resume(path, broken) == 0
    same_results(whole, broken)
    error = complaint(capsys, resume(path, whole, "--categorical-covariates", "batch"))
    assert "--categorical-covariates must be ['donor'] as in the run" in error


# --- assign ---


def test_cells_get_clusters_and_labels_with_their_covariates(results, tmp_path, capsys):
    expected = cells_of(results / "memory")
    for memory in (0, 1):
        out = tmp_path / f"{memory}.h5ad"
        options = ["--memory", memory, "--json"]
        assert assigned(results / "memory", results / "cells.h5ad", out, *options) == 0
        assert json.loads(capsys.readouterr().out)["cells"] == 60
        found = anndata.read_h5ad(out)
        np.testing.assert_array_equal(found.obsm["X_vmm"], expected.obsm["X_vmm"])
        assert list(found.obs["vmm_label"]) == list(expected.obs["vmm_label"])
        assert list(found.obs["vmm_cluster"]) == list(expected.obs["vmm_cluster"])


def test_covariates_that_a_query_lacks_or_the_model_does_not_know(results, tmp_path, capsys):
    adata = with_columns()
    adata.obs["donor"] = ["new", *adata.obs["donor"][1:]]
    out = tmp_path / "out.h5ad"
    assert assigned(results / "memory", written(tmp_path, adata), out) == 0
    note = "note: a category that the model does not know of 'donor': new, whose cells are encoded"
    assert note in capsys.readouterr().out
    z, expected = anndata.read_h5ad(out).obsm["X_vmm"], cells_of(results / "memory").obsm["X_vmm"]
    np.testing.assert_allclose(z[1:], expected[1:], atol=1e-5)
    assert (z[0] != expected[0]).all()
    for column, value, message in (
        ("donor", None, "'donor' of obs: every cell must have a category, 1 of 60 have none"),
        ("age", np.nan, "'age' of obs: every cell must have a finite number, 1 of 60 have none"),
        ("age", "absent", "must have 'age' in obs, numbers that the model was trained with; add"),
    ):
        bad = with_columns()
        if value == "absent":
            del bad.obs[column]
        else:
            bad.obs[column] = pd.Series([value, *bad.obs[column][1:]], index=bad.obs_names)
        path = written(tmp_path, bad)
        for memory in (0, 1):
            code = assigned(results / "memory", path, tmp_path / "other.h5ad", "--memory", memory)
            assert f"{path}: {message}" in complaint(capsys, code)
        assert not (tmp_path / "other.h5ad").exists()
