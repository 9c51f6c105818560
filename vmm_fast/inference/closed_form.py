"""The empirical-Bayes step in closed form: maximum a posteriori from sufficient statistics.

With N_j, s_j, M_j the responsibilities' sums of 1, d and d d^T, d = z - m_j
(:func:`vmm_fast.ops.mixture_statistics`), the maximiser of the objective of
:mod:`vmm_fast.inference.map_objective` at fixed responsibilities is

    Lambda_c = (N_c + df - D - 1) (V^-1 + sum_k [N_ck S_ck + M_ck])^-1,   df - D - 1 = 1, V = v I
    pi_c     proportional to N_c + gamma / C - 1 where that is positive, else at the floor
    m_c      = (N_c Lambda_c + I)^-1 Lambda_c (N_c m_c + s_c)             (free centers alone)
    gamma    = argmax log p(N_1, .., N_C | gamma) + log p(1 / gamma), weights integrated out

The last departs from the joint maximum over (pi, gamma), which does not exist: with even weights
the Dirichlet density grows without bound in gamma, and a large gamma keeps the weights even. Counts
given gamma follow the Dirichlet-multinomial law, whose maximum follows the counts (Minka 2000).

(Dempster, Laird & Rubin 1977; with a decaying average of the sums over mini-batches, the online EM
of Cappe & Moulines 2009.) For sticks, weights are the posterior means of
:mod:`vmm_fast.inference.stick_breaking`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vmm_fast import ops
from vmm_fast.inference.map_objective import LOG_WEIGHT_FLOOR, wishart_scale
from vmm_fast.inference.processes import number_of_processes, sum_over_processes
from vmm_fast.inference.stick_breaking import posterior_without_checks
from vmm_fast.mixture import Components

__all__ = [
    "Statistics",
    "matching_statistics",
    "maximise_centers",
    "maximise_concentration",
    "maximise_precision",
    "maximise_weights",
    "statistics",
    "summed_over_processes",
]


class Statistics(NamedTuple):
    """Sums over points for each center: N [J], s [J, D] and M [J, D, D], around ``centers``."""

    N: Tensor
    s: Tensor
    M: Tensor
    centers: Tensor

    def around(self, centers: Tensor) -> Statistics:
        """Return the same sums taken around other centers."""
        shift = self.centers - centers
        cross = self.s[:, :, None] * shift[:, None, :]
        outer = shift[:, :, None] * shift[:, None, :]
        second = self.M + cross + cross.mT + self.N[:, None, None] * outer
        return Statistics(self.N, self.s + self.N[:, None] * shift, second, centers)

    def scaled(self, factor: float) -> Statistics:
        """Return the sums times ``factor``."""
        return Statistics(self.N * factor, self.s * factor, self.M * factor, self.centers)

    def plus(self, other: Statistics) -> Statistics:
        """Return self + other, both taken around the same centers."""
        return Statistics(self.N + other.N, self.s + other.s, self.M + other.M, self.centers)

    def blended(self, other: Statistics, rate: float) -> Statistics:
        """Return (1 - rate) self + rate other, both taken around the same centers."""
        return self.scaled(1 - rate).plus(other.scaled(rate))


def statistics(components: Components, z: Tensor, weights: Tensor | None = None) -> Statistics:
    """Return the sums over ``z`` [B, D], weighted by the responsibilities, in float64.

    A point counts as many times as its entry of ``weights`` [B] says.
    """
    centers = components.centers.detach().double()
    if weights is None:
        sums = components.evaluate(ops.mixture_statistics, z, components.expected)
        n, s, m = (x.double() for x in sums)
        return Statistics(n, s, m, centers)
    log_joint = components.evaluate(ops.mixture_log_joint, z, components.expected)[0].double()
    q = (log_joint.softmax(1) * weights.double()[:, None]).T
    outer = []
    for share, center in zip(q, centers, strict=True):  # all at once would be [B, J, D]
        d = z.double() - center
        outer.append((share[:, None] * d).mT @ d)
    return Statistics(
        q.sum(1), q @ z.double() - q.sum(1)[:, None] * centers, torch.stack(outer), centers
    )


def summed_over_processes(sums: Statistics, *numbers: float) -> tuple[Statistics, list[float]]:
    """Return ``sums`` and ``numbers``, each added up over all processes."""
    if number_of_processes() == 1:
        return sums, list(numbers)
    extra = torch.tensor(numbers, dtype=torch.float64, device=sums.N.device)
    sum_over_processes((sums.N, sums.s, sums.M, extra))
    return sums, extra.tolist()


def matching_statistics(components: Components) -> Statistics:
    """Return the expected sums per point of a sample from the mixture.

    N = pi_c / K, s = 0 and M = pi_c / K Lambda_c^-1.
    """
    centers = components.centers.detach().double()
    per_component = components.pseudo_inputs_per_component
    mass = (components.component_weights.double() / per_component).repeat_interleave(per_component)
    assert components.precision_cholesky is not None
    factor = components.precision_cholesky.double()
    covariance = torch.cholesky_inverse(factor).repeat_interleave(per_component, 0)
    return Statistics(mass, torch.zeros_like(centers), mass[:, None, None] * covariance, centers)


def maximise_precision(
    sums: Statistics, scale: Tensor | None, previous: Tensor, map_prior: bool
) -> Tensor:
    """Return the Cholesky factors L_c [C, D, D] of the maximising precisions Lambda_c.

    They have the dtype of ``previous``. Without ``map_prior`` they are maximum-likelihood
    estimates; a component whose scatter is singular has none and keeps its ``previous`` factor.
    """
    count, dim = previous.shape[:2]
    scatter = sums.M
    if scale is not None:
        scale = scale.double()
        factor = torch.diag_embed(scale) if scale.ndim == 2 else scale.tril()
        scatter = scatter + sums.N[:, None, None] * (factor @ factor.mT)
    scatter = scatter.unflatten(0, (count, -1)).sum(1)
    mass = sums.N.unflatten(0, (count, -1)).sum(1)
    if map_prior:
        eye = torch.eye(dim, dtype=scatter.dtype, device=scatter.device)
        scatter = scatter + eye / wishart_scale(count, dim)
        mass = mass + 1
    # scatter = U U^T with U upper triangular, so that its inverse has the lower factor U^-T: no
    # matrix is inverted and factorised again.
    cholesky, info = torch.linalg.cholesky_ex(scatter.flip((-2, -1)))
    upper = cholesky.flip((-2, -1))
    eye = torch.eye(dim, dtype=upper.dtype, device=upper.device).expand_as(upper)
    inverse = torch.linalg.solve_triangular(upper.mT, eye, upper=False)
    factor = mass.sqrt()[:, None, None] * inverse
    sound = (info == 0) & factor.isfinite().all(-1).all(-1)
    if not map_prior:
        # A pivot as small as the rounding noise of the points' dtype is no evidence of a spread.
        pivots = cholesky.diagonal(dim1=-2, dim2=-1).square()
        largest = scatter.diagonal(dim1=-2, dim2=-1).amax(-1)
        sound &= pivots.amin(-1) > 16 * torch.finfo(previous.dtype).eps * largest
    return torch.where(sound[:, None, None], factor.to(previous.dtype), previous)


def maximise_centers(sums: Statistics, precision_cholesky: Tensor, map_prior: bool) -> Tensor:
    """Return the maximising free centers [C, D]: posterior modes under N(0, I), or means.

    Without ``map_prior`` they are means, and the center of an empty component stays.
    """
    total = sums.N[:, None] * sums.centers + sums.s
    if not map_prior:
        centers = torch.where(sums.N[:, None] > 0, total / sums.N[:, None], sums.centers)
    else:
        factor = precision_cholesky.double()
        precision = factor @ factor.mT
        eye = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
        system = sums.N[:, None, None] * precision + eye
        centers = torch.linalg.solve(system, (precision @ total[..., None]))[..., 0]
    return centers


def maximise_weights(
    mass: Tensor, concentration: float | Tensor, *, weights: str, discount: float, map_prior: str
) -> tuple[Tensor, float | Tensor]:
    """Return log pi [C] (float64) and the concentration that maximise, from the masses N_c [C].

    ``map_prior`` "none" gives N_c / N; "fixed" keeps the concentration; "learnt" maximises it.
    """
    if map_prior == "none":
        return (mass / mass.sum()).log().clamp_min(LOG_WEIGHT_FLOOR), concentration
    if weights == "stick-breaking":
        posterior = posterior_without_checks(mass, concentration, discount)
        learnt = posterior.concentration if map_prior == "learnt" else concentration
        return posterior.mean_weights.log().clamp_min(LOG_WEIGHT_FLOOR), learnt
    if map_prior == "learnt":
        concentration = maximise_concentration(mass)
    excess = mass + concentration / len(mass) - 1
    alive = excess > 0
    if not alive.any():
        # Fewer points than components: only their masses tell them apart.
        excess, alive = mass, mass > 0
    floor = math.exp(LOG_WEIGHT_FLOOR)
    shares = torch.where(alive, excess, 0)
    room = 1 - floor * (~alive).sum()
    return (shares / shares.sum() * room).log().clamp_min(LOG_WEIGHT_FLOOR), concentration


def maximise_concentration(mass: Tensor) -> float:
    """Return the gamma that maximises the Dirichlet-multinomial log-posterior of counts N_c [C].

    lgamma(gamma) - lgamma(N + gamma) + sum_c [lgamma(N_c + gamma / C) - lgamma(gamma / C)]
    - 1 / gamma, with alpha = 1 / gamma ~ Gamma(1, 1). The slope in log gamma is bisected in float64
    between 1e-6 and 1e6; if counts are more even than any gamma explains, the result is 1e6.
    """
    mass = mass.double().cpu()  # each step of the bisection would wait for a GPU
    count, total = len(mass), mass.sum()

    def slope(t: float) -> float:
        gamma = torch.as_tensor(math.exp(t), dtype=torch.float64)
        a = gamma / count
        shares = (torch.digamma(mass + a) - torch.digamma(a)).mean()
        return float(
            gamma * (torch.digamma(gamma) - torch.digamma(total + gamma) + shares) + 1 / gamma
        )

    low, high = math.log(1e-6), math.log(1e6)
    if slope(high) > 0:
        return math.exp(high)
    while high - low > 1e-10:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return math.exp(0.5 * (low + high))
