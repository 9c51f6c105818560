"""Functions that the kernels share: tiles of points, components, the log-joint, online softmax.

Points lie in rows of a tile [BLOCK_B, P], filled up with zeros; P is the dimension D rounded up to
a power of two of at least 16, the least of matrix instructions. A component's matrix W [P, P]
multiplies from the right, y = d W, so that both forms of :func:`vmm_fast.ops.mixture_log_prob` are
one. Points and mixture come as one tuple, :class:`Pairs`. More than Q = 32 columns are processed in
blocks, since larger tiles would not stay in registers; blocks of W that are zero are left out. All
arithmetic is in DTYPE, to which values are cast when they are loaded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

BLOCK = 256  # components per iteration of a loop over all of them


class Pairs(NamedTuple):
    """Points and a whitened mixture, with the constants of kernels that compute on their pairs."""

    z: Any  # [B, D]
    centers: Any  # [J, D]
    whitening: Any  # [J, D, D]
    offsets: Any  # [J]
    D: Any  # constants from here on
    BLOCK_B: Any
    TRANSPOSE: Any
    DTYPE: Any
    PRECISION: Any


@triton.constexpr_function
def padded(D):
    """Return P, the dimension rounded up to a power of two of at least 16."""
    return max(16, triton.next_power_of_2(D))


@triton.constexpr_function
def chunk(D):
    """Return Q, the number of columns of a block: P, but at most 32."""
    return min(padded(D), 32)


@triton.constexpr_function
def lowest(DTYPE):
    """Return the lower bound of l, which stands for -inf: differences and sums stay finite."""
    return -1e290 if tl.float64 == DTYPE else -1e30


@triton.jit
def load_points(
    pointer, rows, count, first, D: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr
):
    """Return COLUMNS columns from ``first`` on of rows of [count, D], zeros outside it."""
    columns = first + tl.arange(0, COLUMNS)[None, :]
    mask = (rows[:, None] < count) & (columns < D)
    addresses = pointer + rows[:, None].to(tl.int64) * D + columns
    return tl.load(addresses, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def load_center(centers, j, first, D: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """Return COLUMNS elements of the center m_j from ``first`` on."""
    columns = first + tl.arange(0, COLUMNS)
    addresses = centers + tl.cast(j, tl.int64) * D + columns
    return tl.load(addresses, mask=columns < D, other=0.0).to(DTYPE)


@triton.jit
def load_whitening(pairs, j, row, column, ROWS: tl.constexpr):
    """Return the block [ROWS, Q] of W at ``row``, ``column``; W = A_j if TRANSPOSE, else A_j^T."""
    D: tl.constexpr = pairs.D
    row = row + tl.arange(0, ROWS)[:, None]
    column = column + tl.arange(0, chunk(D))[None, :]
    if not pairs.TRANSPOSE:
        row, column = column, row
    mask = (row < D) & (column <= row)
    addresses = pairs.whitening + tl.cast(j, tl.int64) * (D * D) + row * D + column
    return tl.load(addresses, mask=mask, other=0.0).to(pairs.DTYPE)


@triton.constexpr_function
def in_units(DTYPE):
    """Return whether sums of squares are scaled by :func:`load_unit`, as needed in float32."""
    return tl.float32 == DTYPE


@triton.jit
def load_unit(pairs, j):
    """Return a power of two that scales float32 differences d to ordinary magnitudes.

    It is that of the largest element of A_j's diagonal. If this is far from 1, squares of d would
    overflow or vanish.
    """
    D: tl.constexpr = pairs.D
    rows = tl.arange(0, padded(D))
    addresses = pairs.whitening + tl.cast(j, tl.int64) * (D * D) + rows * (D + 1)
    diagonal = tl.load(addresses, mask=rows < D, other=0.0).to(pairs.DTYPE)
    largest = tl.max(tl.abs(diagonal), 0)
    unit = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(pairs.DTYPE, bitcast=True)
    return tl.where((unit > 0.0) & (unit < float("inf")), unit, 1.0)


@triton.jit
def whiten(pairs, points, rows, count, j, column):
    """Return Q columns of y = (z - m_j) W from ``column`` on; ``points`` are z's first Q."""
    D: tl.constexpr = pairs.D
    DTYPE: tl.constexpr = pairs.DTYPE
    Q: tl.constexpr = chunk(D)
    if D <= Q:
        d = points - load_center(pairs.centers, j, 0, D, Q, DTYPE)[None, :]
        w = load_whitening(pairs, j, 0, 0, Q)
        y = tl.dot(d, w, input_precision=pairs.PRECISION, out_dtype=DTYPE)
    else:
        y = tl.zeros([pairs.BLOCK_B, Q], DTYPE)
        begin = column if pairs.TRANSPOSE else column * 0
        end = column * 0 + D if pairs.TRANSPOSE else column + Q
        for row in range(begin, end, Q):
            d = load_points(pairs.z, rows, count, row, D, Q, DTYPE)
            d -= load_center(pairs.centers, j, row, D, Q, DTYPE)[None, :]
            w = load_whitening(pairs, j, row, column, Q)
            y += tl.dot(d, w, input_precision=pairs.PRECISION, out_dtype=DTYPE)
    return y


@triton.jit
def log_joint(pairs, points, rows, count, j):
    """Return l [BLOCK_B] of component j, at least :func:`lowest`; a NaN stays."""
    squares = tl.zeros([pairs.BLOCK_B], pairs.DTYPE)
    for column in range(0, pairs.D, chunk(pairs.D)):
        y = whiten(pairs, points, rows, count, j, column)
        squares += tl.sum(y * y, 1)
    l = tl.load(pairs.offsets + j).to(pairs.DTYPE) - 0.5 * squares
    return tl.maximum(l, lowest(pairs.DTYPE), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def kahan(total, excess, x):
    """Return total + x and its excess over the exact sum (Kahan 1965)."""
    y = x - excess
    new = total + y
    return new, (new - total) - y


@triton.jit
def empty_softmax(BLOCK_B: tl.constexpr, DTYPE: tl.constexpr):
    """Return the online softmax before the first l: max, sum and weighted sum, with excesses."""
    zero = tl.zeros([BLOCK_B], DTYPE)
    return tl.full([BLOCK_B], lowest(DTYPE), DTYPE), zero, zero, zero, zero


@triton.jit
def add_online(softmax, l):
    """Return the online softmax with one more l.

    It holds max, the sum of exp(l - max) and that of exp(l - max) (l - max). (Milakov & Gimelshein
    2018, arXiv 1805.02867.) The entropy, the difference of log-sum-exp and expectation, follows
    from these without cancellation.
    """
    top, total, total_excess, weighted, weighted_excess = softmax
    new = tl.maximum(top, l, propagate_nan=tl.PropagateNan.ALL)
    gap = top - new
    scale = tl.exp(gap)
    weighted, weighted_excess = kahan(weighted, weighted_excess, total * gap)
    total, total_excess = kahan(total * scale, total_excess * scale, tl.exp(l - new))
    weighted, weighted_excess = kahan(
        weighted * scale, weighted_excess * scale, tl.exp(l - new) * (l - new)
    )
    return new, total, total_excess, weighted, weighted_excess


@triton.jit
def store_partial(partial, split, rows, count, softmax):
    """Write one split's online softmax to [splits, 3, B]."""
    top, total, _, weighted, _ = softmax
    mask = rows < count
    out = partial + split.to(tl.int64) * 3 * count + rows
    tl.store(out, top, mask=mask)
    tl.store(out + count, total, mask=mask)
    tl.store(out + 2 * count, weighted, mask=mask)


@triton.jit
def load_softmax(softmax, rows, count):
    """Return max, log-sum and gap of the points from ``log_prob``'s softmax [3, B]."""
    mask = rows < count
    top = tl.load(softmax + rows, mask=mask, other=0.0)
    log_sum = tl.load(softmax + count + rows, mask=mask, other=0.0)
    return top, log_sum, tl.load(softmax + 2 * count + rows, mask=mask, other=0.0)


@triton.jit
def merge_softmax(partial, rows, count, splits, MOST_SPLITS: tl.constexpr, DTYPE: tl.constexpr):
    """Return the online softmax (max, sum, weighted sum) merged from splits [splits, 3, B]."""
    split = tl.arange(0, MOST_SPLITS)[:, None]
    mask = (split < splits) & (rows < count)[None, :]
    part = partial + split.to(tl.int64) * 3 * count + rows[None, :]
    tops = tl.load(part, mask=mask, other=lowest(DTYPE))
    totals = tl.load(part + count, mask=mask, other=0.0)
    weighteds = tl.load(part + 2 * count, mask=mask, other=0.0)
    top = tl.max(tops, 0)
    gap = tops - top[None, :]
    factor = tl.exp(gap)
    # The maximum may drop a NaN, but the sums keep it.
    return top, tl.sum(totals * factor, 0), tl.sum((weighteds + totals * gap) * factor, 0)


@triton.jit
def pair_weights(l, softmax, rows, count, upstream, WEIGHTS: tl.constexpr, DTYPE: tl.constexpr):
    """Return w = q (g + h (1 + l - expected)), q = exp(l - lse), and 0 beyond the last point.

    ``WEIGHTS`` says what the upstream gradients are: "lse" for g = 1 and h = 0, "expected" for
    g = 0 and h = 1, "kl" for g = -``grad_lse`` and h = 0, "given lse" for h = 0, or "given both".
    """
    grad_lse, grad_expected = upstream
    mask = rows < count
    top, log_sum, gap = softmax
    below = l - top
    weight = tl.exp(below - log_sum)
    if WEIGHTS == "expected":
        weight *= 1.0 + below - gap
    elif WEIGHTS == "kl":
        weight *= -tl.load(grad_lse + rows, mask=mask, other=0.0).to(DTYPE)
    elif WEIGHTS != "lse":
        factor = tl.load(grad_lse + rows, mask=mask, other=0.0).to(DTYPE)
        if WEIGHTS == "given both":
            slope = 1.0 + below - gap
            factor += tl.load(grad_expected + rows, mask=mask, other=0.0).to(DTYPE) * slope
        weight *= factor
    # An l at the lower bound stands for -inf, even if all others are as low.
    return tl.where(mask & ((l > lowest(DTYPE)) | (l != l)), weight, 0.0)


# --- components, float64 ---


@triton.jit
def softplus(x):
    """Return log(1 + e^x), and x above 20; log(u) / (u - 1) cancels the rounding of u = 1 + e^x."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    rounded = u - 1.0
    small = rounded == 0.0
    value = tl.where(small, e, tl.log(u) * e / tl.where(small, 1.0, rounded))
    return tl.where(x > 20.0, x, value)


@triton.jit
def log_normaliser(logits, count, BLOCK: tl.constexpr):
    """Return the log of the sum of the exponentials of [count] logits, float64."""
    index = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float64)
    for begin in range(0, count, BLOCK):
        x = tl.load(logits + begin + index, mask=begin + index < count, other=float("-inf"))
        top = tl.maximum(top, x.to(tl.float64))
    largest = tl.max(top, 0)
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, count, BLOCK):
        x = tl.load(logits + begin + index, mask=begin + index < count, other=float("-inf"))
        total += tl.exp(x.to(tl.float64) - largest)
    return largest + tl.log(tl.sum(total, 0))


@triton.jit
def log_pivot(x):
    """Return log(x) of a diagonal element of A; NaN if A is singular or not finite."""
    return tl.where((x > 0.0) & (x < float("inf")), tl.log(x), x * float("nan"))
