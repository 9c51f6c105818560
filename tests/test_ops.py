"""The compiled operations against the reference: values, gradients, precision, errors."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import expanded, random_mixture, shifted, strided, threads
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm_fast import ops, reference


def all_outputs(module, mixture, transpose=False, group=1):
    """Every output of every operation but the label, by name."""
    lse, expected = module.mixture_log_prob(*mixture, transpose)
    n, s, m = module.mixture_statistics(*mixture, transpose)
    _, probability, entropy = module.mixture_assign(*mixture, transpose, group)
    return {
        "lse": lse,
        "expected": expected,
        "N": n,
        "s": s,
        "M": m,
        "log_joint": module.mixture_log_joint(*mixture, transpose, group),
        "responsibilities": module.mixture_responsibilities(*mixture, transpose, group),
        "probability": probability,
        "entropy": entropy,
    }


def gradients(module, mixture, transpose=False):
    inputs = [x.detach().requires_grad_() for x in mixture]  # as they lie in memory
    lse, expected = module.mixture_log_prob(*inputs, transpose)
    g = torch.linspace(-1, 2, len(lse), dtype=lse.dtype, device=lse.device)
    return torch.autograd.grad((lse * g).sum() + (expected * g.flip(0)).sum(), inputs)


def assert_close(actual, expected, **tolerance):
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


shapes = st.tuples(st.integers(0, 140), st.integers(1, 9), st.integers(1, 17))


@settings(max_examples=40, deadline=None)
@given(shape=shapes, transpose=st.booleans(), seed=st.integers(0, 10**6))
def test_float64_equals_reference(shape, transpose, seed):
    mixture = random_mixture(*shape, seed=seed)
    tolerance = {"rtol": 1e-10, "atol": 1e-10}
    assert_close(
        all_outputs(ops, mixture, transpose),
        all_outputs(reference, mixture, transpose),
        **tolerance,
    )
    for actual, expected in zip(
        gradients(ops, mixture, transpose), gradients(reference, mixture, transpose), strict=True
    ):
        torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [(300, 12, 10), (65, 6, 33), (1, 3, 1), (2, 1, 130)])
def test_every_instruction_set(isa, shape, transpose):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        mixture = random_mixture(*shape, dtype=dtype)
        kwargs = {"rtol": tolerance, "atol": tolerance}
        assert_close(
            all_outputs(ops, mixture, transpose),
            all_outputs(reference, mixture, transpose),
            **kwargs,
        )
        for actual, expected in zip(
            gradients(ops, mixture, transpose),
            gradients(reference, mixture, transpose),
            strict=True,
        ):
            torch.testing.assert_close(
                actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max()
            )


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", [(2500, 20, 5), (1100, 40, 21), (2100, 3, 33)])
@pytest.mark.parametrize("transpose", [False, True])
def test_many_tiles(shape, count, transpose):
    mixture = random_mixture(*shape)
    with threads(count):
        got, slopes = all_outputs(ops, mixture, transpose), gradients(ops, mixture, transpose)
    assert_close(got, all_outputs(reference, mixture, transpose), rtol=1e-10, atol=1e-10)
    expected = gradients(reference, mixture, transpose)
    torch.testing.assert_close(slopes, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [(1500, 7, 10), (700, 9, 3), (400, 5, 33), (300, 4, 130)])
def test_few_samples_with_a_weight(isa, shape, transpose):
    """Components whose samples are few and scattered, next to such whose samples come together."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        z, centers, whitening, offsets = random_mixture(*shape, dtype=dtype)
        centers = 200 * centers
        of = torch.arange(len(z)) % 3
        of[len(z) // 2 :] = 3
        mixture = (centers[of] + z, centers, whitening, offsets)
        weighty = ops.mixture_responsibilities(*mixture, transpose) > 0
        assert weighty[: len(z) // 2].double().mean() < 0.4
        assert weighty[len(z) // 2 :, 3].all()
        tolerances = {"rtol": tolerance, "atol": tolerance}
        got, expected = (all_outputs(m, mixture, transpose) for m in (ops, reference))
        assert_close(got, expected, **tolerances)
        for actual, wanted in zip(
            gradients(ops, mixture, transpose),
            gradients(reference, mixture, transpose),
            strict=True,
        ):
            torch.testing.assert_close(
                actual, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max())
            )


def composed_kl(z, centers, whitening, offsets, transpose, scale):
    """The estimate from its parts."""
    lse, _ = reference.mixture_log_prob(z, centers, whitening, offsets, transpose)
    diagonal = scale if scale.ndim == 2 else scale.diagonal(dim1=-2, dim2=-1)
    entropy = torch.distributions.Normal(torch.zeros_like(diagonal), diagonal).entropy().sum(-1)
    return -entropy - lse


def random_scale(size, dim, full, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    scale = torch.rand(size, dim, generator=generator, dtype=dtype) + 0.1
    if not full:
        return scale
    below = torch.randn(size, dim, dim, generator=generator, dtype=dtype).tril(-1)
    return below + torch.diag_embed(scale)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [(7, 4, 3), (300, 5, 18), (0, 2, 2), (1, 1, 1)])
def test_kl_equals_its_parts(shape, transpose, full):
    mixture, scale = random_mixture(*shape), random_scale(shape[0], shape[2], full)
    outputs = []
    for kl in (ops.mixture_kl, composed_kl):
        inputs = [x.detach().clone().requires_grad_() for x in (*mixture, scale)]
        value = kl(*inputs[:4], transpose, inputs[4])
        weights = torch.linspace(-1, 2, len(value), dtype=value.dtype)
        outputs.append((value, *torch.autograd.grad(value @ weights, inputs)))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-10)


def test_kl_where_the_determinant_of_a_scale_overflows_and_underflows():
    mixture = random_mixture(2, 3, 100, dtype=torch.float32)
    scale = torch.tensor([[1e-37], [1e37]]).expand(2, 100)
    expected = composed_kl(*(x.double() for x in mixture), False, scale.double())
    torch.testing.assert_close(ops.mixture_kl(*mixture, False, scale), expected.float())


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("full", [False, True])
def test_kl_refuses_a_scale_that_is_not_positive(bad, full):
    mixture, scale = random_mixture(4, 3, 2), random_scale(4, 2, full)
    scale[(2, 1, 1) if full else (2, 1)] = bad
    with pytest.raises(ValueError, match="q must be finite with a positive scale, but row 2 is"):
        ops.mixture_kl(*mixture, False, scale)


@pytest.mark.parametrize("group", [2, 3, 12])
def test_groups(isa, group):
    mixture = random_mixture(150, 12, 4)
    assert_close(
        all_outputs(ops, mixture, group=group),
        all_outputs(reference, mixture, group=group),
        rtol=1e-10,
        atol=1e-10,
    )
    label, _, _ = ops.mixture_assign(*mixture, False, group)
    torch.testing.assert_close(label, reference.mixture_assign(*mixture, False, group)[0])


def to_double(mixture):
    return tuple(x.double() for x in mixture)


def everything(module, mixture, transpose):
    """Every output of every operation and every gradient, by name."""
    names = ("grad_z", "grad_centers", "grad_whitening", "grad_offsets")
    slopes = zip(names, gradients(module, mixture, transpose), strict=True)
    return all_outputs(module, mixture, transpose) | dict(slopes)


def assert_within_budget(ours, mixture, transpose):
    """As :func:`assert_no_worse` says, of what :func:`everything` gives."""
    truth = everything(reference, to_double(mixture), transpose)
    assert_no_worse(ours, everything(reference, mixture, transpose), truth)


def assert_no_worse(ours, eager, truth):
    """Against float64 on the same numbers we err no more than eager float32 does, plus rounding.

    Eager's own largest error is a draw, which depends on the machine's matrix products: of few
    numbers it may be several times smaller than usual.
    """
    for name, true in truth.items():
        rounding = torch.finfo(ours[name].dtype).eps
        budget = 1.5 * (eager[name] - true).abs().max() + 16 * rounding * true.abs().max()
        assert (ours[name] - true).abs().max() <= budget, name


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_float32_error_budget(isa, scale, offset, transpose):
    z, centers, whitening, offsets = random_mixture(200, 20, 10, dtype=torch.float32, seed=3)
    mixture = (z * scale + offset, centers * scale + offset, whitening / scale, offsets)
    assert_within_budget(everything(ops, mixture, transpose), mixture, transpose)


@pytest.mark.parametrize("transpose", [False, True])
def test_float32_error_budget_of_unlike_components(isa, transpose):
    """Centers 1e4 apart, standard deviations from 1e-3 to 1e3, some points far out."""
    z, centers, whitening, offsets = random_mixture(240, 12, 10, dtype=torch.float32, seed=3)
    deviation = torch.logspace(-3, 3, 12)
    whitening = whitening / deviation[:, None, None]
    offsets = offsets - 10 * deviation.log()
    centers = 1e4 * centers
    of = torch.arange(len(z)) % 12
    z = centers[of] + deviation[of, None] * z
    z[::8] = centers[0] + 1e-3 * 500 * torch.nn.functional.normalize(z[::8])  # out in a tail
    mixture = (z, centers, whitening, offsets)
    lowest = reference.mixture_log_joint(*to_double(mixture), transpose).amax(1).min()
    assert lowest < -1e3
    assert_within_budget(everything(ops, mixture, transpose), mixture, transpose)


def test_far_off_samples_of_a_narrow_component():
    """Products of A with itself overflow where neither A nor the gradient does."""
    mixture = (torch.zeros(1, 1), torch.zeros(1, 1), torch.full((1, 1, 1), 1e20), torch.zeros(1))
    for gradient in gradients(ops, mixture):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [(3, 100_000, 2), (29, 7, 128), (130, 33, 129), (300, 40, 17)])
def test_many_components_and_dimensions(shape, transpose):
    """At one thread and at two: the same bits on every run, and errors within the budget."""
    # Near enough for soft assignments: else the largest error is that of one lone tie.
    mixture = random_mixture(*shape, dtype=torch.float32, spread=min(2.0, 20 / shape[2]))
    for count in (1, 2):
        with threads(count):
            first, second = (everything(ops, mixture, transpose) for _ in range(2))
        for name in first:
            assert torch.equal(first[name], second[name]), name
        assert_within_budget(first, mixture, transpose)
    label = ops.mixture_assign(*mixture, transpose)[0]
    assert torch.equal(label, reference.mixture_assign(*to_double(mixture), transpose)[0])


@pytest.mark.parametrize("size", [3, 980])  # l is kept between the passes, and is not
def test_statistics_of_more_threads_than_memory_for_copies(size):
    """Where a copy of the sums for every thread would be too large, components are shared out."""
    mixture = random_mixture(size, 270, 128, spread=0.2)
    with threads(16):
        first, second = (ops.mixture_statistics(*mixture) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    expected = reference.mixture_statistics(*mixture)
    torch.testing.assert_close(first, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("radius", [1e2, 1e3, 1e4])
def test_far_tails_stay_normalised(isa, radius):
    """Responsibilities sum to 1 and statistics to B however low the float32 densities are."""
    torch.manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(64, 10)) * radius
    centers = torch.randn(5, 10).repeat(2, 1)  # every component twice
    mixture = (z, centers, torch.eye(10).repeat(10, 1, 1), torch.zeros(10))
    q = ops.mixture_responsibilities(*mixture)
    torch.testing.assert_close(q.sum(-1), torch.ones(64), rtol=1e-5, atol=0)
    torch.testing.assert_close(q[:, :5], q[:, 5:], rtol=1e-6, atol=0)
    n, _, _ = ops.mixture_statistics(*mixture)
    torch.testing.assert_close(n.sum(), torch.tensor(64.0), rtol=1e-5, atol=0)
    (grad_offsets,) = gradients(ops, mixture)[3:]
    total = torch.linspace(-1, 2, 64).sum() * 2  # d/dc of lse and of the expectation, by weights
    torch.testing.assert_close(grad_offsets.sum(), total, rtol=1e-3, atol=1e-3)


def test_far_off_component_gives_no_nan():
    """A component whose whitened distance overflows has a weight of exactly 0."""
    centers = torch.tensor([[0.0], [3e38]])
    mixture = (torch.tensor([[0.0]]), centers, torch.full((2, 1, 1), 2.0), torch.zeros(2))
    assert all(g.isfinite().all() for g in gradients(ops, mixture))


def test_far_tails():
    """Log-densities down to -1e6: finite, relative accuracy of the dtype, exact assignment."""
    z, centers, whitening, offsets = random_mixture(50, 8, 5, dtype=torch.float32)
    z = z * 500
    lse, expected = ops.mixture_log_prob(z, centers, whitening, offsets)
    true, true_expected = reference.mixture_log_prob(*to_double((z, centers, whitening, offsets)))
    assert true.min() < -1e6
    torch.testing.assert_close(lse.double(), true, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expected.double(), true_expected, rtol=1e-5, atol=1e-5)


def test_pruned_components():
    """Offsets of -inf: as if the component were not there, with gradients of zero."""
    mixture = random_mixture(90, 7, 4)
    kept = torch.tensor([0, 2, 3, 6])
    pruned = mixture[3].clone()
    pruned[[1, 4, 5]] = -torch.inf
    whole = (*mixture[:3], pruned)
    small = (mixture[0], *(x[kept] for x in mixture[1:]))
    lse, expected = ops.mixture_log_prob(*whole)
    torch.testing.assert_close((lse, expected), reference.mixture_log_prob(*small))
    assert_close(all_outputs(ops, whole), all_outputs(reference, whole), rtol=1e-10, atol=1e-10)
    grads = gradients(ops, whole)
    for g, other in zip(grads[1:], gradients(reference, small)[1:], strict=True):
        torch.testing.assert_close(g[kept], other)
        assert (g[[1, 4, 5]] == 0).all()


def test_duplicate_components_share_the_weight():
    z, centers, whitening, offsets = random_mixture(30, 1, 3)
    q = ops.mixture_responsibilities(
        z, centers.expand(4, 3), whitening.expand(4, 3, 3), offsets.expand(4)
    )
    torch.testing.assert_close(q, torch.full_like(q, 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [shifted, strided, expanded])
def test_inputs_lie_anywhere_in_memory(isa, layout, dtype):
    """Misaligned, with gaps, or with strides of zero: the values alone count."""
    mixture = random_mixture(40, 6, 4, dtype=dtype)
    scale = random_scale(40, 4, full=True, dtype=dtype)
    laid_out = [layout(x) for x in (*mixture, scale)]
    assert all(x.data_ptr() % 64 if layout is shifted else not x.is_contiguous() for x in laid_out)
    plain = [x.contiguous().clone() for x in laid_out]
    for transpose in (False, True):
        torch.testing.assert_close(
            everything(ops, laid_out[:4], transpose), everything(ops, plain[:4], transpose)
        )
        values = [
            (kl := ops.mixture_kl(*x[:4], transpose, x[4]), *torch.autograd.grad(kl.sum(), x))
            for x in ([x.detach().requires_grad_() for x in given] for given in (laid_out, plain))
        ]
        torch.testing.assert_close(*values)


@pytest.mark.parametrize("output", [0, 1])
def test_upstream_gradients_that_are_expanded_or_missing(output):
    """The gradient of a sum has strides of zero, that of the other output does not exist."""
    inputs = [x.requires_grad_() for x in random_mixture(30, 5, 4)]
    actual, expected = (
        torch.autograd.grad(module.mixture_log_prob(*inputs)[output].sum(), inputs)
        for module in (ops, reference)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("function", [ops.mixture_responsibilities, ops.mixture_log_joint])
def test_results_too_large_for_memory_are_refused(function):
    """B C = 2^46 overflows 32 bits, and no machine has it: an error comes before any work."""
    z = torch.zeros(1, 1).expand(2**26, 1)
    centers, offsets = torch.zeros(1, 1).expand(2**20, 1), torch.zeros(1).expand(2**20)
    with pytest.raises(RuntimeError, match="allocate"):
        function(z, centers, centers[..., None], offsets)


def test_upper_triangle_is_not_read():
    z, centers, whitening, offsets = random_mixture(20, 3, 4)
    dirty = whitening + torch.full_like(whitening, torch.nan).triu(1).nan_to_num(nan=1e9)
    torch.testing.assert_close(
        ops.mixture_log_prob(z, centers, dirty, offsets),
        ops.mixture_log_prob(z, centers, whitening, offsets),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    mixture = random_mixture(30, 5, 4, dtype=dtype)
    lse, _ = ops.mixture_log_prob(*mixture)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, reference.mixture_log_prob(*(x.float() for x in mixture))[0])


def test_gradcheck():
    mixture = [x.requires_grad_() for x in random_mixture(5, 3, 2)]
    mixture[2] = mixture[2].detach().tril().requires_grad_()
    for transpose in (False, True):
        assert torch.autograd.gradcheck(
            lambda *x, t=transpose: ops.mixture_log_prob(*x, t), mixture
        )
        for function in (ops.mixture_log_joint, ops.mixture_responsibilities):
            assert torch.autograd.gradcheck(lambda *x, f=function, t=transpose: f(*x, t), mixture)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    mixture = random_mixture(20, 4, 3, dtype=dtype)
    with_grad = tuple(x.clone().requires_grad_() for x in mixture)
    op = torch.ops.vmm_fast
    torch.library.opcheck(op.mixture_log_prob, (*mixture, False))
    torch.library.opcheck(op.mixture_log_prob, (*with_grad, True))
    *_, softmax = op.mixture_log_prob(*mixture, False)
    upstream = torch.ones(20, dtype=dtype)
    torch.library.opcheck(
        op.mixture_log_prob_backward, (upstream, upstream, *mixture, softmax, False)
    )
    torch.library.opcheck(op.mixture_statistics, (*mixture, True))
    torch.library.opcheck(op.mixture_log_joint, (*mixture, False, 2))
    torch.library.opcheck(op.mixture_responsibilities, (*mixture, False, 2))
    torch.library.opcheck(op.mixture_assign, (*mixture, False, 2))


def test_compiles_without_graph_breaks():
    def step(z, centers, whitening, offsets):
        lse, expected = ops.mixture_log_prob(z, centers, whitening, offsets, True)
        q = ops.mixture_responsibilities(
            z.detach(), centers.detach(), whitening.detach(), offsets.detach()
        )
        return lse.sum() + 2 * expected.sum() + q.sum()

    mixture = [x.requires_grad_() for x in random_mixture(20, 4, 3)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*mixture), mixture),
        torch.autograd.grad(step(*mixture), mixture),
    )


@pytest.mark.parametrize("shape", [(3000, 40, 10), (3, 3000, 6)])
@pytest.mark.parametrize("count", [1, 2])
def test_same_bits_on_every_run(shape, count):
    """Also where threads share out the components instead of the samples (the second shape)."""
    mixture = random_mixture(*shape, dtype=torch.float32)
    with threads(count):
        first, second = (everything(ops, mixture, False) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("shape", [(3000, 40, 10), (3, 3000, 6)])
def test_thread_count_changes_rounding_alone(shape):
    mixture = random_mixture(*shape)
    with threads(1):
        one = everything(ops, mixture, False)
    with threads(3):
        three = everything(ops, mixture, False)
    assert_close(three, one, rtol=1e-12, atol=1e-12)


def test_second_derivative_is_refused():
    mixture = [x.requires_grad_() for x in random_mixture(5, 3, 2)]
    lse, _ = ops.mixture_log_prob(*mixture)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(lse.sum(), mixture, create_graph=True)


def test_nothing_of_size_b_times_j_is_stored():
    """The largest allocation of forward and backward, from the process's own peak memory."""
    code = """
import resource, torch
from vmm_fast import ops
B, J, D = 40000, 4000, 2
mixture = [torch.randn(B, D), torch.randn(J, D), torch.eye(D).repeat(J, 1, 1), torch.zeros(J)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lse, expected = ops.mixture_log_prob(*[x.requires_grad_() for x in mixture])
(lse + expected).sum().backward()
ops.mixture_statistics(*mixture)
ops.mixture_assign(*mixture)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert float(out.stdout) < 100  # MiB; one [B, J] float32 matrix would be 610


BAD = torch.tensor([1.0, torch.nan])


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.zeros(3), ValueError, "z must have shape"),
        (
            0,
            torch.zeros(3, 2, dtype=torch.int64),
            TypeError,
            "centers must have z's dtype|z must be",
        ),
        (0, [[0.0, 0.0]], TypeError, "z must be a torch.Tensor"),
        (0, torch.full((3, 2), torch.nan), ValueError, "z must be finite, but row 0"),
        (
            0,
            torch.tensor([[0.0, 0.0], [0.0, torch.inf]]),
            ValueError,
            "z must be finite, but row 1",
        ),
        (0, torch.full((3, 2), 1e30), ValueError, "z must be near enough"),
        (1, torch.zeros(4, 3), ValueError, "centers must have shape"),
        (1, torch.zeros(0, 2), ValueError, "centers must have shape"),
        (1, torch.zeros(4, 2, dtype=torch.float64), TypeError, "centers must have z's dtype"),
        (1, torch.full((4, 2), torch.inf), ValueError, "centers must be finite, but component 0"),
        (2, torch.zeros(4, 2), ValueError, "whitening must have shape"),
        (2, torch.full((4, 2, 2), torch.nan), ValueError, "whitening must be finite"),
        (3, torch.zeros(3), ValueError, "offsets must have shape"),
        (3, torch.full((4,), torch.nan), ValueError, "offsets must be finite or -inf"),
        (3, torch.full((4,), torch.inf), ValueError, "offsets must be finite or -inf"),
        (3, torch.full((4,), -torch.inf), ValueError, "offsets are all -inf"),
        (3, torch.zeros(4, device="meta"), ValueError, "offsets must be on z's device"),
    ],
)
def test_errors_name_the_argument(position, value, error, message):
    mixture = list(random_mixture(3, 4, 2, dtype=torch.float32))
    mixture[position] = value
    functions = [
        ops.mixture_log_prob,
        ops.mixture_statistics,
        ops.mixture_responsibilities,
        ops.mixture_log_joint,
        ops.mixture_assign,
    ]
    for function in functions:
        with pytest.raises(error, match=message):
            function(*mixture)


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (torch.ones(3, 2, device="meta"), ValueError, "scale must be on z's device cpu"),
        (torch.ones(3, 2, dtype=torch.int64), TypeError, "scale must be float64, float32"),
        (torch.ones(3, 5), ValueError, r"scale must have shape \[B, D\] = \[3, 2\]"),
    ],
)
def test_kl_names_the_scale(scale, error, message):
    with pytest.raises(error, match=message):
        ops.mixture_kl(*random_mixture(3, 4, 2), False, scale)


def test_group_must_divide():
    with pytest.raises(ValueError, match="pseudo_inputs_per_component must divide J = 4"):
        ops.mixture_assign(*random_mixture(3, 4, 2), False, 3)


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("VMM_FAST_ISA", "quantum")
    known = "VMM_FAST_ISA is 'quantum'.* must be one of baseline, avx2, avx512"
    with pytest.raises(ValueError, match=known):
        ops.mixture_log_prob(*random_mixture(3, 4, 2))


@pytest.mark.parametrize("kernels", ["mixture", "components", "empirical_bayes"])
def test_kernels_are_of_no_one_processor(kernels):
    """The source of the baseline is that of NEON, whose vectors are as wide."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    source = Path(__file__).parents[1] / "csrc" / f"{kernels}_kernels.cpp"
    if compiler is None or not source.exists():
        pytest.skip("needs aarch64-linux-gnu-g++ and the core's source")
    options = "-std=c++17 -fsyntax-only -Wall -Wextra -Werror -Wno-psabi -DVMM_ISA=baseline"
    subprocess.run([compiler, *options.split(), "-DVMM_VECTOR_BYTES=16", source], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps, which Linux has")
def test_one_openmp_runtime():
    """The compiled core uses the OpenMP runtime that torch brought, and brings none of its own."""
    code = """
import re, torch, vmm_fast
from vmm_fast import ops
torch.set_num_threads(2)
z = torch.zeros(4000, 10)
ops.mixture_log_prob(z, z[:50], torch.eye(10).repeat(50, 1, 1), z[:50, 0])  # enough for threads
with open("/proc/self/maps") as maps:
    mapped = {line.split()[-1] for line in maps}
print(sum(bool(re.search("lib(gomp|omp|iomp5?)\\\\b", path)) for path in mapped))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "1"
