"""Log-likelihoods of cells' counts, forward and backward.

They serve :mod:`vmm_fast.counts`; formulas and sources are those of ``csrc/counts.h``. A program
processes GENES genes at a time, in one warp: forward a stretch of one cell's genes, backward
CELLS cells. The term of a zero is computed for every gene. The product for whole counts up to SMALL
has as many factors as the largest of them needs, and the float64 arithmetic for other counts is
skipped if there are none, which is often so within few genes.

The same input gives the same bits: a program adds in order, and torch adds the programs' sums along
the first dimension, in an order that depends on the sizes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmm_fast.kernels import launch
from vmm_fast.kernels.weight_priors import stirling, stirling_slope

GENES = 64
CELLS = 8  # cells of a backward program, which adds their inverse dispersions' gradients up
GENES_A_PROGRAM = 512  # genes of a forward program
SMALL = tl.constexpr(8)  # largest count whose probability is a product
LEAST = tl.constexpr(1e-15)  # smaller means and inverse dispersions are raised to this


# --- functions of a gene in a cell ---


@triton.jit
def log_one_plus(u):
    """Return log(1 + u) for u >= 0; the rounding of 1 + u is corrected to first order."""
    w = u + 1.0
    return tl.log(w) + (u - (w - 1.0)) / w


@triton.jit
def log_excess(u, log1p, share, DTYPE: tl.constexpr):
    """Return log(1 + u) - u / (1 + u) for u >= 0, given both terms; for small u by its series."""
    TERMS: tl.constexpr = 13 if tl.float64 == DTYPE else 6
    series = u * 0.0
    for k in tl.static_range(TERMS):
        series = (TERMS - k) / (TERMS + 1 - k) - u * series
    return tl.where(u < 0.0625, u * u * series, log1p - share)


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + e^-x)."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x > 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def kinds(x):
    """Return which counts are neither 0 nor small, whether any are, and the largest small one."""
    small = (x <= SMALL) & (x == tl.floor(x))
    other = (x != 0.0) & ~small
    greatest = tl.max(tl.where(small, x, 0.0), 0)
    return other, tl.max(other.to(tl.int32), 0) > 0, greatest.to(tl.int32)


@triton.jit
def log_product(x, mu, theta, greatest, MODEL: tl.constexpr, DTYPE: tl.constexpr):
    """Return the log of the product over k < x of (theta + k) q / (k + 1), for small counts x.

    q = mu / (theta + mu); for "poisson" the factors are mu / (k + 1).
    """
    result = tl.zeros_like(x)
    q = mu if MODEL == "poisson" else mu / (theta + mu)
    # The product of two factors is neither too large nor too small for one logarithm.
    for index in range(0, greatest, 2):
        k = tl.cast(index, DTYPE)
        one = q / (k + 1.0)
        two = q / (k + 2.0)
        if MODEL != "poisson":
            one *= theta + k
            two *= theta + k + 1.0
        result += tl.log(tl.where(x > k, one, 1.0) * tl.where(x > k + 1.0, two, 1.0))
    return result


@triton.jit
def other_log_prob(x, mu, theta, MODEL: tl.constexpr):
    """Return log p(x) without dropout for any x > 0, float64."""
    # Gamma(x + theta) / Gamma(theta) is computed as a ratio, which keeps its digits if theta is
    # much larger than x. Stirling's series is evaluated at arguments larger by SMALL; the factors
    # of that shift are multiplied in two halves, so that the products stay within range.
    w = x + (1.0 + SMALL)
    result = -((w - 0.5) * tl.log(w) - w + 0.9189385332046727 + stirling(w))
    shifts = tl.full(x.shape, 1.0, tl.float64)
    for half in tl.static_range(2):
        above = tl.full(x.shape, 1.0, tl.float64)
        below = tl.full(x.shape, 1.0, tl.float64)
        for i in tl.static_range(SMALL // 2):
            k = half * (SMALL // 2) + i
            above *= x + (k + 1.0)
            if MODEL != "poisson":
                above *= theta + k
                below *= theta + x + k
        shifts *= above / below
    result += tl.log(shifts)
    if MODEL == "poisson":
        return result + x * tl.log(mu) - mu
    else:
        s = theta + SMALL
        y = x + s
        result += x * tl.log(y * (mu / (theta + mu))) - x
        result += (s - 0.5) * log_one_plus(x / s) + stirling(y) - stirling(s)
        return result - theta * log_one_plus(mu / theta)


@triton.jit
def other_slope(x, mu, theta):
    """Return the derivative by theta of log p(x) without dropout for any x > 0, float64."""
    s = theta + SMALL
    y = x + s
    digammas = log_one_plus(x / s) + stirling_slope(y) - stirling_slope(s)
    for k in tl.static_range(0, SMALL, 2):
        # x / first = 1 / (theta + k) - 1 / (theta + x + k), and x / second with the next k
        first = (theta + k) * (theta + x + k)
        second = (theta + (k + 1)) * (theta + x + (k + 1))
        digammas += x * (first + second) / (first * second)
    u = mu / theta
    r = theta + mu
    return digammas - x / r - log_excess(u, log_one_plus(u), mu / r, tl.float64)


@triton.jit
def log_prob_of(x, mu, theta, l, MODEL: tl.constexpr, DTYPE: tl.constexpr):
    """Return log p(x) of any counts."""
    other, any_other, greatest = kinds(x)
    zero = -mu if MODEL == "poisson" else -theta * log_one_plus(mu / theta)
    result = zero + log_product(x, mu, theta, greatest, MODEL, DTYPE)
    if any_other:
        found = other_log_prob(x.to(tl.float64), mu.to(tl.float64), theta.to(tl.float64), MODEL)
        result = tl.where(other, found.to(DTYPE), result)
    if MODEL == "zinb":
        # log((1 + e^(zero - l)) / (1 + e^-l)), with the larger summands taken out as the maximum
        e = tl.exp(-tl.abs(zero - l))
        f = tl.exp(-tl.abs(l))
        inflated = tl.maximum(zero, tl.minimum(l, 0.0)) + tl.log((1.0 + e) / (1.0 + f))
        kept = -tl.maximum(l, 0.0) - log_one_plus(f)  # log(1 - pi)
        result = tl.where(x == 0.0, inflated, result + kept)
    return result


@triton.jit
def slopes_of(x, mu, theta, l, MODEL: tl.constexpr, BY_THETA: tl.constexpr, DTYPE: tl.constexpr):
    """Return the derivatives of log p(x) by mu, theta and l; 0 for one that is not wanted."""
    by_mu = (x - mu) / mu
    by_theta = tl.zeros_like(x)
    by_l = tl.zeros_like(x)
    if MODEL != "poisson":
        r = theta + mu
        by_mu *= theta / r
        u = mu / theta
        log1p = log_one_plus(u)
        if BY_THETA:
            other, any_other, greatest = kinds(x)
            by_theta = -x / r - log_excess(u, log1p, mu / r, DTYPE)
            for index in range(0, greatest, 2):
                k = tl.cast(index, DTYPE)
                first = theta + k
                second = first + 1.0
                both = x > k + 1.0
                digammas = tl.where(both, first + second, 1.0) / tl.where(
                    both, first * second, first
                )
                by_theta += tl.where(x > k, digammas, 0.0)
            if any_other:
                found = other_slope(x.to(tl.float64), mu.to(tl.float64), theta.to(tl.float64))
                by_theta = tl.where(other, found.to(DTYPE), by_theta)
    if MODEL == "zinb":
        not_dropped = sigmoid(-l)
        # The probability that a zero comes from the negative binomial.
        weight = tl.where(x == 0.0, sigmoid(-theta * log1p - l), 1.0)
        by_mu *= weight
        by_theta *= weight
        by_l = tl.where(x == 0.0, not_dropped - weight, -sigmoid(l))
        by_l = tl.where(x == x, by_l, x)
    return by_mu, by_theta, by_l


# --- kernels ---


@triton.jit
def load_genes(
    counts,
    mean,
    inverse_dispersion,
    dropout_logits,
    row,
    gene,
    genes,
    MODEL: tl.constexpr,
    PER_CELL: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return x, mu, theta and l of a cell's genes; beyond the last one, cheap dummy values.

    A negative count becomes NaN; means and inverse dispersions are not yet raised to LEAST.
    """
    inside = gene < genes
    at = tl.cast(row, tl.int64) * genes + gene
    x = tl.load(counts + at, mask=inside, other=0.0)
    x = tl.where(x < 0.0, float("nan"), x)
    mu = tl.load(mean + at, mask=inside, other=1.0)
    theta = tl.full(gene.shape, 1.0, DTYPE)
    l = tl.zeros(gene.shape, DTYPE)
    if MODEL != "poisson":
        where = at if PER_CELL else gene
        theta = tl.load(inverse_dispersion + where, mask=inside, other=1.0)
    if MODEL == "zinb":
        l = tl.load(dropout_logits + at, mask=inside, other=0.0)
    return x, mu, theta, l


@triton.jit
def at_least(x, DTYPE: tl.constexpr):
    """Return x, raised to LEAST if it is less; a NaN stays."""
    return tl.where(x < LEAST, tl.full([], LEAST, DTYPE), x)


@triton.jit(do_not_specialize=["cells", "genes", "genes_a_program"])
def count_log_prob_kernel(
    counts,  # [B, G]
    mean,  # [B, G]
    inverse_dispersion,  # [G], or [B, G] for PER_CELL; not read for "poisson"
    dropout_logits,  # [B, G], or not read but for "zinb"
    parts,  # [programs of a cell, B]
    cells,  # B
    genes,  # G
    genes_a_program,
    MODEL: tl.constexpr,
    PER_CELL: tl.constexpr,
    DTYPE: tl.constexpr,
    GENES: tl.constexpr,
):
    """Write the sum of log p(x) over a stretch of a cell's genes."""
    row = tl.program_id(0)
    stretch = tl.program_id(1)
    begin = stretch * genes_a_program
    total = tl.zeros([GENES], DTYPE)
    for first in range(begin, tl.minimum(begin + genes_a_program, genes), GENES):
        gene = first + tl.arange(0, GENES)
        x, mu, theta, l = load_genes(
            counts,
            mean,
            inverse_dispersion,
            dropout_logits,
            row,
            gene,
            genes,
            MODEL,
            PER_CELL,
            DTYPE,
        )
        found = log_prob_of(x, at_least(mu, DTYPE), at_least(theta, DTYPE), l, MODEL, DTYPE)
        total += tl.where(gene < genes, found, 0.0)
    tl.store(parts + tl.cast(stretch, tl.int64) * cells + row, tl.sum(total, 0))


@triton.jit(do_not_specialize=["cells", "genes"])
def count_log_prob_backward_kernel(
    counts,  # [B, G]
    mean,  # [B, G]
    inverse_dispersion,  # [G], or [B, G] for PER_CELL; not read for "poisson"
    dropout_logits,  # [B, G], or not read but for "zinb"
    grad,  # [B]
    grad_mean,  # [B, G], or not written but for BY_MEAN
    grad_dispersion,  # [chunks, G], or [B, G] for PER_CELL, or not written but for BY_DISPERSION
    grad_logits,  # [B, G], or not written but for BY_LOGITS
    cells,  # B
    genes,  # G
    MODEL: tl.constexpr,
    PER_CELL: tl.constexpr,
    BY_MEAN: tl.constexpr,
    BY_DISPERSION: tl.constexpr,
    BY_LOGITS: tl.constexpr,
    DTYPE: tl.constexpr,
    GENES: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Write the gradients that are wanted, for a chunk of cells."""
    chunk = tl.program_id(0)
    gene = tl.program_id(1) * GENES + tl.arange(0, GENES)
    inside = gene < genes
    total = tl.zeros([GENES], DTYPE)
    for row in range(chunk * CELLS, tl.minimum(chunk * CELLS + CELLS, cells)):
        x, mu, theta, l = load_genes(
            counts,
            mean,
            inverse_dispersion,
            dropout_logits,
            row,
            gene,
            genes,
            MODEL,
            PER_CELL,
            DTYPE,
        )
        by_mu, by_theta, by_l = slopes_of(
            x, at_least(mu, DTYPE), at_least(theta, DTYPE), l, MODEL, BY_DISPERSION, DTYPE
        )
        upstream = tl.load(grad + row)
        at = tl.cast(row, tl.int64) * genes + gene
        # A mean or inverse dispersion that was raised to LEAST has no gradient.
        if BY_MEAN:
            tl.store(grad_mean + at, tl.where(mu < LEAST, 0.0, upstream * by_mu), mask=inside)
        if BY_DISPERSION:
            found = tl.where(theta < LEAST, 0.0, upstream * by_theta)
            if PER_CELL:
                tl.store(grad_dispersion + at, found, mask=inside)
            else:
                total += found
        if BY_LOGITS:
            tl.store(grad_logits + at, upstream * by_l, mask=inside)
    if BY_DISPERSION and not PER_CELL:
        tl.store(grad_dispersion + tl.cast(chunk, tl.int64) * genes + gene, total, mask=inside)


# --- launches ---


def _constants(
    mean: Tensor, inverse_dispersion: Tensor | None, dropout_logits: Tensor | None
) -> dict[str, Any]:
    if inverse_dispersion is None:
        model = "poisson"
    else:
        model = "nb" if dropout_logits is None else "zinb"
    return {
        "MODEL": model,
        "PER_CELL": inverse_dispersion is not None and inverse_dispersion.ndim == 2,
        "DTYPE": tl.float64 if mean.dtype == torch.float64 else tl.float32,
        "GENES": GENES,
        **launch.options(1),
    }


def _added(parts: Tensor) -> Tensor:
    """Return the sum over the first dimension; a single part needs no launch."""
    return parts.view(parts.shape[1:]) if len(parts) == 1 else parts.sum(0)


def log_prob(
    counts: Tensor, mean: Tensor, inverse_dispersion: Tensor | None, dropout_logits: Tensor | None
) -> Tensor:
    """Return the log-likelihood [B]; tensors are contiguous and share dtype and device."""
    cells, genes = mean.shape
    parts = mean.new_empty(triton.cdiv(genes, GENES_A_PROGRAM), cells)
    if parts.numel():
        with launch.on(mean.device):
            count_log_prob_kernel[(cells, len(parts))](
                counts,
                mean,
                mean if inverse_dispersion is None else inverse_dispersion,
                mean if dropout_logits is None else dropout_logits,
                parts,
                cells,
                genes,
                GENES_A_PROGRAM,
                **_constants(mean, inverse_dispersion, dropout_logits),
            )
    return _added(parts)


def backward(
    grad: Tensor,
    counts: Tensor,
    mean: Tensor,
    inverse_dispersion: Tensor | None,
    dropout_logits: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients that are wanted, else None; tensors as in :func:`log_prob`."""
    cells, genes = mean.shape
    chunks = triton.cdiv(cells, CELLS)
    constants = _constants(mean, inverse_dispersion, dropout_logits)
    summed = wanted[1] and not constants["PER_CELL"]
    # Gradients that are not wanted are not written: any tensor will do for them.
    out = [torch.empty_like(mean) if want else mean for want in wanted]
    if summed:
        out[1] = mean.new_empty(chunks, genes)
    if mean.numel():
        with launch.on(mean.device):
            count_log_prob_backward_kernel[(chunks, triton.cdiv(genes, GENES))](
                counts,
                mean,
                mean if inverse_dispersion is None else inverse_dispersion,
                mean if dropout_logits is None else dropout_logits,
                grad,
                *out,
                cells,
                genes,
                BY_MEAN=wanted[0],
                BY_DISPERSION=wanted[1],
                BY_LOGITS=wanted[2],
                CELLS=CELLS,
                **constants,
            )
    if summed:
        out[1] = _added(out[1])
    return [x if want else None for x, want in zip(out, wanted, strict=True)]
