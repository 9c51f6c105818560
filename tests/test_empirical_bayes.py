"""The empirical-Bayes steps of the core and of the kernels against their definitions in torch."""

import contextlib
import itertools
import math

import pytest
import torch
from support import (
    expanded,
    negated,
    on,
    on_backends,
    random_components,
    shifted,
    strided,
    threads,
)
from torch.nn.functional import softplus

from vmm_fast import backends, reference
from vmm_fast.inference import closed_form, empirical_bayes
from vmm_fast.inference.empirical_bayes import MixtureParameters, Objective, Running

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
DIRICHLET, STICKS, PITMAN_YOR = ("dirichlet", 0.0), ("stick-breaking", 0.0), ("stick-breaking", 0.3)


def random_parameters(c=5, k=1, d=3, scale="full", dtype=torch.float64, device=None):
    components = random_components(c=c, k=k, d=d, scale=scale)
    centers, raw = components.centers, empirical_bayes.raw_precision(components.precision_cholesky)
    if d > 30:  # a random triangle's condition grows exponentially with D; and soft assignments
        centers, raw = centers * 3 / d, raw.tril(-1) / d + torch.diag_embed(raw.diagonal(0, 1, 2))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(c, generator=generator, dtype=torch.float64)
    stored = (centers, components.scale, raw, logits, torch.tensor(0.3, dtype=torch.float64))
    stored = (x if x is None else x.detach().requires_grad_() for x in on(device, stored, dtype))
    return MixtureParameters(*stored)


def copied(parameters, dtype=None):
    """Return a copy of the tensors, with the same requires_grad."""

    def copy(x):
        return x.detach().to(dtype or x.dtype, copy=True).requires_grad_(x.requires_grad)

    return MixtureParameters(*(x if x is None else copy(x) for x in parameters))


def points(d=3, dtype=torch.float64, seed=1, b=37, device=None):
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(b, d, generator=generator, dtype=torch.float64)
    return z.to(device, dtype) if d <= 30 else z.to(device, dtype) / 2


def objective_of(map_prior="learnt", weights=DIRICHLET, data_size=37, responsibility_gradient=True):
    return Objective(map_prior, *weights, responsibility_gradient, data_size)


@pytest.fixture
def device(backend, monkeypatch):
    """Return the backend's device; kernels take only two logits at a time."""
    if backends.FORCED == "triton":
        from vmm_fast.kernels import empirical_bayes

        monkeypatch.setattr(empirical_bayes, "BLOCK", 2)
    return backend


in_core_and_kernels = on_backends("core", "triton")
in_core = on_backends("core")


def in_each_backend(names, rows):
    """Run all cases in the core, and in the kernels, every other one with split work."""
    kinds = itertools.cycle(["triton", "triton-split"])
    cases = [("core", *row) for row in rows] + [(next(kinds), *row) for row in rows]
    return pytest.mark.parametrize(("backend", *names), cases, indirect=["backend"])


@contextlib.contextmanager
def in_torch():
    """Run the definitions in torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "FORCED", "reference")
        yield


# --- the gradient step ---


def both_gradients(parameters, z, objective):
    learnt = [x for x in parameters if x is not None]
    *found, _ = empirical_bayes.map_gradients(parameters, z, objective, learnt)
    with in_torch():
        *true, _ = empirical_bayes.map_gradients(parameters, z, objective, learnt)
    return found, true


def assert_gradients(parameters, z, objective):
    (loss, gradients), (true_loss, true) = both_gradients(parameters, z, objective)
    assert isinstance(loss, float) == (backends.FORCED != "triton")
    assert float(loss) == pytest.approx(true_loss.item(), rel=1e-10)
    for found, value in zip(gradients, true, strict=True):
        assert (found is None) == (value is None)
        if value is not None:
            scale = value.abs().max().item() or 1.0
            torch.testing.assert_close(found / scale, value / scale, **TIGHT)


@in_each_backend(
    ("scale", "k", "responsibility_gradient", "data_size", "map_prior", "weights"),
    [  # all pairs
        ("full", 1, False, 1000, "fixed", DIRICHLET),
        ("full", 2, True, 37, "none", STICKS),
        ("full", 2, False, 37, "learnt", PITMAN_YOR),
        ("diagonal", 2, True, 1000, "none", DIRICHLET),
        ("diagonal", 1, False, 1000, "learnt", STICKS),
        ("diagonal", 2, True, 37, "fixed", PITMAN_YOR),
        (None, 2, True, 37, "learnt", DIRICHLET),
        (None, 1, True, 37, "fixed", STICKS),
        (None, 1, False, 1000, "none", PITMAN_YOR),
    ],
)
def test_map_gradients(device, scale, k, responsibility_gradient, data_size, map_prior, weights):
    objective = objective_of(map_prior, weights, data_size, responsibility_gradient)
    parameters = random_parameters(k=k, scale=scale, device=device)
    assert_gradients(parameters, points(device=device), objective)


@in_each_backend(
    ("d", "scale", "k", "objective"),
    [
        (17, "full", 2, objective_of(data_size=500)),
        (32, "diagonal", 1, objective_of(weights=PITMAN_YOR)),
        (33, "full", 1, objective_of("fixed")),
    ],
)
def test_map_gradients_in_more_dimensions(device, d, scale, k, objective):
    """Gradients equal those of plain torch in the larger tile and beyond it, without a warning."""
    parameters = random_parameters(c=2, k=k, d=d, scale=scale, device=device)
    assert_gradients(parameters, points(d, b=20, device=device), objective)


@pytest.mark.parametrize(
    ("spread", "pruned", "scale", "responsibility_gradient", "shape"),
    [  # all pairs; points near all components, and near few
        (1, False, "full", True, (1, 3, 37)),
        (1, False, None, False, (1, 3, 37)),
        (60, True, "diagonal", False, (1, 3, 37)),
        (1, False, "diagonal", True, (2, 21, 400)),
        (60, True, "full", True, (2, 21, 400)),
        (60, True, None, False, (2, 21, 400)),
        (1, True, None, True, (1, 10, 2500)),
        (60, False, "full", False, (1, 10, 2500)),
        (60, False, "diagonal", True, (1, 10, 2500)),
    ],
)
def test_gradients_and_sums_together(isa, responsibility_gradient, scale, pruned, spread, shape):
    k, d, b = shape
    parameters, z = spread_out(random_parameters(c=7, k=k, d=d, scale=scale), spread, pruned, b)
    assert_sums_come_along(parameters, z, responsibility_gradient, rtol=1e-9)


@pytest.mark.parametrize(
    ("responsibility_gradient", "spread", "dtype", "shape"),
    [  # all pairs; components shared out with l kept, and samples shared out
        (False, 30, torch.float32, (100, 10, 256)),
        (True, 1, torch.float64, (100, 10, 256)),
        (True, 30, torch.float32, (60, 21, 300)),
        (False, 1, torch.float64, (60, 21, 300)),
        (True, 30, torch.float64, (100, 10, 6000)),
        (False, 1, torch.float32, (100, 10, 6000)),
    ],
)
def test_gradients_and_sums_together_on_two_threads(responsibility_gradient, spread, dtype, shape):
    c, d, b = shape
    parameters, z = spread_out(random_parameters(c=c, d=d, dtype=dtype), spread, True, b)
    with threads(2):
        rtol = 1e-9 if dtype == torch.float64 else 2e-4
        assert_sums_come_along(parameters, z, responsibility_gradient, rtol)


def spread_out(parameters, spread, pruned, b):
    """The same further apart, perhaps one pruned, and points that belong to all in turn."""
    with torch.no_grad():
        parameters.centers.mul_(spread)
        if pruned:
            parameters.logits[2] = -math.inf
    of = torch.arange(b) % len(parameters.centers)
    noise = points(parameters.centers.shape[1], b=b, dtype=parameters.centers.dtype)
    return parameters, parameters.centers[of].detach() + noise


def assert_sums_come_along(parameters, z, responsibility_gradient, rtol):
    objective = objective_of(data_size=1000, responsibility_gradient=responsibility_gradient)
    learnt = [x for x in (*parameters[:2], parameters.logits) if x is not None]
    loss, gradients, sums = empirical_bayes.map_gradients(
        parameters, z, objective, learnt, with_sums=True
    )
    wide = copied(parameters, torch.float64)
    with in_torch():
        exact = [x for x in (*wide[:2], wide.logits) if x is not None]
        truth, expected, _ = empirical_bayes.map_gradients(wide, z.double(), objective, exact)
        alone, _ = empirical_bayes.statistics(wide, z.double())
    assert loss == pytest.approx(truth.item(), rel=rtol)
    for found, value in zip((*gradients, *sums), (*expected, *alone), strict=True):
        atol = rtol * float(value.abs().max())
        torch.testing.assert_close(found.double(), value, rtol=rtol, atol=atol)
    everything = [*learnt, parameters.raw_precision]
    *_, none = empirical_bayes.map_gradients(parameters, z, objective, everything, with_sums=True)
    assert none is None


@in_each_backend(
    ("logits", "weights"),
    [
        ([0.0, -math.inf, 1.0, -60.0, 50.0], DIRICHLET),  # pruned, and below the floor
        ([0.0, -math.inf, 1.0, -40.0, -1.0], STICKS),
        ([0.0, -30.0, 1.0, -25.0, -1.0], PITMAN_YOR),
        ([0.0, 0.0, 0.0, 0.0, 0.0], STICKS),  # all alike
    ],
)
def test_map_gradients_of_extreme_weights(device, logits, weights):
    parameters = random_parameters(device=device)
    with torch.no_grad():
        parameters.logits.copy_(torch.tensor(logits))
    assert_gradients(
        parameters, points(device=device), objective_of(weights=weights, data_size=500)
    )


@pytest.mark.parametrize(("c", "d"), [(1, 1), (9, 1), (17, 7)])
def test_shapes_and_instruction_sets(isa, c, d):
    parameters, z = random_parameters(c=c, d=d), points(d)
    objective = objective_of(weights=("stick-breaking", 0.2))
    assert_gradients(parameters, z, objective)
    assert_maximises(parameters, z, objective, False)


@in_each_backend(["raw"], [(-12.0,), (19.9,), (20.5,), (40.0,)])
def test_softplus_everywhere(device, raw):
    """Both parametrisations at small and large values, on both sides of torch's threshold."""
    parameters = random_parameters(scale=None, device=device)
    with torch.no_grad():
        parameters.raw_precision.diagonal(dim1=-2, dim2=-1).fill_(raw)
        parameters.raw_alpha.fill_(raw)
    objective = objective_of(data_size=100, responsibility_gradient=False)
    assert_gradients(parameters, points(b=20, device=device), objective)


@in_each_backend(
    ("scale", "weights", "spread"),
    [
        ("full", DIRICHLET, 1e6),
        ("full", STICKS, 1.0),
        ("diagonal", DIRICHLET, 1.0),
        ("diagonal", PITMAN_YOR, 1e6),
        (None, DIRICHLET, 1.0),
        (None, STICKS, 1e6),
    ],
)
def test_float32_is_no_worse_than_torch(device, scale, weights, spread):
    """Errors against float64 are at most torch's own and a few roundings.

    With the larger spread, one precision is too badly conditioned for float32 pairs.
    """
    core = backends.FORCED == "core"
    c, d = (20, 6) if core else (6, 5)
    parameters = random_parameters(c=c, d=d, scale=scale, dtype=torch.float32, device=device)
    z, objective = points(d, torch.float32, device=device), objective_of("learnt", weights, 1000)
    if core:
        with torch.no_grad():
            parameters.raw_precision[3, 4, 0] = spread
            L = reference.precision_cholesky(parameters.raw_precision[3])
            own = torch.linalg.solve_triangular(L.mT, z[:10].mT, upper=True).mT
            z[:10] = parameters.centers[3] + own
    ours, theirs = both_gradients(parameters, z, objective)
    with in_torch():
        wide = copied(parameters, torch.float64)
        learnt = [x for x in wide if x is not None]
        *truth, _ = empirical_bayes.map_gradients(wide, z.double(), objective, learnt)
    for mine, other, true in zip(*([x, *y] for x, y in (ours, theirs, truth)), strict=True):
        mine, other = (torch.as_tensor(x, device=device) for x in (mine, other))
        error, budget = (mine - true).abs().max(), (other - true).abs().max()
        assert error <= 2 * budget + 1e-5 * true.abs().max()


@on_backends("core", "plain", "triton")
def test_gradients_reach_what_the_encoder_read(device):
    """Centers and scales pass their gradients on; what the loss does not depend on gets None."""
    parameters = random_parameters(scale="diagonal", device=device)
    u, w, unused = (
        torch.randn(shape, dtype=torch.float64, device=device) for shape in ((5, 4), (4, 3), (2,))
    )
    u.requires_grad_(), unused.requires_grad_()
    parameters = parameters._replace(centers=u @ w, scale=(u @ w).exp())
    learnt = [parameters.logits, unused, u]
    objective, z = objective_of("none"), points(device=device)
    with in_torch():
        loss = empirical_bayes.map_loss(parameters, z, objective)
    true = torch.autograd.grad(loss, learnt, allow_unused=True, retain_graph=True)
    found_loss, found, none = empirical_bayes.map_gradients(parameters, z, objective, learnt)
    assert float(found_loss) == pytest.approx(loss.item(), rel=1e-10)
    assert found[1] is None and true[1] is None and none is None
    torch.testing.assert_close(found[0], true[0], **TIGHT)
    torch.testing.assert_close(found[2], true[2], **TIGHT)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (-math.inf, "logits must be finite for at least one component, but are all -inf"),
        (math.nan, "logits must be finite or -inf, but row 0 has a NaN or infinite value"),
    ],
)
@on_backends("core", "plain")
def test_logits_that_are_not_finite_are_an_error(backend, wrong, message):
    parameters = random_parameters()
    with torch.no_grad():
        parameters.logits.fill_(wrong)
    for fixed in (False, True):
        with pytest.raises(ValueError, match=message):
            parameters.components(fixed)


# --- the closed form ---


@pytest.mark.parametrize("scale", ["full", "diagonal", None])
@on_backends("core", "plain", "triton")
def test_statistics(device, scale):
    parameters, z = random_parameters(k=2, scale=scale, device=device), points(device=device)
    found, total = empirical_bayes.statistics(parameters, z)
    expected = parameters.components().detach().expected
    true = reference.mixture_statistics(z, *expected)
    torch.testing.assert_close(tuple(found), (*true, expected.centers), **TIGHT)
    lse, _ = reference.mixture_log_prob(z, *expected)
    assert total is None or total == pytest.approx(lse.sum().item(), rel=1e-11)
    assert (total is None) == (backends.FORCED != "core")


def assert_maximises(parameters, z, objective, free_centers):
    sums = empirical_bayes.statistics(parameters, z)[0].scaled(3.0)
    ours, theirs = copied(parameters), copied(parameters)
    sums = sums._replace(centers=sums.centers.detach().clone())
    versions = [x._version for x in ours if x is not None]
    with torch.no_grad():
        empirical_bayes.maximise(ours, sums, objective, free_centers)
        with in_torch():
            empirical_bayes.maximise(theirs, sums, objective, free_centers)
    assert [x._version for x in ours if x is not None] != versions  # autograd can tell
    for name, x, y in zip(ours._fields, ours, theirs, strict=True):
        if x is not None:
            torch.testing.assert_close(x, y, rtol=2e-8, atol=2e-8, msg=lambda m, n=name: n + m)
    return ours


@pytest.mark.parametrize("weights", [DIRICHLET, STICKS, PITMAN_YOR])
@pytest.mark.parametrize("map_prior", ["none", "fixed", "learnt"])
def test_maximise(map_prior, weights):
    for scale, k in (("full", 2), ("diagonal", 1), (None, 2)):
        parameters = random_parameters(k=k, scale=scale)
        with torch.no_grad():
            parameters.logits[2] = -math.inf
        assert_maximises(parameters, points(), objective_of(map_prior, weights), False)


@pytest.mark.parametrize("map_prior", ["none", "fixed", "learnt"])
def test_maximise_free_centers(map_prior):
    """An empty component's center stays, and so, without its prior, does its precision."""
    parameters = random_parameters(scale=None)
    with torch.no_grad():
        parameters.centers[4] = 1e3
    maximised = assert_maximises(parameters, points(), objective_of(map_prior), True)
    for old, new in (
        (x[4], y[4])
        for x, y in zip(parameters, maximised, strict=True)
        if x is not None and x.ndim > 1
    ):
        assert torch.equal(old, new) or map_prior != "none"


def no_sums(parameters):
    total, dim = parameters.centers.shape
    shapes = ((total,), (total, dim), (total, dim, dim), (total, dim))
    new = {"dtype": torch.float64, "device": parameters.centers.device}
    sums = closed_form.Statistics(*(torch.zeros(shape, **new) for shape in shapes))
    return Running(sums, torch.zeros((), dtype=torch.int64, device=new["device"]))


def after_online_steps(parameters, objective, batches, rate=0.2):
    """Return running sums and parameters after some steps, between which the centers move."""
    parameters = copied(parameters)
    running, free = no_sums(parameters), parameters.scale is None
    settings = {"rate": rate, "free_centers": free}
    with torch.no_grad():
        for z in batches:
            empirical_bayes.online_step(parameters, z, running, objective, **settings)
            parameters.centers.add_(0.1)
    return [*running.sums, running.steps, *(x for x in parameters if x is not None)]


def assert_online_steps(parameters, objective, batches, tolerance=1e-7, **settings):
    """Compare online steps with those in torch; return the result."""
    found = after_online_steps(parameters, objective, batches, **settings)
    with in_torch():
        true = after_online_steps(parameters, objective, batches, **settings)
    torch.testing.assert_close(found, true, rtol=tolerance, atol=tolerance)
    assert found[4] == len(batches)
    return found


FREE = {"scale": None}  # its centers are parameters


def batches_of(device, *sizes, dtype=torch.float64):
    return [points(seed=i, b=b, dtype=dtype, device=device) for i, b in enumerate(sizes, 1)]


@pytest.mark.parametrize(
    ("form", "objective"),
    [
        (FREE, objective_of("none")),
        ({"scale": "diagonal", "k": 2}, objective_of("fixed")),
        ({"scale": "full", "k": 2}, objective_of("learnt", data_size=500)),
        (FREE, objective_of("fixed", PITMAN_YOR)),
        (FREE, objective_of("learnt", data_size=700)),
        ({"scale": "full", "k": 2}, objective_of("learnt", STICKS)),
        ({"scale": "diagonal", "k": 2}, objective_of("none", data_size=500)),
    ],
)
@in_core
def test_online_steps(device, form, objective):
    parameters = random_parameters(c=3, **form, device=device)
    assert_online_steps(parameters, objective, batches_of(device, 20, 20))


@pytest.mark.parametrize("d", [17, 33])
@in_core
def test_online_steps_in_more_dimensions(device, d):
    parameters = random_parameters(c=2, d=d, scale=None, device=device)
    batches = [points(d, seed=i, b=20, device=device) for i in (1, 2)]
    assert_online_steps(parameters, objective_of(), batches)


@pytest.mark.parametrize("scale", [None, "full"])
@in_core_and_kernels
def test_online_steps_of_float32(device, scale):
    parameters = random_parameters(c=3, scale=scale, dtype=torch.float32, device=device)
    batches = batches_of(device, 37, 20, dtype=torch.float32)
    assert_online_steps(parameters, objective_of(), batches, tolerance=1e-4)


def free_parameters(device, c, **values):
    """Return free centers, and values of some components or of a whole tensor."""
    parameters = random_parameters(c=c, scale=None, device=device)
    with torch.no_grad():
        for name, (where, value) in values.items():
            getattr(parameters, name)[where] = value
    return parameters


@pytest.mark.parametrize("objective", [objective_of(), objective_of("fixed", STICKS)])
@in_core
def test_pruned_components_stay_so_in_online_steps(device, objective):
    parameters = free_parameters(device, 3, logits=(1, -math.inf))
    *_, logits, _ = assert_online_steps(parameters, objective, batches_of(device, 20, 20))
    assert logits.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("map_prior", ["none", "learnt"])
@in_core
def test_online_steps_with_a_component_without_points(device, map_prior):
    """The center stays without a prior; so does the precision, where the scatter is singular."""
    parameters = free_parameters(device, 3, centers=(1, 1e3))
    assert_online_steps(parameters, objective_of(map_prior), batches_of(device, 20))


@pytest.mark.parametrize("spread", [(1, 0, 1), (1e-3, 1, 1e6)], ids=["none", "rounding noise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@in_core
def test_a_scatter_without_a_spread_keeps_the_precision(device, dtype, spread):
    parameters = random_parameters(c=1, scale=None, dtype=dtype, device=device)
    z = points(b=20, dtype=dtype, device=device)
    z *= torch.tensor(spread, device=device)
    if not spread[1]:
        z[:, 1] = z[:, 0]
    with torch.no_grad():
        parameters.centers.copy_(z.mean(0, keepdim=True))
    *_, raw_precision, _, _ = after_online_steps(parameters, objective_of("none"), [z], rate=1.0)
    assert torch.equal(raw_precision, parameters.raw_precision)


@pytest.mark.parametrize(
    ("map_prior", "data_size", "at_floor"), [("fixed", 1, 0), ("learnt", 1, 0), ("fixed", 5, 4)]
)
@in_core
def test_online_steps_with_fewer_points_than_components(device, map_prior, data_size, at_floor):
    """Mass alone tells components apart, if none has the mass that the prior takes off."""
    parameters = free_parameters(device, 6, raw_alpha=((), 30.0))  # gamma = 1 / 30
    objective = objective_of(map_prior, data_size=data_size)
    mass, *_, logits, _ = assert_online_steps(parameters, objective, batches_of(device, 3))
    assert (data_size * mass.max() < 1) == (not at_floor)
    assert (logits < -19.9).sum() == at_floor
    assert logits.exp().sum().item() == pytest.approx(1, rel=1e-12)


@in_core
def test_online_steps_of_even_counts(device):
    """They are more even than any concentration explains, which goes to its upper end."""
    alike = dict.fromkeys(("centers", "raw_precision", "logits"), (slice(None), 0.0))
    parameters, objective = free_parameters(device, 2, **alike), objective_of(data_size=5)
    *_, raw_alpha = assert_online_steps(parameters, objective, batches_of(device, 20))
    torch.testing.assert_close(1 / softplus(raw_alpha).item(), 1e6)


@pytest.mark.parametrize("still", range(4))
@in_core
def test_online_steps_leave_what_is_not_learnt(device, still):
    parameters = random_parameters(c=3, scale=None, device=device)
    before = (parameters.centers, *parameters[2:])
    before[still].requires_grad_(False)
    found = assert_online_steps(parameters, objective_of(), batches_of(device, 20))
    moved = (found[5] - 0.1, *found[6:])
    for index, (x, y) in enumerate(zip(moved, before, strict=True)):
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-12) == (index == still)


@pytest.mark.parametrize("steps", [0, 1])
@on_backends("core", "plain", "triton")
def test_a_point_that_is_not_finite_moves_nothing(device, steps):
    parameters, z = random_parameters(c=3, scale=None, device=device), points(device=device)
    running = no_sums(parameters)
    settings = {"rate": 0.1, "free_centers": True}
    with torch.no_grad():
        for _ in range(steps):
            empirical_bayes.online_step(parameters, z, running, objective_of(), **settings)
        after = [x for x in (*parameters, *running.sums, running.steps) if x is not None]
        before = [x.clone() for x in after]
        z[3, 1] = torch.nan
        with pytest.raises((ValueError, FloatingPointError), match="must be finite"):
            empirical_bayes.online_step(parameters, z, running, objective_of(), **settings)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


# --- memory, sizes and threads ---


@pytest.mark.parametrize("layout", [shifted, strided, expanded, negated])
@in_core_and_kernels
def test_inputs_lie_anywhere_in_memory(device, layout):
    """Compare results where the encoder's tensors have gaps, strides of zero, or the other sign."""
    parameters = random_parameters(c=3, d=4, dtype=torch.float32)
    centers, scale, z = given = [
        layout(x.detach()) for x in (*parameters[:2], points(4, torch.float32, b=20))
    ]
    outputs = []
    for centers, scale, z in (given, [x.contiguous().clone().resolve_neg() for x in given]):
        laid_out = MixtureParameters(*on(device, (centers, scale, *parameters[2:])))
        laid_out = MixtureParameters(*(x.detach().requires_grad_() for x in laid_out))
        z = z.to(device)
        loss, gradients, _ = empirical_bayes.map_gradients(
            laid_out, z, objective_of(data_size=500), list(laid_out)
        )
        sums, _ = empirical_bayes.statistics(laid_out, z)
        outputs.append((torch.as_tensor(loss), *gradients, *sums))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize(("c", "d"), [(30_000, 2), (2, 32)])
def test_many_components_and_dimensions(c, d):
    parameters = random_parameters(c=c, d=d, scale="diagonal")
    assert_gradients(parameters, points(d, b=3), objective_of())


def one_of_each(inference):
    """Return parameters, sums and running sums after one step of each kind."""
    parameters, z = random_parameters(c=120, k=2, d=16), points(16, b=500)
    objective = objective_of(weights=("stick-breaking", 0.2), data_size=1000)
    if inference == "closed-form":
        return after_online_steps(parameters, objective, [z])
    loss, gradients, _ = empirical_bayes.map_gradients(parameters, z, objective, list(parameters))
    return (torch.tensor(loss), *gradients)


inferences = pytest.mark.parametrize("inference", ["gradient", "closed-form"])


@inferences
def test_threads_change_rounding_alone(inference):
    """The same bits on every run at one thread count, and rounding between two."""
    results = []
    for count in (1, 2):
        with threads(count):
            first, second = (one_of_each(inference) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
        results.append(first)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
