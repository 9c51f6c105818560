"""The parameter priors against scipy in float64, and the objective put together from them."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from support import random_components

from vmm_fast import VMMPrior
from vmm_fast.inference import map_objective

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("concentration", [0.3, 1.0, 40.0])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_dirichlet(count, concentration):
    pi = np.random.default_rng(0).dirichlet(np.full(count, 2.0))
    a = np.full(count, concentration / count)
    # By hand and not by scipy.stats.dirichlet, which knows no C = 1.
    expected = scipy.special.gammaln(concentration) - count * scipy.special.gammaln(a[0])
    expected += ((a - 1) * np.log(pi)).sum()
    if count > 1:
        np.testing.assert_allclose(expected, scipy.stats.dirichlet(a).logpdf(pi), rtol=1e-9)
    gamma = torch.tensor(concentration, dtype=torch.float64)
    actual = map_objective.log_dirichlet(torch.tensor(pi).log(), gamma)
    np.testing.assert_allclose(actual, expected, **TIGHT)


def test_dirichlet_is_bounded():
    """A weight that falls to zero does not raise the density for ever."""
    log_weights = torch.tensor([0.0, -math.inf], dtype=torch.float64, requires_grad=True)
    value = map_objective.log_dirichlet(log_weights, torch.tensor(1.0, dtype=torch.float64))
    assert value.isfinite()
    assert torch.autograd.grad(value, log_weights)[0][1] == 0


def test_alpha_prior():
    gamma = torch.tensor([0.2, 1.0, 30.0], dtype=torch.float64)
    expected = scipy.stats.gamma(a=1, scale=1).logpdf(1 / gamma.numpy())
    np.testing.assert_allclose(map_objective.log_alpha_prior(gamma), expected, **TIGHT)


@pytest.mark.parametrize("dim", [1, 2, 6])
def test_wishart(dim):
    factor = random_components(c=5, d=dim).precision_cholesky
    scale = 5 ** (2 / dim) / (dim + 2) * np.eye(dim)
    wishart = scipy.stats.wishart(df=dim + 2, scale=scale)
    np.testing.assert_allclose(wishart.mean(), 5 ** (2 / dim) * np.eye(dim))
    expected = sum(wishart.logpdf(x @ x.T) for x in factor.numpy())
    np.testing.assert_allclose(map_objective.log_wishart(factor), expected, **TIGHT)


@pytest.mark.parametrize("scale", ["full", "diagonal", None])
def test_expected_log_normal(scale):
    components = random_components(scale=scale)
    normal = scipy.stats.norm()
    expected = normal.logpdf(components.centers.numpy()).sum()
    if scale:
        expected -= 0.5 * components.scale.square().sum().item()  # tr S = |s|_F^2
    actual = map_objective.expected_log_normal(components.centers, components.scale)
    np.testing.assert_allclose(actual, expected, **TIGHT)


def encoder_of(mean, scale):
    if scale.ndim == 2:
        return lambda inputs: torch.distributions.Normal(mean, scale)
    return lambda inputs: torch.distributions.MultivariateNormal(mean, scale_tril=scale)


@pytest.mark.parametrize("scale", ["full", "diagonal"])
@pytest.mark.parametrize("data_size", [None, 1000])
@pytest.mark.parametrize("map_prior", ["none", "fixed", "learnt"])
def test_map_loss_is_the_objective(scale, data_size, map_prior):
    """The whole objective from scipy's densities."""
    c, k, d, b = 4, 2, 3, 11
    components = random_components(c=c, k=k, d=d, scale=scale)
    prior = VMMPrior(
        torch.zeros(c * k, 5, dtype=torch.float64), d, k, data_size=data_size, map_prior=map_prior
    )
    prior.logits = components.log_weights + 3.0
    prior.precision_cholesky = components.precision_cholesky
    prior.concentration = 2.5
    z = torch.randn(b, d, dtype=torch.float64)

    factor, pi = components.precision_cholesky.numpy(), components.component_weights.numpy()
    s = components.scale.numpy()
    s = np.stack([np.diag(x) for x in s]) if scale == "diagonal" else s
    joint = np.empty((b, c * k))
    for j, m in enumerate(components.centers.numpy()):
        precision = factor[j // k] @ factor[j // k].T
        normal = scipy.stats.multivariate_normal(m, np.linalg.inv(precision))
        joint[:, j] = (
            np.log(pi[j // k] / k)
            + normal.logpdf(z.numpy())
            - 0.5 * np.trace(precision @ s[j] @ s[j].T)
        )
    data = (scipy.special.softmax(joint, 1) * joint).sum(1).mean()

    wishart = scipy.stats.wishart(df=d + 2, scale=c ** (2 / d) / (d + 2) * np.eye(d))
    log_prior = scipy.stats.dirichlet(np.full(c, 2.5 / c)).logpdf(pi)
    log_prior += scipy.stats.norm.logpdf(components.centers.numpy()).sum() - 0.5 * (s**2).sum()
    log_prior += sum(wishart.logpdf(x @ x.T) for x in factor)
    if map_prior == "learnt":
        log_prior += scipy.stats.gamma(1).logpdf(1 / 2.5)
    if map_prior == "none":
        log_prior = 0.0
    expected = -data - log_prior / (data_size or b)
    actual = prior.map_loss(z, encoder_of(components.centers, components.scale))
    np.testing.assert_allclose(actual.item(), expected, rtol=1e-9)


def test_empty_batch():
    prior = VMMPrior(torch.zeros(4, 5), 3)
    encoder = encoder_of(torch.zeros(4, 3), torch.ones(4, 3))
    for function in (prior.map_loss, prior.update):
        with pytest.raises(ValueError, match="z must have at least one row"):
            function(torch.zeros(0, 3), encoder)
