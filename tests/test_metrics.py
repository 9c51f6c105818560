"""Scores, ELBO surgery and the importance-weighted bound against hand-made and exact cases."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch.distributions import (
    Categorical,
    Independent,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_hand_made_case(kind):
    scores = clustering_scores(kind(RESPONSIBILITIES), LABELS)
    assert scores.accuracy == pytest.approx(4 / 6)  # component 0 takes "b": right at 2, 3, 4, 5
    assert scores.accuracy_majority == pytest.approx(5 / 6)
    assert scores.components_used == 3
    assert scores.components_active == 3
    assert scores.nmi == pytest.approx(entropy_nmi([0, 0, 0, 1, 1, 3], LABELS))
    assert scores.ari == pytest.approx(pair_counting_ari([0, 0, 0, 1, 1, 3], LABELS))
    # merged: component 0 and 3 are both "a" by majority
    assert scores.nmi_merged == pytest.approx(entropy_nmi([0, 0, 0, 1, 1, 0], LABELS))
    assert scores.ari_merged == pytest.approx(pair_counting_ari([0, 0, 0, 1, 1, 0], LABELS))
    assert scores.nmi_merged != pytest.approx(scores.nmi)
    assert list(scores.as_dict()) == [
        "accuracy",
        "accuracy_majority",
        "nmi",
        "ari",
        "ami",
        "nmi_merged",
        "ari_merged",
        "components_used",
        "components_active",
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_gradients(dtype):
    r = torch.tensor(RESPONSIBILITIES).to(dtype).requires_grad_()
    assert clustering_scores(r, LABELS).accuracy == pytest.approx(4 / 6)


def test_ami_is_the_chance_corrected_mutual_information():
    """(MI - E[MI]) / (mean entropy - E[MI]), expected over all permutations of the labels."""
    x, y = [0, 0, 1, 1, 1, 2], [0, 0, 0, 1, 1, 1]

    def information(a, b):
        nmi = entropy_nmi(a, b)
        return nmi * sum(stats.entropy(np.bincount(v)[np.bincount(v) > 0]) for v in (a, b)) / 2

    expected = np.mean([information(x, p) for p in itertools.permutations(y)])
    mean_entropy = information(x, x) / 2 + information(y, y) / 2
    ami = (information(x, y) - expected) / (mean_entropy - expected)
    scores = clustering_scores_from_assignment(x, y)
    assert scores.ami == pytest.approx(ami)
    assert scores.ami != pytest.approx(scores.ari, abs=1e-3)


@settings(max_examples=60, deadline=None)
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
        (([1, 2], [1]), "true_labels must have as many points as labels, got 1 and 2"),
        (([[1]], [1]), r"labels must have shape \[N\]"),
        (([1, 2], [1.0, math.nan]), "true_labels must not hold NaN"),
        (([1, 2], np.array(["a", None])), "true_labels must be of one sortable kind"),
        (([0, 1], [0, 1], [0.0, 1.0]), "representative must be integers"),
        (([0, 1], [0, 1], [0, 2]), "representative must be -1 or an index below N = 2"),
        (([0, 1], [0, 1], [0, -1]), "got -1 for component 1"),
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


@pytest.mark.parametrize("kind", ["full", "normal", "independent"])
@pytest.mark.parametrize("chunk", [8, 1024])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
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


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_equal_standard_normal_posteriors(kind):
    loc = torch.zeros(300, 4, dtype=torch.float64)
    if kind == "full":
        q = MultivariateNormal(loc, scale_tril=torch.eye(4, dtype=torch.float64))
    else:
        q = Normal(loc, torch.ones_like(loc))
    standard = MultivariateNormal(loc[0], torch.eye(4, dtype=torch.float64))
    result = elbo_surgery([q], standard, num_samples=100, chunk=64)
    assert result[:3] == pytest.approx((0, 0, 0), abs=1e-12)


def test_separate_posteriors_reveal_the_point():
    n = 50
    loc = 100 * torch.arange(n, dtype=torch.float64)[:, None].expand(n, 2)
    result = elbo_surgery([Normal(loc, 0.1)], lambda z: -z.square().sum(-1), chunk=7)
    assert result.mutual_information == pytest.approx(math.log(n), abs=1e-9)
    assert result.log_num_data == math.log(n)


def test_against_quadrature():
    """Three kinds of posterior, each held by a third of the points."""
    loc, scale = np.array([-1.0, 0.3, 2.0]), np.array([0.5, 1.0, 0.3])
    copies = 700

    def q(z):
        return stats.norm.pdf(z, loc, scale).mean()

    def moments(log_ratio):
        """Mean and variance of a log ratio under a random posterior."""

        def moment(m, s, power):
            return integrate.quad(
                lambda z: stats.norm.pdf(z, m, s) * log_ratio(z, m, s) ** power,
                m - 12 * s,
                m + 12 * s,
                limit=200,
            )[0]

        first, second = (
            np.mean([moment(m, s, power) for m, s in zip(loc, scale, strict=True)])
            for power in (1, 2)
        )
        return first, second - first**2

    information = moments(lambda z, m, s: stats.norm.logpdf(z, m, s) - math.log(q(z)))
    marginal = moments(lambda z, m, s: math.log(q(z)) - stats.norm.logpdf(z, 0.5, 2))
    # the identity holds for the exact values too: the oracle is sound
    kl = np.log(2 / scale) + (scale**2 + (loc - 0.5) ** 2) / 8 - 0.5
    assert information[0] + marginal[0] == pytest.approx(kl.mean(), abs=1e-6)

    batches = [
        Normal(torch.full((copies, 1), m), torch.full((copies, 1), s))
        for m, s in zip(loc, scale, strict=True)
    ]
    prior = MultivariateNormal(torch.tensor([0.5]), torch.tensor([[4.0]]))
    generator = torch.Generator().manual_seed(0)
    result = elbo_surgery(batches, prior, generator=generator, chunk=500)
    n = 3 * copies
    for value, (mean, variance) in [
        (result.mutual_information, information),
        (result.marginal_kl, marginal),
    ]:
        assert abs(value - mean) < 4 * math.sqrt(variance / n)
    assert result.average_kl == result.mutual_information + result.marginal_kl


def test_the_generator_repeats_the_result():
    make = random_posteriors(40, 2, "full")
    prior = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    results = [
        elbo_surgery(
            [make(slice(None))],
            prior,
            num_samples=20,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (3, 3, 4)
    ]
    assert results[0] == results[1] != results[2]


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.calls += 1
                self.largest = max(self.largest, value.numel())
        return result


def test_memory_is_linear_in_the_number_of_points(monkeypatch):
    n, samples, dim, chunk = 6000, 3000, 2, 100
    pairs = []
    operation = metrics.mixture_log_prob

    def counted(z, centers, whitening, offsets):
        assert len(z) <= chunk and len(centers) <= chunk
        pairs.append(len(z) * len(centers))
        return operation(z, centers, whitening, offsets)

    monkeypatch.setattr(metrics, "mixture_log_prob", counted)
    make = random_posteriors(n, dim, "full", torch.float32)
    prior = MultivariateNormal(torch.zeros(dim), torch.eye(dim))
    with LargestTensor() as record:
        elbo_surgery([make(slice(None))], prior, num_samples=samples, chunk=chunk)
    assert sum(pairs) == n * samples  # every pair, each once
    assert record.calls > 100
    assert record.largest <= max(n * dim * dim, chunk * chunk * dim)


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        ([], {}, ValueError, "q_batches must hold at least one posterior"),
        (
            [Laplace(torch.zeros(2, 1), 1.0)],
            {},
            TypeError,
            "q_batches: q must be a torch.distributions Normal",
        ),
        (Normal(torch.zeros(2, 1), 1.0), {}, TypeError, "wrap it in a list"),
        ([Normal(torch.zeros(2), 1.0)], {}, ValueError, r"q_batches: q must have a mean of shape"),
        (
            [Normal(torch.zeros(2, 1), 1.0), Normal(torch.zeros(2, 3), 1.0)],
            {},
            ValueError,
            r"got \[2, 3\] after \[2, 1\]",
        ),
        (
            [
                Normal(torch.zeros(2, 1), 1.0),
                MultivariateNormal(torch.zeros(2, 1), torch.eye(1)),
            ],
            {},
            TypeError,
            "got both",
        ),
        (
            [Normal(torch.full((2, 1), math.nan), 1.0, validate_args=False)],
            {},
            ValueError,
            "q_batches must have finite means",
        ),
        ([Normal(torch.zeros(2, 1), 1.0)], {"num_samples": 0}, ValueError, "num_samples must be"),
        ([Normal(torch.zeros(2, 1), 1.0)], {"chunk": 1.5}, ValueError, "chunk must be"),
    ],
)
def test_errors_of_surgery(batches, options, error, message):
    with pytest.raises(error, match=message):
        elbo_surgery(batches, lambda z: z.sum(-1), **options)


def test_a_prior_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"prior must return shape \[2\], got \[2, 1\]"):
        elbo_surgery([Normal(torch.zeros(2, 1), 1.0)], Normal(0.0, 1.0))


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
    x = torch.randn(5, 4, dtype=torch.float64) * 3
    for num_samples, chunk in [(1, 64), (7, 3), (8, 4), (5, 1)]:
        torch.testing.assert_close(bound(model, x, num_samples, chunk), model.exact(x))


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


def test_far_tails_do_not_overflow():
    model = PPCA().eval()
    x = torch.full((2, 4), 1e6, dtype=torch.float64)
    torch.testing.assert_close(bound(model, x, 3, 2), model.exact(x), rtol=1e-6, atol=0)


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


def test_errors_of_importance_weighting():
    q = Normal(torch.zeros(3, 2), 1.0)

    def right(z):
        return z.sum(-1)

    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1, got 0"):
        importance_weighted_log_likelihood(right, q, right, 0)
    with pytest.raises(ValueError, match="chunk must be"):
        importance_weighted_log_likelihood(right, q, right, 1, 0)
    with pytest.raises(ValueError, match="log_likelihood_fn must return shape"):
        importance_weighted_log_likelihood(lambda z: z, q, right, 1)
    with pytest.raises(ValueError, match="log_prior_fn must return shape"):
        importance_weighted_log_likelihood(right, q, lambda z: z.sum(), 1)
    with pytest.raises(ValueError, match=r"q must have batch shape \[B\]"):
        importance_weighted_log_likelihood(right, Normal(torch.zeros(3), 1.0), right, 1)
    with pytest.raises(ValueError, match="batch_size must be"):
        importance_weighted_log_prob(PPCA(), torch.zeros(1, 4).double(), batch_size=0)
