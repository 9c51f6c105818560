"""The command vmm-fast sweep: every run once, the same again when it goes on."""

import csv
import json

import numpy as np
import pytest

pytest.importorskip("scvi", reason="scvi-tools is not installed")

import anndata
from test_integrate import complaint, written

from vmm_fast import cli
from vmm_fast.scvi import sweep

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
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 10_000
    assert h5ad.read_bytes() == before
    shown = capsys.readouterr().out
    assert "prior learning ratio" in shown
    assert shown.count("\n") >= 4 + 4


def test_sweep_goes_on(tmp_path, monkeypatch, capsys):
    h5ad = written(tmp_path)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(h5ad, whole) == 0
    integrate, calls = sweep.integrate, []

    def third_is_stopped(*arguments, **options):
        calls.append(arguments[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return integrate(*arguments, **options)

    monkeypatch.setattr(sweep, "integrate", third_is_stopped)
    capsys.readouterr()
    error = complaint(capsys, run(h5ad, stopped), 130)
    assert "go on with: vmm-fast sweep" in error
    assert "--resume" in error
    assert table(stopped) == table(whole)[:2]
    assert run(h5ad, stopped, "--resume") == 0
    assert len(calls) == 3 + 2
    assert table(stopped) == table(whole)
    # A wider grid: what is there is taken, the rest is run.
    assert run(h5ad, stopped, "--resume", "--ratios", "1", "5", "10") == 0
    assert len(calls) == 5 + 2
    assert len(json.loads((stopped / sweep.FINISHED).read_text())) == 6
    assert "holds another run" in complaint(capsys, run(h5ad, stopped))
    finished = stopped / sweep.FINISHED
    finished.write_bytes(finished.read_bytes()[:-9])
    assert "sweep.json: is damaged" in complaint(capsys, run(h5ad, stopped, "--resume"))


def test_labels_that_are_all_missing(tmp_path):
    h5ad = written(tmp_path)
    adata = anndata.read_h5ad(h5ad)
    adata.obs["none"] = np.nan
    adata.write_h5ad(h5ad)
    options = ["--labels-key", "none", "--batch-sizes", "64", "64", "--ratios", "5", "5"]
    assert run(h5ad, tmp_path / "out", *options) == 0
    (row,) = table(tmp_path / "out")
    assert "ari" not in row


def test_batch_mixing():
    random = np.random.default_rng(0)
    z = random.normal(size=(600, 3))
    batches = np.repeat(["a", "b", "c"], [300, 200, 100])
    assert sweep.batch_mixing(z, batches) == pytest.approx(1, abs=0.05)
    apart = z + 20 * (batches == "a")[:, None] - 20 * (batches == "b")[:, None]
    assert sweep.batch_mixing(apart, batches) == 0
