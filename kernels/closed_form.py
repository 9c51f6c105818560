"""The online empirical-Bayes step in closed form, in four launches.

The step is that of :mod:`vmm_fast.inference.closed_form`, where formulas and sources are. The
launches

1. build the expected log-joint (:mod:`vmm_fast.kernels.empirical_bayes`) and copy the running N
   for the last launch;
2. compute the online softmax of every point;
3. sum over the points, split by split;
4. add up the splits, blend them into the running sums and maximise: one program per component
   computes its sums, its precision and its center if that is free; one more computes all weights
   and the concentration.

Programs of one launch run at the same time, so that none may read what another writes. In the last
launch a component's program writes its own running sums, center and precision, and the last program
writes the logits, the concentration and the number of steps: no other program reads these. Both
need the old N (at the first step it follows from the logits) and whether this is the first step;
they read these from the copy that the first launch has made.

Arithmetic is in float64, except on pairs. The same input gives the same bits. Numbers that may
change from step to step are arguments of the kernels, in float64, so that nothing is recompiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmm_fast.kernels import launch
from vmm_fast.kernels.blocks import BLOCK, load_center, padded, softplus
from vmm_fast.kernels.components import (
    constrained,
    diagonal,
    dot,
    identity,
    load_diagonal,
    load_lower,
    scale_form,
    solve_lower,
    store_diagonal,
    store_lower,
    times_inverse_factor,
    times_inverse_root,
)
from vmm_fast.kernels.empirical_bayes import (
    WARPS,
    load_sum,
    store_expected,
    sums_over_points,
)
from vmm_fast.kernels.sums import load_block
from vmm_fast.kernels.weight_priors import Parameters, digamma, store_hyper

# --- functions of one variable, float64 ---


@triton.jit
def inverse_softplus(x):
    """Return x + log(1 - e^-x).

    (1 - u) x / -log(u) cancels the rounding of u = e^-x, as in Kahan's expm1.
    """
    bounded = tl.minimum(x, 40.0)  # 1 - e^-40 is 1
    u = tl.exp(-bounded)
    small = u == 1.0
    rest = (u - 1.0) * bounded / tl.where(small, 1.0, tl.log(u))
    return x + tl.log(tl.where(small, bounded, rest))


@triton.jit
def trigamma(x):
    """Return psi'(x) for x > 0, by its series from 10 on (Abramowitz & Stegun 6.4.12).

    Below 10 by recurrence.
    """
    shifted = x * 0.0
    for _ in range(10):
        shifted += tl.where(x < 10.0, 1.0 / (x * x), 0.0)
        x = tl.where(x < 10.0, x + 1.0, x)
    r = 1.0 / x
    s = r * r
    series = 5.0 / 66 - s * (691.0 / 2730)
    series = -1.0 / 30 + s * series
    series = 1.0 / 42 + s * series
    series = -1.0 / 30 + s * series
    series = 1.0 / 6 + s * series
    return shifted + r + 0.5 * s + r * s * series


# --- 1: the expected log-joint ---


@triton.jit(do_not_specialize=["count", "per_component"])
def online_expected_kernel(
    parameters,
    whitening,  # [J, D, D]
    offsets,  # [J]
    running_N,  # [J], float64
    steps,  # [], int64
    before,  # [J], float64
    hyper,  # [7], float64
    count,  # C
    per_component,  # K
    INVERSE_V: tl.constexpr,
    FLOOR: tl.constexpr,
    SCALE: tl.constexpr,  # "none", "diagonal" or "full"
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a component's L and offsets, and copy its running N, or its logit at the first step.

    One more program writes the sums over logits, and whether this is the first step.
    """
    c = tl.program_id(0)
    first = tl.load(steps) == 0
    if c < count:
        store_expected(whitening, offsets, parameters, c, per_component, INVERSE_V, SCALE, D)
        logit = tl.load(parameters.logits + c).to(tl.float64)
        for k in range(per_component):
            j = c * per_component + k
            tl.store(before + j, tl.where(first, logit, tl.load(running_N + j)))
    else:
        store_hyper(parameters.logits, hyper, count, FLOOR, BLOCK)
        tl.store(hyper + 6, first.to(tl.float64))


# --- 4: blending and maximising ---


@triton.jit
def blended_N(N_parts, before, hyper, j, inside, total, per_component, point_splits, keep, add):
    """Return the running N of centers before this step, and after it."""
    N = tl.load(before + j, mask=inside, other=0.0)
    matching = tl.exp(N - tl.load(hyper)) / per_component.to(tl.float64)
    old = tl.where(tl.load(hyper + 6) > 0.0, matching, N)
    batch = old * 0.0
    for split in range(point_splits):
        part = N_parts + tl.cast(split, tl.int64) * total + j
        batch += tl.load(part, mask=inside, other=0.0).to(tl.float64)
    return old, keep * old + add * batch


@triton.jit
def maximised_center(L, N, s, m, D: tl.constexpr, MAP: tl.constexpr):
    """Return the maximising center (N Lambda + I)^-1 Lambda (N m + s); if not MAP, the mean.

    If not MAP, the center of an empty component stays.
    """
    total = N * m + s
    if MAP:
        whitened = tl.sum(L * total[:, None], 0)
        total = tl.sum(L * whitened[None, :], 1)
        inverse = times_inverse_factor(tl.sqrt(N) * tl.trans(L), identity(D), D)
        total = tl.sum(inverse * total[:, None], 0)
        center = tl.sum(inverse * total[None, :], 1)
    else:
        center = tl.where(N > 0.0, total / tl.where(N > 0.0, N, 1.0), m)
    return center


@triton.jit
def store_maximised_precision(
    raw_precision,
    scatter,
    mass,
    c,
    INVERSE_V: tl.constexpr,
    NOISE: tl.constexpr,
    MAP: tl.constexpr,
    D: tl.constexpr,
):
    """Write component c's L = sqrt(mass) U^-T from its scatter U U^T, unless that is singular."""
    P: tl.constexpr = padded(D)
    row = tl.arange(0, P)[:, None]
    column = tl.arange(0, P)[None, :]
    if MAP:
        scatter += INVERSE_V * identity(D)
        mass += 1.0
    inverse = times_inverse_root(scatter, identity(D), D)
    L = tl.sqrt(mass) * inverse
    on_diagonal = (row == column) & (row < D)
    raw = tl.where(on_diagonal, inverse_softplus(tl.where(on_diagonal, L, 1.0)), L)
    # A value that the parameter's dtype cannot hold also keeps the old precision.
    kept = raw.to(raw_precision.dtype.element_ty).to(tl.float64)
    finite = tl.abs(kept) < float("inf")
    wrong = tl.where((row < D) & (column <= row) & (finite == 0), 1, 0)
    sound = tl.sum(tl.sum(wrong, 1), 0) == 0
    if not MAP:
        # A pivot as small as the rounding noise of the points' dtype is no evidence of a spread.
        root = diagonal(inverse, D)
        pivots = tl.where(tl.arange(0, P) < D, 1.0 / (root * root), float("inf"))
        largest = tl.max(tl.sum(tl.where(on_diagonal, scatter, 0.0), 0), 0)
        sound = sound & (tl.min(pivots, 0) > NOISE * largest)
    if sound:
        store_lower(raw_precision, c, raw, D)


@triton.jit
def store_masses(
    masses,
    logits,
    N_parts,
    before,
    hyper,
    count,
    per_component,
    point_splits,
    data_size,
    keep,
    add,
    BLOCK: tl.constexpr,
):
    """Write the masses N_c, -1 if pruned; return number and mass of components not pruned."""
    index = tl.arange(0, BLOCK)
    kept = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, count, BLOCK):
        c = begin + index
        inside = c < count
        mass = tl.zeros([BLOCK], tl.float64)
        for k in range(per_component):
            _, N = blended_N(
                N_parts,
                before,
                hyper,
                c * per_component + k,
                inside,
                count * per_component,
                per_component,
                point_splits,
                keep,
                add,
            )
            mass += data_size * N
        logit = tl.load(logits + c, mask=inside, other=float("-inf"))
        present = logit > float("-inf")
        tl.store(masses + c, tl.where(present, mass, -1.0), mask=inside)
        kept += tl.where(present, 1.0, 0.0)
        total += tl.where(present, mass, 0.0)
    # Other threads of this program are about to read the masses.
    tl.debug_barrier()
    return tl.sum(kept, 0), tl.sum(total, 0)


@triton.jit
def concentration_slope(masses, t, kept, total, count, BLOCK: tl.constexpr):
    """Return the concentration's log-posterior's first and second derivative by t = log gamma."""
    gamma = tl.exp(t)
    a = gamma / kept
    index = tl.arange(0, BLOCK)
    first = tl.zeros([BLOCK], tl.float64)
    second = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, count, BLOCK):
        mass = tl.load(masses + begin + index, mask=begin + index < count, other=-1.0)
        pruned = mass < 0.0
        x = tl.where(pruned, 0.0, mass) + a
        first += tl.where(pruned, 0.0, digamma(x) - digamma(a))
        second += tl.where(pruned, 0.0, trigamma(x) - trigamma(a))
    h = tl.sum(first, 0) / kept + digamma(gamma) - digamma(total + gamma)
    slope = gamma * h + 1.0 / gamma
    h = tl.sum(second, 0) / (kept * kept) + trigamma(gamma) - trigamma(total + gamma)
    return slope, slope - 2.0 / gamma + gamma * gamma * h


@triton.jit
def maximised_concentration(masses, gamma, kept, total, count, BLOCK: tl.constexpr):
    """Return the maximising gamma, by Newton's method in log gamma, safeguarded by bisection."""
    high = tl.full([], 13.815510557964274, tl.float64)  # log 1e6
    low = -high
    slope, _ = concentration_slope(masses, high, kept, total, count, BLOCK)
    # If counts are more even than any gamma explains, the result is the upper end.
    low = tl.where(slope > 0.0, high, low)
    t = tl.minimum(tl.maximum(tl.log(gamma), low), high)
    step = high - low
    while (high - low > 1e-10) & (tl.abs(step) > 1e-10):
        slope, curvature = concentration_slope(masses, t, kept, total, count, BLOCK)
        low = tl.where(slope > 0.0, t, low)
        high = tl.where(slope > 0.0, high, t)
        newton = -slope / curvature
        # Newton's step if it stays inside and shrinks fast enough, else half of the bracket.
        good = (t + newton > low) & (t + newton < high) & (tl.abs(newton) < 0.5 * tl.abs(step))
        step = tl.where(good, newton, 0.5 * (low + high) - t)
        t += step
    return tl.exp(t)


@triton.jit
def positive_excess(masses, excess, count, BLOCK: tl.constexpr):
    """Return the sum of N_c + ``excess`` over components where it is positive, and their number."""
    index = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    alive = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, count, BLOCK):
        mass = tl.load(masses + begin + index, mask=begin + index < count, other=-1.0)
        positive = (mass >= 0.0) & (mass + excess > 0.0)
        total += tl.where(positive, mass + excess, 0.0)
        alive += tl.where(positive, 1.0, 0.0)
    return tl.sum(total, 0), tl.sum(alive, 0)


@triton.jit
def store_weights(
    masses,
    logits,
    gamma,
    kept,
    total,
    count,
    FLOOR: tl.constexpr,
    MAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write log pi, except for pruned components."""
    excess = tl.full([], 0.0, tl.float64)
    room = tl.full([], 1.0, tl.float64)
    if MAP:
        excess = gamma / kept - 1.0
        shares, alive = positive_excess(masses, excess, count, BLOCK)
        positive, with_mass = positive_excess(masses, excess * 0.0, count, BLOCK)
        # Fewer points than components: only their masses tell them apart.
        excess = tl.where(alive > 0.0, excess, excess * 0.0)
        total = tl.where(alive > 0.0, shares, positive)
        alive = tl.where(alive > 0.0, alive, with_mass)
        room -= tl.exp(tl.full([], FLOOR, tl.float64)) * (kept - alive)
    index = tl.arange(0, BLOCK)
    for begin in range(0, count, BLOCK):
        inside = begin + index < count
        mass = tl.load(masses + begin + index, mask=inside, other=-1.0)
        share = mass + excess
        if MAP:
            share = tl.where(share > 0.0, share, 0.0)
        log_pi = tl.log(share / total * room)
        log_pi = tl.maximum(log_pi, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        present = inside & ((mass >= 0.0) | (mass != mass))
        tl.store(logits + begin + index, log_pi, mask=present)


@triton.jit(
    do_not_specialize=[
        "count",
        "per_component",
        "point_splits",
        "moves_centers",
        "moves_precision",
        "moves_weights",
        "moves_concentration",
        "learns_concentration",
    ]
)
def maximise_kernel(
    parameters,  # centers are written where they are free
    whitening,  # [J, D, D]
    sums,  # N [point_splits, J], s and M
    data_parts,  # [point_splits], float64
    before,  # [J], float64
    hyper,  # [7], float64
    running_N,  # [J], and so on, float64
    running_s,
    running_M,
    running_centers,  # [J, D], float64
    steps,  # [], int64
    masses,  # [C], float64
    count,  # C
    per_component,  # K
    point_splits,
    moves_centers,  # 1 for a parameter that is written, else 0
    moves_precision,
    moves_weights,
    moves_concentration,
    learns_concentration,  # 1 to maximise it, 0 to take it as it is
    data_size: tl.float64,  # n
    keep: tl.float64,  # weight of the running sums
    add: tl.float64,  # weight of a point of the batch
    INVERSE_V: tl.constexpr,
    NOISE: tl.constexpr,
    FLOOR: tl.constexpr,
    SCALE: tl.constexpr,
    FREE: tl.constexpr,  # whether centers are parameters; K is 1 then
    MAP: tl.constexpr,  # whether parameters have priors
    MOST_SPLITS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one component's running sums and maximisers; or all weights and the concentration."""
    P: tl.constexpr = padded(D)
    row = tl.arange(0, P)[:, None]
    column = tl.arange(0, P)[None, :]
    c = tl.program_id(0)
    N_parts, s_parts, M_parts = sums
    centers, scale, raw_precision, logits, raw_alpha = parameters
    # If a point is not finite, neither is the data term, and the step is not taken.
    index = tl.arange(0, MOST_SPLITS)
    data = tl.load(data_parts + index, mask=index < point_splits, other=0.0)
    sound = tl.abs(tl.sum(data, 0)) < float("inf")
    if c < count:
        if sound:
            first = tl.load(hyper + 6) > 0.0
            covariance = tl.zeros([P, P], tl.float64)
            if first:
                inverse = solve_lower(whitening, c * per_component, identity(D), D)
                covariance = dot(tl.trans(inverse), inverse)
            scatter = tl.zeros([P, P], tl.float64)
            mass = tl.full([], 0.0, tl.float64)
            total = count * per_component
            for k in range(per_component):
                j = c * per_component + k
                old, N = blended_N(
                    N_parts,
                    before,
                    hyper,
                    j,
                    j < total,
                    total,
                    per_component,
                    point_splits,
                    keep,
                    add,
                )
                m = load_center(centers, j, 0, D, P, tl.float64)
                s = tl.where(first, 0.0, load_diagonal(running_s, j, D))
                M = load_block(running_M, j, 0, 0, D, P, tl.float64)
                M = tl.where(first, old * covariance, M)
                if FREE:
                    shift = tl.where(first, 0.0, load_diagonal(running_centers, j, D) - m)
                    M += s[:, None] * shift[None, :] + shift[:, None] * (s + old * shift)[None, :]
                    s += old * shift
                s = keep * s + add * load_sum(s_parts, j, total, point_splits, D)
                batch = tl.zeros([P, P], tl.float64)
                for split in range(point_splits):
                    slot = tl.cast(split, tl.int64) * total + j
                    batch += load_block(M_parts, slot, 0, 0, D, P, tl.float64)
                M = keep * M + add * batch
                # Several warps may hold the same element: all have read before the first writes.
                tl.debug_barrier()
                tl.store(running_N + j, N)
                store_diagonal(running_s, j, s, D)
                addresses = running_M + tl.cast(j, tl.int64) * (D * D) + row * D + column
                tl.store(addresses, M, mask=(row < D) & (column < D))
                store_diagonal(running_centers, j, m, D)

                N, s, M = data_size * N, data_size * s, data_size * M
                if FREE:
                    L = constrained(load_lower(raw_precision, c, D), D)
                    center = tl.where(moves_centers != 0, maximised_center(L, N, s, m, D, MAP), m)
                    store_diagonal(centers, j, center, D)
                    shift = m - center
                    M += s[:, None] * shift[None, :] + shift[:, None] * (s + N * shift)[None, :]
                scatter += M
                mass += N
                if SCALE == "diagonal":
                    s = load_diagonal(scale, j, D)
                    scatter += tl.where(row == column, (N * s * s)[:, None], 0.0)
                elif SCALE == "full":
                    s = load_lower(scale, j, D)
                    scatter += N * dot(s, tl.trans(s))
            if moves_precision != 0:
                store_maximised_precision(raw_precision, scatter, mass, c, INVERSE_V, NOISE, MAP, D)
    else:
        tl.store(steps, tl.load(steps) + tl.where(sound, 1, 0))
        kept, all_mass = store_masses(
            masses,
            logits,
            N_parts,
            before,
            hyper,
            count,
            per_component,
            point_splits,
            data_size,
            keep,
            add,
            BLOCK,
        )
        gamma = 1.0 / softplus(tl.load(raw_alpha).to(tl.float64))
        if learns_concentration != 0:
            gamma = maximised_concentration(masses, gamma, kept, all_mass, count, BLOCK)
            if (moves_concentration != 0) & sound:
                tl.store(raw_alpha, inverse_softplus(1.0 / gamma))
        if (moves_weights != 0) & sound:
            store_weights(masses, logits, gamma, kept, all_mass, count, FLOOR, MAP, BLOCK)


def online_step(
    centers: Tensor,
    scale: Tensor | None,
    raw_precision: Tensor,
    logits: Tensor,
    raw_alpha: Tensor,
    z: Tensor,
    running: Sequence[Tensor],
    objective: Any,
    moves: Sequence[bool],
    rate: float,
    free_centers: bool,
    wishart_scale: float,
    log_weight_floor: float,
) -> Tensor:
    """Take the step, in place; return the masses N_c [C] (float64, -1 for a pruned component).

    If a point is not finite, nothing changes, and no mass is finite.

    ``running`` is N, s, M, centers (float64) and steps (int64), ``objective`` a
    :class:`vmm_fast.inference.empirical_bayes.Objective` with a data size, and ``moves`` says which
    of centers, precision, weights and concentration are learnt. The caller must set the weights and
    the concentration of stick-breaking. Tensors are contiguous; parameters and z share a dtype.
    """
    count, dim = z.shape
    total, number = len(centers), len(logits)
    per_component = total // number
    map_prior = objective.map_prior != "none"
    learns = objective.map_prior == "learnt"
    if map_prior and objective.weights == "stick-breaking":
        moves, learns = (*moves[:2], False, False), False
    whitening, offsets = z.new_empty(total, dim, dim), z.new_empty(total)
    before, hyper, masses = (z.new_empty(size, dtype=torch.float64) for size in (total, 7, number))
    scale_or_any = centers if scale is None else scale
    given = Parameters(centers, scale_or_any, raw_precision, logits, raw_alpha)
    on_components = {
        "INVERSE_V": 1 / wishart_scale,
        "FLOOR": log_weight_floor,
        "SCALE": scale_form(scale),
        "D": dim,
        "BLOCK": BLOCK,
        **launch.options(WARPS[padded(dim)]),
    }
    with launch.on(z.device):
        online_expected_kernel[(number + 1,)](
            given,
            whitening,
            offsets,
            running[0],
            running[-1],
            before,
            hyper,
            number,
            per_component,
            **on_components,
        )
        sums, data = sums_over_points(z, centers, whitening, offsets, "lse")
        maximise_kernel[(number + 1,)](
            given,
            whitening,
            sums,
            data,
            before,
            hyper,
            *running,
            masses,
            number,
            per_component,
            len(data),
            *map(int, moves),
            int(learns),
            float(objective.data_size),
            float(1 - rate),
            rate / count,
            NOISE=16 * torch.finfo(z.dtype).eps,
            FREE=free_centers,
            MAP=map_prior,
            MOST_SPLITS=launch.MOST_SPLITS,
            **on_components,
        )
    return masses
