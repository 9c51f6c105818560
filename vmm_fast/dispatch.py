"""Dispatch of the table's operations: checked, differentiable, known to ``torch.compile``.

Public functions call :func:`check` once for their arguments, then :func:`run`. On devices that
compiled code serves, an operation is a :class:`torch.autograd.Function` in eager mode and an op of
the library ``vmm_fast`` under ``torch.compile``, and can be differentiated once. On others it is
its definition in plain torch, which can be differentiated any number of times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vmm_fast import backends
from vmm_fast.operations import OPERATIONS, Argument, Operation

__all__ = ["check", "is_transformed", "run"]

_Found = tuple[Sequence[Tensor | None], float | None]
_Call = Callable[[Operation, Sequence[Any]], _Found]
_FLOATS = (torch.float32, torch.float64)
_COMPUTED = (*_FLOATS, torch.float16, torch.bfloat16)
_MAY_BE_0 = ("B", "G")  # no points, no genes

# --- arguments ---


def check(
    operation: Operation,
    inputs: Sequence[Any],
    names: dict[str, str] | None = None,
    **sizes: int,
) -> Sequence[Any]:
    """Return the arguments in one dtype, the widest of all and at least float32.

    Parameters
    ----------
    operation : Operation
    inputs : sequence
        Its tensors and constants.
    names : dict of str to str, optional
        Names of arguments in messages, for those that have another name in the table.
    **sizes : int
        The numbers that letters stand for, as far as they are known.

    Raises
    ------
    TypeError
        If an argument is no tensor, or has no floating dtype.
    ValueError
        If its shape does not fit those before it, or it lies on another device.
    """
    first: Tensor | None = None
    alike = True
    for i, name, argument in operation.checked:
        x = inputs[i]
        if x is None and argument.optional:
            continue
        if names:
            name = names.get(name, name)
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, but is {type(x).__name__}")
        dtype, device = x.dtype, x.device
        if first is None:
            first, first_name, common, place = x, name, dtype, device
        if dtype is not common or dtype not in _FLOATS:
            alike = False
            if dtype not in _COMPUTED:
                raise TypeError(
                    f"{name} must be float64, float32, float16 or bfloat16, but is {dtype}"
                )
        if device != place:
            raise ValueError(f"{name} must be on {first_name}'s device {place}, but is on {device}")
        if argument.shapes and not _fits(argument, x.shape, sizes):
            _refuse_shape(name, argument, x.shape, sizes)
    for i, name, kind in operation.constant_kinds:
        if type(inputs[i]) is not kind and not torch.compiler.is_compiling():
            _check_constant(name, kind, inputs[i])
    if alike:
        return inputs
    kinds = [x.dtype for x in inputs if isinstance(x, Tensor) and x.dtype in _COMPUTED]
    widest = functools.reduce(torch.promote_types, kinds, torch.float32)
    return [x.to(widest) if isinstance(x, Tensor) and x.dtype in _COMPUTED else x for x in inputs]


def _fits(argument: Argument, shape: torch.Size, sizes: dict[str, int]) -> bool:
    """Return whether a shape fits the known sizes; add the sizes that it determines."""
    letters = argument.shapes[0]
    if len(letters) != len(shape):
        letters = argument.shapes[-1]
        if len(letters) != len(shape):
            return False
    added = []
    for letter, size in zip(letters, shape, strict=True):
        known = sizes.get(letter)
        if known is None and (size > 0 or letter in _MAY_BE_0):
            sizes[letter] = size
            added.append(letter)
        elif known != size:
            for other in added:
                del sizes[other]
            return False
    return True


def _check_constant(name: str, kind: type, value: Any) -> None:
    if kind is bool and not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, but is {value!r}")
    if kind is int and (isinstance(value, bool) or not isinstance(value, Integral | torch.SymInt)):
        raise TypeError(f"{name} must be an integer, but is {value!r}")


def _refuse_shape(name: str, argument: Argument, shape: torch.Size, sizes: dict[str, int]) -> None:
    forms = " or ".join(f"[{', '.join(letters)}]" for letters in argument.shapes)
    used = dict.fromkeys(letter for form in argument.shapes for letter in form)
    limits = [
        f"{letter} = {sizes[letter]}" if letter in sizes else f"{letter} >= 1"
        for letter in used
        if letter in sizes or letter not in _MAY_BE_0
    ]
    limits = limits and [f" with {', '.join(limits)}"]
    raise ValueError(f"{name} must have shape {forms}{''.join(limits)}, but has {list(shape)}")


# --- eager mode ---


def run(operation: Operation, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Return an operation's results and, last, the number that the core returns, if any, or None.

    Parameters
    ----------
    operation : Operation
    inputs : sequence
        Tensors and constants, as :func:`check` returns them.
    """
    shown = len(operation.results)
    if not operation.differentiable and not operation.reference_gradient:
        inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    needs_gradient = torch.is_grad_enabled() and any(
        [isinstance(x, Tensor) and x.requires_grad for x in inputs]
    )
    in_plain_torch = (
        not backends.compiled_code_serves(operation, inputs)
        or (needs_gradient and operation.reference_gradient)
        or is_transformed()
    )
    if not in_plain_torch and torch.compiler.is_compiling():
        found = getattr(torch.ops.vmm_fast, operation.name)(*inputs)
        return (*found[:shown], None) if isinstance(found, tuple) else (found, None)
    if not in_plain_torch and needs_gradient and operation.differentiable:
        applied: tuple[Any, ...] = _function(operation, backends.call, shown).apply(*inputs)
        return applied
    compute = backends.plain.call if in_plain_torch else backends.call
    results, number = compute(operation, inputs)
    return (*results[:shown], number)


def is_transformed() -> bool:
    """Return whether forward-mode AD or a transform of torch.func is at work.

    Compiled code would not see what they attach to tensors.
    """
    return not torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


@functools.cache
def _function(operation: Operation, call: _Call, shown: int) -> type[torch.autograd.Function]:
    """Return an autograd function that computes by ``call`` and returns so many of the outputs."""
    number_of_tensors = operation.num_tensors
    kept, with_gradient = operation.kept_positions, operation.gradient_positions
    constant = set(range(shown)).difference(with_gradient)
    positions = operation.differentiable_positions

    class Compiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Any, ...]:
            results, number = call(operation, inputs)
            ctx.save_for_backward(*inputs[:number_of_tensors], *[results[i] for i in kept])
            ctx.constants = inputs[number_of_tensors:]
            ctx.set_materialize_grads(False)
            if constant:
                ctx.mark_non_differentiable(*[results[i] for i in constant])
            if len(with_gradient) > 1:
                found = (results[i] for i in with_gradient)
                ctx.shapes = [x.shape for x in found if x is not None]  # no result of a forward is
            return (*results[:shown], number)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
            if torch.is_grad_enabled():  # only under create_graph=True
                raise RuntimeError(
                    f"{operation.name} has no second derivative in compiled code; use "
                    f"vmm_fast.reference.{operation.name}, which has"
                )
            saved, constants = ctx.saved_tensors, ctx.constants
            upstream = [gradients[i] for i in with_gradient]
            if len(with_gradient) > 1 and not operation.missing_gradients:
                shapes = zip(upstream, ctx.shapes, strict=True)
                upstream = [saved[0].new_zeros(s) if x is None else x for x, s in shapes]
            needed = ctx.needs_input_grad  # a new tuple each time
            wanted = tuple([needed[i] for i in positions])
            found, _ = call(operation.backward, (*upstream, *saved, *constants, wanted))
            of_inputs: list[Tensor | None] = [None] * (number_of_tensors + len(constants))
            for i, gradient in zip(positions, found, strict=True):
                of_inputs[i] = gradient
            return tuple(of_inputs)

    return Compiled


# --- torch.compile ---

_library = torch.library.Library("vmm_fast", "DEF")


def _schema(operation: Operation) -> str:
    given = [
        f"Tensor{'?' * argument.optional} {name}" for name, argument in operation.arguments.items()
    ]
    given += [
        f"{'bool' if kind == 'bool' else 'int'} {name}"
        for name, kind in operation.constants.items()
    ]
    if operation.forward:
        given.append(f"bool[{len(operation.results)}] wanted")
        results = "Tensor[]"  # the wanted gradients alone
    else:
        names = list(operation.outputs)
        results = ", ".join(f"Tensor {name}" for name in names)
        results = f"({results})" if len(names) > 1 else "Tensor"
    return f"{operation.name}({', '.join(given)}) -> {results}"


def _call_op(operation: Operation, inputs: Sequence[Any]) -> _Found:
    """Return what ``backends.call`` does, by torch's op, which :mod:`torch.compile` records."""
    with torch._C._AutoDispatchBelowAutograd():
        found = getattr(torch.ops.vmm_fast, operation.name)(*inputs)
    if not operation.forward:
        return found if isinstance(found, tuple) else (found,), None
    gradients = iter(found)
    like = zip(operation.differentiated(inputs), inputs[-1], strict=True)
    return [next(gradients) if want and x is not None else None for x, want in like], None


def _define(operation: Operation) -> None:
    """Register an operation's schema, code, result shapes and gradients with torch.

    Kernels of dispatch keys take a fraction of the time of :func:`torch.library.register_fake` and
    ``register_autograd``, which counts in every import.
    """

    def in_schema(found: Sequence[Any], inputs: Sequence[Any]) -> Any:
        if operation.forward:
            wanted = zip(found, inputs[-1], strict=True)
            return [x for x, want in wanted if want and x is not None]
        return tuple(found) if len(found) > 1 else found[0]

    def compute(*inputs: Any) -> Any:
        if operation.forward:
            inputs = (*inputs[:-1], tuple(inputs[-1]))  # a list in torch's call
        found, _ = backends.call(operation, inputs)
        # The shapes promise contiguous results.
        return in_schema([x if x is None else x.contiguous() for x in found], inputs)

    def shaped(*inputs: Any) -> Any:
        lead = inputs[operation.lead]
        if operation.forward:
            like = operation.differentiated(inputs)
            found = [None if x is None else lead.new_empty(x.shape) for x in like]
        else:
            shapes = operation.shapes(operation.sizes(operation.described(inputs)))
            found = [lead.new_empty(shape, dtype=dtype or lead.dtype) for shape, dtype in shapes]
        return in_schema(found, inputs)

    def differentiable(*inputs: Any) -> Any:
        function = _function(operation, _call_op, len(operation.outputs))
        results = function.apply(*inputs)[:-1]
        return in_schema(results, inputs)

    _library.define(_schema(operation))
    _library.impl(operation.name, compute, "CompositeExplicitAutograd")
    _library.impl(operation.name, shaped, "Meta")
    if operation.differentiable:
        _library.impl(operation.name, differentiable, "Autograd")
        _define(operation.backward)


for _operation in OPERATIONS:
    _define(_operation)
