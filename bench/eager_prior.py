"""The VampPrior Mixture Model's steps in plain eager torch, as one writes them without vmm_fast.

The same maths as :class:`vmm_fast.VMMPrior` with Dirichlet weights, a learnt concentration and one
pseudo-input a component, its parameters by the same names; what the bench compares it with.
"""

from __future__ import annotations

import math

import torch
from scipy.optimize import brentq
from scipy.special import digamma
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Dirichlet,
    Distribution,
    MixtureSameFamily,
    MultivariateNormal,
)
from torch.nn.functional import softplus

from vmm_fast import VMMPrior
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
        options = prior.options
        self.closed_form = options.inference == "closed-form"
        self.rate, self.data_size = options.statistics_rate, options.data_size
        for name, value in prior.named_parameters():
            setattr(self, name, nn.Parameter(value.detach().clone()))
        self.learnt = [self.pseudo_inputs] if self.closed_form else list(self.parameters())
        self.adam = torch.optim.Adam(self.learnt, lr=options.learning_rate, eps=1e-7, fused=True)
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

    def _log_joint(
        self, z: Tensor, posterior: Distribution, factor: Tensor, logits: Tensor
    ) -> Tensor:
        """Return E[log N(z; mu, Lambda^-1)] + log pi [B, C] by one matrix product."""
        centers, dim = posterior.mean, self.latent_dim
        penalty = 0.5 * (factor.mT @ posterior.scale_tril).square().sum((-2, -1))
        logdet = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        offsets = logits.log_softmax(-1) + logdet - 0.5 * dim * math.log(2 * math.pi) - penalty
        shift = (factor.mT @ centers[..., None])[..., 0]
        y = (z @ factor.permute(1, 0, 2).flatten(1)).unflatten(1, centers.shape) - shift
        return offsets - 0.5 * y.square().sum(-1)

    def map_loss(self, z: Tensor, encoder: Encoder) -> Tensor:
        """Return the negative objective, with the gradient through the responsibilities."""
        posterior = encoder(self.pseudo_inputs)
        factor, dim, count = self._precision_cholesky(), self.latent_dim, self.num_components
        log_joint = self._log_joint(z, posterior, factor, self.logits)
        data = (log_joint.softmax(-1) * log_joint).sum(-1).mean()

        alpha = softplus(self.raw_alpha)
        weights = self.logits.softmax(-1)
        concentration = (1 / (alpha * count)).expand(count)
        log_prior = Dirichlet(concentration, validate_args=False).log_prob(weights) - alpha
        log_prior = log_prior + _log_center_prior(posterior)
        v, df = wishart_scale(count, dim), dim + 2
        normaliser = 0.5 * df * dim * math.log(2 * v) + torch.special.multigammaln(
            torch.tensor(0.5 * df), dim
        )
        logdet = factor.diagonal(dim1=-2, dim2=-1).log().sum()
        log_prior = log_prior + logdet - 0.5 / v * factor.square().sum() - count * normaliser
        return -data - log_prior / (self.data_size or len(z))

    def update(self, z: Tensor, encoder: Encoder) -> None:
        """Take an Adam step on :meth:`map_loss`; in the closed form of the pseudo-inputs alone."""
        if self.closed_form:
            self._closed_form_update(z, encoder)
            return
        self.adam.zero_grad()
        self.map_loss(z, encoder).backward()
        self.adam.step()

    def _closed_form_update(self, z: Tensor, encoder: Encoder) -> None:
        """Differentiate only what the pseudo-inputs change; the sums share its softmax."""
        posterior = encoder(self.pseudo_inputs)
        factor = self._precision_cholesky().detach()
        log_joint = self._log_joint(z, posterior, factor, self.logits.detach())
        q = log_joint.softmax(-1)
        data = (q * log_joint).sum(-1).mean()
        loss = -data - _log_center_prior(posterior) / (self.data_size or len(z))
        (self.pseudo_inputs.grad,) = torch.autograd.grad(loss, self.pseudo_inputs)
        self.adam.step()
        with torch.no_grad():
            self._online_step(z, q, posterior, factor)

    def _online_step(self, z: Tensor, q: Tensor, posterior: Distribution, factor: Tensor) -> None:
        """Update running statistics, then maximise weights, concentration and precisions."""
        if self.running is None:
            weights = self.logits.softmax(-1)
            self.running = weights, weights[:, None, None] * torch.cholesky_inverse(factor)
        self.running = tuple(
            (1 - self.rate) * old + self.rate / len(z) * new
            for old, new in zip(self.running, _statistics(z, q, posterior.mean), strict=True)
        )
        points = self.data_size or len(z)
        n, m = (points * x for x in self.running)

        scale = posterior.scale_tril
        scatter = n[:, None, None] * (scale @ scale.mT) + m
        eye = torch.eye(self.latent_dim, dtype=m.dtype, device=m.device)
        scatter = scatter + eye / wishart_scale(self.num_components, self.latent_dim)
        # scatter = U U^T with U upper triangular: its inverse has the lower factor U^-T.
        upper = torch.linalg.cholesky(scatter.flip((-2, -1))).flip((-2, -1))
        inverse = torch.linalg.solve_triangular(upper.mT, eye, upper=False)
        factor = (n + 1).sqrt()[:, None, None] * inverse
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        raw = factor.tril(-1) + torch.diag_embed(diagonal + torch.log(-torch.expm1(-diagonal)))
        self.raw_precision.copy_(raw)

        concentration = _maximise_concentration(n)
        log_weights, _ = closed_form.maximise_weights(
            n, concentration, weights="dirichlet", discount=0.0, map_prior="fixed"
        )
        self.logits.copy_(log_weights)
        alpha = 1 / concentration
        self.raw_alpha.fill_(alpha + math.log(-math.expm1(-alpha)))


def _log_center_prior(posterior: Distribution) -> Tensor:
    """Return the sum over components of E[log N(mu; 0, I)]."""
    squares = posterior.mean.square().sum() + posterior.scale_tril.square().sum()
    return -0.5 * (squares + posterior.mean.numel() * math.log(2 * math.pi))


def _statistics(z: Tensor, q: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return N [C], and M [C, D, D] around the centers by one product with all z z^T."""
    n, total = q.sum(0), q.T @ z
    squares = (q.T @ (z[:, :, None] * z[:, None, :]).flatten(1)).unflatten(1, 2 * z.shape[1:])
    # sum q (z - m) (z - m)^T = sum q z z^T - t m^T - m (t - N m)^T, t = sum q z
    s = total - n[:, None] * centers
    cross = total[:, :, None] * centers[:, None, :] + centers[:, :, None] * s[:, None, :]
    return n, squares - cross


def _maximise_concentration(mass: Tensor) -> float:
    """Return :func:`closed_form.maximise_concentration` without torch's cost of a call."""
    x = mass.double().cpu().numpy()
    count, total = len(x), x.sum()

    def slope(t: float) -> float:
        gamma = math.exp(t)
        shares = (digamma(x + gamma / count) - digamma(gamma / count)).mean()
        return gamma * (digamma(gamma) - digamma(total + gamma) + shares) + 1 / gamma

    low, high = math.log(1e-6), math.log(1e6)
    return math.exp(high if slope(high) > 0 else brentq(slope, low, high, xtol=1e-10))
