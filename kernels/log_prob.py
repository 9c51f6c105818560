"""Log-sum-exp over the components and expected log-joint, or the KL estimate.

These are :func:`vmm_fast.ops.mixture_log_prob` and :func:`vmm_fast.ops.mixture_kl`. By an online
log-sum-exp (Milakov & Gimelshein 2018) nothing of size [B, J] is stored. A program processes
BLOCK_B points for one split of the components; if there are several splits, a second launch merges
them.

The same input gives the same bits: every program adds its components in order, the number of splits
follows from the sizes alone, and the merge adds them up in one fixed tree.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vmm_fast.kernels import launch
from vmm_fast.kernels.blocks import (
    add_online,
    chunk,
    empty_softmax,
    load_points,
    log_joint,
    lowest,
    merge_softmax,
    padded,
    store_partial,
)


@triton.jit
def store_log_prob(
    outputs,
    scale,
    rows,
    count,
    merged,
    D: tl.constexpr,
    DTYPE: tl.constexpr,
    POSTERIOR: tl.constexpr,
):
    """Write the results of an online softmax, and max, log-sum and gap to softmax [3, B].

    ``first`` receives lse and ``second`` the expectation or, with a ``POSTERIOR`` scale that is
    "diagonal" [B, D] or "full" [B, D, D], ``first`` the KL estimate -H(q) - lse.
    """
    first, second, softmax = outputs
    top, total, weighted = merged
    mask = rows < count
    log_sum = tl.log(total)
    gap = weighted / total
    tl.store(softmax + rows, top, mask=mask)
    tl.store(softmax + count + rows, log_sum, mask=mask)
    tl.store(softmax + 2 * count + rows, gap, mask=mask)
    # Only the sum shows a NaN.
    none = (top <= lowest(DTYPE)) & (total == total)
    lse = tl.where(none, float("-inf"), top + log_sum)
    if POSTERIOR == "none":
        tl.store(first + rows, lse, mask=mask)
        tl.store(second + rows, top + gap, mask=mask)
    else:
        columns = tl.arange(0, padded(D))[None, :]
        addresses = scale + rows[:, None].to(tl.int64) * D
        if POSTERIOR == "full":
            addresses = scale + rows[:, None].to(tl.int64) * (D * D) + columns * D
        inside = mask[:, None] & (columns < D)
        s = tl.load(addresses + columns, mask=inside, other=1.0).to(DTYPE)
        # D/2 log 2 pi e
        constant = tl.full([1], 1.4189385332046727, DTYPE) * D
        tl.store(first + rows, -tl.sum(tl.log(s), 1) - constant - lse, mask=mask)


@triton.jit(do_not_specialize=["count", "components", "components_a_split"])
def log_prob_kernel(
    pairs,
    scale,  # [B, D], [B, D, D], or not read
    outputs,  # lse or KL [B], expectation [B], softmax [3, B]
    partial,  # [splits, 3, B]
    count,  # B
    components,  # J
    components_a_split,
    POSTERIOR: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Write the final results or, for ``SPLIT``, one split's online softmax to ``partial``."""
    D: tl.constexpr = pairs.D
    DTYPE: tl.constexpr = pairs.DTYPE
    rows = tl.program_id(0) * pairs.BLOCK_B + tl.arange(0, pairs.BLOCK_B)
    split = tl.program_id(1)
    points = load_points(pairs.z, rows, count, 0, D, chunk(D), DTYPE)
    softmax = empty_softmax(pairs.BLOCK_B, DTYPE)
    begin = split * components_a_split
    for j in range(begin, tl.minimum(begin + components_a_split, components)):
        softmax = add_online(softmax, log_joint(pairs, points, rows, count, j))
    if SPLIT:
        store_partial(partial, split, rows, count, softmax)
    else:
        top, total, _, weighted, _ = softmax
        store_log_prob(outputs, scale, rows, count, (top, total, weighted), D, DTYPE, POSTERIOR)


@triton.jit(do_not_specialize=["count", "splits"])
def log_prob_merge_kernel(
    partial,  # [splits, 3, B]
    scale,  # [B, D], [B, D, D], or not read
    outputs,  # lse or KL [B], expectation [B], softmax [3, B]
    count,  # B
    splits,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,
    POSTERIOR: tl.constexpr,
):
    """Merge the splits of BLOCK_B points and write the final results."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    merged = merge_softmax(partial, rows, count, splits, MOST_SPLITS, DTYPE)
    store_log_prob(outputs, scale, rows, count, merged, D, DTYPE, POSTERIOR)


def log_prob(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    transpose: bool,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return lse [B] (the KL estimate if ``scale`` is given), expectation [B], softmax [3, B].

    Tensors are contiguous and share dtype and device.
    """
    count, components = len(z), len(centers)
    first, second, softmax = z.new_empty(count), z.new_empty(count), z.new_empty(3, count)
    if count == 0:
        return first, second, softmax
    block, warps = launch.tile(z.dtype, z.shape[1], launch.capability(z.device))
    pairs = launch.pairs((z, centers, whitening, offsets), transpose, block)
    posterior = "none" if scale is None else "diagonal" if scale.ndim == 2 else "full"
    tiles = triton.cdiv(count, block)
    splits, each = launch.splits(tiles, components)
    partial = softmax if splits == 1 else softmax.new_empty(splits, 3, count)
    outputs = (first, second, softmax)
    scale = z if scale is None else scale
    with launch.on(z.device):
        log_prob_kernel[(tiles, splits)](
            pairs,
            scale,
            outputs,
            partial,
            count,
            components,
            each,
            POSTERIOR=posterior,
            SPLIT=splits > 1,
            **launch.options(warps),
        )
        if splits > 1:
            log_prob_merge_kernel[(tiles,)](
                partial,
                scale,
                outputs,
                count,
                splits,
                D=z.shape[1],
                BLOCK_B=block,
                MOST_SPLITS=launch.MOST_SPLITS,
                DTYPE=pairs.DTYPE.value,
                POSTERIOR=posterior,
                **launch.options(4),
            )
    return outputs
