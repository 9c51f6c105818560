"""Log-joint, responsibilities and labels for groups of neighbouring components.

A group's log-joint is l_g = log sum_{j in g} exp l_j. A program processes a tile of BLOCK_B points
for one split of the groups; if there are several splits, a second launch merges the labels. The
same input gives the same bits: one program computes each output, in order, and the merge adds
splits up in one fixed tree.
"""

from __future__ import annotations

import torch
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
    store_partial,
)


@triton.jit
def group_log_joint(pairs, points, rows, count, g, per_group):
    """Return l_g [BLOCK_B] as (max, sum of exp(l - max))."""
    top = tl.full([pairs.BLOCK_B], lowest(pairs.DTYPE), pairs.DTYPE)
    total = tl.zeros([pairs.BLOCK_B], pairs.DTYPE)
    for k in range(per_group):
        l = log_joint(pairs, points, rows, count, g * per_group + k)
        new = tl.maximum(top, l, propagate_nan=tl.PropagateNan.ALL)
        total = total * tl.exp(top - new) + tl.exp(l - new)
        top = new
    return top, total


@triton.jit(do_not_specialize=["count", "groups", "groups_a_split", "per_group"])
def matrix_kernel(
    pairs,
    softmax,  # [3, B], or not read
    out,  # [B, groups]
    count,  # B
    groups,
    groups_a_split,
    per_group,
    NORMALISED: tl.constexpr,
):
    """Write l_g, or if NORMALISED the responsibilities exp(l_g - lse)."""
    D: tl.constexpr = pairs.D
    DTYPE: tl.constexpr = pairs.DTYPE
    rows = tl.program_id(0) * pairs.BLOCK_B + tl.arange(0, pairs.BLOCK_B)
    mask = rows < count
    points = load_points(pairs.z, rows, count, 0, D, chunk(D), DTYPE)
    begin = tl.program_id(1) * groups_a_split
    for g in range(begin, tl.minimum(begin + groups_a_split, groups)):
        top, total = group_log_joint(pairs, points, rows, count, g, per_group)
        if NORMALISED:
            below = top - tl.load(softmax + rows, mask=mask, other=0.0)
            value = tl.exp(below - tl.load(softmax + count + rows, mask=mask, other=0.0)) * total
            value = tl.where(top <= lowest(DTYPE), 0.0, value)
        else:
            value = tl.where(top <= lowest(DTYPE), float("-inf"), top + tl.log(total))
        tl.store(out + rows.to(tl.int64) * groups + g, value, mask=mask)


@triton.jit
def store_assignment(outputs, rows, count, label, total, weighted):
    """Write label, probability and entropy, from an online softmax over the groups."""
    label_out, probability_out, entropy_out = outputs
    mask = rows < count
    tl.store(label_out + rows, label, mask=mask)
    tl.store(probability_out + rows, 1.0 / total, mask=mask)
    # If one group has all the probability, rounding may give a tiny negative entropy.
    entropy = tl.maximum(tl.log(total) - weighted / total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(entropy_out + rows, entropy, mask=mask)


@triton.jit(do_not_specialize=["count", "groups", "groups_a_split", "per_group"])
def assign_kernel(
    pairs,
    outputs,  # label [B] (int64), probability [B], entropy [B]
    labels,  # [splits, B], int64
    partial,  # [splits, 3, B]
    count,  # B
    groups,
    groups_a_split,
    per_group,
    SPLIT: tl.constexpr,
):
    """Write the first of the most probable groups, its probability, and the entropy over all.

    If SPLIT, write the first of one split's most probable groups, and the split's online softmax to
    ``partial``.
    """
    D: tl.constexpr = pairs.D
    DTYPE: tl.constexpr = pairs.DTYPE
    rows = tl.program_id(0) * pairs.BLOCK_B + tl.arange(0, pairs.BLOCK_B)
    split = tl.program_id(1)
    points = load_points(pairs.z, rows, count, 0, D, chunk(D), DTYPE)
    softmax = empty_softmax(pairs.BLOCK_B, DTYPE)
    begin = split * groups_a_split
    label = tl.zeros([pairs.BLOCK_B], tl.int64) + begin
    for g in range(begin, tl.minimum(begin + groups_a_split, groups)):
        top, total = group_log_joint(pairs, points, rows, count, g, per_group)
        l = tl.where(top <= lowest(DTYPE), lowest(DTYPE), top + tl.log(total))
        label = tl.where(l > softmax[0], tl.cast(g, tl.int64), label)
        softmax = add_online(softmax, l)
    if SPLIT:
        tl.store(labels + split.to(tl.int64) * count + rows, label, mask=rows < count)
        store_partial(partial, split, rows, count, softmax)
    else:
        store_assignment(outputs, rows, count, label, softmax[1], softmax[3])


@triton.jit(do_not_specialize=["count", "splits"])
def assign_merge_kernel(
    partial,  # [splits, 3, B]
    labels,  # [splits, B], int64
    outputs,  # label [B] (int64), probability [B], entropy [B]
    count,  # B
    splits,
    BLOCK_B: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Merge the splits of BLOCK_B points and write label, probability and entropy."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    top, total, weighted = merge_softmax(partial, rows, count, splits, MOST_SPLITS, DTYPE)
    split = tl.arange(0, MOST_SPLITS)[:, None]
    mask = (split < splits) & (rows < count)[None, :]
    tops = tl.load(partial + split.to(tl.int64) * 3 * count + rows[None, :], mask=mask, other=0.0)
    first = tl.min(tl.where(mask & (tops == top[None, :]), split, MOST_SPLITS), 0)
    # If all are NaN, no split has the maximum.
    first = tl.where(first < splits, first, 0)
    label = tl.load(labels + first.to(tl.int64) * count + rows, mask=rows < count)
    store_assignment(outputs, rows, count, label, total, weighted)


def matrix(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    transpose: bool,
    per_group: int,
    softmax: Tensor | None,
) -> Tensor:
    """Return l_g [B, J / per_group], or responsibilities if ``log_prob``'s softmax is given.

    Tensors are contiguous and share dtype and device.
    """
    groups = len(centers) // per_group
    out = z.new_empty(len(z), groups)
    if len(z) == 0:
        return out
    block, warps = launch.tile(z.dtype, z.shape[1], launch.capability(z.device))
    tiles = triton.cdiv(len(z), block)
    splits, each = launch.splits(tiles, groups)
    with launch.on(z.device):
        matrix_kernel[(tiles, splits)](
            launch.pairs((z, centers, whitening, offsets), transpose, block),
            z if softmax is None else softmax,
            out,
            len(z),
            groups,
            each,
            per_group,
            NORMALISED=softmax is not None,
            **launch.options(warps),
        )
    return out


def assign(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    transpose: bool,
    per_group: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return label [B] (int64), its probability [B] and the entropy [B] over all groups."""
    count, groups = len(z), len(centers) // per_group
    label = z.new_empty(count, dtype=torch.int64)
    outputs = (label, z.new_empty(count), z.new_empty(count))
    if count == 0:
        return outputs
    block, warps = launch.tile(z.dtype, z.shape[1], launch.capability(z.device))
    pairs = launch.pairs((z, centers, whitening, offsets), transpose, block)
    tiles = triton.cdiv(count, block)
    splits, each = launch.splits(tiles, groups)
    # With one split the kernel does not access these.
    labels = label if splits == 1 else label.new_empty(splits, count)
    partial = z if splits == 1 else z.new_empty(splits, 3, count)
    with launch.on(z.device):
        assign_kernel[(tiles, splits)](
            pairs,
            outputs,
            labels,
            partial,
            count,
            groups,
            each,
            per_group,
            SPLIT=splits > 1,
            **launch.options(warps),
        )
        if splits > 1:
            assign_merge_kernel[(tiles,)](
                partial,
                labels,
                outputs,
                count,
                splits,
                BLOCK_B=block,
                MOST_SPLITS=launch.MOST_SPLITS,
                DTYPE=pairs.DTYPE.value,
                **launch.options(4),
            )
    return outputs
