"""Building whitened mixtures, in every form and backend, against the reference."""

import itertools

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    FORMS,
    assert_all_close,
    assert_no_worse,
    on,
    on_backends,
    random_gaussians,
    threads,
)

from vmm_fast import backends, ops, reference

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
# With both a precision and a scale there are two mixtures: the marginal and the expected one.
KINDS = [(form, False) for form in FORMS] + [(form, True) for form in FORMS[1:3]]
kinds = pytest.mark.parametrize(("form", "expected"), KINDS)
shapes = st.tuples(st.integers(1, 19), st.integers(1, 3), st.integers(1, 12))


def results(module, inputs, centers, expected=False, wanted=range(3)):
    """Return whitening, offsets and the gradients of the wanted inputs, by name."""
    leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
    for index in {0, 1, 2}.difference(wanted):
        leaves[index] = inputs[index]
    outputs = module.whitened_components(*leaves, centers, expected)
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs
    ]
    asked = {f"grad_{i}": x for i, x in enumerate(leaves) if x is not None and x.requires_grad}
    loss = sum((x * g).sum() for x, g in zip(outputs, upstream, strict=True))
    found = torch.autograd.grad(loss, list(asked.values()))
    values = dict(zip(("whitening", "offsets"), outputs, strict=True))
    return {k: x.detach() for k, x in values.items()} | dict(zip(asked, found, strict=True))


def assert_equals_reference(inputs, centers, expected, tolerance=1e-9, wanted=range(3)):
    found, true = (results(m, inputs, centers, expected, wanted) for m in (ops, reference))
    assert_all_close(found, true, tolerance)


def wide_gaussians(components, centers, dim, form, dtype=torch.float64):
    """Return well-conditioned Gaussians: a random triangle's condition grows fast with D."""
    log_weights, *factors = random_gaussians(components, centers, dim, form, dtype)
    for factor in factors:
        if factor is not None and factor.ndim == 3:
            below = factor.tril(-1) / dim
            factor.copy_(below + torch.diag_embed(factor.diagonal(dim1=-2, dim2=-1)))
            factor += torch.ones(dim, dim).triu(1)  # what is above the diagonal does not count
    return log_weights, *factors


# --- values and gradients ---


@settings(max_examples=60)
@given(shape=shapes, kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6))
def test_float64_equals_reference(shape, kind, seed):
    components, per_component, dim = shape
    centers = components * per_component
    inputs = random_gaussians(components, centers, dim, kind[0], seed=seed)
    assert_equals_reference(inputs, centers, kind[1], 1e-10)


@pytest.mark.parametrize(
    ("form", "expected", "dim"),
    [
        *((form, expected, 17) for form, expected in KINDS),
        *((form, False, 1) for form in FORMS[1:3]),
    ],
)
@on_backends("triton")
def test_one_dimension_and_the_larger_tile(backend, form, expected, dim):
    inputs = on(backend, wide_gaussians(1, 2, dim, form))
    assert_equals_reference(inputs, 2, expected)


@kinds
def test_every_instruction_set(isa, form, expected):
    for components, per_component, dim in [(1, 1, 1), (5, 2, 10), (9, 1, 31), (2, 1, 32)]:
        centers = components * per_component
        inputs = random_gaussians(components, centers, dim, form)
        assert_equals_reference(inputs, centers, expected)


@pytest.mark.parametrize("wanted", [{1}, {2}])
@pytest.mark.parametrize("expected", [False, True])
@on_backends("triton")
def test_gradients_of_one_input_in_the_larger_tile(backend, expected, wanted):
    inputs = on(backend, wide_gaussians(1, 1, 32, "precision+full"))
    assert_equals_reference(inputs, 1, expected, wanted=wanted)


def assert_within_budget(inputs, centers, expected):
    """Against float64 on the same numbers we err no more than eager float32 does."""
    double = [x if x is None else x.double() for x in inputs]
    found, eager, true = (
        results(module, given, centers, expected)
        for module, given in ((ops, inputs), (reference, inputs), (reference, double))
    )
    assert all(x.dtype == torch.float32 for x in found.values())
    assert_no_worse(found, eager, true)


@pytest.mark.parametrize("size", [1e-3, 1e3])
@kinds
def test_float32_error_budget(isa, form, expected, size):
    log_weights, precision_cholesky, scale = random_gaussians(20, 20, 10, form, torch.float32)
    precision_cholesky = None if precision_cholesky is None else precision_cholesky / size
    scale = None if scale is None else scale * size
    assert_within_budget((log_weights, precision_cholesky, scale), 20, expected)


@kinds
@on_backends("triton")
def test_float32_error_budget_of_kernels(backend, form, expected):
    for dim in (10, 32) if backend.type == "cuda" else (5,):
        inputs = on(backend, wide_gaussians(4, 8, dim, form), torch.float32)
        assert_within_budget(inputs, 8, expected)


@pytest.mark.parametrize(
    ("backend", "form", "dim"),
    [
        ("core", FORMS[1], 32),
        ("core", FORMS[2], 6),
        ("triton", FORMS[1], 6),
        ("triton", FORMS[2], 6),
    ],
    indirect=["backend"],
)
def test_float32_with_unlike_scales(backend, form, dim):
    log_weights, precision_cholesky, scale = wide_gaussians(3, 3, dim, form)
    deviation = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64).view(3, *[1] * (scale.ndim - 1))
    inputs = on(backend, (log_weights, precision_cholesky, scale * deviation), torch.float32)
    true = reference.whitened_components(*(x.double() for x in inputs), 3)
    for ours, exact in zip(ops.whitened_components(*inputs, 3), true, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision_size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("scale_size", [1e-6, 1.0, 1e6])
def test_huge_and_tiny(precision_size, scale_size):
    """Against 60 digits: A A^T = (Lambda^-1 + S)^-1 to rounding, whichever dominates."""
    for form in FORMS[1:3]:
        log_weights, factor, scale = random_gaussians(2, 2, 4, form)
        factor, scale = factor * precision_size, scale * scale_size
        whitening, offsets = ops.whitened_components(log_weights, factor, scale, 2)
        assert offsets.isfinite().all()
        full = scale if scale.ndim == 3 else torch.diag_embed(scale)
        with mpmath.workdps(60):
            for a, left, s in zip(whitening, factor, full, strict=True):
                a, left, s = (mpmath.matrix(x.tolist()) for x in (a, left, s))
                product = a * a.T * ((left * left.T) ** -1 + s * s.T)
                assert mpmath.mnorm(product - mpmath.eye(4), "f") < 1e-13


@on_backends("core", "plain")
def test_badly_conditioned_float32_becomes_float64(backend):
    """The last of so many that two threads share them."""
    inputs = wide_gaussians(300, 300, 10, "precision+full", torch.float32)
    assert ops.whitened_components(*inputs, 300)[0].dtype == torch.float32
    inputs[1][-1, 0, 0] = 1e5
    with threads(2):
        found = results(ops, inputs, 300, True)
    assert found["whitening"].dtype == found["offsets"].dtype == torch.float64
    true = results(ops, [x.double() for x in inputs], 300, True)
    for i in range(3):
        assert found[f"grad_{i}"].dtype == torch.float32
        torch.testing.assert_close(found[f"grad_{i}"], true[f"grad_{i}"].float())


@pytest.mark.parametrize("form", FORMS)
@on_backends("core", "plain", "triton")
def test_a_pruned_component_has_no_gradient(backend, form):
    log_weights, precision_cholesky, scale = on(backend, random_gaussians(3, 6, 4, form))
    log_weights[1] = -torch.inf
    inputs = [
        x if x is None else x.requires_grad_() for x in (log_weights, precision_cholesky, scale)
    ]
    whitening, offsets = ops.whitened_components(*inputs, 6)
    assert (offsets[2:4] == -torch.inf).all()
    assert offsets[[0, 1, 4, 5]].isfinite().all()
    z, centers = torch.randn(2, 5, 4, dtype=torch.float64, device=backend)
    centers = centers.mean(0).expand(6, 4)
    lse, _ = ops.mixture_log_prob(z, centers, whitening, offsets, precision_cholesky is not None)
    for grad in torch.autograd.grad(lse.sum(), [x for x in inputs if x is not None]):
        pruned = slice(1, 2) if len(grad) == 3 else slice(2, 4)
        assert grad.isfinite().all()
        assert (grad[pruned] == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(100_000, 1, 2), (2, 2, 32), (1, 1, 128)])
def test_many_components_and_dimensions(shape, form):
    components, per_component, dim = shape
    inputs = wide_gaussians(components, components * per_component, dim, form)
    assert_equals_reference(inputs, components * per_component, False)


# --- what a prior stores ---


@pytest.mark.parametrize(
    ("form", "components", "centers", "dim"),
    [
        ("precision", 5, 5, 1),
        ("precision+full", 3, 6, 4),
        ("precision+full", 1, 2, 17),
        ("precision+full", 2, 2, 33),
        ("precision+diagonal", 1, 2, 32),
    ],
)
@on_backends("core", "plain", "triton")
def test_components_from_what_a_prior_stores(monkeypatch, backend, form, components, centers, dim):
    if backends.FORCED == "triton":
        from vmm_fast.kernels import components as kernels

        monkeypatch.setattr(kernels, "BLOCK", 2)  # several of them have all logits
    logits, raw_precision, scale = on(backend, random_gaussians(components, centers, dim, form))
    if components > 1:
        logits[0] = -torch.inf
    L = reference.precision_cholesky(raw_precision)
    scale = None if scale is None else scale.requires_grad_()
    whitening, offsets, *made = ops.stored_components(logits, raw_precision, scale, centers)
    torch.testing.assert_close(made, [logits.log_softmax(-1), L], **TIGHT)
    true = reference.whitened_components(made[0], L, scale, centers)
    torch.testing.assert_close((whitening, offsets), true, **TIGHT)
    if scale is not None:
        losses = (
            whitening.sin().sum() + offsets.exp().sum(),
            true[0].sin().sum() + true[1].exp().sum(),
        )
        torch.testing.assert_close(*(torch.autograd.grad(x, scale) for x in losses), **TIGHT)


# --- memory and threads ---


@kinds
def test_same_bits_at_any_thread_count(form, expected):
    inputs = random_gaussians(41, 123, 20, form, torch.float32)
    runs = []
    for count in (1, 1, 2, 3):
        with threads(count):
            runs.append(results(ops, inputs, 123, expected))
    for other in runs[1:]:
        assert all(torch.equal(other[name], x) for name, x in runs[0].items())


# --- errors ---


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize(
    ("form", "position", "values"),
    [
        ("precision+full", 1, (0.0, -1.0, torch.nan, torch.inf)),
        ("precision+full", 2, (torch.nan, torch.inf)),
        ("precision+diagonal", 2, (torch.nan, torch.inf)),
        ("precision", 1, (0.0,)),
        ("full", 2, (0.0, torch.nan)),
        ("diagonal", 2, (-1.0, torch.inf)),
    ],
)
def test_no_positive_definite_covariance(monkeypatch, isa, form, position, values, expected):
    inputs = random_gaussians(12, 24, 5, form)
    first = 11 if position == 1 else 22
    message = "component 11 has no positive-definite covariance"
    for value, forced in itertools.product(values, ("core", "reference")):
        monkeypatch.setattr(backends, "FORCED", forced)
        inputs[position][(first, *[3] * (inputs[position].ndim - 1))] = value
        with pytest.raises(ValueError, match=message):
            ops.whitened_components(*inputs, 24, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("where", "bad", "message"),
    [
        (1, torch.nan, "must be finite or -inf, but row 1 has a NaN or infinite value"),
        (2, torch.inf, "must be finite or -inf, but row 2 has a NaN or infinite value"),
        (slice(None), -torch.inf, "must be finite for at least one component, but are all -inf"),
    ],
)
@on_backends("core", "plain")
def test_log_weights_that_are_none(backend, where, bad, message, dtype):
    log_weights, L, scale = (x.to(dtype) for x in random_gaussians(3, 6, 2, "precision+full"))
    log_weights[where] = bad
    for expected in (False, True):
        with pytest.raises(ValueError, match=f"^log_weights {message}$"):
            ops.whitened_components(log_weights, L, scale, 6, expected)
    with pytest.raises(ValueError, match=f"^logits {message}$"):
        ops.stored_components(log_weights, L, scale, 6)


@pytest.mark.parametrize(
    ("dim", "expected", "value"),
    [
        (1, False, 0.0),
        (3, True, -1.0),
        (17, True, 0.0),
        (17, False, torch.nan),
    ],
)
@on_backends("triton")
def test_kernels_give_nan_where_there_is_no_covariance(backend, dim, expected, value):
    log_weights, precision_cholesky, scale = wide_gaussians(2, 2, dim, "precision+full")
    precision_cholesky[1, -1, -1] = value
    inputs = on(backend, (log_weights, precision_cholesky, scale))
    _, offsets = ops.whitened_components(*inputs, 2, expected)
    assert offsets.isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_weights": torch.zeros(2, 1)}, r"log_weights must have shape \[C\] with C >= 1"),
        ({"scale": torch.ones(2, 3)}, r"scale must .* \[J, D\] or .* with J = 4, D = 3, but"),
        ({"num_centers": 3}, "num_centers must be a multiple of C = 2, but is 3"),
        ({"scale": None, "precision_cholesky": None}, "and scale must not both be None"),
    ],
)
def test_errors_name_the_argument(change, message):
    names = ("log_weights", "precision_cholesky", "scale")
    arguments = dict(zip(names, random_gaussians(2, 4, 3, "precision+full"), strict=True))
    with pytest.raises(ValueError, match=message):
        ops.whitened_components(**{**arguments, "num_centers": 4, **change})
