"""The VampPrior Mixture Model's steps in plain eager torch, as one writes them without vmm_fast.

The same maths as :class:`vmm_fast.VMMPrior` with Dirichlet weights, a learnt concentration and one
pseudo-input a component, its parameters by the same names; what the bench compares it with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Dirichlet,
    Distribution,
    MixtureSameFamily,
    MultivariateNormal,
)
from torch.nn.functional import softplus

from vmm_fast import VMMPrior, reference
from vmm_fast.inference import closed_form
from vmm_fast.inference.map_objective import wishart_scale
from vmm_fast.priors import Prior
from vmm_fast.priors.base import Encoder


class EagerVMM(Prior):
    """Takes its settings and its start from a :class:`vmm_fast.VMMPrior`.

    Its encoder gives a MultivariateNormal, and ``update`` takes points alone.
    """

    pseudo_inputs: nn.Parameter
    logits: nn.Parameter
    raw_precision: nn.Parameter
    raw_alpha: nn.Parameter

    def __init__(self, prior: VMMPrior):
        super().__init__()
        self.latent_dim, self.num_components = prior.latent_dim, prior.num_components
        self.closed_form = prior.inference == "closed-form"
        self.rate, self.data_size = prior.statistics_rate, prior.data_size
        for name, value in prior.named_parameters():
            setattr(self, name, nn.Parameter(value.detach().clone()))
        learnt = [self.pseudo_inputs] if self.closed_form else list(self.parameters())
        self.adam = torch.optim.Adam(learnt, lr=prior.learning_rate, eps=1e-7)
        self.running: tuple[Tensor, ...] | None = None

    def _precision_cholesky(self) -> Tensor:
        diagonal = softplus(self.raw_precision.diagonal(dim1=-2, dim2=-1))
        return self.raw_precision.tril(-1) + torch.diag_embed(diagonal)

    def kl(self, q: Distribution, encoder: Encoder, z: Tensor | None = None) -> Tensor:
        """-H(q) - log p(z) [B]; no gradient for the prior's own parameters."""
        z = q.rsample() if z is None else z
        posterior = encoder(self.pseudo_inputs.detach())
        with torch.no_grad():
            covariance = torch.cholesky_inverse(self._precision_cholesky())
            weights = Categorical(logits=self.logits, validate_args=False)
        scale = posterior.scale_tril
        components = MultivariateNormal(
            posterior.mean, covariance + scale @ scale.mT, validate_args=False
        )
        prior = MixtureSameFamily(weights, components, validate_args=False)
        return -q.entropy() - prior.log_prob(z)

    def _expected(self, posterior: Distribution) -> tuple[Tensor, Tensor, Tensor]:
        """Centers, L and offsets of the expected log-joint, as a whitened mixture by L^T."""
        factor = self._precision_cholesky()
        penalty = 0.5 * (factor.mT @ posterior.scale_tril).square().sum((-2, -1))
        logdet = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * self.latent_dim * math.log(2 * math.pi)
        return posterior.mean, factor, self.logits.log_softmax(-1) + logdet - constant - penalty

    def map_loss(self, z: Tensor, encoder: Encoder) -> Tensor:
        """Negative empirical-Bayes objective with the gradient through the responsibilities."""
        return self._map_loss(z, encoder(self.pseudo_inputs))

    def _map_loss(self, z: Tensor, posterior: Distribution) -> Tensor:
        centers, factor, offsets = self._expected(posterior)
        count, dim = centers.shape
        shift = (factor.mT @ centers[..., None])[..., 0]
        y = (z @ factor.permute(1, 0, 2).flatten(1)).unflatten(1, (count, dim)) - shift
        log_joint = offsets - 0.5 * y.square().sum(-1)
        data = (log_joint.softmax(-1) * log_joint).sum(-1).mean()

        alpha = softplus(self.raw_alpha)
        weights = self.logits.softmax(-1)
        concentration = (1 / (alpha * count)).expand(count)
        log_prior = Dirichlet(concentration, validate_args=False).log_prob(weights) - alpha
        squares = centers.square().sum() + posterior.scale_tril.square().sum()
        log_prior = log_prior - 0.5 * (squares + count * dim * math.log(2 * math.pi))
        v, df = wishart_scale(count, dim), dim + 2
        normaliser = 0.5 * df * dim * math.log(2 * v) + torch.special.multigammaln(
            torch.tensor(0.5 * df), dim
        )
        logdet = factor.diagonal(dim1=-2, dim2=-1).log().sum()
        log_prior = log_prior + logdet - 0.5 / v * factor.square().sum() - count * normaliser
        return -data - log_prior / (self.data_size or len(z))

    def update(self, z: Tensor, encoder: Encoder) -> None:
        """One Adam step on :meth:`map_loss`; in the closed form of the pseudo-inputs alone."""
        posterior = encoder(self.pseudo_inputs)
        self.adam.zero_grad()
        self._map_loss(z, posterior).backward()
        self.adam.step()
        if self.closed_form:
            with torch.no_grad():
                self._online_step(z, posterior)

    def _online_step(self, z: Tensor, posterior: Distribution) -> None:
        """Running statistics, then the maximisers of weights, concentration and precisions."""
        centers, factor, offsets = self._expected(posterior)
        batch = reference.mixture_statistics(z, centers, factor, offsets, transpose=True)
        if self.running is None:
            weights = self.logits.softmax(-1)
            covariance = torch.cholesky_inverse(factor)
            start = (weights, torch.zeros_like(centers), weights[:, None, None] * covariance)
        else:
            start = self.running
        self.running = tuple(
            (1 - self.rate) * old + self.rate / len(z) * new
            for old, new in zip(start, batch, strict=True)
        )
        count = self.data_size or len(z)
        n, _, m = (count * x for x in self.running)

        scale = posterior.scale_tril
        scatter = n[:, None, None] * (scale @ scale.mT) + m
        eye = torch.eye(self.latent_dim)
        scatter = scatter + eye / wishart_scale(self.num_components, self.latent_dim)
        precision = (n + 1)[:, None, None] * torch.linalg.inv(scatter)
        factor = torch.linalg.cholesky(precision)
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        raw = factor.tril(-1) + torch.diag_embed(diagonal + torch.log(-torch.expm1(-diagonal)))
        self.raw_precision.copy_(raw)

        log_weights, concentration = closed_form.maximise_weights(
            n,
            float(1 / softplus(self.raw_alpha)),
            weights="dirichlet",
            discount=0.0,
            map_prior="learnt",
        )
        self.logits.copy_(log_weights)
        alpha = torch.tensor(1 / concentration)
        self.raw_alpha.copy_(alpha + torch.log(-torch.expm1(-alpha)))
