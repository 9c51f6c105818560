"""Log-likelihoods of cells' counts: checked, dispatched by device, differentiable, compilable.

With counts x [B, G], means mu, inverse dispersions theta and dropout logits l, a cell's
log-likelihood is the sum over genes of

    Poisson             x log mu - mu - log x!
    negative binomial   log Gamma(x + theta) / (Gamma(theta) x!) + theta log theta / (theta + mu)
                        + x log mu / (theta + mu)
    zero-inflated       log((1 - pi) NB(x) + pi [x = 0]),  pi = sigmoid(l)

Forward and backward are one pass over the counts each, with nothing of size [B, G] stored between
them; the backward gives the gradients of mu, theta and l together. A mean that is a library size
times a softmax, as of scVI's decoder, may come as :class:`SoftmaxMean`: on CPUs neither it nor its
gradient is ever stored then. Counts may be dense or sparse
(``torch.sparse_csr``); zeros and whole counts up to 8 cost no log-gamma. Means and inverse
dispersions below 1e-15 are taken as that and have no gradient there. Counts need not be whole; a
negative one, or a NaN anywhere, gives NaN.

CPUs run the compiled core, GPUs of NVIDIA and AMD the Triton kernels, where sparse counts are made
dense, and other devices plain torch; in float32 and float64, to which half precisions are
converted.

Lopez et al. (2018), Nature Methods 15, 1053; Grun et al. (2014), Nature Methods 11, 637.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmm_fast import backends

__all__ = ["SoftmaxMean", "nb_log_prob", "poisson_log_prob", "zinb_log_prob"]

_library = torch.library.Library("vmm_fast", "FRAGMENT")
# Sparse counts [B, G] come as values, row_starts [B + 1] and gene_indices; with a library_size [B]
# mean holds logits.
_MODEL = (
    "Tensor counts, Tensor? row_starts, Tensor? gene_indices, Tensor mean, "
    "Tensor? inverse_dispersion, Tensor? dropout_logits, Tensor? library_size"
)
_library.define(f"count_log_prob({_MODEL}) -> Tensor")
# Returns the gradients that are wanted, of the last four.
_library.define(f"count_log_prob_backward(Tensor grad, {_MODEL}, bool[4] wanted) -> Tensor[]")


def _count_log_prob(counts: Tensor, *rest: Any) -> Tensor:
    return backends.call("count_log_prob", counts, 1, counts, *rest)


def _count_log_prob_backward(grad: Tensor, *model_and_wanted: Any) -> list[Tensor]:
    found = backends.call("count_log_prob_backward", grad, 1, grad, *model_and_wanted)
    return [x for x in found if x is not None]


_library.impl("count_log_prob", _count_log_prob, "CompositeExplicitAutograd")
_library.impl("count_log_prob_backward", _count_log_prob_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("vmm_fast::count_log_prob", lib=_library)
def _(counts, row_starts, gene_indices, mean, *rest):
    return mean.new_empty(mean.shape[0])


@torch.library.register_fake("vmm_fast::count_log_prob_backward", lib=_library)
def _(grad, counts, row_starts, gene_indices, *parameters_and_wanted):
    *parameters, wanted = parameters_and_wanted
    return [x.new_empty(x.shape) for x, want in zip(parameters, wanted, strict=True) if want]


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    wanted = list(ctx.needs_input_grad[3:])
    found = iter(torch.ops.vmm_fast.count_log_prob_backward(grad, *ctx.saved_tensors, wanted))
    return None, None, None, *(next(found) if want else None for want in wanted)


def _refuse_double_backward(ctx, *grads):
    raise RuntimeError(
        "count_log_prob has no second derivative in compiled code; use "
        "vmm_fast.reference.count_log_prob, which has"
    )


torch.library.register_autograd(
    "vmm_fast::count_log_prob", _backward, setup_context=_save, lib=_library
)
torch.library.register_autograd(
    "vmm_fast::count_log_prob_backward", _refuse_double_backward, lib=_library
)


class SoftmaxMean(NamedTuple):
    """Means mu = n softmax(a) [B, G] of counts, in place of a tensor of them.

    Attributes
    ----------
    logits : Tensor [B, G]
        a, floating.
    library_size : Tensor [B]
        n >= 0, the sum of a cell's means; floating.
    """

    logits: Tensor
    library_size: Tensor


def poisson_log_prob(counts: Tensor, mean: Tensor | SoftmaxMean) -> Tensor:
    """Log-likelihood of cells' counts under Poisson distributions.

    Parameters
    ----------
    counts : Tensor [B, G]
        Dense or ``torch.sparse_csr``, of any dtype; no gradient.
    mean : Tensor [B, G] or SoftmaxMean
        mu > 0, floating.

    Returns
    -------
    Tensor [B]
        Summed over genes, in nats.

    Raises
    ------
    TypeError
        If an argument is no tensor, or has no floating dtype where it must.
    ValueError
        If shapes or devices do not fit, or sparse indices lie outside; the kernels for GPUs, which
        wait for nothing, do not look at these.
    """
    return _log_prob(counts, mean, {})


def nb_log_prob(counts: Tensor, mean: Tensor | SoftmaxMean, inverse_dispersion: Tensor) -> Tensor:
    """Log-likelihood of cells' counts under negative binomial distributions.

    Their variance is mu + mu^2 / theta.

    Parameters
    ----------
    counts, mean
        As of :func:`poisson_log_prob`.
    inverse_dispersion : Tensor [G] or [B, G]
        theta > 0, of genes or of genes in cells; floating.

    Returns
    -------
    Tensor [B]
        Summed over genes, in nats.

    Raises
    ------
    TypeError, ValueError
        As :func:`poisson_log_prob`.
    """
    return _log_prob(counts, mean, {"inverse_dispersion": inverse_dispersion})


def zinb_log_prob(
    counts: Tensor,
    mean: Tensor | SoftmaxMean,
    inverse_dispersion: Tensor,
    dropout_logits: Tensor,
) -> Tensor:
    """Log-likelihood of cells' counts under zero-inflated negative binomial distributions.

    Parameters
    ----------
    counts, mean, inverse_dispersion
        As of :func:`nb_log_prob`.
    dropout_logits : Tensor [B, G]
        l, the logits of the probability that a count is 0 whatever its mean; floating.

    Returns
    -------
    Tensor [B]
        Summed over genes, in nats.

    Raises
    ------
    TypeError, ValueError
        As :func:`poisson_log_prob`.
    """
    more = {"inverse_dispersion": inverse_dispersion, "dropout_logits": dropout_logits}
    return _log_prob(counts, mean, more)


def _log_prob(
    counts: Tensor, mean: Tensor | SoftmaxMean, more_parameters: dict[str, Tensor]
) -> Tensor:
    if isinstance(mean, SoftmaxMean):
        means = {"mean.logits": mean.logits, "mean.library_size": mean.library_size}
    else:
        means = {"mean": mean}
    parameters = means | more_parameters
    for name, value in {"counts": counts, **parameters}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, but is {type(value).__name__}")
    for name, value in parameters.items():
        if not value.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, but has {value.dtype}")
        if value.device != counts.device:
            raise ValueError(
                f"{name} must be on counts' device {counts.device}, but is on {value.device}"
            )
    if counts.ndim != 2:
        raise ValueError(f"counts must have shape [B, G], but has {list(counts.shape)}")
    fitting: dict[str, tuple[str, tuple[torch.Size, ...]]] = {
        "inverse_dispersion": ("[G] or [B, G]", (counts.shape[1:], counts.shape)),
        "mean.library_size": ("[B]", (counts.shape[:1],)),
    }
    for name, value in parameters.items():
        shapes, fit = fitting.get(name, ("[B, G]", (counts.shape,)))
        if value.shape not in fit:
            raise ValueError(
                f"{name} must have shape {shapes} with [B, G] = {list(counts.shape)} as of "
                f"counts, but has {list(value.shape)}"
            )
    double = any(value.dtype == torch.float64 for value in parameters.values())
    dtype = torch.float64 if double else torch.float32
    cast = {name: value.to(dtype) for name, value in parameters.items()}
    (first, *_), rest = means, ("inverse_dispersion", "dropout_logits", "mean.library_size")
    return torch.ops.vmm_fast.count_log_prob(
        *_stored(counts, dtype), cast[first], *map(cast.get, rest)
    )


def _stored(counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Values, and row_starts and gene_indices of sparse ones."""
    if counts.layout == torch.strided:
        return counts.to(dtype), None, None
    if counts.layout != torch.sparse_csr:
        raise ValueError(f"counts must be dense or torch.sparse_csr, but are {counts.layout}")
    row_starts, gene_indices = counts.crow_indices().long(), counts.col_indices().long()
    return counts.values().to(dtype), row_starts, gene_indices
