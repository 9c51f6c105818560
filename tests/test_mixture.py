"""Components against scipy and torch.distributions in float64: densities, samples, hard inputs."""

import io
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from support import random_components
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from vmm_fast import Components
from vmm_fast.mixture import gaussian_entropy, gaussian_parameters

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def covariances(components):
    """Lambda^-1 and S of every center, by numpy."""
    j, d = components.centers.shape
    k = components.pseudo_inputs_per_component
    inverse, s = np.zeros((j, d, d)), np.zeros((j, d, d))
    if components.precision_cholesky is not None:
        factor = components.precision_cholesky.numpy()
        inverse = np.repeat(np.linalg.inv(factor @ factor.transpose(0, 2, 1)), k, 0)
    if components.scale is not None:
        scale = components.scale.numpy()
        scale = np.stack([np.diag(x) for x in scale]) if scale.ndim == 2 else scale
        s = scale @ scale.transpose(0, 2, 1)
    return inverse, s


CASES = [
    {"scale": "full"},
    {"scale": "diagonal", "k": 3},
    {"scale": None},
    {"scale": "full", "precision": False},
    {"scale": "diagonal", "precision": False},
    {"c": 1, "d": 1, "scale": "diagonal"},
]


def points(components, count=20):
    generator = torch.Generator().manual_seed(7)
    return 2 * torch.randn(count, components.latent_dim, generator=generator, dtype=torch.float64)


def scipy_log_joint(components, z, covariances):
    """log(pi_c / K) + log N(z; m_j, covariance_j) [B, J]."""
    k = components.pseudo_inputs_per_component
    columns = [
        scipy.stats.multivariate_normal(m, covariance).logpdf(z.numpy()).reshape(-1)
        for m, covariance in zip(components.centers.numpy(), covariances, strict=True)
    ]
    return np.stack(columns, 1) + np.repeat(components.log_weights.numpy() - math.log(k), k)


@pytest.mark.parametrize("case", CASES)
def test_marginal_density(case):
    components = random_components(**case)
    z = points(components)
    joint = scipy_log_joint(components, z, sum(covariances(components)))
    expected = scipy.special.logsumexp(joint, axis=1)
    np.testing.assert_allclose(components.log_prob(z), expected, **TIGHT)
    density = components.distribution().log_prob(z[:, None])[:, 0]
    np.testing.assert_allclose(density, expected, **TIGHT)


@pytest.mark.parametrize("case", CASES[:3])
def test_expected_log_joint(case):
    """E_q(mu)[log N(z; mu, Lambda^-1)], put together from scipy's densities."""
    components = random_components(**case)
    z, (inverse, s) = points(components), covariances(components)
    joint = scipy_log_joint(components, z, inverse)
    joint -= 0.5 * np.trace(np.linalg.solve(inverse, s), axis1=1, axis2=2)
    k = components.pseudo_inputs_per_component
    grouped = scipy.special.logsumexp(joint.reshape(20, -1, k), axis=2)
    np.testing.assert_allclose(components.log_joint(z), grouped, **TIGHT)
    q = scipy.special.softmax(grouped, axis=1)
    np.testing.assert_allclose(components.responsibilities(z), q, **TIGHT)
    labels, probability, entropy = components.assign(z)
    np.testing.assert_array_equal(labels, q.argmax(1))
    np.testing.assert_allclose(probability, q.max(1), **TIGHT)
    np.testing.assert_allclose(entropy, scipy.stats.entropy(q, axis=1), **TIGHT)


def test_shown_in_a_line():
    components = random_components(c=3, k=2, d=4)
    assert repr(components) == "Components(3 components, 6 centers, 4 dimensions)"


def test_expected_log_joint_is_an_expectation():
    """Monte Carlo over mu ~ N(m, S), so that the formula itself is not taken on trust."""
    components = random_components(c=1, d=2)
    inverse, s = covariances(components)
    rng = np.random.default_rng(0)
    mu = rng.multivariate_normal(components.centers[0].numpy(), s[0], size=200_000)
    z = np.array([0.3, -1.2])
    values = scipy.stats.multivariate_normal(z, inverse[0]).logpdf(mu)
    actual = components.log_joint(torch.tensor(z)[None]).item()
    assert abs(actual - values.mean()) < 5 * values.std() / math.sqrt(len(values))


@pytest.mark.parametrize("full", [True, False])
def test_kl(full):
    """The estimate with a given z is log q - log p in expectation: against torch.distributions."""
    components = random_components(c=3, k=2, d=2)
    mean = torch.randn(5, 2, dtype=torch.float64)
    scale = torch.rand(5, 2, dtype=torch.float64) + 0.2
    below = torch.randn(5, 2, 2, dtype=torch.float64).tril(-1)
    q = MultivariateNormal(mean, scale_tril=below + scale.diag_embed()) if full else None
    q = q or Normal(mean, scale)
    mixture = MixtureSameFamily(
        Categorical(components.component_weights.repeat_interleave(2)),
        MultivariateNormal(components.centers, torch.as_tensor(sum(covariances(components)))),
    )
    z = torch.randn(5, 2, dtype=torch.float64)
    entropy = q.entropy() if full else q.entropy().sum(-1)
    torch.testing.assert_close(components.kl(q, z), -entropy - mixture.log_prob(z), **TIGHT)
    torch.manual_seed(0)
    ours = components.kl(q)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, -entropy - mixture.log_prob(q.rsample()), **TIGHT)


def test_kl_of_a_single_gaussian_is_right_on_average():
    components = random_components(c=1, d=2, scale=None)
    q = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    inverse, _ = covariances(components)
    p = MultivariateNormal(components.centers[0], torch.as_tensor(inverse[0]))
    torch.manual_seed(0)
    values, true = components.kl(q.expand((4000,))), kl_divergence(q, p)
    assert abs(values.mean() - true) < 5 * values.std() / math.sqrt(len(values))


@pytest.mark.parametrize("case", CASES)
def test_mean_variance_and_samples(case):
    components = random_components(**case)
    inverse, s = covariances(components)
    k = components.pseudo_inputs_per_component
    shares = np.repeat(components.component_weights.numpy() / k, k)
    centers = components.centers.numpy()
    mean = shares @ centers
    second = np.einsum("j,jab->ab", shares, inverse + s + centers[:, :, None] * centers[:, None, :])
    covariance = second - np.outer(mean, mean)
    distribution = components.distribution()
    np.testing.assert_allclose(distribution.mean, mean, **TIGHT)
    np.testing.assert_allclose(distribution.variance, np.diag(covariance), **TIGHT)
    torch.manual_seed(0)
    samples = distribution.sample((300, 200)).reshape(-1, components.latent_dim).numpy()
    error = np.sqrt(np.diag(covariance) / len(samples))
    assert (abs(samples.mean(0) - mean) < 5 * error).all()
    np.testing.assert_allclose(
        np.cov(samples.T).reshape(covariance.shape), covariance, atol=0.08 * covariance.max()
    )
    one = components.sample(50_000, component=0).numpy()
    np.testing.assert_allclose(one.mean(0), centers[:k].mean(0), atol=0.06)


@pytest.mark.parametrize("name", ["centers", "log_weights", "precision_cholesky", "scale"])
@pytest.mark.parametrize("component", [None, 0, 1])
def test_samples_of_what_is_no_mixture_are_refused(name, component):
    """Check that a mixture that is no density has no samples, whatever component is drawn."""
    parts = random_components(c=3)._values()
    names = ("centers", "log_weights", "precision_cholesky", "scale")
    tensors = {n: x.clone() for n, x in zip(names, parts, strict=True)}
    tensors[name][1] = torch.nan
    components = Components(**tensors)
    message = (
        "(centers|log_weights) must be finite.* row 1 has|component 1 has no positive-definite"
    )
    with pytest.raises(ValueError, match=message):
        components.log_prob(torch.zeros(1, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=message):
        components.sample(4, component)


def test_samples_beyond_the_dtype_are_refused():
    wide = Components(torch.zeros(1, 2), torch.zeros(1), scale=torch.full((1, 2), 3e38))
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"samples must be finite, but the mixture is too wide"):
        wide.sample(100)


def test_component_samples():
    components = random_components(c=3)
    z = components.sample(6, component=torch.tensor([0, 0, 1, 1, 2, 2]))
    assert z.shape == (6, 3)
    assert components.distribution().component_sample(2, (4, 5)).shape == (4, 5, 3)
    assert components.sample(0).shape == (0, 3)
    with pytest.raises(ValueError, match="component must be an integer or a tensor of 2"):
        components.sample(2, component=1.5)
    with pytest.raises(ValueError, match="n must be an integer"):
        components.sample(2.5)
    for bad in (3, -1):
        with pytest.raises(ValueError, match=r"component must be in 0 \.\. 2"):
            components.sample(2, component=bad)


def test_active_components():
    components = Components(
        torch.tensor([[0.0], [10.0], [20.0]]),
        torch.tensor([0.6, 0.399, 0.001]).log(),
        torch.ones(3, 1, 1),
    )
    assert components.active_components().tolist() == [0, 1]
    assert components.active_components(threshold=0).tolist() == [0, 1, 2]
    z = torch.tensor([[20.0], [20.1], [9.9], [10.0], [10.1]])
    assert components.active_components(z).tolist() == [1, 2]
    with pytest.raises(ValueError, match="z must have at least one row"):
        components.active_components(z[:0])
    with pytest.raises(ValueError, match="threshold must be in"):
        components.active_components(threshold=1.5)


def test_zero_weight_component():
    log_weights = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    three = random_components(c=3)
    pruned = Components(three.centers, log_weights, three.precision_cholesky, three.scale)
    two = Components(
        three.centers[:2], log_weights[:2], three.precision_cholesky[:2], three.scale[:2]
    )
    z = torch.randn(10, 3, dtype=torch.float64)
    torch.testing.assert_close(pruned.log_prob(z), two.log_prob(z), **TIGHT)
    assert (pruned.responsibilities(z)[:, 2] == 0).all()
    assert (pruned.log_joint(z)[:, 2] == -torch.inf).all()
    assert pruned.distribution().mean.isfinite().all()


def test_badly_conditioned_precision_in_float32():
    """Condition number 1e12: float32 results as accurate as the float32 inputs allow."""
    torch.manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(3, 4, 4).double())
    precision = rotation @ torch.tensor([1e-6, 1.0, 1e3, 1e6]).double().diag() @ rotation.mT
    factor = torch.linalg.cholesky((precision + precision.mT) / 2).float()
    condition = torch.linalg.cond(factor.double() @ factor.double().mT).max().item()
    assert condition == pytest.approx(1e12, rel=0.5)
    weights = torch.full((3,), 1 / 3).log()
    centers = torch.randn(3, 4)
    for scale in (None, *(torch.full((3, 4), s) for s in (1e-7, 1e-3, 1.0))):
        components = Components(centers, weights, factor, scale)
        exact = components.to(torch.float64)
        z = torch.cat([torch.randn(20, 4), components.sample(20)])
        for got, true in (
            (components.log_prob(z), exact.log_prob(z.double())),
            (components.log_joint(z), exact.log_joint(z.double())),
        ):
            assert got.isfinite().all()
            torch.testing.assert_close(got.double(), true, rtol=2e-5, atol=2e-4)
            assert got.dtype == torch.float32


def test_graph_is_built_where_it_is_due():
    """A mixture first used without gradients still gives them later."""
    learnt = {k: v.requires_grad_() for k, v in random_components(c=2).state_dict().items()}
    components = Components(**learnt)
    z = torch.randn(4, 3, dtype=torch.float64)
    for method in ("log_prob", "log_joint"):
        with torch.no_grad():
            before = getattr(components, method)(z)
        after, fresh = (getattr(c, method)(z) for c in (components, Components(**learnt)))
        torch.testing.assert_close(before, after.detach())
        found, true = (torch.autograd.grad(x.sum(), [*learnt.values()]) for x in (after, fresh))
        for name, got, expected in zip(learnt, found, true, strict=True):
            torch.testing.assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")
            assert got.any(), name
        assert not getattr(components.detach(), method)(z).requires_grad


def test_dtypes_of_points():
    """Wider points are evaluated in their own dtype, integers are refused."""
    components = random_components(dtype=torch.float32)
    z = torch.randn(6, 3, dtype=torch.float64) * 3
    exact = components.to(torch.float64)
    for method in ("log_prob", "log_joint", "responsibilities"):
        got, true = (getattr(c, method)(z) for c in (components, exact))
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-6)
        assert getattr(components, method)(z.bfloat16()).dtype == torch.float32
        with pytest.raises(TypeError, match="z must be a tensor of a floating dtype, but is"):
            getattr(components, method)(torch.zeros(2, 3, dtype=torch.int64))


def test_state_round_trip():
    components = random_components(k=2)
    z = torch.randn(5, 3, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(components.state_dict(), file)
    file.seek(0)
    restored = Components(**torch.load(file, weights_only=True))
    assert torch.equal(restored.log_prob(z), components.log_prob(z))
    assert components.to(torch.float32).log_prob(z.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision_cholesky": torch.zeros(4, 3, 3).double()}, "component 0 has no positive-def"),
        ({"precision_cholesky": torch.full((4, 3, 3), math.nan).double()}, "no positive-definite"),
        ({"scale": torch.full((4, 3, 3), math.nan).double()}, "no positive-definite"),
        ({"precision_cholesky": torch.eye(3)}, "precision_cholesky must have shape"),
        ({"scale": torch.ones(3, 3)}, "scale must have shape"),
        ({"centers": torch.ones(3)}, "centers must have shape"),
        ({"log_weights": torch.zeros(3)}, "log_weights must have shape"),
        ({"scale": None, "precision_cholesky": None}, "must not both be None"),
    ],
)
def test_errors(change, message):
    good = random_components()
    values = {**good.state_dict(), **change}
    with pytest.raises(ValueError, match=message):
        Components(**values).log_prob(torch.zeros(2, 3, dtype=torch.float64))


def test_gaussian_parameters():
    mean, scale = torch.randn(4, 2), torch.rand(4, 2) + 0.1
    for q in (Normal(mean, scale), Independent(Normal(mean, scale), 1)):
        assert torch.equal(gaussian_parameters(q)[1], scale)
        torch.testing.assert_close(gaussian_entropy(q), Normal(mean, scale).entropy().sum(-1))
    q = MultivariateNormal(mean, scale_tril=torch.diag_embed(scale))
    torch.testing.assert_close(gaussian_entropy(q), q.entropy())
    with pytest.raises(TypeError, match="q must be a torch"):
        gaussian_parameters(torch.distributions.Laplace(mean, scale))
    with pytest.raises(ValueError, match="mean of shape"):
        gaussian_parameters(Normal(mean[0], scale[0]))
