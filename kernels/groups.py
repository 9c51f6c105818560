"""What is asked for by name, per group of neighbouring components: l, responsibilities, labels.

A group's l_g = log sum_{j in g} exp l_j. Points lie in tiles of BLOCK_B; a program takes a tile
through one split of the groups, labels through all. The same input gives the same bits: every
output is the work of one program, in order.
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
    load_points,
    log_joint,
    lowest,
)


@triton.jit
def group_log_joint(
    points,
    z,
    rows,
    count,
    centers,
    whitening,
    offsets,
    g,
    per_group,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """l_g [BLOCK_B] as (max, sum of exp(l - max))."""
    top = tl.full([BLOCK_B], lowest(DTYPE), DTYPE)
    total = tl.zeros([BLOCK_B], DTYPE)
    for k in range(per_group):
        j = g * per_group + k
        l = log_joint(
            points,
            z,
            rows,
            count,
            centers,
            whitening,
            offsets,
            j,
            D,
            BLOCK_B,
            TRANSPOSE,
            DTYPE,
            PRECISION,
        )
        new = tl.maximum(top, l, propagate_nan=tl.PropagateNan.ALL)
        total = total * tl.exp(top - new) + tl.exp(l - new)
        top = new
    return top, total


@triton.jit(do_not_specialize=["count", "groups", "groups_a_split", "per_group"])
def matrix_kernel(
    z,  # [B, D]
    centers,  # [J, D]
    whitening,  # [J, D, D]
    offsets,  # [J]
    softmax,  # [3, B], or not read
    out,  # [B, groups]
    count,  # B
    groups,
    groups_a_split,
    per_group,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    NORMALISED: tl.constexpr,
):
    """l_g, or for ``NORMALISED`` exp(l_g - lse)."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = rows < count
    points = load_points(z, rows, count, 0, D, chunk(D), DTYPE)
    begin = tl.program_id(1) * groups_a_split
    for g in range(begin, tl.minimum(begin + groups_a_split, groups)):
        top, total = group_log_joint(
            points,
            z,
            rows,
            count,
            centers,
            whitening,
            offsets,
            g,
            per_group,
            D,
            BLOCK_B,
            TRANSPOSE,
            DTYPE,
            PRECISION,
        )
        if NORMALISED:
            below = top - tl.load(softmax + rows, mask=mask, other=0.0)
            value = tl.exp(below - tl.load(softmax + count + rows, mask=mask, other=0.0)) * total
            value = tl.where(top <= lowest(DTYPE), 0.0, value)
        else:
            value = tl.where(top <= lowest(DTYPE), float("-inf"), top + tl.log(total))
        tl.store(out + rows.to(tl.int64) * groups + g, value, mask=mask)


@triton.jit(do_not_specialize=["count", "groups", "per_group"])
def assign_kernel(
    z,  # [B, D]
    centers,  # [J, D]
    whitening,  # [J, D, D]
    offsets,  # [J]
    label_out,  # [B], int64
    probability_out,  # [B]
    entropy_out,  # [B]
    count,  # B
    groups,
    per_group,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The first of the most probable groups, its probability, and the entropy of all in nats."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = rows < count
    points = load_points(z, rows, count, 0, D, chunk(D), DTYPE)
    label = tl.zeros([BLOCK_B], tl.int64)
    top = tl.full([BLOCK_B], lowest(DTYPE), DTYPE)
    total = tl.zeros([BLOCK_B], DTYPE)
    total_excess = tl.zeros([BLOCK_B], DTYPE)
    weighted = tl.zeros([BLOCK_B], DTYPE)
    weighted_excess = tl.zeros([BLOCK_B], DTYPE)
    for g in range(groups):
        top_g, total_g = group_log_joint(
            points,
            z,
            rows,
            count,
            centers,
            whitening,
            offsets,
            g,
            per_group,
            D,
            BLOCK_B,
            TRANSPOSE,
            DTYPE,
            PRECISION,
        )
        l = tl.where(top_g <= lowest(DTYPE), lowest(DTYPE), top_g + tl.log(total_g))
        label = tl.where(l > top, tl.cast(g, tl.int64), label)
        top, total, total_excess, weighted, weighted_excess = add_online(
            top, total, total_excess, weighted, weighted_excess, l
        )
    tl.store(label_out + rows, label, mask=mask)
    tl.store(probability_out + rows, 1.0 / total, mask=mask)
    # Rounding may leave a tiny negative number where one group has all the probability.
    entropy = tl.maximum(tl.log(total) - weighted / total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(entropy_out + rows, entropy, mask=mask)


def matrix(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    transpose: bool,
    per_group: int,
    softmax: Tensor | None,
) -> Tensor:
    """l_g [B, J / per_group], or responsibilities where the softmax of ``log_prob`` is given.

    Tensors are contiguous and share dtype and device.
    """
    groups = len(centers) // per_group
    out = z.new_empty(len(z), groups)
    if len(z) == 0:
        return out
    constants = launch.constants(z, transpose)
    tiles = triton.cdiv(len(z), constants["BLOCK_B"])
    splits, each = launch.splits(tiles, groups)
    with launch.on(z.device):
        matrix_kernel[(tiles, splits)](
            z,
            centers,
            whitening,
            offsets,
            z if softmax is None else softmax,
            out,
            len(z),
            groups,
            each,
            per_group,
            NORMALISED=softmax is not None,
            **constants,
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
    """Label [B] (int64), its probability [B] and the entropy [B] of all groups."""
    count = len(z)
    label = z.new_empty(count, dtype=torch.int64)
    probability, entropy = z.new_empty(count), z.new_empty(count)
    if count:
        constants = launch.constants(z, transpose)
        with launch.on(z.device):
            assign_kernel[(triton.cdiv(count, constants["BLOCK_B"]),)](
                z,
                centers,
                whitening,
                offsets,
                label,
                probability,
                entropy,
                count,
                len(centers) // per_group,
                per_group,
                **constants,
            )
    return label, probability, entropy
