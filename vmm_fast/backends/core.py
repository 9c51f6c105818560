"""The operations in the compiled core, for CPU tensors of float32 and float64: addresses and sizes.

The core checks values by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vmm_fast import _core, reference

SUFFIXES = {torch.float32: "_float32", torch.float64: "_float64"}


def latent_dim(precision_cholesky: Tensor | None, scale: Tensor | None) -> int:
    """D of components."""
    given = scale if precision_cholesky is None else precision_cholesky
    assert given is not None
    return given.shape[-1] if given.ndim > 1 else 0


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _core_call(
    name: str,
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    transpose: bool,
    *rest: Any,
) -> None:
    """Call an operation of the compiled core; ``rest`` are addresses and numbers."""
    z, centers, whitening, offsets = (
        z.contiguous(),
        centers.contiguous(),
        whitening.contiguous(),
        offsets.contiguous(),
    )
    rows, dim = z.shape
    getattr(_core, name + SUFFIXES[z.dtype])(
        z.data_ptr(),
        centers.data_ptr(),
        whitening.data_ptr(),
        offsets.data_ptr(),
        rows,
        centers.shape[0],
        dim,
        transpose,
        torch.get_num_threads(),
        *rest,
    )


def _empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


def log_prob(
    z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, transpose: bool
) -> tuple[Tensor, Tensor, Tensor]:
    size = z.shape[0]
    lse, expected, softmax = (
        torch.empty(size, dtype=z.dtype),
        torch.empty(size, dtype=z.dtype),
        torch.empty(3, size, dtype=z.dtype),
    )
    addresses = (lse.data_ptr(), expected.data_ptr(), softmax.data_ptr())
    _core_call("log_prob", z, centers, whitening, offsets, transpose, *addresses)
    return lse, expected, softmax


def log_prob_backward(
    grad_lse: Tensor | None,
    grad_expected: Tensor | None,
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    softmax: Tensor,
    transpose: bool,
) -> tuple[Tensor, ...]:
    grads = _empty_like(z, centers, whitening, offsets)
    upstream = [x if x is None else x.contiguous() for x in (grad_lse, grad_expected)]
    _core_call(
        "log_prob_backward",
        z,
        centers,
        whitening,
        offsets,
        transpose,
        softmax.data_ptr(),
        *map(_address, upstream),
        *(x.data_ptr() for x in grads),
    )
    return grads


def kl(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    scale: Tensor,
    transpose: bool,
) -> tuple[Tensor, Tensor]:
    size = z.shape[0]
    kl, softmax = torch.empty(size, dtype=z.dtype), torch.empty(3, size, dtype=z.dtype)
    scale = scale.contiguous()
    posteriors = (scale.data_ptr(), scale.ndim == 3)
    addresses = (kl.data_ptr(), softmax.data_ptr())
    _core_call("kl", z, centers, whitening, offsets, transpose, *posteriors, *addresses)
    return kl, softmax


def kl_backward(
    grad_kl: Tensor,
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    scale: Tensor,
    softmax: Tensor,
    transpose: bool,
) -> tuple[Tensor, ...]:
    grads = _empty_like(z, centers, whitening, offsets, scale)
    grad_z, *grad_mixture, grad_scale = grads
    grad_kl, scale = grad_kl.contiguous(), scale.contiguous()
    _core_call(
        "kl_backward",
        z,
        centers,
        whitening,
        offsets,
        transpose,
        scale.data_ptr(),
        scale.ndim == 3,
        softmax.data_ptr(),
        grad_kl.data_ptr(),
        grad_z.data_ptr(),
        grad_scale.data_ptr(),
        *(x.data_ptr() for x in grad_mixture),
    )
    return grads


def statistics(
    z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, transpose: bool
) -> tuple[Tensor, ...]:
    out = _empty_like(offsets, centers, whitening)
    addresses = (x.data_ptr() for x in out)
    _core_call("statistics", z, centers, whitening, offsets, transpose, *addresses)
    return out


def _matrix(name: str):
    def function(
        z: Tensor,
        centers: Tensor,
        whitening: Tensor,
        offsets: Tensor,
        transpose: bool,
        per_component: int,
    ) -> Tensor:
        out = torch.empty(z.shape[0], centers.shape[0] // per_component, dtype=z.dtype)
        rest = (per_component, out.data_ptr())
        _core_call(name, z, centers, whitening, offsets, transpose, *rest)
        return out

    return function


def assign(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    transpose: bool,
    per_component: int,
) -> tuple[Tensor, Tensor, Tensor]:
    size = z.shape[0]
    label = torch.empty(size, dtype=torch.int64)
    out = (label, torch.empty(size, dtype=z.dtype), torch.empty(size, dtype=z.dtype))
    rest = (per_component, *(x.data_ptr() for x in out))
    _core_call("assign", z, centers, whitening, offsets, transpose, *rest)
    return out


def _components_call(
    name: str,
    log_weights: Tensor,
    precision_cholesky: Tensor | None,
    scale: Tensor | None,
    whitening: Tensor,
    expected: bool,
    *rest: Tensor | None,
) -> float:
    """Call an operation of the compiled core on Components."""
    inputs = [x if x is None else x.contiguous() for x in (log_weights, precision_cholesky, scale)]
    total, dim = whitening.shape[:2]
    return getattr(_core, name + SUFFIXES[log_weights.dtype])(
        *map(_address, inputs),
        scale is not None and scale.ndim == 2,
        expected,
        log_weights.shape[0],
        total,
        dim,
        torch.get_num_threads(),
        whitening.data_ptr(),
        *map(_address, rest),
    )


def whitened_components(
    log_weights: Tensor,
    precision_cholesky: Tensor | None,
    scale: Tensor | None,
    num_centers: int,
    expected: bool,
) -> tuple[Tensor, Tensor, float]:
    dim = latent_dim(precision_cholesky, scale)
    whitening = torch.empty(num_centers, dim, dim, dtype=log_weights.dtype)
    offsets = torch.empty(num_centers, dtype=log_weights.dtype)
    condition = _components_call(
        "whitened_components", log_weights, precision_cholesky, scale, whitening, expected, offsets
    )
    return whitening, offsets, condition


def stored_components(
    logits: Tensor, raw_precision: Tensor, scale: Tensor | None, num_centers: int
) -> tuple[Tensor, ...]:
    log_weights, L = logits.log_softmax(-1), reference.precision_cholesky(raw_precision)
    built = whitened_components(log_weights, L, scale, num_centers, expected=False)
    return *built[:2], log_weights, L


def whitened_components_backward(
    grad_whitening: Tensor,
    grad_offsets: Tensor,
    log_weights: Tensor,
    precision_cholesky: Tensor | None,
    scale: Tensor | None,
    whitening: Tensor,
    expected: bool,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    grads = [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if x is not None and want
        else None
        for x, want in zip((log_weights, precision_cholesky, scale), wanted, strict=True)
    ]
    upstream = (grad_whitening.contiguous(), grad_offsets.contiguous())
    _components_call(
        "whitened_components_backward",
        log_weights,
        precision_cholesky,
        scale,
        whitening,
        expected,
        *upstream,
        *grads,
    )
    return grads


log_joint = _matrix("log_joint")
responsibilities = _matrix("responsibilities")


def _count_call(
    name: str,
    counts: Tensor,
    row_starts: Tensor | None,
    gene_indices: Tensor | None,
    mean: Tensor,
    inverse_dispersion: Tensor | None,
    dropout_logits: Tensor | None,
    library_size: Tensor | None,
    *rest: Tensor | None,
) -> None:
    """Call an operation of the compiled core on counts; ``rest`` are its own tensors."""
    stored = (counts, row_starts, gene_indices)
    parameters = (mean, inverse_dispersion, dropout_logits, library_size)
    model = [x if x is None else x.contiguous() for x in (*stored, *parameters)]
    *first, logits, sizes = map(_address, model)
    getattr(_core, name + SUFFIXES[mean.dtype])(
        *mean.shape,
        *first,
        inverse_dispersion is not None and inverse_dispersion.ndim == 2,
        logits,
        sizes,
        torch.get_num_threads(),
        *map(_address, rest),
    )


def count_log_prob(
    counts: Tensor, row_starts: Tensor | None, gene_indices: Tensor | None, mean: Tensor, *rest: Any
) -> Tensor:
    log_prob = mean.new_empty(len(mean))
    _count_call("count_log_prob", counts, row_starts, gene_indices, mean, *rest, log_prob)
    return log_prob


def count_log_prob_backward(
    grad: Tensor,
    counts: Tensor,
    row_starts: Tensor | None,
    gene_indices: Tensor | None,
    mean: Tensor,
    inverse_dispersion: Tensor | None,
    dropout_logits: Tensor | None,
    library_size: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    parameters = (mean, inverse_dispersion, dropout_logits, library_size)
    grads = [
        None if x is None or not want else _empty_like(x)[0]
        for x, want in zip(parameters, wanted, strict=True)
    ]
    model = (counts, row_starts, gene_indices, *parameters)
    _count_call("count_log_prob_backward", *model, grad.contiguous(), *grads)
    return grads
