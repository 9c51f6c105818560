"""The reference against scipy and torch.distributions, in float64."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from support import FORMS, random_gaussians, random_mixture

from vmm_fast import reference

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def scipy_log_joint(z, centers, whitening, offsets, transpose):
    """l from scipy's Gaussian densities: c - log N's normaliser + log N(z; m, (A^T A)^-1)."""
    columns = []
    for m, a, c in zip(centers.numpy(), whitening.numpy(), offsets.numpy(), strict=True):
        a = np.tril(a).T if transpose else np.tril(a)
        normal = scipy.stats.multivariate_normal(m, np.linalg.inv(a.T @ a))
        constant = np.linalg.slogdet(a)[1] - 0.5 * len(m) * math.log(2 * math.pi)
        columns.append(c + normal.logpdf(z.numpy()) - constant)
    return np.stack(columns, -1).reshape(len(z), len(centers))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [(7, 5, 3), (3, 1, 1), (1, 4, 2)])
def test_against_scipy(shape, transpose):
    mixture = random_mixture(*shape)
    z, centers = mixture[:2]
    log_joint = scipy_log_joint(*mixture, transpose)
    q = scipy.special.softmax(log_joint, axis=1)
    lse, expected = reference.mixture_log_prob(*mixture, transpose)
    np.testing.assert_allclose(lse, scipy.special.logsumexp(log_joint, axis=1), **TOLERANCE)
    np.testing.assert_allclose(expected, (q * log_joint).sum(1), **TOLERANCE)

    d = z.numpy()[:, None] - centers.numpy()
    n, s, m = reference.mixture_statistics(*mixture, transpose)
    np.testing.assert_allclose(n, q.sum(0), **TOLERANCE)
    np.testing.assert_allclose(s, np.einsum("bj,bjd->jd", q, d), **TOLERANCE)
    np.testing.assert_allclose(m, np.einsum("bj,bjd,bje->jde", q, d, d), **TOLERANCE)

    np.testing.assert_allclose(
        reference.mixture_responsibilities(*mixture, transpose), q, **TOLERANCE
    )
    label, probability, entropy = reference.mixture_assign(*mixture, transpose)
    np.testing.assert_array_equal(label, q.argmax(1))
    np.testing.assert_allclose(probability, q.max(1), **TOLERANCE)
    np.testing.assert_allclose(entropy, scipy.stats.entropy(q, axis=1), **TOLERANCE)


def test_grouping_sums_over_neighbours():
    mixture = random_mixture(6, 12, 3)
    joint = scipy_log_joint(*mixture, False).reshape(6, 4, 3)
    np.testing.assert_allclose(
        reference.mixture_log_joint(*mixture, False, 3),
        scipy.special.logsumexp(joint, axis=2),
        **TOLERANCE,
    )
    np.testing.assert_allclose(
        reference.mixture_responsibilities(*mixture, False, 3),
        scipy.special.softmax(joint.reshape(6, 12), axis=1).reshape(6, 4, 3).sum(2),
        **TOLERANCE,
    )


def test_gaussian_mixture_density():
    """With A = chol(Sigma)^-1 the log-sum-exp is the density of torch.distributions' mixture."""
    z, centers, whitening, logits = random_mixture(9, 6, 4)
    scale_tril = torch.linalg.inv(whitening)
    log_pi = logits.log_softmax(-1)
    offsets = (
        log_pi - 2 * math.log(2 * math.pi) + whitening.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    )
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=logits),
        torch.distributions.MultivariateNormal(centers, scale_tril=scale_tril),
    )
    lse, _ = reference.mixture_log_prob(z, centers, whitening, offsets)
    torch.testing.assert_close(lse, mixture.log_prob(z), **TOLERANCE)


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_whitened_components(form, expected):
    """Every component's l is the density, or its expectation, that torch.distributions gives."""
    log_weights, factor, scale = random_gaussians(3, 6, 4, form)
    z, centers = torch.randn(9, 4).double(), torch.randn(6, 4).double()
    mixture = reference.whitened_components(log_weights, factor, scale, 6, expected)
    transpose = factor is not None
    actual = reference.mixture_log_joint(z, centers, *mixture, transpose)

    inverse = uncertainty = torch.zeros(6, 4, 4, dtype=torch.float64)
    if factor is not None:
        inverse = torch.cholesky_inverse(factor).repeat_interleave(2, 0)
    if scale is not None:
        s = torch.diag_embed(scale) if scale.ndim == 2 else scale
        uncertainty = s @ s.mT
    penalty = torch.zeros(6, dtype=torch.float64)
    covariance = inverse + uncertainty
    if expected and factor is not None:
        covariance = inverse
        penalty = 0.5 * torch.linalg.solve(inverse, uncertainty).diagonal(0, 1, 2).sum(-1)
    density = torch.distributions.MultivariateNormal(centers, covariance).log_prob(z[:, None])
    shares = log_weights.repeat_interleave(2) - math.log(2)
    torch.testing.assert_close(actual, shares + density - penalty, **TOLERANCE)
