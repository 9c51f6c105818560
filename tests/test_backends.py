"""Which backend serves an operation: by device, as forced, and after the kernels have failed."""

import runpy
import sys

import pytest
import torch
from conftest import ON_GPU
from support import composed_kl, kl_with_gradients, random_mixture, random_scale

from vmm_fast import backends, ops, reference
from vmm_fast.backends import core, plain

triton = pytest.importorskip("triton", reason="Triton is not installed")

# Where Triton is missing, this cannot be imported.
from vmm_fast.backends import gpu  # noqa: E402

# numpy, which Triton's interpreter computes with, warns of an overflow; a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class OnGPU:
    """A stand-in for a CUDA tensor, with what the choice of a backend looks at."""

    is_cpu, is_cuda, device, dtype = False, True, "cuda:0", torch.float64


@pytest.fixture(autouse=True)
def unforced(monkeypatch):
    monkeypatch.setattr(backends, "FORCED", "")
    monkeypatch.setattr(backends, "_failed", set())


@pytest.fixture
def three(monkeypatch):
    """Backends that give their own names."""
    for module in (core, gpu, plain):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "log_prob", lambda *_, name=name: name)


@pytest.mark.parametrize(
    ("forced", "on_cpu", "on_gpu"),
    [
        ("", "core", "gpu"),
        ("core", "core", None),
        ("triton", "gpu", "gpu"),
        ("reference", "plain", "plain"),
    ],
)
def test_the_device_or_who_forces_decides(monkeypatch, three, forced, on_cpu, on_gpu):
    monkeypatch.setattr(backends, "FORCED", forced)
    monkeypatch.setattr(gpu, "INTERPRETED", True)
    x = torch.zeros(1, dtype=torch.float64)
    assert backends.call("log_prob", x, 10) == on_cpu
    assert backends.core_serves(x) == (on_cpu == "core")
    assert backends.kernels_serve(x) == (on_cpu == "gpu")
    assert not backends.core_serves(OnGPU())
    if on_gpu is not None:
        assert backends.call("log_prob", OnGPU(), 10) == on_gpu
        assert backends.kernels_serve(OnGPU()) == (on_gpu == "gpu")


def test_a_forced_backend_that_cannot_serve_is_an_error(monkeypatch):
    monkeypatch.setattr(backends, "FORCED", "core")
    for name in ("log_prob", "map_gradients"):
        with pytest.raises(ValueError, match="VMM_FAST_BACKEND=core serves CPU tensors"):
            backends.in_kernels(name, OnGPU(), 3, (), lambda: None)
    monkeypatch.setattr(backends, "FORCED", "triton")
    monkeypatch.setattr(gpu, "INTERPRETED", True)
    with pytest.raises(ValueError, match="serves up to 128 dimensions in log_prob, not 129"):
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
    """Plain torch computes, and says so at the first of two calls."""
    mixture = random_mixture(5, 4, dim)
    for _ in range(2):
        lse, _, _ = backends.call("log_prob", OnGPU(), dim, *mixture, False)
        torch.testing.assert_close(lse, reference.mixture_log_prob(*mixture)[0])
    (warning,) = recwarn
    assert message in str(warning.message) and "plain torch takes over" in str(warning.message)


def test_a_gpu_without_triton_warns_once(monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "triton", None)
    backends._gpu.cache_clear()
    assert_warns_once(recwarn, "the kernels need Triton, which is missing")


def test_an_old_triton_warns_once(monkeypatch, recwarn):
    monkeypatch.delattr(triton, "constexpr_function")
    backends._gpu.cache_clear()
    assert_warns_once(recwarn, "the kernels need Triton >= 3.4")


def test_a_broken_triton_warns_once(monkeypatch, recwarn):
    def broken():
        raise OSError("libtriton.so: cannot open shared object file")

    monkeypatch.setattr(backends, "_gpu", broken)
    assert_warns_once(recwarn, "cannot open shared object file")


def test_dimensions_beyond_the_kernels_warn_once(recwarn):
    assert_warns_once(recwarn, "up to 128 dimensions, not 129", dim=129)


def fail_with(monkeypatch, error):
    """Let a kernel fail; gives its calls."""
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        raise error

    monkeypatch.setattr(gpu, "log_prob", fail)
    return calls


@pytest.mark.parametrize("error", [RuntimeError, triton.TritonError])
def test_a_failing_compiler_is_asked_once_for_each_dimension(monkeypatch, recwarn, error):
    calls = fail_with(monkeypatch, error("Failed to find C compiler"))
    assert_warns_once(recwarn, "Error: Failed to find C compiler")
    assert len(calls) == 1
    with pytest.warns(UserWarning, match="does not compile"):
        backends.call("log_prob", OnGPU(), 4, *random_mixture(5, 4, 4), False)
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
        backends.call("log_prob", OnGPU(), 3, *random_mixture(5, 4, 3), False)
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
