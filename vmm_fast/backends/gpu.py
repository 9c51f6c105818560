"""The operations in the Triton kernels of :mod:`vmm_fast.kernels`, for GPUs of NVIDIA and AMD.

Functions take dense tensors and constants in the order of :mod:`vmm_fast.operations`, and return
results and extras. Nothing here waits for the device, so values are not checked: a NaN gives NaN,
as does a component whose covariance is not positive definite.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from vmm_fast.backends import plain
from vmm_fast.kernels import components, empirical_bayes, groups, sums
from vmm_fast.kernels import counts as count_kernels
from vmm_fast.kernels import log_prob as log_prob_kernels
from vmm_fast.kernels.launch import LARGEST_DIM as LARGEST_DIM

# Errors of a failed compilation; a missing C compiler or driver is a RuntimeError.
COMPILER_ERRORS = (triton.TritonError, RuntimeError, OSError, subprocess.SubprocessError)

# Whether the kernels were imported in interpreter mode, and so run on a CPU.
INTERPRETED = triton.knobs.runtime.interpret

Results = Sequence[Tensor]
Gradients = Sequence[Tensor | None]  # None for those that are not wanted


def mixture_log_prob(*mixture_and_transpose: Any) -> Results:
    found: Results = log_prob_kernels.log_prob(*mixture_and_transpose)
    return found


def mixture_log_prob_backward(
    grad_lse: Tensor | None,
    grad_expected: Tensor | None,
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    softmax: Tensor,
    transpose: bool,
    wanted: Sequence[bool],
) -> Gradients:
    if grad_lse is None:
        grad_lse = torch.zeros_like(z[:, 0])
    mixture = (z, centers, whitening, offsets)
    found: Gradients = sums.backward(*mixture, softmax, grad_lse, grad_expected, transpose)
    return found[:4]


def mixture_kl(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    scale: Tensor,
    transpose: bool,
) -> Results:
    value, _, softmax = log_prob_kernels.log_prob(z, centers, whitening, offsets, transpose, scale)
    return value, softmax


def mixture_kl_backward(
    grad_kl: Tensor,
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    scale: Tensor,
    softmax: Tensor,
    transpose: bool,
    wanted: Sequence[bool],
) -> Gradients:
    mixture = (z, centers, whitening, offsets)
    found: Gradients = sums.backward(*mixture, softmax, grad_kl, None, transpose, scale)
    return found


def mixture_statistics(*mixture_and_transpose: Any) -> Results:
    *mixture, transpose = mixture_and_transpose
    *_, softmax = log_prob_kernels.log_prob(*mixture, transpose)
    found: Results = sums.statistics(*mixture, softmax, transpose)
    return found


def mixture_log_joint(*mixture_and_constants: Any) -> Results:
    return (groups.matrix(*mixture_and_constants, None),)


def mixture_responsibilities(*mixture_and_constants: Any) -> Results:
    *_, softmax = log_prob_kernels.log_prob(*mixture_and_constants[:-1])
    return (groups.matrix(*mixture_and_constants, softmax),)


mixture_assign = groups.assign
whitened_components = components.whitened_components
stored_components = components.stored_components


def whitened_components_backward(*arguments: Any) -> Gradients:
    *tensors, _, expected, wanted = arguments
    found: Gradients = components.whitened_components_backward(*tensors, expected, wanted)
    return found


def stored_components_backward(
    grad_whitening: Tensor,
    grad_offsets: Tensor,
    logits: Tensor,
    raw_precision: Tensor,
    scale: Tensor | None,
    whitening: Tensor,
    log_weights: Tensor,
    precision_cholesky: Tensor,
    num_centers: int,
    wanted: Sequence[bool],
) -> Gradients:
    built = (log_weights, precision_cholesky, scale, whitening)
    found: Gradients = components.whitened_components_backward(
        grad_whitening, grad_offsets, *built, False, (False, False, *wanted)
    )
    return found[2:]


def count_log_prob(
    counts: Tensor,
    row_starts: Tensor | None,
    gene_indices: Tensor | None,
    mean: Tensor,
    inverse_dispersion: Tensor | None,
    dropout_logits: Tensor | None,
    library_size: Tensor | None,
) -> Results:
    dense = plain.dense_counts(counts, row_starts, gene_indices, mean, checked=False)
    if library_size is not None:
        mean = library_size[:, None] * mean.softmax(-1)
    return (count_kernels.log_prob(dense, mean, inverse_dispersion, dropout_logits),)


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
) -> Gradients:
    dense = plain.dense_counts(counts, row_starts, gene_indices, mean, checked=False)
    more = (inverse_dispersion, dropout_logits)
    if library_size is None:
        return [*count_kernels.backward(grad, dense, mean, *more, wanted[:3]), None]
    shares = mean.softmax(-1)
    mean = library_size[:, None] * shares
    of_mean, *rest = count_kernels.backward(
        grad, dense, mean, *more, [wanted[0] or wanted[3], *wanted[1:3]]
    )
    if of_mean is None:
        return [None, *rest, None]
    of_library_size = (shares * of_mean).sum(-1)
    of_logits = mean * (of_mean - of_library_size[:, None]) if wanted[0] else None
    return [of_logits, *rest, of_library_size if wanted[3] else None]


map_gradients = empirical_bayes.map_gradients
