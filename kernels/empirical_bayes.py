"""Loss and gradients of the empirical-Bayes step, in four launches.

The objective and its gradients are those of ``csrc/empirical_bayes.h``, where formulas and sources
are. The launches

1. build the expected log-joint from the stored parameters, one program per component, with logits
   in place of log pi (a common offset drops out of responsibilities), and each component's
   log-prior; one more program computes the sums over all logits that their prior needs;
2. compute the online softmax of every point (:func:`vmm_fast.kernels.log_prob.log_prob_kernel`);
3. sum over the points, one program per component and split of the points, which merges the
   softmax's splits on the way; further programs compute the data term;
4. add up the splits and apply the chain rule, one program per component; one more computes the loss
   and the concentration's gradient.

Arithmetic on components is in float64, on pairs in the parameters' dtype. The same input gives the
same bits: one program computes each sum, in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmm_fast.kernels import launch
from vmm_fast.kernels.blocks import BLOCK, load_center, merge_softmax, padded
from vmm_fast.kernels.components import (
    constrained,
    diagonal,
    dot,
    load_diagonal,
    load_lower,
    scale_form,
    scaled_precision,
    store_diagonal,
    store_lower,
)
from vmm_fast.kernels.log_prob import log_prob_kernel
from vmm_fast.kernels.sums import add_sums
from vmm_fast.kernels.weight_priors import (
    Parameters,
    Priors,
    factors,
    load_N,
    softplus_slope,
    store_hyper,
    store_logit_gradient,
    store_loss,
)

WARPS = {16: 4, 32: 8}


# --- 1: the expected log-joint ---


@triton.jit
def store_expected(
    whitening,
    offsets,
    parameters,
    c,
    per_component,
    INVERSE_V: tl.constexpr,
    SCALE: tl.constexpr,
    D: tl.constexpr,
):
    """Write component c's A and offsets; return its log-priors up to constants."""
    scale = parameters.scale
    L = constrained(load_lower(parameters.raw_precision, c, D), D)
    log_det = tl.sum(tl.log(diagonal(L, D)), 0)
    constant = tl.full([1], 0.9189385332046727, tl.float64) * D
    share = tl.load(parameters.logits + c).to(tl.float64) - tl.log(per_component.to(tl.float64))
    squares = INVERSE_V * tl.sum(tl.sum(L * L, 1), 0)
    for k in range(per_component):
        j = c * per_component + k
        store_lower(whitening, j, L, D)
        penalty = tl.zeros([1], tl.float64)
        m = load_center(parameters.centers, j, 0, D, padded(D), tl.float64)
        squares += tl.sum(m * m, 0)
        if SCALE != "none":
            scaled = scaled_precision(scale, j, L, D, SCALE)
            penalty += 0.5 * tl.sum(tl.sum(scaled * scaled, 1), 0)
            if SCALE == "diagonal":
                s = load_diagonal(scale, j, D)
                squares += tl.sum(s * s, 0)
            else:
                s = load_lower(scale, j, D)
                squares += tl.sum(tl.sum(s * s, 1), 0)
        offset = share + (log_det - constant - penalty)
        tl.store(offsets + j + tl.arange(0, 1), offset)
    return log_det - 0.5 * squares


@triton.jit(do_not_specialize=["count", "per_component"])
def expected_kernel(
    parameters,
    whitening,  # [J, D, D]
    offsets,  # [J]
    log_priors,  # [C], float64
    hyper,  # [6], float64
    count,  # C
    per_component,  # K
    INVERSE_V: tl.constexpr,
    FLOOR: tl.constexpr,
    SCALE: tl.constexpr,  # "none", "diagonal" or "full"
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a component's L, offsets and log-priors up to constants; or the sums over logits."""
    c = tl.program_id(0)
    if c < count:
        log_prior = store_expected(
            whitening, offsets, parameters, c, per_component, INVERSE_V, SCALE, D
        )
        tl.store(log_priors + c, log_prior)
    else:
        store_hyper(parameters.logits, hyper, count, FLOOR, BLOCK)


# --- 3: sums over the points ---


@triton.jit(do_not_specialize=["count", "components", "splits", "points_a_split"])
def expected_sums_kernel(
    pairs,
    partial,  # [splits, 3, B]
    sums,  # N [splits of the points, J], s and M
    data_out,  # [splits of the points], float64
    count,  # B
    components,  # J
    splits,
    points_a_split,
    WEIGHTS: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    """Write N, s and M of one split of the points; or the sum of its expected log-joint."""
    j = tl.program_id(0)
    point_split = tl.program_id(1)
    begin = point_split * points_a_split
    end = tl.minimum(begin + points_a_split, count)
    if j < components:
        add_sums(
            pairs,
            partial,
            (partial, partial),  # not read
            sums,
            j,
            0,
            point_split * components + j,
            begin,
            end,
            count,
            splits,
            WEIGHTS,
            False,
            MOST_SPLITS,
            False,
        )
    else:
        data = tl.zeros([pairs.BLOCK_B], tl.float64)
        for start in range(begin, end, pairs.BLOCK_B):
            rows = start + tl.arange(0, pairs.BLOCK_B)
            top, total, weighted = merge_softmax(
                partial, rows, count, splits, MOST_SPLITS, pairs.DTYPE
            )
            expected = top.to(tl.float64) + (weighted / total).to(tl.float64)
            data += tl.where(rows < count, expected, 0.0)
        tl.store(data_out + point_split, tl.sum(data, 0))


# --- 4: the chain rule ---


@triton.jit
def load_sum(parts, index, items, splits, D: tl.constexpr):
    """Return a vector [P] of items [splits, items, D], added up over the splits, float64."""
    P: tl.constexpr = padded(D)
    columns = tl.arange(0, P)
    total = tl.zeros([P], tl.float64)
    for split in range(splits):
        origin = (tl.cast(split, tl.int64) * items + index) * D
        total += tl.load(parts + origin + columns, mask=columns < D, other=0.0).to(tl.float64)
    return total


@triton.jit(do_not_specialize=["count", "per_component", "points", "point_splits", "data_size"])
def map_gradients_kernel(
    parameters,
    sums,  # N [point_splits, J], s and M
    data_parts,  # [point_splits], float64
    log_priors,  # [C], float64
    hyper,  # [6], float64
    loss,  # [1], float64
    gradients,  # as the parameters
    count,  # C
    per_component,  # K
    points,  # B
    point_splits,
    data_size,  # n
    priors,
    INVERSE_V: tl.constexpr,
    SCALE: tl.constexpr,  # "none", "diagonal" or "full"
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One component's gradients; or the loss and the concentration's gradient."""
    P: tl.constexpr = padded(D)
    row = tl.arange(0, P)[:, None]
    column = tl.arange(0, P)[None, :]
    N_parts, s_parts, M_parts = sums
    scale = parameters.scale
    c = tl.program_id(0)
    data, prior = factors(points, data_size, priors.PRIORS)
    if c < count:
        raw = load_lower(parameters.raw_precision, c, D)
        L = constrained(raw, D)
        second = tl.zeros([P, P], tl.float64)
        mass = tl.full([], 0.0, tl.float64)
        for k in range(per_component):
            j = c * per_component + k
            total = count * per_component
            N = load_N(N_parts, j, total, point_splits)
            mass += N
            for split in range(point_splits):
                second += load_lower(M_parts, tl.cast(split, tl.int64) * total + j, D)
            s = load_sum(s_parts, j, total, point_splits, D)
            whitened = tl.sum(L * s[:, None], 0)
            moment = tl.sum(L * whitened[None, :], 1)
            m = load_center(parameters.centers, j, 0, D, padded(D), tl.float64)
            store_diagonal(gradients.centers, j, prior * m - data * moment, D)
            if SCALE == "diagonal":
                s = load_diagonal(scale, j, D)
                by_s = (data * N * tl.sum(L * L, 1) + prior) * s
                store_diagonal(gradients.scale, j, by_s, D)
                second += tl.where(row == column, (N * s * s)[:, None], 0.0)
            elif SCALE == "full":
                s = load_lower(scale, j, D)
                scaled = dot(tl.trans(L), s)
                by_s = dot(L, scaled)
                store_lower(gradients.scale, j, data * N * by_s + prior * s, D)
                second += N * dot(s, tl.trans(s))
        # Only lower triangles were added: make it symmetric.
        second = tl.where(column <= row, second, 0.0)
        second += tl.trans(tl.where(column < row, second, 0.0))
        by_L = data * dot(second, L)
        by_L += prior * INVERSE_V * L
        on_diagonal = (row == column) & (row < D)
        pivot = tl.where(on_diagonal, L, 1.0)
        inner = (by_L - (data * mass + prior) / pivot) * softplus_slope(raw)
        store_lower(gradients.raw_precision, c, tl.where(on_diagonal, inner, by_L), D)

        store_logit_gradient(
            gradients.logits, parameters, hyper, c, mass, data, prior, count, priors
        )
    else:
        store_loss(
            loss,
            gradients.raw_alpha,
            data_parts,
            log_priors,
            parameters,
            hyper,
            data,
            prior,
            count,
            point_splits,
            priors,
            BLOCK,
        )


def sums_over_points(
    z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, weights: str
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return N, s and M of each split of the points [splits, ..], and its data term [splits].

    These are launches 2 and 3. ``weights`` is as for :func:`vmm_fast.kernels.blocks.pair_weights`.
    """
    count, dim = z.shape
    total = len(centers)
    block, warps = launch.tile(z.dtype, dim, capability=0)  # the same for all GPUs
    # Merging the splits on the way needs registers.
    block = max(16, block // 2)
    options = launch.options(8 if z.dtype == torch.float64 else warps)
    pairs = launch.pairs((z, centers, whitening, offsets), True, block)
    tiles = triton.cdiv(count, block)
    splits, each = launch.splits(tiles, total)
    point_splits, tiles_a_split = launch.splits(total, tiles)
    partial = z.new_empty(splits, 3, count)
    sums = tuple(
        z.new_empty(point_splits, *shape) for shape in ((total,), (total, dim), whitening.shape)
    )
    data = z.new_empty(point_splits, dtype=torch.float64)
    log_prob_kernel[(tiles, splits)](
        pairs,
        z,
        (offsets, offsets, offsets),
        partial,
        count,
        total,
        each,
        POSTERIOR="none",
        SPLIT=True,
        **options,
    )
    expected_sums_kernel[(total + 1, point_splits)](
        pairs,
        partial,
        sums,
        data,
        count,
        total,
        splits,
        tiles_a_split * block,
        WEIGHTS=weights,
        MOST_SPLITS=launch.MOST_SPLITS,
        **options,
    )
    return sums, data


def map_gradients(
    centers: Tensor,
    scale: Tensor | None,
    raw_precision: Tensor,
    logits: Tensor,
    raw_alpha: Tensor,
    z: Tensor,
    objective: Any,
    wishart_scale: float,
    normaliser: float,
    log_weight_floor: float,
) -> tuple[Tensor, tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]]:
    """Return the loss [] (float64) and its gradients by the first five arguments.

    ``objective`` is a :class:`vmm_fast.inference.empirical_bayes.Objective` with a data size, and
    ``normaliser`` the sum of constants in the log-priors of centers and precisions. Tensors are
    contiguous and share dtype and device.
    """
    count, dim = z.shape
    total, number = len(centers), len(logits)
    per_component = total // number

    def exact(*shape: int) -> Tensor:
        return z.new_empty(shape, dtype=torch.float64)

    whitening, offsets = z.new_empty(total, dim, dim), z.new_empty(total)
    log_priors, hyper, loss = exact(number), exact(6), exact()
    parameters = (centers, scale, raw_precision, logits, raw_alpha)
    grads = tuple(None if x is None else torch.empty_like(x) for x in parameters)
    # An absent scale is not touched.
    given = Parameters(*(centers if x is None else x for x in parameters))
    written = Parameters(*(loss if x is None else x for x in grads))
    constants = (normaliser, log_weight_floor, objective.map_prior, objective.weights)
    priors = Priors(*map(tl.constexpr, (*constants, objective.discount)))
    on_components = {
        "INVERSE_V": 1 / wishart_scale,
        "SCALE": scale_form(scale),
        "D": dim,
        "BLOCK": BLOCK,
        **launch.options(WARPS[padded(dim)]),
    }
    with launch.on(z.device):
        expected_kernel[(number + 1,)](
            given,
            whitening,
            offsets,
            log_priors,
            hyper,
            number,
            per_component,
            FLOOR=log_weight_floor,
            **on_components,
        )
        weights = "expected" if objective.responsibility_gradient else "lse"
        sums, data = sums_over_points(z, centers, whitening, offsets, weights)
        map_gradients_kernel[(number + 1,)](
            given,
            sums,
            data,
            log_priors,
            hyper,
            loss,
            written,
            number,
            per_component,
            count,
            len(data),
            objective.data_size,
            priors,
            **on_components,
        )
    return loss, grads
