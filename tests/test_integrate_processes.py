"""The command vmm-fast integrate in two processes of torchrun: one result, stopped and resumed."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from support import integrated, make_cells, written

pytest.importorskip("scvi", reason="scvi-tools is not installed")

from test_integrate import FILES, same_results

from vmm_fast.cells import CellStore
from vmm_fast.cells.processes import Processes, processes_of_run
from vmm_fast.scvi import VMMSCVI

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
OPTIONS = ("--batch-key", "batch", "--components", "5", "--batch-size", "8", "--epochs", "30")


def as_process(monkeypatch, rank, number=2):
    """Set what torchrun sets in the environment of one of its processes."""
    values = {"RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    for name, value in {"TORCHELASTIC_RUN_ID": "none", **values}.items():
        monkeypatch.setenv(name, str(value))


def test_processes_of_run(monkeypatch):
    monkeypatch.setenv("RANK", "3")  # of something else that was started
    assert processes_of_run() == Processes(0, 1, 1)
    as_process(monkeypatch, 1)
    assert processes_of_run() == Processes(1, 2, 2)


@pytest.mark.parametrize("command", ["sweep", "assign", "prepare", "cluster"])
def test_other_commands_are_refused_in_several_processes(command, monkeypatch, tmp_path, capsys):
    from vmm_fast import cli

    as_process(monkeypatch, 1)
    monkeypatch.chdir(tmp_path)
    path = str(written(tmp_path, make_cells()))
    files = [path, path] if command == "assign" else [path]
    assert cli.main([command, *files, "--out", "out.h5ad"]) == 2
    error = capsys.readouterr().err
    assert f"{command}: must run in one process, but torchrun started 2" in error
    assert os.listdir(tmp_path) == ["cells.h5ad"]


def test_only_the_first_process_makes_the_folder_and_prints(monkeypatch, tmp_path, capsys, h5ad):
    from vmm_fast.cells import integration

    as_process(monkeypatch, 1)
    monkeypatch.setattr(integration, "integrate", lambda *args, **options: None)
    assert integrated(h5ad, tmp_path / "out", "--json") == 0
    assert capsys.readouterr() == ("", "") and not (tmp_path / "out").exists()
    assert integrated(h5ad, tmp_path / "out", "--batch-key", "x") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vmm-fast, process 1: {h5ad}: --batch-key x: must be a column of obs")


def test_settings_and_runs_of_other_numbers_of_processes(monkeypatch, tmp_path, capsys, h5ad):
    from vmm_fast.cells import integration

    out, config = tmp_path / "out", tmp_path / "two.toml"
    config.write_text("processes = 2\n")
    with monkeypatch.context() as patch:
        as_process(patch, 0)
        patch.setattr(integration, "integrate", lambda *args, **options: None)
        assert integrated(h5ad, out, "--config", config) == 0
        assert "is of a run in" not in capsys.readouterr().out
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["processes"] == 2
    assert integrated(h5ad, out, "--resume", "--clusters", 2) == 2
    assert (
        "must go on in 2 processes, started by torchrun, but is given 1" in capsys.readouterr().err
    )
    assert json.loads((out / "run.json").read_text()) == record
    assert integrated(h5ad, tmp_path / "one", "--config", config) == 0
    note = f"note: {config} is of a run in 2 processes: in 1 the results differ"
    assert note in capsys.readouterr().out


def test_each_process_has_cells_enough(monkeypatch, tmp_path, capsys, h5ad):
    as_process(monkeypatch, 0, 7)
    assert integrated(h5ad, tmp_path / "out") == 2
    expected = f"vmm-fast, process 0: {h5ad}: must have at least 70 cells for 7 processes, but has"
    assert capsys.readouterr().err.startswith(expected) and not (tmp_path / "out").exists()


def test_more_processes_than_gpus(monkeypatch, tmp_path, capsys, h5ad):
    as_process(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert integrated(h5ad, tmp_path / "out", "--accelerator", "auto") == 2
    expected = "vmm-fast, process 1: torchrun --nproc-per-node must be at most 1, the GPUs of"
    assert capsys.readouterr().err.startswith(expected)


def in_two_processes(folder, out, *options):
    command = ["-m", "vmm_fast.cli", "integrate", "cells.h5ad", "--out", out, *OPTIONS, *options]
    return subprocess.Popen(
        [*TORCHRUN, *command, "--accelerator", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow("starts two processes three times, which import scvi-tools")
@pytest.mark.filterwarnings("ignore")
def test_two_processes_stopped_and_resumed(tmp_path):
    written(tmp_path, make_cells())
    whole = in_two_processes(tmp_path, "whole", "--json")
    output, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    summary = json.loads(output)  # of one process
    assert summary["processes"] == 2 and summary["out"] == "whole"
    assert {path.name for path in (tmp_path / "whole").iterdir()} == FILES
    for line in ("epoch 30/30", "writing the cells"):
        assert errors.count(line) == 1, errors

    # Its output, which nobody reads meanwhile, fits in a pipe until it is stopped.
    checkpoint = tmp_path / "stopped" / "checkpoint.ckpt"
    stopped = in_two_processes(tmp_path, "stopped", "--checkpoint-steps", "3")
    try:
        while not checkpoint.exists() and stopped.poll() is None:
            time.sleep(0.02)
    finally:
        stopped.terminate()  # and torchrun its processes
        _, errors = stopped.communicate()
    assert checkpoint.exists(), errors
    assert torch.load(checkpoint)["epoch"] < 30
    resumed = in_two_processes(tmp_path, "stopped", "--resume")
    _, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    same_results(tmp_path / "whole", tmp_path / "stopped")
    with CellStore(tmp_path / "cells.h5ad") as store:
        model = VMMSCVI.load(
            tmp_path / "whole" / "model", store.sample(60, keys=["batch"]), accelerator="cpu"
        )
    assert len(model.get_clusters()) == 60
