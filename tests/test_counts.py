"""Log-likelihoods of counts: against mpmath, scipy and the reference, in every backend."""

import itertools
from functools import partial

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support import (
    Computations,
    assert_all_close,
    counted_launches,
    on,
    on_backends,
    random_counts,
    threads,
)

from vmm_fast import backends, reference
from vmm_fast import counts as ops
from vmm_fast.operations import COUNT_LOG_PROB

# torch says so where a test makes a sparse tensor.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

MODELS = ("poisson", "nb", "zinb")
FUNCTIONS = {"poisson": ops.poisson_log_prob, "nb": ops.nb_log_prob, "zinb": ops.zinb_log_prob}
FEW = {"poisson": 1, "nb": 2, "zinb": 3}  # parameters

COUNTS = (0, 1, 2, 3, 5, 8, 9, 17, 100, 1234, 10**6)
MEANS = (1e-8, 1e-3, 0.3, 2.0, 50.0, 1e3, 1e6)
DISPERSIONS = (1e-6, 1e-2, 0.7, 10.0, 1e3, 1e6)
LOGITS = (-30.0, -3.0, 0.0, 2.5, 20.0)


def values_and_gradients(function, x, *parameters):
    parameters = [p.detach().requires_grad_() for p in parameters]
    found = function(x, *parameters)
    upstream = torch.linspace(-1, 2, len(found), dtype=found.dtype, device=found.device)
    return found.detach(), *torch.autograd.grad((found * upstream).sum(), parameters)


def assert_equals_reference(model, x, *parameters, tolerance=1e-9):
    parameters = parameters[: FEW[model]]
    found = values_and_gradients(FUNCTIONS[model], x, *parameters)
    dense = x.to_dense() if x.layout == torch.sparse_csr else x
    doubles = [p.double() for p in parameters]
    true = values_and_gradients(reference.count_log_prob, dense.double(), *doubles)
    found, true = (
        dict(zip(("value", "mean", "theta", "logits"), x, strict=False)) for x in (found, true)
    )
    assert_all_close({name: x.double() for name, x in found.items()}, true, tolerance)


def assert_same_bits(runs):
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


models = pytest.mark.parametrize("model", MODELS)
in_core_and_kernels, in_kernels = on_backends("core", "triton"), on_backends("triton")
everywhere = on_backends("core", "plain", "triton")


@pytest.fixture
def small_programs(monkeypatch, backend):
    """Split few genes and cells between several programs."""
    if backends.FORCED == "triton":
        from vmm_fast.kernels import counts as kernels

        monkeypatch.setattr(kernels, "GENES_A_PROGRAM", 64)
        monkeypatch.setattr(kernels, "CELLS", 2)


@pytest.fixture(scope="module")
def grid():
    """Return every count with every parameter, and the three log-likelihoods to 40 digits."""
    rows = list(itertools.product(COUNTS, MEANS, DISPERSIONS, LOGITS))
    with mpmath.workdps(40):
        exact = [_exact(*map(mpmath.mpf, row)) for row in rows]
    columns = [
        torch.tensor(column, dtype=torch.float64)[:, None] for column in zip(*rows, strict=True)
    ]
    return columns, torch.tensor(exact, dtype=torch.float64)


def _exact(x, mean, theta, logit):
    poisson = x * mpmath.log(mean) - mean - mpmath.loggamma(x + 1)
    zero = -theta * mpmath.log1p(mean / theta)
    nb = zero + x * mpmath.log(mean / (theta + mean)) - mpmath.loggamma(x + 1)
    nb += mpmath.loggamma(x + theta) - mpmath.loggamma(theta)
    pi = 1 / (1 + mpmath.exp(-logit))
    zinb = nb + mpmath.log(1 - pi) if x else mpmath.log(pi + (1 - pi) * mpmath.exp(zero))
    return float(poisson), float(nb), float(zinb)


@models
def test_extremes_are_exact(isa, grid, model):
    (x, *parameters), exact = grid
    exact = exact[:, MODELS.index(model)]
    found = FUNCTIONS[model](x, *parameters[: FEW[model]])
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    # float32's own steps in 1 + e^-l, and in log mu of a large count.
    single = FUNCTIONS[model](x.float(), *(p.float() for p in parameters[: FEW[model]]))
    torch.testing.assert_close(single.double(), exact, rtol=1e-6, atol=1e-6)


@models
def test_gradients_at_the_extremes(isa, grid, model):
    (x, *parameters), _ = grid
    parameters = parameters[: FEW[model]]
    expected = values_and_gradients(reference.count_log_prob, x, *parameters)[1:]
    found = values_and_gradients(FUNCTIONS[model], x, *parameters)[1:]
    single = [p.float() for p in parameters]
    rough = values_and_gradients(FUNCTIONS[model], x.float(), *single)[1:]
    for p, a, b, c in zip(parameters, found, expected, rough, strict=True):
        # As of log mu and log theta: what a step of an optimizer would see. The reference loses
        # digits of digamma(x + theta) - digamma(theta) where theta is large.
        scale = p if p is not parameters[-1] or model != "zinb" else torch.ones_like(p)
        torch.testing.assert_close(a * scale, b * scale, rtol=1e-8, atol=3e-8)
        torch.testing.assert_close(c.double() * scale, b * scale, rtol=2e-5, atol=2e-5)


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(0, 6), st.integers(0, 70)),
    model=st.sampled_from(MODELS),
    per_cell=st.booleans(),
    depth=st.sampled_from([0.1, 1.0, 100.0]),
    seed=st.integers(0, 10**6),
)
def test_float64_equals_reference(shape, model, per_cell, depth, seed):
    arguments = random_counts(*shape, seed=seed, per_cell=per_cell, depth=depth)
    assert_equals_reference(model, *arguments)


def test_reference_equals_scipy():
    x, mean, theta, logits = random_counts(20, 30, depth=5.0)
    nb = stats.nbinom(theta, theta / (theta + mean))
    pi = logits.sigmoid().numpy()
    zinb = np.log((1 - pi) * nb.pmf(x) + pi * (x.numpy() == 0))
    for parameters, expected in (
        ((mean,), stats.poisson(mean).logpmf(x)),
        ((mean, theta), nb.logpmf(x)),
        ((mean, theta, logits), zinb),
    ):
        found = reference.count_log_prob(x, *parameters)
        np.testing.assert_allclose(found, expected.sum(-1), rtol=1e-12)


@models
def test_every_instruction_set(isa, model):
    for genes in (1, 15, 16, 17, 100):
        assert_equals_reference(model, *random_counts(9, genes))
        single = random_counts(9, genes, dtype=torch.float32)
        assert_equals_reference(model, *single, tolerance=1e-4)


@pytest.mark.parametrize(("model", "per_cell"), [("poisson", False), ("nb", True), ("zinb", False)])
@in_kernels
def test_every_model_in_kernels(small_programs, backend, per_cell, model):
    """Compare shapes that fit into one block of genes and cells, and larger ones."""
    for shape in [(3, 70), (1, 1), (0, 5), (3, 0)]:
        arguments = on(backend, random_counts(*shape, per_cell=per_cell, depth=5.0))
        assert_equals_reference(model, *arguments)


@models
@everywhere
def test_sparse_counts_and_another_run_give_the_same_bits(small_programs, backend, model):
    x, *parameters = on(backend, random_counts(3, 70, dtype=torch.float32))
    parameters = parameters[: FEW[model]]
    stored = (x, x, x.to_sparse_csr())
    assert_same_bits([values_and_gradients(FUNCTIONS[model], x, *parameters) for x in stored])


@models
@everywhere
def test_a_gene_that_occurs_again_in_a_cell_of_sparse_counts(backend, model):
    """Counts of a gene that occurs twice in a cell are added, as in torch."""
    genes, values = torch.tensor([0, 4, 4, 6, 4]), torch.tensor([1.0, 2.0, 3.0, 4.0, 7.0])
    rows = torch.tensor([0, 4, 5])
    x = torch.sparse_csr_tensor(rows, genes, values.double(), (2, 9), check_invariants=False)
    assert_equals_reference(model, *on(backend, (x, *random_counts(2, 9)[1:])))


def test_threads_and_runs_give_the_same():
    arguments = random_counts(300, 200, dtype=torch.float32)
    assert_equals_reference("zinb", *arguments, tolerance=1e-4)
    found = []
    for count in (1, 1, 2, 2):
        with threads(count):
            found.append(values_and_gradients(ops.zinb_log_prob, *arguments))
    assert_same_bits(found[:2])
    assert_same_bits(found[2:])
    # Sums of 300 terms near 1, in another order.
    for a, b in zip(found[0], found[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("logit", [2.0, 10.0, 17.0])
def test_zeros_that_dropout_makes_nearly_sure(isa, logit):
    """Log-probabilities near 0 keep their digits."""
    random = np.random.default_rng(0)
    mean, theta = random.uniform(0.1, 5, (8, 300)), random.uniform(0.1, 3, 300)
    logits = np.full((8, 300), logit)
    x, *single = (torch.tensor(a, dtype=torch.float32) for a in (0 * mean, mean, theta, logits))
    mean, theta, logits = (p.double() for p in single)
    zero = -theta * torch.log1p(mean / theta)
    exact = torch.log1p((zero - logits).exp()) - torch.log1p((-logits).exp())
    found = ops.zinb_log_prob(x, *single).double()
    torch.testing.assert_close(found, exact.sum(-1), rtol=1e-6, atol=0)


@models
@everywhere
def test_counts_that_are_not_whole(backend, model):
    x, *parameters = on(backend, random_counts(6, 40, depth=4.0))
    assert_equals_reference(model, x * 0.37, *parameters)


MODELS_AND_ARGUMENTS = [(model, which) for model in MODELS for which in range(FEW[model] + 1)]


def assert_nan_is_not_lost(device, model, which, kept=()):
    """A NaN as parameter or count gives a gradient of NaN, but for ``kept`` rows."""
    arguments = random_counts(4, 20, per_cell=True, dtype=torch.float32)[: 1 + FEW[model]]
    arguments[0][:3, 5] = torch.tensor([0, 3, 100])
    arguments[which][:3, 5] = torch.nan
    found, *slopes = values_and_gradients(FUNCTIONS[model], *on(device, arguments))
    assert found.isnan().tolist() == [True, True, True, False]
    for index, slope in enumerate(slopes, 1):
        lost = slope.isnan()
        assert lost[len(kept) : 3, 5].all() or which not in (0, index)
        lost[:3, 5] = False
        assert not lost.any()


@pytest.mark.parametrize(("model", "which"), MODELS_AND_ARGUMENTS)
def test_nan_is_not_lost(isa, model, which):
    # To the core the slope of a Poisson distribution's zero is -1, whatever the mean.
    assert_nan_is_not_lost("cpu", model, which, [0] if (model, which) == ("poisson", 1) else [])


@pytest.mark.parametrize(("model", "which"), MODELS_AND_ARGUMENTS)
@in_kernels
def test_nan_is_not_lost_in_kernels(backend, model, which):
    assert_nan_is_not_lost(backend, model, which)


@models
@in_core_and_kernels
def test_negative_counts_give_nan(backend, model):
    x, *parameters = on(backend, random_counts(3, 20))
    x[1, 7] = -1
    found, *slopes = values_and_gradients(FUNCTIONS[model], x, *parameters[: FEW[model]])
    assert found.isnan().tolist() == [False, True, False]
    assert all(slope[..., 7].isnan().any() for slope in slopes)


@everywhere
def test_a_mean_of_zero_is_finite_and_has_no_gradient(backend):
    x, mean, theta, logits = random_counts(3, 20)
    mean[:, ::3], theta[::4] = 0, 0
    arguments = on(backend, (x, mean, theta, logits))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        arguments = on(backend, arguments, dtype)
        assert_equals_reference("zinb", *arguments, tolerance=tolerance)
        found, by_mean, by_theta, _ = values_and_gradients(ops.zinb_log_prob, *arguments)
        assert found.isfinite().all()
        assert (by_mean[:, ::3] == 0).all() and (by_theta[::4] == 0).all()


@everywhere
def test_counts_of_other_dtypes(backend):
    x, *parameters = on(backend, random_counts(4, 11))
    expected = ops.zinb_log_prob(x, *parameters)
    for dtype in (torch.int16, torch.int32, torch.int64):
        assert torch.equal(ops.zinb_log_prob(x.to(dtype), *parameters), expected)


# --- a mean that comes as a library size and logits ---


def softmax_case(model, cells, genes, dtype=torch.float64):
    """Return random counts, logits in place of the mean, other parameters and library sizes."""
    x, mean, *rest = random_counts(cells, genes, dtype=dtype)
    scale = torch.linspace(0.5, 3, cells, dtype=dtype)
    rest = rest[: FEW[model] - 1]
    return x, mean.log() + scale[:, None], *rest, scale * mean.sum(-1)


def of_softmax(model, x, logits, *rest):
    """Return the log-likelihood for arguments from softmax_case."""
    *others, library_size = rest
    return FUNCTIONS[model](x, ops.SoftmaxMean(logits, library_size), *others)


def reference_of_softmax(x, logits, *rest):
    *others, library_size = rest
    return reference.count_log_prob(x, logits, *others, library_size=library_size)


def assert_softmax_equals_reference(device, model, genes):
    case = on(device, softmax_case(model, 5, genes))
    true = values_and_gradients(reference_of_softmax, *case)
    for x in (case[0], case[0].to_sparse_csr()):
        found = values_and_gradients(partial(of_softmax, model), x, *case[1:])
        torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-9)


@models
def test_softmax_mean_equals_reference(isa, model):
    for genes in (1, 7, 16, 33, 100):
        assert_softmax_equals_reference("cpu", model, genes)


@models
@in_kernels
def test_softmax_mean_equals_reference_in_kernels(backend, model):
    assert_softmax_equals_reference(backend, model, 20)


@models
def test_softmax_mean_in_float32_is_as_near_as_a_softmax_before(isa, model):
    case = softmax_case(model, 64, 500)
    single = [x.float() for x in case]

    def before(x, logits, *rest):
        return FUNCTIONS[model](x, rest[-1][:, None] * logits.softmax(-1), *rest[:-1])

    true = values_and_gradients(reference_of_softmax, *case)
    eager = values_and_gradients(before, *single)
    found = values_and_gradients(partial(of_softmax, model), *single)
    for a, b, c in zip(found, eager, true, strict=True):
        ours, theirs = ((y.double() - c).abs().max() for y in (a, b))
        assert ours <= 2 * theirs + 1e-6 * c.abs().max()


@everywhere
def test_softmax_mean_at_the_edges(backend):
    zinb = partial(of_softmax, "zinb")
    x, logits, *_, sizes = case = on(backend, softmax_case("zinb", 4, 20, torch.float32))
    logits[0, 3], logits[1] = -torch.inf, logits[1] + 1e4
    x[0, 3] = sizes[2] = 0
    found, slope, *_, of_size = values_and_gradients(zinb, *case)
    assert found.isfinite().all()
    assert slope[0, 3] == 0 and (slope[2] == 0).all() and of_size[2] == 0
    assert slope.isfinite().all() and of_size.isfinite().all()
    empty = torch.empty(4, 0, device=backend)
    *_, of_size = values_and_gradients(zinb, empty, empty, empty[0], empty, sizes)
    assert (of_size == 0).all()
    for bad, where in ((logits, (3, 7)), (sizes, 3)):
        bad[where] = torch.nan
        assert zinb(*case).isnan().tolist() == [False] * 3 + [True]
        bad[where] = 1


@pytest.mark.parametrize(
    ("model", "shape", "sums"),
    [("poisson", (3, 70), 1), ("nb", (3, 70), 2), ("zinb", (3, 70), 2), ("zinb", (2, 20), 0)],
)
@on_backends("triton")
def test_launches(small_programs, backend, model, shape, sums):
    """Forward, backward, and a sum of what was split."""
    if backend.type != "cpu":
        pytest.skip("counts the interpreter's launches")
    x, *parameters = random_counts(*shape)
    given = (x, None, None, *parameters[: FEW[model]], *[None] * (4 - FEW[model]))
    grad, wanted = torch.ones(len(x), dtype=x.dtype), [p is not None for p in given[3:]]
    with counted_launches() as launched, Computations() as computed:
        backends.call(COUNT_LOG_PROB, given)
        backends.call(COUNT_LOG_PROB.backward, (grad, *given, wanted))
    assert launched == ["count_log_prob_kernel", "count_log_prob_backward_kernel"]
    assert computed.names == ["sum.dim_IntList"] * sums


def softmax(shape, sizes):
    return ops.SoftmaxMean(torch.ones(shape), sizes)


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("counts", torch.ones(11), ValueError, r"must have shape \[B, G\], but has \[11\]"),
        ("counts", torch.ones(4, 11).to_sparse(), ValueError, "dense or torch.sparse_csr"),
        ("mean", softmax((4, 12), torch.ones(4)), ValueError, r"mean.logits must .*\[4, 12\]"),
        ("mean", softmax((4, 11), torch.ones(4, 1)), ValueError, r"mean.library_size must .*\[B\]"),
        (
            "mean",
            softmax((4, 11), torch.ones(4).int()),
            TypeError,
            "mean.library_size must be float64, float32",
        ),
        ("inverse_dispersion", torch.ones(4), ValueError, r"shape \[G\] or \[B, G\]"),
        ("inverse_dispersion", None, TypeError, "inverse_dispersion must be a torch.Tensor"),
        ("dropout_logits", None, TypeError, "dropout_logits must be a torch.Tensor, but is None"),
        ("mean", softmax((4, 11), None), TypeError, "mean.library_size must be a torch.Tensor"),
        ("counts", torch.ones(4, 11).cfloat(), TypeError, "counts must be real, but is"),
    ],
)
def test_bad_input(argument, value, error, message):
    names = ("counts", "mean", "inverse_dispersion", "dropout_logits")
    good = dict(zip(names, random_counts(4, 11), strict=True))
    with pytest.raises(error, match=message):
        ops.zinb_log_prob(**{**good, argument: value})


@pytest.mark.parametrize(("rows", "genes"), [([0, 1, 1, 1, 2], [3, 11]), ([0, 2, 1, 2, 2], [0, 6])])
@on_backends("core", "plain")
def test_sparse_indices_that_lie_outside(backend, rows, genes):
    values = torch.ones(2, dtype=torch.float64)
    model = (values, torch.tensor(rows), torch.tensor(genes), *random_counts(4, 11)[1:], None)
    with pytest.raises(ValueError, match="sparse indices must lie in its shape"):
        torch.ops.vmm_fast.count_log_prob(*model)
