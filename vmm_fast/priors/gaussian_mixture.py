"""The Bayesian Gaussian mixture prior: VMMPrior with free centers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from vmm_fast._checks import check_integer
from vmm_fast.priors.base import Encoder
from vmm_fast.priors.bayesian_mixture import BayesianMixturePrior
from vmm_fast.priors.options import MixtureOptions

__all__ = ["GaussianMixturePrior"]


class GaussianMixturePrior(BayesianMixturePrior):
    """A Bayesian Gaussian mixture: p(z) = sum_c pi_c N(z; m_c, Lambda_c^-1), m_c ~ N(0, I).

    Parameters
    ----------
    num_components : int
        C.
    latent_dim : int
        D.
    centers : Tensor [C, D], optional
        Initial m; drawn from N(0, I) unless given.
    weights, inference, responsibility_gradient, data_size, learning_rate, joint, map_prior, \
    concentration, discount, statistics_rate
        As for :class:`vmm_fast.VMMPrior`. Centers have a closed form here too.

    Attributes
    ----------
    centers : Parameter [C, D]
    logits, precision_cholesky, concentration
        As for :class:`vmm_fast.VMMPrior`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.

    Examples
    --------
    >>> prior = GaussianMixturePrior(2, latent_dim=1, centers=torch.tensor([[-3.0], [3.0]]))
    >>> prior.assign(torch.tensor([[-2.5], [4.0]])).labels
    tensor([0, 1])
    >>> prior.distribution().mean
    tensor([0.])
    """

    def __init__(
        self,
        num_components: int,
        latent_dim: int,
        centers: Tensor | None = None,
        weights: Literal["dirichlet", "stick-breaking"] = MixtureOptions.weights,
        inference: Literal["gradient", "closed-form"] = MixtureOptions.inference,
        responsibility_gradient: bool = MixtureOptions.responsibility_gradient,
        data_size: int | None = MixtureOptions.data_size,
        learning_rate: float = MixtureOptions.learning_rate,
        joint: bool = MixtureOptions.joint,
        map_prior: Literal["none", "fixed", "learnt"] = MixtureOptions.map_prior,
        concentration: float = MixtureOptions.concentration,
        discount: float = MixtureOptions.discount,
        statistics_rate: float = MixtureOptions.statistics_rate,
    ):
        options = MixtureOptions.of_arguments({**locals(), "update_every": 1})
        nn.Module.__init__(self)
        num_components = check_integer("num_components", num_components)
        latent_dim = check_integer("latent_dim", latent_dim)
        if centers is None:
            centers = torch.randn(num_components, latent_dim)
        if not isinstance(centers, Tensor) or not centers.is_floating_point():
            raise TypeError("centers must be a tensor of a floating dtype")
        if centers.shape != (num_components, latent_dim) or not centers.isfinite().all():
            raise ValueError(
                f"centers must be finite and of shape {[num_components, latent_dim]}, "
                f"but has shape {list(centers.shape)}"
            )
        # Contiguous, since compiled code writes the centers in place.
        self.centers = nn.Parameter(centers.detach().clone(memory_format=torch.contiguous_format))
        super().__init__(num_components, latent_dim, 1, options, self.centers.dtype)

    _free_centers = True

    def _centers(self, encoder: Encoder | None, differentiable: bool) -> tuple[Tensor, None]:
        return (self.centers if differentiable else self.centers.detach()), None

    def _pseudo_inputs(self) -> Iterable[nn.Parameter]:
        return ()
