"""Shared by all tests: small random mixtures, and each instruction set in turn."""

import contextlib
import os
import resource
import signal

# Before Triton is imported: its kernels run in its interpreter, which needs no GPU. A process that
# test_gpu.py starts is told otherwise.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from vmm_fast import _core

# A shell lets what it starts in the background ignore Ctrl-C, which some tests press.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Small problems: threads would cost more than they give, most of all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def quick_interpreter():
    """Let the interpreter wrap the language once a launch.

    It does so again at every call of a device function, around what it has wrapped before, so that
    a launch of many calls slows down without bound.
    """
    import triton
    from triton.runtime import interpreter

    language = (triton.language, triton.language.core)
    wrap = interpreter._patch_lang
    wrapped = set()

    def wrap_once(function):
        seen = tuple(x in function.__globals__.values() for x in language)
        if seen in wrapped:
            return None
        wrapped.add(seen)
        scope = wrap(function)
        restore = scope.restore

        def restore_all():
            wrapped.remove(seen)
            restore()

        scope.restore = restore_all
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", wrap_once)
        yield


ISAS = ["baseline", "avx2", "avx512"]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Force each instruction set in turn."""
    monkeypatch.setenv("VMM_FAST_ISA", request.param)
    try:
        assert _core.instruction_set() == request.param
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    return request.param


@contextlib.contextmanager
def threads(count):
    """Let the core use up to so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def files_of_at_most(size):
    """Python ignores SIGXFSZ, so that writing more fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def shifted(x, items=1):
    """The same values so many items behind an address that is aligned to vectors."""
    count = x.numel() * x.element_size()
    buffer = bytearray(count + (64 + items) * x.element_size())
    start = -torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() % 64
    start += items * x.element_size()
    flat = torch.frombuffer(buffer, dtype=x.dtype, count=x.numel(), offset=start)
    return flat.copy_(x.flatten()).view(x.shape)


def strided(x):
    """The same values with the order of dimensions reversed in memory and gaps between items."""
    reverse = tuple(range(x.ndim))[::-1]
    return x.permute(reverse).contiguous().permute(reverse).repeat_interleave(2, 0)[::2]


def expanded(x):
    """The first entry for all, with strides of zero."""
    return x[:1].expand_as(x)


@pytest.fixture
def one_thread():
    """Nets this small only lose time on several threads, much of it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_mixture(num, components, dim, dtype=torch.float64, seed=0, spread=2.0):
    """z [B, D], centers [J, D], well-conditioned lower-triangular whitening, offsets [J]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    whitening = 0.3 * normal(components, dim, dim).tril()
    whitening.diagonal(dim1=-2, dim2=-1).abs_().add_(0.5)
    tensors = (
        normal(num, dim) * spread,
        normal(components, dim) * spread,
        whitening,
        normal(components),
    )
    return tuple(t.to(dtype) for t in tensors)


def random_gaussians(components, centers, dim, form, dtype=torch.float64, seed=0):
    """log_weights [C], precision_cholesky [C, D, D] and scale of one of the FORMS."""
    generator = torch.Generator().manual_seed(seed)

    def factor(count):
        matrix = torch.randn(count, dim, dim, generator=generator, dtype=torch.float64)
        matrix = (0.3 * matrix).tril()
        matrix.diagonal(dim1=-2, dim2=-1).abs_().add_(0.5)
        return matrix

    log_weights = torch.randn(components, generator=generator, dtype=torch.float64).log_softmax(-1)
    precision_cholesky = factor(components) if form.startswith("precision") else None
    scale = None if form == "precision" else factor(centers)
    if form.endswith("diagonal"):
        scale = scale.diagonal(dim1=-2, dim2=-1).contiguous()
    tensors = (log_weights, precision_cholesky, scale)
    return tuple(t if t is None else t.to(dtype) for t in tensors)


FORMS = ["precision", "precision+full", "precision+diagonal", "full", "diagonal"]
