"""The priors' updates: the private Adam, launches and operators of a step, and errors."""

import math

import pytest
import torch
from conftest import ON_GPU
from support import counted_launches, on_backends, threads
from test_empirical_bayes import inferences, points, random_parameters
from torch.distributions import Independent, MultivariateNormal, Normal
from torch.profiler import ProfilerActivity, profile

from vmm_fast import GaussianMixturePrior, VMMPrior
from vmm_fast.inference import empirical_bayes
from vmm_fast.inference.gradient import PrivateAdam

# --- the private Adam ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_adam_is_torchs(dtype):
    """The private Adam takes torch's steps, in the core and for dtypes beyond it."""
    torch.manual_seed(0)
    ours = [torch.randn(7, 5, dtype=dtype, requires_grad=True), torch.zeros((), dtype=dtype)]
    ours[1].requires_grad_()
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    mine, other = PrivateAdam([(ours, 1e-2)]), torch.optim.Adam(theirs, lr=1e-2, eps=1e-7)
    for step in range(5):
        gradients = [torch.randn_like(x) for x in ours]
        if step == 2:
            gradients[1] = None  # that parameter stands still
        for x, g in zip(theirs, gradients, strict=True):
            x.grad = g
        versions = [x._version for x in ours]
        mine.descend(0.0, gradients)
        other.step()
        assert (ours[1]._version > versions[1]) == (step != 2)
    for x, y in zip(ours, theirs, strict=True):
        assert x.grad is None
        torch.testing.assert_close(x, y, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)
    saved = mine.state_dict()
    torch.testing.assert_close(saved["state"], other.state_dict()["state"], rtol=1e-5, atol=1e-7)
    other.load_state_dict(saved)
    mine.load_state_dict(other.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_takes_no_step_from_a_gradient_that_is_not_finite(dtype):
    x = torch.zeros(100, dtype=dtype, requires_grad=True)
    adam = PrivateAdam([([x], 1e-2)])
    gradient = torch.zeros(100, dtype=dtype)
    gradient[77] = math.nan
    with pytest.raises(FloatingPointError, match="the prior is unchanged"):
        adam.descend(0.0, [gradient])
    with pytest.raises(FloatingPointError, match="loss is inf"):
        adam.descend(math.inf, [torch.zeros(100, dtype=dtype)])
    assert (x == 0).all() and not adam.state_dict()["state"]


# --- the priors' step ---


def stored_encoder(total, d, full, dtype=torch.float32):
    mean = torch.randn(total, d, dtype=dtype)
    scale = torch.rand(total, d, dtype=dtype) + 0.1
    if full:
        q = MultivariateNormal(mean, scale_tril=torch.diag_embed(scale))
    else:
        q = Independent(Normal(mean, scale), 1)
    return lambda inputs: q


def prior_of(kind, d=3, **options):
    """Return a prior of this kind with a step in every call, and its encoder if it has one."""
    torch.manual_seed(0)
    if kind == "free":
        return GaussianMixturePrior(4, d, **options), None
    options = {"update_every": 1, **options}
    return VMMPrior(torch.randn(4, 4), d, **options), stored_encoder(4, d, kind == "full")


interpreted = pytest.mark.skipif(ON_GPU, reason="counts the interpreter's launches")


@interpreted
@pytest.mark.parametrize(
    ("backend", "kind", "d", "weights"),
    [
        ("triton", "diagonal", 3, "dirichlet"),
        ("triton-split", "full", 17, "stick-breaking"),
    ],
    indirect=["backend"],
)
def test_an_update_is_four_launches(backend, kind, d, weights):
    prior, encoder = prior_of(kind, d, weights=weights)
    with counted_launches() as launched:
        prior.update(torch.randn(20, d), encoder)
    kernels = ("expected", "log_prob", "expected_sums", "map_gradients")
    assert launched == [f"{name}_kernel" for name in kernels]


@pytest.mark.parametrize(
    ("inference", "weights", "full", "given"),
    [
        ("gradient", "dirichlet", True, "z"),
        ("gradient", "stick-breaking", False, "q"),
        ("closed-form", "dirichlet", False, "z"),
        ("closed-form", "stick-breaking", True, "q"),
        ("gradient", "dirichlet", True, "q"),
    ],
)
def test_few_torch_operators(inference, weights, full, given):
    prior, encoder = prior_of("full" if full else "diagonal", inference=inference, weights=weights)
    q = stored_encoder(20, 3, full)(None)
    batch = q if given == "q" else q.mean
    for _ in range(2):
        prior.update(batch, encoder)
        prior.kl(q, encoder)
    for call, x in ((prior.update, batch), (prior.kl, q)):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            call(x, encoder)
        names = [e.name for e in profiled.events() if e.name.startswith("aten::")]
        assert 0 < len(names) <= 15, names


@pytest.mark.parametrize("full", [True, False])
def test_drawn_latents_follow_the_posterior(full):
    torch.manual_seed(0)
    mean = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    factor = torch.tensor([[[0.5, 0.0], [0.7, 0.2]], [[2.0, 0.0], [0.0, 1.0]]]).double()
    if full:
        q = MultivariateNormal(mean, scale_tril=factor)
    else:
        factor = torch.diag_embed(factor.diagonal(dim1=-2, dim2=-1))
        q = Normal(mean, factor.diagonal(dim1=-2, dim2=-1))
    prior = GaussianMixturePrior(2, 2)
    z = torch.stack([prior._latents(q) for _ in range(4000)])
    torch.testing.assert_close(z.mean(0), mean, rtol=0, atol=0.15)
    d = z - mean
    covariance = torch.einsum("nbr,nbt->brt", d, d) / len(d)
    torch.testing.assert_close(covariance, factor @ factor.mT, rtol=0.1, atol=0.05)


@inferences
@pytest.mark.parametrize("kind", ["free", "full"])
def test_errors_leave_everything_as_it_was(inference, kind):
    prior, encoder = prior_of(kind, inference=inference)
    before = [x.detach().clone() for x in (*prior.parameters(), *prior.buffers())]
    z = torch.randn(50, 3)
    for x, where, message in (
        (z, (7, 1), "z must be finite, but row 7"),
        (prior.logits, 1, "logits must be finite or -inf, but row 1"),
        (
            prior.raw_precision,
            (3, 1, 1),
            "component 3 has no positive-definite|row 3 has a NaN",
        ),
    ):
        kept = x.detach().clone()
        with torch.no_grad():
            x[where] = math.nan
        with pytest.raises(ValueError, match=message):
            prior.update(z, encoder)
        with torch.no_grad():
            x.copy_(kept)
        after = (*prior.parameters(), *prior.buffers())
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@on_backends("core", "plain")
def test_an_encoder_may_give_views_of_the_pseudo_inputs(backend):
    """The closed form's sums are around the centers that they were evaluated at."""

    def encoder(copy):
        def encode(u):
            mean, scale = u[..., 0], u[..., 1].exp()
            return Independent(Normal(mean.clone() if copy else mean, scale), 1)

        return encode

    generator = torch.Generator().manual_seed(0)
    u = torch.randn(6, 3, 2, generator=generator, dtype=torch.float64)
    states = []
    for copy in (True, False):
        prior = VMMPrior(u, 3, inference="closed-form", learning_rate=0.1, data_size=100)
        for _ in range(3):
            prior.update(points(), encoder(copy))
        states.append({name: x for name, x in prior.state_dict().items() if torch.is_tensor(x)})
    assert "running_centers" in states[0]
    for name, x in states[0].items():
        assert torch.equal(x, states[1][name]), name


# --- weighted points ---


@on_backends("core", "plain")
@pytest.mark.parametrize(
    ("size", "count", "unit"),
    [
        ({"c": 5, "k": 2, "d": 3}, 700, 1.0),
        ({"c": 100, "d": 20}, 64, 1.0),  # threads share out components
        ({"c": 5, "d": 3, "dtype": torch.float32}, 700, 1e-17),  # squares need float64
    ],
)
def test_weighted_sums_are_those_of_repeated_points(backend, size, count, unit):
    parameters, z = random_parameters(scale=None, **size), points(size["d"], b=count)
    factor = empirical_bayes.precision_cholesky(parameters.raw_precision)
    parameters = parameters._replace(
        centers=unit * parameters.centers.detach(),
        raw_precision=empirical_bayes.raw_precision(factor.detach() / unit),
    )
    z = unit * z.to(parameters.centers.dtype)
    weights = torch.arange(count, dtype=torch.float64) % 3
    repeated = z.repeat_interleave(weights.long(), 0)
    with threads(2):
        found, total = empirical_bayes.statistics(parameters, z, weights)
        expected, total_of_repeated = empirical_bayes.statistics(parameters, repeated)
    tolerance = 1e-11 if z.dtype == torch.float64 else 1e-5
    for name, a, b, power in zip("Nsm", found, expected, (0, 1, 2), strict=False):
        a, b = a / unit**power, b / unit**power
        torch.testing.assert_close(a, b, rtol=tolerance, atol=count * tolerance, msg=name)
    assert total == total_of_repeated or total == pytest.approx(total_of_repeated, rel=tolerance)


def test_a_fit_to_weighted_points_is_that_to_repeated_ones():
    z = points()
    weights = torch.arange(len(z)) % 3
    weighted, repeated = (GaussianMixturePrior(2, 3, z[:2], map_prior="fixed") for _ in range(2))
    history = weighted.fit(z.split(10), weights=weights)
    assert history == pytest.approx(repeated.fit(z.repeat_interleave(weights, 0)))
    torch.testing.assert_close(weighted.centers, repeated.centers)
    for wrong, message in (
        (weights[1:], "weights must be of as many points as z, but has 36"),
        (-weights, "weights must be finite numbers of at least 0"),
        (0 * weights, "z must have at least one point"),
    ):
        with pytest.raises(ValueError, match=message):
            weighted.fit(z, weights=wrong)
