"""The compiled empirical-Bayes steps against their definitions in torch."""

import contextlib
import itertools
import math

import pytest
import torch
from support import expanded, random_components, shifted, strided, threads
from torch.distributions import Independent, MultivariateNormal, Normal
from torch.profiler import ProfilerActivity, profile

from vmm_fast import GaussianMixturePrior, VMMPrior, _core, backends, reference
from vmm_fast.inference import closed_form, empirical_bayes
from vmm_fast.inference.empirical_bayes import MixtureParameters, Objective, Running
from vmm_fast.inference.gradient import PrivateAdam

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
B = 37


def random_parameters(c=5, k=1, d=3, scale="full", dtype=torch.float64, seed=0):
    components = random_components(c=c, k=k, d=d, scale=scale, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(c, generator=generator, dtype=torch.float64)
    stored = (
        components.centers,
        components.scale,
        empirical_bayes.raw_precision(components.precision_cholesky),
        logits,
        torch.tensor(0.3, dtype=torch.float64),
    )
    return MixtureParameters(*(x if x is None else leaf(x, dtype) for x in stored))


def leaf(x, dtype):
    return x.detach().to(dtype, copy=True).requires_grad_()


def points(d=3, dtype=torch.float64, seed=1, b=B):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(b, d, generator=generator, dtype=torch.float64)).to(dtype)


def copied(parameters, dtype=None):
    return MixtureParameters(*(x if x is None else leaf(x, dtype or x.dtype) for x in parameters))


@contextlib.contextmanager
def in_torch():
    """Run the definitions in torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "FORCED", "reference")
        yield


def both_gradients(parameters, z, objective):
    learnt = [x for x in parameters if x is not None]
    *actual, _ = empirical_bayes.map_gradients(parameters, z, objective, learnt)
    with in_torch():
        *expected, _ = empirical_bayes.map_gradients(parameters, z, objective, learnt)
    return actual, expected


def assert_gradients(parameters, z, objective):
    (loss, gradients), (expected_loss, expected) = both_gradients(parameters, z, objective)
    assert isinstance(loss, float), "the compiled core did not run"
    assert loss == pytest.approx(expected_loss.item(), rel=1e-11)
    for actual, value in zip(gradients, expected, strict=True):
        assert (actual is None) == (value is None)
        if value is not None:
            torch.testing.assert_close(actual, value, **TIGHT)


@pytest.mark.parametrize("scale", ["full", "diagonal", None])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("responsibility_gradient", [True, False])
@pytest.mark.parametrize("data_size", [None, 1000])
@pytest.mark.parametrize("map_prior", ["none", "fixed", "learnt"])
@pytest.mark.parametrize(
    ("weights", "discount"), [("dirichlet", 0.0), ("stick-breaking", 0.0), ("stick-breaking", 0.3)]
)
def test_map_gradients(scale, k, responsibility_gradient, data_size, map_prior, weights, discount):
    objective = Objective(map_prior, weights, discount, responsibility_gradient, data_size)
    assert_gradients(random_parameters(k=k, scale=scale), points(), objective)


@pytest.mark.parametrize("spread", [1, 60])  # points near all components, and near few
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("scale", ["full", "diagonal", None])
@pytest.mark.parametrize("responsibility_gradient", [True, False])
@pytest.mark.parametrize(("k", "d", "b"), [(1, 3, 37), (2, 21, 400), (1, 10, 2500)])
def test_gradients_and_sums_together(isa, responsibility_gradient, scale, pruned, spread, k, d, b):
    parameters, z = spread_out(random_parameters(c=7, k=k, d=d, scale=scale), spread, pruned, b)
    assert_sums_come_along(parameters, z, responsibility_gradient, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1, 30])
@pytest.mark.parametrize("responsibility_gradient", [True, False])
@pytest.mark.parametrize(("c", "d", "b"), [(100, 10, 256), (60, 21, 300), (100, 10, 6000)])
def test_gradients_and_sums_together_on_two_threads(
    responsibility_gradient, spread, dtype, c, d, b
):
    """Components shared out with l kept, and samples shared out."""
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
    objective = Objective("learnt", "dirichlet", 0.0, responsibility_gradient, 1000)
    learnt = [x for x in (*parameters[:2], parameters.logits) if x is not None]
    loss, gradients, sums = empirical_bayes.map_gradients(
        parameters, z, objective, learnt, with_sums=True
    )
    wide = copied(parameters, torch.float64)
    with in_torch():
        exact = [x for x in (*wide[:2], wide.logits) if x is not None]
        truth, expected, _ = empirical_bayes.map_gradients(wide, z.double(), objective, exact)
        alone, _ = empirical_bayes.statistics(wide, z.double(), 1.0)
    assert loss == pytest.approx(truth.item(), rel=rtol)
    for actual, value in zip((*gradients, *sums), (*expected, *alone), strict=True):
        atol = rtol * float(value.abs().max())
        torch.testing.assert_close(actual.double(), value, rtol=rtol, atol=atol)
    everything = [*learnt, parameters.raw_precision]
    *_, none = empirical_bayes.map_gradients(parameters, z, objective, everything, with_sums=True)
    assert none is None


@pytest.mark.parametrize("weights", ["dirichlet", "stick-breaking"])
@pytest.mark.parametrize(
    "logits",
    [
        [0.0, -math.inf, 1.0, 2.0, -1.0],  # a pruned component
        [0.0, -30.0, 1.0, -25.0, -1.0],  # below the floor
        [0.0, 0.0, 0.0, 0.0, 0.0],  # all alike
        [0.0, 50.0, 0.0, -60.0, 0.0],
    ],
)
def test_map_gradients_of_extreme_weights(logits, weights):
    parameters = random_parameters()
    logits = leaf(torch.tensor(logits), torch.float64)
    objective = Objective("learnt", weights, 0.0, True, 500)
    assert_gradients(parameters._replace(logits=logits), points(), objective)


@pytest.mark.parametrize(("c", "d"), [(1, 1), (1, 4), (9, 1), (17, 7)])
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_shapes_and_instruction_sets(c, d, isa, monkeypatch):
    parameters, z = random_parameters(c=c, d=d), points(d)
    monkeypatch.setenv("VMM_FAST_ISA", isa)
    objective = Objective("learnt", "stick-breaking", 0.2, True, None)
    try:
        _core.instruction_set()
    except ValueError as error:
        pytest.skip(str(error))
    assert_gradients(parameters, z, objective)
    assert_maximises(parameters, z, objective, False)


@pytest.mark.parametrize("raw", [-12.0, -3.0, 0.0, 19.9, 20.5, 40.0])
def test_softplus_everywhere(raw):
    """Both parametrisations at small and large values, on both sides of torch's threshold."""
    parameters = random_parameters(scale=None)
    with torch.no_grad():
        parameters.raw_precision.diagonal(dim1=-2, dim2=-1).fill_(raw)
        parameters.raw_alpha.fill_(raw)
    objective = Objective("learnt", "dirichlet", 0.0, False, 100)
    (_, gradients), (_, expected) = both_gradients(parameters, points(), objective)
    for actual, value in zip(gradients, expected, strict=True):
        scale = value.abs().max().item()
        torch.testing.assert_close(actual / scale, value / scale, **TIGHT)


@pytest.mark.parametrize("scale", ["full", "diagonal", None])
@pytest.mark.parametrize("weights", ["dirichlet", "stick-breaking"])
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_float32_is_no_worse_than_torch(scale, weights, spread):
    """Errors against float64 are at most torch's own and a few roundings.

    With the larger spread, one precision is too badly conditioned for float32 pairs.
    """
    exact = random_parameters(c=20, d=6, scale=scale, dtype=torch.float32)
    with torch.no_grad():
        exact.raw_precision[3, 5, 0] = spread
    z, objective = points(6, torch.float32), Objective("learnt", weights, 0.0, True, 1000)
    (_, ours), (_, theirs) = both_gradients(exact, z, objective)
    with in_torch():
        wide = copied(exact, torch.float64)
        learnt = [x for x in wide if x is not None]
        _, truth, _ = empirical_bayes.map_gradients(wide, z.double(), objective, learnt)
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        size = true.abs().max()
        error, budget = (mine - true).abs().max(), (other - true).abs().max()
        assert error <= 2 * budget + 1e-5 * size


def test_gradients_reach_what_the_encoder_read():
    """Centers and scales pass their gradients on; what the loss does not depend on gets None."""
    parameters = random_parameters(scale="diagonal")
    u = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, dtype=torch.float64)
    unused = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    parameters = parameters._replace(centers=u @ w, scale=(u @ w).exp())
    learnt = [parameters.logits, unused, u]
    objective, z = Objective("none", "dirichlet", 0.0, True, None), points()
    expected = torch.autograd.grad(
        empirical_bayes.map_loss(parameters, z, objective),
        learnt,
        allow_unused=True,
        retain_graph=True,
    )
    loss, actual, _ = empirical_bayes.map_gradients(parameters, z, objective, learnt)
    assert isinstance(loss, float)
    assert actual[1] is None and expected[1] is None
    torch.testing.assert_close(actual[0], expected[0], **TIGHT)
    torch.testing.assert_close(actual[2], expected[2], **TIGHT)


# --- the closed form ---


@pytest.mark.parametrize("scale", ["full", "diagonal", None])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_statistics(scale, temperature):
    parameters = random_parameters(k=2, scale=scale)
    actual, total = empirical_bayes.statistics(parameters, points(), temperature)
    with in_torch():
        expected, none = empirical_bayes.statistics(parameters, points(), temperature)
    assert none is None
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, **TIGHT)
    centers, whitening, offsets, transpose = parameters.components().detach().expected
    tempered = (centers, whitening / temperature**0.5, offsets / temperature)
    lse, _ = reference.mixture_log_prob(points(), *tempered, transpose)
    assert total == pytest.approx(lse.sum().item(), rel=1e-11)


def assert_maximises(parameters, z, objective, free_centers):
    sums = empirical_bayes.statistics(parameters, z, 1.0)[0].scaled(3.0)
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


@pytest.mark.parametrize("scale", ["full", "diagonal", None])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("map_prior", ["none", "fixed", "learnt"])
@pytest.mark.parametrize(
    ("weights", "discount"), [("dirichlet", 0.0), ("stick-breaking", 0.0), ("stick-breaking", 0.3)]
)
def test_maximise(scale, k, map_prior, weights, discount):
    objective = Objective(map_prior, weights, discount, True, None)
    parameters = random_parameters(k=k, scale=scale)
    with torch.no_grad():
        parameters.logits[2] = -math.inf
    assert_maximises(parameters, points(), objective, False)


@pytest.mark.parametrize("map_prior", ["none", "fixed", "learnt"])
def test_maximise_free_centers(map_prior):
    """An empty component's center stays, and so, without its prior, does its precision."""
    parameters = random_parameters(scale=None)
    with torch.no_grad():
        parameters.centers[4] = 1e3
    before = copied(parameters)
    objective = Objective(map_prior, "dirichlet", 0.0, True, None)
    assert_maximises(parameters, points(), objective, True)
    sums, _ = empirical_bayes.statistics(parameters, points(), 1.0)
    with torch.no_grad():
        empirical_bayes.maximise(parameters, sums, objective, True)
    if map_prior == "none":
        assert torch.equal(parameters.centers[4], before.centers[4])
        assert torch.equal(parameters.raw_precision[4], before.raw_precision[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_scatter_keeps_the_previous_precision(dtype):
    parameters = random_parameters(c=1, scale=None, dtype=dtype)
    z = points(dtype=dtype)
    z[:, 1] = z[:, 0]
    before = parameters.raw_precision.clone()
    with torch.no_grad():
        parameters.centers.copy_(z.mean(0, keepdim=True))
        sums, _ = empirical_bayes.statistics(parameters, z, 1.0)
        objective = Objective("none", "dirichlet", 0.0, True, None)
        empirical_bayes.maximise(parameters, sums, objective, False)
    assert torch.equal(before, parameters.raw_precision)


@pytest.mark.parametrize("free_centers", [True, False])
@pytest.mark.parametrize("data_size", [None, 700])
def test_online_steps(free_centers, data_size):
    ours = random_parameters(scale=None if free_centers else "full")
    theirs = copied(ours)
    objective = Objective("learnt", "dirichlet", 0.0, True, data_size)

    def running():
        sums = (torch.zeros(x, dtype=torch.float64) for x in ((5,), (5, 3), (5, 3, 3), (5, 3)))
        return Running(closed_form.Statistics(*sums), torch.zeros((), dtype=torch.int64))

    settings = {"temperature": 0.7, "rate": 0.1, "free_centers": free_centers}
    mine, other = running(), running()
    with torch.no_grad():
        for seed in range(4):
            z = points(seed=seed)
            empirical_bayes.online_step(ours, z, mine, objective, **settings)
            with in_torch():
                empirical_bayes.online_step(theirs, z, other, objective, **settings)
            if not free_centers:
                ours.centers.add_(0.1)
                theirs.centers.add_(0.1)
    assert mine.steps == other.steps == 4
    for x, y in zip((*mine.sums, *ours), (*other.sums, *theirs), strict=True):
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "counts",
    [
        [70.0, 20, 9, 1, 0],
        [20.0, 20, 20, 20, 21],
        [1000.0, 0, 0, 0, 0],
        [5.0],
        [1e-12] * 30,
        [3e5, 2.5, 1e-3, 40.0, 1e4],
    ],
)
@pytest.mark.parametrize("start", [1e-9, 1.0, 1e9])
def test_maximise_concentration(counts, start):
    counts = torch.tensor(counts, dtype=torch.float64)
    expected = closed_form.maximise_concentration(counts)
    actual = _core.maximise_concentration(counts.data_ptr(), len(counts), start)
    assert actual == pytest.approx(expected, rel=1e-8)


# --- memory, sizes and threads ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [shifted, strided, expanded])
def test_inputs_lie_anywhere_in_memory(layout, dtype):
    """What the encoder gives may be misaligned, have gaps, or strides of zero."""
    parameters = random_parameters(c=6, d=4, dtype=dtype)
    given = [layout(x.detach()) for x in parameters[:2]]
    laid_out = parameters._replace(
        centers=given[0].requires_grad_(), scale=given[1].requires_grad_()
    )
    plain = copied(laid_out._replace(centers=given[0].contiguous(), scale=given[1].contiguous()))
    z, objective = layout(points(4, dtype)), Objective("learnt", "dirichlet", 0.0, True, 500)
    outputs = []
    for p, at in ((laid_out, z), (plain, z.contiguous().clone())):
        loss, gradients, _ = empirical_bayes.map_gradients(p, at, objective, list(p))
        sums, _ = empirical_bayes.statistics(p, at, 0.7)
        outputs.append((torch.tensor(loss), *gradients, *sums))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize(("c", "d"), [(30_000, 2), (2, 128)])
def test_many_components_and_dimensions(c, d):
    parameters = random_parameters(c=c, d=d, scale="diagonal")
    with torch.no_grad():  # a random triangle's condition grows exponentially with D
        parameters.raw_precision.copy_(parameters.raw_precision.tril(-1).div(d))
    objective = Objective("learnt", "dirichlet", 0.0, True, None)
    assert_gradients(parameters, points(d, b=3), objective)


def one_of_each(inference, seed=0):
    """Parameters, sums and running sums after a step of each kind."""
    parameters = random_parameters(c=120, k=2, d=16, seed=seed)
    z, objective = points(16, b=500), Objective("learnt", "stick-breaking", 0.2, True, 1000)
    if inference == "gradient":
        loss, gradients, _ = empirical_bayes.map_gradients(
            parameters, z, objective, list(parameters)
        )
        return (torch.tensor(loss), *gradients)
    shapes = ((240,), (240, 16), (240, 16, 16), (240, 16))
    sums = closed_form.Statistics(*(torch.zeros(x, dtype=torch.float64) for x in shapes))
    running = Running(sums, torch.zeros((), dtype=torch.int64))
    settings = {"temperature": 0.7, "rate": 0.1, "free_centers": False}
    with torch.no_grad():
        empirical_bayes.online_step(parameters, z, running, objective, **settings)
    return (*running.sums, *parameters)


@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
def test_threads_change_rounding_alone(inference):
    """The same bits on every run at one thread count, and rounding between two."""
    results = []
    for count in (1, 2):
        with threads(count):
            first, second = (one_of_each(inference) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
        results.append(first)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


# --- the private Adam ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_is_torchs(dtype):
    torch.manual_seed(0)
    ours = [torch.randn(7, 5, dtype=dtype, requires_grad=True), torch.zeros((), dtype=dtype)]
    ours[1].requires_grad_()
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    mine, other = PrivateAdam(ours, 1e-2), torch.optim.Adam(theirs, lr=1e-2, eps=1e-7)
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
        torch.testing.assert_close(x, y, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)
    saved = mine.state_dict()
    torch.testing.assert_close(saved["state"], other.state_dict()["state"], rtol=1e-5, atol=1e-7)
    other.load_state_dict(saved)
    mine.load_state_dict(other.state_dict())


def test_adam_takes_no_step_from_a_gradient_that_is_not_finite():
    x = torch.zeros(100, requires_grad=True)
    adam = PrivateAdam([x], 1e-2)
    gradient = torch.zeros(100)
    gradient[77] = math.nan
    with pytest.raises(FloatingPointError, match="the prior is unchanged"):
        adam.descend(0.0, [gradient])
    with pytest.raises(FloatingPointError, match="loss is inf"):
        adam.descend(math.inf, [torch.zeros(100)])
    assert (x == 0).all() and not adam.state_dict()["state"]


# --- the priors' step ---


def stored_encoder(total, d, full):
    mean = torch.randn(total, d)
    scale = torch.rand(total, d) + 0.1
    if full:
        q = MultivariateNormal(mean, scale_tril=torch.diag_embed(scale))
    else:
        q = Independent(Normal(mean, scale), 1)
    return lambda inputs: q


@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
@pytest.mark.parametrize("weights", ["dirichlet", "stick-breaking"])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("given", ["z", "q"])
def test_few_torch_operators(inference, weights, full, given):
    torch.manual_seed(0)
    encoder = stored_encoder(6, 3, full)
    prior = VMMPrior(torch.randn(6, 4), 3, inference=inference, weights=weights)
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


@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
def test_same_bits_on_every_run(inference):
    def run():
        torch.manual_seed(0)
        prior = VMMPrior(torch.randn(6, 4), 3, inference=inference)
        encoder, z = stored_encoder(6, 3, True), torch.randn(50, 3)
        for _ in range(3):
            prior.update(z, encoder)
        return list(prior.parameters())

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))


def test_errors_leave_everything_as_it_was():
    for inference, free in itertools.product(("gradient", "closed-form"), (True, False)):
        torch.manual_seed(0)
        encoder = stored_encoder(6, 3, True)
        if free:
            prior = GaussianMixturePrior(6, 3, inference=inference)
        else:
            prior = VMMPrior(torch.randn(6, 4), 3, inference=inference)
        z = torch.randn(50, 3)
        z[7, 1] = math.nan
        before = [x.detach().clone() for x in (*prior.parameters(), *prior.buffers())]
        with pytest.raises(ValueError, match="z must be finite, but row 7"):
            prior.update(z, encoder)
        with torch.no_grad():
            prior.logits[1] = math.nan
        with pytest.raises(ValueError, match="logits must have at least one finite value"):
            prior.update(torch.randn(50, 3), encoder)
        with torch.no_grad():
            prior.logits[1] = before[[n for n, _ in prior.named_parameters()].index("logits")][1]
            kept = prior.raw_precision[4, 2, 2].item()
            prior.raw_precision[4, 2, 2] = math.nan
        with pytest.raises(ValueError, match="component 4 has no positive-definite covariance"):
            prior.update(torch.randn(50, 3), encoder)
        with torch.no_grad():
            prior.raw_precision[4, 2, 2] = kept
        after = (*prior.parameters(), *prior.buffers())
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("core", [True, False])
def test_an_encoder_may_give_views_of_the_pseudo_inputs(core):
    """The closed form's sums are around the centers that they were evaluated at."""

    def encoder(copy):
        def encode(u):
            mean, scale = u[..., 0], u[..., 1].exp()
            mean = mean.clone() if copy else mean
            return torch.distributions.Independent(torch.distributions.Normal(mean, scale), 1)

        return encode

    generator = torch.Generator().manual_seed(0)
    u = torch.randn(6, 3, 2, generator=generator, dtype=torch.float64)
    states = []
    for copy in (True, False):
        prior = VMMPrior(u, 3, inference="closed-form", learning_rate=0.1, data_size=100)
        with contextlib.nullcontext() if core else in_torch():
            for _ in range(3):
                prior.update(points(), encoder(copy))
        states.append({name: x for name, x in prior.state_dict().items() if torch.is_tensor(x)})
    assert "running_centers" in states[0]
    for name, x in states[0].items():
        assert torch.equal(x, states[1][name]), name
