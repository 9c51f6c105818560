"""The VampPrior (Tomczak & Welling 2018, arXiv 1705.07120)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vmm_fast._checks import check_integer
from vmm_fast.mixture import Components
from vmm_fast.priors.base import Encoder
from vmm_fast.priors.learnt import LearntPrior
from vmm_fast.priors.options import VampOptions
from vmm_fast.priors.pseudo_inputs import as_pseudo_inputs, centers_at, encode_with

__all__ = ["VampPrior"]


class VampPrior(LearntPrior):
    """A uniform mixture of the posteriors at K pseudo-inputs: p(z) = 1/K sum_k N(z; m_k, S_k).

    Its density is that of a VMMPrior with one component and Lambda^-1 = 0. To compare it as a
    clustering, each pseudo-input counts as a component here (C = K), and the log-joint is exact:
    log 1/K + log N(z; m_k, S_k).

    Parameters
    ----------
    pseudo_inputs : Tensor [K, ...] or Module
        Initial pseudo-inputs (copied), or a module whose call gives what the encoder takes.
    latent_dim : int
        D.
    learning_rate : float
        Of the private Adam, as if pseudo-inputs moved in every call of :meth:`update`.
    update_every : int
        In how many calls of :meth:`update` pseudo-inputs move once; see :class:`vmm_fast.VMMPrior`.
    joint : bool
        Let :meth:`kl` train the pseudo-inputs together with the network, as the VampPrior's authors
        do; then :meth:`update` does nothing.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.

    Examples
    --------
    >>> network = torch.nn.Linear(5, 2)
    >>> def encoder(x):
    ...     return torch.distributions.Normal(network(x), 0.1)
    >>> prior = VampPrior(torch.randn(10, 5), latent_dim=2)
    >>> prior.components(encoder)
    Components(10 components, 10 centers, 2 dimensions)
    """

    def __init__(
        self,
        pseudo_inputs: Tensor | nn.Module,
        latent_dim: int,
        learning_rate: float = VampOptions.learning_rate,
        update_every: int = VampOptions.update_every,
        joint: bool = VampOptions.joint,
    ):
        super().__init__()
        self.options = VampOptions(learning_rate, update_every, joint)
        self.latent_dim = check_integer("latent_dim", latent_dim)
        self.pseudo_inputs, first = as_pseudo_inputs(pseudo_inputs)
        self.num_components = len(first)
        self._learn(self.parameters())

    def _pseudo_inputs(self) -> Iterable[nn.Parameter]:
        return self.parameters()

    def _centers(self, encoder: Encoder | None, differentiable: bool) -> tuple[Tensor, Tensor]:
        shape = (self.num_components, self.latent_dim)
        u, joint = self.pseudo_inputs, self.joint
        return centers_at(u, encoder, shape, differentiable=differentiable, joint=joint)

    def encode(self, x: Tensor, encoder: Encoder) -> tuple[Distribution, Encoder]:
        """Return a batch's posteriors, and an encoder for :meth:`kl` in the same training step.

        See :meth:`vmm_fast.priors.Prior.encode`.
        """
        if self._kept_mixture() is not None:
            return encoder(x), encoder
        return encode_with(self.pseudo_inputs, x, encoder, self.joint)

    def _mixture(self, centers: Tensor, scale: Tensor | None) -> Components:
        uniform = centers.new_full((self.num_components,), -math.log(self.num_components))
        return Components(centers, uniform, None, scale)

    def _map_loss(self, centers: Tensor, scale: Tensor | None, z: Tensor) -> Tensor:
        return -self._mixture(centers, scale).log_prob(z).mean()

    def _map_gradients(
        self,
        centers: Tensor,
        scale: Tensor | None,
        z: Tensor,
        learnt: Sequence[Tensor],
        batch: int,
    ) -> tuple[float | Tensor, Sequence[Tensor | None], None]:
        if not learnt:
            return 0.0, (), None
        loss = self._map_loss(centers, scale, z)
        gradients = torch.autograd.grad(loss, learnt, allow_unused=True)
        return loss.detach(), gradients, None

    def map_loss(self, z: Tensor, encoder: Encoder | None = None) -> Tensor:
        """Return -1/B sum_i log p(z_i), a scalar in nats per point."""
        if len(z) == 0:
            raise ValueError("z must have at least one row, but is empty")
        return self._map_loss(*self._centers(encoder, differentiable=True), z)

    def _follow(self, z: Tensor, encoder: Encoder | None) -> None:
        """Refuse points that no step could learn from: nothing but pseudo-inputs is learnt."""
        if not z.isfinite().all():
            raise FloatingPointError("z must be finite, but is not; the prior is unchanged")

    def _take_step(self, z: Tensor, encoder: Encoder | None) -> None:
        """Take one Adam step on :meth:`map_loss` with the pseudo-inputs, if they are learnt."""
        if self._adam is None:
            return
        step = self._step(z, encoder)
        self._adam.descend(step.loss, step.gradients)
