"""Cells on disk, a share for each of two processes: the same steps, one prior, no hanging."""

import os
import signal

import numpy as np
import pytest
import torch

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")

import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as multiprocessing  # noqa: E402
from anndata import AnnData  # noqa: E402
from scipy.sparse import csr_matrix  # noqa: E402

from vmm_fast.scvi import VMMSCVI, CellDataModule, CellStore, training  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]

BATCH_SIZE, EPOCHS, DIES_AT = 16, 2, 3
SECONDS = 300  # to hang


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
    """Remembers the cells of each step."""

    dies = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def training_step(self, batch, *args, **kwargs):
        self.seen.append((batch["X"][:, 0].long() - 1).tolist())
        if self.dies and len(self.seen) == DIES_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, *args, **kwargs)


def worker(rank, folder, inference, dies):
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    scvi.settings.seed, scvi.settings.logging_dir = rank, folder
    Watched.dies = dies and rank == 1
    CellStore.run = 8
    store = CellStore(f"{folder}/cells.h5ad")
    some = store.sample(100, keys=["batch"])
    VMMSCVI.setup_anndata(some, batch_key="batch")
    VMMSCVI._training_plan_cls = Watched
    model = VMMSCVI(some, n_components=5, prior_kwargs={"inference": inference})
    try:
        model.train(
            EPOCHS,
            datamodule=CellDataModule(store, store.column("batch").codes, batch_size=BATCH_SIZE),
            accelerator="cpu",
            devices=2,
            strategy="ddp_find_unused_parameters_true",
            check_val_every_n_epoch=1,
            plan_kwargs={"prior_warmup": 0.2},
            enable_progress_bar=False,
            logger=False,
        )
    except RuntimeError as error:
        with open(f"{folder}/error{rank}", "w") as file:
            file.write(str(error))
        os._exit(1)
    seen = model.trainer.lightning_module.seen
    torch.save((model.module.state_dict(), seen, model.trainer.global_step), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def start(folder, inference, dies=False):
    """Two processes; the packages are imported once for all."""
    write_cells(folder / "cells.h5ad")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["vmm_fast.scvi"])
    return multiprocessing.start_processes(
        worker, (str(folder), inference, dies), nprocs=2, join=False, start_method="forkserver"
    )


@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
def test_each_has_its_own_cells_and_all_one_prior(tmp_path, inference):
    started = start(tmp_path, inference)
    while not started.join(SECONDS):
        pass
    (first, cells, steps), (second, others, steps_too) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(2)
    )
    for name, value in first.items():
        # The decoder's batch normalisation follows each process's own cells.
        if not (name.startswith("decoder") and "running" in name):
            assert torch.equal(value, second[name]), name
    assert first["prior_learnt"]
    assert steps == steps_too == len(cells) == len(others)
    assert [len(rows) for rows in cells] == [len(rows) for rows in others]
    for epoch in range(EPOCHS):
        of_epoch = slice(epoch * steps // EPOCHS, (epoch + 1) * steps // EPOCHS)
        rows = [row for step in cells[of_epoch] + others[of_epoch] for row in step]
        assert len(rows) == len(set(rows)) > 150
    assert cells[: steps // EPOCHS] != cells[steps // EPOCHS :]


def test_where_one_dies_the_other_ends(tmp_path):
    started = start(tmp_path, "gradient", dies=True)
    for process in started.processes:
        process.join(SECONDS)
    assert [process.exitcode for process in started.processes] == [1, -signal.SIGKILL]
    error = "process 0 has lost its connection to another of the 2 processes"
    assert (tmp_path / "error0").read_text().startswith(error)
