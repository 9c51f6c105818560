"""From counts to an integrated embedding with clusters: train, assign every cell, write.

The model is trained on the genes that vary most, if asked to, and on nine tenths of the cells; the
loss of the others shows whether it still gains. Labels colour and score alone. Clusters are the
model's components, numbered by how many cells they hold, so "0" is the largest.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scvi
import torch
from anndata import AnnData
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from scipy.sparse import csr_matrix

from vmm_fast._files import write_atomically
from vmm_fast.data import InputError
from vmm_fast.metrics import clustering_scores_from_assignment
from vmm_fast.mixture import Components
from vmm_fast.scvi.model import VMMSCVI
from vmm_fast.scvi.module import PRIOR_LEARNING_RATE
from vmm_fast.scvi.reading import batches_of, column, counts_of

__all__ = [
    "RESULTS",
    "Integration",
    "Settings",
    "in_place_of",
    "integrate",
    "quiet",
    "set_clusters",
    "training_cells",
    "write_cells",
]

RESULTS = {
    "cells.h5ad": "the cells with X_vmm, vmm_cluster, its probability and entropy (nats)",
    "clusters.csv": "cluster, its probability and the entropy of every cell",
    "model": "what VMMSCVI.load and vmm-fast assign take",
    "report.html": "embedding, clusters, marker genes, curves and settings; for a browser",
}
COLUMNS = ("vmm_cluster", "vmm_cluster_probability", "vmm_cluster_entropy")  # of obs
LEAST_CELLS = 10  # one is held out and nine are trained on
MANY_GENES = 10_000  # where selecting some is worth a note
CHECKPOINT_SECONDS = 10  # least between two of them


@dataclass(frozen=True)
class Settings:
    """What a run depends on besides its cells, and the labels that it is shown with."""

    batch_key: str | None
    layer: str | None
    labels_key: str | None
    genes: int | None
    epochs: int
    components: int
    latent_dim: int = 10
    batch_size: int = 128
    learning_rate: float = 1e-3
    prior_learning_rate: float = PRIOR_LEARNING_RATE
    seed: int = 0

    @classmethod
    def suited_to(cls, adata: AnnData, **given: Any) -> Settings:
        """Fill in what was not given (None) by the number of cells.

        Raises
        ------
        InputError
            If there are too few cells, or more components than cells that they start as.
        """
        cells = adata.n_obs
        if cells < LEAST_CELLS:
            raise InputError(
                f"must have at least {LEAST_CELLS} cells to be integrated, has {cells}"
            )
        if (given.get("components") or 0) > cells:
            raise InputError(
                f"--components must be at most {cells}, the cells that pseudo-inputs start as, is "
                f"{given['components']}"
            )
        suited: dict[str, Any] = {
            "batch_key": None,
            "layer": None,
            "labels_key": None,
            "genes": None,
            # As many steps at most as scvi-tools' own default takes: 400 epochs of 20,000 cells.
            "epochs": max(1, min(100, round(400 * 20_000 / cells))),
            "components": min(100, max(10, cells // 20)),
        }
        return cls(**suited | {name: value for name, value in given.items() if value is not None})


# --- the cells to train on ---


def training_cells(adata: AnnData, settings: Settings) -> tuple[AnnData, list[str]]:
    """Give the counts of the genes to train on with their batches, and notes on them.

    Raises
    ------
    InputError
        If the values are no counts, or a key is missing or cannot be used.
    """
    for option, key in (("--batch-key", settings.batch_key), ("--labels-key", settings.labels_key)):
        if key in COLUMNS:
            raise InputError(
                f"{option} {key}: must be another column, results are written to this one; rename "
                "it"
            )
    counts = csr_matrix(counts_of(adata, settings.layer), dtype=np.float32)
    notes = []
    if "vmm_cluster" in adata.obs:
        notes.append("obs has the clusters of an earlier run, the results have this one's instead")
    obs = pd.DataFrame(index=adata.obs_names)
    if settings.labels_key is not None:
        column(adata, "--labels-key", settings.labels_key)
    if settings.batch_key is not None:
        obs[settings.batch_key] = batches = batches_of(adata, settings.batch_key)
        sizes = batches.value_counts()
        sizes = sizes[sizes > 0]
        if len(sizes) == len(batches):
            raise InputError(
                f"--batch-key {settings.batch_key}: must name batches, has another value for every "
                "cell"
            )
        if len(sizes) == 1:
            notes.append("one batch alone: there is nothing to integrate, cells are clustered")
        single = [str(name) for name in sizes.index[sizes == 1]]
        if single:
            one = len(single) == 1
            notes.append(
                f"{'a batch' if one else f'{len(single)} batches'} of one cell: "
                f"{', '.join(single[:5])}{', ...' if len(single) > 5 else ''}"
            )
    depth, detected = counts.sum(1).A1, counts.sum(0).A1
    if not detected.any():
        raise InputError("must hold counts above 0, all are 0")
    if number := int((depth == 0).sum()):
        notes.append(f"{number:,} {'cell has' if number == 1 else 'cells have'} no counts at all")
    if number := int((detected == 0).sum()):
        notes.append(f"{number:,} {'gene has' if number == 1 else 'genes have'} no counts at all")
    whole = in_place_of(counts, obs, adata.var_names, settings.layer)
    chosen = _variable_genes(whole, settings)
    if settings.genes is None and adata.n_vars > MANY_GENES:
        notes.append(f"trained on all {adata.n_vars:,} genes; --genes 2000 is faster")
    cells = whole[:, chosen].copy()
    if number := int((_counts(cells, settings.layer).sum(1).A1 == 0).sum() - (depth == 0).sum()):
        notes.append(f"{number:,} more have none in the genes that are trained on")
    return cells, notes


def in_place_of(counts: Any, obs: Any, genes: Any, layer: str | None) -> AnnData:
    """Counts where the reader's own cells have them, so that these fit the saved model."""
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
    return found["highly_variable"].to_numpy()


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


class _Checkpoints(TorchCheckpointIO):
    """Lightning's checkpoints, but written whole or not at all, on any file system."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        write_atomically(path, lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except Exception:  # pickle raises of all kinds
            raise InputError(
                f"{path}: is damaged and cannot be read; start the run again with --overwrite"
            ) from None


class _Epochs(Callback):
    """What happens at the end of an epoch: history, checkpoint, bar and the next one's seed.

    Every epoch has a seed of its own, so that one that follows a checkpoint draws as it would have
    without the stop.
    """

    def __init__(self, seed: int, checkpoint: Path | None, progress: bool) -> None:
        self.seed, self.checkpoint, self.progress = seed, checkpoint, progress
        self.bar: Any = None
        self.history: dict[str, list[float]] = {}
        self.seconds = 0.0
        self.epoch = 0
        self.interrupted = False
        self._since = self._written = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "seconds": self.seconds, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.seconds, self.epoch = (
            state[name] for name in ("history", "seconds", "epoch")
        )

    def _set_seed(self) -> None:
        found = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        torch.manual_seed(int(found[0]))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Not at the start of the epoch: the loader of the first one draws before that.
        self._set_seed()
        self._since = time.monotonic()
        if self.progress:
            self.bar = _bar(trainer.max_epochs, self.epoch)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.epoch += 1
        now = time.monotonic()
        took, self._since = now - self._since, now
        self.seconds += took
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        loss = metrics["elbo_train"]
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} in epoch {self.epoch}")
        for name, value in metrics.items():
            self.history.setdefault(name, []).append(value)
        self._set_seed()
        last = self.epoch == trainer.max_epochs
        if self.checkpoint is not None and (last or now - self._written >= CHECKPOINT_SECONDS):
            trainer.save_checkpoint(self.checkpoint)
            self._written = time.monotonic()
        if self.bar is not None:
            speed = self.bar.format_sizeof(trainer.datamodule.n_train / took)
            self.bar.set_description_str(
                f"ELBO {-loss:.1f}, KL {metrics['kl_local_train']:.1f}, {speed} cells/s, ",
                refresh=False,
            )
            self.bar.update()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.interrupted = isinstance(exception, KeyboardInterrupt)


def integrate(
    cells: AnnData,
    settings: Settings,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    accelerator: str = "auto",
    progress: bool = False,
) -> Integration:
    """Train on `cells` of :func:`training_cells`.

    Parameters
    ----------
    cells : AnnData
    settings : Settings
    checkpoint : Path, optional
        Written after an epoch, if the last one is a while ago.
    resume : bool
        Go on from `checkpoint`, to the same bits as without the stop (on a CPU with one thread).
    accelerator : str
        Lightning's.
    progress : bool
        Show a bar on stderr.

    Raises
    ------
    InputError
        If the checkpoint cannot be read.
    FloatingPointError
        If training diverges.
    KeyboardInterrupt
    """
    on_interrupt = signal.getsignal(signal.SIGINT)
    epochs = _Epochs(settings.seed, checkpoint, progress)
    try:
        with torch.random.fork_rng(devices=[]), quiet():
            scvi.settings.seed = settings.seed
            VMMSCVI.setup_anndata(cells, layer=settings.layer, batch_key=settings.batch_key)
            model = VMMSCVI(
                cells,
                n_components=settings.components,
                n_latent=settings.latent_dim,
                prior_kwargs={"learning_rate": settings.prior_learning_rate},
            )
            model.train(
                settings.epochs,
                batch_size=settings.batch_size,
                accelerator=accelerator,
                devices=1,
                plan_kwargs={"lr": settings.learning_rate},
                check_val_every_n_epoch=1,
                enable_progress_bar=False,
                logger=False,
                callbacks=[epochs],
                plugins=[_Checkpoints()],
                ckpt_path=checkpoint if resume else None,
            )
            model.history_ = {
                name: pd.DataFrame({name: values}).rename_axis("epoch")
                for name, values in epochs.history.items()
            }
            _number_by_size(model)
    except SystemExit:
        # Lightning exits on Ctrl-C, and leaves it without effect.
        if not epochs.interrupted:
            raise
        signal.signal(signal.SIGINT, on_interrupt)
        raise KeyboardInterrupt from None
    except InputError:
        raise
    except ValueError as error:
        # torch's distributions, or the mixture, refuse parameters that are nan or infinite.
        refusals = ("to satisfy the constraint", "no positive-definite covariance")
        if not any(text in str(error) for text in refusals):
            raise
        message = f"a distribution's parameter is nan or inf in epoch {epochs.epoch + 1}"
        raise FloatingPointError(message) from None
    finally:
        if epochs.bar is not None:
            epochs.bar.close()
    return Integration(model, settings, epochs.history, epochs.seconds)


def _bar(epochs: int, initial: int) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=epochs,
        initial=initial,
        bar_format="epoch {n_fmt}/{total_fmt} |{bar}| {desc}ETA {remaining}",
        dynamic_ncols=True,
    )


@torch.no_grad()
def _number_by_size(model: VMMSCVI) -> None:
    """Renumber the model's components (K = 1) by the cells they hold."""
    prior = model.module.prior
    by_weight = model.module.components().log_weights.cpu().argsort(descending=True, stable=True)
    counts = torch.from_numpy(model.get_clusters()).bincount(minlength=len(by_weight))[by_weight]
    order = by_weight[counts.argsort(descending=True, stable=True)]
    for parameter in prior.parameters():
        if parameter.ndim and len(parameter) == len(order):
            parameter.copy_(parameter[order.to(parameter.device)])


# --- results ---


@dataclass(frozen=True)
class Integration:
    """A finished run."""

    model: VMMSCVI
    settings: Settings
    history: dict[str, list[float]]
    seconds: float

    def add_to(self, adata: AnnData) -> dict[str, Any]:
        """Add embedding, clusters and settings to the cells as read; give what is in uns."""
        with quiet():
            z = self.model.get_latent_representation()
            set_clusters(adata, z, self.model.module.components().to("cpu"))
        used = adata.obs["vmm_cluster"].cat.categories
        settings = {
            name: value for name, value in asdict(self.settings).items() if value is not None
        }
        record: dict[str, Any] = {
            **settings,
            "genes": self.model.adata.n_vars,
            "clusters_used": len(used),
            "training_seconds": self.seconds,
            "held_out_cells": len(self.model.validation_indices),
            "held_out_elbo": -self.history["elbo_validation"][-1],
            "versions": {
                name: version(name) for name in ("vmm-fast", "scvi-tools", "torch", "anndata")
            },
        }
        if self.settings.labels_key is not None:
            labels = adata.obs[self.settings.labels_key]
            known = labels.notna().to_numpy()
            codes = labels[known].astype(str).to_numpy()
            clusters = adata.obs["vmm_cluster"].astype(int).to_numpy()[known]
            if len(codes):
                scores = clustering_scores_from_assignment(clusters, codes).as_dict()
                record["scores"] = {name: scores[name] for name in ("ari", "nmi")}
        adata.var["vmm_gene"] = adata.var_names.isin(self.model.adata.var_names)
        adata.uns["vmm"] = record
        return record

    def write(self, adata: AnnData, folder: Path) -> None:
        """Write the model and, of the cells with what was added, all else."""
        with tempfile.TemporaryDirectory() as temporary, quiet():
            self.model.save(temporary, overwrite=True)
            (folder / "model").mkdir(exist_ok=True)
            with open(os.path.join(temporary, "model.pt"), "rb") as saved:
                write_atomically(
                    folder / "model" / "model.pt", lambda file: shutil.copyfileobj(saved, file)
                )
        write_table(adata, folder / "clusters.csv")
        write_cells(adata, folder / "cells.h5ad")


def set_clusters(adata: AnnData, z: np.ndarray, components: Components) -> None:
    """Add the embedding z [cells, D] and its clusters to the cells."""
    assigned = components.assign(torch.from_numpy(z))
    adata.obsm["X_vmm"] = z
    names = assigned.labels.numpy().astype(str)
    order = sorted(set(names), key=int)
    adata.obs["vmm_cluster"] = pd.Categorical(names, categories=order)
    adata.obs["vmm_cluster_probability"] = assigned.probability.numpy()
    adata.obs["vmm_cluster_entropy"] = assigned.entropy.numpy()


def write_cells(adata: AnnData, path: Path) -> None:
    """Write an .h5ad file whole or not at all."""
    with quiet():
        write_atomically(path, lambda file: adata.write_h5ad(file.name, compression="gzip"))


def write_table(adata: AnnData, path: Path) -> None:
    """Write clusters.csv: a line per cell, in the order of the input."""

    def write(file: Any) -> None:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["cell", "cluster", "probability", "entropy"])
        for cell, cluster, probability, entropy in zip(
            adata.obs_names, *(adata.obs[name] for name in COLUMNS), strict=True
        ):
            table.writerow([cell, cluster, f"{probability:.6f}", f"{entropy:.6f}"])

    write_atomically(path, write, text=True)
