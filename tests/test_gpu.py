"""What only a GPU has: streams, graphs, several devices, and a host that need not wait.

Where there is a GPU, :func:`test_the_kernels_on_a_gpu` runs this file once more in a process of its
own, without Triton's interpreter, and with it every test of the kernels that has the fixture
``backend``. In any other process this file's tests run in the interpreter, on the CPU and on small
sizes, with nothing in the place of streams and graphs: so a check has run before it meets a GPU.
"""

import contextlib
import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ON_GPU
from support import assert_all_close, counted_launches, everything, on, random_mixture
from torch.distributions import Independent, Normal
from torch.utils._python_dispatch import TorchDispatchMode

from vmm_fast import VMMPrior, backends, ops, reference
from vmm_fast.counts import zinb_log_prob
from vmm_fast.inference import map_objective

pytest.importorskip("triton", "3.5", reason="needs Triton 3.5")

if ON_GPU and not torch.cuda.is_available():
    pytest.skip("TRITON_INTERPRET=0, but there is no GPU", allow_module_level=True)

if ON_GPU:
    DEVICE, OTHER_DEVICE = torch.device("cuda", 0), torch.device("cuda", 1)
    POINTS, COMPONENTS, DIM, RUNS = 4096, 100, 10, 20
    CELLS, GENES = 300, 3000
else:
    DEVICE = OTHER_DEVICE = torch.device("cpu")
    POINTS, COMPONENTS, DIM, RUNS = 5, 2, 2, 2
    CELLS, GENES = 2, 70

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, in the interpreter
    pytest.mark.usefixtures("quick_interpreter"),
]
inferences = pytest.mark.parametrize("inference", ["gradient", "closed-form"])


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """Force the kernels, so that no operation is computed in plain torch unnoticed."""
    monkeypatch.setattr(backends, "FORCED", "triton")


@pytest.mark.slow("compiles every kernel and runs all of their tests, on a GPU")
@pytest.mark.timeout(3600)
def test_the_kernels_on_a_gpu():
    if ON_GPU:
        pytest.skip("this is that run")
    if not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    tests = Path(__file__).parent
    chosen = "test_gpu.py or (triton and not test_backends)"  # as the fixture names its parameters
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "--timeout=1800", str(tests), "-k", chosen],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        cwd=tests.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr


def a_mixture(dtype=torch.float32):
    return on(DEVICE, random_mixture(POINTS, COMPONENTS, DIM), dtype)


def normal(mean, scale):
    # To check its arguments would be to wait for the device.
    return Independent(Normal(mean, scale, validate_args=False), 1, validate_args=False)


def small_prior(**options):
    """Return a prior of two pseudo-inputs per component, its encoder, and points."""
    torch.manual_seed(0)
    network = torch.nn.Linear(5, 2 * DIM).to(DEVICE)
    inputs, z = torch.randn(2 * COMPONENTS, 5), torch.randn(POINTS, DIM)
    prior = VMMPrior(inputs, DIM, pseudo_inputs_per_component=2, **options)
    with torch.no_grad():
        prior.logits.normal_()
        prior.raw_precision.add_(0.1 * torch.randn_like(prior.raw_precision))

    def encoder(u):
        mean, log_scale = network(u).chunk(2, -1)
        return normal(mean, log_scale.exp())

    return prior.to(DEVICE), encoder, z.to(DEVICE)


def kl_step(prior, leaves):
    """Return ``prior.kl`` and its gradients by z, q's scale, and the centers' means and scales."""
    z, scale, centers, center_scale = leaves
    value = prior.kl(normal(z, scale), lambda _: normal(centers, center_scale), z=z)
    return value.detach(), *torch.autograd.grad(value, leaves, torch.ones_like(value))


def leaves_of(prior, encoder, z):
    with torch.no_grad():
        posterior = encoder(prior.pseudo_inputs)
    leaves = (z, 0.5 + z.sigmoid(), posterior.mean, posterior.stddev)
    return [x.detach().clone().requires_grad_() for x in leaves]


# --- waiting ---


class Waits(TorchDispatchMode):
    """Raise an error at operations that read a result on the host, or whose size depends on one."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not function.__name__.startswith(self.NAMES), f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting():
    """Raise an error where torch waits for the device, or would if there were one."""
    if not ON_GPU:
        with counted_launches(), Waits():  # for the interpreter itself looks at values
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_wait_is_an_error():
    x = torch.ones(2, device=DEVICE)
    with pytest.raises((AssertionError, RuntimeError)), no_waiting():
        float(x.sum())


@pytest.mark.parametrize("every", [1, 2])
def test_nothing_waits_for_the_device(monkeypatch, every):
    """Except the private Adam, which checks whether the gradients are finite."""
    prior, encoder, z = small_prior(update_every=every)
    leaves, steps = leaves_of(prior, encoder, z), []
    if not ON_GPU:  # where this number of the host's cannot be told from one of the device's
        monkeypatch.setattr(map_objective, "log_wishart_normaliser", lambda *_: 0.0)
    monkeypatch.setattr(prior._adam, "descend", lambda *step: steps.append(step))
    for context in (contextlib.nullcontext(), no_waiting()):  # the first compiles
        with context:
            kl_step(prior, leaves)
            prior.kl(encoder(prior.pseudo_inputs), encoder).mean().backward()
            prior.update(z, encoder)
            prior.assign(z, encoder)
    assert len(steps) == 2
    assert all(g.isfinite().all() for _, step in steps for g in step if g is not None)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_counts_wait_for_nothing_and_sparse_ones_give_the_same_bits():
    torch.manual_seed(0)
    dense = torch.poisson(torch.full((CELLS, GENES), 0.5)).to(DEVICE)
    parameters = on(DEVICE, (torch.rand(CELLS, GENES), torch.rand(GENES) + 0.5, dense.cpu() - 1))
    sparse, found = dense.to_sparse_csr(), []
    for context in (contextlib.nullcontext(), no_waiting()):  # the first compiles
        for x in (dense, sparse):
            leaves = [p.clone().requires_grad_() for p in parameters]
            with context if x is dense else contextlib.nullcontext():
                value = zinb_log_prob(x, *leaves)
                found.append((value.detach(), *torch.autograd.grad(value.sum(), leaves)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# --- graphs, streams, devices, runs ---


def replayed(step, change):
    """Capture a step in a graph, change its inputs, and return what the replayed graph computes."""
    if not ON_GPU:
        change()
        return step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    change()
    graph.replay()
    return found


def test_capture_and_replay(monkeypatch):
    prior, encoder, z = small_prior()
    leaves = leaves_of(prior, encoder, z)

    def change():
        with torch.no_grad():
            for x in leaves:
                x.mul_(1.25)

    found = replayed(partial(kl_step, prior, leaves), change)
    if ON_GPU:
        for value, expected in zip(found, kl_step(prior, leaves), strict=True):
            assert torch.equal(value, expected)
    monkeypatch.setattr(backends, "FORCED", "reference")
    torch.testing.assert_close(found, kl_step(prior, leaves), rtol=1e-3, atol=1e-3)


@contextlib.contextmanager
def another_stream():
    """Run in a stream that starts late."""
    if not ON_GPU:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # cycles: what runs on any other stream comes too early
        yield
    torch.cuda.current_stream().wait_stream(stream)


def test_another_stream():
    mixture = a_mixture(torch.float64)
    with another_stream():
        found = everything(ops, tuple(x.clone() for x in mixture))
    assert_all_close(found, everything(reference, mixture), 1e-9)


def test_a_device_that_is_not_the_current_one():
    if ON_GPU and torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU alone")
    mixture = a_mixture(torch.float64)
    found = everything(ops, on(OTHER_DEVICE, mixture))
    assert all(x.device == OTHER_DEVICE for x in found.values())
    found = {name: x.to(DEVICE) for name, x in found.items()}
    assert_all_close(found, everything(reference, mixture), 1e-9)


@inferences
def test_the_same_bits_on_every_run(inference):
    start, encoder, z = small_prior(inference=inference)
    mixture, leaves = a_mixture(), leaves_of(start, encoder, z)

    def run():
        moved = copy.deepcopy(start)
        moved.update(z, encoder)
        values = (*kl_step(start, leaves), *moved.parameters(), *moved.buffers())
        return everything(ops, mixture) | {str(i): x for i, x in enumerate(values)}, moved

    first, moved = run()
    for old, new in zip(start.parameters(), moved.parameters(), strict=True):
        assert new.isfinite().all() and not torch.equal(old, new)
    for _ in range(RUNS - 1):
        for name, value in run()[0].items():
            assert torch.equal(value, first[name]), name


def test_points_on_another_device_than_the_prior_are_an_error():
    prior, encoder, z = small_prior()
    elsewhere = z.to("meta")
    for call in (
        lambda: prior.kl(normal(elsewhere, elsewhere), encoder, z=elsewhere),
        lambda: prior.update(elsewhere, encoder),
    ):
        with pytest.raises(ValueError, match="centers must be on z's device meta, but is on"):
            call()
