"""The kernels on components of :mod:`empirical_bayes` beyond 32 dimensions, in blocks.

The formulas are those of :mod:`empirical_bayes`, the blocks and the scratch memory those of
:mod:`blocked`. Lambda = L L^T and the sum of M + N S over a component's centers are symmetric
matrices in scratch memory, so that every other step is a product with one of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vmm_fast.kernels.blocked import (
    LARGEST_DIM,
    Q,
    copy_lower,
    dot,
    load,
    load_lower_block,
    load_part,
    load_stored_block,
    log_diagonal,
    places,
    rounded,
    squared_scaled_precision,
    store_lower_block,
    store_lower_matrix,
    store_part,
    store_scale_product,
    store_symmetric,
    store_times_transposed,
)
from vmm_fast.kernels.weight_priors import (
    factors,
    load_N,
    softplus_slope,
    store_hyper,
    store_logit_gradient,
    store_loss,
)

# --- 1: the expected log-joint ---


@triton.jit
def squared_vector(pointer, index, D):
    """|x|^2 of a vector of [.., D]."""
    i = tl.arange(0, LARGEST_DIM)
    x = tl.load(pointer + tl.cast(index, tl.int64) * D + i, mask=i < D, other=0.0).to(tl.float64)
    return tl.sum(x * x, 0)


@triton.jit
def squared_lower(pointer, index, D, STORED: tl.constexpr):
    """|X|^2 of a lower triangle of [.., D, D], in its unconstrained form where ``STORED``."""
    squares = tl.zeros([Q, Q], tl.float64)
    for row in range(0, D, Q):
        for column in range(0, row + Q, Q):
            block = load_stored_block(pointer, index, row, column, D, STORED)
            squares += block * block
    return tl.sum(tl.sum(squares, 1), 0)


@triton.jit(do_not_specialize=["count", "per_component", "D"])
def blocked_expected_kernel(
    centers,  # [J, D]
    scale,  # [J, D, D], [J, D], or not read
    raw_precision,  # [C, D, D]
    logits,  # [C]
    whitening,  # [J, D, D]
    offsets,  # [J]
    log_priors,  # [C], float64
    hyper,  # [6], float64
    scratch,  # [programs - 1, R, R], float64
    count,  # C
    per_component,  # K
    D,
    INVERSE_V: tl.constexpr,
    FLOOR: tl.constexpr,
    SCALE: tl.constexpr,  # "none", "diagonal" or "full"
    BLOCK: tl.constexpr,
):
    """As :func:`empirical_bayes.expected_kernel`, of some components; or the logits' sums."""
    programs = tl.num_programs(0) - 1
    if tl.program_id(0) < programs:
        L = scratch + tl.program_id(0).to(tl.int64) * (rounded(D) * rounded(D))
        constant = D.to(tl.float64) * 0.9189385332046727  # 1/2 log 2 pi
        for c in range(tl.program_id(0), count, programs):
            copy_lower(L, raw_precision, c, D, True)
            log_det = log_diagonal(L, D)
            share = tl.load(logits + c).to(tl.float64) - tl.log(per_component.to(tl.float64))
            squares = INVERSE_V * squared_lower(raw_precision, c, D, True)
            for k in range(per_component):
                j = c * per_component + k
                store_lower_matrix(whitening, j, L, D)
                squares += squared_vector(centers, j, D)
                offset = share + (log_det - constant)
                if SCALE != "none":
                    offset -= 0.5 * squared_scaled_precision(L, scale, j, D, SCALE == "diagonal")
                    if SCALE == "diagonal":
                        squares += squared_vector(scale, j, D)
                    else:
                        squares += squared_lower(scale, j, D, False)
                tl.store(offsets + j, offset)
            tl.store(log_priors + c, log_det - 0.5 * squares)
            tl.debug_barrier()  # the next component overwrites what this one has read
    else:
        store_hyper(logits, hyper, count, FLOOR, BLOCK)


# --- 4: the chain rule ---


@triton.jit
def store_center_gradient(
    grad_centers, centers, s_parts, j, precision, data, prior, total, splits, D
):
    """Write prior m - data Lambda s, s added up over the splits."""
    for row in range(0, D, Q):
        moment = tl.zeros([Q], tl.float64)
        for column in range(0, D, Q):
            s = tl.zeros([Q], tl.float64)
            for split in range(splits):
                s += load_part(s_parts, tl.cast(split, tl.int64) * total + j, column, D)
            moment += tl.sum(load(precision, row, column, D) * s[None, :], 1)
        m = load_part(centers, j, row, D)
        store_part(grad_centers, j, row, prior * m - data * moment, D)


@triton.jit
def store_second(
    second, N_parts, M_parts, scale, c, per_component, total, splits, D, SCALE: tl.constexpr
):
    """Sum of M + N s s^T over component c's centers and the splits."""
    for row in range(0, D, Q):
        for column in range(0, row + Q, Q):
            rows, columns = places(row, column)
            block = tl.zeros([Q, Q], tl.float64)
            for k in range(per_component):
                j = c * per_component + k
                for split in range(splits):
                    slot = tl.cast(split, tl.int64) * total + j
                    block += load_lower_block(M_parts, slot, row, column, D)
                if SCALE != "none":
                    N = load_N(N_parts, j, total, splits)
                if SCALE == "diagonal":
                    s = load_part(scale, j, row, D)
                    block += tl.where(rows == columns, (N * s * s)[:, None], 0.0)
                elif SCALE == "full":
                    for t in range(0, column + Q, Q):
                        s = load_lower_block(scale, j, row, t, D)
                        block += dot(N * s, tl.trans(load_lower_block(scale, j, column, t, D)))
            store_symmetric(second, row, column, block, D)
    tl.debug_barrier()


@triton.jit
def store_precision_gradient(
    grad_raw_precision, raw_precision, c, L, second, data, by_L, by_log_det, D
):
    """Write data tril(second L) + by_L L - by_log_det diag(1 / L), by what is stored of L."""
    for row in range(0, D, Q):
        for column in range(0, D, Q):
            rows, columns = places(row, column)
            block = tl.zeros([Q, Q], tl.float64)
            for k in range(column, tl.where(column <= row, D, 0), Q):
                block += dot(load(second, row, k, D), load(L, k, column, D))
            factor = load(L, row, column, D)
            block = data * block + by_L * factor
            pivot = tl.where(rows == columns, factor, 1.0)
            raw = load_lower_block(raw_precision, c, row, column, D)
            inner = (block - by_log_det / pivot) * softplus_slope(raw)
            block = tl.where(rows == columns, inner, block)
            store_lower_block(grad_raw_precision, c, row, column, block, D)


@triton.jit(
    do_not_specialize=["count", "per_component", "points", "point_splits", "data_size", "D"]
)
def blocked_map_gradients_kernel(
    centers,  # [J, D]
    scale,  # [J, D, D], [J, D], or not read
    raw_precision,  # [C, D, D]
    logits,  # [C]
    raw_alpha,  # [1]
    N_parts,  # [point_splits, J], and so on
    s_parts,
    M_parts,
    data_parts,  # [point_splits], float64
    log_priors,  # [C], float64
    hyper,  # [6], float64
    loss,  # [1], float64
    grad_centers,  # as the parameters
    grad_scale,
    grad_raw_precision,
    grad_logits,
    grad_raw_alpha,
    scratch,  # [programs - 1, 3, R, R], float64
    count,  # C
    per_component,  # K
    points,  # B
    point_splits,
    data_size,  # n
    D,
    INVERSE_V: tl.constexpr,
    NORMALISER: tl.constexpr,
    FLOOR: tl.constexpr,
    SCALE: tl.constexpr,
    PRIORS: tl.constexpr,
    WEIGHT_PRIOR: tl.constexpr,
    DISCOUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As :func:`empirical_bayes.map_gradients_kernel`, of some components; or the loss."""
    programs = tl.num_programs(0) - 1
    data, prior = factors(points, data_size, PRIORS)
    if tl.program_id(0) < programs:
        SIZE = rounded(D) * rounded(D)
        L = scratch + tl.program_id(0).to(tl.int64) * (3 * SIZE)
        precision = L + SIZE
        second = precision + SIZE
        total = count * per_component
        for c in range(tl.program_id(0), count, programs):
            copy_lower(L, raw_precision, c, D, True)
            store_times_transposed(precision, L, L, D, False)
            mass = tl.full([], 0.0, tl.float64)
            for k in range(per_component):
                j = c * per_component + k
                N = load_N(N_parts, j, total, point_splits)
                mass += N
                store_center_gradient(
                    grad_centers,
                    centers,
                    s_parts,
                    j,
                    precision,
                    data,
                    prior,
                    total,
                    point_splits,
                    D,
                )
                if SCALE != "none":
                    store_scale_product(
                        grad_scale, scale, j, precision, data * N, prior, D, SCALE == "diagonal"
                    )
            store_second(
                second, N_parts, M_parts, scale, c, per_component, total, point_splits, D, SCALE
            )
            store_precision_gradient(
                grad_raw_precision,
                raw_precision,
                c,
                L,
                second,
                data,
                prior * INVERSE_V,
                data * mass + prior,
                D,
            )
            store_logit_gradient(
                logits,
                raw_alpha,
                hyper,
                grad_logits,
                c,
                mass,
                data,
                prior,
                count,
                FLOOR,
                PRIORS,
                WEIGHT_PRIOR,
                DISCOUNT,
            )
            tl.debug_barrier()  # the next component overwrites what this one has read
    else:
        store_loss(
            data_parts,
            log_priors,
            raw_alpha,
            hyper,
            loss,
            grad_raw_alpha,
            data,
            prior,
            count,
            point_splits,
            NORMALISER,
            PRIORS,
            WEIGHT_PRIOR,
            DISCOUNT,
            BLOCK,
        )
