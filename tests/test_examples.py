"""The examples run."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_vae(monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="the example's digits come with scikit-learn")
    monkeypatch.setattr(sys, "argv", ["own_vae.py", "2"])
    runpy.run_path(str(EXAMPLES / "own_vae.py"), run_name="__main__")
    assert "clusters in use" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_atlas_in_two_processes(tmp_path):
    pytest.importorskip("scvi", reason="scvi-tools is not installed")
    from test_several_processes import write_cells

    from vmm_fast.scvi import VMMSCVI, CellStore

    write_cells(tmp_path / "cells.h5ad")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    options = ("--epochs", "1", "--batch-size", "32", "--components", "5", "--out", "model")
    run = subprocess.run(
        [sys.executable, *torchrun, EXAMPLES / "atlas.py", "cells.h5ad", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("model: trained with 2 processes") == 1
    with CellStore(tmp_path / "cells.h5ad") as store:
        model = VMMSCVI.load(tmp_path / "model", store.sample(200, keys=["batch"]))
    assert len(model.get_clusters()) == 200
