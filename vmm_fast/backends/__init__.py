"""Choice of the code that computes an operation: compiled core, Triton kernels or plain torch.

:mod:`~vmm_fast.backends.core` serves CPU tensors of float32 and float64,
:mod:`~vmm_fast.backends.gpu` those of GPUs, and :mod:`~vmm_fast.backends.plain` those of any
device; each computes the operations of :mod:`vmm_fast.operations`. The tensors' device decides.
The kernels build components, and take the empirical-Bayes steps, up to
:data:`vmm_fast.operations.LARGEST_COMPONENT_DIM` dimensions; beyond, plain torch does.
On a GPU without Triton everything runs in plain torch, and one warning says so; if a kernel does
not compile or a dimension is too large for it, that operation alone does. The environment variable
``VMM_FAST_BACKEND``, read at import, forces "core", "triton" or "reference"; a forced backend that
cannot serve raises an error instead.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vmm_fast.backends import core, plain
from vmm_fast.operations import Operation

__all__ = [
    "call",
    "compiled_code_serves",
    "core_serves",
    "in_kernels",
    "in_memory",
    "kernels_serve",
]

FORCED = os.environ.get("VMM_FAST_BACKEND", "")
if FORCED not in ("", "core", "triton", "reference"):
    raise ValueError(
        f"VMM_FAST_BACKEND must be core, triton or reference, or not be set, but is {FORCED!r}"
    )


def core_serves(x: Tensor) -> bool:
    """Return whether the compiled core computes operations on x's device."""
    return x.is_cpu and FORCED in ("", "core")


def kernels_serve(x: Tensor) -> bool:
    """Return whether the kernels are tried first for operations on x's device."""
    return FORCED == "triton" or (not FORCED and x.is_cuda and "everything" not in _failed)


def compiled_code_serves(operation: Operation, inputs: Sequence[Any]) -> bool:
    """Return whether the compiled core or the kernels are tried first for these arguments."""
    x = inputs[operation.lead]
    if FORCED == "core" and not x.is_cpu:
        raise ValueError(f"VMM_FAST_BACKEND=core serves CPU tensors, but z is on {x.device}")
    if core_serves(x):
        return True
    beyond = operation.largest_dim and operation.size("D", inputs) > operation.largest_dim
    return kernels_serve(x) and not beyond


def in_memory(x: Tensor) -> Tensor:
    """Return the same values as compiled code reads them: contiguous, with no pending negation.

    The imaginary part of a conjugate is such a view: torch negates its values when they are read.
    """
    x = x.contiguous()
    return x.resolve_neg() if x.is_neg() else x


def call(
    operation: Operation, inputs: Sequence[Any]
) -> tuple[Sequence[Tensor | None], float | None]:
    """Return an operation's results from the backend that serves its tensors' device.

    Parameters
    ----------
    operation : Operation
    inputs : sequence
        Tensors and constants; for a backward, then whether each gradient is wanted.

    Returns
    -------
    results : sequence of Tensor or None
        Results and extras; None for a gradient that is not wanted.
    number : float or None
        The number that the core returns besides, if any.
    """
    if not compiled_code_serves(operation, inputs):
        return plain.call(operation, inputs)
    x = inputs[operation.lead]
    dense = [in_memory(a) if isinstance(a, Tensor) else a for a in inputs]
    if core_serves(x):
        return (
            core.call(operation, dense)
            if core.computes(operation)
            else plain.call(operation, dense)
        )
    found = in_kernels(operation.name, x, operation.size("D", inputs), dense)
    return plain.call(operation, inputs) if found is None else (found, None)


def in_kernels(name: str, x: Tensor, dim: int, arguments: Sequence[Any]) -> Any:
    """Return an operation's results from the kernels; None if plain torch must compute them."""
    if FORCED == "core" and not x.is_cpu:
        raise ValueError(f"VMM_FAST_BACKEND=core serves CPU tensors, but z is on {x.device}")
    if not kernels_serve(x):
        return None
    if FORCED:
        gpu = _gpu()
        if x.is_cpu and not gpu.INTERPRETED:
            raise ValueError(
                "VMM_FAST_BACKEND=triton serves CPU tensors in Triton's interpreter alone: set "
                f"TRITON_INTERPRET=1 as well ({name})"
            )
        if dim > gpu.LARGEST_DIM:
            raise ValueError(
                f"VMM_FAST_BACKEND=triton serves up to {gpu.LARGEST_DIM} dimensions in "
                f"{name}, not {dim}"
            )
        return getattr(gpu, name)(*arguments)
    served: Any = (name, dim, x.dtype)
    if served in _failed:
        return None
    try:
        gpu = _gpu()
    except Exception as error:  # whatever a broken installation raises
        _failed.add("everything")
        _warn(name, str(error))
        return None
    try:
        if dim > gpu.LARGEST_DIM:
            reason = f"the kernels serve up to {gpu.LARGEST_DIM} dimensions, not {dim}"
        else:
            return getattr(gpu, name)(*arguments)
    except gpu.COMPILER_ERRORS as error:
        # If the device itself has failed, plain torch would fail as well.
        if isinstance(error, _DEVICE_ERRORS) or _OF_DEVICE.search(str(error)):
            raise
        reason = f"a kernel does not compile ({type(error).__name__}: {error})"
    _failed.add(served)
    _warn(name, reason)
    return None


def _warn(name: str, reason: str) -> None:
    warnings.warn(
        f"{name}: {reason}; plain torch takes over, slower and with more memory", stacklevel=4
    )


# What the kernels have failed to compute: (operation, dimension, dtype), or "everything".
_failed: set[Any] = set()
_DEVICE_ERRORS = (
    torch.OutOfMemoryError,
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),
)
# Start of device errors' messages in Triton's launchers, and in torch before AcceleratorError.
_OF_DEVICE = re.compile(r"(CUDA|HIP) error|Triton Error \[")


@functools.cache
def _gpu() -> ModuleType:
    try:
        import triton
    except ImportError as error:
        raise ImportError(f"the kernels need Triton, which is missing: {error}") from error
    if not hasattr(triton, "constexpr_function"):
        raise ImportError(f"the kernels need Triton >= 3.5, not {triton.__version__}")
    from vmm_fast.backends import gpu

    return gpu
