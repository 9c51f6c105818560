"""The interface of all priors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vmm_fast.clusters import Clusters, find_clusters
from vmm_fast.mixture import (
    Assignment,
    Components,
    MixtureDistribution,
    gaussian_parameters,
    gaussian_sample,
)

__all__ = ["Encoder", "Prior"]

Encoder = Callable[[Any], Distribution]


class Prior(nn.Module):
    """A prior over latent vectors z [D] that is a mixture of Gaussians.

    ``encoder`` is any callable from inputs to a torch.distributions Normal (with or without
    Independent) or MultivariateNormal; priors without pseudo-inputs ignore it. Densities are in
    nats.

    Subclasses define :meth:`components` and, if they learn, :meth:`map_loss` and :meth:`update`.
    """

    latent_dim: int

    def components(self, encoder: Encoder | None = None) -> Components:
        """Return the mixture at this moment, for repeated use without ``encoder``.

        It has the methods of a prior that follow here. Gradients reach the encoder but not the
        prior's own parameters, unless ``joint=True``. To keep the mixture, call its ``detach()``.
        """
        raise NotImplementedError

    def encode(self, x: Tensor, encoder: Encoder) -> tuple[Distribution, Encoder]:
        """Return a batch's posteriors, and an encoder for :meth:`kl` in the same training step.

        If batch and pseudo-inputs have one shape, dtype and device, ``encoder`` is called once on
        the rows of both: it reads the network's weights once and adds to their gradients once. A
        batch normalisation would normalise them together.

        Parameters
        ----------
        x : Tensor [B, ...]
        encoder : callable

        Returns
        -------
        q : Distribution
            The same as ``encoder(x)``, up to rounding.
        at_pseudo_inputs : callable
            An encoder for :meth:`kl` alone: it knows only the pseudo-inputs' posteriors.
        """
        return encoder(x), encoder

    def kl(
        self, q: Distribution, encoder: Encoder | None = None, z: Tensor | None = None
    ) -> Tensor:
        """Return the estimate -H(q) - log p(z) of KL(q || p) [B], in nats.

        Parameters
        ----------
        q : Distribution
            Posteriors of a batch, Normal (with or without Independent) or MultivariateNormal.
        encoder : callable
        z : Tensor [B, D], optional
            A sample of q; ``q.rsample()`` unless given.

        Raises
        ------
        TypeError, ValueError
            If q is not Gaussian or has another dimension, and as :mod:`vmm_fast.ops` says.
        """
        return self.components(encoder).kl(self._check_posterior(q), z)

    def log_prob(self, z: Tensor, encoder: Encoder | None = None) -> Tensor:
        """Return log p(z) [B] of points z [B, D], in nats."""
        return self.components(encoder).log_prob(z)

    def log_joint(self, z: Tensor, encoder: Encoder | None = None) -> Tensor:
        """Return the expected log-joint of every component [B, C], in nats."""
        return self.components(encoder).log_joint(z)

    def responsibilities(self, z: Tensor, encoder: Encoder | None = None) -> Tensor:
        """Return the probability of each component [B, C], the softmax of :meth:`log_joint`."""
        return self.components(encoder).responsibilities(z)

    @torch.no_grad()
    def assign(self, z: Tensor, encoder: Encoder | None = None) -> Assignment:
        """Return the most probable component, its probability and the entropy of all; each [B]."""
        return self.components(encoder).assign(z)

    @torch.no_grad()
    def clusters(
        self,
        z: Tensor | Iterable[Tensor],
        encoder: Encoder | None = None,
        *,
        resolution: float | None = None,
        separation: float | None = None,
        n_clusters: int | None = None,
    ) -> Clusters:
        """Return clusters: groups of components whose points the mixture cannot tell apart.

        Parameters
        ----------
        z : Tensor [N, D] or iterable of Tensor [B, D]
            Points to be clustered, for instance the posterior means of the training data.
        encoder : callable
        resolution, separation, n_clusters : optional
            Where the tree of components is cut; see :mod:`vmm_fast.clusters`.

        Returns
        -------
        Clusters
            They assign any points, without ``encoder``. The largest cluster has number 0.

        Raises
        ------
        ValueError
            If there are no points, or as :meth:`vmm_fast.clusters.ClusterTree.cut` says.
        """
        return find_clusters(
            self.components(encoder).detach(),
            z,
            resolution=resolution,
            separation=separation,
            n_clusters=n_clusters,
        )

    @torch.no_grad()
    def sample(
        self, n: int, encoder: Encoder | None = None, component: int | Tensor | None = None
    ) -> Tensor:
        """Draw z [n, D] from the prior or from one component (an index, or [n] of them)."""
        return self.components(encoder).sample(n, component)

    @torch.no_grad()
    def active_components(
        self, z: Tensor | None = None, encoder: Encoder | None = None, threshold: float = 0.002
    ) -> Tensor:
        """Return the indices of components whose share exceeds ``threshold``, largest first.

        The share is that of the points z [B, D], or the component's weight if z is not given.
        """
        return self.components(encoder).active_components(z, threshold)

    def distribution(self, encoder: Encoder | None = None) -> MixtureDistribution:
        """Return the prior as a ``torch.distributions.Distribution``."""
        return self.components(encoder).distribution()

    def map_loss(self, z: Tensor, encoder: Encoder | None = None) -> Tensor:
        """Return the negative empirical-Bayes objective, a scalar in nats per point."""
        raise NotImplementedError(f"{type(self).__name__} has nothing to learn")

    def update(self, q_or_z: Distribution | Tensor, encoder: Encoder | None = None) -> None:
        """Take one empirical-Bayes step: the prior moves, the network is held fixed.

        Parameters
        ----------
        q_or_z : Distribution or Tensor [B, D]
            The batch's posteriors, of which one sample is drawn, or a sample of them.
        encoder : callable
        """

    def _check_posterior(self, q: Distribution) -> Distribution:
        mean, _ = gaussian_parameters(q)
        if mean.shape[1] != self.latent_dim:
            raise ValueError(
                f"q must have latent_dim = {self.latent_dim} dimensions, but has {mean.shape[1]}"
            )
        return q

    def _latents(self, q_or_z: Distribution | Tensor) -> Tensor:
        """Return latent points z [B, D] without gradients, from the argument of ``update``."""
        if isinstance(q_or_z, Tensor):
            z = q_or_z
        else:
            with torch.no_grad():
                z = gaussian_sample(self._check_posterior(q_or_z))
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"z must have shape [B, {self.latent_dim}], but has {list(z.shape)}")
        if len(z) == 0:
            raise ValueError("z must have at least one row, but is empty")
        with torch.inference_mode(False):  # an inference tensor cannot enter a graph; a copy can
            return z.clone() if z.is_inference() else z.detach()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; of a parameter, as in ``prior.logits = tensor``, only the values."""
        parameter = self.__dict__.get("_parameters", {}).get(name)
        if parameter is not None and isinstance(value, Tensor):
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{name} must have shape {list(parameter.shape)}, but has {list(value.shape)}"
                )
            if value.isnan().any():
                raise ValueError(f"{name} must not hold NaN")
            with torch.no_grad():
                parameter.copy_(value)
            return
        super().__setattr__(name, value)
