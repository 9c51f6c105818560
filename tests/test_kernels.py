"""The Triton kernels under Triton's interpreter, against the reference in float64."""

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import FORMS, expanded, random_gaussians, random_mixture, strided
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import polygamma
from test_counts import (
    FEW,
    FUNCTIONS,
    MODELS,
    assert_equals_reference,
    random_counts,
    values_and_gradients,
)
from test_empirical_bayes import points, random_parameters
from test_ops import (
    all_outputs,
    assert_close,
    assert_within_budget,
    composed_kl,
    everything,
    gradients,
    random_scale,
    to_double,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from vmm_fast import GaussianMixturePrior, VMMPrior, backends, ops, reference
from vmm_fast.counts import SoftmaxMean
from vmm_fast.inference.closed_form import Statistics
from vmm_fast.inference.empirical_bayes import MixtureParameters, Objective, Running, online_step
from vmm_fast.mixture import gaussian_parameters

triton = pytest.importorskip("triton", reason="Triton is not installed")

# Where Triton is missing, nothing below may be imported.
import triton.language as tl  # noqa: E402

from vmm_fast.kernels import closed_form, launch, weight_priors  # noqa: E402
from vmm_fast.kernels import counts as count_kernels  # noqa: E402

# numpy, which the interpreter computes with, warns of an overflow; a GPU does not.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("quick_interpreter"),
]

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


@contextlib.contextmanager
def kernels(programs=512):
    """Run every operation in the kernels; more ``programs`` than points and components split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "FORCED", "triton")
        patch.setattr(launch, "PROGRAMS", programs)
        yield


@pytest.fixture(params=[1, 512], ids=["whole", "split"])
def forced(request):
    with kernels(request.param):
        yield


def assert_gradients_close(mixture, transpose, **tolerance):
    expected = gradients(reference, mixture, transpose)
    torch.testing.assert_close(gradients(ops, mixture, transpose), expected, **tolerance)


shapes = st.tuples(st.integers(0, 80), st.integers(1, 9), st.integers(1, 17))


@settings(max_examples=10, deadline=None)
@given(
    shape=shapes,
    transpose=st.booleans(),
    programs=st.sampled_from([1, 512]),
    seed=st.integers(0, 10**6),
)
def test_float64_equals_reference(shape, transpose, programs, seed):
    mixture = random_mixture(*shape, seed=seed)
    with kernels(programs):
        got = all_outputs(ops, mixture, transpose)
        assert_gradients_close(mixture, transpose, **TIGHT)
    assert_close(got, all_outputs(reference, mixture, transpose), **TIGHT)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [(40, 3, 33), (5, 2, 65), (3, 2, 128), (1, 1, 1), (70, 18, 2)])
def test_every_tile_size(forced, shape, transpose):
    mixture = random_mixture(*shape)
    assert_close(
        all_outputs(ops, mixture, transpose), all_outputs(reference, mixture, transpose), **TIGHT
    )
    assert_gradients_close(mixture, transpose, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("transpose", [False, True])
def test_the_larger_tile_of_some_gpus(monkeypatch, transpose):
    mixture = random_mixture(70, 3, 30, dtype=torch.float32)
    monkeypatch.setattr(launch, "capability", lambda device: 9)
    with kernels():
        assert_within_budget(everything(ops, mixture, transpose), mixture, transpose)


def test_a_gpu_is_asked_once_for_its_kind(monkeypatch):
    asked = []

    def get_device_capability(device):
        asked.append(device)
        return 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_capability", get_device_capability)
    launch.capability.cache_clear()
    devices = [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")]
    try:
        for _ in range(2):
            assert [launch.capability(device) for device in devices] == [9, 9, 0]
        assert asked == devices[:2]
    finally:
        launch.capability.cache_clear()


@pytest.mark.parametrize("group", [2, 3, 12])
def test_groups(forced, group):
    mixture = random_mixture(40, 12, 4)
    assert_close(
        all_outputs(ops, mixture, group=group),
        all_outputs(reference, mixture, group=group),
        **TIGHT,
    )
    label, _, _ = ops.mixture_assign(*mixture, False, group)
    torch.testing.assert_close(label, reference.mixture_assign(*mixture, False, group)[0])


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


def test_the_first_among_equals_is_assigned(forced):
    z, *mixture = random_mixture(40, 6, 3)
    mixture = [torch.cat([x, x]) for x in mixture]
    mixture[2][:2] = -torch.inf
    label, _, _ = ops.mixture_assign(z, *mixture)
    torch.testing.assert_close(label, reference.mixture_assign(z, *mixture)[0])
    assert label.min() >= 2 and label.max() < 8


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", [(7, 4, 3), (70, 5, 18), (0, 2, 2), (1, 1, 1)])
def test_kl_equals_its_parts(forced, shape, full):
    mixture, scale = random_mixture(*shape), random_scale(shape[0], shape[2], full)
    outputs = []
    for kl in (ops.mixture_kl, composed_kl):
        inputs = [x.detach().clone().requires_grad_() for x in (*mixture, scale)]
        value = kl(*inputs[:4], True, inputs[4])
        weights = torch.linspace(-1, 2, len(value), dtype=value.dtype)
        outputs.append((value, *torch.autograd.grad(value @ weights, inputs)))
    torch.testing.assert_close(*outputs, **TIGHT)


# --- precision ---


def tf32(x):
    """The nearest number of 10 binary places, as ``cvt.rna.tf32.f32`` gives it."""
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.fixture
def tensor_cores(monkeypatch):
    """Products as three passes of TF32, which the interpreter takes for exact ones."""
    from triton.runtime.interpreter import InterpreterBuilder

    exact = InterpreterBuilder.create_dot
    counted = []

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if "TF32x3" not in str(input_precision):
            return exact(self, a, b, d, input_precision, max_num_imprecise_acc)
        counted.append(1)
        handle = type(a)
        high = [tf32(x.data) for x in (a, b)]
        low = [tf32(x.data - h) for x, h in zip((a, b), high, strict=True)]
        for left, right in ((low[0], high[1]), (high[0], low[1]), (high[0], high[1])):
            left, right = handle(left, a.dtype), handle(right, b.dtype)
            d = exact(self, left, right, d, input_precision, max_num_imprecise_acc)
        return d

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    yield
    assert counted


@pytest.mark.parametrize(
    ("scale", "offset", "transpose"), [(1e-3, 1e4, True), (1.0, 0.0, False), (1e3, 1e4, False)]
)
def test_float32_error_budget(forced, tensor_cores, scale, offset, transpose):
    z, centers, whitening, offsets = random_mixture(50, 20, 10, dtype=torch.float32, seed=3)
    mixture = (z * scale + offset, centers * scale + offset, whitening / scale, offsets)
    assert_within_budget(everything(ops, mixture, transpose), mixture, transpose)


@pytest.mark.parametrize("shape", [(40, 60, 2), (16, 4, 128), (40, 33, 30)])
def test_float32_error_budget_of_many_components(forced, tensor_cores, shape):
    mixture = random_mixture(*shape, dtype=torch.float32, spread=min(2.0, 20 / shape[2]))
    assert_within_budget(everything(ops, mixture, False), mixture, False)


# --- hard inputs ---


def test_far_tails(forced):
    z, centers, whitening, offsets = random_mixture(50, 8, 5, dtype=torch.float32)
    z = z * 500
    lse, expected = ops.mixture_log_prob(z, centers, whitening, offsets)
    true, true_expected = reference.mixture_log_prob(*to_double((z, centers, whitening, offsets)))
    assert true.min() < -1e6
    torch.testing.assert_close(lse.double(), true, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expected.double(), true_expected, rtol=1e-5, atol=1e-5)
    q = ops.mixture_responsibilities(z, centers, whitening, offsets)
    torch.testing.assert_close(q.sum(-1), torch.ones(50), rtol=1e-5, atol=0)


def test_pruned_components(forced):
    mixture = random_mixture(40, 7, 4)
    pruned = mixture[3].clone()
    pruned[[1, 4, 5]] = -torch.inf
    whole = (*mixture[:3], pruned)
    assert_close(all_outputs(ops, whole), all_outputs(reference, whole), **TIGHT)
    kept = torch.tensor([0, 2, 3, 6])
    small = (mixture[0], *(x[kept] for x in whole[1:]))
    grads = gradients(ops, whole)
    for g, other in zip(grads[1:], gradients(reference, small)[1:], strict=True):
        torch.testing.assert_close(g[kept], other)
        assert (g[[1, 4, 5]] == 0).all()


def test_all_components_pruned(forced):
    mixture = (*random_mixture(5, 3, 2)[:3], torch.full((3,), -torch.inf, dtype=torch.float64))
    lse, _ = ops.mixture_log_prob(*mixture)
    assert (lse == -torch.inf).all()


def test_far_off_component_gives_no_nan(forced):
    """A component whose whitened distance overflows has a weight of exactly 0."""
    centers = torch.tensor([[0.0], [3e38]])
    mixture = (torch.tensor([[0.0]]), centers, torch.full((2, 1, 1), 2.0), torch.zeros(2))
    assert all(g.isfinite().all() for g in gradients(ops, mixture))


@pytest.mark.parametrize("argument", range(4))
def test_nan_gives_nan(forced, argument):
    mixture = random_mixture(40, 5, 3)
    mixture[argument].view(-1)[0] = torch.nan
    lse, expected = ops.mixture_log_prob(*mixture)
    assert lse[0].isnan() and expected[0].isnan()
    assert ops.mixture_responsibilities(*mixture)[0].isnan().any()
    assert ops.mixture_assign(*mixture)[1][0].isnan()
    assert all(g.isnan().any() for g in gradients(ops, mixture))


@pytest.mark.parametrize("layout", [strided, expanded])
def test_any_layout(forced, layout):
    mixture = tuple(layout(x) for x in random_mixture(20, 6, 3))
    dense = tuple(x.contiguous() for x in mixture)
    assert_close(all_outputs(ops, mixture), all_outputs(reference, dense), **TIGHT)
    torch.testing.assert_close(gradients(ops, mixture), gradients(reference, dense), **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32(forced, dtype):
    mixture = random_mixture(20, 6, 3, dtype=dtype)
    lse, _ = ops.mixture_log_prob(*mixture)
    assert lse.dtype == torch.float32
    true, _ = reference.mixture_log_prob(*to_double(mixture))
    torch.testing.assert_close(lse.double(), true, rtol=1e-5, atol=1e-5)


def test_the_same_bits_on_every_run(forced):
    mixture = random_mixture(150, 9, 10, dtype=torch.float32)
    first, second = (everything(ops, mixture, False) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


# --- building the components ---


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
@pytest.mark.parametrize(("components", "centers", "dim"), [(2, 2, 33), (1, 1, 65), (1, 1, 128)])
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
    ("components", "centers", "dim"), [(3, 6, 10), (2, 2, 32), (300, 300, 1), (2, 4, 40)]
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


# --- the torch side ---


def test_opcheck():
    mixture = tuple(x.requires_grad_() for x in random_mixture(5, 4, 3))
    components = random_gaussians(2, 4, 3, "precision+full")
    with kernels():
        torch.library.opcheck(torch.ops.vmm_fast.mixture_log_prob, (*mixture, True))
        plain = [x.detach() for x in mixture]
        for name in ("mixture_log_joint", "mixture_responsibilities", "mixture_assign"):
            torch.library.opcheck(getattr(torch.ops.vmm_fast, name), (*plain, False, 2))
        torch.library.opcheck(torch.ops.vmm_fast.mixture_statistics, (*plain, False))
        leaves = [x.requires_grad_() for x in components]
        torch.library.opcheck(torch.ops.vmm_fast.whitened_components, (*leaves, 4, False))


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels launched."""
    from triton.runtime.interpreter import InterpretedFunction

    names = []
    run = InterpretedFunction.run

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        with _disable_current_modes():  # the interpreter copies with torch
            return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    return names


class Computations(TorchDispatchMode):
    """Names of the torch operations that would launch something on a GPU, or wait for it."""

    IDLE = ("empty", "new_empty", "view", "detach", "expand", "alias", "as_strided", "unsqueeze")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if not name.startswith(self.IDLE):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("programs", [1, 512])
@pytest.mark.parametrize("full", [False, True])
def test_launches_of_a_variational_step(launched, full, programs):
    """Build, forward, backward, the build's backward, and a second pass of what was split."""
    prior, encoder, z = small_prior(full=full)
    mean, scale = gaussian_parameters(encoder(prior.pseudo_inputs.detach()))
    leaves = (mean, scale, z, 0.1 + z.abs())
    leaves = [x.detach().contiguous().requires_grad_() for x in leaves]
    mean, scale, z, deviation = leaves
    at_pseudo_inputs = (
        torch.distributions.MultivariateNormal(mean, scale_tril=scale, validate_args=False)
        if full
        else torch.distributions.Normal(mean, scale, validate_args=False)
    )
    q = torch.distributions.Normal(z, deviation, validate_args=False)
    with kernels(programs), Computations() as computed:
        kl = prior.kl(q, lambda _: at_pseudo_inputs, z)
        gradients = torch.autograd.grad(kl, leaves, torch.ones_like(kl))
    split = [name for name in launched if "merge" in name]
    assert len(split) == (2 if programs > 1 else 0)
    assert len(launched) == 4 + len(split) <= 6
    assert computed.names == ["ones_like.default"]

    expected = prior.kl(q, lambda _: at_pseudo_inputs, z)
    torch.testing.assert_close(kl, expected, **TIGHT)
    expected = torch.autograd.grad(expected, leaves, torch.ones_like(kl))
    torch.testing.assert_close(gradients, expected, **TIGHT)


# --- dispatch ---


class OnGPU:
    """As much of a CUDA tensor as the choice of a backend looks at."""

    is_cpu, is_cuda, device, dtype = False, True, "cuda:0", torch.float64


@pytest.fixture
def unforced(monkeypatch):
    monkeypatch.setattr(backends, "FORCED", "")
    monkeypatch.setattr(backends, "_failed", set())


def test_a_gpu_is_served_by_the_kernels(monkeypatch, unforced):
    monkeypatch.setattr(backends._gpu(), "log_prob", lambda *_: "in the kernels")
    assert backends.call("log_prob", OnGPU(), 10) == "in the kernels"


def assert_warns_once(recwarn, message, *mixture):
    """Plain torch computes, and says so at the first of two calls."""
    for _ in range(2):
        lse, _, _ = backends.call("log_prob", OnGPU(), mixture[0].shape[1], *mixture, False)
        torch.testing.assert_close(lse, reference.mixture_log_prob(*mixture)[0])
    (warning,) = recwarn
    assert message in str(warning.message)


def test_a_gpu_without_triton_warns_once(monkeypatch, unforced, recwarn):
    monkeypatch.setitem(sys.modules, "triton", None)
    backends._gpu.cache_clear()
    assert_warns_once(
        recwarn, "the kernels need Triton, which is missing", *random_mixture(5, 4, 3)
    )


def test_an_old_triton_warns_once(monkeypatch, unforced, recwarn):
    monkeypatch.delattr(triton, "constexpr_function")
    backends._gpu.cache_clear()
    assert_warns_once(recwarn, "the kernels need Triton >= 3.4", *random_mixture(5, 4, 3))


def test_a_broken_triton_warns_once(monkeypatch, unforced, recwarn):
    def broken():
        raise OSError("libtriton.so: cannot open shared object file")

    monkeypatch.setattr(backends, "_gpu", broken)
    assert_warns_once(recwarn, "cannot open shared object file", *random_mixture(5, 4, 3))


@pytest.mark.parametrize("message", ["CUDA error: out of memory", "Triton Error [HIP]: 1"])
def test_an_error_of_the_device_is_no_fault_of_the_kernel(monkeypatch, unforced, recwarn, message):
    def fail(*args):
        raise RuntimeError(message)

    monkeypatch.setattr(backends._gpu(), "log_prob", fail)
    with pytest.raises(RuntimeError, match=message[:10]):
        backends.call("log_prob", OnGPU(), 3, *random_mixture(5, 4, 3), False)
    assert not backends._failed and not recwarn.list


def test_dimensions_beyond_the_kernels_warn_once(unforced, recwarn):
    assert_warns_once(recwarn, "up to 128 dimensions, not 129", *random_mixture(2, 2, 129))


@pytest.mark.parametrize("error", [RuntimeError, triton.TritonError])
def test_a_failing_compiler_is_asked_and_warns_once(monkeypatch, unforced, recwarn, error):
    calls = []

    def fail(*args):
        calls.append(args)
        raise error(f"Failed to find C compiler for file {len(calls)}")

    monkeypatch.setattr(backends._gpu(), "log_prob", fail)
    assert_warns_once(recwarn, "Error: Failed to find C compiler", *random_mixture(5, 4, 3))
    assert len(calls) == 1


def test_a_forward_in_plain_torch_serves_a_backward_in_the_kernels(monkeypatch):
    mixture, scale = random_mixture(7, 4, 3), random_scale(7, 3, False)
    leaves = [x.detach().requires_grad_() for x in (*mixture, scale)]
    with kernels():
        with monkeypatch.context() as patch:
            patch.setattr(backends, "FORCED", "reference")
            value = ops.mixture_kl(*leaves[:4], False, leaves[4]).sum()
        found = torch.autograd.grad(value, leaves)
    exact = [x.detach().requires_grad_() for x in (*mixture, scale)]
    expected = torch.autograd.grad(composed_kl(*exact[:4], False, exact[4]).sum(), exact)
    torch.testing.assert_close(found, expected, **TIGHT)


def test_a_forced_backend_that_cannot_serve_is_an_error(monkeypatch):
    monkeypatch.setattr(backends, "FORCED", "core")
    for name in ("log_prob", "map_gradients"):
        with pytest.raises(ValueError, match="VMM_FAST_BACKEND=core serves CPU tensors"):
            backends.in_kernels(name, OnGPU(), 3, (), lambda: None)
    with kernels(), pytest.raises(ValueError, match="serves up to 128 dimensions in log_prob"):
        ops.mixture_log_prob(*random_mixture(2, 2, 129))
    monkeypatch.setattr(backends._gpu(), "INTERPRETED", False)
    with kernels(), pytest.raises(ValueError, match="set TRITON_INTERPRET=1 as well"):
        ops.mixture_log_prob(*random_mixture(2, 2, 3))


def test_an_unknown_backend_is_an_error():
    environment = {**os.environ, "VMM_FAST_BACKEND": "cuda"}
    run = subprocess.run(
        [sys.executable, "-c", "import vmm_fast"], env=environment, capture_output=True, text=True
    )
    assert "VMM_FAST_BACKEND must be core, triton or reference, or not be set, but is 'cuda'" in (
        run.stderr
    )


@pytest.mark.parametrize("backend", ["core", "reference"])
def test_forced_backends_agree(monkeypatch, backend):
    monkeypatch.setattr(backends, "FORCED", backend)
    mixture = random_mixture(20, 5, 3)
    assert_close(all_outputs(ops, mixture), all_outputs(reference, mixture), **TIGHT)
    assert_gradients_close(mixture, False, **TIGHT)
    scale = random_scale(20, 3, False)
    torch.testing.assert_close(
        ops.mixture_kl(*mixture, False, scale), composed_kl(*mixture, False, scale)
    )


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


@pytest.mark.parametrize("programs", [1, 512])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"map_prior": "learnt", "data_size": 500},
        {"map_prior": "fixed"},
        {"map_prior": "none", "responsibility_gradient": False},
        {"map_prior": "learnt", "weights": "stick-breaking"},
        {"map_prior": "learnt", "weights": "stick-breaking", "discount": 0.3},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
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
        (40, "full", 2, 1, NO_PRIOR),
        (65, "diagonal", 2, 512, {"map_prior": "fixed"}),
        (65, "full", 2, 512, {**LEARNT, "responsibility_gradient": False}),
        (65, "free", 2, 1, STICKS),
        (128, "full", 1, 512, LEARNT),
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


@pytest.mark.parametrize("form", FORMS_OF_CENTERS)
@pytest.mark.parametrize(
    ("objective", "programs", "temperature"),
    [
        (objective_of("none"), 1, 1.0),
        (objective_of("fixed"), 512, 0.7),
        (objective_of("learnt", data_size=500), 512, 1.0),
        (objective_of("learnt", "stick-breaking", 0.3), 1, 2.0),
    ],
    ids=["none", "fixed", "learnt", "sticks"],
)
def test_online_steps(form, objective, programs, temperature):
    batches = [points(seed=seed, b=40) for seed in (1, 2, 3)]
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


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("weights", ["dirichlet", "stick-breaking"])
@pytest.mark.parametrize("form", ["free", "diagonal"])
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


# --- compiled ahead of time ---


@pytest.mark.parametrize(
    ("options", "targets"),
    [
        (["--dim", "10"], ("sm_80", "sm_90", "sm_100", "gfx942")),
        (["--dim", "50", "--target", "sm_90"], ("sm_90",)),
    ],
    ids=["all targets", "in blocks"],
)
def test_kernels_compile_within_their_bounds(options, targets):
    """Some dimensions in float32; the command by itself does all, in longer."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "vmm_fast.kernels.aot", "--dtype", "float32", *options]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [row.split() for row in run.stdout.splitlines()]
    assert {row[-6] for row in rows if row[-1:] == ["hold"]} == set(targets)
