"""The Triton kernels on a GPU: values, precision, and what only a GPU has.

Where there is a GPU, :func:`test_all_of_this_on_a_gpu` runs this file once more in a process of its
own, without Triton's interpreter. In any other process the same checks run in the interpreter, on
the CPU and on small sizes, with nothing in the place of streams, graphs and waiting: so a check has
run before it meets a GPU.
"""

import contextlib
import copy
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import FORMS, random_gaussians, random_mixture
from test_counts import (
    FUNCTIONS,
    MODELS,
    assert_equals_reference,
    random_counts,
    values_and_gradients,
)
from test_ops import (
    assert_no_worse,
    assert_within_budget,
    composed_kl,
    everything,
    random_scale,
    to_double,
)
from torch.distributions import Independent, Normal

from vmm_fast import VMMPrior, backends, ops, reference

triton = pytest.importorskip("triton", reason="Triton is not installed")

ON_GPU = not triton.knobs.runtime.interpret
if ON_GPU and not torch.cuda.is_available():
    pytest.skip("TRITON_INTERPRET=0, but there is no GPU", allow_module_level=True)

if ON_GPU:
    DEVICE, OTHER_DEVICE = torch.device("cuda", 0), torch.device("cuda", 1)
    SHAPES = [(4096, 100, 10), (1000, 37, 30), (500, 20, 50), (300, 9, 100), (1, 1, 1)]
    POINTS, COMPONENTS, DIM, RUNS = 1000, 50, 10, 20
    CELLS, GENES = 300, 3000
else:
    DEVICE = OTHER_DEVICE = torch.device("cpu")
    SHAPES = [(20, 5, 3)]
    POINTS, COMPONENTS, DIM, RUNS = 20, 4, 3, 2
    CELLS, GENES = 2, 70

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, in the interpreter
    pytest.mark.usefixtures("quick_interpreter"),
]
transposes = pytest.mark.parametrize("transpose", [False, True])
shapes = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """No operation goes to plain torch unseen."""
    monkeypatch.setattr(backends, "FORCED", "triton")


def test_all_of_this_on_a_gpu():
    if ON_GPU:
        pytest.skip("this is that run")
    if not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", __file__],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr


# --- values ---


def on_device(tensors, dtype=None):
    return tuple(x if x is None else x.to(DEVICE, dtype) for x in tensors)


def near(shape, dtype=torch.float64):
    """A mixture of soft assignments: else the largest error is that of one lone tie."""
    return on_device(random_mixture(*shape, spread=min(2.0, 20 / shape[2])), dtype)


@transposes
@shapes
def test_float64(shape, transpose):
    mixture = near(shape)
    found, true = (everything(module, mixture, transpose) for module in (ops, reference))
    for name, value in true.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)
    label, *_ = ops.mixture_assign(*mixture, transpose)
    assert torch.equal(label, reference.mixture_assign(*mixture, transpose)[0])


@transposes
@shapes
def test_float32_error_budget(shape, transpose):
    mixture = near(shape, torch.float32)
    assert_within_budget(everything(ops, mixture, transpose), mixture, transpose)


@pytest.mark.parametrize(("scale", "offset"), [(1e-3, 1e4), (1e3, 1e4)])
def test_float32_error_budget_far_from_the_origin(scale, offset):
    z, centers, whitening, offsets = near(SHAPES[0], torch.float32)
    mixture = (z * scale + offset, centers * scale + offset, whitening / scale, offsets)
    assert_within_budget(everything(ops, mixture, False), mixture, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@shapes
def test_halves_are_computed_in_float32(shape, dtype):
    """In the same bits; only gradients are rounded to the input's dtype."""
    mixture = near(shape, dtype)
    single = tuple(x.float() for x in mixture)
    found, same = everything(ops, mixture, False), everything(ops, single, False)
    assert_within_budget(same, single, False)
    for name, value in same.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name


def kl_with_gradients(kl, inputs, transpose):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = kl(*leaves[:4], transpose, leaves[4])
    weights = torch.linspace(-1, 2, len(value), dtype=value.dtype, device=value.device)
    names = ("kl", "grad_z", "grad_centers", "grad_whitening", "grad_offsets", "grad_scale")
    found = (value.detach(), *torch.autograd.grad(value @ weights, leaves))
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("full", [False, True])
@shapes
def test_kl(shape, full, dtype):
    scale = random_scale(shape[0], shape[2], full)
    inputs = (*near(shape, dtype), *on_device([scale], dtype))
    found = kl_with_gradients(ops.mixture_kl, inputs, False)
    true = kl_with_gradients(composed_kl, to_double(inputs), False)
    if dtype == torch.float64:
        for name, value in true.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)
    else:
        single = tuple(x.float() for x in inputs)
        assert_no_worse(found, kl_with_gradients(composed_kl, single, False), true)


@pytest.mark.parametrize("dim", [32, 50, 128] if ON_GPU else [DIM])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_components(form, expected, dtype, dim):
    components = COMPONENTS
    inputs = random_gaussians(components, 2 * components, dim, form)
    inputs = on_device(inputs, dtype)

    def build(module, inputs):
        leaves = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
        whitening, offsets = module.whitened_components(*leaves, 2 * components, expected)
        given = [x for x in leaves if x is not None]
        loss = whitening.square().sum() + offsets.square().sum()
        grads = torch.autograd.grad(loss, given, allow_unused=True)
        values = (whitening.detach(), offsets.detach(), *(g for g in grads if g is not None))
        return {str(i): value for i, value in enumerate(values)}

    found = build(ops, inputs)
    true = build(reference, [x if x is None else x.double() for x in inputs])
    if dtype == torch.float64:
        for name, value in true.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)
    else:
        single = [x if x is None else x.float() for x in inputs]
        assert_no_worse(found, build(reference, single), true)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("model", MODELS)
def test_counts(model, dtype):
    arguments = on_device(random_counts(CELLS, GENES, dtype=dtype, depth=5.0))
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    assert_equals_reference(model, *arguments, **tolerance)


# --- the prior ---


def normal(mean, scale):
    # To check its arguments would be to wait for the device.
    return Independent(Normal(mean, scale, validate_args=False), 1, validate_args=False)


def small_prior(dtype=torch.float32, **options):
    """A prior of two pseudo-inputs a component, its encoder, and points."""
    torch.manual_seed(0)
    network = torch.nn.Linear(5, 2 * DIM, dtype=torch.float64)
    inputs, z = torch.randn(2 * COMPONENTS, 5), torch.randn(POINTS, DIM, dtype=torch.float64)
    prior = VMMPrior(inputs, DIM, pseudo_inputs_per_component=2, **options).double()
    with torch.no_grad():
        prior.logits.normal_()
        prior.raw_precision.add_(0.1 * torch.randn_like(prior.raw_precision))
    network.to(DEVICE, dtype)

    def encoder(u):
        mean, log_scale = network(u).chunk(2, -1)
        return normal(mean, log_scale.exp())

    return prior.to(DEVICE, dtype), encoder, z.to(DEVICE, dtype)


def kl_step(prior, leaves):
    """``prior.kl`` and its gradients by z, q's scale, and the pseudo-inputs' means and scales."""
    z, scale, centers, center_scale = leaves
    value = prior.kl(normal(z, scale), lambda _: normal(centers, center_scale), z=z)
    return value.detach(), *torch.autograd.grad(value, leaves, torch.ones_like(value))


def leaves_of(prior, encoder, z):
    with torch.no_grad():
        posterior = encoder(prior.pseudo_inputs)
    leaves = (z, 0.5 + z.sigmoid(), posterior.mean, posterior.stddev)
    return [x.detach().clone().requires_grad_() for x in leaves]


@pytest.mark.parametrize(
    "options",
    [{}, {"responsibility_gradient": False}, {"weights": "stick-breaking", "discount": 0.3}],
    ids=["default", "em", "sticks"],
)
def test_gradients_of_the_empirical_bayes_step(monkeypatch, options):
    found = {}
    for name, dtype, backend in (
        ("ours", torch.float32, "triton"),
        ("ours64", torch.float64, "triton"),
        ("eager", torch.float32, "reference"),
        ("true", torch.float64, "reference"),
    ):
        monkeypatch.setattr(backends, "FORCED", backend)
        prior, encoder, z = small_prior(dtype, **options)
        step = prior._step(z, encoder)
        values = (torch.as_tensor(step.loss, device=DEVICE), *step.gradients)
        found[name] = {str(i): value for i, value in enumerate(values)}
    # The loss is a sum in float64 of numbers in float32.
    found["ours"]["0"] = found["ours"]["0"].float()
    assert_no_worse(found["ours"], found["eager"], found["true"])
    for name, value in found["true"].items():
        torch.testing.assert_close(found["ours64"][name], value, rtol=1e-9, atol=1e-10)


@contextlib.contextmanager
def no_waiting():
    """An error where torch waits for the device."""
    if not ON_GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
def test_nothing_waits_for_the_device(monkeypatch, inference):
    """But for the private Adam, which looks whether the gradients are finite."""
    prior, encoder, z = small_prior(inference=inference)
    leaves, steps = leaves_of(prior, encoder, z), []
    monkeypatch.setattr(prior._adam, "descend", lambda *step: steps.append(step))
    for context in (contextlib.nullcontext(), no_waiting()):  # the first compiles
        with context:
            kl_step(prior, leaves)
            prior.kl(encoder(prior.pseudo_inputs), encoder).mean().backward()
            prior.update(z, encoder)
            prior.assign(z, encoder)
    assert len(steps) == 2
    assert all(g.isfinite().all() for g in steps[1][1])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_counts_wait_for_nothing_and_give_the_same_bits():
    x, *parameters = on_device(random_counts(CELLS, GENES, dtype=torch.float32))
    sparse, found = x.to_sparse_csr(), []
    for context in (contextlib.nullcontext(), no_waiting()):  # the first compiles
        with context:
            found += [values_and_gradients(FUNCTIONS["zinb"], y, *parameters) for y in (x, sparse)]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
def test_update_moves_the_prior(inference):
    prior, encoder, z = small_prior(inference=inference)
    before = [p.detach().clone() for p in prior.parameters()]
    prior.update(z, encoder)
    for old, new in zip(before, prior.parameters(), strict=True):
        assert new.isfinite().all() and not torch.equal(old, new)


# --- graphs, streams, devices, runs ---


def replayed(step, change):
    """What a captured ``step`` gives once its inputs have been changed."""
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


def test_capture_and_replay():
    prior, encoder, z = small_prior()
    leaves = leaves_of(prior, encoder, z)

    def change():
        with torch.no_grad():
            for x in leaves:
                x.mul_(1.25)

    found = replayed(partial(kl_step, prior, leaves), change)
    for value, expected in zip(found, kl_step(prior, leaves), strict=True):
        assert torch.equal(value, expected)


@contextlib.contextmanager
def another_stream():
    """A stream that is late."""
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
    mixture = near(SHAPES[0], torch.float32)
    expected = everything(ops, mixture, False)
    with another_stream():
        found = everything(ops, tuple(x.clone() for x in mixture), False)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_device_that_is_not_the_current_one():
    if ON_GPU and torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU alone")
    mixture = near(SHAPES[0])
    expected = everything(ops, mixture, False)
    found = everything(ops, tuple(x.to(OTHER_DEVICE) for x in mixture), False)
    for name, value in expected.items():
        assert found[name].device == OTHER_DEVICE
        torch.testing.assert_close(found[name].to(DEVICE), value, rtol=1e-9, atol=1e-9, msg=name)


def test_the_same_bits_on_every_run():
    mixture = near(SHAPES[0], torch.float32)
    prior, encoder, z = small_prior()
    leaves = leaves_of(prior, encoder, z)
    online, *_ = small_prior(inference="closed-form")

    def run():
        step = prior._step(z, encoder)
        moved = copy.deepcopy(online)
        moved.update(z, encoder)
        values = (*kl_step(prior, leaves), torch.as_tensor(step.loss), *step.gradients)
        values += (*moved.parameters(), *moved.buffers())
        return everything(ops, mixture, False) | {str(i): x for i, x in enumerate(values)}

    first = run()
    for _ in range(RUNS - 1):
        for name, value in run().items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("argument", ["centers", "whitening", "offsets"])
def test_tensors_on_two_devices_are_an_error(argument):
    names = ("z", "centers", "whitening", "offsets")
    mixture = dict(zip(names, near(SHAPES[0]), strict=True))
    mixture[argument] = mixture[argument].to("meta")
    with pytest.raises(ValueError, match=f"{argument} must be on z's device {DEVICE}, but is on"):
        ops.mixture_log_prob(**mixture)


def test_points_on_another_device_than_the_prior_are_an_error():
    prior, encoder, z = small_prior()
    elsewhere = z.to("meta")
    for call in (
        lambda: prior.kl(normal(elsewhere, elsewhere), encoder, z=elsewhere),
        lambda: prior.update(elsewhere, encoder),
    ):
        with pytest.raises(ValueError, match="centers must be on z's device meta, but is on"):
            call()
