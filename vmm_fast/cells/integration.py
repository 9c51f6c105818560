"""From counts to an integrated embedding with clusters: train, assign every cell, write.

The model is trained on nine tenths of the cells and, if asked to, on the most variable genes alone.
The loss of the other cells shows whether it still improves. Labels only colour and score.
Clusters are groups of the model's components (:mod:`vmm_fast.clusters`); both are numbered by how
many cells they hold, so "0" is the largest.
"""

from __future__ import annotations

import io
import logging
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import scvi
import torch
from anndata import AnnData
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from scipy.sparse import csr_matrix
from scvi import REGISTRY_KEYS
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor
from torch.nn.functional import one_hot

from vmm_fast._cut import Cut
from vmm_fast._errors import InputError
from vmm_fast._files import write_atomically
from vmm_fast._schema import RATE, check, flag, list_of, number, optional, table, text, whole
from vmm_fast._stopping import Terminated
from vmm_fast._text import counted
from vmm_fast.cells.names import notes_on_genes
from vmm_fast.cells.preparing import cells_bar
from vmm_fast.cells.reading import batches_of, column, counts_of, without_batch
from vmm_fast.cells.store import CellStore, notes_on_omissions
from vmm_fast.cells.writing import (
    COLUMNS,
    ROWS,
    cluster_columns,
    write_adata,
    write_results,
    write_table,
)
from vmm_fast.clusters import Clusters, Confusion
from vmm_fast.metrics import ACTIVE_SHARE
from vmm_fast.scvi.checkpoints import CheckpointFile, Checkpoints
from vmm_fast.scvi.loading import (
    WINDOW,
    CellBatches,
    CellDataModule,
    MemoryCells,
    window_of,
)
from vmm_fast.scvi.model import VMMSCVI
from vmm_fast.scvi.module import PRIOR_LEARNING_RATE, VMMVAE
from vmm_fast.scvi.pseudo_cells import Cells

__all__ = [
    "RESULTS",
    "UNKNOWN_BATCH",
    "Integration",
    "OnDisk",
    "Settings",
    "assigned",
    "integrate",
    "latent_means",
    "make_adata",
    "notes_on_cell_names",
    "quiet",
    "set_clusters",
    "training_cells",
    "training_cells_on_disk",
]

RESULTS = {
    "cells.h5ad": "the cells with X_vmm, vmm_cluster, its probability and entropy (nats)",
    "clusters.csv": "cluster, its probability, entropy and component of every cell",
    "model": "what VMMSCVI.load and vmm-fast assign take",
    "report.html": "embedding, clusters, marker genes, curves and settings; for a browser",
}
LEAST_CELLS = 10  # one is held out and nine are trained on
MANY_GENES = 10_000  # where selecting some is worth a note
CHECKPOINT_SECONDS = 30  # between two checkpoints
BAR_SECONDS = 0.5  # between two updates of the progress bar
SAMPLE = 20_000  # cells drawn from disk for pseudo-cells, the choice of genes and the report
UNKNOWN_BATCH = -1  # of a cell whose batch is unknown: it is encoded as of all in equal shares
DENDROGRAM = "dendrogram_vmm_cluster"  # the key of uns where scanpy looks for it
EARLIER = "obs has the clusters of an earlier run, the results have this one's instead"


@dataclass(frozen=True, kw_only=True)
class Settings(Cut):
    """Settings of a run: all that it depends on besides its cells, and the column of labels."""

    batch_key: Annotated[str | None, optional(text)]
    layer: Annotated[str | None, optional(text)]
    labels_key: Annotated[str | None, optional(text)]
    genes: Annotated[int | None, optional(whole(1))]
    epochs: Annotated[int, whole(1)]
    latent_dim: Annotated[int, whole(1)] = 10
    batch_size: Annotated[int, whole(2)] = 128
    learning_rate: Annotated[float, RATE] = 1e-3
    prior_learning_rate: Annotated[float, RATE] = PRIOR_LEARNING_RATE
    seed: Annotated[int, whole(0, 2**32 - 1)] = 0
    # Whether counts are read from disk while training, which changes the order of the cells.
    on_disk: Annotated[bool, flag] = False

    @classmethod
    def suited_to(cls, cells: AnnData | CellStore, **given: Any) -> Settings:
        """Return settings in which the number of cells determines what is not given, or None.

        Raises
        ------
        InputError
            If there are too few cells, more components than cells that they start as, or more
            clusters than components.
        """
        number = cells.n_obs
        if number < LEAST_CELLS:
            raise InputError(
                f"must have at least {LEAST_CELLS} cells to be integrated, but has {number}"
            )
        if (given.get("components") or 0) > number:
            raise InputError(
                f"--components must be at most {number}, the cells that pseudo-inputs start as, "
                f"but is {given['components']}"
            )
        suited: dict[str, Any] = {
            "batch_key": None,
            "layer": None,
            "labels_key": None,
            "genes": None,
            # At most as many steps as by scvi-tools' default: 400 epochs of 20,000 cells.
            "epochs": max(1, min(100, round(400 * 20_000 / number))),
            "components": min(100, max(10, number // 20)),
        }
        return cls(**suited | {name: value for name, value in given.items() if value is not None})


# --- the cells to train on ---


class OnDisk(NamedTuple):
    """All cells on disk, and which of them the model is made with.

    Attributes
    ----------
    store : CellStore
    batches : ndarray of int [cells]
        Index of each cell's batch.
    genes : ndarray of int or None
        Columns of the store to train on; None for all.
    rows : ndarray of int
        The cells that the model is made with, as rows of the store.
    """

    store: CellStore
    batches: np.ndarray
    genes: np.ndarray | None
    rows: np.ndarray


def training_cells(adata: AnnData, settings: Settings) -> tuple[AnnData, list[str]]:
    """Return the cells to train on, with the chosen genes and their batches, and notes on them.

    Raises
    ------
    InputError
        If the values are not counts, or a key is missing or cannot be used.
    """
    _check_keys(settings)
    counts = csr_matrix(counts_of(adata, settings.layer, np.float32), dtype=np.float32)
    notes = [EARLIER] if "vmm_cluster" in adata.obs else []
    notes += notes_on_genes(adata.var_names)
    obs = pd.DataFrame(index=adata.obs_names)
    if settings.labels_key is not None:
        column(adata, "--labels-key", settings.labels_key)
    if settings.batch_key is not None:
        obs[settings.batch_key] = batches = batches_of(adata, settings.batch_key)
        notes += _notes_on_batches(settings.batch_key, batches.value_counts())
    depth, detected = counts.sum(1).A1, counts.sum(0).A1
    notes += _notes_on_counts(int((depth == 0).sum()), detected) + notes_on_cell_names(adata)
    whole = make_adata(counts, obs, adata.var_names, settings.layer)
    chosen = _variable_genes(whole, settings)
    if settings.genes is None and adata.n_vars > MANY_GENES:
        notes.append(f"trained on all {adata.n_vars:,} genes; --genes 2000 is faster")
    cells = whole[:, chosen].copy()
    if number := int((_counts(cells, settings.layer).sum(1).A1 == 0).sum() - (depth == 0).sum()):
        notes.append(f"{number:,} more have none in the genes that are trained on")
    return cells, notes


def training_cells_on_disk(
    store: CellStore, settings: Settings
) -> tuple[AnnData, OnDisk, list[str]]:
    """Return some cells of a store to make the model with, where all of them are, and notes.

    Every cell is read once, so that errors and notes come before training. See
    :func:`training_cells`.
    """
    _check_keys(settings)
    notes = [EARLIER] if "vmm_cluster" in store.dtypes else []
    notes += notes_on_genes(store.var_names)
    if settings.labels_key is not None:
        store.column(settings.labels_key, "--labels-key")
    if settings.batch_key is None:
        batches = pd.Categorical.from_codes(np.zeros(store.n_obs, np.int8), ["0"])
    else:
        batches = store.column(settings.batch_key, "--batch-key")
        if missing := int((batches.codes < 0).sum()):
            raise InputError(without_batch(settings.batch_key, missing, store.n_obs))
        notes += _notes_on_batches(settings.batch_key, pd.Series(batches).value_counts())
    empty, detected = 0, np.zeros(store.n_vars)
    step = window_of(store)
    for start in range(0, store.n_obs, step):
        stop = min(start + step, store.n_obs)
        counts = store.read(start, stop)
        empty += int((counts.sum(1) == 0).sum())  # zeros may be stored
        detected += counts.sum(0).A1
    notes += _notes_on_counts(empty, detected) + notes_on_cell_names(store)
    notes += notes_on_omissions("obs and var", ["counts", *store.others])
    keys = [] if settings.batch_key is None else [settings.batch_key]
    number = max(SAMPLE, 2 * settings.components)  # pseudo-cells start from some of them
    sample = store.sample(number, keys=keys, seed=settings.seed)
    obs, genes_of = sample.obs[keys], store.var_names
    chosen = _variable_genes(make_adata(sample.X, obs, genes_of, settings.layer), settings)
    # A view of the sample would lose the categories of batches that none of its cells has.
    some = make_adata(sample.X[:, chosen], obs.copy(), genes_of[chosen], settings.layer)
    genes = None if chosen.all() else np.flatnonzero(chosen)
    on_disk = OnDisk(store, batches.codes, genes, sample.uns["rows"])
    return some, on_disk, notes


def _check_keys(settings: Settings) -> None:
    for option, key in (("--batch-key", settings.batch_key), ("--labels-key", settings.labels_key)):
        if key in COLUMNS:
            raise InputError(
                f"{option} {key}: must be another column, results are written to this one; rename "
                "it"
            )


def _notes_on_batches(key: str, sizes: pd.Series) -> list[str]:
    """Return notes on small batches, given their sizes; refuse a batch for each cell."""
    sizes = sizes[sizes > 0]
    if len(sizes) == sizes.sum():
        raise InputError(
            f"--batch-key {key}: must name batches, but has another value for every cell"
        )
    notes = []
    if len(sizes) == 1:
        notes.append("one batch alone: there is nothing to integrate, cells are clustered")
    single = [str(name) for name in sizes.index[sizes == 1]]
    if single:
        one = len(single) == 1
        notes.append(
            f"{'a batch' if one else f'{len(single)} batches'} of one cell: "
            f"{', '.join(single[:5])}{', ...' if len(single) > 5 else ''}"
        )
    return notes


def _notes_on_counts(empty: int, detected: np.ndarray) -> list[str]:
    """Return notes on cells and genes without counts; refuse counts that are all 0."""
    if not detected.any():
        raise InputError("must hold counts above 0, all are 0")
    notes = []
    if empty:
        notes.append(f"{empty:,} {'cell has' if empty == 1 else 'cells have'} no counts at all")
    if number := int((detected == 0).sum()):
        notes.append(f"{number:,} {'gene has' if number == 1 else 'genes have'} no counts at all")
    return notes


def notes_on_cell_names(cells: AnnData | CellStore) -> list[str]:
    """Return a note on cells that share their name with another cell, if there are any."""
    if isinstance(cells, CellStore):
        names = np.empty(cells.n_obs, dtype=np.uint64)
        for start in range(0, cells.n_obs, ROWS):
            part = cells.obs_names(start, min(start + ROWS, cells.n_obs))
            names[start : start + len(part)] = pd.util.hash_array(part, categorize=False)
        same = cells.n_obs - len(np.unique(names))
    else:
        same = int(cells.obs_names.duplicated().sum())
    if not same:
        return []
    have = "has" if same == 1 else "have"
    return [f"{counted(same, 'cell')} {have} a name that another has, too; results are in order"]


def make_adata(counts: Any, obs: Any, genes: Any, layer: str | None) -> AnnData:
    """Return an AnnData with the counts in the given layer, or in X, as the input has them."""
    var = pd.DataFrame(index=genes)
    if layer is None:
        return AnnData(counts, obs, var)
    return AnnData(obs=obs, var=var, layers={layer: counts})


def _counts(adata: AnnData, layer: str | None) -> Any:
    return adata.X if layer is None else adata.layers[layer]


def _variable_genes(adata: AnnData, settings: Settings) -> np.ndarray:
    if settings.genes is None or settings.genes >= adata.n_vars:
        return np.ones(adata.n_vars, dtype=bool)
    from scanpy.experimental.pp import highly_variable_genes

    with quiet():
        found = highly_variable_genes(
            adata,
            flavor="pearson_residuals",
            n_top_genes=settings.genes,
            batch_key=settings.batch_key,
            layer=settings.layer,
            inplace=False,
        )
    chosen: np.ndarray = found["highly_variable"].to_numpy()
    return chosen


# --- training ---


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings, logs and printing of scvi-tools and Lightning from the terminal."""
    loggers = [
        logging.getLogger(name) for name in ("scvi", "lightning.pytorch", "lightning.fabric")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _CheckpointFile(CheckpointFile):
    """A checkpoint file whose errors say what to do on the command line."""

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            checkpoint = super().load_checkpoint(path, *args, **kwargs)
            check(
                str(path), checkpoint["callbacks"], table({_Progress.__qualname__: check_progress})
            )
        except ValueError as error:
            raise InputError(f"{error}; start the run again with --overwrite") from None
        return checkpoint


def check_progress(name: str, state: Any) -> None:
    """Raise ValueError unless a value is a state of :class:`_Progress`."""
    seconds = number("of at least 0", lambda x: x >= 0)
    table({"seconds": seconds, "epoch": whole(), "history": table({})}, None)(name, state)
    epochs = state["epoch"]
    curves = {"elbo_train": number(), "elbo_validation": measured} if epochs else {}
    values = {key: list_of(rule, epochs) for key, rule in curves.items()}
    table(values, list_of(measured))(f"{name}.history", state["history"])


def measured(name: str, value: Any) -> None:
    """Raise ValueError unless a value is a number; the loss of held-out cells may be any."""
    if not isinstance(value, float):
        raise ValueError(f"{name} must be a number, but is {value!r}")


class _Progress(Callback):
    """A callback that records the history of training and shows the bar.

    Checkpoints contain the history.
    """

    def __init__(self, progress: bool) -> None:
        self.progress = progress
        self.bar: Any = None
        self.history: dict[str, list[float]] = {}
        self.seconds = 0.0
        self.epoch = 0
        self.stopped_by: type[KeyboardInterrupt] | None = None
        self._since = self._shown = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds of training, including those before the run was stopped and resumed."""
        return self.seconds + time.monotonic() - self._since

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "seconds": self.elapsed, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.seconds, self.epoch = (
            state[name] for name in ("history", "seconds", "epoch")
        )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._since = self._shown = time.monotonic()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.progress:
            self.bar = _bar(trainer.num_training_batches * trainer.max_epochs, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if self.bar is not None and now - self._shown >= BAR_SECONDS:
            self._show(trainer, len(batch[REGISTRY_KEYS.X_KEY]), now)

    def _show(self, trainer: Any, cells: int, now: float) -> None:
        steps = trainer.global_step - self.bar.n
        speed = self.bar.format_sizeof(steps * cells / (now - self._shown))
        parts = [f"epoch {self.epoch + 1}/{trainer.max_epochs}"]
        if "elbo_train" in self.history:
            parts.append(f"ELBO {-self.history['elbo_train'][-1]:.1f}")
        parts.append(f"{speed} cells/s")
        module = trainer.lightning_module.module
        if module.warming_up:
            parts.append("warm-up")
        else:
            used = int((module.components().log_weights.exp() > ACTIVE_SHARE).sum())
            parts.append(counted(used, "component"))
        parts.append(f"{_peak_memory():.1f} GiB")
        self.bar.set_description_str(", ".join(parts), refresh=False)
        self.bar.update(steps)
        self._shown = now

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.epoch += 1
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        # Lightning's own mean over an epoch is lost if a run is stopped within it; the ELBO is not.
        metrics.pop("train_loss", None)
        loss = metrics["elbo_train"]
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} in epoch {self.epoch}")
        for name, value in metrics.items():
            self.history.setdefault(name, []).append(value)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self.stopped_by = type(exception)
        elif isinstance(exception, SIGTERMException):
            self.stopped_by = Terminated


def integrate(
    cells: AnnData,
    settings: Settings,
    *,
    on_disk: OnDisk | None = None,
    checkpoint: Path | None = None,
    checkpoint_steps: int | None = None,
    resume: bool = False,
    accelerator: str = "auto",
    progress: bool = False,
) -> Integration:
    """Train on `cells` of :func:`training_cells`, or on all cells of `on_disk`; find clusters.

    Parameters
    ----------
    cells : AnnData
    settings : Settings
    on_disk : OnDisk, optional
        All cells, if `cells` come from :func:`training_cells_on_disk`.
    checkpoint : Path, optional
        File for checkpoints, written during or after an epoch, every 30 seconds.
    checkpoint_steps : int, optional
        Number of steps after which a checkpoint is written, too.
    resume : bool
        Go on from `checkpoint`, to the same bits as without the stop (on a CPU with one thread).
    accelerator : str
        Lightning's.
    progress : bool
        Show a bar on stderr.

    Raises
    ------
    InputError
        If the checkpoint cannot be read or written, or cells on disk can no longer be read.
    FloatingPointError
        If training diverges.
    KeyboardInterrupt
        On Ctrl-C, and one of :mod:`vmm_fast._stopping` on SIGTERM and SIGHUP.
    """
    on_interrupt = signal.getsignal(signal.SIGINT)
    during = _Progress(progress)
    callbacks: list[Callback] = [during]
    if checkpoint is not None:
        # Called after `during`, so that the history in it includes the epoch that has ended.
        callbacks.append(
            Checkpoints(checkpoint, seconds=CHECKPOINT_SECONDS, steps=checkpoint_steps)
        )
    try:
        with torch.random.fork_rng(devices=[]), quiet(), _in_one_process():
            scvi.settings.seed = settings.seed
            VMMSCVI.setup_anndata(cells, layer=settings.layer, batch_key=settings.batch_key)
            model = VMMSCVI(
                cells,
                n_components=settings.components,
                n_latent=settings.latent_dim,
                prior_kwargs={"learning_rate": settings.prior_learning_rate},
            )
            if on_disk is None:
                codes = model.adata_manager.get_from_registry(REGISTRY_KEYS.BATCH_KEY)[:, 0]
                counts = MemoryCells(_counts(cells, settings.layer))
                loading = CellDataModule(counts, codes, **_loading(settings))
            else:
                loading = CellDataModule(
                    on_disk.store, on_disk.batches, genes=on_disk.genes, **_loading(settings)
                )
            model.train(
                settings.epochs,
                datamodule=loading,
                accelerator=accelerator,
                devices=1,
                plan_kwargs={"lr": settings.learning_rate},
                check_val_every_n_epoch=1,
                enable_progress_bar=False,
                logger=False,
                callbacks=callbacks,
                plugins=[_CheckpointFile(), LightningEnvironment()],
                ckpt_path=checkpoint if resume else None,
            )
            model.history_ = {
                name: pd.DataFrame({name: values}).rename_axis("epoch")
                for name, values in during.history.items()
            }
            seconds = during.elapsed
            z = latent_means(model, loading.all_cells())
            clusters = _find_clusters(model, z, settings)
    except SystemExit:
        # On Ctrl-C Lightning exits and disables further Ctrl-C; on SIGTERM it exits with status 0.
        if during.stopped_by is None:
            raise
        signal.signal(signal.SIGINT, on_interrupt)
        raise during.stopped_by from None
    except InputError:
        raise
    except ValueError as error:
        # torch's distributions, or the mixture, refuse parameters that are nan or infinite.
        refusals = ("to satisfy the constraint", "no positive-definite covariance")
        if not any(text in str(error) for text in refusals):
            raise
        message = f"a distribution's parameter is nan or inf in epoch {during.epoch + 1}"
        raise FloatingPointError(message) from None
    finally:
        if during.bar is not None:
            during.bar.close()
    return Integration(model, settings, during.history, seconds, loading.n_val, z, clusters)


@contextmanager
def _in_one_process() -> Iterator[None]:
    """Let Lightning train in one process, however many tasks SLURM has started.

    Lightning takes a job of the name "interactive" for one whose processes are started by hand.
    """
    before = os.environ.get("SLURM_JOB_NAME")
    os.environ["SLURM_JOB_NAME"] = "interactive"
    try:
        yield
    finally:
        if before is None:
            del os.environ["SLURM_JOB_NAME"]
        else:
            os.environ["SLURM_JOB_NAME"] = before


def _loading(settings: Settings) -> dict[str, Any]:
    return {"batch_size": settings.batch_size, "seed": settings.seed}


def _bar(steps: int, initial: int) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=steps,
        initial=initial,
        bar_format="{desc} |{bar}| ETA {remaining}",
        dynamic_ncols=True,
        mininterval=0,  # it is looked at seldom enough
        miniters=1,
    )


def _peak_memory() -> float:
    """Return the peak memory of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


@torch.inference_mode()
def latent_means(model: VMMSCVI, batches: CellBatches, *, progress: bool = False) -> np.ndarray:
    """Return the posterior means [cells, D] of the cells in `batches`.

    A cell of UNKNOWN_BATCH is encoded as of all batches in equal shares. With `progress` a bar is
    shown on stderr.
    """
    module = model.module
    means = np.empty((batches.number, module.n_latent), dtype=np.float32)
    done = 0
    with cells_bar(batches.number, progress) as bar:
        for tensors in batches:
            found = module.encode(_as_encoded(module, tensors)).loc.cpu()
            means[done : done + len(found)] = found
            done += len(found)
            bar.update(len(found))
    return means


def _as_encoded(module: VMMVAE, tensors: dict[str, Tensor]) -> Cells:
    """Return the cells of a mini-batch as the encoder sees them."""
    log_counts = tensors[REGISTRY_KEYS.X_KEY].to(module.device).log1p()
    categories: tuple[Tensor, ...] = ()
    if module.encode_covariates:
        index = tensors[REGISTRY_KEYS.BATCH_KEY].to(module.device)
        of_one = one_hot(index[:, 0].clamp(min=0), module.n_batch).to(log_counts.dtype)
        categories = (of_one.where(index != UNKNOWN_BATCH, 1 / module.n_batch),)
    return Cells(log_counts, categories, log_counts[:, :0])


@torch.no_grad()
def _find_clusters(model: VMMSCVI, z: np.ndarray, settings: Settings) -> pd.DataFrame:
    """Renumber the model's components (K = 1) by the cells they hold, and return the clusters."""
    prior, means = model.module.prior, torch.from_numpy(z)
    components = model.module.components().to("cpu")
    by_weight = components.log_weights.argsort(descending=True, stable=True)
    counts = Confusion.of(components, means).counts[by_weight]
    order = by_weight[counts.argsort(descending=True, stable=True)]
    for parameter in prior.parameters():
        if parameter.ndim and len(parameter) == len(order):
            parameter.copy_(parameter[order.to(parameter.device)])
    cut = settings.at_most(int((counts > 0).sum()))
    return assigned(model.keep_clusters_of(means, **cut), z)


def assigned(clusters: Clusters, z: np.ndarray) -> pd.DataFrame:
    """Return cluster, probability, entropy and component of latent means as columns of obs."""
    means = torch.from_numpy(z)
    components = [clusters.components.assign(points).labels for points in means.split(WINDOW)]
    found = (*clusters.assign(means), torch.cat(components))
    return cluster_columns(*(values.numpy() for values in found))


# --- results ---


@dataclass(frozen=True)
class Integration:
    """A finished run: the model, its curves, and the embedding z [cells, D] with its clusters.

    Clusters are columns of obs, as :func:`assigned` returns them.
    """

    model: VMMSCVI
    settings: Settings
    history: dict[str, list[float]]
    seconds: float
    held_out: int  # cells
    z: np.ndarray
    clusters: pd.DataFrame

    def record(self, labels: Any) -> dict[str, Any]:
        """Return the record of the run for uns, with scores against the cells' labels if given."""
        settings = {
            name: value for name, value in asdict(self.settings).items() if value is not None
        }
        clusters, components = (self.clusters[name] for name in ("vmm_cluster", "vmm_component"))
        record: dict[str, Any] = {
            **settings,
            "cells": len(clusters),
            "genes": self.model.adata.n_vars,
            "clusters_used": len(clusters.cat.categories),
            "components_used": len(components.cat.categories),
            "training_seconds": self.seconds,
            "held_out_cells": self.held_out,
            "held_out_elbo": -self.history["elbo_validation"][-1],
            "versions": {
                name: version(name) for name in ("vmm-fast", "scvi-tools", "torch", "anndata")
            },
        }
        if labels is not None:
            codes, _ = pd.factorize(labels)
            known = codes >= 0
            if known.any():
                pair = codes[known], clusters.cat.codes[known]
                record["scores"] = {
                    "ari": float(adjusted_rand_score(*pair)),
                    "nmi": float(normalized_mutual_info_score(*pair)),
                }
        return record

    def add_to(self, adata: AnnData) -> dict[str, Any]:
        """Add embedding, clusters and settings to the cells as read; return :meth:`record`."""
        key = self.settings.labels_key
        record = self.record(None if key is None else adata.obs[key])
        set_clusters(adata, self.z, self.clusters)
        adata.var["vmm_gene"] = adata.var_names.isin(self.model.adata.var_names)
        adata.uns.update(self.uns(record))
        return record

    def uns(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return entries for the cells' uns: the record and, for several clusters, their tree."""
        return {"vmm": record, **dendrogram(self.model, self.clusters)}

    def write_model(self, folder: Path) -> None:
        """Write the folder ``model``, which VMMSCVI.load reads."""
        path = folder / "model" / "model.pt"
        path.parent.mkdir(exist_ok=True)
        # scvi-tools writes only to a folder: one beside, since another disk may have no room.
        with tempfile.TemporaryDirectory(".tmp", ".", path.parent) as temporary, quiet():
            try:
                self.model.save(temporary, overwrite=True)
            except RuntimeError as error:  # torch raises this if the disk is full
                why = str(error).split("\n")[0]
                raise InputError(f"{path}: cannot be written: {why}") from None
            with open(os.path.join(temporary, "model.pt"), "rb") as saved:
                write_atomically(path, lambda file: shutil.copyfileobj(saved, file))

    def write(self, adata: AnnData, folder: Path) -> None:
        """Write the model, clusters.csv, and the cells with what :meth:`add_to` added."""
        self.write_model(folder)
        write_table(folder / "clusters.csv", [(adata.obs_names, self.clusters)])
        with quiet():
            write_adata(folder / "cells.h5ad", adata)

    def write_on_disk(
        self, cells: OnDisk, folder: Path
    ) -> tuple[dict[str, Any], AnnData, tuple[pd.DataFrame, np.ndarray]]:
        """Write the results of cells on disk; cells.h5ad has obs and var, but no counts.

        Returns the record in uns, the cells in memory, and obs of all cells with the rows that the
        cells in memory have there. The report needs the last two.
        """
        store, settings = cells.store, self.settings
        obs = self.clusters.copy()
        for key in (settings.batch_key, settings.labels_key):
            if key is not None:
                obs[key] = store.column(key)
        record = self.record(None if settings.labels_key is None else obs[settings.labels_key])
        self.write_model(folder)
        genes = self.model.adata.var_names
        write_results(store, folder, self.z, self.clusters, genes, self.uns(record))
        shown = self.model.adata.copy()
        shown.obsm["X_vmm"] = self.z[cells.rows]
        shown.uns["vmm"] = record
        return record, shown, (obs, cells.rows)


def dendrogram(model: VMMSCVI, clusters: pd.DataFrame) -> dict[str, Any]:
    """Return the model's tree of clusters for uns, in scanpy's form.

    Return nothing if there is one cluster, or if some cluster has no cell in obs.
    """
    of_component = model.kept_clusters().of_component
    number = int(of_component.max()) + 1
    if number == 1 or len(clusters["vmm_cluster"].cat.categories) != number:
        return {}
    tree = model.get_cluster_tree().dendrogram(of_component)
    return {DENDROGRAM: {"groupby": ["vmm_cluster"], **tree}}


def set_clusters(adata: AnnData, z: np.ndarray, clusters: pd.DataFrame) -> None:
    """Add the embedding z [cells, D] and its clusters to the cells; remove any earlier tree."""
    adata.uns.pop(DENDROGRAM, None)
    adata.obsm["X_vmm"] = z
    for key, values in clusters.items():
        adata.obs[key] = values.array
