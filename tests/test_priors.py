"""The priors' interface, gradients, empirical-Bayes steps, state and errors."""

import copy
import itertools
import math
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import torch
from scipy.special import gammaln
from support import mutated
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence
from torch.nn.functional import softplus

from vmm_fast import Components, GaussianMixturePrior, StandardNormalPrior, VampPrior, VMMPrior
from vmm_fast.inference import closed_form

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
INPUTS, D = 6, 3


class Encoder(nn.Module):
    """A linear encoder with a full, diagonal or plain-Normal posterior."""

    def __init__(self, kind="full", dtype=torch.float64):
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(INPUTS, D + D * D, dtype=dtype)

    def forward(self, x):
        h = self.linear(x)
        mean, rest = h[:, :D], h[:, D:].unflatten(1, (D, D))
        diagonal = softplus(rest.diagonal(dim1=-2, dim2=-1)) + 0.1
        if self.kind == "full":
            return MultivariateNormal(mean, scale_tril=rest.tril(-1) + torch.diag_embed(diagonal))
        normal = Normal(mean, diagonal)
        return normal if self.kind == "normal" else Independent(normal, 1)


class Counted:
    """An encoder that counts its calls."""

    def __init__(self, encoder):
        self.encoder, self.calls = encoder, 0

    def __call__(self, x):
        self.calls += 1
        return self.encoder(x)


class Generator(nn.Module):
    """A module that generates pseudo-inputs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, INPUTS, dtype=torch.float64)

    def forward(self):
        return self.linear(torch.linspace(-1, 1, 16, dtype=torch.float64).view(8, 2))


class Given(nn.Module):
    """A module whose parameter is the pseudo-inputs."""

    def __init__(self):
        super().__init__()
        self.inputs = nn.Parameter(inputs(8))

    def forward(self):
        return self.inputs


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(n=40, dtype=torch.float64):
    return torch.randn(n, INPUTS, dtype=dtype)


def perturb(prior):
    """Change the parameters so that components differ."""
    with torch.no_grad():
        prior.logits.copy_(torch.randn_like(prior.logits))
        lower = 0.3 * torch.randn_like(prior.raw_precision).tril()
        lower.diagonal(dim1=-2, dim2=-1).abs_().add_(0.5)
        prior.precision_cholesky = lower
        prior.concentration = 1.7
    return prior


def vmm(count=8, **settings):
    return perturb(VMMPrior(inputs(count), D, **settings))


def gmm(**settings):
    centers = torch.randn(4, D, dtype=torch.float64)
    return perturb(GaussianMixturePrior(4, D, centers=centers, **settings))


def vamp(**settings):
    return VampPrior(inputs(5), D, **settings)


LEARNT = {
    "vmm": vmm,
    "vmm, closed form": lambda: vmm(inference="closed-form"),
    "vmm, two a component": lambda: vmm(pseudo_inputs_per_component=2),
    "gmm": gmm,
    "gmm, closed form": lambda: gmm(inference="closed-form"),
    "vamp": vamp,
}
PRIORS = LEARNT | {"normal": lambda: StandardNormalPrior(D).double()}


def state_of(prior):
    """Return parameters and buffers by name, as they are now."""
    state = prior.state_dict().items()
    return {name: value.clone() for name, value in state if name != "_extra_state"}


def same_state(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


# --- values and gradients against plain torch ---


def plain_kl(prior, q, z, encoder, factor):
    """Return a KL estimate from torch.distributions alone, with everything in the graph."""
    posterior = encoder(prior.pseudo_inputs)
    full = isinstance(posterior, MultivariateNormal)
    normal = posterior if full else getattr(posterior, "base_dist", posterior)
    mean = posterior.loc if full else normal.loc
    s = posterior.scale_tril if full else torch.diag_embed(normal.scale)
    k = prior.pseudo_inputs_per_component
    inverse = torch.linalg.inv(factor @ factor.mT).repeat_interleave(k, 0)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=prior.logits.repeat_interleave(k)),
        MultivariateNormal(mean, covariance_matrix=inverse + s @ s.mT),
    )
    entropy = q.entropy()
    return -(entropy if entropy.ndim == 1 else entropy.sum(-1)) - mixture.log_prob(z)


@pytest.mark.parametrize(
    ("kind", "joint", "k"),
    [
        ("full", False, 2),
        ("full", True, 1),
        ("diagonal", False, 1),
        ("diagonal", True, 2),
        ("normal", False, 1),
        ("normal", True, 2),
    ],
)
def test_kl_value_and_gradients(kind, joint, k):
    """Without ``joint`` the prior's own parameters get none."""
    encoder = Encoder(kind)
    prior = vmm(pseudo_inputs_per_component=k, joint=joint)
    q = encoder(inputs())
    z = q.rsample()
    both = prior.kl(q, encoder, z), plain_kl(prior, q, z, encoder, prior.precision_cholesky)
    torch.testing.assert_close(*both, **TIGHT)
    weights = torch.linspace(0.5, 2, len(z), dtype=z.dtype)

    def gradients(leaves):
        return [
            torch.autograd.grad(x @ weights, leaves, retain_graph=True, allow_unused=True)
            for x in both
        ]

    torch.testing.assert_close(*gradients(list(encoder.parameters())), **TIGHT)
    ours, theirs = gradients([prior.pseudo_inputs, prior.logits, prior.raw_precision])
    if joint:
        torch.testing.assert_close(ours, theirs, **TIGHT)
    else:
        assert ours == (None, None, None)


@pytest.mark.parametrize("rule", [True, False])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_map_loss_gradients_of_both_rules(kind, rule):
    """A gradient of l_ij weighs q (1 + l - sum q l), or q where responsibilities have none."""
    encoder = Encoder(kind)
    prior = vmm(responsibility_gradient=rule, map_prior="none", joint=True)
    z = encoder(inputs()).sample().requires_grad_()
    joint = prior.log_joint(z, encoder)
    value, q = joint.detach(), joint.detach().softmax(-1)
    w = q * (1 + value - (q * value).sum(-1, keepdim=True)) if rule else q
    loss = prior.map_loss(z, encoder)
    torch.testing.assert_close(loss.detach(), -(q * value).sum(-1).mean(), **TIGHT)
    leaves = [z, prior.pseudo_inputs, prior.logits, prior.raw_precision, *encoder.parameters()]
    ours, theirs = (torch.autograd.grad(x, leaves) for x in (loss, -(w * joint).sum(-1).mean()))
    torch.testing.assert_close(ours, theirs, **TIGHT)


@pytest.mark.parametrize("name", PRIORS)
def test_one_interface(name):
    """Every prior: shapes, consistency of the methods with each other and with components()."""
    prior, encoder = PRIORS[name](), Encoder()
    c = prior.num_components
    q = encoder(inputs(7))
    z = q.sample()
    components = prior.components(encoder)
    assert isinstance(components, Components)
    torch.testing.assert_close(prior.kl(q, encoder, z), components.kl(q, z))
    torch.testing.assert_close(prior.log_prob(z, encoder), components.log_prob(z))
    joint = prior.log_joint(z, encoder)
    assert joint.shape == (7, c)
    torch.testing.assert_close(prior.responsibilities(z, encoder), joint.softmax(-1))
    torch.testing.assert_close(components.log_joint(z), joint)
    labels, probability, entropy = prior.assign(z, encoder)
    assert torch.equal(labels, joint.argmax(-1))
    torch.testing.assert_close(probability, joint.softmax(-1).amax(-1))
    expected = torch.distributions.Categorical(logits=joint).entropy()
    torch.testing.assert_close(entropy, expected, rtol=1e-6, atol=1e-9)
    assert prior.kl(q, encoder).shape == (7,)
    for component in (None, c - 1, torch.arange(9) % c):
        assert prior.sample(9, encoder, component=component).shape == (9, D)
    torch.testing.assert_close(prior.distribution(encoder).log_prob(z), prior.log_prob(z, encoder))
    assert set(prior.active_components(z, encoder, threshold=0).tolist()) == set(labels.tolist())
    prior.update(z, encoder)
    with torch.inference_mode():
        prior.update(encoder(inputs(7)), encoder)
    # torch's MultivariateNormal cannot check an empty batch.
    assert prior.kl(Encoder("diagonal")(inputs(0)), encoder).shape == (0,)


@pytest.mark.parametrize("make", [vmm, gmm, vamp])
def test_kl_gives_the_prior_a_gradient_where_training_is_joint_alone(make):
    for joint in (False, True):
        encoder, prior = Encoder(), make(joint=joint)
        prior.kl(encoder(inputs()), encoder).sum().backward()
        names = {name for name, p in prior.named_parameters() if p.grad is not None}
        learnt = {"pseudo_inputs", "centers", "logits", "raw_precision"}
        assert names == (learnt & dict(prior.named_parameters()).keys() if joint else set())


def test_vamp_is_a_mixture_of_posteriors():
    encoder, prior = Encoder(), vamp()
    z = torch.randn(9, D, dtype=torch.float64)
    posteriors = encoder(prior.pseudo_inputs)
    expected = posteriors.log_prob(z[:, None]).logsumexp(-1) - math.log(5)
    torch.testing.assert_close(prior.log_prob(z, encoder), expected, **TIGHT)
    # VMMPrior with one component approaches it as the precision grows.
    limit = VMMPrior(prior.pseudo_inputs, D, 5)
    limit.precision_cholesky = 1e6 * torch.eye(D, dtype=torch.float64)[None]
    torch.testing.assert_close(limit.log_prob(z, encoder), expected, rtol=1e-6, atol=1e-6)
    loss = prior.map_loss(z, encoder)
    torch.testing.assert_close(loss, -expected.mean(), **TIGHT)
    for _ in range(50):
        prior.update(z, encoder)
    assert prior.map_loss(z, encoder) < loss


@pytest.mark.parametrize("kind", ["full", "diagonal", "normal"])
def test_standard_normal_kl_is_exact(kind):
    prior, q = StandardNormalPrior(D).double(), Encoder(kind)(inputs())
    standard = MultivariateNormal(torch.zeros(D).double(), torch.eye(D).double())
    scale = q.scale_tril if kind == "full" else torch.diag_embed(q.stddev)
    posterior = MultivariateNormal(q.mean, scale_tril=scale)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(prior.kl(q), kl_divergence(posterior, standard), **exact)
    z = q.rsample()
    estimate = -posterior.entropy() - standard.log_prob(z)
    torch.testing.assert_close(prior.kl(q, z=z), estimate, **exact)
    assert not prior.state_dict()


@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
@pytest.mark.parametrize("module", [Generator, Given])
def test_pseudo_inputs_from_a_module(module, inference):
    """The variational step gives its parameters no gradient, the empirical-Bayes step moves it."""
    encoder, prior = Encoder(), VMMPrior(module(), D, inference=inference)
    assert prior.num_components == 8
    before = copy.deepcopy(prior.pseudo_inputs)
    prior.kl(encoder(inputs()), encoder).sum().backward()
    assert all(p.grad is None for p in prior.parameters())
    assert all(p.grad is not None for p in encoder.parameters())
    prior.update(encoder(inputs()), encoder)
    for p, old in zip(prior.pseudo_inputs.parameters(), before.parameters(), strict=True):
        assert not torch.equal(p, old)


# --- the empirical-Bayes steps ---


@pytest.mark.parametrize(
    "settings",
    [
        {"inference": "gradient"},
        {"inference": "closed-form"},
        {"inference": "gradient", "weights": "stick-breaking", "discount": 0.2},
        {"inference": "closed-form", "weights": "stick-breaking"},
        {"inference": "gradient", "map_prior": "none"},
        {"inference": "closed-form", "map_prior": "none"},
        {"inference": "closed-form", "map_prior": "fixed"},
        {"inference": "closed-form", "pseudo_inputs_per_component": 2},
    ],
)
def test_update_moves_the_prior_and_nothing_else(settings):
    encoder, x = Encoder(), inputs(8)
    given = x.clone()
    prior = perturb(VMMPrior(x, D, data_size=200, learning_rate=1e-2, **settings))
    optimizer = torch.optim.Adam([*encoder.parameters(), *prior.parameters()])
    z = 2 * torch.randn(200, D, dtype=torch.float64)
    kept, network, first = z.clone(), copy.deepcopy(encoder).state_dict(), state_of(prior)
    before, gamma = prior.map_loss(z, encoder).item(), prior.concentration.item()
    with torch.no_grad():  # an update works where the caller has switched gradients off
        prior.update(z, encoder)
    for _ in range(60):
        prior.update(z, encoder)
    assert prior.map_loss(z, encoder).item() < before
    assert torch.equal(z, kept) and torch.equal(x, given)
    assert same_state(network, encoder.state_dict())
    assert all(p.grad is None for p in (*encoder.parameters(), *prior.parameters()))
    assert (prior.concentration.item() != gamma) == (prior.options.map_prior == "learnt")
    state = state_of(prior)
    for name in ("pseudo_inputs", "logits", "raw_precision"):
        assert not torch.equal(state[name], first[name]), name
    optimizer.zero_grad()
    prior.kl(encoder(inputs()), encoder).mean().backward()
    optimizer.step()  # one optimizer over everything leaves the prior alone
    assert same_state(state, state_of(prior))


def test_first_gradient_step_is_adams():
    """Adam's first step is learning_rate times the gradient's sign, where that is not tiny."""
    encoder, prior = Encoder(), vmm(learning_rate=1e-2)
    z, before = encoder(inputs()).sample(), state_of(prior)
    gradients = torch.autograd.grad(prior.map_loss(z, encoder), list(prior.parameters()))
    prior.update(z, encoder)
    for (name, p), g in zip(prior.named_parameters(), gradients, strict=True):
        moved, step = g.abs() > 1e-4, (p - before[name]).detach()
        assert moved.any()
        torch.testing.assert_close(step[moved], -1e-2 * g.sign()[moved], rtol=2e-3, atol=0)


@pytest.mark.parametrize("make", [vmm, gmm, vamp])
def test_update_does_nothing_in_joint_training(make):
    encoder, prior = Encoder(), make(joint=True)
    before = state_of(prior)
    prior.update(encoder(inputs()), encoder)
    assert same_state(before, state_of(prior))


def test_update_refuses_an_encoder_that_diverged():
    encoder, prior = Encoder(), vmm()
    before = state_of(prior)
    with torch.no_grad():
        encoder.linear.weight.mul_(1e200)
    with pytest.raises(ValueError, match="no positive-definite"):
        prior.update(torch.randn(9, D, dtype=torch.float64), encoder)
    assert same_state(before, state_of(prior))


@pytest.mark.parametrize("map_prior", ["none", "fixed"])
@pytest.mark.parametrize("k", [None, 1, 2])
def test_fit_never_loses_and_ends_at_a_stationary_point(k, map_prior):
    """Exact EM raises its objective, and at its end the objective's gradient is zero.

    With free centers (k is None), or around k posteriors for each component.
    """
    torch.manual_seed(2)
    means = torch.tensor([[4.0, 0, 0], [-4, 0, 0], [0, 5, 0]], dtype=torch.float64)
    z = (means[:, None] + torch.randn(3, 60, D, dtype=torch.float64)).flatten(0, 1)
    settings = {"data_size": len(z), "responsibility_gradient": False, "map_prior": map_prior}
    prior = GaussianMixturePrior(3, D, centers=z[[0, 60, 120]], **settings)
    parameters, encoder = [prior.centers], None
    if k:
        around = means.repeat_interleave(k, 0) + 0.3 * torch.randn(3 * k, D).double()
        posteriors = Normal(around, 0.2 + torch.rand(3 * k, D).double())
        prior, parameters = VMMPrior(inputs(3 * k), D, k, **settings), []

        def encoder(x):
            return posteriors

    history = prior.fit(z, encoder, max_iterations=300, tolerance=1e-13)
    assert history[-1] > history[0] + 0.1
    assert min(b - a for a, b in itertools.pairwise(history)) > -1e-10
    parameters += [prior.logits, prior.raw_precision]
    loss = prior.map_loss(z, encoder)
    lse, expected = prior.components(encoder).log_joint_expectation(z)
    assert history[-1] == pytest.approx(((lse - expected).mean() - loss).item(), abs=1e-9)
    for gradient in torch.autograd.grad(loss, parameters):
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize(
    "counts", [[70.0, 20, 9, 1, 0], [20.0, 20, 20, 20, 21], [1000.0, 0, 0, 0, 0]]
)
def test_closed_form_concentration(counts):
    """Against scipy's bounded minimiser on the Dirichlet-multinomial likelihood."""
    counts = np.array(counts)

    def loss(t):
        gamma = np.exp(t)
        a = gamma / len(counts)
        of_all = gammaln(gamma) - gammaln(counts.sum() + gamma)
        return 1 / gamma - of_all - (gammaln(counts + a) - gammaln(a)).sum()

    best = scipy.optimize.minimize_scalar(
        loss, bounds=np.log([1e-6, 1e6]), method="bounded", options={"xatol": 1e-9}
    )
    actual = closed_form.maximise_concentration(torch.tensor(counts))
    assert loss(np.log(actual)) <= best.fun + 1e-9 * abs(best.fun)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_anisotropic_points_do_not_freeze_the_precision(dtype):
    """With the Wishart prior every scatter has a maximiser, however unequal its directions."""
    z = (torch.randn(400, D, dtype=torch.float64) * torch.tensor([1e-4, 1.0, 1e4])).to(dtype)
    prior = GaussianMixturePrior(1, D, centers=torch.zeros(1, D, dtype=dtype))
    prior.fit(z, max_iterations=50)
    d = z.double() - prior.centers.double()
    inverse_scale = (D + 2) * torch.eye(D, dtype=torch.float64)
    expected = 401 * torch.linalg.inv(inverse_scale + d.mT @ d)
    factor = prior.precision_cholesky.double()
    torch.testing.assert_close(
        (factor @ factor.mT).diagonal(dim1=-2, dim2=-1)[0], expected.diagonal(), rtol=1e-2, atol=0
    )


def test_fit_in_batches_is_fit_at_once():
    z = torch.randn(100, D, dtype=torch.float64)
    whole, parts = (GaussianMixturePrior(3, D, centers=z[:3]) for _ in range(2))
    torch.testing.assert_close(
        whole.fit(z, max_iterations=5), parts.fit(list(z.split(33)), max_iterations=5)
    )
    torch.testing.assert_close(whole.precision_cholesky, parts.precision_cholesky)
    with pytest.raises(ValueError, match="repeatable"):
        whole.fit(iter(z.split(33)))
    with pytest.raises(ValueError, match="at least one point"):
        whole.fit(z[:0])


def test_online_steps_approach_the_exact_fit():
    """On a standing data set, online EM ends where exact EM does; weights follow the counts."""
    torch.manual_seed(1)
    z = torch.cat([torch.randn(450, D) + 5, torch.randn(50, D) - 5]).double()
    settings = {"centers": z[[0, 470]], "data_size": 500}
    exact = GaussianMixturePrior(2, D, **settings)
    exact.fit(z)
    # Even weights at the start do not hold the concentration up for ever.
    weights = torch.tensor([0.9, 0.1], dtype=torch.float64)
    torch.testing.assert_close(exact.logits.softmax(-1), weights, rtol=0, atol=0.01)
    online = GaussianMixturePrior(2, D, inference="closed-form", statistics_rate=0.02, **settings)
    for _ in range(100):
        for batch in z[torch.randperm(500)].split(100):
            online.update(batch)
    for name, tolerance in (("centers", 0.1), ("precision_cholesky", 0.15)):
        a, b = getattr(online, name), getattr(exact, name)
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    torch.testing.assert_close(online.logits.softmax(-1), weights, rtol=0, atol=0.03)


def test_closed_form_statistics_are_under_the_responsibilities():
    settings = {"inference": "closed-form", "statistics_rate": 1.0}
    z = torch.randn(40, D, dtype=torch.float64)
    for prior in (vmm(**settings), gmm(**settings)):
        encoder = Encoder()
        shares = prior.log_joint(z, encoder).softmax(-1).mean(0)
        loss = prior.log_joint(z, encoder).logsumexp(-1).mean()
        fitted = copy.deepcopy(prior)
        prior.update(z, encoder)
        torch.testing.assert_close(prior.running_N, shares.detach(), **TIGHT)
        # What EM raises is the log-sum-exp alone.
        fitted.options = replace(fitted.options, map_prior="none")
        assert fitted.fit(z, encoder, max_iterations=1) == [pytest.approx(loss.item())]


def test_free_centers_move_whatever_their_layout():
    centers = torch.randn(2, 3).T
    prior = GaussianMixturePrior(3, 2, centers, inference="closed-form", statistics_rate=0.5)
    prior.update(centers + 0.1 * torch.randn(3, 2))
    assert not torch.equal(prior.centers, centers)


def test_empty_components_are_pruned_not_broken():
    """Components without points: weights at the floor, everything finite, the rest unharmed."""
    z = torch.randn(500, D, dtype=torch.float64)
    centers = torch.cat([z[:2], torch.full((3, D), 80.0, dtype=torch.float64)])
    for weights, map_prior in itertools.product(
        ("dirichlet", "stick-breaking"), ("none", "fixed", "learnt")
    ):
        prior = GaussianMixturePrior(5, D, centers=centers, weights=weights, map_prior=map_prior)
        prior.fit(z)
        pi = prior.logits.softmax(-1)
        assert pi.isfinite().all() and prior.precision_cholesky.isfinite().all()
        if weights == "dirichlet":  # an empty stick keeps its share of the remainder
            assert pi[2:].max() < 1e-8
        assert prior.log_prob(z).isfinite().all()


@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
@pytest.mark.parametrize(("count", "points", "dim"), [(1, 1, D), (30, 5, D), (4, 40, 1)])
def test_few_points_or_dimensions(count, points, dim, inference):
    """C = 1, more pseudo-inputs than data, and D = 1."""
    encoder = Encoder() if dim == D else lambda x: Normal(x[:, :1], 0.1 + x[:, 1:2].abs())
    prior = VMMPrior(inputs(count), dim, inference=inference)
    for _ in range(5):
        prior.update(encoder(inputs(points)), encoder)
    assert prior.kl(encoder(inputs(points)), encoder).isfinite().all()
    shares = prior.responsibilities(torch.randn(4, dim).double(), encoder).sum(-1)
    torch.testing.assert_close(shares, torch.ones(4).double())


# --- state ---


def test_state_is_readable_and_settable():
    prior = vmm()
    parameter = prior.logits
    for new in (torch.randn(8, dtype=torch.float64), nn.Parameter(torch.randn(8).double())):
        prior.logits = new
        assert prior.logits is parameter and torch.equal(prior.logits, new)
    lower = torch.randn(8, D, D, dtype=torch.float64).tril()
    lower.diagonal(dim1=-2, dim2=-1).abs_().add_(1e-3).mul_(1e3)
    prior.precision_cholesky = lower
    torch.testing.assert_close(prior.precision_cholesky, lower, rtol=1e-12, atol=0)
    for value in (1e-6, 2.5, 1e6):
        prior.concentration = value
        assert math.isclose(prior.concentration.item(), value, rel_tol=1e-9)
    prior.pseudo_inputs = torch.ones(8, INPUTS)
    assert (prior.pseudo_inputs == 1).all() and prior.pseudo_inputs.dtype == torch.float64


@pytest.mark.parametrize("weights", ["dirichlet", "stick-breaking"])
@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
def test_pruning_by_hand(inference, weights):
    encoder, prior = Encoder(), vmm(inference=inference, weights=weights)
    with torch.no_grad():
        prior.logits[3] = -torch.inf
    z = encoder(inputs()).sample()
    assert (prior.responsibilities(z, encoder)[:, 3] == 0).all()
    for _ in range(3):
        prior.update(z, encoder)
    prior.fit(z, encoder)
    assert prior.logits[3] == -torch.inf and prior.logits[:3].isfinite().all()
    assert prior.kl(encoder(inputs()), encoder).isfinite().all()


@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
def test_frozen_parameters_stand_still(inference):
    encoder, prior = Encoder(), vmm(inference=inference).requires_grad_(False)
    z = encoder(inputs()).sample()
    before = {name: p.clone() for name, p in prior.named_parameters()}
    prior.update(z, encoder)
    prior.fit(z, encoder)
    assert same_state(before, state_of(prior))
    prior.raw_precision.requires_grad_(True)
    prior.update(z, encoder)
    assert not torch.equal(before["raw_precision"], prior.raw_precision)
    assert torch.equal(before["logits"], prior.logits)


def pickled(prior):
    return pickle.loads(pickle.dumps(prior))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, "state_dict"])
@pytest.mark.parametrize("name", LEARNT)
def test_copies_go_on_alike(name, copied):
    """A copy, a pickle and a loaded state take the same next steps, the private Adam's included."""
    encoder, prior = Encoder(), LEARNT[name]()
    batches = [encoder(inputs()).sample() for _ in range(6)]
    for z in batches[:3]:
        prior.update(z, encoder)
    if copied == "state_dict":
        other = LEARNT[name]()
        other.update(batches[5], encoder)
        other.load_state_dict(prior.state_dict())
    else:
        other = copied(prior)
    at_copy = state_of(prior)
    for z in batches[3:]:
        prior.update(z, encoder)
    assert same_state(at_copy, state_of(other))  # nothing is shared
    for z in batches[3:]:
        other.update(z, encoder)
    assert same_state(state_of(prior), state_of(other))
    assert not same_state(at_copy, state_of(other))


@pytest.mark.parametrize("name", LEARNT)
def test_states_that_do_not_fit_change_nothing(name):
    """A state is loaded whole or not at all, and no later step runs out of bounds."""
    encoder, prior, rng = Encoder(), LEARNT[name](), random.Random(0)
    z = encoder(inputs()).sample()
    prior.update(z, encoder)
    sound = prior.state_dict()
    refused = 0
    for _ in range(60):
        private, _ = mutated(sound["_extra_state"], rng)
        before, moments = state_of(prior), copy.deepcopy(prior.get_extra_state())
        try:
            prior.load_state_dict({**sound, "_extra_state": private})
        except RuntimeError as error:
            refused += 1
            assert " must " in str(error)
            assert same_state(before, state_of(prior))
            assert str(moments) == str(prior.get_extra_state())
        prior.update(z, encoder)
        assert all(x.isfinite().all() for x in state_of(prior).values())
    assert (refused > 20) == bool(sound["_extra_state"])
    wide = VMMPrior(inputs(30), D, inference="closed-form" if "closed" in name else "gradient")
    before = state_of(wide)
    with pytest.raises(RuntimeError, match="must have shape"):
        wide.load_state_dict(sound, strict=False)
    assert same_state(before, state_of(wide))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["state"][0].update(exp_avg=torch.zeros(2)), "must have shape"),
        (lambda state: state["state"][0].update(exp_avg=torch.eye(2).to_sparse()), "dense"),
        (lambda state: state["state"][0].update(exp_avg=torch.empty(2, device="meta")), "dense"),
        (lambda state: state["state"][0]["exp_avg"].fill_(torch.nan), "must be finite"),
        (lambda state: state["state"][0]["exp_avg_sq"].sub_(1e3), "nowhere negative"),
        (lambda state: state["state"][0].pop("exp_avg_sq"), "must have steps and moments"),
        (lambda state: state["state"][0].update(step=-1.0), "at least 0"),
        (lambda state: state["state"].update({9: {}}), "that it lists, but is of 9"),
        (lambda state: state["param_groups"][0].update(lr=torch.nan), "lr must be a number"),
        (
            lambda state: state["param_groups"][0].update(betas=(0.9, 1.0)),
            "beta2 must be a number",
        ),
        (lambda state: state["param_groups"][0].pop("eps"), "must have betas, eps"),
        (lambda state: state["param_groups"][0]["params"].pop(), "parameters, but is of"),
        (lambda state: state.pop("state"), "must have param_groups, a list, and state"),
    ],
)
def test_states_of_the_private_optimizer_are_checked(change, message):
    encoder, prior = Encoder(), vmm()
    prior.update(encoder(inputs()), encoder)
    state = copy.deepcopy(prior.get_extra_state())
    change(state)
    before = str(prior.get_extra_state())
    with pytest.raises(ValueError, match=message):
        prior.set_extra_state(state)
    assert str(prior.get_extra_state()) == before


def test_a_state_keeps_the_options():
    """A schedule of the data weight, set between steps, goes on from a loaded state."""
    encoder, prior, other = Encoder(), vmm(data_size=50, statistics_rate=0.1), vmm()
    z = encoder(inputs()).sample()
    prior.update(z, encoder)
    prior.data_size = 400
    other.load_state_dict(prior.state_dict())
    assert other.options == prior.options and other.data_size == 400
    for each in (prior, other):
        each.update(z, encoder)
    assert same_state(state_of(prior), state_of(other))
    with pytest.raises(ValueError, match="data_size must be an integer of at least 1, but is 0"):
        prior.data_size = 0
    state = prior.state_dict()
    with pytest.raises(RuntimeError, match="inference must be 'closed-form', as the prior's, but"):
        vmm(inference="closed-form").load_state_dict(state)
    del state["_extra_state"]["options"]  # as versions before wrote it
    prior.load_state_dict(state)
    assert prior.options == other.options


@pytest.mark.parametrize("name", PRIORS)
def test_casts_follow(name):
    """After .float() the private Adam goes on in float32; running sums stay as they are."""

    def running():
        return {k: x.clone() for k, x in prior.named_buffers() if k.startswith("running")}

    encoder, prior = Encoder(), PRIORS[name]()
    prior.update(encoder(inputs()), encoder)
    before = running()
    assert bool(before) == ("closed form" in name)
    for dtype in (torch.bfloat16, torch.float32):
        encoder, prior = encoder.to(dtype), prior.to(dtype)
        torch.testing.assert_close(running(), before, rtol=0, atol=0)
    q = encoder(inputs(dtype=torch.float32))
    prior.update(q, encoder)
    assert {p.dtype for p in prior.parameters()} <= {torch.float32}
    assert all(p.isfinite().all() for p in prior.parameters())
    assert prior.kl(q, encoder).dtype == prior.components(encoder).centers.dtype == torch.float32


def test_autocast():
    """Half-precision encoder outputs are taken; arithmetic and the prior's state are float32."""
    encoder = Encoder("diagonal", torch.float32)
    prior = perturb(VMMPrior(inputs(8, torch.float32), D))
    x = inputs(20, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        q, at_pseudo_inputs = encoder(x), encoder(prior.pseudo_inputs)
        assert q.mean.dtype == torch.bfloat16
        z = q.mean
        kl, loss = prior.kl(q, encoder, z=z), prior.map_loss(z, encoder)
        assert prior.sample(3, encoder).dtype == torch.float32
        prior_before = copy.deepcopy(prior)
        prior.update(q, encoder)

    def same_outputs(inputs):
        base = (q if inputs is x else at_pseudo_inputs).base_dist
        return Normal(base.loc.float(), base.scale.float())

    # The same encoder outputs in float32: nothing else may have been rounded.
    assert kl.dtype == loss.dtype == torch.float32
    exact = prior_before.kl(same_outputs(x), same_outputs, z=z.float())
    torch.testing.assert_close(kl, exact)
    torch.testing.assert_close(loss, prior_before.map_loss(z.float(), same_outputs))


# --- encoding as rarely as can be ---


@pytest.mark.parametrize(
    ("kind", "joint"), [("full", False), ("diagonal", True), ("normal", False), ("full", True)]
)
def test_one_call_encodes_batch_and_pseudo_inputs(kind, joint):
    prior, x = vmm(joint=joint), inputs()
    counted = Counted(Encoder(kind))
    q, at_pseudo_inputs = prior.encode(x, counted)
    expected = counted.encoder(x)
    z = expected.rsample()
    ours, theirs = prior.kl(q, at_pseudo_inputs, z), prior.kl(expected, counted.encoder, z)
    assert counted.calls == 1
    torch.testing.assert_close(q.mean, expected.mean, **TIGHT)
    torch.testing.assert_close(ours, theirs, **TIGHT)
    learnt = [*counted.encoder.parameters(), prior.pseudo_inputs]
    ours, theirs = (
        torch.autograd.grad(kl.sum(), learnt, retain_graph=True, allow_unused=True)
        for kl in (ours, theirs)
    )
    assert (ours[-1] is not None) == joint
    count = len(learnt) - (not joint)
    torch.testing.assert_close(ours[:count], theirs[:count], **TIGHT)


@pytest.mark.parametrize(
    "make",
    [
        lambda: StandardNormalPrior(D),
        lambda: GaussianMixturePrior(5, D),
        lambda: VMMPrior(Generator(), D),
        lambda: VMMPrior(inputs(8)[:, None], D),
        lambda: VMMPrior(inputs(8, torch.float32), D),
    ],
)
def test_what_does_not_fit_into_one_call_is_encoded_apart(make):
    x, counted = inputs(), Counted(Encoder())
    q, at_pseudo_inputs = make().encode(x, counted)
    assert at_pseudo_inputs is counted and counted.calls == 1
    assert torch.equal(q.mean, counted.encoder(x).mean)


def test_compiles_without_graph_breaks():
    # torch.compile does so itself, but once a process, and what scvi-tools imports undoes it.
    torch.distributions.Distribution.set_default_validate_args(False)
    encoder, prior = Encoder(), vmm()

    def step(x, noise):
        q, at_pseudo_inputs = prior.encode(x, encoder)
        z = q.loc + (q.scale_tril @ noise[..., None])[..., 0]
        crisp = prior.responsibilities(z, encoder).square().sum(-1)
        return (
            prior.kl(q, at_pseudo_inputs, z=z) + crisp + prior.log_joint(z, encoder).sum(-1)
        ).mean()

    x, noise = inputs(), torch.randn(40, D, dtype=torch.float64)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    parameters = list(encoder.parameters())
    torch.testing.assert_close(
        *(torch.autograd.grad(f(x, noise), parameters) for f in (compiled, step))
    )


# --- errors ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"weights": "uniform"},
            "weights must be one of 'dirichlet', 'stick-breaking', but is 'uniform'",
        ),
        ({"inference": "mcmc"}, "inference must be one of"),
        ({"map_prior": True}, "map_prior must be one of"),
        ({"pseudo_inputs_per_component": 3}, "pseudo_inputs_per_component must divide"),
        ({"pseudo_inputs_per_component": 0}, "pseudo_inputs_per_component must be an integer"),
        ({"latent_dim": 0}, "latent_dim must be an integer"),
        ({"latent_dim": True}, "latent_dim must be an integer"),
        ({"data_size": 2.5}, "data_size must be an integer"),
        ({"responsibility_gradient": "no"}, "responsibility_gradient must be True or False"),
        ({"learning_rate": -1.0}, "learning_rate must be a finite number above 0"),
        ({"concentration": math.inf}, "concentration must be a finite number above 0"),
        ({"statistics_rate": 0}, "statistics_rate must be in"),
        ({"statistics_rate": 1.1}, "statistics_rate must be in"),
        ({"data_size": 0}, "data_size must be an integer of at least 1"),
        ({"discount": 0.5}, "discount must be in"),
        ({"discount": 1.0, "weights": "stick-breaking"}, "discount must be in"),
        ({"joint": True, "inference": "closed-form"}, "joint must be False with"),
        ({"pseudo_inputs": torch.full((4, 2), math.nan)}, "pseudo_inputs must be finite"),
        ({"pseudo_inputs": torch.zeros(0, 2)}, "pseudo_inputs must have shape"),
    ],
)
def test_constructor_errors(settings, message):
    arguments = {"pseudo_inputs": torch.zeros(4, 2), "latent_dim": 2, **settings}
    with pytest.raises(ValueError, match=message):
        VMMPrior(**arguments)


Z = torch.zeros(4, D, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: VMMPrior(Z.long(), 2), TypeError, "pseudo_inputs must be of a floating dtype"),
        (lambda p: VMMPrior([[0.0]], 1), TypeError, "pseudo_inputs must be a tensor .* or a torch"),
        (lambda p: p.kl(Z, Encoder()), TypeError, "q must be a torch"),
        (lambda p: p.log_prob(Z), TypeError, "encoder must be a callable"),
        (
            lambda p: p.update(Z, p.encode(inputs(), Encoder())[1]),
            TypeError,
            "encoder must be the network's own",
        ),
        (
            lambda p: p.log_prob(Z, lambda x: Encoder()(x[:5])),
            ValueError,
            "encoder must give 8 pseudo-inputs means of shape",
        ),
        (lambda p: p.update(Z[:, :2], Encoder()), ValueError, r"z must have shape \[B, 3\]"),
        (lambda p: p.update(Z[:0], Encoder()), ValueError, "z must have at least one row"),
        (lambda p: p.log_prob(Z / 0, Encoder()), ValueError, "z must be finite, but row 0"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(vmm())


@pytest.mark.parametrize("name", ["vmm", "normal"])
def test_errors_of_kl(name):
    encoder, prior = Encoder(), PRIORS[name]()
    q = encoder(inputs(6))
    for z in (torch.zeros(1, D), torch.zeros(6, 9)):
        with pytest.raises(ValueError, match="z must have q's shape"):
            prior.kl(q, encoder, z=z.double())
    bad = Normal(torch.zeros(6, D).double(), -torch.ones(6, D).double(), validate_args=False)
    with pytest.raises(ValueError, match="q must be finite with a positive scale, but row 0"):
        prior.kl(bad, encoder, z=torch.zeros(6, D).double())
    with pytest.raises(ValueError, match="finite"):
        prior.kl(q, encoder, z=torch.full((6, D), math.nan).double())
    with pytest.raises(ValueError, match="q must have latent_dim = 3 dimensions, but has 2"):
        prior.kl(Normal(torch.zeros(4, 2), torch.ones(4, 2)), encoder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logits", torch.zeros(3), "logits must have shape"),
        ("logits", torch.full((8,), math.nan), "logits must not hold NaN"),
        ("pseudo_inputs", torch.zeros(8, 2), "pseudo_inputs must have shape"),
        ("precision_cholesky", torch.zeros(3, D, D), "precision_cholesky must have shape"),
        ("precision_cholesky", torch.zeros(8, D, D), "positive diagonal"),
        ("precision_cholesky", torch.ones(8, D, D), "lower triangular"),
        ("precision_cholesky", torch.eye(D).expand(8, D, D) * math.nan, "must be finite"),
        ("concentration", -1.0, "concentration must be a finite number above 0"),
    ],
)
def test_errors_of_setters(name, value, message):
    prior = vmm()
    before = state_of(prior)
    with pytest.raises(ValueError, match=message):
        setattr(prior, name, value)
    assert same_state(before, state_of(prior))
