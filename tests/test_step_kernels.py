"""Components, the empirical-Bayes steps and likelihoods of counts in the Triton kernels.

They run under Triton's interpreter and are compared with the reference in float64.
"""

import contextlib

import pytest
import torch
from scipy.special import polygamma
from support import (
    Computations,
    counted_launches,
)
from test_empirical_bayes import points, random_parameters

from vmm_fast import GaussianMixturePrior, VMMPrior, backends
from vmm_fast.inference.closed_form import Statistics
from vmm_fast.inference.empirical_bayes import MixtureParameters, Objective, Running, online_step

triton = pytest.importorskip("triton", reason="Triton is not installed")

# Where Triton is missing, nothing below may be imported.
import triton.language as tl  # noqa: E402

from vmm_fast.kernels import closed_form, launch, weight_priors  # noqa: E402

if not triton.knobs.runtime.interpret:
    pytest.skip("these run in Triton's interpreter", allow_module_level=True)

# numpy, which the interpreter computes with, warns of an overflow; a GPU does not.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("quick_interpreter"),
]

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
slow = pytest.mark.slow("a large shape in the interpreter")


@contextlib.contextmanager
def kernels(programs=512):
    """Run every operation in the kernels; more ``programs`` than points and components split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "FORCED", "triton")
        patch.setattr(launch, "PROGRAMS", programs)
        yield


@pytest.fixture
def launched():
    """Names of the kernels launched."""
    with counted_launches() as names:
        yield names


# --- the empirical-Bayes step ---


def map_gradients(prior, z, encoder):
    """Loss and gradients of a step, without taking it."""
    step = prior._step(z, encoder)
    return step.loss, [g for g in step.gradients if g is not None]


def small_prior(latent_dim=3, full=False, components=5, **options):
    """A prior of two pseudo-inputs a component, its encoder, and points that several explain."""
    torch.manual_seed(0)
    inputs = torch.randn(2 * components, 5, dtype=torch.float64)
    outputs = latent_dim + latent_dim * (latent_dim if full else 1)
    network = torch.nn.Linear(5, outputs, dtype=torch.float64)
    spread = 3 / latent_dim

    def encoder(x):
        mean, rest = (spread * network(x)).split([latent_dim, outputs - latent_dim], -1)
        if not full:
            return torch.distributions.Normal(mean, rest.exp())
        matrix = rest.unflatten(-1, (latent_dim, latent_dim))
        diagonal = matrix.diagonal(dim1=-2, dim2=-1).exp()
        scale = matrix.tril(-1) + torch.diag_embed(diagonal)
        return torch.distributions.MultivariateNormal(mean, scale_tril=scale)

    prior = VMMPrior(inputs, latent_dim, pseudo_inputs_per_component=2, **options).double()
    vary(prior, 0.1 * spread)
    return prior, encoder, torch.randn(90, latent_dim, dtype=torch.float64)


def vary(prior, spread):
    """Make components unlike."""
    with torch.no_grad():
        prior.logits.normal_()
        prior.raw_precision.add_(spread * torch.randn_like(prior.raw_precision))


def assert_steps_are_equal(prior, z, encoder, programs=512):
    """Loss and gradients from the kernels and from torch."""
    with kernels(programs):
        loss, gradients = map_gradients(prior, z, encoder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "FORCED", "reference")
        expected_loss, expected = map_gradients(prior, z, encoder)
    torch.testing.assert_close(float(loss), float(expected_loss), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "full", "programs"),
    [
        ({"map_prior": "learnt", "data_size": 500}, False, 1),
        ({"map_prior": "fixed"}, True, 512),
        ({"map_prior": "none", "responsibility_gradient": False}, False, 512),
        ({"map_prior": "learnt", "weights": "stick-breaking"}, True, 1),
        ({"map_prior": "learnt", "weights": "stick-breaking", "discount": 0.3}, False, 512),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else None,
)
def test_gradients_of_the_empirical_bayes_step(options, full, programs):
    prior, encoder, z = small_prior(full=full, **options)
    assert_steps_are_equal(prior, z, encoder, programs)


LEARNT = {"map_prior": "learnt", "data_size": 500}
NO_PRIOR = {"map_prior": "none", "responsibility_gradient": False}
STICKS = {"map_prior": "learnt", "weights": "stick-breaking", "discount": 0.3}


@pytest.mark.parametrize(
    ("dim", "form", "components", "programs", "options"),
    [
        (33, "diagonal", 2, 1, LEARNT),  # one program takes all components
        (33, "full", 2, 512, STICKS),
        (33, "free", 3, 512, NO_PRIOR),
        pytest.param(40, "full", 2, 1, NO_PRIOR, marks=slow),
        pytest.param(65, "diagonal", 2, 512, {"map_prior": "fixed"}, marks=slow),
        pytest.param(65, "full", 2, 512, {**LEARNT, "responsibility_gradient": False}, marks=slow),
        pytest.param(65, "free", 2, 1, STICKS, marks=slow),
        pytest.param(128, "full", 1, 512, LEARNT, marks=slow),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_gradients_of_the_step_in_blocks(dim, form, components, programs, options):
    if form == "free":
        torch.manual_seed(0)
        encoder, spread = None, 3 / dim
        centers = spread * torch.randn(components, dim, dtype=torch.float64)
        prior = GaussianMixturePrior(components, dim, centers, **options).double()
        vary(prior, 0.1 * spread)
        z = torch.randn(90, dim, dtype=torch.float64)
    else:
        prior, encoder, z = small_prior(dim, form == "full", components, **options)
    assert_steps_are_equal(prior, z[:20], encoder, programs)


def test_gradients_of_a_step_with_pruned_and_tiny_components():
    for options in ({}, {"weights": "stick-breaking", "discount": 0.3}):
        prior, encoder, z = small_prior(**options)
        with torch.no_grad():
            prior.logits[0], prior.logits[3] = -torch.inf, -40.0
        assert_steps_are_equal(prior, z, encoder)


@pytest.mark.parametrize(("dim", "programs"), [(3, 1), (3, 512), (33, 512)])
def test_launches_of_an_empirical_bayes_step(launched, dim, programs):
    prior, encoder, z = small_prior(dim, components=2)
    with kernels(programs):
        prior.update(z[:20], encoder)
    assert len(launched) == 4


@triton.jit
def gamma_functions_kernel(x, log_gamma, psi, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(log_gamma + i, weight_priors.lgamma(value))
    tl.store(psi + i, weight_priors.digamma(value))


def test_log_gamma_and_digamma():
    x = torch.logspace(-8, 8, 64, dtype=torch.float64)
    log_gamma, psi = torch.empty_like(x), torch.empty_like(x)
    gamma_functions_kernel[(1,)](x, log_gamma, psi, N=64)
    torch.testing.assert_close(log_gamma, torch.lgamma(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(psi, torch.digamma(x), rtol=1e-12, atol=1e-12)


# --- the online step in closed form ---

FORMS_OF_CENTERS = {"free": (1, None), "diagonal": (2, "diagonal"), "full": (2, "full")}


def mixture_of(form, c=3, dtype=torch.float64):
    per_component, scale = FORMS_OF_CENTERS[form]
    return random_parameters(c=c, k=per_component, scale=scale, dtype=dtype)


def no_sums(parameters):
    total, dim = parameters.centers.shape
    shapes = ((total,), (total, dim), (total, dim, dim), (total, dim))
    sums = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)
    return Running(Statistics(*sums), torch.zeros((), dtype=torch.int64))


def after_online_steps(parameters, objective, batches, backend, programs=512, temperature=1.0):
    """Running sums and parameters after some online steps, the centers moving between them."""
    parameters = MixtureParameters(
        *(
            x if x is None else x.detach().clone().requires_grad_(x.requires_grad)
            for x in parameters
        )
    )
    running, free = no_sums(parameters), parameters.scale is None
    with torch.no_grad(), kernels(programs), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "FORCED", backend)
        patch.setattr(closed_form, "BLOCK", 2)  # several of them have all components
        for z in batches:
            settings = {"temperature": temperature, "rate": 0.2, "free_centers": free}
            online_step(parameters, z, running, objective, **settings)
            parameters.centers.add_(0.1)
    return [*running.sums, running.steps, *(x for x in parameters if x is not None)]


def assert_online_steps(parameters, objective, batches, tolerance=1e-8, **settings):
    """The kernels take the same steps as torch; gives what they came to."""
    expected = after_online_steps(parameters, objective, batches, "reference", **settings)
    found = after_online_steps(parameters, objective, batches, "triton", **settings)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    return found


def objective_of(map_prior="learnt", weights="dirichlet", discount=0.0, data_size=None):
    return Objective(map_prior, weights, discount, True, data_size)


@pytest.mark.parametrize(
    ("form", "objective", "programs", "temperature"),
    [
        ("free", objective_of("none"), 1, 1.0),
        ("diagonal", objective_of("fixed"), 512, 0.7),
        ("full", objective_of("learnt", data_size=500), 512, 1.0),
        ("free", objective_of("fixed", "stick-breaking", 0.3), 512, 2.0),
        ("full", objective_of("learnt", "stick-breaking"), 1, 0.7),
        ("diagonal", objective_of("none"), 1, 1.0),
    ],
)
def test_online_steps(form, objective, programs, temperature):
    batches = [points(seed=seed, b=20) for seed in (1, 2, 3)]
    settings = {"programs": programs, "temperature": temperature}
    assert_online_steps(mixture_of(form), objective, batches, **settings)


@pytest.mark.parametrize("form", ["free", "full"])
def test_online_steps_of_float32(form):
    batches = [points(seed=seed, dtype=torch.float32) for seed in (1, 2)]
    parameters = mixture_of(form, dtype=torch.float32)
    assert_online_steps(parameters, objective_of(), batches, tolerance=1e-4)


def test_online_steps_with_pruned_components():
    parameters = mixture_of("diagonal")
    with torch.no_grad():
        parameters.logits[1] = -torch.inf
    for objective in (objective_of(), objective_of("fixed", "stick-breaking")):
        found = assert_online_steps(parameters, objective, [points(b=20), points(b=20, seed=2)])
        logits = found[-2]
        assert logits.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("map_prior", ["none", "learnt"])
def test_online_steps_with_a_component_without_points(map_prior):
    """Its center stays without a prior; so does its precision, where its scatter is singular."""
    parameters = mixture_of("free")
    with torch.no_grad():
        parameters.centers[1] = 1e3
    assert_online_steps(parameters, objective_of(map_prior), [points(b=20), points(b=20, seed=2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_scatter_keeps_the_precision_in_an_online_step(dtype):
    parameters, z = mixture_of("free", c=1, dtype=dtype), points(b=20, dtype=dtype)
    z[:, 1] = z[:, 0]
    with torch.no_grad():
        parameters.centers.copy_(z.mean(0, keepdim=True))
    before = parameters.raw_precision.clone()
    running = no_sums(parameters)
    settings = {"temperature": 1.0, "rate": 1.0, "free_centers": True}
    with torch.no_grad(), kernels():
        online_step(parameters, z, running, objective_of("none"), **settings)
    assert torch.equal(parameters.raw_precision, before)


@pytest.mark.parametrize("map_prior", ["fixed", "learnt"])
def test_online_steps_with_fewer_points_than_components(map_prior):
    """No component has the mass that the prior takes off, so that mass alone tells them apart."""
    parameters = mixture_of("free", c=6)
    with torch.no_grad():
        parameters.raw_alpha.fill_(30.0)  # gamma = 1 / 30
    objective = objective_of(map_prior, data_size=1)
    mass = assert_online_steps(parameters, objective, [points(b=3)])[0]
    assert mass.max() < 1 - 1 / 30


def test_online_steps_of_even_counts():
    """They are more even than any concentration explains, which goes to its upper end."""
    parameters = mixture_of("free", c=2)
    with torch.no_grad():
        for x in parameters[:1] + parameters[2:4]:
            x.zero_()
    *_, raw_alpha = assert_online_steps(parameters, objective_of(data_size=5), [points(b=20)])
    torch.testing.assert_close(1 / torch.nn.functional.softplus(raw_alpha).item(), 1e6)


@pytest.mark.parametrize("still", range(4))
def test_online_steps_leave_what_is_not_learnt(still):
    parameters = mixture_of("free")
    (parameters.centers, *parameters[2:])[still].requires_grad_(False)
    found = assert_online_steps(parameters, objective_of(), [points(b=20)])
    moved = (found[5] - 0.1, *found[6:])
    before = (parameters.centers, *parameters[2:])
    for index, (x, y) in enumerate(zip(moved, before, strict=True)):
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-12) == (index == still)


@pytest.mark.parametrize("form", ["free", "full"])
def test_an_online_step_is_four_launches_and_no_wait(launched, form):
    parameters, z = mixture_of(form), points()
    versions = [x._version for x in parameters[2:]]
    running = no_sums(parameters)
    settings = {"temperature": 0.7, "rate": 0.1, "free_centers": form == "free"}
    with torch.no_grad(), kernels(), Computations() as computed:
        online_step(parameters, z, running, objective_of(), **settings)
    assert len(launched) == 4
    assert computed.names == []
    assert all(x._version > v for x, v in zip(parameters[2:], versions, strict=True))


@pytest.mark.parametrize(
    ("form", "weights", "steps"),
    [("free", "dirichlet", 1), ("diagonal", "stick-breaking", 1), ("free", "stick-breaking", 0)],
)
def test_a_point_that_is_not_finite_moves_nothing(form, weights, steps):
    parameters, z = mixture_of(form), points()
    running, objective = no_sums(parameters), objective_of(weights=weights)
    settings = {"temperature": 1.0, "rate": 0.1, "free_centers": form == "free"}
    with torch.no_grad(), kernels():
        for _ in range(steps):
            online_step(parameters, z, running, objective, **settings)
        before = [x.clone() for x in (*parameters, *running.sums, running.steps) if x is not None]
        z[3, 1] = torch.nan
        online_step(parameters, z, running, objective, **settings)
    after = [x for x in (*parameters, *running.sums, running.steps) if x is not None]
    for x, old in zip(after, before, strict=True):
        assert torch.equal(x, old)


@pytest.mark.parametrize("weights", ["dirichlet", "stick-breaking"])
def test_priors_in_closed_form_take_their_steps_in_kernels(launched, weights):
    centers = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    free = GaussianMixturePrior(3, 3, centers, weights=weights, inference="closed-form")
    vmm, encoder, z = small_prior(weights=weights, inference="closed-form")
    for prior in (free, vmm):
        with kernels():
            prior.update(z[:20], encoder if prior is vmm else None)
        assert launched[-4:] == [
            "tempered_kernel",
            "log_prob_kernel",
            "expected_sums_kernel",
            "maximise_kernel",
        ]
        assert prior.running_steps == 1


@triton.jit
def functions_kernel(x, psi, raw, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(psi + i, closed_form.trigamma(value))
    tl.store(raw + i, closed_form.inverse_softplus(value))


def test_trigamma_and_inverse_softplus():
    x = torch.logspace(-8, 8, 64, dtype=torch.float64)
    psi, raw = torch.empty_like(x), torch.empty_like(x)
    functions_kernel[(1,)](x, psi, raw, N=64)
    torch.testing.assert_close(psi, torch.from_numpy(polygamma(1, x.numpy())), rtol=1e-13, atol=0)
    torch.testing.assert_close(raw, x + torch.log(-torch.expm1(-x)), rtol=1e-13, atol=1e-13)
