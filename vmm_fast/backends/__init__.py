"""Which code computes an operation: the compiled core, Triton's kernels, or plain torch.

Each of the modules :mod:`~vmm_fast.backends.core` (CPU, float32 and float64),
:mod:`~vmm_fast.backends.gpu` and :mod:`~vmm_fast.backends.plain` (any device) has the same
functions: log_prob, log_prob_backward, kl, kl_backward, statistics, log_joint, responsibilities,
assign, whitened_components and whitened_components_backward. The device decides. A GPU whose
Triton is missing or fails to compile, and a dimension that the kernels do not serve, run in plain
torch and warn once. The environment variable ``VMM_FAST_BACKEND``, read at import, forces "core",
"triton" or "reference"; a forced backend that cannot serve raises an error instead.
"""

from __future__ import annotations

import functools
import os
import subprocess
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vmm_fast.backends import core, plain

__all__ = ["call", "core_serves", "in_kernels"]

FORCED = os.environ.get("VMM_FAST_BACKEND", "")
if FORCED not in ("", "core", "triton", "reference"):
    raise ValueError(
        f"VMM_FAST_BACKEND must be core, triton or reference, or not be set, but is {FORCED!r}"
    )


def core_serves(x: Tensor) -> bool:
    """Whether the compiled core computes what is on x's device."""
    return x.is_cpu and FORCED in ("", "core")


def call(name: str, x: Tensor, dim: int, *arguments: Any) -> Any:
    """Compute an operation of dimension ``dim`` with the backend that serves x's device."""
    if x.is_cpu and not FORCED:
        return getattr(core, name)(*arguments)
    if FORCED == "core":
        if not x.is_cpu:
            raise ValueError(f"VMM_FAST_BACKEND=core serves CPU tensors, but z is on {x.device}")
        return getattr(core, name)(*arguments)
    return in_kernels(name, x, dim, arguments, lambda: getattr(plain, name)(*arguments))


def in_kernels(
    name: str, x: Tensor, dim: int, arguments: Sequence[Any], otherwise: Callable[[], Any]
) -> Any:
    """Compute an operation in the kernels if they serve x's device, else ``otherwise``."""
    if FORCED == "reference" or not (FORCED == "triton" or x.is_cuda):
        return otherwise()
    try:
        gpu = _gpu()
    except ImportError as error:
        if FORCED:
            raise ImportError(f"VMM_FAST_BACKEND=triton, but {error}") from error
        _warn(f"Triton cannot be imported ({error})")
        return otherwise()
    largest = gpu.largest_dim(name)
    if dim > largest:
        if FORCED:
            raise ValueError(
                f"VMM_FAST_BACKEND=triton serves up to {largest} dimensions in {name}, not {dim}"
            )
        _warn(f"the kernels serve up to {largest} dimensions in {name}, not {dim}")
        return otherwise()
    if FORCED:
        return getattr(gpu, name)(*arguments)
    try:
        return getattr(gpu, name)(*arguments)
    except torch.OutOfMemoryError:
        raise
    except _compiler_errors() as error:
        _warn(f"a Triton kernel could not be run ({type(error).__name__}: {error})")
        return otherwise()


@functools.cache
def _gpu() -> ModuleType:
    from vmm_fast.backends import gpu

    return gpu


def _compiler_errors() -> tuple[type[Exception], ...]:
    from triton import CompilationError, TritonError

    # Also what a missing C compiler or a missing driver raises.
    return (CompilationError, TritonError, RuntimeError, OSError, subprocess.SubprocessError)


@functools.cache
def _warn(reason: str) -> None:
    """Say once why a GPU runs plain torch."""
    warnings.warn(f"{reason}; plain torch takes over, slower and with more memory", stacklevel=2)
