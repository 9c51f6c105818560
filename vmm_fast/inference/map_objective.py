"""The empirical-Bayes objective of Stirn & Knowles (arXiv 2402.04412): data and parameter priors.

    (1/n) [ sum_i sum_j q_ij l_ij
            + log p(pi) + log p(alpha) + sum_j log p(mu_j) + sum_c log p(Lambda_c) ]

    pi ~ Dirichlet(a, .., a), a = gamma / C;         alpha = 1 / gamma ~ Gamma(1, 1)
    (or sticks v_c ~ Beta(1 - d, gamma + c d);       gamma ~ Gamma(1, 1))
    mu ~ N(0, I), in expectation under q(mu) = N(m, S)
    Lambda_c ~ Wishart(D + 2, C^(2/D) / (D + 2) I)   so that E[Lambda_c] = C^(2/D) I

Densities are in nats. ``n`` is the batch size in the authors' code, so that the priors weigh N / B
times more than in maximum a posteriori estimation over the whole data set.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vmm_fast.inference.stick_breaking import log_stick_breaking_prior
from vmm_fast.mixture import Components

__all__ = [
    "LOG_WEIGHT_FLOOR",
    "expected_log_normal",
    "log_alpha_prior",
    "log_dirichlet",
    "log_parameter_prior",
    "log_wishart",
    "log_wishart_normaliser",
    "map_loss",
    "wishart_scale",
]

# With a < 1 the Dirichlet density has no upper bound: a weight that falls to zero raises it for
# ever. Below this log-weight the density counts as constant, so that logits stay finite.
LOG_WEIGHT_FLOOR = -20.0


def log_dirichlet(log_weights: Tensor, concentration: Tensor) -> Tensor:
    """Log-density of Dirichlet(gamma / C) at pi, with log pi at least ``LOG_WEIGHT_FLOOR``."""
    count = log_weights.shape[0]
    gamma = concentration.double()  # differences of lgamma at a large gamma
    normaliser = torch.lgamma(gamma) - count * torch.lgamma(gamma / count)
    value = (
        normaliser + (gamma / count - 1) * log_weights.clamp_min(LOG_WEIGHT_FLOOR).double().sum()
    )
    return value.to(log_weights.dtype)


def log_alpha_prior(concentration: Tensor) -> Tensor:
    """Log-density of alpha = 1 / gamma ~ Gamma(1, 1): a density over alpha, without Jacobian."""
    return -1 / concentration


def expected_log_normal(centers: Tensor, scale: Tensor | None) -> Tensor:
    """Return sum_j E_q(mu_j)[log N(mu_j; 0, I)] = sum_j -D/2 log 2 pi - (|m_j|^2 + tr S_j) / 2."""
    squares = centers.square().sum()
    if scale is not None:
        squares = squares + (scale if scale.ndim == 2 else scale.tril()).square().sum()
    return -0.5 * (squares + centers.numel() * math.log(2 * math.pi))


def wishart_scale(num_components: int, latent_dim: int) -> float:
    """Return the factor v of the Wishart's scale matrix v I."""
    return float(num_components ** (2 / latent_dim) / (latent_dim + 2))


def log_wishart_normaliser(num_components: int, latent_dim: int) -> float:
    """Return the log-normaliser of the Wishart density: D df / 2 log 2 v + log Gamma_D(df / 2)."""
    df = latent_dim + 2
    half = torch.tensor(df / 2, dtype=torch.float64, device="cpu")
    log_gamma = torch.special.multigammaln(half, latent_dim)
    scale = wishart_scale(num_components, latent_dim)
    return 0.5 * df * latent_dim * math.log(2 * scale) + float(log_gamma)


def log_wishart(precision_cholesky: Tensor) -> Tensor:
    """Return sum_c log Wishart(L_c L_c^T; D + 2, v I), a density over Lambda (no Jacobian of L)."""
    count, dim = precision_cholesky.shape[:2]
    factor = precision_cholesky.tril()
    # (df - D - 1) / 2 logdet(L L^T) = sum log diag L
    logdet = factor.diagonal(dim1=-2, dim2=-1).log().sum()
    squares = factor.square().sum()
    normaliser = log_wishart_normaliser(count, dim)
    return logdet - 0.5 / wishart_scale(count, dim) * squares - count * normaliser


def log_parameter_prior(
    components: Components,
    concentration: Tensor,
    *,
    weights: str,
    discount: float,
    learnt_concentration: bool,
) -> Tensor:
    """Return the sum of all parameters' log-priors; that of gamma only if gamma is learnt."""
    if weights == "dirichlet":
        total = log_dirichlet(components.log_weights, concentration)
        hyper = log_alpha_prior(concentration)
    else:
        total = log_stick_breaking_prior(
            components.log_weights, concentration, discount, floor=LOG_WEIGHT_FLOOR
        )
        hyper = -concentration
    total = total + expected_log_normal(components.centers, components.scale)
    assert components.precision_cholesky is not None
    total = total + log_wishart(components.precision_cholesky)
    return total + hyper if learnt_concentration else total


def map_loss(
    components: Components,
    z: Tensor,
    log_prior: Tensor | float,
    *,
    responsibility_gradient: bool,
    data_size: int,
) -> Tensor:
    """Return the negative objective, a scalar in nats per point.

    Parameters
    ----------
    components : Components
        With gradients to all that is to be trained.
    z : Tensor [B, D]
    log_prior : Tensor (scalar) or float
        :func:`log_parameter_prior`.
    responsibility_gradient : bool
        True: the gradient also runs through q, and l_ij has the weight q_ij (1 + l_ij - sum_k q_ik
        l_ik), as in the authors' code. False: q_ij, as in expectation maximisation. The value is
        the same.
    data_size : int
        n.

    Raises
    ------
    ValueError
        If ``z`` is empty.
    """
    if len(z) == 0:
        raise ValueError("z must have at least one row, but is empty")
    lse, expected = components.log_joint_expectation(z)
    # d lse / d l_ij = q_ij: the value of the expectation with the gradient of the log-sum-exp.
    data = expected if responsibility_gradient else lse + (expected - lse).detach()
    return -data.mean() - log_prior / data_size
