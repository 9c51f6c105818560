"""The operations in the compiled core, for CPU tensors of float32 and float64.

The core has a function for each dtype. It takes addresses and sizes in the order of
:mod:`vmm_fast.operations`, and checks values by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmm_fast import _core
from vmm_fast.operations import Operation

__all__ = ["SUFFIXES", "call", "computes"]

SUFFIXES = {torch.float32: "_float32", torch.float64: "_float64"}


@functools.cache
def computes(operation: Operation) -> bool:
    """Return whether the core has the operation."""
    return hasattr(_core, f"{operation.name}_float32")


class _Plan(NamedTuple):
    """The function of the core, and what a call passes it besides tensors.

    Attributes
    ----------
    function : callable
        The core's.
    flags : tuple of (int, bool)
        Place among the addresses, and value, of the flags that tell which of two shapes it is.
    rest : tuple
        The sizes and flags that follow the addresses.
    results : tuple of (tuple of int, torch.dtype)
        Shapes and dtypes of results and extras; empty for gradients.
    """

    function: Callable[..., float | None]
    flags: tuple[tuple[int, bool], ...]
    rest: tuple[Any, ...]
    results: tuple[tuple[tuple[int, ...], torch.dtype], ...]


@functools.lru_cache(maxsize=1024)
def _plan(operation: Operation, dtype: torch.dtype, *given: Any) -> _Plan:
    """Return the plan for these shapes and constants, which a training loop repeats."""
    sizes = operation.sizes(given)
    forms = operation.two_forms  # the last first
    return _Plan(
        getattr(_core, operation.name + SUFFIXES[dtype]),
        tuple((i + 1, given[i] is not None and len(given[i]) == ndim) for i, ndim in forms),
        (*sizes[: operation.num_told], *[given[i] for i in operation.flag_positions]),
        tuple((shape, x or dtype) for shape, x in operation.shapes(sizes)),
    )


def call(operation: Operation, inputs: Sequence[Any]) -> tuple[list[Tensor | None], float | None]:
    """Return an operation's results and extras, and the number that the core returns, if any.

    Gradients that are not wanted, or of an argument that is None, are None.
    """
    plan = _plan(operation, inputs[operation.lead].dtype, *operation.described(inputs))
    tensors = inputs[: operation.num_tensors]
    addresses: list[Any] = [0 if x is None else x.data_ptr() for x in tensors]
    for place, flag in plan.flags:
        addresses.insert(place, flag)
    results: list[Tensor | None]
    if operation.forward:
        like = operation.differentiated(inputs)
        if not operation.all_gradients:
            like = [x if want else None for x, want in zip(like, inputs[-1], strict=True)]
        results = [None if x is None else torch.empty_like(x) for x in like]
    else:
        # The device by default may be another.
        results = [torch.empty(shape, dtype=x, device="cpu") for shape, x in plan.results]
    of_results = [0 if x is None else x.data_ptr() for x in results]
    number = plan.function(*addresses, *plan.rest, torch.get_num_threads(), *of_results)
    return results, number
