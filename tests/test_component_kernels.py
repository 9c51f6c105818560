"""Components, the empirical-Bayes steps and likelihoods of counts in the Triton kernels.

They run under Triton's interpreter and are compared with the reference in float64.
"""

import contextlib

import pytest
import torch
from scipy.special import polygamma
from support import (
    FORMS,
    Computations,
    counted_launches,
    expanded,
    random_gaussians,
    strided,
)
from test_counts import (
    FEW,
    FUNCTIONS,
    MODELS,
    assert_equals_reference,
    random_counts,
    values_and_gradients,
)
from test_empirical_bayes import points, random_parameters

from vmm_fast import GaussianMixturePrior, VMMPrior, backends, ops, reference
from vmm_fast.counts import SoftmaxMean
from vmm_fast.inference.closed_form import Statistics
from vmm_fast.inference.empirical_bayes import MixtureParameters, Objective, Running, online_step

triton = pytest.importorskip("triton", reason="Triton is not installed")

# Where Triton is missing, nothing below may be imported.
import triton.language as tl  # noqa: E402

from vmm_fast.kernels import closed_form, launch, weight_priors  # noqa: E402
from vmm_fast.kernels import counts as count_kernels  # noqa: E402

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


# --- building the components ---


@pytest.mark.parametrize("dim", [1, 3, 40])
@pytest.mark.parametrize("expected", [False, True])
def test_a_singular_component_gives_nan(expected, dim):
    log_weights, precision_cholesky, scale = random_gaussians(2, 2, dim, "precision+full")
    precision_cholesky[1, 0, 0] = 0.0
    with kernels():
        _, offsets = ops.whitened_components(log_weights, precision_cholesky, scale, 2, expected)
    assert offsets.isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_that_a_prior_stores_are_computed_in_float32(dtype):
    stored = [x.to(dtype) for x in random_gaussians(2, 2, 3, "precision+full")]
    with kernels():
        found = ops.stored_components(*stored, 2)
        single = ops.stored_components(*(x.float() for x in stored), 2)
    for x, y in zip(found, single, strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, y)


def components_and_gradients(module, inputs, centers, expected, wanted=(True, True, True)):
    """whitening, offsets and the gradients of what is wanted."""
    leaves = [
        x if x is None else x.detach().clone().requires_grad_(want)
        for x, want in zip(inputs, wanted, strict=True)
    ]
    whitening, offsets = module.whitened_components(*leaves, centers, expected)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(whitening.shape, generator=generator, dtype=torch.float64)
    loss = (whitening * weights).sum() + (offsets * offsets.detach()).sum()
    by = [x for x in leaves if x is not None and x.requires_grad]
    grads = torch.autograd.grad(loss, by, allow_unused=True)
    return whitening, offsets, [g for g in grads if g is not None]


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("components", "centers", "dim"), [(3, 6, 10), (2, 2, 1), (2, 2, 32)])
def test_components(form, components, centers, dim, expected):
    inputs = random_gaussians(components, centers, dim, form)
    with kernels():
        found = components_and_gradients(ops, inputs, centers, expected)
    true = components_and_gradients(reference, inputs, centers, expected)
    torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-9)


def wide_gaussians(components, centers, dim, form):
    """Well-conditioned ones: a random triangle's condition grows exponentially with D."""
    log_weights, *factors = random_gaussians(components, centers, dim, form)
    for factor in factors:
        if factor is not None and factor.ndim == 3:
            below = factor.tril(-1) / dim
            factor.copy_(below + torch.diag_embed(factor.diagonal(dim1=-2, dim2=-1)))
            factor += torch.ones(dim, dim).triu(1)  # what is above the diagonal does not count
    return log_weights, *factors


@pytest.mark.parametrize(
    ("form", "expected"),
    [(form, False) for form in FORMS] + [("precision+full", True), ("precision+diagonal", True)],
)
@pytest.mark.parametrize(
    ("components", "centers", "dim"),
    [(2, 2, 33), pytest.param(1, 1, 65, marks=slow), pytest.param(1, 1, 128, marks=slow)],
)
def test_components_in_blocks(form, components, centers, dim, expected):
    inputs = wide_gaussians(components, centers, dim, form)
    with kernels(1):  # one program takes all
        found = components_and_gradients(ops, inputs, centers, expected)
    true = components_and_gradients(reference, inputs, centers, expected)
    torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_gradients_in_blocks_of_some_inputs(wanted, expected):
    inputs = wide_gaussians(1, 2, 40, "precision+full")
    with kernels():
        found = components_and_gradients(ops, inputs, 2, expected, wanted)
    true = components_and_gradients(reference, inputs, 2, expected, wanted)
    torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dim", [6, 40])
@pytest.mark.parametrize("form", ["precision+full", "precision+diagonal"])
def test_components_of_float32_with_unlike_scales(form, dim):
    log_weights, precision_cholesky, scale = wide_gaussians(3, 3, dim, form)
    deviation = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64).view(3, *[1] * (scale.ndim - 1))
    inputs = [x.float() for x in (log_weights, precision_cholesky, scale * deviation)]
    true = reference.whitened_components(*(x.double() for x in inputs), 3)
    with kernels():
        got = ops.whitened_components(*inputs, 3)
    for ours, exact in zip(got, true, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["precision+full", "precision+diagonal", "precision"])
@pytest.mark.parametrize(
    ("components", "centers", "dim"),
    [(3, 6, 10), (2, 2, 32), (2, 4, 40), pytest.param(300, 300, 1, marks=slow)],
)
def test_components_from_what_a_prior_stores(form, components, centers, dim):
    logits, raw_precision, scale = random_gaussians(components, centers, dim, form)
    logits[0] = -torch.inf
    L = reference.precision_cholesky(raw_precision)
    scale = None if scale is None else scale.requires_grad_()
    with kernels():
        whitening, offsets, *made = ops.stored_components(logits, raw_precision, scale, centers)
        torch.testing.assert_close(made, [logits.log_softmax(-1), L], **TIGHT)
        outputs = [(whitening, offsets)]
        outputs.append(reference.whitened_components(made[0], L, scale, centers))
        torch.testing.assert_close(*outputs, **TIGHT)
        if scale is None:
            return
        loss = ((whitening.sin().sum() + offsets.exp().sum()) for whitening, offsets in outputs)
        torch.testing.assert_close(*(torch.autograd.grad(x, scale) for x in loss), **TIGHT)


def test_components_that_are_not_positive_definite_give_nan():
    log_weights, precision_cholesky, scale = random_gaussians(3, 3, 4, "precision+full")
    precision_cholesky[1, 2, 2] = -1.0
    with kernels():
        _, offsets = ops.whitened_components(log_weights, precision_cholesky, scale, 3)
    assert offsets.isnan().tolist() == [False, True, False]


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


# --- log-likelihoods of counts ---


@pytest.fixture
def small_programs(monkeypatch):
    """Several programs for few genes and cells."""
    monkeypatch.setattr(count_kernels, "GENES_A_PROGRAM", 64)
    monkeypatch.setattr(count_kernels, "CELLS", 2)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("per_cell", [False, True], ids=["of genes", "of cells"])
@pytest.mark.parametrize("shape", [(3, 70), (1, 1), (0, 5), (3, 0)])
def test_counts(small_programs, shape, per_cell, model):
    """Within a block and a chunk, and beyond them."""
    with kernels():
        assert_equals_reference(model, *random_counts(*shape, per_cell=per_cell, depth=5.0))


@pytest.mark.parametrize("model", MODELS)
def test_counts_of_float32(model):
    with kernels():
        arguments = random_counts(3, 100, dtype=torch.float32)
        assert_equals_reference(model, *arguments, rtol=1e-4, atol=1e-5)


@triton.jit
def each_count_kernel(
    x, mu, theta, logits, value, by_mu, by_theta, by_l, N: tl.constexpr, MODEL: tl.constexpr
):
    i = tl.arange(0, N)
    given = (tl.load(x + i), tl.load(mu + i), tl.load(theta + i), tl.load(logits + i))
    DTYPE: tl.constexpr = given[0].dtype
    tl.store(value + i, count_kernels.log_prob_of(*given, MODEL, DTYPE))
    first, second, third = count_kernels.slopes_of(*given, MODEL, True, DTYPE)
    tl.store(by_mu + i, first)
    tl.store(by_theta + i, second)
    tl.store(by_l + i, third)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_at_the_extremes(model, dtype):
    grid = (
        [0, 1, 2, 5, 7, 8, 9, 17, 100, 10**6, 0.3, 2.5],
        [1e-8, 1e-3, 0.3, 50.0, 1e6],
        [1e-6, 1e-2, 0.7, 1e3, 1e6],
        [-30.0, -3.0, 0.0, 20.0],
    )
    inputs = torch.cartesian_prod(*(torch.tensor(x, dtype=dtype) for x in grid))
    inputs = [column.contiguous() for column in torch.cat([inputs, inputs[:848]]).T]
    found, *slopes = outputs = [torch.empty_like(inputs[0]) for _ in range(4)]
    each_count_kernel[(1,)](*inputs, *outputs, N=2048, MODEL=model)
    x, *parameters = (column.double()[:, None] for column in inputs)
    parameters = [p.requires_grad_() for p in parameters]
    true = reference.count_log_prob(x, *parameters[: FEW[model]])
    expected = torch.autograd.grad(true.sum(), parameters[: FEW[model]])
    single = dtype == torch.float32
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if single else {"rtol": 1e-9, "atol": 1e-8}
    torch.testing.assert_close(found.double(), true.detach(), **tolerance)
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if single else {"rtol": 1e-8, "atol": 3e-8}
    scales = (*(p.detach() for p in parameters[:2]), torch.ones_like(x))
    for p, a, b in zip(scales, slopes, expected, strict=False):
        # As of log mu and log theta; the reference loses digits where theta is large.
        torch.testing.assert_close(a.double()[:, None] * p, b * p, **tolerance)


@pytest.mark.parametrize(
    ("model", "which"), [(model, which) for model in MODELS for which in range(FEW[model] + 1)]
)
def test_a_nan_of_counts_is_not_lost(model, which):
    arguments = random_counts(4, 20, per_cell=True, dtype=torch.float32)[: 1 + FEW[model]]
    arguments[0][:3, 5] = torch.tensor([0, 3, 100])
    arguments[which][:3, 5] = torch.nan
    with kernels():
        found, *slopes = values_and_gradients(FUNCTIONS[model], *arguments)
    assert found.isnan().tolist() == [True, True, True, False]
    for index, slope in enumerate(slopes, 1):
        lost = slope.isnan()
        # Where the parameter or the count is a NaN, its gradient is.
        assert lost[:3, 5].all() or which not in (0, index)
        lost[:3, 5] = False
        assert not lost.any()


def test_negative_counts_give_nan():
    x, *parameters = random_counts(3, 20)
    x[1, 7] = -1
    for model in MODELS:
        with kernels():
            found = values_and_gradients(FUNCTIONS[model], x, *parameters[: FEW[model]])
        assert found[0].isnan().tolist() == [False, True, False]
        assert all(slope[..., 7].isnan().any() for slope in found[1:])


def test_a_mean_of_zero_is_finite_and_has_no_gradient():
    x, mean, theta, logits = random_counts(3, 20)
    mean[:, ::3], theta[::4] = 0, 0
    with kernels():
        assert_equals_reference("zinb", x, mean, theta, logits, rtol=1e-9, atol=1e-9)
        slopes = values_and_gradients(FUNCTIONS["zinb"], x, mean, theta, logits)[1:]
    assert (slopes[0][:, ::3] == 0).all() and (slopes[1][::4] == 0).all()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_counts_with_a_softmax_mean(model, wanted):
    x, mean, *rest = random_counts(3, 20)
    rest = rest[: FEW[model] - 1]
    inputs = mean.log(), 2 * mean.sum(-1)

    def ours(x, logits, library_size):
        return FUNCTIONS[model](x, SoftmaxMean(logits, library_size), *rest)

    def true(x, logits, library_size):
        return reference.count_log_prob(x, logits, *rest, library_size=library_size)

    found = []
    for function, context in ((ours, kernels()), (true, contextlib.nullcontext())):
        given = [p.clone().requires_grad_(want) for p, want in zip(inputs, wanted, strict=True)]
        with context:
            value = function(x, *given)
            asked = [p for p in given if p.requires_grad]
            found.append((value.detach(), *torch.autograd.grad(value.square().sum(), asked)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", [strided, expanded])
def test_counts_of_any_layout(layout):
    arguments = [layout(x) if x.ndim == 2 else x for x in random_counts(4, 19)]
    with kernels():
        assert_equals_reference("zinb", *arguments)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_counts_and_another_run_give_the_same_bits(small_programs):
    x, *parameters = random_counts(3, 70, dtype=torch.float32)
    with kernels():
        found = [
            values_and_gradients(FUNCTIONS["zinb"], x, *parameters)
            for x in (x, x, x.to_sparse_csr())
        ]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("shape", [(3, 70), (2, 20)])
@pytest.mark.parametrize("model", MODELS)
def test_launches_of_counts(small_programs, launched, model, shape):
    """Forward, backward, and a sum of what was split."""
    x, *parameters = random_counts(*shape)
    given = (x, None, None, *parameters[: FEW[model]], *[None] * (4 - FEW[model]))
    grad, wanted = torch.ones(len(x), dtype=x.dtype), [p is not None for p in given[3:]]
    with kernels(), Computations() as computed:
        backends.call("count_log_prob", x, 1, *given)
        backends.call("count_log_prob_backward", grad, 1, grad, *given, wanted)
    assert launched == ["count_log_prob_kernel", "count_log_prob_backward_kernel"]
    sums = 0 if shape == (2, 20) else 1 if model == "poisson" else 2
    assert computed.names == ["sum.dim_IntList"] * sums
