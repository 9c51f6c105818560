"""The examples run."""

import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch, capsys):
    """Run an example in this process; return its output."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_own_vae(example):
    pytest.importorskip("sklearn", reason="the example's digits come with scikit-learn")
    assert ", clusters: " in example("own_vae.py", "2")


@pytest.mark.filterwarnings("ignore")
def test_lightning_module(example):
    pytest.importorskip("lightning", reason="lightning is not installed")
    pytest.importorskip("sklearn", reason="the example's digits come with scikit-learn")
    sizes = re.search(
        r"clusters; held-out images in each: \[(.*)\]", example("lightning_module.py", "2")
    )
    assert sum(map(int, sizes[1].split(","))) == 297


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """Change to a folder that holds 200 cells in two batches; return the folder."""
    pytest.importorskip("scvi", reason="scvi-tools is not installed")
    from anndata import AnnData

    counts = np.random.default_rng(0).poisson(3.0, (200, 12)).astype(np.float32)
    adata = AnnData(counts)
    adata.obs["batch"] = np.array(["a", "b"])[np.arange(200) % 2]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.chdir(tmp_path)
    return tmp_path


ATLAS = ("cells.h5ad", "--batch-size", "32", "--components", "5", "--out", "model")


def check_model(cells):
    """Check that the model is the only file left, and that it assigns every cell."""
    from vmm_fast.cells import CellStore
    from vmm_fast.scvi import VMMSCVI

    assert {path.name for path in cells.iterdir()} == {"cells.h5ad", "model"}
    with CellStore(cells / "cells.h5ad") as store:
        model = VMMSCVI.load(cells / "model", store.sample(200, keys=["batch"]))
    assert len(model.get_clusters()) == 200


@pytest.mark.filterwarnings("ignore")
def test_atlas_in_one_process(example, cells, capsys):
    printed = example("atlas.py", *ATLAS, "--epochs", "1", "--resume")
    assert "model.ckpt was not written yet: starts from the beginning" in printed
    assert "model: trained with 1 process\n" in printed
    check_model(cells)
    with pytest.raises(SystemExit):
        example("atlas.py", *ATLAS)
    assert "model exists: remove it" in capsys.readouterr().err
    checkpoint = cells / "model.ckpt"
    checkpoint.touch()
    with pytest.raises(SystemExit):
        example("atlas.py", *ATLAS)
    assert "model.ckpt is of a run that was stopped: --resume it" in capsys.readouterr().err
    assert checkpoint.exists()


def in_two_processes(folder, *options):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    return subprocess.Popen(
        [sys.executable, *torchrun, EXAMPLES / "atlas.py", *ATLAS, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow("starts two processes twice, which import scvi-tools")
@pytest.mark.filterwarnings("ignore")
def test_atlas_in_two_processes_stopped_and_resumed(cells):
    checkpoint = cells / "model.ckpt"
    often = ("--checkpoint-seconds", "0")
    # Its output, which nobody reads meanwhile, fits in a pipe until it is stopped.
    # What was stopped before the first checkpoint is resumed from the beginning.
    stopped = in_two_processes(cells, "--epochs", "10000", "--resume", *often)
    try:
        while not checkpoint.exists() and stopped.poll() is None:
            time.sleep(0.05)
    finally:
        stopped.terminate()  # and torchrun its processes
        output, _ = stopped.communicate()
    assert checkpoint.exists(), output
    assert output.count("model.ckpt was not written yet: starts from the beginning") == 1
    epochs = str(torch.load(checkpoint)["epoch"] + 2)
    run = in_two_processes(cells, "--epochs", epochs, "--resume")
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert output.count("model: trained with 2 processes") == 1
    check_model(cells)
