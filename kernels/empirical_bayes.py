"""Loss and gradients of the empirical-Bayes step, in four launches.

The objective and its gradients are those of ``csrc/empirical_bayes.h``, where formulas and sources
are. The launches

1. build the expected log-joint from the stored parameters, one program a component, with logits
   in place of log pi (a common offset drops out of responsibilities), and each component's
   log-prior; one more program has the sum over all logits, and what their prior needs of them;
2. take the online softmax of every point (:func:`vmm_fast.kernels.log_prob.log_prob_kernel`);
3. sum over the points, one program a component and split of the points, which merges the softmax's
   splits as it goes; further programs have the data term;
4. add up the splits and apply the chain rule, one program a component; one more has the loss and
   the concentration's gradient.

Arithmetic on components is in float64, on pairs in the parameters' dtype. The same input gives the
same bits: every sum is the work of one program, in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmm_fast.kernels import launch
from vmm_fast.kernels.blocks import (
    BLOCK,
    load_center,
    log_normaliser,
    merge_softmax,
    padded,
    softplus,
)
from vmm_fast.kernels.components import (
    constrained,
    diagonal,
    load_diagonal,
    load_lower,
    scaled_precision,
    store_diagonal,
    store_lower,
)
from vmm_fast.kernels.log_prob import log_prob_kernel
from vmm_fast.kernels.sums import add_sums

# Several tiles in float64 fit into registers up to here.
LARGEST_DIM = 32
WARPS = {16: 4, 32: 8}


# --- functions of one variable, float64 ---


@triton.jit
def softplus_slope(x):
    """1 / (1 + e^-x), 1 above 20."""
    e = tl.exp(tl.minimum(x, 20.0))
    return tl.where(x > 20.0, 1.0, e / (1.0 + e))


@triton.jit
def lgamma(x):
    """log Gamma(x) for x > 0: up to 10 by recurrence, from there Stirling's series."""
    product = x * 0.0 + 1.0
    for _ in range(10):
        product = tl.where(x < 10.0, product * x, product)
        x = tl.where(x < 10.0, x + 1.0, x)
    r = 1.0 / x
    s = r * r
    series = 1.0 / 156 - s * (3617.0 / 122400)
    series = -691.0 / 360360 + s * series
    series = 1.0 / 1188 + s * series
    series = -1.0 / 1680 + s * series
    series = 1.0 / 1260 + s * series
    series = -1.0 / 360 + s * series
    series = 1.0 / 12 + s * series
    return (x - 0.5) * tl.log(x) - x + 0.9189385332046727 + r * series - tl.log(product)


@triton.jit
def digamma(x):
    """psi(x) for x > 0, likewise (Abramowitz & Stegun 6.3.5, 6.3.18)."""
    shifted = x * 0.0
    for _ in range(10):
        shifted -= tl.where(x < 10.0, 1.0 / x, 0.0)
        x = tl.where(x < 10.0, x + 1.0, x)
    r = 1.0 / x
    s = r * r
    series = 691.0 / 32760 - s * (1.0 / 12)
    series = -1.0 / 132 + s * series
    series = 1.0 / 240 + s * series
    series = -1.0 / 252 + s * series
    series = 1.0 / 120 + s * series
    series = -1.0 / 12 + s * series
    return shifted + tl.log(x) - 0.5 * r + s * series


# --- 1: the expected log-joint ---


@triton.jit
def store_hyper(
    logits,
    hyper,  # [6], float64
    count,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What all logits have to say.

    That is the log of the sum of their exponentials, and of x = max(log pi, floor) the sum, how
    many are above the floor, the smallest, the last index of that, and the sum of e^x.
    """
    index = tl.arange(0, BLOCK)
    log_total = log_normaliser(logits, count, BLOCK)
    counted = tl.zeros([BLOCK], tl.float64)
    above = tl.zeros([BLOCK], tl.float64)
    mass = tl.zeros([BLOCK], tl.float64)
    smallest = tl.full([], float("inf"), tl.float64)
    last = tl.full([], 0.0, tl.float64)
    for begin in range(0, count, BLOCK):
        inside = begin + index < count
        x = tl.load(logits + begin + index, mask=inside, other=0.0).to(tl.float64) - log_total
        above += tl.where(inside & (x >= FLOOR), 1.0, 0.0)
        x = tl.maximum(x, FLOOR)
        counted += tl.where(inside, x, 0.0)
        mass += tl.where(inside, tl.exp(x), 0.0)
        least = tl.min(tl.where(inside, x, float("inf")), 0)
        where = tl.max(tl.where(inside & (x == least), begin + index, -1), 0)
        last = tl.where(least <= smallest, where.to(tl.float64), last)
        smallest = tl.minimum(smallest, least)
    tl.store(hyper, log_total)
    tl.store(hyper + 1, tl.sum(counted, 0))
    tl.store(hyper + 2, tl.sum(above, 0))
    tl.store(hyper + 3, smallest)
    tl.store(hyper + 4, last)
    tl.store(hyper + 5, tl.sum(mass, 0))


@triton.jit
def store_expected(
    centers,
    scale,
    raw_precision,
    logits,
    whitening,
    offsets,
    c,
    per_component,
    root,
    INVERSE_V: tl.constexpr,
    SCALE: tl.constexpr,
    D: tl.constexpr,
):
    """Write component c's A and offsets, with l times ``root``^2; returns its log-priors."""
    L = constrained(load_lower(raw_precision, c, D), D)
    log_det = tl.sum(tl.log(diagonal(L, D)), 0)
    constant = tl.full([1], 0.9189385332046727, tl.float64) * D
    share = tl.load(logits + c).to(tl.float64) - tl.log(per_component.to(tl.float64))
    squares = INVERSE_V * tl.sum(tl.sum(L * L, 1), 0)
    for k in range(per_component):
        j = c * per_component + k
        store_lower(whitening, j, root * L, D)
        penalty = tl.zeros([1], tl.float64)
        m = load_center(centers, j, 0, D, padded(D), tl.float64)
        squares += tl.sum(m * m, 0)
        if SCALE != "none":
            scaled = scaled_precision(scale, j, L, D, SCALE == "diagonal")
            penalty += 0.5 * tl.sum(tl.sum(scaled * scaled, 1), 0)
            if SCALE == "diagonal":
                s = load_diagonal(scale, j, D)
                squares += tl.sum(s * s, 0)
            else:
                s = load_lower(scale, j, D)
                squares += tl.sum(tl.sum(s * s, 1), 0)
        offset = share + (log_det - constant - penalty)
        tl.store(offsets + j + tl.arange(0, 1), root * root * offset)
    return log_det - 0.5 * squares


@triton.jit(do_not_specialize=["count", "per_component"])
def expected_kernel(
    centers,  # [J, D]
    scale,  # [J, D, D], [J, D], or not read
    raw_precision,  # [C, D, D]
    logits,  # [C]
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
    """One component's L and offsets, and its log-priors up to constants; or the logits' sums."""
    c = tl.program_id(0)
    if c < count:
        log_prior = store_expected(
            centers,
            scale,
            raw_precision,
            logits,
            whitening,
            offsets,
            c,
            per_component,
            1.0,
            INVERSE_V,
            SCALE,
            D,
        )
        tl.store(log_priors + c, log_prior)
    else:
        store_hyper(logits, hyper, count, FLOOR, BLOCK)


# --- 3: sums over the points ---


@triton.jit(do_not_specialize=["count", "components", "splits", "points_a_split"])
def expected_sums_kernel(
    z,  # [B, D]
    centers,  # [J, D]
    whitening,  # [J, D, D]
    offsets,  # [J]
    partial,  # [splits, 3, B]
    N_out,  # [splits of the points, J], and so on
    s_out,
    M_out,
    data_out,  # [splits of the points], float64
    count,  # B
    components,  # J
    splits,
    points_a_split,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHTS: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    """N, s and M of one split of the points; or the sum of its expected log-joint."""
    j = tl.program_id(0)
    point_split = tl.program_id(1)
    begin = point_split * points_a_split
    end = tl.minimum(begin + points_a_split, count)
    if j < components:
        add_sums(
            z,
            centers,
            whitening,
            offsets,
            partial,
            partial,
            partial,
            N_out,
            s_out,
            M_out,
            j,
            0,
            point_split * components + j,
            begin,
            end,
            count,
            splits,
            D,
            BLOCK_B,
            TRANSPOSE,
            DTYPE,
            PRECISION,
            WEIGHTS,
            False,
            MOST_SPLITS,
        )
    else:
        data = tl.zeros([BLOCK_B], tl.float64)
        for start in range(begin, end, BLOCK_B):
            rows = start + tl.arange(0, BLOCK_B)
            top, total, weighted = merge_softmax(partial, rows, count, splits, MOST_SPLITS, DTYPE)
            expected = top.to(tl.float64) + (weighted / total).to(tl.float64)
            data += tl.where(rows < count, expected, 0.0)
        tl.store(data_out + point_split, tl.sum(data, 0))


# --- 4: the chain rule ---


@triton.jit
def load_sum(parts, index, items, splits, D: tl.constexpr):
    """A vector [P] of items [splits, items, D], added up over the splits, float64."""
    P: tl.constexpr = padded(D)
    columns = tl.arange(0, P)
    total = tl.zeros([P], tl.float64)
    for split in range(splits):
        origin = (tl.cast(split, tl.int64) * items + index) * D
        total += tl.load(parts + origin + columns, mask=columns < D, other=0.0).to(tl.float64)
    return total


@triton.jit
def weight_prior_slope(
    log_pi, c, gamma, hyper, count, WEIGHTS: tl.constexpr, DISCOUNT: tl.constexpr
):
    """Derivative of the weights' log-prior by max(log pi_c, floor)."""
    components = count.to(tl.float64)
    if WEIGHTS == "dirichlet":
        slope = gamma / components - 1.0
    else:
        b = gamma + (components - 1.0) * DISCOUNT
        last = tl.load(hyper + 4) == c.to(tl.float64)
        slope = (1.0 - gamma) * tl.exp(log_pi) / tl.load(hyper + 5)
        # tl.where takes a number as float32.
        slope -= DISCOUNT + tl.where(last, 1.0 - b - DISCOUNT, 0.0)
    return slope


@triton.jit
def weight_prior(
    gamma,
    hyper,
    count,
    WEIGHTS: tl.constexpr,
    DISCOUNT: tl.constexpr,
    LEARNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """log p(pi), with that of gamma where it is learnt, and its derivative by gamma."""
    counted = tl.load(hyper + 1)
    components = count.to(tl.float64)
    if WEIGHTS == "dirichlet":
        a = gamma / components
        value = lgamma(gamma) - components * lgamma(a) + (a - 1.0) * counted
        slope = digamma(gamma) - digamma(a) + counted / components
        if LEARNT:
            value -= 1.0 / gamma
            slope += 1.0 / (gamma * gamma)
    else:
        smallest = tl.load(hyper + 3)
        log_mass = tl.log(tl.load(hyper + 5))
        b = gamma + (components - 1.0) * DISCOUNT
        value = (1.0 - gamma) * log_mass + (b - 1.0) * smallest - DISCOUNT * (counted - smallest)
        slope = smallest - log_mass
        if DISCOUNT == 0.0:
            value += (components - 1.0) * tl.log(gamma)
            slope += (components - 1.0) / gamma
        else:
            values = tl.zeros([BLOCK], tl.float64)
            slopes = tl.zeros([BLOCK], tl.float64)
            constant = lgamma(gamma * 0.0 + (1.0 - DISCOUNT))
            for begin in range(1, count, BLOCK):
                index = begin + tl.arange(0, BLOCK)
                x = gamma + index.to(tl.float64) * DISCOUNT
                y = x + (1.0 - DISCOUNT)
                inside = index < count
                values += tl.where(inside, lgamma(y) - lgamma(x) - constant, 0.0)
                slopes += tl.where(inside, digamma(y) - digamma(x), 0.0)
            value += tl.sum(values, 0)
            slope += tl.sum(slopes, 0)
        if LEARNT:
            value -= gamma
            slope -= 1.0
    return value, slope


@triton.jit
def weight_prior_total(
    gamma,
    hyper,
    count,
    FLOOR: tl.constexpr,
    WEIGHTS: tl.constexpr,
    DISCOUNT: tl.constexpr,
):
    """Sum of :func:`weight_prior_slope` over the components above the floor."""
    above = tl.load(hyper + 2)
    components = count.to(tl.float64)
    if WEIGHTS == "dirichlet":
        return above * (gamma / components - 1.0)
    else:
        b = gamma + (components - 1.0) * DISCOUNT
        mass = tl.load(hyper + 5)
        floor = tl.exp(tl.full([], FLOOR, tl.float64))
        inside = mass - (components - above) * floor
        last = tl.where(tl.load(hyper + 3) > FLOOR, 1.0, 0.0)
        return (1.0 - gamma) * inside / mass - DISCOUNT * (above - last) - (1.0 - b) * last


@triton.jit(do_not_specialize=["count", "per_component", "points", "point_splits", "data_size"])
def map_gradients_kernel(
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
    count,  # C
    per_component,  # K
    points,  # B
    point_splits,
    data_size,  # n
    INVERSE_V: tl.constexpr,
    NORMALISER: tl.constexpr,  # constants of the log-priors
    FLOOR: tl.constexpr,
    SCALE: tl.constexpr,
    PRIORS: tl.constexpr,  # "none", "fixed" or "learnt"
    WEIGHT_PRIOR: tl.constexpr,  # "dirichlet" or "stick-breaking"
    DISCOUNT: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One component's gradients; or the loss and the concentration's gradient."""
    P: tl.constexpr = padded(D)
    row = tl.arange(0, P)[:, None]
    column = tl.arange(0, P)[None, :]
    c = tl.program_id(0)
    data = 1.0 / points.to(tl.float64)
    prior = 1.0 / data_size.to(tl.float64)
    if PRIORS == "none":
        prior = prior * 0.0
    raw_alpha_value = tl.load(raw_alpha).to(tl.float64)
    gamma = 1.0 / softplus(raw_alpha_value)
    log_total = tl.load(hyper)
    if c < count:
        raw = load_lower(raw_precision, c, D)
        L = constrained(raw, D)
        second = tl.zeros([P, P], tl.float64)
        mass = tl.full([], 0.0, tl.float64)
        for k in range(per_component):
            j = c * per_component + k
            total = count * per_component
            N = tl.full([], 0.0, tl.float64)
            for split in range(point_splits):
                slot = tl.cast(split, tl.int64) * total + j
                N += tl.load(N_parts + slot).to(tl.float64)
                second += load_lower(M_parts, slot, D)
            mass += N
            s = load_sum(s_parts, j, total, point_splits, D)
            whitened = tl.sum(L * s[:, None], 0)
            moment = tl.sum(L * whitened[None, :], 1)
            m = load_center(centers, j, 0, D, padded(D), tl.float64)
            store_diagonal(grad_centers, j, prior * m - data * moment, D)
            if SCALE == "diagonal":
                s = load_diagonal(scale, j, D)
                by_s = (data * N * tl.sum(L * L, 1) + prior) * s
                store_diagonal(grad_scale, j, by_s, D)
                second += tl.where(row == column, (N * s * s)[:, None], 0.0)
            elif SCALE == "full":
                s = load_lower(scale, j, D)
                scaled = tl.dot(tl.trans(L), s, input_precision="ieee", out_dtype=tl.float64)
                by_s = tl.dot(L, scaled, input_precision="ieee", out_dtype=tl.float64)
                store_lower(grad_scale, j, data * N * by_s + prior * s, D)
                second += N * tl.dot(s, tl.trans(s), input_precision="ieee", out_dtype=tl.float64)
        # Only lower triangles were added: make it symmetric.
        second = tl.where(column <= row, second, 0.0)
        second += tl.trans(tl.where(column < row, second, 0.0))
        by_L = data * tl.dot(second, L, input_precision="ieee", out_dtype=tl.float64)
        by_L += prior * INVERSE_V * L
        on_diagonal = (row == column) & (row < D)
        pivot = tl.where(on_diagonal, L, 1.0)
        inner = (by_L - (data * mass + prior) / pivot) * softplus_slope(raw)
        store_lower(grad_raw_precision, c, tl.where(on_diagonal, inner, by_L), D)

        log_pi = tl.load(logits + c).to(tl.float64) - log_total
        # Weights of all pairs sum to the number of points.
        everywhere = -1.0
        own = -data * mass
        if PRIORS != "none":
            by_log_pi = weight_prior_slope(log_pi, c, gamma, hyper, count, WEIGHT_PRIOR, DISCOUNT)
            own -= prior * tl.where(log_pi >= FLOOR, by_log_pi, 0.0)
            everywhere = everywhere - prior * weight_prior_total(
                gamma, hyper, count, FLOOR, WEIGHT_PRIOR, DISCOUNT
            )
        tl.store(grad_logits + c, own - tl.exp(log_pi) * everywhere)
    else:
        index = tl.arange(0, BLOCK)
        data_total = tl.zeros([BLOCK], tl.float64)
        for begin in range(0, point_splits, BLOCK):
            mask = begin + index < point_splits
            data_total += tl.load(data_parts + begin + index, mask=mask, other=0.0)
        value = data * tl.sum(data_total, 0) - log_total
        slope = tl.full([], 0.0, tl.float64)
        if PRIORS != "none":
            log_prior = tl.zeros([BLOCK], tl.float64)
            for begin in range(0, count, BLOCK):
                mask = begin + index < count
                log_prior += tl.load(log_priors + begin + index, mask=mask, other=0.0)
            of_weights, slope = weight_prior(
                gamma, hyper, count, WEIGHT_PRIOR, DISCOUNT, PRIORS == "learnt", BLOCK
            )
            value += prior * (tl.sum(log_prior, 0) + of_weights + NORMALISER)
        tl.store(loss, -value)
        chain = gamma * gamma * softplus_slope(raw_alpha_value)  # gamma = 1 / softplus(raw_alpha)
        tl.store(grad_raw_alpha, prior * slope * chain)


def sums_over_points(
    z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, weights: str
) -> tuple[list[Tensor], Tensor]:
    """Launch 2 and 3: N, s and M of each split of the points [splits, ..], and the data term's.

    ``weights`` is one of :func:`vmm_fast.kernels.blocks.pair_weights`.
    """
    count, dim = z.shape
    total = len(centers)
    constants = launch.constants(z, transpose=True)
    # Merging the splits as it goes takes registers.
    if z.dtype == torch.float64:
        constants |= launch.options(8)
    block = constants["BLOCK_B"] = max(16, constants["BLOCK_B"] // 2)
    tiles = triton.cdiv(count, block)
    splits, each = launch.splits(tiles, total)
    point_splits, tiles_a_split = launch.splits(total, tiles)
    partial = z.new_empty(splits, 3, count)
    sums = [
        z.new_empty(point_splits, *shape) for shape in ((total,), (total, dim), whitening.shape)
    ]
    data = z.new_empty(point_splits, dtype=torch.float64)
    log_prob_kernel[(tiles, splits)](
        z,
        centers,
        whitening,
        offsets,
        z,
        offsets,
        offsets,
        offsets,
        partial,
        count,
        total,
        each,
        POSTERIOR="none",
        SPLIT=True,
        **constants,
    )
    expected_sums_kernel[(total + 1, point_splits)](
        z,
        centers,
        whitening,
        offsets,
        partial,
        *sums,
        data,
        count,
        total,
        splits,
        tiles_a_split * block,
        WEIGHTS=weights,
        MOST_SPLITS=launch.MOST_SPLITS,
        **constants,
    )
    return sums, data


def scale_form(scale: Tensor | None) -> str:
    """What kernels call the layout of s."""
    return "none" if scale is None else "diagonal" if scale.ndim == 2 else "full"


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
    """Loss [] (float64) and its gradients by the first five arguments.

    ``objective`` is a :class:`vmm_fast.inference.empirical_bayes.Objective` that has a data size,
    ``normaliser`` what the log-priors of centers and precisions have of constants. Tensors are
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
    given = [centers if x is None else x for x in parameters]  # an absent scale is not touched
    written = [loss if x is None else x for x in grads]
    on_components = {
        "INVERSE_V": 1 / wishart_scale,
        "FLOOR": log_weight_floor,
        "SCALE": scale_form(scale),
        "D": dim,
        "BLOCK": BLOCK,
        **launch.options(WARPS[padded(dim)]),
    }
    with launch.on(z.device):
        expected_kernel[(number + 1,)](
            *given[:4],
            whitening,
            offsets,
            log_priors,
            hyper,
            number,
            per_component,
            **on_components,
        )
        weights = "expected" if objective.responsibility_gradient else "lse"
        sums, data = sums_over_points(z, centers, whitening, offsets, weights)
        map_gradients_kernel[(number + 1,)](
            *given,
            *sums,
            data,
            log_priors,
            hyper,
            loss,
            *written,
            number,
            per_component,
            count,
            len(data),
            objective.data_size,
            NORMALISER=normaliser,
            PRIORS=objective.map_prior,
            WEIGHT_PRIOR=objective.weights,
            DISCOUNT=objective.discount,
            **on_components,
        )
    return loss, grads
