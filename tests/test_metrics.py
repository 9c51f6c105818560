"""Scores, ELBO surgery and the importance-weighted bound against hand-made and exact cases."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.distributions import (
    Categorical,
    Independent,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from vmm_fast import metrics
from vmm_fast.metrics import (
    clustering_scores,
    clustering_scores_from_assignment,
    elbo_surgery,
    importance_weighted_log_likelihood,
    importance_weighted_log_prob,
)

# --- clustering ---

# Component 0 holds points 0, 1, 2 (labels a, a, b) and its most probable point is 2, a "b";
# component 1 holds points 3, 4 (b, b); component 2 holds none; component 3 holds point 5 (a).
RESPONSIBILITIES = np.array(
    [
        [0.6, 0.2, 0.1, 0.1],
        [0.7, 0.1, 0.1, 0.1],
        [0.9, 0.1, 0.0, 0.0],
        [0.1, 0.8, 0.1, 0.0],
        [0.2, 0.5, 0.3, 0.0],
        [0.0, 0.0, 0.3, 0.7],
    ]
)
LABELS = ["a", "a", "b", "b", "b", "a"]


def pair_counting_ari(x, y):
    """Adjusted Rand index from its definition: agreeing pairs, corrected for chance."""
    pairs = list(itertools.combinations(range(len(x)), 2))
    same_x = sum(x[i] == x[j] for i, j in pairs)
    same_y = sum(y[i] == y[j] for i, j in pairs)
    both = sum(x[i] == x[j] and y[i] == y[j] for i, j in pairs)
    expected = same_x * same_y / len(pairs)
    largest = (same_x + same_y) / 2
    return 1.0 if largest == expected else (both - expected) / (largest - expected)


def entropy_nmi(x, y):
    """2 I(x; y) / (H(x) + H(y)) from counts."""
    h = [stats.entropy(np.unique(v, return_counts=True)[1]) for v in (x, y)]
    joint = stats.entropy(
        np.unique([f"{a}|{b}" for a, b in zip(x, y, strict=True)], return_counts=True)[1]
    )
    return 1.0 if sum(h) == 0 else 2 * (sum(h) - joint) / sum(h)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float64])
def test_hand_made_case(dtype):
    """For arrays, and for tensors of any dtype with a gradient."""
    given = RESPONSIBILITIES
    if dtype:
        given = torch.tensor(given).to(dtype).requires_grad_()
    scores = clustering_scores(given, LABELS)
    assert scores.accuracy == pytest.approx(4 / 6)  # component 0 takes "b": right at 2, 3, 4, 5
    assert scores.accuracy_majority == pytest.approx(5 / 6)
    assert scores.accuracy_one_to_one == pytest.approx(4 / 6)  # component 3 has no label left
    assert scores.components_used == 3
    assert scores.components_active == 3
    assert scores.nmi == pytest.approx(entropy_nmi([0, 0, 0, 1, 1, 3], LABELS))
    assert scores.ari == pytest.approx(pair_counting_ari([0, 0, 0, 1, 1, 3], LABELS))
    # merged: component 0 and 3 are both "a" by majority
    assert scores.nmi_merged == pytest.approx(entropy_nmi([0, 0, 0, 1, 1, 0], LABELS))
    assert scores.ari_merged == pytest.approx(pair_counting_ari([0, 0, 0, 1, 1, 0], LABELS))
    assert scores.nmi_merged != pytest.approx(scores.nmi)
    clustering = ["nmi", "ari", "ami", "nmi_merged", "ari_merged"]
    accuracies = ["accuracy", "accuracy_majority", "accuracy_one_to_one"]
    names = [*accuracies, *clustering, "components_used", "components_active"]
    assert scores.as_dict() == {name: getattr(scores, name) for name in names}


def test_ami_is_the_chance_corrected_mutual_information():
    """(MI - E[MI]) / (mean entropy - E[MI]), expected over all permutations of the labels."""
    x, y = [0, 0, 1, 1, 2], [0, 0, 0, 1, 1]

    def entropy(v):
        return stats.entropy(np.unique(v, return_counts=True)[1])

    def information(a, b):
        return entropy_nmi(a, b) * (entropy(a) + entropy(b)) / 2

    expected = np.mean([information(x, p) for p in itertools.permutations(y)])
    mean_entropy = (entropy(x) + entropy(y)) / 2
    scores = clustering_scores_from_assignment(x, y)
    assert scores.ami == pytest.approx((information(x, y) - expected) / (mean_entropy - expected))
    assert scores.ami != pytest.approx(scores.ari, abs=1e-3)


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["x", "y", "z z", ""])), min_size=2).map(
        lambda rows: tuple(zip(*rows, strict=True))
    )
)
def test_from_assignment_against_definitions(rows):
    clusters, labels = rows
    scores = clustering_scores_from_assignment(clusters, labels)
    assert math.isnan(scores.accuracy)
    right = sum(
        max(np.unique([t for c, t in zip(*rows, strict=True) if c == k], return_counts=True)[1])
        for k in set(clusters)
    )
    assert scores.accuracy_majority == pytest.approx(right / len(labels))
    assert scores.nmi == pytest.approx(entropy_nmi(clusters, labels), abs=1e-9)
    assert scores.ari == pytest.approx(pair_counting_ari(clusters, labels), abs=1e-9)
    assert scores.components_used == len(set(clusters))


def test_both_entrances_agree_on_the_paper_rule():
    rng = np.random.default_rng(0)
    r = rng.dirichlet(np.full(7, 0.3), size=200)
    truth = rng.integers(-3, 3, 200)
    # the rule, word by word
    hits = 0
    for i in range(200):
        c = int(np.argmax(r[i]))
        hits += truth[int(np.argmax(r[:, c]))] == truth[i]
    whole = clustering_scores(r, truth)
    streamed = clustering_scores_from_assignment(
        torch.tensor(r).argmax(1), torch.tensor(truth), torch.tensor(r).argmax(0)
    )
    assert whole.accuracy == streamed.accuracy == pytest.approx(hits / 200)


@pytest.mark.parametrize("clusters", [2, 3, 4, 5])
def test_one_to_one_is_the_best_of_all_pairings(clusters):
    rng = np.random.default_rng(clusters)
    found, truth = rng.integers(clusters, size=60), rng.integers(4, size=60)
    given = [*range(4), *["none"] * clusters]  # which label each cluster takes
    best = max(
        sum(pairing[c] == t for c, t in zip(found, truth, strict=True))
        for pairing in itertools.permutations(given, clusters)
    )
    scores = clustering_scores_from_assignment(found, truth)
    assert scores.accuracy_one_to_one == pytest.approx(best / 60)


def test_ordinary_extremes():
    one = clustering_scores(np.ones((1, 1)), ["only"])
    assert (one.accuracy, one.accuracy_majority, one.nmi, one.ari) == (1, 1, 1, 1)
    single = clustering_scores(np.ones((4, 1)), [5, 5, 9, 5])
    assert (single.accuracy, single.nmi, single.ari, single.components_used) == (0.75, 0, 0, 1)
    pruned = np.zeros((3, 5))
    pruned[:, 3] = 1
    assert clustering_scores(pruned, [1, 1, 1]).components_used == 1
    all_differ = clustering_scores_from_assignment(np.arange(50), np.arange(50) + 7)
    assert all_differ.ari == 1  # and scikit-learn's warning about many classes is not passed on


def test_active_components_hold_more_than_the_threshold():
    labels = np.repeat([0, 1, 2, 3], [1995, 2, 2, 1])
    scores = clustering_scores_from_assignment(labels, np.zeros(2000, dtype=bool))
    assert (scores.components_used, scores.components_active) == (4, 1)  # 2 of 2000 is 0.1 %
    labels = np.repeat([0, 1, 2], [991, 3, 6])
    assert clustering_scores_from_assignment(labels, labels).components_active == 3
    labels = np.repeat([0, 1], [998, 2])  # exactly 0.2 %
    assert clustering_scores_from_assignment(labels, labels).components_active == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "labels must hold at least one point"),
        (([1, 2], [1]), "true_labels must have as many points as labels, but has 1, not 2"),
        (([[1]], [1]), r"labels must have shape \[N\]"),
        (([1, 2], [1.0, math.nan]), "true_labels must not hold NaN"),
        (([1, 2], np.array(["a", None])), "true_labels must be of one sortable kind"),
        (([0, 1], [0, 1], [0.0, 1.0]), "representative must be integers"),
        (([0, 1], [0, 1], [0, 2]), "representative must be -1 or an index below N = 2"),
        (([0, 1], [0, 1], [0, -1]), "but is -1 for component 1"),
        (([0, 2], [0, 1], [0, 1]), r"labels must be integers in \[0, C\) with C = 2"),
        ((["a", "b"], [0, 1], [0, 1]), r"labels must be integers in \[0, C\)"),
    ],
)
def test_errors_of_assignment(arguments, message):
    with pytest.raises(ValueError, match=message):
        clustering_scores_from_assignment(*arguments)


@pytest.mark.parametrize(
    ("responsibilities", "message"),
    [
        (np.zeros((0, 3)), "responsibilities must hold at least one point"),
        (np.zeros(3), r"responsibilities must have shape \[N, C\]"),
        (np.zeros((3, 0)), r"responsibilities must have shape \[N, C\]"),
        (np.log(RESPONSIBILITIES + 0.1), "responsibilities must be probabilities"),
        (RESPONSIBILITIES * math.nan, "responsibilities must be probabilities"),
    ],
)
def test_errors_of_responsibilities(responsibilities, message):
    with pytest.raises(ValueError, match=message):
        clustering_scores(responsibilities, ["a"] * len(responsibilities))


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"vmm-fast\[cli\]"):
        clustering_scores(np.ones((1, 1)), [0])


# --- ELBO surgery ---


def random_posteriors(n, dim, kind, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    loc = 2 * torch.randn(n, dim, generator=g, dtype=dtype)
    if kind == "full":
        factor = torch.randn(n, dim, dim, generator=g, dtype=dtype).tril(-1)
        factor += torch.diag_embed(torch.rand(n, dim, generator=g, dtype=dtype) + 0.2)
        return lambda part: MultivariateNormal(loc[part], scale_tril=factor[part])
    scale = torch.rand(n, dim, generator=g, dtype=dtype) + 0.2
    if kind == "normal":
        return lambda part: Normal(loc[part], scale[part])
    return lambda part: Independent(Normal(loc[part], scale[part]), 1)


@pytest.mark.parametrize(
    ("kind", "chunk", "dtype", "tolerance"),
    [
        ("full", 8, torch.float64, 1e-12),
        ("full", 1024, torch.float32, 2e-5),
        ("normal", 1024, torch.float64, 1e-12),
        ("independent", 8, torch.float32, 2e-5),
    ],
)
def test_the_aggregated_posterior_as_prior_has_no_marginal_kl(kind, chunk, dtype, tolerance):
    """Sample by sample, log q(z) must equal torch's own mixture density: checks every density."""
    n, dim = 37, 3
    make = random_posteriors(n, dim, kind, dtype)
    base = make(slice(None))
    mixture = MixtureSameFamily(
        Categorical(torch.ones(n, dtype=dtype)),
        Independent(base, 1) if kind == "normal" else base,
    )
    batches = (make(slice(i, i + 10)) for i in range(0, n, 10))
    result = elbo_surgery(batches, mixture, chunk=chunk, generator=torch.Generator().manual_seed(1))
    assert abs(result.marginal_kl) < tolerance
    assert result.average_kl == pytest.approx(result.mutual_information, abs=tolerance)
    assert 0 < result.mutual_information < result.log_num_data == math.log(n)


@pytest.mark.parametrize("full", [False, True])
def test_equal_standard_normal_posteriors(full):
    loc, eye = torch.zeros(300, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    q = MultivariateNormal(loc, scale_tril=eye) if full else Normal(loc, torch.ones_like(loc))
    standard = MultivariateNormal(loc[0], eye)
    result = elbo_surgery([q], standard, num_samples=100, chunk=64)
    assert result[:3] == pytest.approx((0, 0, 0), abs=1e-12)


def test_separate_posteriors_reveal_the_point():
    n = 50
    loc = 100 * torch.arange(n, dtype=torch.float64)[:, None].expand(n, 2)
    result = elbo_surgery([Normal(loc, 0.1)], lambda z: -z.square().sum(-1), chunk=7)
    assert result.mutual_information == pytest.approx(math.log(n), abs=1e-9)
    assert result.log_num_data == math.log(n)


def test_average_kl_is_the_exact_one_of_both_parts():
    n = 2000
    q = random_posteriors(n, 2, "full")(slice(None))
    prior = MultivariateNormal(torch.full((2,), 0.5).double(), 4 * torch.eye(2).double())
    exact = kl_divergence(q, prior)
    torch.manual_seed(0)
    z = q.sample()
    spread = (q.log_prob(z) - prior.log_prob(z)).std().item()
    result = elbo_surgery([q], prior, chunk=500, generator=torch.Generator().manual_seed(0))
    assert abs(result.average_kl - exact.mean().item()) < 4 * spread / math.sqrt(n)
    assert result.average_kl == result.mutual_information + result.marginal_kl
    assert 0 < result.marginal_kl < result.average_kl


def test_the_generator_repeats_the_result():
    q = random_posteriors(40, 2, "full")(slice(None))
    prior = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())

    def result(seed):
        generator = torch.Generator().manual_seed(seed)
        return elbo_surgery([q], prior, num_samples=20, generator=generator)

    assert result(3) == result(3) != result(4)


def test_memory_is_linear_in_the_number_of_points(monkeypatch):
    n, samples, dim, chunk = 1000, 700, 2, 50
    pairs = []
    operation = metrics.mixture_log_prob

    def counted(z, centers, whitening, offsets):
        assert len(z) <= chunk and len(centers) <= chunk
        pairs.append(len(z) * len(centers))
        return operation(z, centers, whitening, offsets)

    monkeypatch.setattr(metrics, "mixture_log_prob", counted)
    make = random_posteriors(n, dim, "full", torch.float32)
    prior = MultivariateNormal(torch.zeros(dim), torch.eye(dim))
    elbo_surgery([make(slice(None))], prior, num_samples=samples, chunk=chunk)
    assert sum(pairs) == n * samples  # every pair, each once


ONE = Normal(torch.zeros(2, 1), 1.0)


def total(z):
    return z.sum(-1)


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        ([], {}, ValueError, "q_batches must hold at least one posterior"),
        ([Laplace(torch.zeros(2, 1), 1.0)], {}, TypeError, "q_batches: q must be a torch.distrib"),
        (ONE, {}, TypeError, "wrap it in a list"),
        ([Normal(torch.zeros(2), 1.0)], {}, ValueError, r"q_batches: q must have a mean of shape"),
        ([ONE, Normal(torch.zeros(2, 3), 1.0)], {}, ValueError, r"but has \[2, 3\] after \[2, 1\]"),
        ([ONE, MultivariateNormal(torch.zeros(2, 1), torch.eye(1))], {}, TypeError, "but are both"),
        (
            [Normal(torch.full((2, 1), math.nan), 1.0, validate_args=False)],
            {},
            ValueError,
            "q_batches must have finite means",
        ),
        ([ONE], {"num_samples": 0}, ValueError, "num_samples must be"),
        ([ONE], {"chunk": 1.5}, ValueError, "chunk must be"),
        (
            [ONE],
            {"prior": Normal(0.0, 1.0)},
            ValueError,
            r"prior must return shape \[2\], but returned \[2, 1\]",
        ),
    ],
)
def test_errors_of_surgery(batches, options, error, message):
    with pytest.raises(error, match=message):
        elbo_surgery(batches, **{"prior": total, **options})


# --- importance weighting: probabilistic PCA, whose log p(x) and posterior are exact ---


class PPCA(torch.nn.Module):
    """z ~ N(0, I_2), x | z ~ N(W z + b, 0.3^2 I_4); q(z|x) is the posterior with a wider scale."""

    def __init__(self, widen=1.0):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = torch.randn(4, 2, generator=g, dtype=torch.float64)
        self.bias = torch.randn(4, generator=g, dtype=torch.float64)
        self.covariance = torch.linalg.inv(
            torch.eye(2, dtype=torch.float64) + self.weight.T @ self.weight / 0.09
        )
        self.widen = widen
        self.frozen = torch.nn.Linear(1, 1).eval()
        self.sizes = []

    def exact(self, x):
        marginal = self.weight @ self.weight.T + 0.09 * torch.eye(4, dtype=torch.float64)
        return torch.tensor(stats.multivariate_normal(self.bias, marginal).logpdf(x)).reshape(-1)

    def encode(self, x):
        assert not self.training
        mean = (x - self.bias) @ self.weight @ self.covariance / 0.09
        return MultivariateNormal(mean, self.covariance * self.widen**2)

    def log_likelihood(self, x, z):
        assert x.shape[:-1] == z.shape[:-1]
        self.sizes.append(len(z))
        return Independent(Normal(z @ self.weight.T + self.bias, 0.3), 1).log_prob(x)

    def components(self, encoder):
        return MultivariateNormal(
            torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
        )

    @property
    def prior(self):
        return self

    def gap(self):
        """KL(q || posterior) in nats: two dimensions, each (w^2 - 1)/2 - log w."""
        return 2 * ((self.widen**2 - 1) / 2 - math.log(self.widen))


def bound(model, x, num_samples, chunk):
    return importance_weighted_log_likelihood(
        lambda z: model.log_likelihood(x.expand(*z.shape[:-1], 4), z),
        model.encode(x),
        model.components(None).log_prob,
        num_samples,
        chunk,
    )


def test_the_exact_posterior_gives_the_exact_likelihood():
    """All weights are equal then: no Monte Carlo error, whatever the number of samples."""
    model = PPCA().eval()
    far = torch.full((2, 4), 1e6, dtype=torch.float64)  # where exp would overflow
    x = torch.cat([3 * torch.randn(5, 4, dtype=torch.float64), far])
    for num_samples, chunk in [(1, 64), (7, 3), (8, 4), (5, 1)]:
        found, exact = bound(model, x, num_samples, chunk), model.exact(x)
        torch.testing.assert_close(found[:5], exact[:5])
        torch.testing.assert_close(found[5:], exact[5:], rtol=1e-6, atol=0)


def test_the_bound_rises_from_the_elbo_to_the_likelihood():
    model = PPCA(widen=2.0).eval()
    torch.manual_seed(0)
    x = torch.tensor([[1.0, -2.0, 0.5, 0.0]], dtype=torch.float64)
    many = x.expand(4000, 4)
    exact = model.exact(x).item()
    estimates = [bound(model, many, s, 4) for s in (1, 4, 16, 64)]
    means = [e.mean().item() for e in estimates]
    errors = [e.std().item() / math.sqrt(len(e)) for e in estimates]
    assert abs(means[0] - (exact - model.gap())) < 4 * errors[0]  # S = 1 is the ELBO
    assert means == sorted(means)
    assert means[-1] < exact + 4 * errors[-1]
    assert means[-1] == pytest.approx(exact, abs=0.03)


def test_a_model_is_evaluated_in_pieces_and_gets_its_mode_back():
    model = PPCA().train()
    model.frozen.eval()
    x = torch.randn(11, 4, dtype=torch.float64)
    value = importance_weighted_log_prob(model, x, num_samples=7, chunk=3, batch_size=4)
    torch.testing.assert_close(value, model.exact(x))
    assert sum(model.sizes) == 11 * 7
    assert max(model.sizes) == 3 * 4
    assert model.training and not model.frozen.training
    assert importance_weighted_log_prob(model, x[:0]).shape == (0,)


def test_normal_posterior_without_independent():
    q = Normal(torch.zeros(3, 2, dtype=torch.float64), 1.0)
    standard = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    # p(x|z) = 1/2 for all z, q = p: log p(x) = -log 2
    value = importance_weighted_log_likelihood(
        lambda z: z.new_full(z.shape[:-1], -math.log(2)), q, standard.log_prob, 5
    )
    torch.testing.assert_close(value, torch.full((3,), -math.log(2), dtype=torch.float64))


THREE = Normal(torch.zeros(3, 2), 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((total, THREE, total, 0), "num_samples must be an integer of at least 1, but is 0"),
        ((total, THREE, total, 1, 0), "chunk must be"),
        ((lambda z: z, THREE, total, 1), "log_likelihood_fn must return shape"),
        ((total, THREE, lambda z: z.sum(), 1), "log_prior_fn must return shape"),
        ((total, Normal(torch.zeros(3), 1.0), total, 1), r"q must have batch shape \[B\]"),
    ],
)
def test_errors_of_importance_weighting(arguments, message):
    with pytest.raises(ValueError, match=message):
        importance_weighted_log_likelihood(*arguments)


def test_errors_of_importance_weighting_of_a_model():
    with pytest.raises(ValueError, match="batch_size must be"):
        importance_weighted_log_prob(PPCA(), torch.zeros(1, 4).double(), batch_size=0)
