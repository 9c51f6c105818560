"""Which backend serves an operation: by device, as forced, and after the kernels have failed."""

import runpy
import sys

import pytest
import torch
from conftest import ON_GPU
from support import (
    composed_kl,
    kl_with_gradients,
    random_gaussians,
    random_mixture,
    random_scale,
)

from vmm_fast import backends, ops, reference
from vmm_fast.backends import core, plain
from vmm_fast.operations import (
    LARGEST_COMPONENT_DIM,
    MIXTURE_LOG_PROB,
    STORED_COMPONENTS,
    WHITENED_COMPONENTS,
)

triton = pytest.importorskip("triton", "3.5", reason="needs Triton 3.5")

# Where Triton is missing, this cannot be imported.
from vmm_fast.backends import gpu  # noqa: E402

# numpy, which Triton's interpreter computes with, warns of an overflow; a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class OnGPU(torch.Tensor):
    """A tensor in the CPU's memory that claims to be on a GPU."""

    is_cpu, is_cuda = False, True


def on_gpu(dim=3):
    """Return arguments of ``mixture_log_prob``, the first of which claims to be on a GPU."""
    z, *others = random_mixture(5, 4, dim)
    return (z.as_subclass(OnGPU), *others, False)


@pytest.fixture(autouse=True)
def unforced(monkeypatch):
    monkeypatch.setattr(backends, "FORCED", "")
    monkeypatch.setattr(backends, "_failed", set())


@pytest.fixture
def three(monkeypatch):
    """Replace each backend by one that returns its own name."""
    for module in (core, plain):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "call", lambda *_, name=name: name)
    monkeypatch.setattr(gpu, "mixture_log_prob", lambda *_: "gpu")


@pytest.mark.parametrize(
    ("forced", "for_cpu", "for_gpu"),
    [
        ("", "core", "gpu"),
        ("core", "core", None),
        ("triton", "gpu", "gpu"),
        ("reference", "plain", "plain"),
    ],
)
def test_the_device_or_who_forces_decides(monkeypatch, three, forced, for_cpu, for_gpu):
    monkeypatch.setattr(backends, "FORCED", forced)
    monkeypatch.setattr(gpu, "INTERPRETED", True)

    def served(inputs):
        found = backends.call(MIXTURE_LOG_PROB, inputs)
        return found if isinstance(found, str) else found[0]

    of_cpu, of_gpu = (*random_mixture(5, 4, 3), False), on_gpu()
    assert served(of_cpu) == for_cpu
    assert backends.core_serves(of_cpu[0]) == (for_cpu == "core")
    assert backends.kernels_serve(of_cpu[0]) == (for_cpu == "gpu")
    assert not backends.core_serves(of_gpu[0])
    if for_gpu is not None:
        assert served(of_gpu) == for_gpu
        assert backends.kernels_serve(of_gpu[0]) == (for_gpu == "gpu")


def test_a_forced_backend_that_cannot_serve_is_an_error(monkeypatch):
    monkeypatch.setattr(backends, "FORCED", "core")
    with pytest.raises(ValueError, match="VMM_FAST_BACKEND=core serves CPU tensors"):
        backends.call(MIXTURE_LOG_PROB, on_gpu())
    with pytest.raises(ValueError, match="VMM_FAST_BACKEND=core serves CPU tensors"):
        backends.in_kernels("map_gradients", on_gpu()[0], 3, ())
    monkeypatch.setattr(backends, "FORCED", "triton")
    monkeypatch.setattr(gpu, "INTERPRETED", True)
    with pytest.raises(ValueError, match="up to 128 dimensions in mixture_log_prob, not 129"):
        ops.mixture_log_prob(*random_mixture(2, 2, 129))
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 as well"):
        ops.mixture_log_prob(*random_mixture(2, 2, 3))


def test_an_unknown_backend_is_an_error(monkeypatch):
    monkeypatch.setenv("VMM_FAST_BACKEND", "cuda")
    message = "VMM_FAST_BACKEND must be core, triton or reference, or not be set, but is 'cuda'"
    with pytest.raises(ValueError, match=message):
        runpy.run_path(backends.__file__)
    monkeypatch.setenv("VMM_FAST_BACKEND", "reference")
    assert runpy.run_path(backends.__file__)["FORCED"] == "reference"


# --- plain torch takes over ---


def assert_warns_once(recwarn, message, dim=3):
    """Check that plain torch computes both calls, and that only the first warns."""
    true, _ = reference.mixture_log_prob(*random_mixture(5, 4, dim))
    for _ in range(2):
        (lse, *_), _ = backends.call(MIXTURE_LOG_PROB, on_gpu(dim))
        torch.testing.assert_close(lse.as_subclass(torch.Tensor), true)
    (warning,) = recwarn
    assert message in str(warning.message) and "plain torch takes over" in str(warning.message)


def test_a_gpu_without_triton_warns_once(monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "triton", None)
    backends._gpu.cache_clear()
    assert_warns_once(recwarn, "the kernels need Triton, which is missing")


def test_an_old_triton_warns_once(monkeypatch, recwarn):
    monkeypatch.delattr(triton, "constexpr_function")
    backends._gpu.cache_clear()
    assert_warns_once(recwarn, "the kernels need Triton >= 3.5")


def test_a_broken_triton_warns_once(monkeypatch, recwarn):
    def broken():
        raise OSError("libtriton.so: cannot open shared object file")

    monkeypatch.setattr(backends, "_gpu", broken)
    assert_warns_once(recwarn, "cannot open shared object file")


def test_dimensions_beyond_the_kernels_warn_once(recwarn):
    assert_warns_once(recwarn, "up to 128 dimensions, not 129", dim=129)


@pytest.mark.parametrize("forced", ["", "triton", "reference"])
def test_components_of_many_dimensions_are_built_in_plain_torch_on_gpus(monkeypatch, forced):
    """Whatever is forced, and without a warning."""
    monkeypatch.setattr(backends, "FORCED", forced)
    monkeypatch.setattr(plain, "call", lambda *_: "plain")
    log_weights, *factors = random_gaussians(2, 2, LARGEST_COMPONENT_DIM + 1, "precision+full")
    first = log_weights.as_subclass(OnGPU)
    assert backends.call(WHITENED_COMPONENTS, (first, *factors, 2, False)) == "plain"
    assert backends.call(STORED_COMPONENTS, (first, *factors, 2)) == "plain"


def fail_with(monkeypatch, error):
    """Make a kernel fail; return the list of its calls."""
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        raise error

    monkeypatch.setattr(gpu, "mixture_log_prob", fail)
    return calls


@pytest.mark.parametrize("error", [RuntimeError, triton.TritonError])
def test_a_failing_compiler_is_asked_once_for_each_dimension(monkeypatch, recwarn, error):
    calls = fail_with(monkeypatch, error("Failed to find C compiler"))
    assert_warns_once(recwarn, "Error: Failed to find C compiler")
    assert len(calls) == 1
    with pytest.warns(UserWarning, match="does not compile"):
        backends.call(MIXTURE_LOG_PROB, on_gpu(4))
    assert len(calls) == 2


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [HIP]: 1"),
        torch.OutOfMemoryError("no memory"),
    ],
    ids=str,
)
def test_an_error_of_the_device_is_no_fault_of_the_kernel(monkeypatch, recwarn, error):
    fail_with(monkeypatch, error)
    with pytest.raises(type(error)) as raised:
        backends.call(MIXTURE_LOG_PROB, on_gpu())
    assert raised.value is error and not backends._failed and not recwarn.list


@pytest.mark.skipif(ON_GPU, reason="the kernels take the CPU's tensors in the interpreter alone")
def test_a_forward_in_plain_torch_serves_a_backward_in_the_kernels(monkeypatch):
    inputs = (*random_mixture(7, 4, 3), random_scale(7, 3, False))

    def kl(*arguments):
        monkeypatch.setattr(backends, "FORCED", "reference")
        value = ops.mixture_kl(*arguments)
        monkeypatch.setattr(backends, "FORCED", "triton")
        return value

    found = kl_with_gradients(kl, inputs)
    for name, value in kl_with_gradients(composed_kl, inputs).items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)
