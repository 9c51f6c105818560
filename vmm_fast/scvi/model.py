"""Models of scvi-tools with a mixture prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scvi.external import CYTOVI
from scvi.model import PEAKVI, SCANVI, SCVI, TOTALVI
from scvi.model._utils import _get_batch_code_from_category
from torch import Tensor
from torch.distributions import Normal

from vmm_fast._checks import check_integer
from vmm_fast._text import counted
from vmm_fast.scvi.latent_prior_model import LatentPriorModel
from vmm_fast.scvi.markers import MarkerGenes
from vmm_fast.scvi.module import VMMPEAKVAE, VMMSCANVAE, VMMTOTALVAE, VMMVAE, VMMCytoVAE
from vmm_fast.scvi.training import (
    EmpiricalBayesAdversarialTrainingPlan,
    EmpiricalBayesSemiSupervisedTrainingPlan,
    EmpiricalBayesTrainingPlan,
)

CHUNK = 16_384  # cells that are classified together

__all__ = ["VMMCYTOVI", "VMMPEAKVI", "VMMSCANVI", "VMMSCVI", "VMMTOTALVI", "ComponentExpression"]


class ComponentExpression(MarkerGenes, LatentPriorModel):
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
        chosen = torch.tensor(np.ascontiguousarray(every if components is None else components))
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

    Examples
    --------
    >>> import anndata
    >>> counts = np.random.default_rng(0).poisson(2.0, (200, 30)).astype(np.float32)
    >>> adata = anndata.AnnData(counts)
    >>> VMMSCVI.setup_anndata(adata)
    >>> model = VMMSCVI(adata, n_components=10)
    >>> model.train(2, enable_progress_bar=False)
    >>> model.get_latent_representation().shape
    (200, 10)
    >>> model.get_clusters().shape
    (200,)
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
    labels_: np.ndarray
    original_label_key: str
    unlabeled_category_: Any
    _label_mapping: np.ndarray
    _labeled_indices: np.ndarray

    def _set_indices_and_labels(self, *args: Any, **kwargs: Any) -> None:
        """Keep the cells' labels, and the unlabelled category behind them.

        SCANVI takes that category for a label unless it finds it here, or every label: a model may
        be made with cells that have neither.

        Raises
        ------
        ValueError
            If there are not two labels or more, which a classifier needs.
        """
        super()._set_indices_and_labels(*args, **kwargs)
        known = [x for x in self._label_mapping if x != self.unlabeled_category_]
        if len(known) < 2:
            held = f"{known[0]!r} alone" if known else "none"
            raise ValueError(
                f"obs[{self.original_label_key!r}] must hold two labels or more, but holds {held}; "
                f"{len(self._labeled_indices):,} of {counted(len(self.labels_), 'cell')} have one, "
                f"labels of the others are unknown ({self.unlabeled_category_!r})"
            )
        if self.adata is not None:
            self.labels_ = np.append(self.labels_, self.unlabeled_category_)

    @torch.inference_mode()
    def predicted_labels(self, means: Tensor) -> np.ndarray:
        """Return the index of the most probable label of posterior means [cells, D]."""
        self.module.eval()
        found = [
            self.module.classify_helper(z.to(self.device)).argmax(-1) for z in means.split(CHUNK)
        ]
        return torch.cat(found).cpu().numpy()

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


class _FromDataModule(TOTALVI):
    """TOTALVI whose ``train`` takes a ``datamodule``, as those of other models do."""

    def train(self, *args: Any, datamodule: Any = None, **kwargs: Any) -> Any:
        if datamodule is None:
            return super().train(*args, **kwargs)
        # TOTALVI's default, which counts the cells that the model was made with.
        kwargs.setdefault("n_steps_kl_warmup", int(0.75 * datamodule.n_obs))
        self._data_splitter_cls = lambda *_, **__: datamodule
        try:
            return super().train(*args, **kwargs)
        finally:
            del self._data_splitter_cls


class VMMTOTALVI(LatentPriorModel, _FromDataModule):
    """:class:`scvi.model.TOTALVI` with a mixture prior, for genes and proteins of the same cells.

    It has the methods of TOTALVI, and those for clusters; parameters are those of
    :class:`LatentPriorModel`. Pseudo-cells have genes and proteins. ``train`` has TOTALVI's
    warm-up, which is counted in steps, and takes a :class:`CellDataModule` with ``proteins``.
    """

    _module_cls = VMMTOTALVAE
    _training_plan_cls = EmpiricalBayesAdversarialTrainingPlan


class _WithoutMixture(CYTOVI):
    """CYTOVI without its own mixture, which it has by default."""

    def __init__(self, adata: Any, *, prior_mixture: bool | None = False, **kwargs: Any):
        if prior_mixture:
            raise ValueError(
                f"prior_mixture must be False, but is {prior_mixture!r}: CYTOVI's own mixture is "
                "left out; prior='gmm' is one"
            )
        super().__init__(adata, prior_mixture=False, **kwargs)


class VMMCYTOVI(LatentPriorModel, _WithoutMixture):
    """:class:`scvi.external.CYTOVI` with a mixture prior, for cytometry.

    It has the methods of CYTOVI, and those for clusters; parameters are those of
    :class:`LatentPriorModel`, and CYTOVI's own mixture, ``prior_mixture``, is left out. Intensities
    must be above -1, as scaled ones are.
    """

    _module_cls = VMMCytoVAE
    _training_plan_cls = EmpiricalBayesAdversarialTrainingPlan
