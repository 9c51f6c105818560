"""Stick-breaking weights against scipy, mpmath and brute force."""

import math
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats
from support import negated
from torch.utils._python_dispatch import TorchDispatchMode

from vmm_fast import _core
from vmm_fast.inference import closed_form, stick_breaking
from vmm_fast.inference.stick_breaking import (
    log_stick_breaking_prior,
    log_weights_to_sticks,
    posterior_without_checks,
    stick_breaking_posterior,
    sticks_to_log_weights,
)

MIN_CONCENTRATION = 1e-8

counts_strategy = st.lists(
    st.one_of(
        st.sampled_from([0.0, 1.0, 3.0, 1e12]),  # zeros, ties, huge
        st.floats(0.0, 1e4),
        st.floats(0.0, 1.0),
    ),
    min_size=1,
    max_size=20,
)
discounts = st.sampled_from([0.0, 0.3, 0.9])
concentrations = st.floats(0.01, 100.0)


weights_strategy = st.lists(
    st.one_of(st.just(-math.inf), st.floats(-700, 700)), min_size=1, max_size=20
).filter(lambda values: max(values) > -math.inf)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def oracle(counts, concentration, discount):
    """Return (order, a, b, expected log weights, mean weights) by the definition."""
    counts = np.asarray(counts, dtype=np.float64)
    order = np.argsort(-counts, kind="stable")
    n = counts[order]
    c = np.arange(1, len(n))
    a = 1 - discount + n[:-1]
    tail = np.cumsum(n[::-1].astype(np.longdouble))[::-1][1:].astype(np.float64)
    b = concentration + c * discount + tail
    log_v = np.append(special.digamma(a) - special.digamma(a + b), 0.0)
    log_rest = np.append(0.0, np.cumsum(special.digamma(b) - special.digamma(a + b)))
    v = stats.beta.mean(a, b)
    rest = np.append(1.0, np.cumprod(stats.beta.mean(b, a)))
    expected, mean = np.empty_like(counts), np.empty_like(counts)
    expected[order] = log_v + log_rest
    mean[order] = np.append(v, 1.0) * rest
    return order, a, b, expected, mean


def concentration_objective(gamma, sum_log_rest, num_components, discount, shape, rate):
    """Return the objective up to terms without gamma."""
    c = np.arange(1, num_components)
    return (
        (shape - 1) * np.log(gamma)
        - rate * gamma
        + gamma * sum_log_rest
        - np.sum(special.betaln(1 - discount, gamma + c * discount))
    )


def sum_expected_log_rest(posterior):
    """sum_c E[log(1 - v_c)], which is E[log pi] of the last component."""
    return posterior.expected_log_weights[posterior.order[-1]].item()


def assert_follows_scipy(got, counts, concentration, discount, tolerance=1e-10):
    order, a, b, expected, mean = oracle(counts, concentration, discount)
    np.testing.assert_array_equal(got.order, order)
    np.testing.assert_allclose(got.a, a, rtol=1e-14)
    np.testing.assert_allclose(got.b, b, rtol=max(1e-14, 0.01 * tolerance * (len(a) > 1000)))
    np.testing.assert_allclose(got.expected_log_weights, expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(got.mean_weights, mean, rtol=tolerance, atol=1e-15)
    for weights in (got.mean_weights, got.map_weights):
        assert abs(weights.sum().item() - 1) < max(1e-13, tolerance * (len(a) > 1000))
        assert (weights >= 0).all()
    # Jensen: exp E[log pi] <= E[pi]
    assert (got.expected_log_weights.exp() <= got.mean_weights * (1 + 1e-9)).all()


@given(counts_strategy, concentrations, discounts)
@example([5.0], 1.0, 0.0)
@example([0.0, 0.0], 1.0, 0.3)
@example([1e12, 1e12, 0.0, 1e-12], 0.5, 0.9)
def test_posterior_against_scipy(counts, concentration, discount):
    got = stick_breaking_posterior(double(counts), concentration, discount)
    assert_follows_scipy(got, counts, concentration, discount)


PAIRS = [(1e12, 1.0), (1e12, 0.0), (0.0, 0.0), (7.0, 1e-9), (9.5, 9.5), (10.0, 0.02)]


@pytest.mark.parametrize(
    ("counts", "concentration", "discount"),
    [
        *((counts, 1e-3, discount) for counts in PAIRS for discount in (0.0, 0.3, 0.9)),
        ((0.0, 0.0), 1e-8, 0.0),  # a = 1, b = 1e-8
        ((1e8, 0.0), 1e-8, 0.0),
        ((0.0, 0.0), 1e8, 1 - 1e-8),  # a = 1e-8, b = 1e8
        ((0.0, 0.0), 1e-8, 1 - 1e-8),  # b = 1
        ((1e8, 1e8), 1.0, 0.0),
        ((1e8, 1e8), 1e8, 0.5),
    ],
)
def test_expectations_keep_their_relative_precision(counts, concentration, discount):
    """Where psi(a) - psi(a + b) cancels, and at the ends: mpmath with 60 digits."""
    got = stick_breaking_posterior(double(counts), concentration, discount)
    with mpmath.workdps(60):
        a, b = mpmath.mpf(got.a.item()), mpmath.mpf(got.b.item())
        true = [float(mpmath.digamma(x) - mpmath.digamma(a + b)) for x in (a, b)]
    assert got.expected_log_weights.tolist() == pytest.approx(true, rel=1e-13, abs=0)


def test_small_counts_are_not_lost_behind_large_ones():
    counts = [2.0**53] + [1.0] * 1000
    got = stick_breaking_posterior(double(counts), 1.0)
    assert got.b[0].item() == 1001.0
    assert got.b[-1].item() == 2.0


def many_counts(size):
    random = np.random.default_rng(3)
    counts = random.gamma(0.05, 100.0, size)
    counts[random.random(size) < 0.3] = 0.0
    return counts


@pytest.mark.parametrize("discount", [0.0, 0.5])
def test_many_components(discount):
    counts = many_counts(100_000)
    got = stick_breaking_posterior(torch.from_numpy(counts), 3.0, discount)
    assert_follows_scipy(got, counts, 3.0, discount, tolerance=1e-9)
    assert_maximises_concentration(got, discount, 1.0, 1.0)


@given(counts_strategy, concentrations, discounts)
@example([0.0, 0.0], 1.0, 0.0)
@example([0.0, 0.0, 0.0], 0.5, 0.3)
@example([1e12, 0.5, 1e-7], 0.5, 0.0)
@example([1.0, 0.0, 0.0], 5.0, 0.0)
def test_map_sticks_maximise_their_density(counts, concentration, discount):
    """Brute force: no v on a fine grid, ends included, has a higher density than the mode."""
    got = stick_breaking_posterior(double(counts), concentration, discount)
    weights = got.map_weights[got.order].numpy()
    rest = np.cumsum(weights[::-1])[::-1]
    grid = np.concatenate([np.linspace(0, 1, 2001), np.logspace(-15, -3, 200)])
    for c, (a, b) in enumerate(zip(got.a.numpy(), got.b.numpy(), strict=True)):
        if rest[c] < 1e-3:  # too little of the stick left to recover v from the weights
            break
        v, one_minus_v = weights[c] / rest[c], rest[c + 1] / rest[c]
        if b > 1:  # a mode nearer to 1 than any number is rounded to 1, where the density is 0
            one_minus_v = max(one_minus_v, 2.0**-53)
        if a < 1 and b < 1:  # infinite at both ends: the one with more mass
            assert v == (1.0 if stats.beta.sf(0.5, a, b) >= 0.5 else 0.0)
            continue
        # a - 1 and b - 1 may differ from 0 by rounding alone; xlogy has 0 log 0 = 0
        with np.errstate(divide="ignore"):
            density = special.xlogy(a - 1, grid) + special.xlog1py(b - 1, -grid)
            at_mode = special.xlogy(a - 1, v) + special.xlogy(b - 1, one_minus_v)
        if density.max() == math.inf:
            assert at_mode == math.inf
        else:
            assert at_mode >= density.max() - 1e-9 * (1 + abs(density.max()))


@pytest.mark.parametrize(
    ("counts", "concentration", "discount", "expected"),
    [
        ([7.0], 2.0, 0.0, [1.0]),
        ([4.0, 2.0], 2.0, 0.0, [4 / 7, 3 / 7]),  # a = 5, b = 4
        ([4.0, 0.0], 1.0, 0.0, [1.0, 0.0]),  # a = 5, b = 1
        ([4.0, 0.0], 0.5, 0.0, [1.0, 0.0]),  # a = 5, b = 1/2
        ([0.0, 0.0], 2.0, 0.0, [0.0, 1.0]),  # a = 1, b = 2
        ([0.0, 0.0], 2.0, 0.5, [0.0, 1.0]),  # a = 1/2, b = 5/2
        ([0.0, 0.0], 1.0, 0.0, [0.5, 0.5]),  # flat
        ([0.0, 0.0], 0.5, 0.0, [1.0, 0.0]),  # a = 1, b = 1/2
        ([0.0, 0.0], 0.25, 0.25, [1.0, 0.0]),  # a = 3/4, b = 1/2: more mass near 1
        ([0.0, 0.0], 0.125, 0.5, [0.0, 1.0]),  # a = 1/2, b = 5/8: more mass near 0
        ([0.0, 0.0], 0.25, 0.375, [1.0, 0.0]),  # a = b = 5/8: alike, the larger component
    ],
)
def test_map_weights_at_the_boundaries(counts, concentration, discount, expected):
    got = stick_breaking_posterior(double(counts), concentration, discount)
    assert got.map_weights.tolist() == pytest.approx(expected, abs=1e-15)


def assert_maximises_concentration(posterior, discount, shape, rate):
    """The returned value against the root of the derivative (by scipy's digamma) and a search."""
    size = posterior.order.numel()
    sum_log_rest = sum_expected_log_rest(posterior)
    c = np.arange(1, size)

    def derivative(gamma):
        x = gamma + c * discount
        return (
            (shape - 1) / gamma
            - rate
            + sum_log_rest
            + np.sum(special.digamma(x + 1 - discount) - special.digamma(x))
        )

    if derivative(MIN_CONCENTRATION) < 0:  # shape >= 1: concave in gamma, so the maximum is below
        assert posterior.concentration == MIN_CONCENTRATION
        return
    root = optimize.brentq(derivative, MIN_CONCENTRATION, 1e14, xtol=1e-14, rtol=1e-14)
    assert posterior.concentration == pytest.approx(root, rel=1e-8)

    def loss(log_gamma):
        return -concentration_objective(
            np.exp(log_gamma), sum_log_rest, size, discount, shape, rate
        )

    bounds = (math.log(root) - 3, math.log(root) + 3)
    found = optimize.minimize_scalar(loss, bounds=bounds, method="bounded")
    tolerance = 1e-13 * size * (1 + abs(found.fun))
    assert loss(math.log(posterior.concentration)) <= found.fun + tolerance


@given(
    counts_strategy, concentrations, discounts, st.sampled_from([1.0, 1.5, 20.0]), concentrations
)
def test_concentration_against_scipy(counts, concentration, discount, shape, rate):
    got = stick_breaking_posterior(double(counts), concentration, discount, (shape, rate))
    assert_maximises_concentration(got, discount, shape, rate)


@given(counts_strategy, concentrations, st.sampled_from([0.2, 1.0, 3.0]), concentrations)
def test_concentration_is_the_conjugate_mode_without_discount(counts, concentration, shape, rate):
    got = stick_breaking_posterior(double(counts), concentration, 0.0, (shape, rate))
    mode = (shape + len(counts) - 2) / (rate - sum_expected_log_rest(got))
    assert got.concentration == pytest.approx(max(mode, MIN_CONCENTRATION), rel=1e-13)


@pytest.mark.parametrize(
    ("counts", "discount", "shape"),
    [
        ([100.0] * 50, 0.01, 1.1),
        ([100.0] * 50, 0.9, 3.0),
        ([1000.0] + [0.0] * 49, 0.3, 1.1),
        ([1000.0] + [0.0] * 49, 1 - 1e-9, 3.0),
        ([3.0, 2.0, 1.0], 0.01, 3.0),
        ([3.0, 2.0, 1.0], 1e-13, 3.0),
        ([3.0, 2.0, 1.0], 1 - 1e-9, 1.1),
    ],
)
def test_concentration_to_twelve_digits(counts, discount, shape):
    """The root of the derivative with 40 digits, by mpmath."""
    rate = 0.01
    got = stick_breaking_posterior(double(counts), 2.0, discount, (shape, rate))
    assert got.concentration > 1e-3
    with mpmath.workdps(40):
        sum_log_rest = mpmath.mpf(sum_expected_log_rest(got))
        d = mpmath.mpf(discount)

        def derivative(gamma):
            xs = [gamma + c * d for c in range(1, len(counts))]
            terms = [mpmath.digamma(x + 1 - d) - mpmath.digamma(x) for x in xs]
            return (shape - 1) / gamma - mpmath.mpf(rate) + sum_log_rest + mpmath.fsum(terms)

        guess = mpmath.mpf(got.concentration)
        root = mpmath.findroot(derivative, (guess * (1 - 1e-6), guess * (1 + 1e-6)))
    assert got.concentration == pytest.approx(float(root), rel=1e-11)


def test_concentration_with_a_prior_unbounded_at_zero():
    """Shape < 1 and d > 0: the interior maximum if there is one, else the lower bound."""
    prior = (0.9, 0.1)
    got = stick_breaking_posterior(double([30.0] * 20), 5.0, 0.3, prior)
    args = (sum_expected_log_rest(got), 20, 0.3, *prior)
    at, below, above = (
        concentration_objective(got.concentration * s, *args) for s in (1.0, 0.999, 1.001)
    )
    assert got.concentration > 0.1
    assert at > below
    assert at > above
    got = stick_breaking_posterior(double([30.0, 0.0]), 0.01, 0.3, (0.1, 100.0))
    assert got.concentration == MIN_CONCENTRATION


def test_results_follow_the_counts():
    counts = torch.tensor([0.5, 8.0, 8.0, 3.0])
    got = stick_breaking_posterior(counts, 1.3, 0.2)
    wide = stick_breaking_posterior(counts.double(), 1.3, 0.2)
    assert got.order.tolist() == [1, 2, 3, 0]
    assert got.order.dtype == torch.int64
    for name in ("a", "b", "expected_log_weights", "mean_weights", "map_weights"):
        assert getattr(got, name).dtype == torch.float32
        torch.testing.assert_close(getattr(got, name), getattr(wide, name).float())
    assert got.concentration == wide.concentration
    strided = torch.stack([counts, -counts], dim=1)[:, 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(stick_breaking_posterior(strided, 1.3, 0.2), got, rtol=0, atol=0)
    same = stick_breaking_posterior(negated(counts.double()), 1.3, 0.2)
    torch.testing.assert_close(same, wide, rtol=0, atol=0)
    sticks = got.mean_weights[1:].double()
    assert torch.equal(sticks_to_log_weights(negated(sticks)), sticks_to_log_weights(sticks))
    weights = wide.expected_log_weights
    assert torch.equal(log_weights_to_sticks(negated(weights)), log_weights_to_sticks(weights))
    expanded = stick_breaking_posterior(torch.ones(1).expand(3), 1.0)
    assert expanded.order.tolist() == [0, 1, 2]
    assert not stick_breaking_posterior(counts.requires_grad_(), 1.0).a.requires_grad


def assert_same_bits(first, second):
    for one, other in zip(first[:-1], second[:-1], strict=True):
        assert torch.equal(one, other)
    assert first.concentration == second.concentration


# The GPU's algorithm: one member after another does what a thread of the block would do


@pytest.fixture
def emulated_gpu(monkeypatch):
    """Make the dispatch believe that the counts are on a GPU with this many threads in a block."""

    def emulate(members, falling=False):
        def launch(*arguments):
            *shared, _device, _stream = arguments
            _core.stick_breaking_posterior_emulated(*shared, members, falling)

        kernels = SimpleNamespace(stick_breaking_posterior=launch)
        monkeypatch.setattr(stick_breaking, "_cuda_kernels", lambda device: kernels)
        stream = SimpleNamespace(cuda_stream=0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    return emulate


TEAM_COUNTS = {
    "1": [5.0],
    "2": [1.0, 4.0],
    "3": [0.5, 8.0, 8.0],
    "ties": [3.0, 1.0, 7.0, 1.0] * 25,
    "zeros": [0.0] * 33,
    "huge": [1e12, 2.0**53, 1e-12, 0.0, 1.0, 1e12, 3.0] * 5,
    "1000": many_counts(1000),
    "100000": many_counts(100_000),
}


@pytest.mark.parametrize("discount", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", TEAM_COUNTS)
def test_team_against_one_member(name, discount, emulated_gpu):
    counts = double(TEAM_COUNTS[name])
    expected = stick_breaking_posterior(counts, 2.0, discount, (1.5, 0.5))
    # 512 is the size of the block; the others leave tiles and turns of every kind unfinished.
    for members in (1, 2, 3, 7, 64, 512) if len(counts) < 10_000 else (7, 512):
        emulated_gpu(members)
        got = stick_breaking_posterior(counts, 2.0, discount, (1.5, 0.5))
        assert torch.equal(got.order, expected.order)
        for one, other in zip(got[1:], expected[1:], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-300)
        # No member reads what another one writes in the same phase.
        emulated_gpu(members, falling=True)
        assert_same_bits(got, stick_breaking_posterior(counts, 2.0, discount, (1.5, 0.5)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts_strategy, concentrations, discounts, st.integers(1, 9))
def test_team_sorts_and_follows_scipy(emulated_gpu, counts, concentration, discount, members):
    emulated_gpu(members)
    got = stick_breaking_posterior(double(counts), concentration, discount)
    assert_follows_scipy(got, counts, concentration, discount)
    assert_maximises_concentration(got, discount, 1.0, 1.0)


@pytest.mark.parametrize("members", [None, 1, 4])
@pytest.mark.parametrize("value", [math.nan, -1.0, -1e300, math.inf])
@pytest.mark.parametrize("discount", [0.0, 0.3])
def test_without_checks_what_is_no_count_gives_nan(members, value, discount, emulated_gpu):
    if members is not None:
        emulated_gpu(members)
    counts = double([3.0, value, 3.0, 0.0, 5.0])
    got = posterior_without_checks(counts, 1.0, discount)
    assert got.order.sort().values.tolist() == [0, 1, 2, 3, 4]
    assert got.mean_weights.isnan().any()
    assert got.expected_log_weights.isnan().any()
    assert got.concentration.isnan()
    got = posterior_without_checks(counts.nan_to_num().clamp(0, 5), double(-1.0), discount)
    assert got.mean_weights.isnan().all()


class NeverWaiting(TorchDispatchMode):
    """Refuse operations that would have to wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        assert func is not torch.ops.aten.nonzero.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("map_prior", ["fixed", "learnt"])
def test_maximised_weights_do_not_wait_for_a_gpu(map_prior, emulated_gpu):
    mass, gamma = double(TEAM_COUNTS["ties"]), double(1.3)
    options = {"weights": "stick-breaking", "discount": 0.3, "map_prior": map_prior}
    expected, expected_gamma = closed_form.maximise_weights(mass, 1.3, **options)
    emulated_gpu(512)
    with NeverWaiting():
        log_weights, learnt = closed_form.maximise_weights(mass, gamma, **options)
    torch.testing.assert_close(log_weights, expected, rtol=1e-12, atol=0)
    assert float(learnt) == pytest.approx(float(expected_gamma), rel=1e-12)


def test_more_components_than_the_gpu_takes_go_to_the_cpu(monkeypatch):
    def kernels(device):
        raise AssertionError

    monkeypatch.setattr(stick_breaking, "_cuda_kernels", kernels)
    assert stick_breaking_posterior(torch.ones(100_001), 1.0).order[-1] == 100_000


# Sticks and weights


@given(st.lists(st.floats(0.0, 1.0), max_size=20))
def test_sticks_to_log_weights(sticks):
    got = sticks_to_log_weights(double(sticks))
    with np.errstate(divide="ignore"):
        v = np.append(np.array(sticks, dtype=np.float64), 1.0)
        expected = np.log(v) + np.append(0.0, np.cumsum(np.log1p(-v[:-1])))
    np.testing.assert_allclose(got, expected, rtol=1e-13)
    assert abs(got.exp().sum().item() - 1) < 1e-13


@given(st.lists(st.floats(1e-6, 1 - 1e-6), max_size=20))
def test_sticks_survive_the_round_trip(sticks):
    got = log_weights_to_sticks(sticks_to_log_weights(double(sticks)))
    np.testing.assert_allclose(got, sticks, rtol=1e-12)


@given(weights_strategy)
def test_log_weights_to_sticks(log_weights):
    got = log_weights_to_sticks(double(log_weights)).numpy()
    w = np.array(log_weights)
    for c in range(len(w) - 1):
        rest = special.logsumexp(w[c:])
        expected = np.exp(w[c] - rest) if rest > -math.inf else 0.0
        assert got[c] == pytest.approx(expected, rel=1e-12, abs=0)


def test_far_tails_keep_their_log_weights():
    sticks = torch.full((5000,), 0.5, dtype=torch.float64)
    got = sticks_to_log_weights(sticks)  # down to 2^-5000, which is no double
    assert got[-1].item() == pytest.approx(-5000 * math.log(2), rel=1e-13)
    np.testing.assert_allclose(log_weights_to_sticks(got), 0.5, rtol=1e-11)


def test_sticks_and_weights_keep_dtype():
    log_weights = sticks_to_log_weights(torch.tensor([0.5, 0.25]))
    assert log_weights.dtype == torch.float32
    torch.testing.assert_close(log_weights.exp(), torch.tensor([0.5, 0.125, 0.375]))
    assert log_weights_to_sticks(log_weights).dtype == torch.float32
    assert sticks_to_log_weights(torch.empty(0)).tolist() == [0.0]
    assert log_weights_to_sticks(torch.zeros(1)).tolist() == []


# The prior in plain torch


def prior_oracle(log_weights, concentration, discount):
    pi = np.sort(special.softmax(np.asarray(log_weights)))[::-1]
    rest = np.cumsum(pi[::-1])[::-1]
    c = np.arange(1, len(pi))
    v = pi[:-1] / rest[:-1]
    return stats.beta.logpdf(v, 1 - discount, concentration + c * discount).sum()


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=15), concentrations, discounts)
@example([1.0, 1.0, 1.0], 2.0, 0.3)
def test_prior_against_scipy(log_weights, concentration, discount):
    got = log_stick_breaking_prior(double(log_weights), concentration, discount)
    expected = prior_oracle(log_weights, concentration, discount)
    assert got.item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("discount", [0.0, 0.3, 0.9])
def test_prior_float32(discount):
    log_weights = torch.from_numpy(np.random.default_rng(2).normal(size=2000)).float()
    got = log_stick_breaking_prior(log_weights, 1.5, discount)
    assert got.dtype == torch.float32
    expected = prior_oracle(log_weights.double(), 1.5, discount)
    assert got.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("discount", [0.0, 0.3, 0.9])
def test_prior_gradients(discount):
    log_weights = double([0.3, -1.2, 0.9, -0.4, 1.7]).requires_grad_()
    concentration = double(1.4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w, g: log_stick_breaking_prior(w, g, discount), (log_weights, concentration)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("discount", [0.0, 0.3])
def test_prior_with_pruned_components(discount, dtype):
    log_weights = torch.tensor([0.3, -math.inf, 0.9, -math.inf, -1000.0], dtype=dtype)
    log_weights.requires_grad_()
    concentration = torch.tensor(0.5, requires_grad=True)
    got = log_stick_breaking_prior(log_weights, concentration, discount)
    got.backward()
    assert got.isfinite()
    assert log_weights.grad.isfinite().all()
    assert log_weights.grad[[1, 3, 4]].eq(0).all()
    assert concentration.grad.isfinite()
    pi = torch.softmax(log_weights.detach().double(), 0).log().clamp(min=-20.0)
    assert got.item() == pytest.approx(prior_oracle(pi, 0.5, discount), rel=1e-5)


# Errors


@pytest.mark.parametrize(
    ("counts", "error", "match"),
    [
        ([1.0, 2.0], TypeError, "counts must be a tensor, but is a list"),
        (torch.tensor([1, 2]), TypeError, "counts must be float32 or float64, but is torch.int64"),
        (torch.ones(2, dtype=torch.float16), TypeError, "must be float32 or float64"),
        (torch.ones(2, 2), ValueError, r"counts must be one-dimensional.*has shape \[2, 2\]"),
        (torch.ones(0), ValueError, r"counts must .* at least 1 long, but has shape \[0\]"),
        (torch.tensor([1.0, -1.0]), ValueError, "has values from -1.0 to 1.0"),
        (torch.tensor([1.0, math.nan]), ValueError, "counts must be .* but has values from nan"),
        (torch.tensor([1.0, math.inf]), ValueError, "must be non-negative and finite"),
        (double([1.5e308, 1.5e308]), ValueError, "with a finite sum"),
    ],
)
def test_wrong_counts(counts, error, match):
    with pytest.raises(error, match=match):
        stick_breaking_posterior(counts, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(((x,), f"concentration must be finite and above 0, but is {x}") for x in (0.0, -1.0)),
        *(
            ((x,), f"concentration must be finite and above 0, but is {x}")
            for x in (math.nan, math.inf)
        ),
        *(((1.0, x), rf"discount must be in \[0, 1\), but is {x}") for x in (-0.1, 1.0, math.nan)),
    ],
)
def test_wrong_concentration_and_discount(arguments, message):
    for function in (stick_breaking_posterior, log_stick_breaking_prior):
        with pytest.raises(ValueError, match=message):
            function(torch.ones(2), *arguments)


@pytest.mark.parametrize(
    ("prior", "name"), [((0.0, 1.0), "shape"), ((1.0, -2.0), "rate"), ((math.nan, 1.0), "shape")]
)
def test_wrong_concentration_prior(prior, name):
    with pytest.raises(
        ValueError, match=f"concentration_prior's {name} must be finite and above 0"
    ):
        stick_breaking_posterior(torch.ones(2), 1.0, concentration_prior=prior)


@pytest.mark.parametrize(
    ("function", "value", "message"),
    [
        (sticks_to_log_weights, [0.5, -0.5], r"sticks must lie in \[0, 1\], but .* -0.5 to 0.5"),
        (sticks_to_log_weights, [0.5, math.nan], "sticks must .* values from nan"),
        (sticks_to_log_weights, [[1.0, 1.0]], r"sticks must be one-dim.* shape \[1, 2\]"),
        (log_weights_to_sticks, [-math.inf, -math.inf], "log_weights must .* maximum -inf"),
        (log_weights_to_sticks, [0.0, math.nan], "log_weights must .* maximum nan"),
        (log_weights_to_sticks, [], r"log_weights must .* shape \[0\]"),
    ],
)
def test_wrong_sticks_and_log_weights(function, value, message):
    with pytest.raises(ValueError, match=message):
        function(torch.tensor(value))


def test_a_prior_of_wrong_log_weights():
    with pytest.raises(TypeError, match=r"log_weights must be .*, but is torch\.int64"):
        log_stick_breaking_prior(torch.tensor([1, 2]), 1.0)
    with pytest.raises(ValueError, match="log_weights must be one-dimensional"):
        log_stick_breaking_prior(torch.ones(2, 2), 1.0)
