"""The priors' interface, gradients, empirical-Bayes steps, state and errors."""

import copy
import itertools
import math
import pickle

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
    reference,
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


class Generator(nn.Module):
    """Pseudo-inputs from a module."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, INPUTS, dtype=torch.float64)

    def forward(self):
        return self.linear(torch.linspace(-1, 1, 16, dtype=torch.float64).view(8, 2))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(n=40, dtype=torch.float64):
    return torch.randn(n, INPUTS, dtype=dtype)


def perturb(prior):
    """Parameters that are not all alike."""
    with torch.no_grad():
        prior.logits.copy_(torch.randn_like(prior.logits))
        lower = 0.3 * torch.randn_like(prior.raw_precision).tril()
        lower.diagonal(dim1=-2, dim2=-1).abs_().add_(0.5)
        prior.precision_cholesky = lower
        prior.concentration = 1.7
    return prior


def vmm(count=8, **settings):
    return perturb(VMMPrior(inputs(count), D, **settings))


# --- values and gradients against plain torch ---


def plain_kl(prior, q, z, encoder, pseudo_inputs, logits, factor):
    """KL estimate from torch.distributions alone, everything in the graph."""
    posterior = encoder(pseudo_inputs)
    full = isinstance(posterior, MultivariateNormal)
    normal = posterior if full else getattr(posterior, "base_dist", posterior)
    mean = posterior.loc if full else normal.loc
    s = posterior.scale_tril if full else torch.diag_embed(normal.scale)
    k = prior.pseudo_inputs_per_component
    inverse = torch.linalg.inv(factor @ factor.mT).repeat_interleave(k, 0)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=logits.repeat_interleave(k)),
        MultivariateNormal(mean, covariance_matrix=inverse + s @ s.mT),
    )
    entropy = q.entropy()
    return -(entropy if entropy.ndim == 1 else entropy.sum(-1)) - mixture.log_prob(z)


def test_kl_gives_no_gradient_to_a_module_s_parameters_that_it_gives_as_they_are():
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.inputs = nn.Parameter(inputs(8))

        def forward(self):
            return self.inputs

    prior, encoder = VMMPrior(Given(), D), Encoder()
    x = inputs(5)
    prior.kl(encoder(x), encoder).sum().backward()
    assert prior.pseudo_inputs.inputs.grad is None
    assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize("kind", ["full", "diagonal", "normal"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("reuse_encoding", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_kl_value_and_gradients(kind, joint, reuse_encoding, k):
    encoder = Encoder(kind)
    prior = vmm(pseudo_inputs_per_component=k, joint=joint, reuse_encoding=reuse_encoding)
    q = encoder(inputs())
    z = q.rsample()
    factor = prior.precision_cholesky
    ours, theirs = (
        prior.kl(q, encoder, z),
        plain_kl(prior, q, z, encoder, prior.pseudo_inputs, prior.logits, factor),
    )
    torch.testing.assert_close(ours, theirs, **TIGHT)
    weights = torch.linspace(0.5, 2, len(z), dtype=z.dtype)
    network = list(encoder.parameters())
    grads = [
        torch.autograd.grad((x * weights).sum(), network, retain_graph=True) for x in (ours, theirs)
    ]
    torch.testing.assert_close(*grads, **TIGHT)
    parameters = [prior.pseudo_inputs, prior.logits, prior.raw_precision]
    mine = torch.autograd.grad((ours * weights).sum(), parameters, allow_unused=True)
    if joint:
        torch.testing.assert_close(
            mine, torch.autograd.grad((theirs * weights).sum(), parameters), **TIGHT
        )
    else:
        assert mine == (None, None, None)


def plain_map_loss(prior, z, posterior, logits, factor, gamma, responsibility_gradient, n):
    """The objective of the empirical-Bayes step in a few lines of torch."""
    full = isinstance(posterior, MultivariateNormal)
    mean = posterior.loc if full else posterior.base_dist.loc
    s = posterior.scale_tril if full else torch.diag_embed(posterior.base_dist.scale)
    c, k = len(logits), prior.pseudo_inputs_per_component
    precision = (factor @ factor.mT).repeat_interleave(k, 0)
    log_pi = logits.log_softmax(-1)
    joint = MultivariateNormal(mean, precision_matrix=precision).log_prob(z[:, None])
    trace = torch.einsum("jab,jbc,jac->j", precision, s, s)
    joint = joint + (log_pi - math.log(k)).repeat_interleave(k) - 0.5 * trace
    q = joint.softmax(-1)
    data = ((q if responsibility_gradient else q.detach()) * joint).sum(-1).mean()
    log_prior = torch.distributions.Dirichlet(torch.full((c,), 1.0).double() * gamma / c).log_prob(
        log_pi.exp()
    )
    log_prior = log_prior - 1 / gamma
    log_prior = (
        log_prior
        + Normal(torch.zeros(()).double(), 1).log_prob(mean).sum()
        - 0.5 * s.square().sum()
    )
    scale = c ** (2 / D) / (D + 2) * torch.eye(D, dtype=torch.float64)
    wishart = torch.distributions.Wishart(torch.tensor(D + 2.0).double(), covariance_matrix=scale)
    return -data - (log_prior + wishart.log_prob(factor @ factor.mT).sum()) / n


@pytest.mark.filterwarnings("ignore:Singular sample")
@pytest.mark.parametrize("kind", ["full", "diagonal"])
@pytest.mark.parametrize("responsibility_gradient", [True, False])
@pytest.mark.parametrize(("k", "data_size"), [(1, None), (2, 500)])
def test_map_loss_gradients(kind, responsibility_gradient, k, data_size):
    encoder = Encoder(kind)
    prior = vmm(
        pseudo_inputs_per_component=k,
        responsibility_gradient=responsibility_gradient,
        data_size=data_size,
    )
    z = encoder(inputs()).rsample().detach().requires_grad_()
    theirs = plain_map_loss(
        prior,
        z,
        encoder(prior.pseudo_inputs),
        prior.logits,
        prior.precision_cholesky,
        prior.concentration,
        responsibility_gradient,
        data_size or len(z),
    )
    ours = prior.map_loss(z, encoder)
    torch.testing.assert_close(ours, theirs, **TIGHT)
    targets = [z, *prior.parameters(), *encoder.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(ours, targets), torch.autograd.grad(theirs, targets), **TIGHT
    )


def test_gradient_weights_of_both_rules():
    """The weights of l_ij are q (1 + l - sum q l), or q: in closed form, for the logits."""
    for rule in (True, False):
        encoder, prior = Encoder(), vmm(responsibility_gradient=rule, map_prior="none")
        z = encoder(inputs()).sample()
        joint = prior.log_joint(z, encoder).detach()
        q = joint.softmax(-1)
        w = q * (1 + joint - (q * joint).sum(-1, keepdim=True)) if rule else q
        # d l_ij / d logit_c = 1[j = c] - pi_c
        expected = -(w - w.sum(-1, keepdim=True) * prior.logits.softmax(-1)).mean(0)
        (actual,) = torch.autograd.grad(prior.map_loss(z, encoder), prior.logits)
        torch.testing.assert_close(actual, expected.detach(), **TIGHT)


@pytest.mark.parametrize(
    "make",
    [
        vmm,
        lambda: vmm(pseudo_inputs_per_component=4),
        lambda: VampPrior(inputs(5), D),
        lambda: perturb(GaussianMixturePrior(4, D, centers=torch.randn(4, D, dtype=torch.float64))),
        lambda: StandardNormalPrior(D).double(),
    ],
)
def test_one_interface(make):
    """Every prior: shapes, consistency of the methods with each other and with components()."""
    prior, encoder = make(), Encoder()
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
    assert entropy.shape == (7,)
    assert prior.kl(q, encoder).shape == (7,)
    assert prior.sample(9, encoder).shape == (9, D)
    assert prior.sample(9, encoder, component=c - 1).shape == (9, D)
    torch.testing.assert_close(prior.distribution(encoder).log_prob(z), prior.log_prob(z, encoder))
    assert set(prior.active_components(z, encoder, threshold=0).tolist()) == set(labels.tolist())
    prior.update(q, encoder)
    prior.update(z, encoder)
    # torch's MultivariateNormal cannot check an empty batch.
    assert prior.kl(Encoder("diagonal")(inputs(0)), encoder).shape == (0,)


def test_vamp_is_a_mixture_of_posteriors():
    encoder, prior = Encoder(), VampPrior(inputs(5), D)
    z = torch.randn(9, D, dtype=torch.float64)
    posteriors = encoder(prior.pseudo_inputs)
    expected = posteriors.log_prob(z[:, None]).logsumexp(-1) - math.log(5)
    torch.testing.assert_close(prior.log_prob(z, encoder), expected, **TIGHT)
    # VMMPrior with one component approaches it as the precision grows.
    limit = VMMPrior(prior.pseudo_inputs, D, 5)
    limit.precision_cholesky = 1e6 * torch.eye(D, dtype=torch.float64)[None]
    torch.testing.assert_close(limit.log_prob(z, encoder), expected, rtol=1e-6, atol=1e-6)
    before = prior.map_loss(z, encoder).item()
    for _ in range(50):
        prior.update(z, encoder)
    assert prior.map_loss(z, encoder).item() < before


def test_standard_normal_kl_is_exact():
    prior = StandardNormalPrior(D).double()
    for kind in ("full", "diagonal", "normal"):
        q = Encoder(kind)(inputs())
        full = q if kind != "normal" else Independent(q, 1)
        normal = Independent(Normal(torch.zeros(D).double(), 1.0), 1)
        if kind == "full":
            normal = MultivariateNormal(torch.zeros(D).double(), torch.eye(D).double())
        torch.testing.assert_close(prior.kl(q), kl_divergence(full, normal), rtol=1e-12, atol=1e-12)
        z = q.rsample()
        expected = -full.entropy() - prior.log_prob(z)
        torch.testing.assert_close(prior.kl(q, z=z), expected, rtol=1e-12, atol=1e-12)


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
        {"inference": "closed-form", "map_prior": "fixed", "temperature": 0.5},
        {"inference": "closed-form", "pseudo_inputs_per_component": 2},
    ],
)
def test_update_moves_the_prior_and_nothing_else(settings):
    encoder, prior = Encoder(), vmm(data_size=200, learning_rate=1e-2, **settings)
    optimizer = torch.optim.Adam([*encoder.parameters(), *prior.parameters()])
    z = 2 * torch.randn(200, D, dtype=torch.float64)
    kept = z.clone()
    network = [p.clone() for p in encoder.parameters()]
    before, gamma = prior.map_loss(z, encoder).item(), prior.concentration.item()
    with torch.no_grad():  # an update works where the caller has switched gradients off
        prior.update(z, encoder)
    for _ in range(100):
        prior.update(z, encoder)
    assert prior.map_loss(z, encoder).item() < before
    assert torch.equal(z, kept)
    assert all(torch.equal(a, b) for a, b in zip(network, encoder.parameters(), strict=True))
    assert all(p.grad is None for p in (*encoder.parameters(), *prior.parameters()))
    assert (prior.concentration.item() != gamma) == (prior.map_prior == "learnt")
    state = copy.deepcopy(prior.state_dict())
    optimizer.zero_grad()
    prior.kl(encoder(inputs()), encoder).mean().backward()
    optimizer.step()  # one optimizer over everything leaves the prior alone
    after = prior.state_dict()
    assert all(torch.equal(state[k], after[k]) for k in state if k != "_extra_state")


def test_first_gradient_step_is_adams():
    """Adam's first step is learning_rate times the gradient's sign, where that is not tiny."""
    encoder, prior = Encoder(), vmm(learning_rate=1e-2)
    z = encoder(inputs()).sample()
    parameters = list(prior.parameters())
    grads = torch.autograd.grad(prior.map_loss(z, encoder), parameters)
    before = [p.detach().clone() for p in parameters]
    prior.update(z, encoder)
    for p, old, g in zip(parameters, before, grads, strict=True):
        moved = g.abs() > 1e-4
        assert moved.any()
        torch.testing.assert_close((p - old)[moved], -1e-2 * g.sign()[moved], rtol=2e-3, atol=0)


def test_update_in_inference_mode():
    encoder, prior = Encoder(), vmm()
    before = prior.logits.detach().clone()
    with torch.inference_mode():
        prior.update(encoder(inputs()), encoder)
    assert not torch.equal(before, prior.logits)


def test_joint_has_no_private_step():
    encoder, prior = Encoder(), vmm(joint=True)
    before = copy.deepcopy(prior.state_dict())
    prior.update(encoder(inputs()), encoder)
    assert all(
        torch.equal(before[k], v) for k, v in prior.state_dict().items() if k != "_extra_state"
    )


def test_non_finite_step_changes_nothing():
    encoder, prior = Encoder(), vmm()
    before = copy.deepcopy(prior.state_dict())
    with torch.no_grad():
        encoder.linear.weight.mul_(1e200)
    with pytest.raises(ValueError, match="no positive-definite"):
        prior.update(torch.randn(9, D, dtype=torch.float64), encoder)
    with pytest.raises(FloatingPointError, match="the prior is unchanged"):
        prior._adam.descend(math.inf, [None] * len(prior._adam.parameters))
    after = prior.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k != "_extra_state")


@pytest.mark.parametrize("map_prior", ["none", "fixed"])
def test_fit_never_loses_and_ends_at_a_stationary_point(map_prior):
    """Exact EM raises its objective, and at its end the objective's gradient is zero."""
    torch.manual_seed(2)
    centers = torch.tensor([[4.0, 0, 0], [-4, 0, 0], [0, 5, 0]], dtype=torch.float64)
    z = (centers[:, None] + torch.randn(3, 60, D, dtype=torch.float64)).flatten(0, 1)
    prior = GaussianMixturePrior(
        3,
        D,
        centers=z[[0, 60, 120]],
        data_size=len(z),
        responsibility_gradient=False,
        map_prior=map_prior,
    )
    history = prior.fit(z, max_iterations=300, tolerance=1e-13)
    assert history[-1] > history[0] + 0.1
    assert min(b - a for a, b in itertools.pairwise(history)) > -1e-10
    parameters = [prior.centers, prior.logits, prior.raw_precision]
    for gradient in torch.autograd.grad(prior.map_loss(z), parameters):
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
        likelihood = (
            gammaln(gamma)
            - gammaln(counts.sum() + gamma)
            + (gammaln(counts + a) - gammaln(a)).sum()
        )
        return -likelihood + 1 / gamma

    best = scipy.optimize.minimize_scalar(
        loss, bounds=np.log([1e-6, 1e6]), method="bounded", options={"xatol": 1e-9}
    )
    actual = closed_form.maximise_concentration(torch.tensor(counts))
    assert loss(np.log(actual)) <= best.fun + 1e-9 * abs(best.fun)


def test_concentration_follows_the_counts():
    """Even weights at the start do not hold the concentration up for ever."""
    torch.manual_seed(1)
    z = torch.cat([torch.randn(450, D) + 5, torch.randn(50, D) - 5]).double()
    prior = GaussianMixturePrior(2, D, centers=z[[0, 470]])
    prior.fit(z)
    torch.testing.assert_close(
        prior.logits.softmax(-1), torch.tensor([0.9, 0.1], dtype=torch.float64), rtol=0, atol=0.01
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cast_leaves_the_running_sums_in_float64(dtype):
    prior = GaussianMixturePrior(3, 2, torch.randn(3, 2).double(), inference="closed-form")
    z = torch.randn(20, 2, dtype=torch.float64)
    prior.update(z)
    before = [x.clone() for x in prior._running.sums]
    prior.to(dtype)
    for x, old in zip(prior._running.sums, before, strict=True):
        assert torch.equal(x, old)
    if dtype == torch.float32:
        prior.update(z.float())
        assert all(x.isfinite().all() for x in prior.parameters())


def test_free_centers_move_whatever_their_layout():
    centers = torch.randn(2, 3).T
    prior = GaussianMixturePrior(3, 2, centers, inference="closed-form", statistics_rate=0.5)
    prior.update(centers + 0.1 * torch.randn(3, 2))
    assert not torch.equal(prior.centers, centers)


def test_closed_form_precision_is_the_formula():
    """Lambda_c = (N_c + 1) (V^-1 + sum_k [N_ck S_ck + M_ck])^-1, here by plain inversion."""
    encoder, prior = Encoder(), vmm(pseudo_inputs_per_component=2, inference="closed-form")
    z = encoder(inputs()).sample()
    old = prior.components(encoder).detach()
    n, _, m = reference.mixture_statistics(z, *old.expected)
    covariance = old.scale @ old.scale.mT
    prior.fit(z, encoder, max_iterations=1)
    scatter = (n[:, None, None] * covariance + m).unflatten(0, (4, 2)).sum(1)
    inverse_scale = (D + 2) / 4 ** (2 / D) * torch.eye(D, dtype=torch.float64)
    mass = n.unflatten(0, (4, 2)).sum(1)
    expected = (mass + 1)[:, None, None] * torch.linalg.inv(inverse_scale + scatter)
    factor = prior.precision_cholesky
    torch.testing.assert_close(factor @ factor.mT, expected, **TIGHT)


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


def test_online_steps_approach_the_exact_fit():
    """On a standing data set, online EM ends where exact EM does."""
    torch.manual_seed(1)
    z = torch.cat([torch.randn(300, D) + 5, torch.randn(200, D) - 5]).double()
    exact = GaussianMixturePrior(2, D, centers=z[[0, 400]], data_size=500)
    exact.fit(z)
    online = GaussianMixturePrior(
        2, D, centers=z[[0, 400]], data_size=500, inference="closed-form", statistics_rate=0.02
    )
    for _ in range(100):
        for batch in z[torch.randperm(500)].split(100):
            online.update(batch)
    torch.testing.assert_close(online.centers, exact.centers, rtol=0, atol=0.1)
    torch.testing.assert_close(
        online.logits.softmax(-1), exact.logits.softmax(-1), rtol=0, atol=0.03
    )
    torch.testing.assert_close(
        online.precision_cholesky, exact.precision_cholesky, rtol=0, atol=0.15
    )


def test_empty_components_are_pruned_not_broken():
    """Components without points: weights at the floor, everything finite, the rest unharmed."""
    z = torch.randn(500, D, dtype=torch.float64)
    centers = torch.cat([z[:2], torch.full((3, D), 80.0, dtype=torch.float64)])
    for weights in ("dirichlet", "stick-breaking"):
        for map_prior in ("none", "fixed", "learnt"):
            prior = GaussianMixturePrior(
                5, D, centers=centers, weights=weights, map_prior=map_prior
            )
            prior.fit(z)
            pi = prior.logits.softmax(-1)
            assert pi.isfinite().all() and prior.precision_cholesky.isfinite().all()
            if weights == "dirichlet":  # an empty stick keeps its share of the remainder
                assert pi[2:].max() < 1e-8
            assert prior.log_prob(z).isfinite().all()


# --- state ---


def test_state_is_readable_and_settable():
    prior = vmm()
    new = torch.randn(8, dtype=torch.float64)
    parameter = prior.logits
    prior.logits = new
    assert prior.logits is parameter and torch.equal(prior.logits, new)
    prior.logits = nn.Parameter(new + 1)
    assert prior.logits is parameter and torch.equal(prior.logits, new + 1)
    lower = torch.randn(8, D, D, dtype=torch.float64).tril()
    lower.diagonal(dim1=-2, dim2=-1).abs_().add_(1e-3).mul_(1e3)
    prior.precision_cholesky = lower
    torch.testing.assert_close(prior.precision_cholesky, lower, rtol=1e-12, atol=0)
    for value in (1e-6, 2.5, 1e6):
        prior.concentration = value
        assert math.isclose(prior.concentration.item(), value, rel_tol=1e-9)
    prior.pseudo_inputs = torch.ones(8, INPUTS)
    assert (prior.pseudo_inputs == 1).all() and prior.pseudo_inputs.dtype == torch.float64


def test_pruning_by_hand():
    encoder = Encoder()
    for inference in ("gradient", "closed-form"):
        for weights in ("dirichlet", "stick-breaking"):
            prior = vmm(inference=inference, weights=weights)
            logits = prior.logits.detach().clone()
            logits[3] = -torch.inf
            prior.logits = logits
            z = encoder(inputs()).sample()
            assert (prior.responsibilities(z, encoder)[:, 3] == 0).all()
            for _ in range(3):
                prior.update(z, encoder)
            prior.fit(z, encoder)
            assert prior.logits[3] == -torch.inf and prior.logits[:3].isfinite().all()
            assert prior.kl(encoder(inputs()), encoder).isfinite().all()


@pytest.mark.parametrize("k", [1, 2])
def test_gradients_beside_a_pruned_component(k):
    encoder, prior = Encoder(), vmm(pseudo_inputs_per_component=k, joint=True)
    logits = prior.logits.detach().clone()
    logits[1] = -torch.inf
    prior.logits = logits
    z = encoder(inputs()).sample().requires_grad_()
    live = [c for c in range(prior.num_components) if c != 1]
    for method in (prior.log_joint, prior.responsibilities):
        total = method(z, encoder)[:, live].sum() + prior.kl(encoder(inputs()), encoder).sum()
        for gradient in torch.autograd.grad(total, [z, prior.pseudo_inputs, *encoder.parameters()]):
            assert gradient.isfinite().all()


def test_frozen_parameters_stand_still():
    encoder = Encoder()
    z = encoder(inputs()).sample()
    for inference in ("gradient", "closed-form"):
        prior = vmm(inference=inference).requires_grad_(False)
        before = copy.deepcopy(prior.state_dict())
        prior.update(z, encoder)
        prior.fit(z, encoder)
        for name, value in prior.named_parameters():
            assert torch.equal(before[name], value), name
        prior.raw_precision.requires_grad_(True)
        prior.update(z, encoder)
        assert not torch.equal(before["raw_precision"], prior.raw_precision)
        assert torch.equal(before["logits"], prior.logits)


@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda p: pickle.loads(pickle.dumps(p)),
        "state_dict",
    ],
)
def test_copies_go_on_alike(copied, inference):
    """A copy, a pickle and a loaded state take the same next steps, the private Adam's included."""
    encoder, prior = Encoder(), vmm(inference=inference)
    batches = [encoder(inputs()).sample() for _ in range(6)]
    for z in batches[:3]:
        prior.update(z, encoder)
    if copied == "state_dict":
        other = vmm(inference=inference)
        other.update(batches[5], encoder)
        other.load_state_dict(prior.state_dict())
    else:
        other = copied(prior)
    for z in batches[3:]:
        prior.update(z, encoder)
        other.update(z, encoder)
    for name, value in prior.state_dict().items():
        if name != "_extra_state":
            assert torch.equal(value, other.state_dict()[name]), name


def test_casts_follow():
    """After .float() the private Adam goes on in float32."""
    encoder, prior = Encoder(), vmm()
    prior.update(encoder(inputs()), encoder)
    encoder, prior = encoder.float(), prior.float()
    prior.update(encoder(inputs(dtype=torch.float32)), encoder)
    assert prior.logits.dtype == torch.float32
    assert prior.kl(encoder(inputs(dtype=torch.float32)), encoder).dtype == torch.float32


def test_pseudo_inputs_from_a_module():
    encoder = Encoder()
    for inference in ("gradient", "closed-form"):
        prior = VMMPrior(Generator(), D, inference=inference)
        assert prior.num_components == 8
        before = prior.pseudo_inputs.linear.weight.clone()
        kl = prior.kl(encoder(inputs()), encoder).sum()
        assert torch.autograd.grad(kl, prior.pseudo_inputs.linear.weight, allow_unused=True) == (
            None,
        )
        prior.update(encoder(inputs()), encoder)
        assert not torch.equal(before, prior.pseudo_inputs.linear.weight)


def test_input_is_not_touched():
    x = inputs(8)
    kept = x.clone()
    encoder, prior = Encoder(), VMMPrior(x, D)
    for _ in range(3):
        prior.update(encoder(inputs()), encoder)
    assert torch.equal(x, kept) and not torch.equal(prior.pseudo_inputs, kept)


def test_autocast():
    """Half-precision encoder outputs are taken; arithmetic and the prior's state are float32."""
    encoder, prior = Encoder("diagonal", torch.float32), VMMPrior(inputs(8, torch.float32), D)
    perturb(prior)
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


@pytest.mark.parametrize("size", [(1, 1), (30, 5)])
def test_few_points(size):
    """C = 1, and more pseudo-inputs than data."""
    count, points = size
    encoder = Encoder()
    for inference in ("gradient", "closed-form"):
        prior = VMMPrior(inputs(count), D, inference=inference)
        for _ in range(5):
            prior.update(encoder(inputs(points)), encoder)
        assert prior.kl(encoder(inputs(points)), encoder).isfinite().all()
        assert (
            prior.responsibilities(torch.randn(4, D).double(), encoder)
            .sum(-1)
            .allclose(torch.ones(4).double())
        )


def test_one_dimension():
    def encoder(x):
        return Normal(x[:, :1], 0.1 + x[:, 1:2].abs())

    for inference in ("gradient", "closed-form"):
        prior = VMMPrior(inputs(4), 1, inference=inference)
        for _ in range(5):
            prior.update(encoder(inputs()), encoder)
        assert prior.kl(encoder(inputs()), encoder).isfinite().all()


# --- encoding as rarely as can be ---


class Counted:
    """An encoder that counts its calls."""

    def __init__(self, encoder):
        self.encoder, self.calls = encoder, 0

    def __call__(self, x):
        self.calls += 1
        return self.encoder(x)


def same_state(prior, other):
    one, two = prior.state_dict(), other.state_dict()
    return all(torch.equal(one[k], two[k]) for k in one if k != "_extra_state")


@pytest.mark.parametrize("kind", ["full", "diagonal", "normal"])
@pytest.mark.parametrize("joint", [False, True])
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
    learnt = [*counted.encoder.parameters(), *([prior.pseudo_inputs] if joint else [])]
    grads = [torch.autograd.grad(kl.sum(), learnt, retain_graph=True) for kl in (ours, theirs)]
    torch.testing.assert_close(*grads, **TIGHT)


@pytest.mark.parametrize(
    "make",
    [
        lambda: StandardNormalPrior(D),
        lambda: GaussianMixturePrior(5, D),
        lambda: VMMPrior(Generator(), D),
        lambda: VMMPrior(inputs(8)[:, None], D),
        lambda: VMMPrior(inputs(8, torch.float32), D),
        lambda: VMMPrior(inputs(8), D, reuse_encoding=True),
    ],
)
def test_what_does_not_fit_into_one_call_is_encoded_apart(make):
    x, counted = inputs(), Counted(Encoder())
    q, at_pseudo_inputs = make().encode(x, counted)
    assert at_pseudo_inputs is counted and counted.calls == 1
    assert torch.equal(q.mean, counted.encoder(x).mean)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
@pytest.mark.parametrize(
    "make",
    [
        lambda reuse: VMMPrior(inputs(8), D, reuse_encoding=reuse),
        lambda reuse: VMMPrior(inputs(8), D, 2, map_prior="none", reuse_encoding=reuse),
        lambda reuse: VMMPrior(inputs(8), D, inference="closed-form", reuse_encoding=reuse),
        lambda reuse: VMMPrior(Generator(), D, reuse_encoding=reuse),
        lambda reuse: VMMPrior(Generator(), D, inference="closed-form", reuse_encoding=reuse),
        lambda reuse: VampPrior(inputs(8), D, reuse_encoding=reuse),
        lambda reuse: VampPrior(Generator(), D, reuse_encoding=reuse),
        # float32 pseudo-inputs in a float64 network: plain torch instead of the compiled core
        lambda reuse: VMMPrior(inputs(8, torch.float32), D, reuse_encoding=reuse),
    ],
)
def test_reused_encoding_is_exact_while_the_network_stands_still(kind, make):
    torch.manual_seed(1)
    prior = make(True)
    torch.manual_seed(1)
    other = make(False)
    assert same_state(prior, other)
    network = Encoder(kind)
    counted = Counted(lambda x: network(x.double()))
    for _ in range(3):
        q = network(inputs())
        z = q.rsample()
        counted.calls = 0
        prior.kl(q, counted, z).mean().backward(retain_graph=True)
        prior.update(z.detach(), counted)
        assert counted.calls == 1
        other.kl(q, counted, z).mean().backward()
        other.update(z.detach(), counted)
        assert counted.calls == 3
        assert all(p.grad is None for p in prior.parameters())
        for name, value in prior.named_parameters():
            torch.testing.assert_close(value, dict(other.named_parameters())[name], **TIGHT)
        network.zero_grad()


@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
def test_reused_encoding_is_of_the_network_before_its_step(inference):
    encoder, prior = Encoder(), vmm(inference=inference, reuse_encoding=True)
    before, expected = copy.deepcopy(encoder), copy.deepcopy(prior)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.1)
    q = encoder(inputs())
    z = q.rsample()
    prior.kl(q, encoder, z).mean().backward()
    optimizer.step()
    prior.update(z, encoder)
    expected.update(z, before)
    assert same_state(prior, expected)
    # What was kept is used once: the same z again meets the network of now.
    prior.update(z, encoder)
    expected.update(z, encoder)
    assert same_state(prior, expected)


def test_without_a_kept_encoding_update_encodes():
    encoder, prior = Encoder(), vmm(reuse_encoding=True)
    other = vmm()
    other.load_state_dict(prior.state_dict())
    q = encoder(inputs())
    z = q.rsample()

    def first():
        return z

    def another():
        prior.kl(q, encoder, z)
        return z.clone()

    @torch.no_grad()
    def without_gradients():
        prior.kl(q, encoder, z)
        return z

    for case in (first, another, without_gradients):
        counted = Counted(encoder)
        points = case()
        prior.update(points, counted)
        other.update(points, encoder)
        assert counted.calls == 1, case.__name__
        assert same_state(prior, other), case.__name__


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_have_no_kept_encoding(copied):
    encoder, prior = Encoder(), vmm(reuse_encoding=True)
    names = list(prior.state_dict())
    q = encoder(inputs())
    z = q.rsample()
    prior.kl(q, encoder, z)
    assert list(prior.state_dict()) == names
    other, counted = copied(prior), Counted(encoder)
    other.update(z, counted)
    assert counted.calls == 1
    prior.update(z, counted)
    assert counted.calls == 1


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
        ({"temperature": 0}, "temperature must be"),
        ({"statistics_rate": 0}, "statistics_rate must be in"),
        ({"data_size": 0}, "data_size must be an integer of at least 1"),
        ({"discount": 0.5}, "discount must be in"),
        ({"discount": 1.0, "weights": "stick-breaking"}, "discount must be in"),
        ({"joint": True, "inference": "closed-form"}, "joint=True trains by gradient"),
        ({"pseudo_inputs": torch.full((4, 2), math.nan)}, "pseudo_inputs must be finite"),
        ({"pseudo_inputs": torch.zeros(0, 2)}, "pseudo_inputs must have shape"),
    ],
)
def test_constructor_errors(settings, message):
    arguments = {"pseudo_inputs": torch.zeros(4, 2), "latent_dim": 2, **settings}
    with pytest.raises(ValueError, match=message):
        VMMPrior(**arguments)


def test_type_errors():
    with pytest.raises(TypeError, match="pseudo_inputs must be of a floating dtype"):
        VMMPrior(torch.zeros(4, 2, dtype=torch.uint8), 2)
    with pytest.raises(TypeError, match=r"pseudo_inputs must be a tensor .* or a torch.nn.Module"):
        VMMPrior([[0.0]], 1)
    with pytest.raises(TypeError, match="encoder must be a callable"):
        vmm().log_prob(torch.zeros(1, D).double())
    _, at_pseudo_inputs = vmm().encode(inputs(), Encoder())
    with pytest.raises(TypeError, match="encoder must be the network's own"):
        vmm().update(torch.zeros(1, D).double(), at_pseudo_inputs)
    with pytest.raises(TypeError, match="q must be a torch"):
        vmm().kl(torch.zeros(3, D), Encoder())


def test_shape_errors():
    encoder, prior = Encoder(), vmm()
    q = encoder(inputs(6))
    for kind in (prior, StandardNormalPrior(D).double()):
        for z in (torch.zeros(1, D), torch.zeros(6, 9)):
            with pytest.raises(ValueError, match="z must have q's shape"):
                kind.kl(q, encoder, z=z.double())
        bad = Normal(torch.zeros(6, D).double(), -torch.ones(6, D).double(), validate_args=False)
        with pytest.raises(ValueError, match="q must be finite with a positive scale, but row 0"):
            kind.kl(bad, encoder, z=torch.zeros(6, D).double())
        with pytest.raises(ValueError, match="finite"):
            kind.kl(q, encoder, z=torch.full((6, D), math.nan).double())
    with pytest.raises(ValueError, match="q must have latent_dim = 3 dimensions, but has 2"):
        prior.kl(Normal(torch.zeros(4, 2), torch.ones(4, 2)), encoder)
    with pytest.raises(ValueError, match=r"z must have shape \[B, 3\]"):
        prior.update(torch.zeros(4, 2), encoder)
    with pytest.raises(ValueError, match="encoder must give 8 pseudo-inputs means of shape"):
        prior.log_prob(torch.zeros(4, D).double(), lambda x: encoder(x[:5]))
    for name, value in (
        ("logits", torch.zeros(3)),
        ("precision_cholesky", torch.zeros(3, D, D)),
        ("pseudo_inputs", torch.zeros(8, 2)),
    ):
        with pytest.raises(ValueError, match=f"{name} must have shape"):
            setattr(prior, name, value)
    for value, message in (
        (torch.zeros(8, D, D), "positive diagonal"),
        (torch.ones(8, D, D), "lower triangular"),
        (torch.eye(D).expand(8, D, D) * math.nan, "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            prior.precision_cholesky = value
    with pytest.raises(ValueError, match="concentration must be a finite number above 0"):
        prior.concentration = -1.0
    with pytest.raises(ValueError, match="logits must not hold NaN"):
        prior.logits = torch.full((8,), math.nan)
    with pytest.raises(ValueError, match="z must be finite, but row 0"):
        prior.log_prob(torch.full((2, D), math.nan).double(), encoder)


@pytest.mark.parametrize("reuse_encoding", [False, True])
def test_compiles_without_graph_breaks(reuse_encoding):
    encoder, prior = Encoder(), vmm(reuse_encoding=reuse_encoding)

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
        torch.autograd.grad(compiled(x, noise), parameters),
        torch.autograd.grad(step(x, noise), parameters),
    )


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("rule", [True, False])
def test_map_loss_gradients_in_closed_form(full, rule):
    """With w the rule's weights and N, s, M their sums of 1, d and d d^T:

    m: -Lambda s / B + m / n;   s_j: N Lambda s_j / B + s_j / n (lower triangle, or diagonal);
    L: -[N diag(1/L) - tril((M + N S) L)] / B - [diag(1/L) - L / v] / n;
    gamma: -[psi(gamma) - psi(gamma/C) + mean log pi + 1/gamma^2] / n.
    """
    c, n, b = 4, 300, 50
    prior = vmm(c, responsibility_gradient=rule, data_size=n)
    m = torch.randn(c, D, dtype=torch.float64, requires_grad=True)
    s = 0.3 * torch.randn(c, D, D, dtype=torch.float64).tril()
    s.diagonal(dim1=-2, dim2=-1).abs_().add_(0.2)
    s = (s if full else s.diagonal(dim1=-2, dim2=-1).clone()).requires_grad_()
    z = torch.randn(b, D, dtype=torch.float64)

    def encoder(x):
        return MultivariateNormal(m, scale_tril=s) if full else Normal(m, s)

    targets = [m, s, prior.raw_precision, prior.raw_alpha]
    grads = torch.autograd.grad(prior.map_loss(z, encoder), targets)
    with torch.no_grad():
        joint = prior.log_joint(z, encoder)
        q = joint.softmax(-1)
        w = q * (1 + joint - (q * joint).sum(-1, keepdim=True)) if rule else q
        d = z[:, None] - m
        mass, first = w.sum(0), torch.einsum("bc,bcr->cr", w, d)
        second = torch.einsum("bc,bcr,bct->crt", w, d, d)
        factor, gamma = prior.precision_cholesky, prior.concentration
        precision = factor @ factor.mT
        matrix = s if full else torch.diag_embed(s)
        inverse = torch.diag_embed(1 / factor.diagonal(dim1=-2, dim2=-1))
        v = c ** (2 / D) / (D + 2)
        weighted = mass[:, None, None]
        expected_s = weighted * (precision @ matrix) / b + matrix / n
        data = weighted * inverse - ((second + weighted * (matrix @ matrix.mT)) @ factor).tril()
        expected_l = -data / b - (inverse - factor / v) / n
        # Through softplus on the diagonal: its derivative is 1 - exp(-softplus).
        slope = 1 - torch.exp(-factor.diagonal(dim1=-2, dim2=-1))
        expected_raw = expected_l.tril(-1) + torch.diag_embed(
            expected_l.diagonal(dim1=-2, dim2=-1) * slope
        )
        mean_log_pi = prior.logits.log_softmax(-1).mean()
        expected_gamma = (
            -(torch.digamma(gamma) - torch.digamma(gamma / c) + mean_log_pi + gamma**-2) / n
        )
        # gamma = 1 / softplus(raw)
        expected_raw_alpha = expected_gamma * -(gamma**2) * (1 - torch.exp(-1 / gamma))
    expected = (
        -(precision @ first[..., None])[..., 0] / b + m.detach() / n,
        expected_s.tril() if full else expected_s.diagonal(dim1=-2, dim2=-1),
        expected_raw,
        expected_raw_alpha,
    )
    torch.testing.assert_close(grads, expected, **TIGHT)
