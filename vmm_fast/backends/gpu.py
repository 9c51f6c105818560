"""The operations in the Triton kernels of :mod:`vmm_fast.kernels`, for GPUs of NVIDIA and AMD.

Nothing here waits for the device, so that values are not checked: a NaN gives NaN, as does a
component whose covariance is not positive definite.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from vmm_fast.backends import plain
from vmm_fast.kernels import closed_form, components, empirical_bayes, groups, launch, sums
from vmm_fast.kernels import counts as count_kernels
from vmm_fast.kernels import log_prob as log_prob_kernels

# What Triton raises where it cannot compile; a missing C compiler or driver is a RuntimeError.
COMPILER_ERRORS = (triton.TritonError, RuntimeError, OSError, subprocess.SubprocessError)

# Whether the kernels, as they were imported, run on a CPU.
INTERPRETED = triton.knobs.runtime.interpret


def largest_dim(name: str) -> int:
    """Most dimensions that an operation's kernels serve."""
    return components.LARGEST_TILE if name == "online_step" else launch.LARGEST_DIM


def log_prob(
    z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, transpose: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return log_prob_kernels.log_prob(*_dense(z, centers, whitening, offsets), transpose)


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
    if grad_lse is None:
        grad_lse = torch.zeros_like(z[:, 0])
    upstream = _dense(grad_lse, grad_expected)
    mixture = _dense(z, centers, whitening, offsets)
    return sums.backward(*mixture, softmax, *upstream, transpose)[:4]


def kl(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    scale: Tensor,
    transpose: bool,
) -> tuple[Tensor, Tensor]:
    *mixture, scale = _dense(z, centers, whitening, offsets, scale)
    value, _, softmax = log_prob_kernels.log_prob(*mixture, transpose, scale)
    return value, softmax


def kl_backward(
    grad_kl: Tensor,
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    scale: Tensor,
    softmax: Tensor,
    transpose: bool,
) -> tuple[Tensor | None, ...]:
    *mixture, scale, grad_kl = _dense(z, centers, whitening, offsets, scale, grad_kl)
    return sums.backward(*mixture, softmax, grad_kl, None, transpose, scale)


def statistics(
    z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, transpose: bool
) -> tuple[Tensor, ...]:
    mixture = _dense(z, centers, whitening, offsets)
    *_, softmax = log_prob_kernels.log_prob(*mixture, transpose)
    return sums.statistics(*mixture, softmax, transpose)


def log_joint(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    transpose: bool,
    per_component: int,
) -> Tensor:
    mixture = _dense(z, centers, whitening, offsets)
    return groups.matrix(*mixture, transpose, per_component, None)


def responsibilities(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    transpose: bool,
    per_component: int,
) -> Tensor:
    mixture = _dense(z, centers, whitening, offsets)
    *_, softmax = log_prob_kernels.log_prob(*mixture, transpose)
    return groups.matrix(*mixture, transpose, per_component, softmax)


def assign(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    transpose: bool,
    per_component: int,
) -> tuple[Tensor, Tensor, Tensor]:
    mixture = _dense(z, centers, whitening, offsets)
    return groups.assign(*mixture, transpose, per_component)


def whitened_components(
    log_weights: Tensor,
    precision_cholesky: Tensor | None,
    scale: Tensor | None,
    num_centers: int,
    expected: bool,
) -> tuple[Tensor, Tensor, None]:
    inputs = _dense(log_weights, precision_cholesky, scale)
    return *components.whitened_components(*inputs, num_centers, expected), None


def stored_components(
    logits: Tensor, raw_precision: Tensor, scale: Tensor | None, num_centers: int
) -> tuple[Tensor, ...]:
    return components.stored_components(*_dense(logits, raw_precision, scale), num_centers)


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
    upstream = _dense(grad_whitening, grad_offsets)
    inputs = _dense(log_weights, precision_cholesky, scale, whitening)
    return components.whitened_components_backward(*upstream, *inputs, expected, wanted)


def count_log_prob(
    counts: Tensor,
    row_starts: Tensor | None,
    gene_indices: Tensor | None,
    mean: Tensor,
    inverse_dispersion: Tensor | None,
    dropout_logits: Tensor | None,
    library_size: Tensor | None,
) -> Tensor:
    dense = plain.dense_counts(counts, row_starts, gene_indices, mean, checked=False)
    if library_size is not None:
        mean = library_size[:, None] * mean.softmax(-1)
    return count_kernels.log_prob(*_dense(dense, mean, inverse_dispersion, dropout_logits))


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
    dense = plain.dense_counts(counts, row_starts, gene_indices, mean, checked=False)
    if library_size is None:
        model = _dense(grad, dense, mean, inverse_dispersion, dropout_logits)
        return [*count_kernels.backward(*model, wanted[:3]), None]
    shares = mean.softmax(-1)
    mean = library_size[:, None] * shares
    model = _dense(grad, dense, mean, inverse_dispersion, dropout_logits)
    of_mean, *rest = count_kernels.backward(*model, [wanted[0] or wanted[3], *wanted[1:3]])
    if of_mean is None:
        return [None, *rest, None]
    of_library_size = (shares * of_mean).sum(-1)
    of_logits = mean * (of_mean - of_library_size[:, None]) if wanted[0] else None
    return [of_logits, *rest, of_library_size if wanted[3] else None]


map_gradients = empirical_bayes.map_gradients
online_step = closed_form.online_step


def _dense(*tensors):
    return tuple(x if x is None else x.contiguous() for x in tensors)
