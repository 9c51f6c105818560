"""From counts to an integrated embedding with clusters: train, assign every cell, write.

The model is trained on nine tenths of the cells and, if asked to, on the most variable genes alone.
The loss of the other cells shows whether it still improves. Labels only colour and score, unless
they are to be learnt.
Clusters are groups of the model's components (:mod:`vmm_fast.clusters`); both are numbered by how
many cells they hold, so "0" is the largest.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from lightning.pytorch.callbacks import Callback
from scvi import REGISTRY_KEYS
from torch import Tensor

from vmm_fast._errors import InputError
from vmm_fast._files import write_atomically
from vmm_fast._schema import check, list_of, number, table, whole
from vmm_fast._text import print_step
from vmm_fast.cells.preparing import cells_bar
from vmm_fast.cells.processes import processes_of_run
from vmm_fast.cells.quiet import quiet
from vmm_fast.cells.selection import OnDisk, counts_in
from vmm_fast.cells.settings import Settings
from vmm_fast.cells.training import Progress, part_from_others, trainer_options, training
from vmm_fast.cells.writing import (
    LABEL,
    RESERVED,
    cluster_columns,
    write_adata,
    write_markers,
    write_results,
    write_table,
)
from vmm_fast.clusters import Confusion, order_by_size
from vmm_fast.metrics import agreement
from vmm_fast.scvi.checkpoints import CheckpointFile, Checkpoints
from vmm_fast.scvi.columns import shares_of
from vmm_fast.scvi.latent_prior_model import LatentPriorModel
from vmm_fast.scvi.loading import (
    WINDOW,
    CellBatches,
    CellDataModule,
    CellSource,
    MemoryCells,
)
from vmm_fast.scvi.model import VMMSCANVI, VMMSCVI
from vmm_fast.scvi.module import VMMVAE
from vmm_fast.scvi.pseudo_cells import Cells

RESULTS = {
    "cells.h5ad": "the cells with X_vmm, vmm_cluster, its probability and entropy (nats)",
    "clusters.csv": "cluster, probability, entropy, component and any predicted label",
    "markers.csv": "marker genes of every cluster, with fold changes and probabilities",
    "model": "what VMMSCVI.load (VMMSCANVI.load with labels) and vmm-fast assign take",
    "settings.toml": "the settings: integrate --config settings.toml repeats the run",
    "report.html": "embedding, clusters, marker genes, curves and settings; for a browser",
}
CHECKPOINT_SECONDS = 30  # between two checkpoints
DENDROGRAM = "dendrogram_vmm_cluster"  # the key of uns where scanpy looks for it


# --- training ---


class _CheckpointFile(CheckpointFile):
    """A checkpoint file whose errors say what to do on the command line."""

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            checkpoint = super().load_checkpoint(path, *args, **kwargs)
            check(
                str(path), checkpoint["callbacks"], table({Progress.__qualname__: check_progress})
            )
        except ValueError as error:
            raise InputError(f"{error}; start the run again with --overwrite") from None
        return checkpoint


def check_progress(name: str, state: Any) -> None:
    """Raise ValueError unless a value is a state of :class:`Progress`."""
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
) -> Integration | None:
    """Train on `cells` of :func:`training_cells`, or on all cells of `on_disk`; find clusters.

    The processes that torchrun started train together, each on cells of its own and with as many in
    a step. Clusters are found by the first, the others return None.

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
        Show progress on stderr: a bar on a terminal, else a line in every tenth of the epochs.

    Raises
    ------
    InputError
        If the checkpoint cannot be read or written, or cells on disk can no longer be read.
    FloatingPointError
        If training diverges.
    KeyboardInterrupt
        On Ctrl-C, and one of :mod:`vmm_fast._stopping` on SIGTERM and SIGHUP.
    """
    during = Progress(progress)
    callbacks: list[Callback] = [during]
    if checkpoint is not None:
        # Called after `during`, so that the history in it includes the epoch that has ended.
        callbacks.append(
            Checkpoints(checkpoint, seconds=CHECKPOINT_SECONDS, steps=checkpoint_steps)
        )
    processes = processes_of_run()
    with training(during, settings.seed):
        model = _model(cells, settings)
        counts: CellSource = MemoryCells(counts_in(cells, settings.layer))
        obs, genes = cells.obs, None
        if on_disk is not None:
            counts, obs, genes = on_disk.store, on_disk.obs, on_disk.genes
        loading = CellDataModule(
            counts,
            **model.encode_obs(obs),
            genes=genes,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        model.train(
            settings.epochs,
            datamodule=loading,
            accelerator=accelerator,
            plan_kwargs={"lr": settings.learning_rate},
            check_val_every_n_epoch=1,
            enable_progress_bar=False,
            logger=False,
            callbacks=callbacks,
            ckpt_path=checkpoint if resume else None,
            **trainer_options(processes, _CheckpointFile()),
        )
        part_from_others(processes)
        if processes.rank > 0:
            return None
        model.history_ = {
            name: pd.DataFrame({name: values}).rename_axis("epoch")
            for name, values in during.history.items()
        }
        seconds = during.elapsed
        during.close()
        if progress:
            print_step("embedding the cells")
        z = latent_means(model, loading.all_cells())
        clusters = _find_clusters(model, z, settings)
    rows = None if on_disk is None else on_disk.rows
    return Integration(model, settings, during.history, seconds, loading.n_val, z, clusters, rows)


def _model(cells: AnnData, settings: Settings) -> VMMSCVI | VMMSCANVI:
    """Return a model for cells, which learns labels if there are any."""
    labels = {"labels_key": settings.train_labels, "unlabeled_category": settings.unlabelled}
    kind = VMMSCVI if settings.train_labels is None else VMMSCANVI
    kind.setup_anndata(
        cells,
        layer=settings.layer,
        batch_key=settings.batch_key,
        categorical_covariate_keys=settings.categorical_covariates,
        continuous_covariate_keys=settings.continuous_covariates,
        **({} if kind is VMMSCVI else labels),
    )
    return kind(
        cells,
        n_components=settings.components,
        n_latent=settings.latent_dim,
        prior=settings.prior,
        prior_kwargs={"learning_rate": settings.prior_learning_rate},
        gene_likelihood=settings.likelihood,
    )


@torch.inference_mode()
def latent_means(
    model: LatentPriorModel,
    batches: CellBatches,
    *,
    progress: bool = False,
    found: Callable[[dict[str, Tensor], Tensor], None] = lambda tensors, z: None,
) -> np.ndarray:
    """Return the posterior means [cells, D] of the cells in `batches`.

    A cell of a batch or category that is UNKNOWN is encoded as of all in equal shares. With
    `progress` a bar is shown on stderr. `found` is called with every mini-batch and its means.
    """
    module = model.module
    means = np.empty((batches.number, module.n_latent), dtype=np.float32)
    done = 0
    with cells_bar(batches.number, progress) as bar:
        for tensors in batches:
            z = module.encode(_as_encoded(module, tensors)).loc
            found(tensors, z)
            means[done : done + len(z)] = z.cpu()
            done += len(z)
            bar.update(len(z))
    return means


def _as_encoded(module: VMMVAE, tensors: dict[str, Tensor]) -> Cells:
    """Return the cells of a mini-batch as the encoder sees them."""
    tensors = {key: values.to(module.device) for key, values in tensors.items()}
    log_counts = tensors[REGISTRY_KEYS.X_KEY].log1p()
    if not module.encode_covariates:
        return Cells(log_counts, (), log_counts[:, :0])
    keys = (REGISTRY_KEYS.BATCH_KEY, REGISTRY_KEYS.CAT_COVS_KEY)
    index = torch.cat([tensors[key] for key in keys if key in tensors], 1)
    categories = tuple(
        shares_of(of_one, n).to(log_counts)
        for of_one, n in zip(index.unbind(1), module.n_categories, strict=True)
    )
    return Cells(
        log_counts, categories, tensors.get(REGISTRY_KEYS.CONT_COVS_KEY, log_counts[:, :0])
    )


@torch.no_grad()
def _find_clusters(model: LatentPriorModel, z: np.ndarray, settings: Settings) -> pd.DataFrame:
    """Renumber the model's components (K = 1) by the cells they hold, and return the clusters."""
    prior, means = model.module.prior, torch.from_numpy(z)
    components = model.module.components().to("cpu")
    counts = Confusion.of(components, means).counts
    order = order_by_size(components, counts)
    for parameter in prior.parameters():
        if parameter.ndim and len(parameter) == len(order):
            parameter.copy_(parameter[order.to(parameter.device)])
    cut = settings.at_most(int((counts > 0).sum()))
    model.keep_clusters_of(means, **cut)
    return assigned(model, z)


@torch.inference_mode()
def assigned(model: LatentPriorModel, z: np.ndarray) -> pd.DataFrame:
    """Return the clusters, and labels if the model has any, of latent means as columns of obs."""
    clusters, means = model.kept_clusters(), torch.from_numpy(z)
    components = [clusters.components.assign(points).labels for points in means.split(WINDOW)]
    found = (*clusters.assign(means), torch.cat(components))
    columns = cluster_columns(*(values.numpy() for values in found))
    if isinstance(model, VMMSCANVI):
        names = [str(name) for name in model._label_mapping[: model.n_labels]]
        columns[LABEL] = pd.Categorical.from_codes(model.predicted_labels(means), names)
    return columns


# --- results ---


@dataclass(frozen=True)
class Integration:
    """A finished run: the model, its curves, and the embedding z [cells, D] with its clusters.

    Clusters are columns of obs, as :func:`assigned` returns them.
    """

    model: VMMSCVI | VMMSCANVI
    settings: Settings
    history: dict[str, list[float]]
    seconds: float
    held_out: int  # cells
    z: np.ndarray
    clusters: pd.DataFrame
    rows: np.ndarray | None = None  # of the cells that the model was made with; None for all

    @cached_property
    def markers(self) -> pd.DataFrame:
        """Marker genes, as :meth:`vmm_fast.scvi.VMMSCVI.get_marker_genes` returns them."""
        clusters = self.clusters["vmm_cluster"].array
        clusters = clusters if self.rows is None else clusters[self.rows]
        with quiet():
            return self.model.get_marker_genes(clusters, self.settings.seed)

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
        if labels is not None and (scores := self.scores(labels)):
            record["scores"] = scores
        return record

    def scores(self, labels: Any) -> dict[str, float]:
        """Return ARI and NMI of clusters and labels, of the cells that have one; empty if none."""
        codes, _ = pd.factorize(labels)
        known = codes >= 0
        if not known.any():
            return {}
        clusters = self.clusters["vmm_cluster"].cat.codes.to_numpy()
        nmi, ari = agreement(clusters[known], codes[known])
        return {"ari": ari, "nmi": nmi}

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
        """Write the model, both tables, and the cells with what :meth:`add_to` added."""
        self.write_model(folder)
        write_markers(folder / "markers.csv", self.markers)
        write_table(folder / "clusters.csv", self.clusters, [(slice(None), adata.obs_names)])
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
        self.write_model(folder)
        obs = self.clusters.copy()
        for key in (settings.batch_key, settings.labels_key):
            if key is not None:
                obs[key] = store.column(key)
        record = self.record(None if settings.labels_key is None else obs[settings.labels_key])
        write_markers(folder / "markers.csv", self.markers)
        genes = self.model.adata.var_names
        write_results(store, folder, self.z, self.clusters, genes, self.uns(record))
        with quiet():  # of cells that share a name
            shown = self.model.adata.copy()
        shown.obsm["X_vmm"] = self.z[cells.rows]
        shown.uns["vmm"] = record
        return record, shown, (obs, cells.rows)


def dendrogram(model: LatentPriorModel, clusters: pd.DataFrame) -> dict[str, Any]:
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
    """Add the embedding z [cells, D] and its clusters to the cells; remove those of before."""
    adata.uns.pop(DENDROGRAM, None)
    adata.obsm["X_vmm"] = z
    adata.obs = adata.obs.drop(columns=set(RESERVED) & set(adata.obs) - set(clusters))
    for key, values in clusters.items():
        adata.obs[key] = values.array
