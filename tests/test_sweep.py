"""The command vmm-fast sweep: every run once, the same again when it goes on."""

import csv
from dataclasses import asdict

import numpy as np
import pytest

pytest.importorskip("scvi", reason="scvi-tools is not installed")

from support import complaint, make_cells, written

from vmm_fast import cli
from vmm_fast._files import read_json
from vmm_fast.cells import sweep
from vmm_fast.cells.integration import Integration
from vmm_fast.cells.writing import cluster_columns

pytestmark = pytest.mark.filterwarnings("ignore")


def run(path, out, *options):
    command = ["sweep", str(path), "--out", str(out), "--accelerator", "cpu", "--components", "8"]
    command += ["--batch-key", "batch", "--labels-key", "type", "--epochs", "2"]
    return cli.main([*command, "--batch-sizes", "16", "32", "--ratios", "1", "5", *options])


def table(folder):
    with open(folder / "sweep.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_sweep(tmp_path, capsys):
    h5ad = written(tmp_path)
    before = h5ad.read_bytes()
    assert run(h5ad, tmp_path / "out") == 0
    rows = table(tmp_path / "out")
    pairs = [(row["batch_size"], row["ratio"]) for row in rows]
    assert pairs == [("16", "1.0"), ("16", "5.0"), ("32", "1.0"), ("32", "5.0")]
    assert list(rows[0]) == list(sweep.COLUMNS)
    for row in rows:
        assert 1 <= int(row["clusters"]) <= 8
        assert all(np.isfinite(float(value)) for value in row.values())
        assert 0 <= float(row["batch_mixing"]) <= 1.5
    assert len({row["held_out_elbo"] for row in rows}) == 4  # either knob does something
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 10_000
    assert h5ad.read_bytes() == before
    shown = capsys.readouterr().out
    assert "prior learning ratio" in shown
    assert shown.count("\n") >= 4 + 4


@pytest.fixture
def runs(monkeypatch):
    """Settings of the runs, none of which trains; the third is stopped."""
    done = []

    def found(cells, settings, **options):
        done.append(settings)
        if len(done) == 3:
            raise KeyboardInterrupt
        random = np.random.default_rng(settings.batch_size)
        labels, some = np.arange(len(cells)) % 3, random.random(len(cells))
        clusters = cluster_columns(labels, some, some, labels)
        history = {"elbo_validation": [9.0, settings.prior_learning_rate]}
        z = random.normal(size=(len(cells), 2))
        return Integration(None, settings, history, 1.0, 6, z, clusters)

    monkeypatch.setattr(sweep, "integrate", found)
    monkeypatch.setattr(sweep, "_plot", lambda rows, path: path.touch())
    return done


def test_sweep_goes_on(tmp_path, capsys, runs):
    h5ad, stopped = written(tmp_path), tmp_path / "stopped"
    error = complaint(capsys, run(h5ad, stopped), 130)
    assert "go on with: vmm-fast sweep" in error
    assert "--resume" in error
    first = table(stopped)
    assert len(first) == 2
    assert run(h5ad, stopped, "--resume") == 0
    assert len(runs) == 3 + 2
    rows = table(stopped)
    assert rows[:2] == first
    assert [row["held_out_elbo"] for row in rows] == ["-0.001", "-0.005", "-0.001", "-0.005"]
    assert [(one.batch_size, one.prior_learning_rate) for one in runs[2:]] == [
        (32, 0.001),
        (32, 0.001),
        (32, 0.005),
    ]
    # A wider grid: what is there is taken, the rest is run.
    assert run(h5ad, stopped, "--resume", "--ratios", "1", "5", "10") == 0
    assert len(runs) == 5 + 2
    kept = read_json(stopped / sweep.FINISHED)["runs"]
    done = [asdict(one) for one in runs[:2] + runs[3:]]
    assert [row["settings"] for row in kept] == done
    # Of finished runs there are scores alone, no models that could be cut elsewhere.
    error = complaint(capsys, run(h5ad, stopped, "--resume", "--resolution", "2"))
    assert "--resolution must be absent as in the run" in error and len(runs) == 5 + 2
    assert "holds another run" in complaint(capsys, run(h5ad, stopped))
    finished = stopped / sweep.FINISHED
    whole = finished.read_text()
    for damaged in (whole[:-9], whole.replace('"seconds": 1.0', '"seconds": "1"'), "[]", "{}"):
        assert damaged != whole
        finished.write_text(damaged)
        error = complaint(capsys, run(h5ad, stopped, "--resume"))
        assert "is damaged" in error and "start the sweep again with --overwrite" in error


def test_labels_that_are_all_missing_and_a_knob_given_twice(tmp_path, runs):
    adata = make_cells()
    adata.obs["none"] = np.nan
    options = ["--labels-key", "none", "--batch-sizes", "64", "64", "--ratios", "5", "5"]
    assert run(written(tmp_path, adata), tmp_path / "out", *options) == 0
    (row,) = table(tmp_path / "out")
    assert "ari" not in row and len(runs) == 1


def test_batch_mixing():
    random = np.random.default_rng(0)
    z = random.normal(size=(600, 3))
    batches = np.repeat(["a", "b", "c"], [300, 200, 100])
    assert sweep.batch_mixing(z, batches) == pytest.approx(1, abs=0.05)
    apart = z + 20 * (batches == "a")[:, None] - 20 * (batches == "b")[:, None]
    assert sweep.batch_mixing(apart, batches) == 0


def test_settings_of_an_integration_that_a_sweep_replaces_are_noted(tmp_path, capsys, runs):
    config = tmp_path / "settings.toml"
    config.write_text("batch-size = 77\nseed = 3\n")
    run(written(tmp_path), tmp_path / "out", "--config", str(config))
    told = f"note: {config}: a sweep has settings of its own in place of batch-size\n"
    assert told in capsys.readouterr().out
    assert [settings.seed for settings in runs] == [3, 3, 3]
