"""A learnt prior on the latent of scvi-tools' modules.

The losses of these modules have one KL divergence of q(z | x), that from N(0, I), and take q and
its sample z from ``inference``. With :class:`LatentPrior`, ``inference`` returns a q whose KL
divergence is, by torch's own dispatch, that from the prior. The losses stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from scvi import REGISTRY_KEYS
from scvi.module.base import BaseModuleClass
from torch import Tensor, nn
from torch.distributions import Normal, register_kl

from vmm_fast._checks import check_choice, check_integer
from vmm_fast.clusters import Clusters, ClusterTree, Confusion, find_clusters
from vmm_fast.inference.processes import average_over_processes
from vmm_fast.mixture import Components
from vmm_fast.priors import GaussianMixturePrior, Prior, VampPrior, VMMPrior
from vmm_fast.priors.bayesian_mixture import BayesianMixturePrior
from vmm_fast.scvi.novelty import KEPT_CELLS, distance_of, neighbours_among, novelty_of
from vmm_fast.scvi.pseudo_cells import Cells, PseudoCells

__all__ = ["PRIORS", "PRIOR_LEARNING_RATE", "LatentPrior", "PosteriorUnderPrior"]

PRIORS = ("vmm", "gmm", "vamp", "normal")

# Five times scvi-tools' rate for the network. Training takes a few thousand steps: at the network's
# rate superfluous components are not yet empty by then.
PRIOR_LEARNING_RATE = 5e-3
KEPT_POINTS = 16_384  # latent means that a model keeps, at most, to cut the tree elsewhere later


class PosteriorUnderPrior(Normal):
    """q(z | x) whose KL divergence from any Normal is replaced by that from ``module``'s prior.

    ``z`` is the sample [B, D] of q that the module decodes, or None. scvi-tools makes another one
    from ``loc`` and ``scale`` alone, to have the densities of many cells together.
    """

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        z: Tensor | None = None,
        module: LatentPrior | None = None,
    ):
        super().__init__(loc, scale, validate_args=False)
        self.z, self.module = z, module


@register_kl(PosteriorUnderPrior, Normal)
def _kl(q: PosteriorUnderPrior, _: Normal) -> Tensor:
    """Return KL(q || prior) [B, 1]; the modules sum over the last dimension."""
    assert q.module is not None
    return q.module.kl(q)[:, None]


# The state of the prior's own optimizer belongs in checkpoints of training. Saved models must not
# have it, because scvi-tools expects tensors alone there.
def _leave_out_private_state(
    module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any
) -> None:
    state.pop(f"{prefix}prior._extra_state", None)


def _expect_no_private_state(module: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    state.setdefault(f"{prefix}prior._extra_state", {})
    # For models that were saved before models had clusters:
    for name, value in module.no_clusters().items():
        state.setdefault(prefix + name, value)


class LatentPrior(BaseModuleClass):
    """Mixin for modules of scvi-tools, before the module's class: a learnt prior on its z.

    A class that uses it must define ``n_features``. It overrides :meth:`features`,
    :meth:`encoder_input` and ``z_encoder`` if those of its module differ.

    Parameters
    ----------
    *args
        Arguments of the module.
    prior : {"vmm", "gmm", "vamp", "normal"}
        "normal" is N(0, I), without anything learnt.
    n_components : int
        C.
    prior_kwargs : dict, optional
        Arguments of the prior's class; ``learning_rate`` is :data:`PRIOR_LEARNING_RATE` by default.
    **kwargs
        Further arguments of the module.

    Raises
    ------
    ValueError
        For an unknown prior.

    Attributes
    ----------
    prior : Prior or None
        None for N(0, I).
    n_categories : tuple of int
        Number of batches, then of the categories of every categorical covariate.
    warming_up : bool
        Whether N(0, I) stands in for the prior at the moment.
    prior_learnt : Tensor, a boolean scalar
        Whether training under the prior has begun.
    counts_training_cells : bool
        Whether the prior's ``data_size`` was not given, and so becomes the number of training
        cells unless it is set.
    counted_cells : int or None
        The number of training cells that it became.
    confusion_sums, confusion_counts, cluster_of_component : Tensor [C, C], [C], [C]
        The confusion of components and the clusters that they form, set by :meth:`keep_clusters`.
    cluster_points : Tensor [KEPT_POINTS, D]
        Latent means of cells; every cluster of another cut must hold some. Unused rows are
        infinite.
    novelty_cells : Tensor [3, KEPT_CELLS]
        The :meth:`rarity` of held-out cells. Unused columns are infinite.
    """

    prior: Prior | None
    prior_learnt: Tensor
    confusion_sums: Tensor
    confusion_counts: Tensor
    cluster_of_component: Tensor
    cluster_points: Tensor
    novelty_cells: Tensor
    warming_up = False
    counts_training_cells = False
    counted_cells: int | None = None
    # Defaults for modules that do not have these attributes:
    log_variational = False
    batch_representation = "one-hot"

    def __init__(
        self,
        *args: Any,
        prior: str = "vmm",
        n_components: int = 100,
        prior_kwargs: dict[str, Any] | None = None,
        n_batch: int = 0,
        n_continuous_cov: int = 0,
        n_cats_per_cov: Sequence[int] | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            *args,
            n_batch=n_batch,
            n_continuous_cov=n_continuous_cov,
            n_cats_per_cov=n_cats_per_cov,
            **kwargs,
        )
        check_choice("prior", prior, PRIORS)
        n_components = check_integer("n_components", n_components)
        self.n_categories = (n_batch, *(n_cats_per_cov or ()))
        prior_kwargs = {"learning_rate": PRIOR_LEARNING_RATE, **(prior_kwargs or {})}
        self.prior = None
        if prior == "gmm":
            self.prior = GaussianMixturePrior(n_components, self.n_latent, **prior_kwargs)
        elif prior != "normal":
            number = n_components * prior_kwargs.get("pseudo_inputs_per_component", 1)
            seen: dict[str, Any] = {}
            if self.encode_covariates:
                seen = {"n_categories": self.n_categories, "n_continuous": n_continuous_cov}
            cells = PseudoCells(number, self.n_features, **seen)
            make = VMMPrior if prior == "vmm" else VampPrior
            self.prior = make(cells, self.n_latent, **prior_kwargs)
        if self.prior is not None:
            self.register_buffer("prior_learnt", torch.tensor(False))
            mixture = isinstance(self.prior, BayesianMixturePrior)
            self.counts_training_cells = mixture and "data_size" not in prior_kwargs
            self.n_components = n_components
            for name, value in self.no_clusters().items():
                self.register_buffer(name, value)
            self.register_state_dict_post_hook(_leave_out_private_state)
            self.register_load_state_dict_pre_hook(_expect_no_private_state)

    @property
    def n_features(self) -> int:
        """Number G of counts in a pseudo-cell: of genes, regions, and so on."""
        raise NotImplementedError

    def features(self, tensors: dict[str, Tensor]) -> Tensor:
        """Return the counts [B, G] of a mini-batch, in the order that pseudo-cells have."""
        return tensors[REGISTRY_KEYS.X_KEY]

    def encoder_input(self, log_counts: Tensor) -> Tensor:
        """Return the input of ``z_encoder`` [B, G], given log(1 + counts)."""
        # Modules without log_variational encode the counts themselves.
        return log_counts if self.log_variational else log_counts.expm1()

    def encode(self, cells: Cells) -> Normal:
        """Return q(z | cells)."""
        inputs = [self.encoder_input(cells.log_counts), cells.continuous]
        categories = list(cells.categories)
        if self.encode_covariates and self.batch_representation == "embedding":
            batch = categories.pop(0)
            inputs.append(batch @ self.get_embedding(REGISTRY_KEYS.BATCH_KEY).weight)
        q: Normal = self.z_encoder(torch.cat(inputs, -1), *categories)[0]
        return q

    def encode_pseudo_cells(self, cells: Cells) -> Normal:
        """Return q(z | cells) without dropout and with running statistics, as after training.

        In training mode a batch normalisation would use the statistics of the pseudo-cells, which
        differ from those of the cells: components would move when training ends.
        """
        training = self.z_encoder.training
        self.z_encoder.eval()
        try:
            return self.encode(cells)
        finally:
            self.z_encoder.train(training)

    @property
    def frozen(self) -> bool:
        """Return whether no parameter of the prior is learnt, as in query mapping."""
        assert self.prior is not None
        return not any(p.requires_grad for p in self.prior.parameters())

    @property
    def learns_labels(self) -> bool:
        """Return whether the whole classifier, if any, is learnt; query mapping freezes some."""
        parameters = self.named_parameters()
        return all(p.requires_grad for name, p in parameters if name.startswith("classifier."))

    def kl(self, q: PosteriorUnderPrior) -> Tensor:
        """Return KL(q || prior) [B] in nats, estimated from q's sample.

        If the prior is frozen, no gradient reaches the encoder through the components either.
        """
        assert self.prior is not None
        z = q.z if q.z is not None and q.z.shape == q.loc.shape else None
        if self.frozen:
            return self.components().kl(q, z)
        return self.prior.kl(q, self.encode_pseudo_cells, z)

    def inference(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the module's outputs, with a q whose KL divergence is that from the prior."""
        outputs: dict[str, Any] = super().inference(*args, **kwargs)
        if self.prior is not None and not self.warming_up:
            q = outputs["qz"]
            q = PosteriorUnderPrior(q.loc, q.scale, self.sample_of(outputs), self)
            outputs["qz"] = q
            # `self.training` does not tell: scvi-tools leaves a loaded module in evaluation mode.
            if torch.is_grad_enabled():
                self._latest = q
        return outputs

    def sample_of(self, outputs: dict[str, Any]) -> Tensor | None:
        """Return q's sample, or None if ``z`` is a function of it (latent_distribution="ln")."""
        return outputs["z"] if self.latent_distribution == "normal" else None

    def decoding_for_loss(self) -> AbstractContextManager[None]:
        """Return a context for a training step, in which decoded values serve ``loss`` alone."""
        return nullcontext()

    def update_prior(self) -> None:
        """Take the empirical-Bayes step of the last batch, unless the prior is frozen."""
        assert self.prior is not None
        q, self._latest = self._latest, None
        if q is None or self.frozen:
            return
        # Each process's batch normalisations follow its own cells, but all processes must have the
        # same components and save the same model.
        average_over_processes(
            x
            for name, x in self.named_buffers()
            if x.is_floating_point()
            and not name.startswith(("prior.", "confusion_", "cluster_", "novelty_"))
        )
        self.prior.update(q if q.z is None else q.z, self.encode_pseudo_cells)
        self.prior_learnt.fill_(True)

    _latest: PosteriorUnderPrior | None = None

    @torch.no_grad()
    def components(self) -> Components:
        """Return the mixture at this moment, without gradients.

        Raises
        ------
        ValueError
            For N(0, I), which has no components.
        """
        return self._prior_with_components().components(self.encode_pseudo_cells).detach()

    def _prior_with_components(self) -> Prior:
        if self.prior is None:
            raise ValueError("prior must be 'vmm', 'gmm' or 'vamp' for clusters, but is 'normal'")
        return self.prior

    # --- clusters ---

    def no_clusters(self) -> dict[str, Tensor]:
        """Return the values that the buffers have before clusters and novelty are known."""
        count = self.n_components
        return {
            "confusion_sums": torch.zeros(count, count, dtype=torch.float64),
            "confusion_counts": torch.zeros(count, dtype=torch.int64),
            "cluster_of_component": torch.zeros(count, dtype=torch.int64),
            "cluster_points": torch.full((KEPT_POINTS, self.n_latent), math.inf),
            "novelty_cells": torch.full((3, KEPT_CELLS), math.inf),
        }

    @property
    def tree(self) -> ClusterTree | None:
        """The tree of components, on the CPU; None before clusters have been found.

        Raises
        ------
        ValueError
            As :meth:`components`.
        """
        self._prior_with_components()
        if not self.confusion_counts.any():
            return None
        sums, counts = self.confusion_sums, self.confusion_counts  # copied: they change in place
        return ClusterTree(Confusion(sums.cpu().clone(), counts.cpu().clone()))

    def keep_clusters(self, tree: ClusterTree, clusters: Clusters, points: Tensor) -> None:
        """Keep the tree, a cut of it and some random points, to be saved with the weights."""
        chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
        chosen = chosen[:KEPT_POINTS].sort().values
        self.cluster_points.fill_(math.inf)
        self.confusion_sums.copy_(tree.confusion.sums)
        self.confusion_counts.copy_(tree.confusion.counts)
        self.cluster_of_component.copy_(clusters.of_component)
        self.cluster_points[: len(chosen)] = points[chosen]

    def forget_clusters(self) -> None:
        """Reset clusters and novelty, because components are about to change."""
        for name, value in self.no_clusters().items():
            getattr(self, name).copy_(value)

    def other_clusters(self, **cut: Any) -> Clusters:
        """Return the clusters of another cut; see :func:`vmm_fast.clusters.find_clusters`."""
        components = self.components().to("cpu")
        return find_clusters(components, self._points(), tree=self.tree, **cut)

    # --- novelty ---

    def misfit(self, tensors: dict[str, Tensor], z: Tensor) -> Tensor:
        """Return how badly cells are decoded from z [B]; 0 here, so that z alone counts."""
        return z.new_zeros(len(z))

    def rarity(self) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
        """Return a function of mini-batches and z [B, D]: what tells new cells [3, B], on the CPU.

        See :mod:`vmm_fast.scvi.novelty`. Components and neighbours are those of this moment.
        """
        components, points = self.components().to("cpu"), neighbours_among(self._points())

        def rarity_of(tensors: dict[str, Tensor], z: Tensor) -> Tensor:
            misfit, z = self.misfit(tensors, z).cpu(), z.cpu()
            return torch.stack([-components.log_prob(z), distance_of(z, points), misfit])

        return rarity_of

    def _points(self) -> Tensor:
        points = self.cluster_points.cpu()
        return points[points[:, 0].isfinite()]

    @property
    def calibrated(self) -> bool:
        """Return whether held-out cells have been kept, which novelty is compared with."""
        return bool(self.novelty_cells[0].isfinite().any())

    def keep_novelty(self, cells: Tensor) -> None:
        """Keep the :meth:`rarity` [3, n] of held-out cells, the first KEPT_CELLS of them."""
        self.novelty_cells.fill_(math.inf)
        kept = cells[:, :KEPT_CELLS]
        self.novelty_cells[:, : kept.shape[1]] = kept

    def novelty(self, cells: Tensor) -> Tensor:
        """Return the novelty [B] of cells from their :meth:`rarity` [3, B].

        Raises
        ------
        ValueError
            If no held-out cells have been kept.
        """
        if not self.calibrated:
            raise ValueError(
                "novelty must have been calibrated first: call calibrate_novelty() with cells like "
                "those that the model was trained on, but others"
            )
        held_out = self.novelty_cells.cpu()
        return novelty_of(cells, held_out[:, held_out[0].isfinite()])
