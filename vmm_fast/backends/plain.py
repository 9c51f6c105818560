"""The operations in plain torch, for any device: :mod:`vmm_fast.reference`, with values checked.

Of size [B, J], and each check waits for the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vmm_fast import reference


def check_values(z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor) -> None:
    """Check what the compiled core checks by itself.

    Raises
    ------
    ValueError
        If a value is not finite, or every offset is -inf.
    """
    for name, value in (("z", z), ("centers", centers), ("whitening", whitening.tril())):
        if not value.isfinite().all():
            raise ValueError(f"{name} must be finite, but has a NaN or infinite value")
    if not (offsets < torch.inf).all():
        raise ValueError("offsets must be finite or -inf, but has a NaN or infinite value")
    if not (offsets > -torch.inf).any():
        raise ValueError("offsets are all -inf, so that every component is pruned")


def check_near(found: Tensor) -> None:
    """Check for each z that some l is representable.

    Parameters
    ----------
    found : Tensor [B] or [B, C]
        Log-densities, of which none or all are -inf or NaN where all l overflow, or probabilities.

    Raises
    ------
    ValueError
        If one is too far away, as the compiled core says it.
    """
    near = found > -torch.inf
    near = near.any(-1) if near.ndim == 2 else near
    if not near.all():
        row = int((~near).nonzero()[0, 0])
        raise ValueError(
            "z must be near enough to a center for its log-density to be representable, but row "
            f"{row} is too far from all for its dtype"
        )


def _checked(function: Callable) -> Callable:
    def checked(z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, *rest: Any) -> Any:
        check_values(z, centers, whitening, offsets)
        found = function(z, centers, whitening, offsets, *rest)
        if function is reference.mixture_statistics:
            if not found[0].isfinite().all():
                check_near(reference.mixture_log_prob(z, centers, whitening, offsets, *rest)[0])
        else:
            check_near(found if isinstance(found, Tensor) else found[1])
        return found

    return checked


def log_prob(
    z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, transpose: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_values(z, centers, whitening, offsets)
    lse, expected = reference.mixture_log_prob(z, centers, whitening, offsets, transpose)
    check_near(lse)
    return lse, expected, torch.stack([lse, torch.zeros_like(lse), expected - lse])


def _gradients(
    function: Callable,
    inputs: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
    wanted: Sequence[bool] | None = None,
) -> list[Tensor | None]:
    """Return the gradients of a function's outputs by its inputs, None for what is not wanted.

    By :func:`torch.func.vjp`, which also records inside an operation of torch's dispatcher, as
    which compiled code calls this; :mod:`torch.autograd` records nothing there.
    """
    asked = [x is not None and (not wanted or wanted[i]) for i, x in enumerate(inputs)]

    def of_asked(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        return function(*(next(given) if ask else x for x, ask in zip(inputs, asked, strict=True)))

    variables = (x.detach() for x, ask in zip(inputs, asked, strict=True) if x is not None and ask)
    outputs, pull_back, *_ = torch.func.vjp(of_asked, *variables)
    given = (
        torch.zeros_like(y) if g is None else g.to(y.dtype)
        for y, g in zip(outputs, upstream, strict=True)
    )
    found = iter(pull_back(tuple(given)))
    return [next(found) if ask else None for ask in asked]


def log_prob_backward(
    grad_lse: Tensor | None,
    grad_expected: Tensor | None,
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    softmax: Tensor,
    transpose: bool,
) -> list[Tensor | None]:
    function = functools.partial(reference.mixture_log_prob, transpose=transpose)
    return _gradients(function, (z, centers, whitening, offsets), (grad_lse, grad_expected))


def kl_from_lse(lse: Tensor, scale: Tensor) -> Tensor:
    """-H(q) - lse [B] of Gaussians q with a scale [B, D] or [B, D, D]."""
    diagonal = scale if scale.ndim == 2 else scale.diagonal(dim1=-2, dim2=-1)
    constant = 0.5 * diagonal.shape[-1] * math.log(2 * math.pi * math.e)
    return -diagonal.log().sum(-1) - constant - lse


def _kl(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    scale: Tensor,
    transpose: bool,
) -> tuple[Tensor, ...]:
    lse, _ = reference.mixture_log_prob(z, centers, whitening, offsets, transpose)
    return (kl_from_lse(lse, scale),)


def kl(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    scale: Tensor,
    transpose: bool,
) -> tuple[Tensor, Tensor]:
    lse, _, softmax = log_prob(z, centers, whitening, offsets, transpose)
    value = kl_from_lse(lse, scale)
    if not value.isfinite().all():
        row = int((~value.isfinite()).nonzero()[0, 0])
        raise ValueError(f"q must be finite with a positive scale, but row {row} is not")
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
) -> list[Tensor | None]:
    function = functools.partial(_kl, transpose=transpose)
    return _gradients(function, (z, centers, whitening, offsets, scale), (grad_kl,))


statistics = _checked(reference.mixture_statistics)
log_joint = _checked(reference.mixture_log_joint)
responsibilities = _checked(reference.mixture_responsibilities)
assign = _checked(reference.mixture_assign)


def whitened_components(
    log_weights: Tensor,
    precision_cholesky: Tensor | None,
    scale: Tensor | None,
    num_centers: int,
    expected: bool,
) -> tuple[Tensor, Tensor, float]:
    pi, L, s = (None if x is None else x.double() for x in (log_weights, precision_cholesky, scale))
    assert pi is not None
    whitening, offsets = reference.whitened_components(pi, L, s, num_centers, expected)
    diagonal = whitening.diagonal(dim1=-2, dim2=-1)
    good = (diagonal > 0).all(-1)
    good &= whitening.isfinite().flatten(1).all(-1)
    if scale is not None:
        good &= (scale.tril() if scale.ndim == 3 else scale).isfinite().flatten(1).all(-1)
    if not good.all():
        component = int((~good).nonzero()[0, 0]) * len(log_weights) // num_centers
        raise ValueError(
            f"component {component} has no positive-definite covariance: precision_cholesky and "
            "the scale that the encoder gives its pseudo-input must be finite with a positive "
            "diagonal"
        )
    condition = float((whitening.norm(dim=(-2, -1)) / diagonal.amin(-1)).max())
    return whitening.to(log_weights.dtype), offsets.to(log_weights.dtype), condition


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
    inputs = [x if x is None else x.double() for x in (log_weights, precision_cholesky, scale)]
    function = functools.partial(
        reference.whitened_components, num_centers=len(whitening), expected=expected
    )
    found = _gradients(function, inputs, (grad_whitening, grad_offsets), wanted)
    return [x if x is None else x.to(whitening.dtype) for x in found]


def dense_counts(
    counts: Tensor,
    row_starts: Tensor | None,
    gene_indices: Tensor | None,
    mean: Tensor,
    checked: bool,
) -> Tensor:
    """Counts [B, G]; that sparse indices are ``checked`` waits for the device."""
    if row_starts is None or gene_indices is None:
        return counts
    sparse = torch.sparse_csr_tensor(
        row_starts, gene_indices, counts, mean.shape, check_invariants=checked
    )
    return sparse.to_dense()


def count_log_prob(
    counts: Tensor,
    row_starts: Tensor | None,
    gene_indices: Tensor | None,
    mean: Tensor,
    *rest: Tensor | None,
) -> Tensor:
    dense = dense_counts(counts, row_starts, gene_indices, mean, checked=True)
    return reference.count_log_prob(dense, mean, *rest)


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
    dense = dense_counts(counts, row_starts, gene_indices, mean, checked=True)

    def log_prob(mean: Tensor, *rest: Tensor | None) -> tuple[Tensor]:
        return (reference.count_log_prob(dense, mean, *rest),)

    parameters = (mean, inverse_dispersion, dropout_logits, library_size)
    return _gradients(log_prob, parameters, (grad,), wanted)
