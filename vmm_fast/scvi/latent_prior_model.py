"""A mixture prior and its clusters for models of scvi-tools."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.model.base import ArchesMixin, BaseModelClass
from torch import Tensor
from torch.distributions import Distribution

from vmm_fast._text import joined
from vmm_fast.clusters import Clusters, ClusterTree, Confusion, find_clusters
from vmm_fast.inference.processes import telling_of_lost_processes
from vmm_fast.mixture import Components
from vmm_fast.scvi.abundance import AggregatedPosterior
from vmm_fast.scvi.columns import (
    check_columns,
    check_continuous,
    check_names,
    encode_obs,
)
from vmm_fast.scvi.loading import CellDataModule
from vmm_fast.scvi.new_cells import NewCells
from vmm_fast.scvi.novelty import KEPT_CELLS
from vmm_fast.scvi.query import numbers_of_categories, order_category_weights
from vmm_fast.scvi.saved import check_saved

__all__ = ["LatentPriorModel"]

# Without an AnnData, pseudo-cells start from random ones among the first cells that are read, so
# many times as many as there are pseudo-cells.
CELLS_TO_START_FROM = 10


class LatentPriorModel(NewCells, BaseModelClass):
    """Mixin for models of scvi-tools, before the model's class: a mixture prior and its clusters.

    Another model takes the prior as SCVI does: its module with :class:`LatentPrior`, its training
    plan with :class:`EmpiricalBayes`, and itself with this::

        class PriorVAE(LatentPrior, scvi.module.VAE):
            n_features = property(lambda self: self.n_input)

        class PriorPlan(EmpiricalBayes, scvi.train.TrainingPlan):
            pass

        class PriorSCVI(LatentPriorModel, scvi.model.SCVI):
            _module_cls = PriorVAE
            _training_plan_cls = PriorPlan

    Parameters
    ----------
    adata : AnnData or MuData, optional
        Registered by :meth:`setup_anndata`, or by :meth:`setup_mudata` if the model has it.
    registry : dict, optional
        Only for models that take one.
    prior : {"vmm", "gmm", "vamp", "normal"}
        VampPrior Mixture Model, Gaussian mixture with free centers, VampPrior, or N(0, I).
    n_components : int
        C. It must be larger than the number of clusters: a cluster takes several components.
    prior_kwargs : dict, optional
        Arguments of :class:`vmm_fast.VMMPrior`, :class:`vmm_fast.GaussianMixturePrior` or
        :class:`vmm_fast.VampPrior`; see :class:`LatentPrior`. ``data_size`` defaults to the number
        of training cells.
    encode_covariates : bool
        Whether the encoder sees batches and covariates; True, as in the paper.
    **kwargs
        Further arguments of the model and its module.

    Notes
    -----
    Stirn & Knowles (2024), arXiv 2402.04412. Pseudo-inputs are pseudo-cells with learnt counts and
    a soft membership in batches; they start from random cells and never see a label.
    """

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict[str, Any] | None = None,
        prior: str = "vmm",
        n_components: int = 100,
        prior_kwargs: dict[str, Any] | None = None,
        encode_covariates: bool = True,
        **kwargs: Any,
    ):
        # Only some models take a registry.
        takes_registry = "registry" in inspect.signature(super().__init__).parameters
        if registry is not None and adata is None and not takes_registry:
            raise ValueError(f"registry must be None for {type(self).__name__}, which takes none")
        super().__init__(
            adata,
            **({"registry": registry} if takes_registry else {}),
            prior=prior,
            n_components=n_components,
            prior_kwargs=prior_kwargs,
            encode_covariates=encode_covariates,
            **kwargs,
        )
        self._model_summary_string += f" Prior: {prior}, n_components: {n_components}."
        self.init_params_ = self._get_init_params(locals())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train the model, find its clusters, and calibrate novelty on the held-out cells.

        Pseudo-cells start from random cells. Arguments are those of the model without the prior. A
        warning says if training ended before the prior's warm-up did, for example because of
        ``max_time``.

        Raises
        ------
        ValueError
            If there are fewer cells than pseudo-cells, or no AnnData to take them from, or if the
            batches, labels or covariates of a :class:`CellDataModule` are not the AnnData's, or a
            continuous covariate has no finite number for some cell.
        RuntimeError
            If there are several processes, and another one fails or is killed.
        """
        cells = kwargs.get("datamodule")
        query = self.module.prior is not None and self.module.frozen
        if isinstance(cells, CellDataModule):
            check_columns(cells.columns, self.registry, self.module.learns_labels, query)
        elif cells is None and self.adata is not None:
            check_continuous(self.registry, self.adata_manager)
        moves = self.module.prior is not None and not query
        elsewhere = cells if hasattr(cells, "__iter__") else None
        if moves and elsewhere is None and self.adata is None:
            raise ValueError(
                "datamodule must be iterable, for pseudo-cells to start from its cells and for "
                f"clusters, where adata is None, but is {cells!r}"
            )
        self._start_pseudo_cells(elsewhere)
        if moves:
            self.module.forget_clusters()
        try:
            with telling_of_lost_processes():
                found = super().train(*args, **kwargs)
        finally:  # also if training was interrupted
            self.module.warming_up, self.module._latest = False, None
        module = self.module
        if not (module.prior is None or module.frozen or module.prior_learnt):
            warnings.warn(
                "the prior has not been trained, so that its clusters mean nothing: training ended "
                "in the warm-up under N(0, I), which has the share prior_warmup of all steps "
                "(plan_kwargs={'prior_warmup': 0} leaves it out)",
                stacklevel=2,
            )
        if moves:
            self.find_clusters(dataloader=elsewhere)
            if isinstance(cells, CellDataModule):
                elsewhere = cells.held_out_cells(KEPT_CELLS)
            held_out = self.validation_indices if cells is None else None
            if held_out is not None and not len(held_out):
                held_out = None
            self.calibrate_novelty(indices=held_out, dataloader=elsewhere)
        return found

    def encode_obs(self, obs: pd.DataFrame) -> dict[str, Any]:
        """Return batches, labels and covariates of cells as :class:`CellDataModule` takes them.

        ``obs`` must have the columns that the model was set up with. Cells without a label, in a
        model that has a category for such, get that category.

        Raises
        ------
        ValueError
            If a column is missing, or holds categories that the model does not have, or lacks the
            value of some cell.
        """
        return encode_obs(self.registry, obs)

    def _start_pseudo_cells(self, batches: Iterable[dict[str, Any]] | None = None) -> None:
        """Start from random cells: among the first of the batches, or of the AnnData."""
        if self.init_params_["non_kwargs"]["prior"] not in ("vmm", "vamp"):
            return
        cells = self.module.prior.pseudo_inputs
        if cells.started:
            return
        number = len(cells.raw_counts)
        generator = np.random.default_rng(torch.initial_seed() % 2**32)
        if batches is None:
            available = self.adata.n_obs
        else:
            read = _first_cells(batches, CELLS_TO_START_FROM * number)
            available = len(read.get(REGISTRY_KEYS.X_KEY, ()))
        if available < number:
            raise ValueError(
                "n_components, times pseudo_inputs_per_component, must be at most the number of "
                f"cells, {available}, with pseudo-cells, but is {number}"
            )
        chosen = np.sort(generator.choice(available, number, replace=False))
        if batches is not None:
            tensors = {key: values[chosen] for key, values in read.items()}
        else:
            loader = self._make_data_loader(self.adata, indices=chosen, batch_size=number)
            tensors = next(iter(loader))
        categories: list[Tensor] = []
        continuous = None
        if self.module.encode_covariates:
            continuous = tensors.get(REGISTRY_KEYS.CONT_COVS_KEY)
            categories += tensors[REGISTRY_KEYS.BATCH_KEY].unbind(1)
            if tensors.get(REGISTRY_KEYS.CAT_COVS_KEY) is not None:
                categories += tensors[REGISTRY_KEYS.CAT_COVS_KEY].unbind(1)
        cells.start_from(self.module.features(tensors), categories, continuous)

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Save the model, as :meth:`scvi.model.base.BaseModelClass.save` does."""
        # From pandas 3 on, names of columns are an array of Arrow's, which :meth:`load` refuses.
        for measured in (self.history_ or {}).values():
            measured.columns = measured.columns.astype(object)
        super().save(*args, **kwargs)

    @classmethod
    def load(cls, dir_path: str, *args: Any, trust: bool = False, **kwargs: Any) -> Any:
        """Load a saved model; unless ``trust``, refuse files that could run code.

        Without ``trust`` the file may hold nothing but tensors and tables. Other arguments are
        those of :meth:`scvi.model.base.BaseModelClass.load`. The model's sizes are those that it
        was saved with; a ``datamodule`` is where scvi-tools' methods look for cells.

        Raises
        ------
        ValueError
            If the file is damaged, or could run code when it is read, or if the cells lack a column
            that the model was trained with.
        """
        given = inspect.signature(super().load).bind(dir_path, *args, **kwargs).arguments
        if not trust:
            check_saved(dir_path, given.get("prefix"), given.get("backup_url"))
        datamodule = kwargs.pop("datamodule", None)
        try:
            model = super().load(dir_path, *args, **kwargs)
        except KeyError:
            if cells := given.get("adata"):
                check_names(cls.load_registry(dir_path, given.get("prefix"), trust=True), cells)
            raise
        if datamodule is not None:
            model._datamodule = datamodule
        return model

    @staticmethod
    def load_registry(
        dir_path: str, prefix: str | None = None, *, trust: bool = False
    ) -> dict[str, Any]:
        """Return the registry of a saved model; see :meth:`load` for ``trust``."""
        if not trust:
            check_saved(dir_path, prefix)
        registry: dict[str, Any] = BaseModelClass.load_registry(dir_path, prefix)
        return registry

    @staticmethod
    def prepare_query_anndata(
        adata: Any, reference_model: Any, *args: Any, trust: bool = False, **kwargs: Any
    ) -> Any:
        """Bring cells to the genes of a reference model; see :meth:`load` for ``trust``.

        See :meth:`scvi.model.base.ArchesMixin.prepare_query_anndata`.
        """
        if isinstance(reference_model, str) and not trust:
            check_saved(reference_model)
        return ArchesMixin.prepare_query_anndata(adata, reference_model, *args, **kwargs)

    @classmethod
    def load_query_data(
        cls, adata: Any = None, reference_model: Any = None, *, trust: bool = False, **kwargs: Any
    ) -> Any:
        """Return a model for query cells, made from a reference model (scArches).

        scvi-tools' own method puts the weights of new categories behind all others. Covariates
        behind one with new categories then get the weights of another covariate. Here the new
        weights stand next to those of their covariate, and start at the mean of these instead of
        at random. See :meth:`load` for ``trust``, if ``reference_model`` is a folder.
        """
        if isinstance(reference_model, str) and not trust:
            check_saved(reference_model)
        reference = (
            cls.load_registry(reference_model, trust=True)
            if isinstance(reference_model, str)
            else reference_model.registry
        )
        if adata is not None:
            check_names(reference, adata)
        model = super().load_query_data(adata, reference_model, **kwargs)
        order_category_weights(
            model.module, numbers_of_categories(reference), numbers_of_categories(model.registry)
        )
        return model

    def _validate_anndata(self, adata: Any = None, copy_if_view: bool = True) -> Any:
        """Check cells as the model's own method does, and their genes and covariates.

        The model's own method matches genes by position, whatever their names.

        Raises
        ------
        ValueError
            If the cells have other genes than the model, or have them in another order, or lack
            finite numbers of a continuous covariate.
        """
        if adata is not None and adata is not self.adata:
            for modality, genes in self._genes().items():
                part = adata if modality is None else adata.mod[modality]
                _check_genes(part.var_names.astype(str), genes)
            check_names(self.registry, adata)
        adata = super()._validate_anndata(adata, copy_if_view)
        check_continuous(self.registry, self.get_anndata_manager(adata, required=True))
        return adata

    def _make_data_loader(self, adata: Any, indices: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Return the model's own loader of some cells.

        Raises
        ------
        ValueError
            If there are no cells in ``indices``, of which no method has anything to return.
        """
        if indices is not None and not len(np.arange(adata.n_obs)[indices]):
            raise ValueError(
                "indices must name a cell or more, but are empty; None means all cells"
            )
        return super()._make_data_loader(adata, indices, *args, **kwargs)

    def _genes(self) -> dict[str | None, pd.Index]:
        """Return the model's gene names by modality; the key is None for an AnnData."""
        modalities = self.registry["setup_args"].get("modalities")
        if not modalities:
            return {None: pd.Index(self.get_var_names())}
        if self.adata is None:
            return {}
        names = set(modalities.values()) - {None}
        return {key: self.adata.mod[key].var_names.astype(str) for key in names}

    # --- clusters ---

    def _latents(
        self,
        adata: AnnData | None,
        indices: Any = None,
        batch_size: int | None = None,
        dataloader: Iterable[dict[str, Tensor]] | None = None,
    ) -> Tensor:
        self._check_if_trained(warn=False)
        if dataloader is not None and indices is not None:
            raise ValueError("indices must be None with a dataloader, which has its own cells")
        if dataloader is None and adata is None and self.adata is None:
            raise ValueError("dataloader or adata must be given, but the model has no AnnData")
        # Only some models take a dataloader.
        given = {} if dataloader is None else {"dataloader": dataloader}
        means, _ = self.get_latent_representation(
            adata, indices=indices, batch_size=batch_size, return_dist=True, **given
        )
        return torch.from_numpy(means)

    def _components(self) -> Components:
        components: Components = self.module.components()
        return components.to("cpu")

    def get_cluster_tree(self) -> ClusterTree:
        """Return the tree of components; cutting it gives the clusters.

        Raises
        ------
        ValueError
            For the prior N(0, I), and for a model without clusters, such as one that was saved
            before models had trees.
        """
        tree: ClusterTree | None = self.module.tree
        if tree is None:
            raise ValueError(
                "clusters must have been found first: call find_clusters() with the cells that the "
                "model was trained on"
            )
        return tree

    def find_clusters(
        self,
        adata: AnnData | None = None,
        *,
        batch_size: int | None = None,
        dataloader: Iterable[dict[str, Tensor]] | None = None,
        **cut: Any,
    ) -> None:
        """Group components into clusters by the cells that they share, and keep the clusters.

        :meth:`train` calls this at its end. Components do not change. Call it again after anything
        else that changes them, such as the prior's ``fit``, and then :meth:`calibrate_novelty`.

        Parameters
        ----------
        adata : AnnData, optional
            The cells that the model was trained on; by default those that it was made with.
        batch_size : int, optional
        dataloader : iterable of dict, optional
            The cells' batches, in place of ``adata``.
        **cut
            ``resolution``, ``separation`` or ``n_clusters``: where the tree of components is cut;
            see :mod:`vmm_fast.clusters`.
        """
        self.keep_clusters_of(self._latents(adata, None, batch_size, dataloader), **cut)

    def keep_clusters_of(self, means: Tensor, **cut: Any) -> Clusters:
        """Find clusters from the cells' posterior means [cells, D], keep them and return them."""
        components = self._components()
        tree = ClusterTree(Confusion.of(components, means))
        clusters = find_clusters(components, means, tree=tree, **cut)
        self.module.keep_clusters(tree, clusters, means)
        return clusters

    def kept_clusters(self) -> Clusters:
        """Return the clusters that :meth:`find_clusters` kept; they assign any latent means."""
        self.get_cluster_tree()  # raises if there are none
        return Clusters(self._components(), self.module.cluster_of_component.cpu().clone())

    def _clusters(self, **cut: Any) -> Clusters:
        if set(cut.values()) <= {None}:
            return self.kept_clusters()
        self.get_cluster_tree()  # raises if there is none
        clusters: Clusters = self.module.other_clusters(**cut)
        return clusters

    def get_cluster_probabilities(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dataloader: Iterable[dict[str, Tensor]] | None = None,
        **cut: Any,
    ) -> np.ndarray:
        """Return the probability of every cluster for each cell's posterior mean.

        Parameters
        ----------
        adata : AnnData, optional
            Cells with the model's genes in the same order; by default those that the model was made
            with.
        indices : sequence of int, optional
            Which cells; all by default.
        batch_size : int, optional
        dataloader : iterable of dict, optional
            Batches of cells, in place of ``adata``, for models without an AnnData.
        **cut
            ``resolution``, ``separation`` or ``n_clusters``: where the tree of components is cut;
            see :mod:`vmm_fast.clusters`. By default clusters are those of :meth:`find_clusters`.
            The model keeps up to 16,384 of the cells that these were found in. Every cluster of
            another cut must hold some of them, and is numbered by how many it holds.

        Returns
        -------
        ndarray [cells, G]
            Rows sum to 1. Clusters are numbered by how many of the model's cells they hold.
        """
        means = self._latents(adata, indices, batch_size, dataloader)
        return self._clusters(**cut).probabilities(means).numpy()

    def get_clusters(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dataloader: Iterable[dict[str, Tensor]] | None = None,
        **cut: Any,
    ) -> np.ndarray:
        """Return each cell's most probable cluster [cells].

        See :meth:`get_cluster_probabilities`.
        """
        means = self._latents(adata, indices, batch_size, dataloader)
        return self._clusters(**cut).assign(means).labels.numpy()

    def get_cluster_entropy(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dataloader: Iterable[dict[str, Tensor]] | None = None,
        **cut: Any,
    ) -> np.ndarray:
        """Return the entropy of each cell's cluster probabilities, [cells] in nats.

        See :meth:`get_cluster_probabilities`.
        """
        means = self._latents(adata, indices, batch_size, dataloader)
        return self._clusters(**cut).assign(means).entropy.numpy()

    def get_component_probabilities(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dataloader: Iterable[dict[str, Tensor]] | None = None,
    ) -> np.ndarray:
        """Return the responsibilities of the components for each cell's posterior mean [cells, C].

        See :meth:`get_cluster_probabilities`, whose clusters are groups of components.
        """
        means = self._latents(adata, indices, batch_size, dataloader)
        return self._components().responsibilities(means).numpy()

    def get_components(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dataloader: Iterable[dict[str, Tensor]] | None = None,
    ) -> np.ndarray:
        """Return each cell's most probable component [cells]."""
        means = self._latents(adata, indices, batch_size, dataloader)
        return self._components().assign(means).labels.numpy()

    # --- conditions ---

    def get_aggregated_posterior(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dof: float | None = 3.0,
    ) -> Distribution:
        """Return the mixture of the cells' posteriors, which ``differential_abundance`` evaluates.

        With ``dof=None``, that method's default, terms are Normal: densities are those of
        scvi-tools 1.5, but faster and in bounded memory. With ``dof`` terms are Student's t, as
        scvi-tools itself computes them: before 1.5 with variances as scales.
        """
        if dof is not None:
            stock: Distribution = super().get_aggregated_posterior(adata, indices, batch_size, dof)
            return stock
        self._check_if_trained(warn=False)
        means, variances = (
            torch.from_numpy(values).to(self.device)
            for values in self.get_latent_representation(
                adata, indices=indices, batch_size=batch_size, return_dist=True
            )
        )
        return AggregatedPosterior(means, variances.sqrt())


def _check_genes(have: pd.Index, genes: pd.Index) -> None:
    """Raise ValueError if cells do not have the model's genes in the model's order."""
    if have.equals(genes):
        return
    missing = genes.difference(have, sort=False)
    if len(missing):
        raise ValueError(
            f"adata must have the model's {len(genes):,} genes, but lacks {len(missing):,}: "
            f"{joined(missing, 5)}"
        )
    raise ValueError(
        "adata must have the model's genes in its order, but has "
        f"{'others besides' if len(have) > len(genes) else 'another order'}; give "
        "adata[:, model.get_var_names()].copy()"
    )


def _first_cells(batches: Iterable[dict[str, Any]], number: int) -> dict[str, Tensor]:
    """Return the first batches, joined, that hold this number of cells or all that there are."""
    taken: list[dict[str, Any]] = []
    left = number
    for tensors in batches:
        taken.append(tensors)
        left -= len(tensors[REGISTRY_KEYS.X_KEY])
        if left <= 0:
            break
    keys = [key for key, x in taken[0].items() if isinstance(x, Tensor)] if taken else []
    return {key: torch.cat([tensors[key] for tensors in taken]) for key in keys}
