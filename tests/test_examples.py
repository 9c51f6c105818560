"""The examples run."""

import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_vae(monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="the example's digits come with scikit-learn")
    monkeypatch.setattr(sys, "argv", ["own_vae.py", "2"])
    runpy.run_path(str(EXAMPLES / "own_vae.py"), run_name="__main__")
    assert "clusters in use" in capsys.readouterr().out


def atlas(folder, *options):
    """Start the example in two processes on the cells in a folder."""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    given = ("--batch-size", "32", "--components", "5", "--out", "model", *options)
    return subprocess.Popen(
        [sys.executable, *torchrun, EXAMPLES / "atlas.py", "cells.h5ad", *given],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.filterwarnings("ignore")
def test_atlas_in_two_processes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("scvi", reason="scvi-tools is not installed")
    import torch
    from test_several_processes import write_cells

    from vmm_fast.scvi import VMMSCVI, CellStore

    write_cells(tmp_path / "cells.h5ad")
    checkpoint = tmp_path / "model.ckpt"
    often = ("--checkpoint-seconds", "0")
    # Its output, which nobody reads meanwhile, fits in a pipe until it is stopped.
    # What was stopped before the first checkpoint is resumed from the beginning.
    stopped = atlas(tmp_path, "--epochs", "10000", "--resume", *often)
    try:
        while not checkpoint.exists() and stopped.poll() is None:
            time.sleep(0.05)
    finally:
        stopped.terminate()  # and torchrun its processes
        output, _ = stopped.communicate()
    assert checkpoint.exists(), output
    assert output.count("model.ckpt was not written yet: starts from the beginning") == 1
    epochs = ("--epochs", str(torch.load(checkpoint)["epoch"] + 2))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["atlas.py", "cells.h5ad", "--out", "model", *epochs])

    def refused(message):
        with pytest.raises(SystemExit):
            runpy.run_path(str(EXAMPLES / "atlas.py"), run_name="__main__")
        assert message in capsys.readouterr().err

    refused("model.ckpt is of a run that was stopped: --resume it")
    assert checkpoint.exists()
    run = atlas(tmp_path, *epochs, "--resume")
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert output.count("model: trained with 2 processes") == 1 and not checkpoint.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"cells.h5ad", "model"}
    refused("model exists: remove it")
    with CellStore(tmp_path / "cells.h5ad") as store:
        model = VMMSCVI.load(tmp_path / "model", store.sample(200, keys=["batch"]))
    assert len(model.get_clusters()) == 200
