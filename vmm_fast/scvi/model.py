"""Models of scvi-tools with a mixture prior."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.model import PEAKVI, SCANVI, SCVI, TOTALVI
from scvi.model._utils import _get_batch_code_from_category
from scvi.model.base import ArchesMixin, BaseModelClass
from torch import Tensor
from torch.distributions import Normal

from vmm_fast._checks import check_integer
from vmm_fast._text import joined
from vmm_fast.clusters import Clusters, ClusterTree, Confusion, find_clusters
from vmm_fast.inference.processes import telling_of_lost_processes
from vmm_fast.mixture import Components
from vmm_fast.scvi.loading import CellDataModule
from vmm_fast.scvi.module import VMMPEAKVAE, VMMSCANVAE, VMMTOTALVAE, VMMVAE
from vmm_fast.scvi.query import numbers_of_categories, order_category_weights
from vmm_fast.scvi.saved import check_saved
from vmm_fast.scvi.training import (
    EmpiricalBayesAdversarialTrainingPlan,
    EmpiricalBayesSemiSupervisedTrainingPlan,
    EmpiricalBayesTrainingPlan,
)

__all__ = [
    "VMMPEAKVI",
    "VMMSCANVI",
    "VMMSCVI",
    "VMMTOTALVI",
    "ComponentExpression",
    "LatentPriorModel",
]


class LatentPriorModel(BaseModelClass):
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
        """Train the model, and then find its clusters; pseudo-cells start from random cells.

        Arguments are those of the model without the prior. A warning says if training ended before
        the prior's warm-up did, for example because of ``max_time``.

        Raises
        ------
        ValueError
            If there are fewer cells than pseudo-cells, or no AnnData to take them from, or if the
            batches of a :class:`CellDataModule` differ from those of the AnnData.
        RuntimeError
            If there are several processes, and another one fails or is killed.
        """
        cells = kwargs.get("datamodule")
        if isinstance(cells, CellDataModule) and cells.n_batch != self.summary_stats.n_batch:
            raise ValueError(
                "datamodule must have the batches that the model's AnnData has categories of, "
                f"{self.summary_stats.n_batch}, but has {cells.n_batch}"
            )
        self._start_pseudo_cells()
        moves = self.module.prior is not None and not self.module.frozen
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
        if moves and self.adata is not None:
            self.find_clusters()
        return found

    def _start_pseudo_cells(self) -> None:
        if self.init_params_["non_kwargs"]["prior"] not in ("vmm", "vamp"):
            return
        if self.adata is None:
            raise ValueError("adata must be given for pseudo-cells to start from, but is None")
        cells = self.module.prior.pseudo_inputs
        if cells.started:
            return
        number = len(cells.raw_counts)
        if self.adata.n_obs < number:
            raise ValueError(
                "n_components, times pseudo_inputs_per_component, must be at most the number of "
                f"cells, {self.adata.n_obs}, with pseudo-cells, but is {number}"
            )
        generator = np.random.default_rng(torch.initial_seed() % 2**32)
        chosen = np.sort(generator.choice(self.adata.n_obs, number, replace=False))
        loader = self._make_data_loader(self.adata, indices=chosen, batch_size=number)
        tensors = next(iter(loader))
        categories: list[Tensor] = []
        continuous = None
        if self.module.encode_covariates:
            continuous = tensors.get(REGISTRY_KEYS.CONT_COVS_KEY)
            categories += tensors[REGISTRY_KEYS.BATCH_KEY].unbind(1)
            if REGISTRY_KEYS.CAT_COVS_KEY in tensors:
                categories += tensors[REGISTRY_KEYS.CAT_COVS_KEY].unbind(1)
        cells.start_from(self.module.features(tensors), categories, continuous)

    @classmethod
    def load(cls, dir_path: str, *args: Any, trust: bool = False, **kwargs: Any) -> Any:
        """Load a saved model; unless ``trust``, refuse files that could run code.

        Without ``trust`` the file may hold nothing but tensors and tables.

        Raises
        ------
        ValueError
            If the file is damaged, or could run code when it is read.
        """
        if not trust:
            given = inspect.signature(super().load).bind(dir_path, *args, **kwargs).arguments
            check_saved(dir_path, given.get("prefix"), given.get("backup_url"))
        return super().load(dir_path, *args, **kwargs)

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
        weights stand next to those of their covariate. See :meth:`load` for ``trust``, if
        ``reference_model`` is a folder.
        """
        if isinstance(reference_model, str) and not trust:
            check_saved(reference_model)
        model = super().load_query_data(adata, reference_model, **kwargs)
        reference = (
            cls.load_registry(reference_model, trust=True)
            if isinstance(reference_model, str)
            else reference_model.registry
        )
        order_category_weights(
            model.module, numbers_of_categories(reference), numbers_of_categories(model.registry)
        )
        return model

    def _validate_anndata(self, adata: Any = None, copy_if_view: bool = True) -> Any:
        """Check cells as the model's own method does, and that they have the model's genes.

        The model's own method matches genes by position, whatever their names.

        Raises
        ------
        ValueError
            If the cells have other genes than the model, or have them in another order.
        """
        if adata is not None and adata is not self.adata:
            for modality, genes in self._genes().items():
                part = adata if modality is None else adata.mod[modality]
                _check_genes(part.var_names.astype(str), genes)
        return super()._validate_anndata(adata, copy_if_view)

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

    def _latents(self, adata: AnnData | None, indices: Any, batch_size: int | None) -> Tensor:
        self._check_if_trained(warn=False)
        means, _ = self.get_latent_representation(
            adata, indices=indices, batch_size=batch_size, return_dist=True
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
        self.module.components()  # raises if there are none
        tree: ClusterTree | None = self.module.tree
        if tree is None:
            raise ValueError(
                "clusters must have been found first: call find_clusters() with the cells that the "
                "model was trained on"
            )
        return tree

    def find_clusters(
        self, adata: AnnData | None = None, *, batch_size: int | None = None, **cut: Any
    ) -> None:
        """Group components into clusters by the cells that they share, and keep the clusters.

        :meth:`train` calls this at its end. Components do not change. Call it again after anything
        else that changes them, such as the prior's ``fit``.

        Parameters
        ----------
        adata : AnnData, optional
            The cells that the model was trained on; by default those that it was made with.
        batch_size : int, optional
        **cut
            ``resolution``, ``separation`` or ``n_clusters``: where the tree of components is cut;
            see :mod:`vmm_fast.clusters`.
        """
        self.keep_clusters_of(self._latents(adata, None, batch_size), **cut)

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
        clusters = self._clusters(**cut)
        return clusters.probabilities(self._latents(adata, indices, batch_size)).numpy()

    def get_clusters(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        **cut: Any,
    ) -> np.ndarray:
        """Return each cell's most probable cluster [cells].

        See :meth:`get_cluster_probabilities`.
        """
        means = self._latents(adata, indices, batch_size)
        return self._clusters(**cut).assign(means).labels.numpy()

    def get_cluster_entropy(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        **cut: Any,
    ) -> np.ndarray:
        """Return the entropy of each cell's cluster probabilities, [cells] in nats.

        See :meth:`get_cluster_probabilities`.
        """
        means = self._latents(adata, indices, batch_size)
        return self._clusters(**cut).assign(means).entropy.numpy()

    def get_component_probabilities(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Return the responsibilities of the components for each cell's posterior mean [cells, C].

        See :meth:`get_cluster_probabilities`, whose clusters are groups of components.
        """
        means = self._latents(adata, indices, batch_size)
        return self._components().responsibilities(means).numpy()

    def get_components(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Return each cell's most probable component [cells]."""
        return self._components().assign(self._latents(adata, indices, batch_size)).labels.numpy()


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


class ComponentExpression(LatentPriorModel):
    """A :class:`LatentPriorModel` that decodes to gene expression."""

    def get_importance_weights(
        self, *args: Any, zs: Tensor, truncation: bool = False, **kwargs: Any
    ) -> np.ndarray:
        """Return the importance weights [n] under the prior of n samples ``zs`` [..., D].

        :meth:`scvi.model.base.RNASeqMixin.get_importance_weights` returns those under N(0, I).
        """
        if self.module.prior is None:
            stock: np.ndarray = super().get_importance_weights(
                *args, zs=zs, truncation=truncation, **kwargs
            )
            return stock
        weights = super().get_importance_weights(*args, zs=zs, truncation=False, **kwargs)
        z = zs.reshape(-1, zs.shape[-1]).cpu()
        log_normal: Tensor = Normal(0, 1).log_prob(z)
        log_ratio = self._components().log_prob(z) - log_normal.sum(-1)
        log_weights = torch.from_numpy(weights).log() + log_ratio
        if truncation:
            log_weights = log_weights.clamp(
                min=log_weights.logsumexp(0) - math.log(len(log_weights))
            )
        return log_weights.softmax(0).numpy()

    @torch.inference_mode()
    def get_component_expression(
        self,
        components: Sequence[int] | None = None,
        n_samples: int = 100,
        transform_batch: Sequence[Any] | str | None = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | str = 1,
        batch_size: int | None = None,
        return_mean: bool = True,
    ) -> pd.DataFrame | np.ndarray:
        """Return the normalised (decoded) expression of samples from components of the prior.

        Besides z the decoder sees library size, batch and covariates: those of random cells.

        Parameters
        ----------
        components : sequence of int, optional
            Indices, as :meth:`get_components` gives them; all by default.
        n_samples : int
            Number of samples of each component.
        transform_batch : str or sequence of str, optional
            Batches to decode to, instead of those of the random cells; the mean over them is
            returned.
        gene_list : sequence of str, optional
            Genes to return, in the model's order; all by default.
        library_size : float or "latent"
            Sum of a cell's expression; "latent" takes that of the random cell.
        batch_size : int, optional
        return_mean : bool
            Whether to return the mean over the samples.

        Returns
        -------
        DataFrame [components, genes]
            With ``return_mean=False``, an ndarray [n_samples, components, genes].

        Raises
        ------
        ValueError
            For the prior N(0, I), and for components, genes or batches that the model does not
            have.
        """
        self._check_if_trained(warn=False)
        n_samples = check_integer("n_samples", n_samples)
        mixture = self.module.components()
        every = range(mixture.num_components)
        chosen = torch.tensor(np.asarray(every if components is None else components))
        z = mixture.sample(n_samples * len(chosen), chosen.repeat(n_samples).to(self.device))
        batches = _get_batch_code_from_category(self.adata_manager, transform_batch)
        names = self.get_var_names()
        genes = np.ones(len(names), bool) if gene_list is None else np.isin(names, gene_list)
        if unknown := sorted(set(gene_list or ()) - set(names)):
            raise ValueError(f"gene_list must hold genes of the model, but has {unknown[:5]}")
        cells = torch.randint(self.adata.n_obs, (len(z),)).numpy()
        found, done = [], 0
        for tensors in self._make_data_loader(self.adata, indices=cells, batch_size=batch_size):
            outputs = self.module.inference(**self.module._get_inference_input(tensors))
            rows = len(outputs["z"])
            outputs["z"] = self.module.z_encoder.z_transformation(z[done : done + rows])
            done += rows
            inputs = self.module._get_generative_input(tensors, outputs)
            decoded = [
                self.module.generative(**inputs, transform_batch=batch)["px"].get_normalized(
                    "mu" if library_size == "latent" else "scale"
                )[:, genes]
                for batch in batches
            ]
            found.append(torch.stack(decoded).mean(0).cpu())
        samples = torch.cat(found).reshape(n_samples, len(chosen), -1).numpy()
        if library_size != "latent":
            samples *= library_size
        if not return_mean:
            return samples
        index = pd.Index(chosen.numpy(), name="component")
        return pd.DataFrame(samples.mean(0), index, names[genes])


class VMMSCVI(ComponentExpression, SCVI):
    """:class:`scvi.model.SCVI` with a mixture prior: it integrates and clusters cells at once.

    It has the methods of SCVI, and those for clusters; parameters are those of
    :class:`LatentPriorModel`. Its encoder sees batches and covariates, SCVI's does not.
    """

    _module_cls = VMMVAE
    _training_plan_cls = EmpiricalBayesTrainingPlan


class VMMSCANVI(ComponentExpression, SCANVI):
    """:class:`scvi.model.SCANVI` with a mixture prior: labels of some cells guide the latents.

    It has the methods of SCANVI, and those for clusters; parameters are those of
    :class:`LatentPriorModel`.

    Notes
    -----
    The prior is on z1, the embedding that users get, in place of SCANVI's p(z1 | z2, y). SCANVI's
    z2, whose prior is N(0, I), holds what the label of a cell does not say: clusters of z2 would
    not be cell types.
    """

    _module_cls = VMMSCANVAE
    _training_plan_cls = EmpiricalBayesSemiSupervisedTrainingPlan

    @classmethod
    def from_scvi_model(cls, scvi_model: SCVI, *args: Any, **kwargs: Any) -> VMMSCANVI:
        """Start from a trained :class:`VMMSCVI`, with its prior, or from a trained SCVI.

        See :meth:`scvi.model.SCANVI.from_scvi_model`.
        """
        if "encode_covariates" not in scvi_model._module_kwargs:
            kwargs["encode_covariates"] = False
        model: VMMSCANVI = super().from_scvi_model(scvi_model, *args, **kwargs)
        return model


class VMMPEAKVI(LatentPriorModel, PEAKVI):
    """:class:`scvi.model.PEAKVI` with a mixture prior, for chromatin accessibility.

    It has the methods of PEAKVI, and those for clusters; parameters are those of
    :class:`LatentPriorModel`. ``train`` has PEAKVI's warm-up of 50 epochs.
    """

    _module_cls = VMMPEAKVAE
    _training_plan_cls = EmpiricalBayesTrainingPlan


class VMMTOTALVI(LatentPriorModel, TOTALVI):
    """:class:`scvi.model.TOTALVI` with a mixture prior, for genes and proteins of the same cells.

    It has the methods of TOTALVI, and those for clusters; parameters are those of
    :class:`LatentPriorModel`. Pseudo-cells have genes and proteins. ``train`` has TOTALVI's
    warm-up, which is counted in steps.
    """

    _module_cls = VMMTOTALVAE
    _training_plan_cls = EmpiricalBayesAdversarialTrainingPlan
