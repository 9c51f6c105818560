"""Which code computes an operation: the compiled core, Triton's kernels, or plain torch.

Each of the modules :mod:`~vmm_fast.backends.core` (CPU, float32 and float64),
:mod:`~vmm_fast.backends.gpu` and :mod:`~vmm_fast.backends.plain` (any device) has the same
functions: log_prob, log_prob_backward, kl, kl_backward, statistics, log_joint, responsibilities,
assign, whitened_components, whitened_components_backward, stored_components, count_log_prob and
count_log_prob_backward. The device decides.
On a GPU without Triton everything runs in plain torch, and one warning says so; where a kernel does
not compile, or a dimension is beyond it, that operation does. The environment variable
``VMM_FAST_BACKEND``, read at import, forces "core", "triton" or "reference"; a forced backend that
cannot serve raises an error instead.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vmm_fast.backends import core, plain

__all__ = ["call", "core_serves", "in_kernels", "in_memory", "kernels_serve"]

FORCED = os.environ.get("VMM_FAST_BACKEND", "")
if FORCED not in ("", "core", "triton", "reference"):
    raise ValueError(
        f"VMM_FAST_BACKEND must be core, triton or reference, or not be set, but is {FORCED!r}"
    )


def core_serves(x: Tensor) -> bool:
    """Whether the compiled core computes what is on x's device."""
    return x.is_cpu and FORCED in ("", "core")


def kernels_serve(x: Tensor) -> bool:
    """Whether the kernels are asked for what is on x's device, and plain torch after them."""
    return FORCED == "triton" or (not FORCED and x.is_cuda)


def in_memory(x: Tensor) -> Tensor:
    """Return the same values as compiled code reads them: dense, and with their signs.

    torch keeps the imaginary part of a conjugate as a view of the other sign, with a bit set.
    """
    x = x.contiguous()
    return x.resolve_neg() if x.is_neg() else x


def call(name: str, x: Tensor, dim: int, *arguments: Any) -> Any:
    """Compute an operation of dimension ``dim`` with the backend that serves x's device."""
    if any(isinstance(a, Tensor) and a.is_neg() for a in arguments):
        arguments = tuple(in_memory(a) if isinstance(a, Tensor) else a for a in arguments)
    if x.is_cpu and FORCED in ("", "core"):
        return getattr(core, name)(*arguments)
    return in_kernels(name, x, dim, arguments, lambda: getattr(plain, name)(*arguments))


def in_kernels(
    name: str, x: Tensor, dim: int, arguments: Sequence[Any], otherwise: Callable[[], Any]
) -> Any:
    """Compute an operation in the kernels if they serve x's device, else ``otherwise``."""
    if FORCED == "core" and not x.is_cpu:
        raise ValueError(f"VMM_FAST_BACKEND=core serves CPU tensors, but z is on {x.device}")
    if not kernels_serve(x):
        return otherwise()
    if FORCED:
        gpu = _gpu()
        if x.is_cpu and not gpu.INTERPRETED:
            raise ValueError(
                "VMM_FAST_BACKEND=triton serves CPU tensors in Triton's interpreter alone: set "
                f"TRITON_INTERPRET=1 as well ({name})"
            )
        if dim > gpu.largest_dim(name):
            raise ValueError(
                f"VMM_FAST_BACKEND=triton serves up to {gpu.largest_dim(name)} dimensions in "
                f"{name}, not {dim}"
            )
        return getattr(gpu, name)(*arguments)
    served: Any = (name, dim, x.dtype)
    if _failed.intersection((served, "everything")):
        return otherwise()
    try:
        gpu = _gpu()
    except Exception as error:  # whatever a broken installation raises
        _failed.add("everything")
        return _in_plain_torch(name, str(error), otherwise)
    try:
        if dim > gpu.largest_dim(name):
            reason = f"the kernels serve up to {gpu.largest_dim(name)} dimensions, not {dim}"
        else:
            return getattr(gpu, name)(*arguments)
    except gpu.COMPILER_ERRORS as error:
        # After an error of the device itself, plain torch would fail as well.
        if isinstance(error, _DEVICE_ERRORS) or _OF_DEVICE.search(str(error)):
            raise
        reason = f"a kernel does not compile ({type(error).__name__}: {error})"
    _failed.add(served)
    return _in_plain_torch(name, reason, otherwise)


def _in_plain_torch(name: str, reason: str, otherwise: Callable[[], Any]) -> Any:
    warnings.warn(
        f"{name}: {reason}; plain torch takes over, slower and with more memory", stacklevel=4
    )
    return otherwise()


# What the kernels do not serve, as was found out: (operation, dimension, dtype), or "everything".
_failed: set[Any] = set()
_DEVICE_ERRORS = (
    torch.OutOfMemoryError,
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),
)
# As torch before AcceleratorError and Triton's launchers begin their messages.
_OF_DEVICE = re.compile(r"(CUDA|HIP) error|Triton Error \[")


@functools.cache
def _gpu() -> ModuleType:
    try:
        import triton
    except ImportError as error:
        raise ImportError(f"the kernels need Triton, which is missing: {error}") from error
    if not hasattr(triton, "constexpr_function"):
        raise ImportError(f"the kernels need Triton >= 3.4, not {triton.__version__}")
    from vmm_fast.backends import gpu

    return gpu
