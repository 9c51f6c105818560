"""Cells on disk, a share for each of two processes: the same steps, one prior, no hanging.

Training that lost a process goes on from its last checkpoint as if nothing had happened.
"""

import math
import os
import signal
from datetime import timedelta

import numpy as np
import pytest
import torch

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")

import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as multiprocessing  # noqa: E402
from anndata import AnnData  # noqa: E402
from scipy.sparse import csr_matrix  # noqa: E402

from vmm_fast.data import InputError  # noqa: E402
from vmm_fast.inference.processes import telling_of_lost_processes  # noqa: E402
from vmm_fast.scvi import (  # noqa: E402
    VMMSCVI,
    CellDataModule,
    CellStore,
    Checkpoints,
    checkpoints,
    training,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]

BATCH_SIZE, EPOCHS = 16, 2
SECONDS = 300  # to hang
TIMEOUT = timedelta(seconds=2)  # of one who waits for one that hangs


def write_cells(path, number=200, genes=12):
    """Cell i is the only one with i + 1 counts of gene 0."""
    random = np.random.default_rng(0)
    rates = random.gamma(1.0, 4.0, (3, genes)) + 0.1
    counts = random.poisson(rates[random.integers(3, size=number)])
    counts[:, 0] = np.arange(number) + 1
    adata = AnnData(csr_matrix(counts.astype(np.float32)))
    adata.obs["batch"] = np.array(["a", "b"])[np.arange(number) % 2]
    adata.write_h5ad(path)


class Watched(training.EmpiricalBayesTrainingPlan):
    """Remembers the cells of each step, before one of which it sends its own process a signal."""

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
    """Remembers after which steps it has written."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.wrote = []

    def _write(self, trainer):
        super()._write(trainer)
        self.wrote.append(trainer.global_step)


def make_model(store, inference):
    some = store.sample(100, keys=["batch"])
    VMMSCVI.setup_anndata(some, batch_key="batch")
    return VMMSCVI(some, n_components=5, prior_kwargs={"inference": inference})


def train(model, store, **options):
    model.train(
        EPOCHS,
        datamodule=CellDataModule(store, store.column("batch").codes, batch_size=BATCH_SIZE),
        accelerator="cpu",
        check_val_every_n_epoch=1,
        plan_kwargs={"prior_warmup": 0.2},
        enable_progress_bar=False,
        logger=False,
        **options,
    )


def worker(rank, folder, inference, name, signal, at, keep, resume):
    """Train, in process 1 until the signal comes; write what came of it, or the error."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{name}-group", rank=rank, world_size=2
    )
    scvi.settings.seed, scvi.settings.logging_dir = rank, folder
    Watched.signal, Watched.at = signal, at
    CellStore.run, checkpoints.STEPS_BETWEEN_LOOKS = 8, 3
    VMMSCVI._training_plan_cls = Watched
    kept = Kept(f"{folder}/{name}.ckpt", **keep[rank]) if keep else None
    store = CellStore(f"{folder}/cells.h5ad")
    model = make_model(store, inference)
    try:
        train(
            model,
            store,
            devices=2,
            strategy="ddp_find_unused_parameters_true",
            callbacks=[kept] if kept else [],
            ckpt_path=kept.path if resume else None,
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
        "wrote": kept and kept.wrote,
    }
    torch.save(found, f"{folder}/{name}{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def start(folder, inference="gradient", name="run", signal=None, at=None, keep=None, resume=False):
    """Two processes; the packages are imported once for all."""
    if not (folder / "cells.h5ad").exists():
        write_cells(folder / "cells.h5ad")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["vmm_fast.scvi"])
    options = (str(folder), inference, name, signal, at, keep, resume)
    return multiprocessing.start_processes(
        worker, options, nprocs=2, join=False, start_method="forkserver"
    )


def finished(folder, *args, **kwargs):
    """What came of each process."""
    started = start(folder, *args, **kwargs)
    while not started.join(SECONDS):
        pass
    name = kwargs.get("name", "run")
    return [torch.load(folder / f"{name}{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
def test_each_has_its_own_cells_and_all_one_prior(tmp_path, inference):
    one, other = finished(tmp_path, inference)
    for name, value in one["state"].items():
        assert torch.equal(value, other["state"][name]), name
    assert one["state"]["prior_learnt"]
    steps, cells, others = one["steps"], one["seen"], other["seen"]
    assert steps == other["steps"] == len(cells) == len(others)
    assert [len(rows) for rows in cells] == [len(rows) for rows in others]
    for epoch in range(EPOCHS):
        of_epoch = slice(epoch * steps // EPOCHS, (epoch + 1) * steps // EPOCHS)
        rows = [row for step in cells[of_epoch] + others[of_epoch] for row in step]
        assert len(rows) == len(set(rows)) > 150
    assert cells[: steps // EPOCHS] != cells[steps // EPOCHS :]


def test_where_one_dies_the_other_ends(tmp_path):
    started = start(tmp_path, signal=signal.SIGKILL, at=2)
    for process in started.processes:
        process.join(SECONDS)
    assert [process.exitcode for process in started.processes] == [1, -signal.SIGKILL]
    error = "process 0 has lost its connection to another of the 2 processes"
    assert (tmp_path / "error0").read_text().startswith(error)


def test_where_one_hangs_the_other_ends(tmp_path):
    started = start(tmp_path, signal=signal.SIGSTOP, at=2)
    waiting, hanging = started.processes
    waiting.join(SECONDS)
    hanging.kill()
    hanging.join(SECONDS)
    error = "process 0 has waited in vain for process 1, which hangs"
    assert (tmp_path / "error0").read_text().startswith(error)
    assert waiting.exitcode == 1


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(
    "error",
    [
        "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation",
        "Application timeout caused pair closure",
    ],
)
def test_a_timeout_tells_who_hangs_where_it_is_known(monkeypatch, processes, error):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: processes)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    who = {2: "for process 0, which hangs", 3: "for another of the 3, which hangs"}[processes]
    with pytest.raises(RuntimeError, match=who), telling_of_lost_processes():
        raise RuntimeError(error)


@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
def test_a_run_that_lost_a_process_goes_on_to_the_same_bits(tmp_path, inference):
    # It is time by one of the clocks, which is looked at every three steps.
    by_time = [{"seconds": math.inf}, {"seconds": 0}]
    whole = finished(tmp_path, inference, name="whole", keep=by_time)
    assert [found["steps"] for found in whole] == [12, 12]
    assert [found["wrote"] for found in whole] == [[3, 6, 9, 12]] * 2

    by_steps = [{"seconds": math.inf, "steps": 4}] * 2
    options = {"name": "broken", "keep": by_steps}
    started = start(tmp_path, inference, signal=signal.SIGKILL, at=9, **options)
    for process in started.processes:
        process.join(SECONDS)
    assert [process.exitcode for process in started.processes] == [1, -signal.SIGKILL]
    (tmp_path / "broken-group").unlink()
    resumed = finished(tmp_path, inference, resume=True, **options)
    for found, expected in zip(resumed, whole, strict=True):
        assert found["seen"] == expected["seen"][8:]  # amid the second epoch
        assert found["wrote"] == [12]
        for name, value in expected["state"].items():
            assert torch.equal(found["state"][name], value), name
        assert found["losses"] == expected["losses"]


def test_what_cannot_be_gone_on_from(tmp_path):
    write_cells(tmp_path / "cells.h5ad")
    path = tmp_path / "kept.ckpt"
    with CellStore(tmp_path / "cells.h5ad") as store:
        train(make_model(store, "gradient"), store, callbacks=[Checkpoints(path)])

        def refused(message):
            with pytest.raises(InputError, match=rf"kept\.ckpt: {message}"):
                train(
                    make_model(store, "gradient"),
                    store,
                    callbacks=[Checkpoints(tmp_path / "other.ckpt")],
                    ckpt_path=path,
                )

        whole = torch.load(path)
        states = whole.pop(checkpoints.STATES)
        torch.save(whole, path)
        refused("must be a checkpoint with the state of random numbers, has none")
        torch.save({**whole, checkpoints.STATES: 2 * states}, path)
        refused("must go on in as many processes as wrote it, 2, is given 1")
        path.write_bytes(path.read_bytes()[:1000])
        refused("is damaged")
        path.unlink()
        refused("must be a checkpoint to go on from, is no file")
