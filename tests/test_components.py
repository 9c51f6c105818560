"""Building whitened mixtures: the compiled operation against the reference, in every form."""

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FORMS, expanded, random_gaussians, shifted, strided, threads

from vmm_fast import ops, reference
from vmm_fast.backends import core, plain

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
shapes = st.tuples(st.integers(1, 19), st.integers(1, 3), st.integers(1, 12))


def results(function, inputs, centers, expected=False):
    """whitening, offsets and the gradients of all inputs, under fixed upstream gradients."""
    inputs = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs, centers, expected)
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs
    ]
    given = [x for x in inputs if x is not None]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, given, upstream)]


def assert_equals_reference(inputs, centers, expected, **tolerance):
    ours = results(ops.whitened_components, inputs, centers, expected)
    true = results(reference.whitened_components, inputs, centers, expected)
    for actual, wanted in zip(ours, true, strict=True):
        torch.testing.assert_close(actual, wanted, **tolerance)


@pytest.mark.parametrize("wanted", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_gradient_alone_in_plain_torch(form, expected, wanted):
    inputs = random_gaussians(3, 6, 4, form)
    wanted = [bool(want) and x is not None for x, want in zip(inputs, wanted, strict=True)]
    if not any(wanted):
        pytest.skip("this form has no such argument")
    whitening, offsets, _ = plain.whitened_components(*inputs, 6, expected)
    whitening = whitening.contiguous()
    arguments = (whitening.sin(), offsets.cos(), *inputs, whitening, expected)
    found = plain.whitened_components_backward(*arguments, wanted)
    every = core.whitened_components_backward(*arguments, [x is not None for x in inputs])
    for actual, true, want in zip(found, every, wanted, strict=True):
        assert (actual is not None) == want
        if want:
            torch.testing.assert_close(actual, true, **TIGHT)


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes, form=st.sampled_from(FORMS), expected=st.booleans(), seed=st.integers(0, 10**6)
)
def test_float64_equals_reference(shape, form, expected, seed):
    components, per_component, dim = shape
    centers = components * per_component
    inputs = random_gaussians(components, centers, dim, form, seed=seed)
    assert_equals_reference(inputs, centers, expected, **TIGHT)


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 2, 10), (9, 1, 33), (2, 1, 64)])
def test_every_instruction_set(isa, shape, form, expected):
    components, per_component, dim = shape
    centers = components * per_component
    inputs = random_gaussians(components, centers, dim, form)
    assert_equals_reference(inputs, centers, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, expected):
    inputs = random_gaussians(2, 4, 3, form)
    given = [x.requires_grad_() for x in inputs if x is not None]

    def function(*given):
        tensors = iter(given)
        arguments = (None if x is None else next(tensors) for x in inputs)
        return ops.whitened_components(*arguments, 4, expected)

    assert torch.autograd.gradcheck(function, given)


@pytest.mark.parametrize("wanted", [{0}, {1}, {2}, {0, 1}, {1, 2}])
@pytest.mark.parametrize("expected", [False, True])
def test_gradients_of_some_inputs(wanted, expected):
    """What else has a gradient changes nothing."""
    inputs = random_gaussians(3, 6, 4, "precision+full")
    every = results(ops.whitened_components, inputs, 6, expected)[2:]
    some = [x.detach().clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    outputs = ops.whitened_components(*some, 6, expected)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
    grads = torch.autograd.grad(outputs, [some[i] for i in sorted(wanted)], upstream)
    for i, grad in zip(sorted(wanted), grads, strict=True):
        assert torch.equal(grad, every[i])


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_float32_error_budget(isa, size, form, expected):
    """Against float64 on the same numbers we err no more than eager float32 does, plus rounding."""
    log_weights, precision_cholesky, scale = random_gaussians(20, 20, 10, form, torch.float32)
    precision_cholesky = None if precision_cholesky is None else precision_cholesky / size
    scale = None if scale is None else scale * size
    inputs = (log_weights, precision_cholesky, scale)
    wide = [x if x is None else x.double() for x in inputs]
    true = results(reference.whitened_components, wide, 20, expected)
    eager = results(reference.whitened_components, inputs, 20, expected)
    ours = results(ops.whitened_components, inputs, 20, expected)
    rounding = torch.finfo(torch.float32).eps
    for actual, other, exact in zip(ours, eager, true, strict=True):
        assert actual.dtype == torch.float32
        budget = 1.5 * (other - exact).abs().max() + 8 * rounding * exact.abs().max()
        assert (actual - exact).abs().max() <= budget


@pytest.mark.parametrize("form", ["precision+full", "precision+diagonal"])
@pytest.mark.parametrize("precision_size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("scale_size", [1e-6, 1.0, 1e6])
def test_huge_and_tiny(form, precision_size, scale_size):
    """Against 60 digits: A A^T = (Lambda^-1 + S)^-1 to rounding, whichever dominates."""
    log_weights, factor, scale = random_gaussians(2, 2, 4, form)
    factor, scale = factor * precision_size, scale * scale_size
    whitening, offsets = ops.whitened_components(log_weights, factor, scale, 2)
    assert offsets.isfinite().all()
    full = scale if scale.ndim == 3 else torch.diag_embed(scale)
    with mpmath.workdps(60):
        for a, left, s in zip(whitening, factor, full, strict=True):
            a, left, s = (mpmath.matrix(x.tolist()) for x in (a, left, s))
            product = a * a.T * ((left * left.T) ** -1 + s * s.T)
            error = product - mpmath.eye(4)
            assert mpmath.mnorm(error, "f") < 1e-13


def test_badly_conditioned_float32_becomes_float64():
    log_weights, factor, scale = random_gaussians(3, 3, 4, "precision+full", torch.float32)
    assert ops.whitened_components(log_weights, factor, scale, 3)[0].dtype == torch.float32
    factor[1, 0, 0] = 1e5
    inputs = (log_weights, factor, scale)
    wide = tuple(x.double() for x in inputs)
    whitening, offsets = ops.whitened_components(*inputs, 3, True)
    assert whitening.dtype == offsets.dtype == torch.float64
    ours = results(ops.whitened_components, inputs, 3, True)
    true = results(ops.whitened_components, wide, 3, True)
    for actual, exact in zip(ours[2:], true[2:], strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, exact.float())


def test_dtypes():
    """Halves are computed in float32, and of several dtypes the widest counts."""
    inputs = random_gaussians(3, 3, 4, "precision+full")
    halves = [x.bfloat16() for x in inputs]
    true = reference.whitened_components(*(x.float() for x in halves), 3)
    torch.testing.assert_close(ops.whitened_components(*halves, 3), true, rtol=1e-5, atol=1e-5)
    mixed = (inputs[0].float(), inputs[1], inputs[2].float())
    true = reference.whitened_components(*(x.double() for x in mixed), 3)
    torch.testing.assert_close(ops.whitened_components(*mixed, 3), true)


@pytest.mark.parametrize("form", FORMS)
def test_pruned_component(form):
    log_weights, precision_cholesky, scale = random_gaussians(3, 6, 4, form)
    log_weights[1] = -torch.inf
    inputs = [
        x if x is None else x.requires_grad_() for x in (log_weights, precision_cholesky, scale)
    ]
    whitening, offsets = ops.whitened_components(*inputs, 6)
    assert (offsets[2:4] == -torch.inf).all()
    assert offsets[[0, 1, 4, 5]].isfinite().all()
    z, centers = torch.randn(2, 5, 4, dtype=torch.float64)
    centers = centers.mean(0).expand(6, 4)
    lse, _ = ops.mixture_log_prob(z, centers, whitening, offsets, precision_cholesky is not None)
    for grad in torch.autograd.grad(lse.sum(), [x for x in inputs if x is not None]):
        pruned = slice(1, 2) if len(grad) == 3 else slice(2, 4)
        assert grad.isfinite().all()
        assert (grad[pruned] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [shifted, strided, expanded])
@pytest.mark.parametrize("form", FORMS)
def test_inputs_lie_anywhere_in_memory(form, layout, dtype):
    """Misaligned, with gaps, or with strides of zero: the values alone count."""
    inputs = random_gaussians(6, 6, 4, form, dtype)
    laid_out = [x if x is None else layout(x) for x in inputs]
    given = [x for x in laid_out if x is not None]
    assert all(x.data_ptr() % 64 if layout is shifted else not x.is_contiguous() for x in given)
    outputs = []
    for tensors in (laid_out, [x if x is None else x.contiguous().clone() for x in laid_out]):
        leaves = [x if x is None else x.detach().requires_grad_() for x in tensors]
        values = ops.whitened_components(*leaves, 6)
        total = values[0].sum() + values[1].sum()  # upstream gradients have strides of zero
        grads = torch.autograd.grad(total, [x for x in leaves if x is not None])
        outputs.append((*values, *grads))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(100_000, 1, 2), (2, 2, 128), (1, 1, 129)])
def test_many_components_and_dimensions(shape, form):
    components, per_component, dim = shape
    centers = components * per_component
    log_weights, *factors = random_gaussians(components, centers, dim, form)
    for factor in factors:
        # Less below the diagonal: a random triangle's condition grows exponentially with D.
        if factor is not None and factor.ndim == 3:
            factor.tril_(-1).div_(dim).add_(torch.eye(dim, dtype=torch.float64))
    assert_equals_reference((log_weights, *factors), centers, False, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("expected", [False, True])
def test_upper_triangles_are_not_read(expected):
    log_weights, factor, scale = random_gaussians(3, 3, 4, "precision+full")
    above = torch.full((3, 4, 4), torch.nan, dtype=torch.float64).triu(1)
    dirty = (log_weights, factor + above, scale + above)
    assert dirty[1].isnan().any()
    ours = results(ops.whitened_components, dirty, 3, expected)
    for actual, wanted in zip(
        ours,
        results(ops.whitened_components, (log_weights, factor, scale), 3, expected),
        strict=True,
    ):
        assert torch.equal(actual, wanted)
    for grad in (ours[0], *ours[3:]):
        assert (grad.triu(1) == 0).all()


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_same_bits_at_any_thread_count(form, expected):
    inputs = random_gaussians(41, 123, 20, form, torch.float32)
    runs = []
    for count in (1, 1, 2, 3):
        with threads(count):
            runs.append(results(ops.whitened_components, inputs, 123, expected))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form, dtype):
    op = torch.ops.vmm_fast
    inputs = random_gaussians(2, 4, 3, form, dtype)
    torch.library.opcheck(op.whitened_components, (*inputs, 4, False))
    with_grad = tuple(x if x is None else x.clone().requires_grad_() for x in inputs)
    torch.library.opcheck(op.whitened_components, (*with_grad, 4, True))
    whitening, offsets = op.whitened_components(*inputs, 4, False)
    wanted = [x is not None for x in inputs]
    torch.library.opcheck(
        op.whitened_components_backward,
        (whitening, offsets, *inputs, whitening, False, wanted),
    )


@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_graph_breaks(form):
    inputs = random_gaussians(2, 4, 3, form)
    z, centers = torch.randn(2, 4, 3, dtype=torch.float64)
    given = [x.requires_grad_() for x in inputs if x is not None]

    def step(log_weights, precision_cholesky, scale):
        mixture = ops.whitened_components(log_weights, precision_cholesky, scale, 4)
        return ops.mixture_log_prob(z, centers, *mixture, precision_cholesky is not None)[0].sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*inputs), given), torch.autograd.grad(step(*inputs), given)
    )


def test_second_derivative_is_refused():
    inputs = [x.requires_grad_() for x in random_gaussians(2, 2, 3, "precision+full")]
    whitening, _ = ops.whitened_components(*inputs, 2)
    with pytest.raises(RuntimeError, match=r"whitened_components has no second derivative"):
        torch.autograd.grad(whitening.sum(), inputs[2], create_graph=True)


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_other_devices(form, expected):
    """What runs where the compiled core does not."""
    inputs = random_gaussians(3, 6, 4, form, torch.float32)
    *outputs, _ = plain.whitened_components(*inputs, 6, expected)
    true = ops.whitened_components(*inputs, 6, expected)
    torch.testing.assert_close(tuple(outputs), true)
    wanted = [False, *(x is not None for x in inputs[1:])]
    upstream = [x.sin() for x in outputs]
    grads = plain.whitened_components_backward(*upstream, *inputs, outputs[0], expected, wanted)
    grads = [g for g in grads if g is not None]
    given = [x.requires_grad_() for x in inputs[1:] if x is not None]
    outputs = ops.whitened_components(*inputs, 6, expected)
    torch.testing.assert_close(
        tuple(grads), torch.autograd.grad(outputs, given, upstream), rtol=1e-4, atol=1e-5
    )
    broken = [x if x is None else x.detach().clone() for x in inputs]
    broken[1 if inputs[2] is None else 2][-1] = torch.nan
    with pytest.raises(ValueError, match="component 2 has no positive-definite covariance"):
        plain.whitened_components(*broken, 6, expected)


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize(
    ("form", "position", "value"),
    [
        ("precision+full", 1, 0.0),
        ("precision+full", 1, -1.0),
        ("precision+full", 1, torch.nan),
        ("precision+full", 1, torch.inf),
        ("precision+full", 2, torch.nan),
        ("precision+full", 2, torch.inf),
        ("precision+diagonal", 2, torch.nan),
        ("precision+diagonal", 2, torch.inf),
        ("precision", 1, 0.0),
        ("full", 2, 0.0),
        ("full", 2, torch.nan),
        ("diagonal", 2, -1.0),
        ("diagonal", 2, torch.inf),
    ],
)
def test_no_positive_definite_covariance(isa, form, position, value, expected):
    inputs = random_gaussians(12, 24, 5, form)
    first = 11 if position == 1 else 22
    inputs[position][(first, *[3] * (inputs[position].ndim - 1))] = value
    with pytest.raises(ValueError, match="component 11 has no positive-definite covariance"):
        ops.whitened_components(*inputs, 24, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"log_weights": [0.0, 0.0]}, TypeError, "log_weights must be a torch.Tensor, but is list"),
        ({"log_weights": torch.zeros(2, 1)}, ValueError, r"log_weights must have shape \[C\]"),
        (
            {"log_weights": torch.zeros(2, dtype=torch.int64)},
            TypeError,
            "log_weights must be float64, float32, float16 or bfloat16, but is torch.int64",
        ),
        ({"precision_cholesky": torch.eye(3)}, ValueError, "precision_cholesky must have shape"),
        (
            {"precision_cholesky": torch.zeros(2, 3, 3, device="meta")},
            ValueError,
            "precision_cholesky must be on log_weights' device cpu, but is on meta",
        ),
        (
            {"scale": torch.ones(2, 3)},
            ValueError,
            r"scale must have shape \[J, D\] or .* with J = 4",
        ),
        (
            {"precision_cholesky": None, "scale": torch.ones(4, 3, 2)},
            ValueError,
            "scale must have shape",
        ),
        (
            {"precision_cholesky": None, "scale": torch.ones(4)},
            ValueError,
            "scale must have shape",
        ),
        ({"num_centers": 3}, ValueError, "num_centers must be a multiple of C = 2, but is 3"),
        (
            {"precision_cholesky": None, "scale": None},
            ValueError,
            "precision_cholesky and scale must not both be None",
        ),
    ],
)
def test_errors_name_the_argument(change, error, message):
    log_weights, precision_cholesky, scale = random_gaussians(2, 4, 3, "precision+full")
    arguments = {
        "log_weights": log_weights,
        "precision_cholesky": precision_cholesky,
        "scale": scale,
        "num_centers": 4,
    }
    with pytest.raises(error, match=message):
        ops.whitened_components(**{**arguments, **change})
