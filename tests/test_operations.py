"""The table of operations: all that follows from it, for each operation in turn."""

import pytest
import torch
from support import random_counts, random_gaussians, random_mixture, random_scale

from vmm_fast import backends, operations
from vmm_fast.torch_ops import check, run

# numpy, which Triton's interpreter computes with, warns of an overflow; a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

every_operation = pytest.mark.parametrize("operation", operations.OPERATIONS, ids=lambda x: x.name)


def example(operation):
    """Small arguments: 5 points, 4 centers of 2 components, 3 dimensions, 7 genes."""
    mixture = random_mixture(5, 4, 3)
    names = list(operation.constants)
    if operation.name == "mixture_kl":
        return (*mixture, random_scale(5, 3, True), True)
    if "pseudo_inputs_per_component" in names:
        return (*mixture, True, 2)
    if "transpose" in names:
        return (*mixture, True)
    if "num_centers" in names:
        gaussians = random_gaussians(2, 4, 3, "precision+full")
        return (*gaussians, 4, True)[: len(operation.tensors) + len(names)]
    counts, mean, theta, logits = random_counts(5, 7)
    return (counts, None, None, mean, theta, logits, mean.sum(-1))


def differentiable(operation, inputs):
    """The same arguments, of which those that have a gradient ask for it."""
    positions = operation.differentiable_positions
    return tuple(x.clone().requires_grad_() if i in positions else x for i, x in enumerate(inputs))


def test_every_operation_has_a_name_of_its_own():
    names = [x.name for x in operations.OPERATIONS]
    assert len(set(names)) == len(names) == 9


@every_operation
def test_every_backend_gives_what_the_definition_gives(backend, operation):
    """Values and gradients, in the shapes that the table says."""
    inputs = on_device(example(operation), backend)
    found, true = [], []
    for results, compute in ((found, backends.call), (true, backends.plain.call)):
        results += compute(operation, inputs)[0]
        if operation.differentiable:
            shown = [results[i] for i in operation.gradient_positions]
            upstream = [torch.linspace(-1, 2, x.numel()).to(x).view_as(x) for x in shown]
            kept = [results[i] for i in operation.kept_positions]
            tensors = inputs[: len(operation.tensors)]
            constants = inputs[len(operation.tensors) :]
            wanted = [True] * len(operation.differentiable)
            given = (*upstream, *tensors, *kept, *constants, wanted)
            results += compute(operation.backward, given)[0]
    expected = operation.shapes(inputs, operation.sizes(inputs))
    shapes = [(tuple(x.shape), x.dtype) for x in found[: len(expected)]]
    assert shapes == [(tuple(shape), dtype or torch.float64) for shape, dtype in expected]
    names = [*operation.outputs, *(f"grad_{name}" for name in operation.differentiable)]
    for name, ours, exact in zip(names[: len(found)], found, true, strict=True):
        if name != "softmax":  # whose parts depend on the backend, and their sums do not
            torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9, msg=name)


def on_device(inputs, device):
    return tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs)


@every_operation
@pytest.mark.parametrize("backend", ["core", "triton"], indirect=True)
def test_opcheck(backend, operation):
    """Schema, fake and autograd, as torch checks them."""
    inputs = on_device(differentiable(operation, example(operation)), backend)
    op = getattr(torch.ops.vmm_fast, operation.name)
    torch.library.opcheck(op, inputs)
    if operation.differentiable:
        with torch.no_grad():
            results = op(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        upstream = [torch.ones_like(results[i]) for i in operation.gradient_positions]
        kept = [results[i] for i in operation.kept_positions]
        tensors = [x if x is None else x.detach() for x in inputs[: len(operation.tensors)]]
        # One that is not wanted is not given.
        wanted = [i > 0 for i in range(len(operation.differentiable))]
        constants = inputs[len(operation.tensors) :]
        backward = getattr(torch.ops.vmm_fast, operation.backward.name)
        torch.library.opcheck(backward, (*upstream, *tensors, *kept, *constants, wanted))


@pytest.mark.parametrize(
    "operation", [x for x in operations.OPERATIONS if x.differentiable], ids=lambda x: x.name
)
@pytest.mark.parametrize("backend", ["core", "plain", "triton"], indirect=True)
def test_second_derivatives(backend, operation):
    """Plain torch has them; compiled code says where they are."""
    inputs = on_device(differentiable(operation, example(operation)), backend)
    asked = [inputs[i] for i in operation.differentiable_positions]
    results = run(operation, check(operation, inputs))
    value = sum(results[i].square().sum() for i in operation.gradient_positions)
    if backends.FORCED != "reference":
        name = f"vmm_fast.reference.{operation.name}, which has"
        with pytest.raises(RuntimeError, match=name):
            torch.autograd.grad(value, asked, create_graph=True)
        return
    slopes = torch.autograd.grad(value, asked, create_graph=True)
    curvature = torch.autograd.grad(sum(x.square().sum() for x in slopes), asked)
    assert all(x.isfinite().all() and x.abs().max() > 0 for x in curvature)


@every_operation
def test_errors_name_the_argument(operation):
    """A list, whole numbers, another device, a dimension too many, a point or center too many."""
    inputs = example(operation)
    told = zip(operation.letters, operation.sizes(inputs), strict=True)
    sizes = {letter: size for letter, size in told if isinstance(letter, str)}
    first = next(iter(operation.arguments))
    for i, (name, argument) in enumerate(operation.arguments.items()):
        if not argument.shapes:
            continue
        value = inputs[i]
        refused = [
            (value.tolist(), TypeError, f"^{name} must be a torch.Tensor, but is list"),
            (
                value.long(),
                TypeError,
                f"^{name} must be float64, float32, float16 or bfloat16, but",
            ),
            (value[None, None], ValueError, f"^{name} must have shape"),
        ]
        if name != first:
            there = f"^{name} must be on {first}'s device cpu, but is on meta"
            refused.append((value.to("meta"), ValueError, there))
            longer = torch.cat([value, value[:1]])
            refused.append((longer, ValueError, rf"^{name} must have shape \[.* = .*, but has \["))
        for bad, error, message in refused:
            given = (*inputs[:i], bad, *inputs[i + 1 :])
            with pytest.raises(error, match=message):
                check(operation, given, **sizes)


@every_operation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_several_dtypes_become_the_widest(operation, dtype):
    """At least float32; what is of that dtype already is passed on as it is."""
    inputs = [x.float() if isinstance(x, torch.Tensor) else x for x in example(operation)]
    assert all(x is y for x, y in zip(check(operation, inputs), inputs, strict=True))
    halves = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in inputs]
    mixed = [halves[0].double(), *halves[1:]]
    for given, widest in ((halves, torch.float32), (mixed, torch.float64)):
        found = [x for x in check(operation, given) if isinstance(x, torch.Tensor)]
        assert {x.dtype for x in found} == {widest}
