"""Cells on disk, a share for each of two processes: the same steps, one prior, no hanging.

Training that lost a process goes on from its last checkpoint as if nothing had happened.
"""

import math
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from support import scvi_model

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")

import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as multiprocessing  # noqa: E402
from anndata import AnnData  # noqa: E402
from scipy.sparse import csr_matrix  # noqa: E402

from vmm_fast.cells import CellStore  # noqa: E402
from vmm_fast.scvi import VMMSCVI, CellDataModule, Checkpoints, checkpoints, loading, training  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.slow("each run starts two processes"),
]

EPOCHS, STEPS = 2, 12
SECONDS = 300  # to hang
TIMEOUT = timedelta(seconds=2)  # of one who waits for one that hangs


class Watched(training.EmpiricalBayesTrainingPlan):
    """A plan that remembers each step's cells, and sends its process a signal before one step."""

    signal = at = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def training_step(self, batch, *args, **kwargs):
        if self.signal is not None and len(self.seen) == self.at:
            if dist.get_rank() == 1:
                os.kill(os.getpid(), self.signal)
            elif self.signal == signal.SIGSTOP:  # not before, lest a slow start be a hang
                dist.distributed_c10d._set_pg_timeout(TIMEOUT)
        self.seen.append((batch["X"][:, 0].long() - 1).tolist())
        return super().training_step(batch, *args, **kwargs)


class Kept(Checkpoints):
    """Checkpoints that remember after which steps they were written."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.wrote = []

    def _write(self, trainer):
        super()._write(trainer)
        self.wrote.append(trainer.global_step)


def worker(rank, folder, inference, name, signal, at, keep, resume):
    """Train, in process 1 until the signal comes; write what came of it, or the error."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    group = f"file://{folder}/{name}-group{int(resume)}"
    dist.init_process_group("gloo", init_method=group, rank=rank, world_size=2)
    scvi.settings.seed, scvi.settings.logging_dir = rank, folder
    Watched.signal, Watched.at = signal, at
    CellStore.run, loading.WINDOW, checkpoints.STEPS_BETWEEN_LOOKS = 8, 64, 3
    VMMSCVI._training_plan_cls = Watched
    kept = Kept(f"{folder}/{name}.ckpt", **keep[rank])
    store = CellStore(f"{folder}/cells.h5ad")
    some = store.sample(100, keys=["batch"])
    VMMSCVI.setup_anndata(some, batch_key="batch")
    model = VMMSCVI(some, n_components=5, prior_kwargs={"inference": inference})
    try:
        model.train(
            EPOCHS,
            datamodule=CellDataModule(store, store.column("batch").codes, batch_size=16),
            accelerator="cpu",
            devices=2,
            strategy="ddp_find_unused_parameters_true",
            check_val_every_n_epoch=1,
            plan_kwargs={"prior_warmup": 0.2},
            callbacks=[kept],
            ckpt_path=kept.path if resume else None,
            enable_progress_bar=False,
            logger=False,
        )
    except RuntimeError as error:
        with open(f"{folder}/error{rank}", "w") as file:
            file.write(str(error))
        os._exit(1)
    trainer = model.trainer
    found = {
        "state": model.module.state_dict(),
        "seen": trainer.lightning_module.seen,
        "steps": trainer.global_step,
        "losses": {key: trainer.callback_metrics[f"elbo_{key}"] for key in ("train", "validation")},
        "wrote": kept.wrote,
    }
    torch.save(found, f"{folder}/{name}{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# It is time by one of the clocks, which is looked at every three steps.
BY_TIME = [{"seconds": math.inf}, {"seconds": 0}]
BY_STEPS = [{"seconds": math.inf, "steps": 4}] * 2


def start(folder, inference, name, keep, signal=None, at=None, resume=False):
    """Start two processes, which import the packages only once."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["vmm_fast.scvi"])
    options = (str(folder), inference, name, signal, at, keep, resume)
    return multiprocessing.start_processes(
        worker, options, nprocs=2, join=False, start_method="forkserver"
    )


def finished(folder, inference, name, *args, **kwargs):
    """Return the result of each process."""
    started = start(folder, inference, name, *args, **kwargs)
    while not started.join(SECONDS):
        pass
    return [torch.load(folder / f"{name}{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module", params=["gradient", "closed-form"])
def whole(request, tmp_path_factory):
    """Return the folder, the inference and the results of two processes that were not stopped."""
    folder, inference = tmp_path_factory.mktemp("whole"), request.param
    random = np.random.default_rng(0)
    rates = random.gamma(1.0, 4.0, (3, 12)) + 0.1
    counts = random.poisson(rates[random.integers(3, size=200)])
    counts[:, 0] = np.arange(200) + 1  # cell i is the only one with i + 1 counts of gene 0
    adata = AnnData(csr_matrix(counts.astype(np.float32)))
    adata.obs["batch"] = np.array(["a", "b"])[np.arange(200) % 2]
    adata.write_h5ad(folder / "cells.h5ad")
    return folder, inference, finished(folder, inference, "whole", BY_TIME)


def test_each_has_its_own_cells_and_all_one_prior(whole):
    one, other = whole[2]
    for name, value in one["state"].items():
        assert torch.equal(value, other["state"][name]), name
    assert one["state"]["prior_learnt"]
    cells, others = one["seen"], other["seen"]
    assert one["steps"] == other["steps"] == len(cells) == len(others) == STEPS
    assert one["wrote"] == other["wrote"] == [3, 6, 9, 12]
    assert [len(rows) for rows in cells] == [len(rows) for rows in others]
    epochs = [slice(at, at + STEPS // EPOCHS) for at in range(0, STEPS, STEPS // EPOCHS)]
    for epoch in epochs:
        rows = [row for step in cells[epoch] + others[epoch] for row in step]
        assert len(rows) == len(set(rows)) > 150
    assert cells[epochs[0]] != cells[epochs[1]]


def test_a_run_that_lost_a_process_goes_on_to_the_same_bits(whole):
    folder, inference, both = whole
    started = start(folder, inference, "broken", BY_STEPS, signal=signal.SIGKILL, at=9)
    for process in started.processes:
        process.join(SECONDS)
    assert [process.exitcode for process in started.processes] == [1, -signal.SIGKILL]
    error = "process 0 has lost its connection to another of the 2 processes"
    assert (folder / "error0").read_text().startswith(error)
    resumed = finished(folder, inference, "broken", BY_STEPS, resume=True)
    for found, expected in zip(resumed, both, strict=True):
        assert found["seen"] == expected["seen"][8:]  # amid the second epoch
        assert found["wrote"] == [12]
        for name, value in expected["state"].items():
            assert torch.equal(found["state"][name], value), name
        assert found["losses"] == expected["losses"]


def test_where_one_hangs_the_other_ends(whole):
    folder, inference, _ = whole
    waiting, hanging = start(
        folder, inference, "hanging", BY_TIME, signal=signal.SIGSTOP, at=2
    ).processes
    waiting.join(SECONDS)
    hanging.kill()
    hanging.join(SECONDS)
    error = "process 0 has waited in vain for process 1, which hangs"
    assert (folder / "error0").read_text().startswith(error)
    assert waiting.exitcode == 1


# --- started by Lightning ---

TWO_PROCESSES = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from support import TRAIN, scvi_model
from vmm_fast.scvi import VMMSCVI
found = scvi_model(VMMSCVI, n_components=12)
train = {**TRAIN, "batch_size": 32, "strategy": "ddp_find_unused_parameters_true"}
found.train(2, devices=2, **train)
rank = os.environ.get("LOCAL_RANK", "0")
torch.save(found.module.state_dict(), f"{sys.argv[2]}/rank{rank}.pt")
"""


def test_two_processes_have_one_prior(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    run = subprocess.run(
        [sys.executable, script, Path(__file__).parent, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    start = scvi_model(VMMSCVI, n_components=12).module.state_dict()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert not torch.equal(first["prior.raw_precision"], start["prior.raw_precision"])
