"""The operations of :mod:`vmm_fast.ops` in plain torch: their definition.

Any floating dtype, any device, differentiable any number of times, and of size [B, J]: written to
be read. Every compiled backend is compared with these functions, and these with scipy in float64.

A whitened mixture has centers m [J, D], lower-triangular A [J, D, D] and offsets c [J]:

    l_ij = c_j - 1/2 |A_j (z_i - m_j)|^2          (``transpose=True``: A_j^T in place of A_j)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = [
    "count_log_prob",
    "kl_from_lse",
    "mixture_assign",
    "mixture_kl",
    "mixture_log_joint",
    "mixture_log_prob",
    "mixture_responsibilities",
    "mixture_statistics",
    "precision_cholesky",
    "stored_components",
    "whitened_components",
]


def _log_joint(
    z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, transpose: bool
) -> Tensor:
    """Return the log-joint l_ij of every point and center [B, J]."""
    d = z[:, None, :] - centers
    a = whitening.tril()
    y = torch.einsum("jtr,bjt->bjr" if transpose else "jrt,bjt->bjr", a, d)
    return offsets - 0.5 * y.square().sum(-1)


def mixture_log_prob(
    z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, transpose: bool = False
) -> tuple[Tensor, Tensor]:
    """Return lse_i = log sum_j exp l_ij and expected_i = sum_j q_ij l_ij, q = softmax(l)."""
    log_joint = _log_joint(z, centers, whitening, offsets, transpose)
    # A pruned component (l = -inf) has q = 0 and contributes 0 to the expectation, not 0 * inf.
    finite = log_joint.masked_fill(log_joint == -torch.inf, 0)
    return log_joint.logsumexp(-1), (log_joint.softmax(-1) * finite).sum(-1)


def kl_from_lse(lse: Tensor, scale: Tensor) -> Tensor:
    """Return -H(q_i) - lse_i [B] for Gaussians q_i with a scale s_i, [B, D] or [B, D, D]."""
    diagonal = scale if scale.ndim == 2 else scale.diagonal(dim1=-2, dim2=-1)
    constant = 0.5 * diagonal.shape[-1] * math.log(2 * math.pi * math.e)
    return -diagonal.log().sum(-1) - constant - lse


def mixture_kl(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    scale: Tensor,
    transpose: bool = False,
) -> Tensor:
    """Return the estimate -H(q_i) - lse_i of KL(q_i || p) [B] from a sample z_i of each q_i."""
    lse, _ = mixture_log_prob(z, centers, whitening, offsets, transpose)
    return kl_from_lse(lse, scale)


def mixture_statistics(
    z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, transpose: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return N_j = sum_i q_ij, s_j = sum_i q_ij d_ij and M_j = sum_i q_ij d_ij d_ij^T.

    Here d_ij = z_i - m_j; shapes are [J], [J, D] and [J, D, D].
    """
    q = _log_joint(z, centers, whitening, offsets, transpose).softmax(-1)
    d = z[:, None, :] - centers
    return q.sum(0), torch.einsum("bj,bjr->jr", q, d), torch.einsum("bj,bjr,bjt->jrt", q, d, d)


def mixture_log_joint(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    transpose: bool = False,
    pseudo_inputs_per_component: int = 1,
) -> Tensor:
    """Return l_ic = log sum_k exp l_i(c,k) [B, C].

    Each run of ``pseudo_inputs_per_component`` neighbouring centers is a component c.
    """
    log_joint = _log_joint(z, centers, whitening, offsets, transpose)
    grouped: Tensor = log_joint.unflatten(-1, (-1, pseudo_inputs_per_component))
    # The gradient of a log-sum-exp over nothing but -inf would be NaN; that of a constant is 0.
    pruned = (grouped == -torch.inf).all(-1)
    return grouped.masked_fill(pruned[..., None], 0).logsumexp(-1).masked_fill(pruned, -torch.inf)


def mixture_responsibilities(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    transpose: bool = False,
    pseudo_inputs_per_component: int = 1,
) -> Tensor:
    """Return the responsibilities, the softmax of l_ic over c [B, C]."""
    q = _log_joint(z, centers, whitening, offsets, transpose).softmax(-1)
    grouped: Tensor = q.unflatten(-1, (-1, pseudo_inputs_per_component))
    return grouped.sum(-1)


def mixture_assign(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    transpose: bool = False,
    pseudo_inputs_per_component: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the most probable c [B] (int64), its probability [B], entropy over all [B] in nats."""
    log_joint = mixture_log_joint(
        z, centers, whitening, offsets, transpose, pseudo_inputs_per_component
    )
    q = log_joint.softmax(-1)
    entropy = -torch.special.xlogy(q, q).sum(-1)
    return log_joint.argmax(-1), q.amax(-1), entropy.clamp_min(0)


def whitened_components(
    log_weights: Tensor,
    precision_cholesky: Tensor | None,
    scale: Tensor | None,
    num_centers: int,
    expected: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return A [J, D, D] and offsets [J] of Gaussians with centers m_j ~ N(., S_j), S = s s^T.

    ``precision_cholesky`` L [C, D, D] and full ``scale`` s [J, D, D] are lower triangular; a scale
    [J, D] is diagonal. With Lambda = L L^T and log pi = ``log_weights`` [C], and without m:

    marginal: A A^T = (Lambda^-1 + S)^-1,  c = log(pi/K) + log N(0; 0, (A A^T)^-1);
    expected: A = L,  c = log(pi/K) + log N(0; 0, Lambda^-1) - 1/2 tr(Lambda S).

    Without S both have A = L. Without Lambda^-1 both have A = s^-1, which whitens untransposed.
    """
    given = precision_cholesky if precision_cholesky is not None else scale
    assert given is not None
    dim, per_component = given.shape[-1], num_centers // len(log_weights)
    shares = (log_weights - math.log(per_component)).repeat_interleave(per_component)
    s = None if scale is None else torch.diag_embed(scale) if scale.ndim == 2 else scale.tril()
    eye = torch.eye(dim, dtype=given.dtype, device=given.device)
    penalty: Tensor | float = 0.0
    if precision_cholesky is None:
        whitening = torch.linalg.solve_triangular(s, eye, upper=False)
    else:
        whitening = precision_cholesky.tril().repeat_interleave(per_component, 0)
        if s is not None:
            product = s.mT @ whitening  # tr(Lambda S) = |s^T L|^2, never a difference
            if expected:
                penalty = 0.5 * product.square().sum((-2, -1))
            else:
                # A = L U^-T with U U^T = I + (s^T L)^T s^T L, U upper: no eigenvalue is below 1.
                reversed_gram = (eye + product.mT @ product).flip(-2, -1)
                upper = torch.linalg.cholesky_ex(reversed_gram)[0].flip(-2, -1)
                whitening = torch.linalg.solve_triangular(
                    upper.mT, whitening, upper=False, left=False
                )
    log_det = whitening.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return whitening, shares + log_det - 0.5 * dim * math.log(2 * math.pi) - penalty


def precision_cholesky(raw_precision: Tensor) -> Tensor:
    """Return L [C, D, D] from its unconstrained form, tril(raw, -1) + diag softplus(diag raw)."""
    diagonal = softplus(raw_precision.diagonal(dim1=-2, dim2=-1))
    return raw_precision.tril(-1) + torch.diag_embed(diagonal)


def stored_components(
    logits: Tensor, raw_precision: Tensor, scale: Tensor | None, num_centers: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return marginal A [J, D, D], offsets [J], log pi [C] and L [C, D, D] of stored parameters.

    log pi = log softmax(logits), and L is that of :func:`precision_cholesky`.
    """
    log_weights, L = logits.log_softmax(-1), precision_cholesky(raw_precision)
    return *whitened_components(log_weights, L, scale, num_centers), log_weights, L


LEAST = 1e-15  # smaller means and inverse dispersions are raised to this


def count_log_prob(
    counts: Tensor,
    mean: Tensor,
    inverse_dispersion: Tensor | None = None,
    dropout_logits: Tensor | None = None,
    library_size: Tensor | None = None,
) -> Tensor:
    """Return the log-likelihood [B] of cells' counts x [B, G], summed over genes.

    With mean mu [B, G], inverse dispersion theta [G] or [B, G] and dropout logits l [B, G]:

    Poisson (without theta): x log mu - mu - log x!;
    negative binomial (without l): log Gamma(x + theta) / (Gamma(theta) x!)
    + theta log theta / (theta + mu) + x log mu / (theta + mu);
    zero-inflated: log((1 - pi) NB(x) + pi [x = 0]), pi = sigmoid(l).

    Means and inverse dispersions below :data:`LEAST` are taken as that. With a library size n [B],
    ``mean`` holds logits a, of which the mean is n softmax(a).
    """
    if library_size is not None:
        mean = library_size[:, None] * mean.softmax(-1)
    mean = mean.clamp_min(LEAST)
    found: Tensor
    if inverse_dispersion is None:
        found = torch.special.xlogy(counts, mean) - mean - torch.lgamma(counts + 1)
    else:
        theta = inverse_dispersion.clamp_min(LEAST)
        found = (
            torch.lgamma(counts + theta)
            - torch.lgamma(theta)
            - torch.lgamma(counts + 1)
            - theta * torch.log1p(mean / theta)
            + torch.special.xlogy(counts, mean / (theta + mean))
        )
        if dropout_logits is not None:
            kept = found - softplus(dropout_logits)
            # log(pi + (1 - pi) NB(0)), where softplus(-l) = -log pi
            zero = softplus(found - dropout_logits) - softplus(-dropout_logits)
            found = torch.where(counts == 0, zero, kept)
    return found.masked_fill((counts < 0), torch.nan).sum(-1)
