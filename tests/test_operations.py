"""The table of operations: all that holds for each of them, in every form of its arguments."""

import functools
import runpy
from functools import partial

import pytest
import torch
from conftest import BACKENDS
from support import (
    FORMS,
    assert_all_close,
    expanded,
    negated,
    on_backends,
    random_counts,
    random_gaussians,
    random_mixture,
    random_scale,
    shifted,
    strided,
)

from vmm_fast import backends, counts, operations, ops
from vmm_fast.dispatch import check, run

# numpy, which Triton's interpreter computes with, warns of an overflow; a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

every_operation = pytest.mark.parametrize("operation", operations.OPERATIONS, ids=lambda x: x.name)
differentiable_ones = pytest.mark.parametrize(
    "operation", [x for x in operations.OPERATIONS if x.differentiable], ids=lambda x: x.name
)
one_of_each_kind = on_backends("core", "plain", "triton")
# Kernels of components and of counts share out no work, so that there is nothing to split.
every_backend = pytest.mark.parametrize(
    ("backend", "operation"),
    [
        pytest.param(backend, x, id=f"{backend}-{x.name}")
        for x in operations.OPERATIONS
        for backend in BACKENDS
        if backend != "triton-split" or "z" in x.tensors
    ],
    indirect=["backend"],
)
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


def examples(operation, size=5):
    """Small arguments in every form, the richest last.

    Points or cells of this size, 4 centers of 2 components, 3 dimensions, 7 genes.
    """
    names, mixture = operation.constants, random_mixture(size, 4, 3)
    if operation.name == "mixture_kl":
        return [(*mixture, random_scale(size, 3, full), full) for full in (False, True)]
    if "transpose" in names:
        grouped = "pseudo_inputs_per_component" in names
        return [(*mixture, x, 2) if grouped else (*mixture, x) for x in (False, True)]
    gaussians = {form: random_gaussians(2, 4, 3, form) for form in FORMS}
    richest = ["full", "diagonal", "precision", "precision+diagonal", "precision+full"]
    if operation.name == "whitened_components":
        found = [(*gaussians[form], 4, False) for form in richest]
        return found + [(*gaussians[form], 4, True) for form in richest[3:]]
    if operation.name == "stored_components":
        return [(*gaussians[form], 4) for form in richest[2:]]
    x, mean, theta, logits = random_counts(size, 7)
    by_cell = random_counts(size, 7, per_cell=True)[2]
    return [
        (x, None, None, mean, None, None, None),
        (x, None, None, mean, theta, None, None),
        (x, None, None, mean, by_cell, logits, None),
        (x, None, None, mean, theta, logits, mean.sum(-1)),
    ]


def example(operation):
    return examples(operation)[-1]


def forms(operation):
    """Return examples in every form; in the interpreter, which takes seconds, in the richest."""
    return examples(operation)[-1:] if backends.FORCED == "triton" else examples(operation)


def changed(inputs, change):
    """Return the arguments with this change made to each tensor."""
    return tuple(change(x) if isinstance(x, torch.Tensor) else x for x in inputs)


def on_device(inputs, device):
    return changed(inputs, lambda x: x.to(device))


def differentiable(operation, inputs, among=None):
    """Return arguments that require gradients, all or only ``among``, and their positions."""
    positions = operation.differentiable_positions
    if operation.reference_gradient:
        positions = range(len(operation.tensors))
    asked = {i for i in positions if inputs[i] is not None}.intersection(
        positions if among is None else among
    )
    # As they lie in memory.
    found = tuple(x.detach().requires_grad_() if i in asked else x for i, x in enumerate(inputs))
    return found, sorted(asked)


def public(operation, inputs):
    """Compute by the function that users call, from arguments in the table's order."""
    if operation.name == "count_log_prob":
        x, _, _, mean, *rest, size = inputs
        rest = [p for p in rest if p is not None]
        function = (counts.poisson_log_prob, counts.nb_log_prob, counts.zinb_log_prob)[len(rest)]
        return (function(x, mean if size is None else counts.SoftmaxMean(mean, size), *rest),)
    if operation.name == "mixture_kl":
        inputs = (*inputs[:4], inputs[5], inputs[4])
    found = getattr(ops, operation.name)(*inputs)
    return found if isinstance(found, tuple) else (found,)


def defined(operation, inputs):
    """Compute the definition, in float64."""
    doubles = changed(inputs, lambda x: x.contiguous().resolve_neg().double())
    return backends.plain.call(operation, doubles)[0][: len(operation.results)]


def computed(compute, operation, inputs, layout=lambda x: x, among=None):
    """Return every result and gradient by name; upstream gradients differ in every element."""
    if operation.reference_gradient:
        found = compute(operation, inputs)  # by compiled code, as no gradient is asked for
        names = [f"{name} without gradients" for name in operation.results]
        values = dict(zip(names, found, strict=True))
    else:
        values = {}
    inputs, asked = differentiable(operation, inputs, among)
    found = compute(operation, inputs)
    values |= {name: x.detach() for name, x in zip(operation.results, found, strict=True)}
    if asked:
        shown = [found[i] for i in operation.gradient_positions if found[i].requires_grad]
        upstream = [layout(torch.linspace(-1, 2, x.numel()).to(x).view_as(x)) for x in shown]
        slopes = torch.autograd.grad(shown, [inputs[i] for i in asked], upstream)
        names = [f"grad_{list(operation.tensors)[i]}" for i in asked]
        values |= dict(zip(names, slopes, strict=True))
    return values


def assert_same_bits(found, same):
    assert found.keys() == same.keys()
    for name, value in found.items():
        assert torch.equal(value, same[name]), name


def test_every_operation_has_a_name_of_its_own():
    names = [x.name for x in operations.OPERATIONS]
    assert len(set(names)) == len(names) == 9


def test_nothing_is_left_to_compute_while_an_operation_is_traced():
    """A cached property takes a lock before Python 3.12, which torch.compile cannot trace."""
    module = runpy.run_path(operations.__file__)
    properties = vars(module["Operation"]).items()
    names = {name for name, x in properties if isinstance(x, functools.cached_property)}
    assert names and all(names <= vars(x).keys() for x in module["OPERATIONS"])


@every_backend
def test_every_backend_gives_what_the_definition_gives(backend, operation):
    """Values and gradients, in the shapes that the table says, and the same bits once more."""
    for dtype, tolerance in TOLERANCES.items():
        for inputs in examples(operation) if dtype == torch.float64 else forms(operation):
            inputs = changed(inputs, lambda x, dtype=dtype: x.to(backend, dtype))
            found = computed(public, operation, inputs)
            told = operation.shapes(operation.sizes(operation.described(inputs)))
            for name, (shape, kind) in zip(operation.results, told, strict=False):
                assert found[name].shape == torch.Size(shape)
                assert found[name].dtype == (kind or dtype)
            true = computed(defined, operation, inputs)
            assert found.keys() == true.keys()
            single = {name: x.to(true[name].dtype) for name, x in found.items()}
            assert_all_close(single, true, tolerance)
    many = changed(examples(operation, 70)[-1], lambda x: x.to(backend).float())
    assert_same_bits(*(computed(public, operation, many) for _ in range(2)))


# --- memory ---


@every_operation
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(strided, torch.float64), (expanded, torch.float32), (negated, torch.float32)],
)
@one_of_each_kind
def test_tensors_lie_anywhere_in_memory(backend, operation, layout, dtype):
    """With gaps, with strides of zero, or the other sign, upstream too: the values alone count."""
    for inputs in forms(operation):
        moved = changed(inputs, lambda x: layout(x.to(backend, dtype)))
        tensors = [x for x in moved if isinstance(x, torch.Tensor)]
        assert layout is negated or not any(x.is_contiguous() for x in tensors)
        found = computed(public, operation, moved, layout)
        true = computed(defined, operation, moved, layout)
        found = {name: x.to(true[name].dtype) for name, x in found.items()}
        assert_all_close(found, true, TOLERANCES[dtype])


@every_operation
def test_tensors_may_be_misaligned(isa, operation):
    for dtype, tolerance in TOLERANCES.items():
        for inputs in examples(operation, 40):
            moved = changed(inputs, lambda x, dtype=dtype: shifted(x.to(dtype)))
            assert all(x.data_ptr() % 64 for x in moved if isinstance(x, torch.Tensor))
            found = computed(public, operation, moved, shifted)
            true = computed(defined, operation, moved)
            assert_all_close({n: x.to(true[n].dtype) for n, x in found.items()}, true, tolerance)


@pytest.mark.parametrize(
    "operation",
    [x for x in operations.OPERATIONS if "D D" in str(x.tensors)],
    ids=lambda x: x.name,
)
@one_of_each_kind
def test_upper_triangles_are_not_read(backend, operation):
    """They have no gradient either."""
    triangles = [i for i, x in enumerate(operation.tensors.values()) if "D D" in x]
    for inputs in forms(operation):
        inputs = on_device(inputs, backend)
        dirty = list(inputs)
        for i in triangles:
            if inputs[i] is not None and inputs[i].ndim == 3:
                dirty[i] = inputs[i] + torch.full_like(inputs[i], torch.nan).triu(1)
        found = computed(public, operation, dirty)
        assert_same_bits(found, computed(public, operation, inputs))
        for i in triangles:
            slope = found.get(f"grad_{list(operation.tensors)[i]}")
            assert slope is None or slope.ndim < 3 or (slope.triu(1) == 0).all()


# --- gradients ---


@differentiable_ones
@one_of_each_kind
def test_gradients_of_one_result(backend, operation):
    """Its sum has a gradient with strides of zero; the other results have none."""
    for inputs in forms(operation):
        inputs, asked = differentiable(operation, on_device(inputs, backend))
        leaves = [inputs[i] for i in asked]
        for i in operation.gradient_positions if asked else ():
            values = [compute(operation, inputs)[i].sum() for compute in (public, defined)]
            if not values[1].requires_grad:  # a matrix that does not depend on the weights
                continue
            found, true = (torch.autograd.grad(x, leaves, materialize_grads=True) for x in values)
            torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-9)


@differentiable_ones
@one_of_each_kind
def test_gradients_of_some_arguments(backend, operation):
    """Of one argument, or of all but one, they are the same as of all."""
    for inputs in forms(operation):
        inputs = on_device(inputs, backend)
        all_of_them = computed(public, operation, inputs)
        _, asked = differentiable(operation, inputs)
        few = [{i} for i in asked] + [set(asked) - {i} for i in asked]
        for among in few:
            found = computed(public, operation, inputs, among=among)
            assert sum(name.startswith("grad") for name in found) == len(among)
            assert_all_close(found, {name: all_of_them[name] for name in found}, 1e-12)


@differentiable_ones
@one_of_each_kind
def test_second_derivatives(backend, operation):
    """Plain torch has them; compiled code raises an error that says so."""
    inputs, asked = differentiable(operation, on_device(example(operation), backend))
    leaves = [inputs[i] for i in asked]
    results = run(operation, check(operation, inputs))
    value = sum(results[i].square().sum() for i in operation.gradient_positions)
    if backends.FORCED != "reference":
        name = f"vmm_fast.reference.{operation.name}, which has"
        with pytest.raises(RuntimeError, match=name):
            torch.autograd.grad(value, leaves, create_graph=True)
        return
    slopes = torch.autograd.grad(value, leaves, create_graph=True)
    curvature = torch.autograd.grad(sum(x.square().sum() for x in slopes), leaves)
    assert all(x.isfinite().all() and x.abs().max() > 0 for x in curvature)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own use
@differentiable_ones
def test_forward_mode_and_transforms_see_the_definition(operation):
    """A directional derivative forward is that backward; so is the gradient of torch.func."""
    inputs, asked = differentiable(operation, example(operation))
    leaf = inputs[asked[0]].detach()
    along = torch.randn_like(leaf).tril() if leaf.ndim > 2 else torch.randn_like(leaf)

    def value(x):
        given = [x if i == asked[0] else y for i, y in enumerate(inputs)]
        results = run(operation, check(operation, given))
        return sum(results[i].square().sum() for i in operation.gradient_positions)

    (gradient,) = torch.autograd.grad(value(inputs[asked[0]]), [inputs[asked[0]]])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(leaf, along)
        slope = torch.autograd.forward_ad.unpack_dual(value(dual)).tangent
    torch.testing.assert_close(slope, (gradient * along).sum(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.func.grad(value)(leaf), gradient, rtol=1e-9, atol=1e-9)


# --- torch ---

CHECKS = (
    "test_schema",
    "test_faketensor",
    "test_autograd_registration",
    "test_aot_dispatch_dynamic",
)


@every_operation
@on_backends("core", "triton")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own use
def test_opcheck(backend, operation):
    """Schema, fake and autograd, as torch checks them."""
    inputs = on_device(example(operation), backend)
    if operation.differentiable:
        inputs, _ = differentiable(operation, inputs)
    op = getattr(torch.ops.vmm_fast, operation.name)
    # What compiles does not depend on who computes.
    checks = CHECKS[:3] if backends.FORCED == "triton" else CHECKS
    torch.library.opcheck(op, inputs, test_utils=checks)
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
        inputs = (*upstream, *tensors, *kept, *constants, wanted)
        torch.library.opcheck(backward, inputs, test_utils=checks)


@every_operation
@on_backends("core", "plain")
def test_compiles_without_graph_breaks(backend, operation):
    """Compiled code of any kind is one op; plain torch is traced."""
    inputs = on_device(example(operation), backend)
    torch._dynamo.reset()
    step = torch.compile(partial(public, operation), fullgraph=True, backend="aot_eager")
    found = computed(lambda _, given: step(given), operation, inputs)
    assert_all_close(found, computed(public, operation, inputs), 1e-7)


# --- checks of arguments ---


@every_operation
def test_errors_name_the_argument(operation):
    """A list, whole numbers, another device, a dimension too many, a point or center too many."""
    inputs = example(operation)
    told = zip(operation.letters, operation.sizes(operation.described(inputs)), strict=True)
    sizes = {letter: size for letter, size in told if isinstance(letter, str)}
    first = next(iter(operation.arguments))
    for i, (name, argument) in enumerate(operation.arguments.items()):
        if not argument.shapes:
            continue
        value = inputs[i]
        floating = f"^{name} must be float64, float32, float16 or bfloat16, but"
        refused = [
            (value.tolist(), TypeError, f"^{name} must be a torch.Tensor, but is list"),
            (value.long(), TypeError, floating),
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
    for i, (name, kind) in enumerate(operation.constants.items(), len(operation.arguments)):
        wanted = "True or False" if kind == "bool" else "an integer"
        for bad in ("no", 2.0, None):
            given = (*inputs[:i], bad, *inputs[i + 1 :])
            with pytest.raises(TypeError, match=f"^{name} must be {wanted}, but is"):
                check(operation, given, **sizes)


@every_operation
def test_tensors_of_the_dtype_that_is_computed_in_are_passed_on(operation):
    for dtype in TOLERANCES:
        inputs = changed(example(operation), lambda x, dtype=dtype: x.to(dtype))
        assert all(x is y for x, y in zip(check(operation, inputs), inputs, strict=True))


@every_operation
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("core", torch.float16),
        ("core", torch.bfloat16),
        ("plain", torch.float16),
        ("triton", torch.bfloat16),
    ],
    indirect=["backend"],
)
def test_several_dtypes_become_the_widest(backend, operation, dtype):
    """At least float32, in the same bits; only gradients are rounded to the argument's dtype."""
    for inputs in forms(operation):
        halves = changed(inputs, lambda x: x.to(backend, dtype))
        first_double = (halves[0].double(), *halves[1:])
        if operation.name == "count_log_prob":  # to whose dtype that of the counts adds nothing
            first_double = (*halves[:3], halves[3].double(), *halves[4:])
        for given, widest in ((halves, torch.float32), (first_double, torch.float64)):
            found = computed(public, operation, given)
            same = computed(public, operation, changed(given, lambda x, w=widest: x.to(w)))
            dtypes = {f"grad_{name}": x for name, x in zip(operation.tensors, given, strict=False)}
            for name, value in same.items():
                value = value.to(dtypes[name].dtype) if name in dtypes else value
                assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
