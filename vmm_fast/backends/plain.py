"""The operations in plain torch, for any device: :mod:`vmm_fast.reference`, with values checked.

Memory is of size [B, J], and each check waits for the device. The operations can be differentiated
any number of times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vmm_fast import reference
from vmm_fast.operations import Operation

__all__ = ["call", "check_log_weights", "check_near", "check_values", "dense_counts"]


# --- values ---


def check_values(z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor) -> None:
    """Raise ValueError for values of a mixture or points that cannot be used.

    The compiled core has the same checks and texts of its own.

    Raises
    ------
    ValueError
        If a value is not finite, or every offset is -inf.
    """
    check_log_weights("offsets", offsets)
    for name, x in (("centers", centers), ("whitening", whitening.tril().flatten(1)), ("z", z)):
        _refuse_rows(f"{name} must be finite", ~x.isfinite())


def check_log_weights(name: str, values: Tensor) -> None:
    """Raise ValueError unless logarithms of weights are finite, or -inf but not all.

    The compiled core has the same texts.
    """
    _refuse_rows(f"{name} must be finite or -inf", ~(values < torch.inf)[:, None])
    if not (values > -torch.inf).any():
        raise ValueError(f"{name} must be finite for at least one component, but are all -inf")


def _refuse_rows(due: str, bad: Tensor) -> None:
    """Raise ValueError if a row has a bad value, naming the first such row."""
    if bad.any():
        row = int(bad.any(-1).nonzero()[0, 0])
        raise ValueError(f"{due}, but row {row} has a NaN or infinite value")


def check_near(found: Tensor) -> None:
    """Raise ValueError if a point is so far from all centers that its log-density overflows.

    Parameters
    ----------
    found : Tensor [B] or [B, C]
        Log-densities or probabilities of the points; -inf or NaN if all l overflow.

    Raises
    ------
    ValueError
        If a point is too far away; the message is that of the compiled core.
    """
    near = found > -torch.inf
    near = near.any(-1) if near.ndim == 2 else near
    if not near.all():
        row = int((~near).nonzero()[0, 0])
        raise ValueError(
            "z must be near enough to a center for its log-density to be representable, but row "
            f"{row} is too far from all for its dtype"
        )


def _check_mixture(operation: Operation, inputs: Sequence[Any], found: Sequence[Tensor]) -> None:
    """Raise ValueError if an operation on a mixture has results that are not finite."""
    if operation.name == "mixture_statistics":
        if not found[0].isfinite().all():
            check_near(reference.mixture_log_prob(*inputs)[0])
    elif operation.name == "mixture_assign":
        check_near(found[1])
    elif operation.name == "mixture_kl":
        check_near(found[1][0])
        if not found[0].isfinite().all():
            row = int((~found[0].isfinite()).nonzero()[0, 0])
            raise ValueError(f"q must be finite with a positive scale, but row {row} is not")
    else:
        check_near(found[0])


def _check_components(log_weights: Tensor, scale: Tensor | None, whitening: Tensor) -> float:
    """Return the largest |A_j| / min_r A_jrr, a lower bound of the condition number.

    Raises
    ------
    ValueError
        If a component has no positive-definite covariance.
    """
    diagonal = whitening.diagonal(dim1=-2, dim2=-1)
    good = (diagonal > 0).all(-1)
    good &= whitening.isfinite().flatten(1).all(-1)
    if scale is not None:
        good &= (scale.tril() if scale.ndim == 3 else scale).isfinite().flatten(1).all(-1)
    if not good.all():
        component = int((~good).nonzero()[0, 0]) * len(log_weights) // len(whitening)
        raise ValueError(
            f"component {component} has no positive-definite covariance: precision_cholesky and "
            "the scale that the encoder gives its pseudo-input must be finite with a positive "
            "diagonal"
        )
    return float((whitening.norm(dim=(-2, -1)) / diagonal.amin(-1)).max())


# --- the definitions, with the extras that backends return ---


def _log_prob(
    z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, transpose: bool
) -> tuple[Tensor, ...]:
    lse, expected = reference.mixture_log_prob(z, centers, whitening, offsets, transpose)
    return lse, expected, torch.stack([lse, torch.zeros_like(lse), expected - lse])


def _kl(
    z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, scale: Tensor, transpose: bool
) -> tuple[Tensor, ...]:
    lse, _, softmax = _log_prob(z, centers, whitening, offsets, transpose)
    return reference.kl_from_lse(lse, scale), softmax


def _whitened_components(
    log_weights: Tensor,
    precision_cholesky: Tensor | None,
    scale: Tensor | None,
    num_centers: int,
    expected: bool,
) -> tuple[Tensor, ...]:
    """Return the whitened components, computed in float64."""
    L, s = (None if x is None else x.double() for x in (precision_cholesky, scale))
    built = reference.whitened_components(log_weights.double(), L, s, num_centers, expected)
    return tuple(x.to(log_weights.dtype) for x in built)


def _stored_components(
    logits: Tensor, raw_precision: Tensor, scale: Tensor | None, num_centers: int
) -> tuple[Tensor, ...]:
    log_weights, L = logits.log_softmax(-1), reference.precision_cholesky(raw_precision)
    return *_whitened_components(log_weights, L, scale, num_centers, False), log_weights, L


def dense_counts(
    counts: Tensor,
    row_starts: Tensor | None,
    gene_indices: Tensor | None,
    mean: Tensor,
    checked: bool,
) -> Tensor:
    """Return dense counts [B, G]; a gene listed several times in a cell has the sum of its counts.

    With ``checked`` sparse indices are checked, which waits for the device.
    """
    if row_starts is None or gene_indices is None:
        return counts
    if checked:
        in_order = row_starts[0] == 0 and row_starts[-1] == len(gene_indices)
        in_order = in_order and (row_starts[:-1] <= row_starts[1:]).all()
        if not in_order or not ((gene_indices >= 0) & (gene_indices < mean.shape[1])).all():
            raise ValueError("counts' sparse indices must lie in its shape, row after row")
    # torch's own check also refuses genes that are listed several times.
    sparse = torch.sparse_csr_tensor(
        row_starts, gene_indices, counts, mean.shape, check_invariants=False
    )
    return sparse.to_dense()


def _count_log_prob(
    counts: Tensor,
    row_starts: Tensor | None,
    gene_indices: Tensor | None,
    mean: Tensor,
    *rest: Tensor | None,
) -> tuple[Tensor, ...]:
    checked = not torch.compiler.is_compiling()
    dense = dense_counts(counts, row_starts, gene_indices, mean, checked)
    return (reference.count_log_prob(dense, mean, *rest),)


_DEFINITIONS: dict[str, Callable[..., Any]] = {
    "mixture_log_prob": _log_prob,
    "mixture_kl": _kl,
    "whitened_components": _whitened_components,
    "stored_components": _stored_components,
    "count_log_prob": _count_log_prob,
}


def _define(operation: Operation, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    compute = _DEFINITIONS.get(operation.name) or getattr(reference, operation.name)
    found = compute(*inputs)
    return found if isinstance(found, tuple) else (found,)


def call(
    operation: Operation, inputs: Sequence[Any]
) -> tuple[Sequence[Tensor | None], float | None]:
    """Return an operation's results and extras, and the number that the core returns, if any.

    Raises
    ------
    ValueError
        For the same bad values as in the compiled core, but not under ``torch.compile``.
    """
    if operation.forward:
        return _gradients(operation, operation.forward, inputs), None
    look = not torch.compiler.is_compiling()
    if look and "whitening" in operation.tensors:
        check_values(*inputs[:4])
    elif look and "whitening" in operation.results:
        check_log_weights(next(iter(operation.tensors)), inputs[0])
    found = _define(operation, inputs)
    number = None
    if look and "whitening" in operation.tensors:
        _check_mixture(operation, inputs, found)
    elif look and "whitening" in operation.results:
        with torch.no_grad():
            number = _check_components(inputs[0], inputs[2], found[0])
    return found, number


def _gradients(
    backward: Operation, operation: Operation, inputs: Sequence[Any]
) -> list[Tensor | None]:
    """Return the gradients that are wanted, None for the others and for missing arguments.

    Compiled code calls this inside an operation of torch's dispatcher, where
    :mod:`torch.autograd` records nothing, but :func:`torch.func.vjp` does.
    """
    upstream, wanted = inputs[: backward.lead], inputs[-1]
    tensors = list(inputs[backward.lead : backward.lead + len(operation.tensors)])
    constants = inputs[len(backward.tensors) : -1]
    asked = [
        i
        for i, want in zip(operation.differentiable_positions, wanted, strict=True)
        if want and tensors[i] is not None
    ]

    def results(*variables: Tensor) -> tuple[Tensor, ...]:
        for i, x in zip(asked, variables, strict=True):
            tensors[i] = x
        found = _define(operation, (*tensors, *constants))
        return tuple(found[i] for i in operation.gradient_positions)

    outputs, pull_back, *_ = torch.func.vjp(results, *(tensors[i].detach() for i in asked))
    given = (
        torch.zeros_like(y) if g is None else g.to(y.dtype)
        for y, g in zip(outputs, upstream, strict=True)
    )
    found = dict(zip(asked, pull_back(tuple(given)), strict=True))
    return [found.get(i) for i in operation.differentiable_positions]
