"""scVI with a mixture prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.model import SCVI
from torch import Tensor

from vmm_fast.mixture import Components
from vmm_fast.scvi.module import VMMVAE
from vmm_fast.scvi.training import EmpiricalBayesTrainingPlan

__all__ = ["VMMSCVI"]


class VMMSCVI(SCVI):
    """:class:`scvi.model.SCVI` with a mixture prior: integrates and clusters cells at once.

    Its interface is SCVI's, with clusters besides.

    Parameters
    ----------
    adata : AnnData, optional
        Registered by :meth:`setup_anndata`.
    registry : dict, optional
    prior : {"vmm", "gmm", "vamp", "normal"}
        VampPrior Mixture Model, Gaussian mixture with free centers, VampPrior, or SCVI's N(0, I).
    n_components : int
        C, more than there are clusters: those that are not needed go empty.
    prior_kwargs : dict, optional
        Of :class:`vmm_fast.VMMPrior`, :class:`vmm_fast.GaussianMixturePrior` or
        :class:`vmm_fast.VampPrior`.
    encode_covariates : bool
        Whether the encoder sees batches and covariates: True as in the paper, unlike SCVI.
    **kwargs
        Of :class:`scvi.model.SCVI` and :class:`scvi.module.VAE`.

    Notes
    -----
    Stirn & Knowles (2024), arXiv 2402.04412. Pseudo-inputs are pseudo-cells with learnt counts and
    a soft membership in batches; they start from random cells and never see a label.
    """

    _module_cls = VMMVAE
    _training_plan_cls = EmpiricalBayesTrainingPlan

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        prior: str = "vmm",
        n_components: int = 100,
        prior_kwargs: dict[str, Any] | None = None,
        encode_covariates: bool = True,
        **kwargs: Any,
    ):
        super().__init__(
            adata,
            registry,
            prior=prior,
            n_components=n_components,
            prior_kwargs=prior_kwargs,
            encode_covariates=encode_covariates,
            **kwargs,
        )
        self._model_summary_string += f" Prior: {prior}, n_components: {n_components}."
        self.init_params_ = self._get_init_params(locals())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as :meth:`scvi.model.SCVI.train` does; pseudo-cells start from random cells.

        Raises
        ------
        ValueError
            If there are fewer cells than pseudo-cells, or no AnnData to take them from.
        """
        self._start_pseudo_cells()
        return super().train(*args, **kwargs)

    def _start_pseudo_cells(self) -> None:
        if self._module_kwargs["prior"] not in ("vmm", "vamp"):
            return
        if self.adata is None:
            raise ValueError("adata must be given for pseudo-cells to start from, but is None")
        cells = self.module.prior.pseudo_inputs
        if cells.started:
            return
        number = len(cells.raw_counts)
        if self.adata.n_obs < number:
            raise ValueError(
                f"n_components must be at most the number of cells, {self.adata.n_obs}, with "
                f"pseudo-cells, but there are {number} of these"
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
        cells.start_from(tensors[REGISTRY_KEYS.X_KEY], categories, continuous)

    # --- clusters ---

    def _latents(self, adata: AnnData | None, indices: Any, batch_size: int | None) -> Tensor:
        self._check_if_trained(warn=False)
        means = self.get_latent_representation(adata, indices=indices, batch_size=batch_size)
        return torch.from_numpy(np.asarray(means))

    def _components(self) -> Components:
        return self.module.components().to("cpu")

    def get_cluster_probabilities(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Responsibilities of the components for each cell's posterior mean.

        Parameters
        ----------
        adata : AnnData, optional
            With the genes of the one that the model was made with, which is the default.
        indices : sequence of int, optional
            Of cells; all by default.
        batch_size : int, optional

        Returns
        -------
        ndarray [cells, C]
            Rows sum to 1.
        """
        return (
            self._components().responsibilities(self._latents(adata, indices, batch_size)).numpy()
        )

    def get_clusters(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Most probable component of each cell, [cells]; see :meth:`get_cluster_probabilities`."""
        return self._components().assign(self._latents(adata, indices, batch_size)).labels.numpy()

    def get_cluster_entropy(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Entropy of each cell's cluster probabilities, [cells] in nats."""
        return self._components().assign(self._latents(adata, indices, batch_size)).entropy.numpy()
