"""The priors' interface, gradients, empirical-Bayes steps, state and errors."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import torch
from scipy.special import gammaln
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence
from torch.nn.functional import softplus

from vmm_fast import (
    Components,
    GaussianMixturePrior,
    StandardNormalPrior,
    VampPrior,
    VMMPrior,
    _core,
)
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
    return perturb(VMMPrior(inputs(count), D, **{"update_every": 1, **settings}))


def gmm(**settings):
    centers = torch.randn(4, D, dtype=torch.float64)
    return perturb(GaussianMixturePrior(4, D, centers=centers, **settings))


def vamp(**settings):
    return VampPrior(inputs(5), D, **{"update_every": 1, **settings})


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
def test_kl_gives_the_prior_a_gradient_in_joint_training_alone_and_update_moves_it_elsewhere(make):
    for joint in (False, True):
        encoder, prior = Encoder(), make(joint=joint)
        q, before = encoder(inputs()), state_of(prior)
        prior.update(q, encoder)
        assert same_state(before, state_of(prior)) == joint
        prior.kl(q, encoder).sum().backward()
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
    "counts",
    [
        [70, 20, 9, 1, 0],
        [20, 20, 20, 20, 21],
        [1000, 0, 0, 0, 0],
        [5],
        [1e-12] * 30,
        [3e5, 2.5, 1e-3, 40, 1e4],
    ],
)
def test_closed_form_concentration(counts):
    """Against scipy's bounded minimiser on the Dirichlet-multinomial likelihood."""
    counts = np.array(counts, dtype=float)

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
    for start in (1e-9, 1.0, 1e9):
        found = _core.maximise_concentration(counts.ctypes.data, len(counts), start)
        assert found == pytest.approx(actual, rel=1e-8)


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


@pytest.mark.parametrize("make", LEARNT.values(), ids=LEARNT)
def test_results_lie_where_the_prior_does(make):
    """Whatever torch's default device is."""
    encoder, prior, x = Encoder(), make(), inputs()
    z = encoder(x).mean.detach()
    found = []
    for where in ("cpu", "meta"):
        one = copy.deepcopy(prior)
        with torch.device(where):
            kl = one.kl(encoder(x), encoder, z=z)
            one.update(z, encoder)
            labels = one.clusters(z, encoder).assign(z).labels
        found.append([kl.detach(), *one.parameters(), labels])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
