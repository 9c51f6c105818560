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

from typing import NamedTuple

import torch
from torch import Tensor

from vmm_fast.dispatch import check, run
from vmm_fast.operations import COUNT_LOG_PROB

__all__ = ["SoftmaxMean", "nb_log_prob", "poisson_log_prob", "zinb_log_prob"]


class SoftmaxMean(NamedTuple):
    """Means mu = n softmax(a) [B, G] of counts, given by logits and library sizes.

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
        If shapes or devices do not fit, or sparse indices lie outside the shape; the GPU kernels,
        which do not wait for the device, do not check the indices.

    Examples
    --------
    >>> counts, mean = torch.tensor([[0.0, 3.0]]), torch.tensor([[0.5, 2.0]])
    >>> poisson_log_prob(counts, mean)
    tensor([-2.2123])
    >>> poisson_log_prob(counts, SoftmaxMean(mean.log(), library_size=mean.sum(1)))
    tensor([-2.2123])
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

    Examples
    --------
    >>> counts, mean = torch.tensor([[0.0, 3.0]]), torch.tensor([[0.5, 2.0]])
    >>> nb_log_prob(counts, mean, inverse_dispersion=torch.tensor([1.0, 10.0]))
    tensor([-2.2103])
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

    Examples
    --------
    >>> counts, mean = torch.tensor([[0.0, 3.0]]), torch.tensor([[0.5, 2.0]])
    >>> zinb_log_prob(counts, mean, torch.ones(2), dropout_logits=torch.zeros(1, 2))
    tensor([-3.1905])
    """
    more = {"inverse_dispersion": inverse_dispersion, "dropout_logits": dropout_logits}
    return _log_prob(counts, mean, more)


def _log_prob(
    counts: Tensor, mean: Tensor | SoftmaxMean, more_parameters: dict[str, Tensor]
) -> Tensor:
    if not isinstance(counts, Tensor):
        raise TypeError(f"counts must be a torch.Tensor, but is {type(counts).__name__}")
    if counts.is_complex():
        raise TypeError(f"counts must be real, but is {counts.dtype}")
    if counts.ndim != 2:
        raise ValueError(f"counts must have shape [B, G], but has {list(counts.shape)}")
    names, library_size = {}, None
    if isinstance(mean, SoftmaxMean):
        names = {"mean": "mean.logits", "library_size": "mean.library_size"}
        mean, library_size = mean
        more_parameters = {"mean.library_size": library_size, **more_parameters}
    for name, x in more_parameters.items():  # those of another likelihood are None below
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, but is {type(x).__name__}")
    more = (more_parameters.get(name) for name in ("inverse_dispersion", "dropout_logits"))
    parameters = (mean, *more, library_size)
    double = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in parameters)
    cells, genes = counts.shape
    stored = _stored(counts, torch.float64 if double else torch.float32)
    given = (*stored, *parameters)
    inputs = check(COUNT_LOG_PROB, given, names, B=cells, G=genes)
    log_prob: Tensor = run(COUNT_LOG_PROB, inputs)[0]
    return log_prob


def _stored(counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the stored values of counts and, if they are sparse, row starts and gene indices."""
    if counts.layout == torch.strided:
        return counts.to(dtype), None, None
    if counts.layout != torch.sparse_csr:
        raise ValueError(f"counts must be dense or torch.sparse_csr, but are {counts.layout}")
    row_starts, gene_indices = counts.crow_indices().long(), counts.col_indices().long()
    return counts.values().to(dtype), row_starts, gene_indices
