"""The operations in the compiled core, for CPU tensors of float32 and float64.

The core has a function for each dtype. It takes addresses and sizes in the order of
:mod:`vmm_fast.operations`, and checks values by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vmm_fast import _core
from vmm_fast.operations import Operation

__all__ = ["SUFFIXES", "call", "computes"]

SUFFIXES = {torch.float32: "_float32", torch.float64: "_float64"}

_functions: dict[tuple[Operation, torch.dtype], Callable[..., float | None]] = {}


def _function(operation: Operation, dtype: torch.dtype) -> Callable[..., float | None]:
    key = operation, dtype
    if key not in _functions:
        _functions[key] = getattr(_core, operation.name + SUFFIXES[dtype])
    return _functions[key]


@functools.cache
def computes(operation: Operation) -> bool:
    """Return whether the core has the operation."""
    return hasattr(_core, f"{operation.name}_float32")


def call(operation: Operation, inputs: Sequence[Any]) -> tuple[list[Tensor | None], float | None]:
    """Return an operation's results and extras, and the number that the core returns, if any.

    Gradients that are not wanted, or of an argument that is None, are None.
    """
    dtype = inputs[operation.lead].dtype
    sizes = operation.sizes(inputs)
    arguments: list[Any] = [
        0 if x is None else x.data_ptr() for x in inputs[: operation.num_tensors]
    ]
    for i, ndim in operation.two_forms:  # the last first
        x = inputs[i]
        arguments.insert(i + 1, x is not None and x.ndim == ndim)
    arguments += sizes[: operation.num_told]
    arguments += [inputs[i] for i in operation.flag_positions]
    arguments.append(torch.get_num_threads())
    results: list[Tensor | None] = []
    wanted = inputs[-1] if operation.forward and not operation.all_gradients else None
    for i, (shape, of_result) in enumerate(operation.shapes(inputs, sizes)):
        if shape is None or (wanted is not None and not wanted[i]):
            results.append(None)
            arguments.append(0)
        else:
            result = torch.empty(shape, dtype=of_result or dtype)
            results.append(result)
            arguments.append(result.data_ptr())
    return results, _function(operation, dtype)(*arguments)
