"""The standard normal prior of the stock VAE (Kingma & Welling 2014)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution

from vmm_fast._checks import check_integer
from vmm_fast.mixture import (
    Components,
    check_kl,
    check_sample,
    gaussian_entropy,
    gaussian_parameters,
)
from vmm_fast.priors.base import Encoder, Prior

__all__ = ["StandardNormalPrior"]


class StandardNormalPrior(Prior):
    """N(0, I) over z [D]: one component and nothing to learn.

    Parameters
    ----------
    latent_dim : int
        D.

    Raises
    ------
    ValueError
        If ``latent_dim`` is no integer of at least 1.

    Examples
    --------
    >>> q = torch.distributions.Normal(torch.ones(1, 2), torch.ones(1, 2))
    >>> StandardNormalPrior(2).kl(q)
    tensor([1.])
    """

    def __init__(self, latent_dim: int):
        super().__init__()
        self.latent_dim = check_integer("latent_dim", latent_dim)
        self.num_components = 1
        self._zero: Tensor
        # A buffer moves with the module, so that components() has its device and dtype.
        self.register_buffer("_zero", torch.zeros(1, latent_dim), persistent=False)

    def components(self, encoder: Encoder | None = None) -> Components:
        """Return N(0, I) as a mixture of one component."""
        eye = torch.eye(self.latent_dim, dtype=self._zero.dtype, device=self._zero.device)
        return Components(self._zero, self._zero[:, 0], eye[None])

    def kl(
        self, q: Distribution, encoder: Encoder | None = None, z: Tensor | None = None
    ) -> Tensor:
        """Return KL(q || N(0, I)) [B] in nats, exact unless ``z`` is given.

        -H(q) + D/2 log 2 pi + 1/2 (|m|^2 + tr S); for a given z, |z|^2 in place of |m|^2 + tr S.
        """
        mean, scale = gaussian_parameters(self._check_posterior(q))
        if z is None:
            square = mean.square().sum(-1) + scale.square().flatten(1).sum(-1)
        else:
            square = check_sample(z, mean).square().sum(-1)
        constant = self.latent_dim * math.log(2 * math.pi)
        return check_kl(0.5 * (square + constant) - gaussian_entropy(q))

    def extra_repr(self) -> str:
        """Return the settings as text."""
        return str(self.latent_dim)
