"""Weighted sums over the points, and the gradient of z: backward passes and M-step statistics.

With weights w_ij (:func:`vmm_fast.kernels.blocks.pair_weights`), d = z_i - m_j and y = d W

    N_j = sum_i w_ij,   s_j = sum_i w_ij d,   M_j = sum_i w_ij d^T d,   g_i = -sum_j w_ij y W^T

of which N, W W^T s and -M W are the gradients by offset, center and W, and g that by z. For -M W
float32 differences d are scaled by :func:`vmm_fast.kernels.blocks.load_unit`. l is recomputed. One
launch computes both: its first programs compute g, each for BLOCK_B points and one split of the
components; the others compute the sums, each for one component and one split of the points. If
there are several splits, a second launch adds them up.

The same input gives the same bits: every program adds in order, the numbers of splits follow from
the sizes alone, the second launch adds splits in order, and nothing is added atomically.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmm_fast.kernels import launch
from vmm_fast.kernels.blocks import (
    Pairs,
    chunk,
    in_units,
    kahan,
    load_center,
    load_points,
    load_softmax,
    load_unit,
    load_whitening,
    log_joint,
    merge_softmax,
    padded,
    pair_weights,
    whiten,
)


@triton.jit
def store_points(pointer, tile, rows, count, first, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Write a tile to COLUMNS columns from ``first`` on of rows of [count, D]."""
    columns = first + tl.arange(0, COLUMNS)[None, :]
    mask = (rows[:, None] < count) & (columns < D)
    tl.store(pointer + rows[:, None].to(tl.int64) * D + columns, tile, mask=mask)


@triton.jit
def store_sums(out, pairs, sums, j, first, slot, GRADIENTS: tl.constexpr):
    """Write N, s and Q columns of M, or if GRADIENTS the gradients by offset, m and A.

    GRADIENTS needs D <= Q. M is then scaled by the unit, if units are used.
    """
    N_out, s_out, M_out = out
    N, s, M = sums
    D: tl.constexpr = pairs.D
    DTYPE: tl.constexpr = pairs.DTYPE
    P: tl.constexpr = padded(D)
    Q: tl.constexpr = chunk(D)
    every = tl.arange(0, P)
    row = every[:, None]
    column = (first + tl.arange(0, Q))[None, :]
    mask = (row < D) & (column < D)
    origin = tl.cast(slot, tl.int64) * D
    if GRADIENTS:
        w = load_whitening(pairs, j, 0, 0, P)
        whitened = tl.sum(w * s[:, None], 0)  # s W
        s = tl.sum(w * whitened[None, :], 1)
        if in_units(DTYPE):
            unit = 1.0 / load_unit(pairs, j)
            w, M = w * unit, M * unit
        M = -tl.dot(M, w, input_precision=pairs.PRECISION, out_dtype=DTYPE)
        if not pairs.TRANSPOSE:
            row, column = column, row
        M = tl.where(column <= row, M, 0.0)
    tl.store(M_out + origin * D + row * D + column, M, mask=mask)
    if first == 0:
        tl.store(N_out + slot, N)
        tl.store(s_out + origin + every, s, mask=every < D)


@triton.jit
def add_sums(
    pairs,
    softmax,
    upstream,
    out,
    j,
    first,
    slot,
    begin,
    end,
    count,
    splits,
    WEIGHTS: tl.constexpr,
    GRADIENTS: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    IN_UNITS: tl.constexpr,
):
    """Write component j's sums over the points from ``begin`` to ``end``, at ``slot``.

    Of M it writes Q columns from ``first`` on, scaled by the unit if IN_UNITS or GRADIENTS. If
    MOST_SPLITS is above 1, the softmax must still be merged from its ``splits``.
    """
    D: tl.constexpr = pairs.D
    DTYPE: tl.constexpr = pairs.DTYPE
    P: tl.constexpr = padded(D)
    Q: tl.constexpr = chunk(D)
    center = load_center(pairs.centers, j, 0, D, P, DTYPE)
    if IN_UNITS:
        unit = load_unit(pairs, j)
    N = tl.zeros([pairs.BLOCK_B], DTYPE)
    N_excess = tl.zeros([pairs.BLOCK_B], DTYPE)
    s = tl.zeros([P], DTYPE)
    s_excess = tl.zeros([P], DTYPE)
    M = tl.zeros([P, Q], DTYPE)
    for start in range(begin, end, pairs.BLOCK_B):
        rows = start + tl.arange(0, pairs.BLOCK_B)
        points = load_points(pairs.z, rows, count, 0, D, Q, DTYPE)
        l = log_joint(pairs, points, rows, count, j)
        if MOST_SPLITS > 1:
            top, total, weighted_sum = merge_softmax(
                softmax, rows, count, splits, MOST_SPLITS, DTYPE
            )
            found = (top, tl.log(total), weighted_sum / total)
        else:
            found = load_softmax(softmax, rows, count)
        weight = pair_weights(l, found, rows, count, upstream, WEIGHTS, DTYPE)
        N, N_excess = kahan(N, N_excess, weight)
        # d may be infinite if a point is far away: a weight of 0 must still give 0.
        present = weight[:, None] != 0.0
        if Q < P:
            points = load_points(pairs.z, rows, count, 0, D, P, DTYPE)
        d = tl.where(present, points - center[None, :], 0.0)
        weighted = weight[:, None] * d
        s, s_excess = kahan(s, s_excess, tl.sum(weighted, 0))
        if Q < P:
            some = load_center(pairs.centers, j, first, D, Q, DTYPE)
            d = load_points(pairs.z, rows, count, first, D, Q, DTYPE) - some[None, :]
            d = tl.where(present, d, 0.0)
        if IN_UNITS:
            weighted, d = weighted * unit, d * unit
        M += tl.dot(tl.trans(weighted), d, input_precision=pairs.PRECISION, out_dtype=DTYPE)
    store_sums(out, pairs, (tl.sum(N, 0), s, M), j, first, slot, GRADIENTS)


@triton.jit
def store_scale_gradient(
    scale,
    grad_kl,
    out,
    rows,
    count,
    D: tl.constexpr,
    DTYPE: tl.constexpr,
    POSTERIOR: tl.constexpr,
):
    """Write the KL's gradient by the scale, that of -H(q): -grad_kl / s on the diagonal, else 0."""
    P: tl.constexpr = padded(D)
    columns = tl.arange(0, P)[None, :]
    mask = (rows[:, None] < count) & (columns < D)
    upstream = tl.load(grad_kl + rows, mask=rows < count, other=0.0).to(DTYPE)[:, None]
    if POSTERIOR == "diagonal":
        s = tl.load(scale + rows[:, None].to(tl.int64) * D + columns, mask=mask, other=1.0)
        store_points(out, -upstream / s.to(DTYPE), rows, count, 0, D, P)
    else:
        matrix = rows[:, None].to(tl.int64) * (D * D)
        for r in range(D):
            s = tl.load(scale + matrix + r * D + columns, mask=mask & (columns == r), other=1.0)
            value = tl.where(columns == r, -upstream / s.to(DTYPE), 0.0)
            tl.store(out + matrix + r * D + columns, value, mask=mask)


@triton.jit
def add_gradient(
    pairs, softmax, upstream, out, rows, first, begin, end, count, WEIGHTS: tl.constexpr
):
    """Write Q columns of z's gradient, summed over the components from ``begin`` to ``end``."""
    D: tl.constexpr = pairs.D
    DTYPE: tl.constexpr = pairs.DTYPE
    Q: tl.constexpr = chunk(D)
    points = load_points(pairs.z, rows, count, 0, D, Q, DTYPE)
    found = load_softmax(softmax, rows, count)
    gradient = tl.zeros([pairs.BLOCK_B, Q], DTYPE)
    for j in range(begin, end):
        l = log_joint(pairs, points, rows, count, j)
        weight = pair_weights(l, found, rows, count, upstream, WEIGHTS, DTYPE)
        # W is triangular: no other columns of y reach these columns of the gradient.
        left = first * 0 if pairs.TRANSPOSE else first
        right = first + Q if pairs.TRANSPOSE else first * 0 + D
        for column in range(left, right, Q):
            y = whiten(pairs, points, rows, count, j, column)
            # y may be infinite if a component is far away: a weight of 0 must still give 0.
            y = tl.where(weight[:, None] != 0.0, weight[:, None] * y, 0.0)
            w = load_whitening(pairs, j, first, column, Q)
            gradient -= tl.dot(y, tl.trans(w), input_precision=pairs.PRECISION, out_dtype=DTYPE)
    store_points(out, gradient, rows, count, first, D, Q)


@triton.jit(
    do_not_specialize=[
        "count",
        "components",
        "tiles",
        "gradient_programs",
        "components_a_split",
        "points_a_split",
    ]
)
def backward_kernel(
    pairs,
    scale,  # [B, D], [B, D, D], or not read
    softmax,  # [3, B]
    upstream,  # gradients of lse [B], or of the KL, and of the expectation [B]
    grad_z,  # [splits of the components, B, D]
    grad_scale,  # as scale
    sums,  # N [splits of the points, J], s and M
    count,  # B
    components,  # J
    tiles,
    gradient_programs,
    components_a_split,
    points_a_split,
    WEIGHTS: tl.constexpr,
    POSTERIOR: tl.constexpr,
    SUMS_ALONE: tl.constexpr,
):
    """Write all gradients of one split; if SUMS_ALONE, N, s and M in place of the mixture's."""
    D: tl.constexpr = pairs.D
    DTYPE: tl.constexpr = pairs.DTYPE
    columns: tl.constexpr = (D + chunk(D) - 1) // chunk(D)
    program = tl.program_id(0)
    if program < gradient_programs:
        first = program % columns * chunk(D)
        tile = program // columns % tiles
        split = program // columns // tiles
        rows = tile * pairs.BLOCK_B + tl.arange(0, pairs.BLOCK_B)
        begin = split * components_a_split
        end = tl.minimum(begin + components_a_split, components)
        out = grad_z + split.to(tl.int64) * count * D
        add_gradient(pairs, softmax, upstream, out, rows, first, begin, end, count, WEIGHTS)
        if POSTERIOR != "none" and split + first == 0:
            store_scale_gradient(scale, upstream[0], grad_scale, rows, count, D, DTYPE, POSTERIOR)
    else:
        slot = (program - gradient_programs) // columns
        begin = (slot // components) * points_a_split
        add_sums(
            pairs,
            softmax,
            upstream,
            sums,
            slot % components,
            (program - gradient_programs) % columns * chunk(D),
            slot,
            begin,
            tl.minimum(begin + points_a_split, count),
            count,
            1,
            WEIGHTS,
            not SUMS_ALONE,
            1,
            in_units(DTYPE),
        )


@triton.jit(do_not_specialize=["count", "components", "points_a_split"])
def statistics_kernel(
    pairs,
    softmax,  # [3, B]
    sums,  # N [splits, J], s and M
    count,  # B
    components,  # J
    points_a_split,
):
    """Write N, s and M of one split of the points, with the responsibilities as weights."""
    slot = tl.program_id(0)
    first = tl.program_id(1) * chunk(pairs.D)
    begin = (slot // components) * points_a_split
    add_sums(
        pairs,
        softmax,
        (softmax, softmax),  # not read
        sums,
        slot % components,
        first,
        slot,
        begin,
        tl.minimum(begin + points_a_split, count),
        count,
        1,
        "lse",
        False,
        1,
        False,
    )


@triton.jit
def load_block(
    matrices, slot, row, column, D: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr
):
    """Return the block [ROWS, Q] at ``row``, ``column`` of a matrix of [.., D, D]."""
    row = row + tl.arange(0, ROWS)[:, None]
    column = column + tl.arange(0, chunk(D))[None, :]
    addresses = matrices + tl.cast(slot, tl.int64) * (D * D) + row * D + column
    return tl.load(addresses, mask=(row < D) & (column < D), other=0.0).to(DTYPE)


@triton.jit
def store_gradients(out, pairs, M_parts, N, s, j, first, components, point_splits):
    """Write the gradients by offset and m, and Q rows of that by W, -M W, block by block.

    M is scaled by the unit, if units are used.
    """
    N_out, s_out, M_out = out
    D: tl.constexpr = pairs.D
    DTYPE: tl.constexpr = pairs.DTYPE
    P: tl.constexpr = padded(D)
    Q: tl.constexpr = chunk(D)
    every = tl.arange(0, P)
    moment = tl.zeros([P], DTYPE)
    for begin in range(0, D, Q):
        slope = tl.zeros([Q, Q], DTYPE)
        for k in range(0, D, Q):
            M = tl.zeros([Q, Q], DTYPE)
            for split in range(point_splits):
                slot = tl.cast(split, tl.int64) * components + j
                M += load_block(M_parts, slot, first, k, D, Q, DTYPE)
            w = load_whitening(pairs, j, k, begin, Q)
            if in_units(DTYPE):
                w /= load_unit(pairs, j)
            slope -= tl.dot(M, w, input_precision=pairs.PRECISION, out_dtype=DTYPE)
        if in_units(DTYPE):
            slope /= load_unit(pairs, j)
        row = (first + tl.arange(0, Q))[:, None]
        column = (begin + tl.arange(0, Q))[None, :]
        if not pairs.TRANSPOSE:
            row, column = column, row
        slope = tl.where(column <= row, slope, 0.0)
        addresses = M_out + tl.cast(j, tl.int64) * (D * D) + row * D + column
        tl.store(addresses, slope, mask=(row < D) & (column < D))
        if first == 0:
            w = load_whitening(pairs, j, 0, begin, P)
            whitened = tl.sum(w * s[:, None], 0)  # s W
            moment += tl.sum(w * whitened[None, :], 1)
    if first == 0:
        tl.store(N_out + j, N)
        tl.store(s_out + tl.cast(j, tl.int64) * D + every, moment, mask=every < D)


@triton.jit(do_not_specialize=["size", "components", "gradient_programs", "parts", "point_splits"])
def sums_merge_kernel(
    grad_z_parts,  # [parts, size]
    grad_z,  # [size]
    sums,  # N [point_splits, J], s and M
    pairs,
    out,  # N [J], s and M
    size,  # B D
    components,  # J
    gradient_programs,
    parts,
    point_splits,
    BLOCK: tl.constexpr,
    GRADIENTS: tl.constexpr,
):
    """Add splits up, in order: z's gradient in the first programs, the sums in the others."""
    D: tl.constexpr = pairs.D
    DTYPE: tl.constexpr = pairs.DTYPE
    P: tl.constexpr = padded(D)
    program = tl.program_id(0)
    if program < gradient_programs:
        index = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = index < size
        total = tl.zeros([BLOCK], DTYPE)
        for part in range(parts):
            address = grad_z_parts + tl.cast(part, tl.int64) * size + index
            total += tl.load(address, mask=inside, other=0.0)
        tl.store(grad_z + index, total, mask=inside)
    else:
        N_parts, s_parts, M_parts = sums
        Q: tl.constexpr = chunk(D)
        columns: tl.constexpr = (D + Q - 1) // Q
        j = (program - gradient_programs) // columns
        first = (program - gradient_programs) % columns * Q
        every = tl.arange(0, P)
        N = tl.zeros([1], DTYPE)
        s = tl.zeros([P], DTYPE)
        for split in range(point_splits):
            slot = tl.cast(split, tl.int64) * components + j
            N += tl.load(N_parts + slot)
            s += tl.load(s_parts + slot * D + every, mask=every < D, other=0.0)
        if GRADIENTS and D > Q:
            N = tl.sum(N, 0)
            store_gradients(out, pairs, M_parts, N, s, j, first, components, point_splits)
        else:
            M = tl.zeros([P, Q], DTYPE)
            for split in range(point_splits):
                slot = tl.cast(split, tl.int64) * components + j
                M += load_block(M_parts, slot, 0, first, D, P, DTYPE)
            store_sums(out, pairs, (tl.sum(N, 0), s, M), j, first, j, GRADIENTS)


def _sums(z: Tensor, components: int, splits: int) -> tuple[Tensor, ...]:
    dim = z.shape[1]
    shapes = ((components,), (components, dim), (components, dim, dim))
    lead = () if splits == 1 else (splits,)
    return tuple(z.new_empty(*lead, *shape) for shape in shapes)


def _merge(
    pairs: Pairs,
    gradient: tuple[Tensor, Tensor, int],
    parts: tuple[Tensor, ...],
    out: tuple[Tensor, ...],
    point_splits: int,
    gradients: bool,
    options: dict[str, Any],
) -> None:
    """Launch the second pass if there are splits; ``gradient`` is parts, sum and their number."""
    block = 1024
    grad_z_parts, grad_z, splits = gradient
    programs = triton.cdiv(grad_z.numel(), block) if splits > 1 else 0
    components, dim = (0 if parts is out else len(pairs.centers)), pairs.D.value
    if not programs + components:
        return
    sums_merge_kernel[(programs + components * triton.cdiv(dim, chunk(dim)),)](
        grad_z_parts,
        grad_z,
        parts,
        pairs,
        out,
        grad_z.numel(),
        components,
        programs,
        splits,
        point_splits,
        BLOCK=block,
        GRADIENTS=gradients,
        **options,
    )


def backward(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    softmax: Tensor,
    grad_lse: Tensor,
    grad_expected: Tensor | None,
    transpose: bool,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients by z, centers, whitening, offsets and ``scale``.

    With a ``scale``, ``grad_lse`` is the KL estimate's. Tensors are contiguous and share dtype and
    device.
    """
    count, dim = z.shape
    components = len(centers)
    block, warps = launch.tile(z.dtype, dim, launch.capability(z.device))
    pairs = launch.pairs((z, centers, whitening, offsets), transpose, block)
    tiles = triton.cdiv(count, block)
    splits, each = launch.splits(tiles, components)
    point_splits, tiles_a_split = launch.splits(components, tiles)
    grad_z = torch.empty_like(z)
    parts_z = grad_z if splits == 1 else z.new_empty(splits, count, dim)
    grad_scale = None if scale is None else torch.empty_like(scale)
    out = _sums(z, components, 1)
    columns = triton.cdiv(dim, chunk(dim))
    # With more than one block of columns, M W needs the sums of other programs.
    second = point_splits > 1 or columns > 1
    parts = _sums(z, components, point_splits) if second else out
    if scale is not None:
        weights, posterior = "kl", "diagonal" if scale.ndim == 2 else "full"
    else:
        posterior = "none"
        weights = "given lse" if grad_expected is None else "given both"
    absent, options = softmax, launch.options(warps)  # the kernel does not read an absent tensor
    with launch.on(z.device):
        backward_kernel[((tiles * splits + components * point_splits) * columns,)](
            pairs,
            absent if scale is None else scale,
            softmax,
            (grad_lse, absent if grad_expected is None else grad_expected),
            parts_z,
            absent if grad_scale is None else grad_scale,
            parts,
            count,
            components,
            tiles,
            tiles * splits * columns,
            each,
            tiles_a_split * block,
            WEIGHTS=weights,
            POSTERIOR=posterior,
            SUMS_ALONE=second,
            **options,
        )
        gradient = (parts_z, grad_z, splits)
        _merge(pairs, gradient, parts, out, point_splits, True, options)
    grad_offsets, grad_centers, grad_whitening = out
    return grad_z, grad_centers, grad_whitening, grad_offsets, grad_scale


def statistics(
    z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, softmax: Tensor, transpose: bool
) -> tuple[Tensor, ...]:
    """Return N [J], s [J, D], M [J, D, D]; tensors are contiguous and share dtype and device."""
    components, dim = centers.shape
    block, warps = launch.tile(z.dtype, dim, launch.capability(z.device))
    pairs = launch.pairs((z, centers, whitening, offsets), transpose, block)
    options = launch.options(warps)
    splits, tiles_a_split = launch.splits(components, triton.cdiv(len(z), block))
    out = _sums(z, components, 1)
    parts = out if splits == 1 else _sums(z, components, splits)
    with launch.on(z.device):
        statistics_kernel[(components * splits, triton.cdiv(dim, chunk(dim)))](
            pairs, softmax, parts, len(z), components, tiles_a_split * block, **options
        )
        _merge(pairs, (softmax, softmax, 1), parts, out, splits, False, options)
    return out
