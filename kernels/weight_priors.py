"""The part of the empirical-Bayes gradient step that concerns the weights.

It does not depend on the dimension: the log-prior of the weights and of the concentration
gamma = 1 / softplus(raw_alpha), the gradients by the logits and raw_alpha, and the loss. Formulas
and sources are those of ``csrc/empirical_bayes.h``. All is in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vmm_fast.kernels.blocks import log_normaliser, softplus


class Parameters(NamedTuple):
    """Parameters of a mixture as a prior stores them, one pointer each."""

    centers: Any  # [J, D]
    scale: Any  # [J, D, D], [J, D], or not read
    raw_precision: Any  # [C, D, D]
    logits: Any  # [C]
    raw_alpha: Any  # [1]


class Priors(NamedTuple):
    """Constants of the objective."""

    NORMALISER: Any  # constants of the log-priors
    FLOOR: Any  # of log pi
    PRIORS: Any  # "none", "fixed" or "learnt"
    WEIGHTS: Any  # "dirichlet" or "stick-breaking"
    DISCOUNT: Any


# --- functions of one variable, float64 ---


@triton.jit
def softplus_slope(x):
    """Return the derivative of softplus: 1 / (1 + e^-x), and 1 above 20."""
    e = tl.exp(tl.minimum(x, 20.0))
    return tl.where(x > 20.0, 1.0, e / (1.0 + e))


@triton.jit
def stirling(x):
    """Return log Gamma(x) - [(x - 1/2) log x - x + log sqrt(2 pi)] by Stirling's series, x >= 8."""
    r = 1.0 / x
    s = r * r
    series = 1.0 / 156 - s * (3617.0 / 122400)
    series = -691.0 / 360360 + s * series
    series = 1.0 / 1188 + s * series
    series = -1.0 / 1680 + s * series
    series = 1.0 / 1260 + s * series
    series = -1.0 / 360 + s * series
    series = 1.0 / 12 + s * series
    return r * series


@triton.jit
def stirling_slope(x):
    """Return psi(x) - log x for x >= 8 by its series (Abramowitz & Stegun 6.3.18)."""
    r = 1.0 / x
    s = r * r
    series = 691.0 / 32760 - s * (1.0 / 12)
    series = -1.0 / 132 + s * series
    series = 1.0 / 240 + s * series
    series = -1.0 / 252 + s * series
    series = 1.0 / 120 + s * series
    series = -1.0 / 12 + s * series
    return s * series - 0.5 * r


@triton.jit
def lgamma(x):
    """Return log Gamma(x) for x > 0, by Stirling's series from 10 on and recurrence below."""
    product = x * 0.0 + 1.0
    for _ in range(10):
        product = tl.where(x < 10.0, product * x, product)
        x = tl.where(x < 10.0, x + 1.0, x)
    return (x - 0.5) * tl.log(x) - x + 0.9189385332046727 + stirling(x) - tl.log(product)


@triton.jit
def digamma(x):
    """Return psi(x) for x > 0, by its series from 10 on and recurrence below (ibid. 6.3.5)."""
    shifted = x * 0.0
    for _ in range(10):
        shifted -= tl.where(x < 10.0, 1.0 / x, 0.0)
        x = tl.where(x < 10.0, x + 1.0, x)
    return shifted + tl.log(x) + stirling_slope(x)


# --- all logits ---


@triton.jit
def store_hyper(
    logits,
    hyper,  # [6], float64
    count,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write to ``hyper`` the sums over all logits that the weights' prior needs.

    These are the log of the sum of their exponentials and, for x = max(log pi, floor), the sum of
    x, how many are above the floor, the smallest x, its last index, and the sum of e^x.
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


# --- log-priors ---


@triton.jit
def weight_prior_slope(log_pi, c, gamma, hyper, count, priors):
    """Return the derivative of the weights' log-prior by max(log pi_c, floor)."""
    components = count.to(tl.float64)
    if priors.WEIGHTS == "dirichlet":
        slope = gamma / components - 1.0
    else:
        b = gamma + (components - 1.0) * priors.DISCOUNT
        last = tl.load(hyper + 4) == tl.cast(c, tl.float64)
        slope = (1.0 - gamma) * tl.exp(log_pi) / tl.load(hyper + 5)
        # tl.where takes a number as float32.
        slope -= priors.DISCOUNT + tl.where(last, 1.0 - b - priors.DISCOUNT, 0.0)
    return slope


@triton.jit
def weight_prior(gamma, hyper, count, priors, BLOCK: tl.constexpr):
    """Return log p(pi), plus gamma's log-prior if it is learnt, and the derivative by gamma."""
    counted = tl.load(hyper + 1)
    components = count.to(tl.float64)
    if priors.WEIGHTS == "dirichlet":
        a = gamma / components
        value = lgamma(gamma) - components * lgamma(a) + (a - 1.0) * counted
        slope = digamma(gamma) - digamma(a) + counted / components
        if priors.PRIORS == "learnt":
            value -= 1.0 / gamma
            slope += 1.0 / (gamma * gamma)
    else:
        smallest = tl.load(hyper + 3)
        log_mass = tl.log(tl.load(hyper + 5))
        b = gamma + (components - 1.0) * priors.DISCOUNT
        value = (
            (1.0 - gamma) * log_mass + (b - 1.0) * smallest - priors.DISCOUNT * (counted - smallest)
        )
        slope = smallest - log_mass
        if priors.DISCOUNT == 0.0:
            value += (components - 1.0) * tl.log(gamma)
            slope += (components - 1.0) / gamma
        else:
            values = tl.zeros([BLOCK], tl.float64)
            slopes = tl.zeros([BLOCK], tl.float64)
            constant = lgamma(gamma * 0.0 + (1.0 - priors.DISCOUNT))
            for begin in range(1, count, BLOCK):
                index = begin + tl.arange(0, BLOCK)
                x = gamma + index.to(tl.float64) * priors.DISCOUNT
                y = x + (1.0 - priors.DISCOUNT)
                inside = index < count
                values += tl.where(inside, lgamma(y) - lgamma(x) - constant, 0.0)
                slopes += tl.where(inside, digamma(y) - digamma(x), 0.0)
            value += tl.sum(values, 0)
            slope += tl.sum(slopes, 0)
        if priors.PRIORS == "learnt":
            value -= gamma
            slope -= 1.0
    return value, slope


@triton.jit
def weight_prior_total(gamma, hyper, count, priors):
    """Return the sum of :func:`weight_prior_slope` over the components above the floor."""
    above = tl.load(hyper + 2)
    components = count.to(tl.float64)
    if priors.WEIGHTS == "dirichlet":
        return above * (gamma / components - 1.0)
    else:
        b = gamma + (components - 1.0) * priors.DISCOUNT
        mass = tl.load(hyper + 5)
        floor = tl.exp(tl.full([], priors.FLOOR, tl.float64))
        inside = mass - (components - above) * floor
        last = tl.where(tl.load(hyper + 3) > priors.FLOOR, 1.0, 0.0)
        return (1.0 - gamma) * inside / mass - priors.DISCOUNT * (above - last) - (1.0 - b) * last


# --- gradients and loss ---


@triton.jit
def load_N(N_parts, j, total, splits):
    """Return N_j, added up over the splits [splits, total], float64."""
    N = tl.full([], 0.0, tl.float64)
    for split in range(splits):
        N += tl.load(N_parts + tl.cast(split, tl.int64) * total + j).to(tl.float64)
    return N


@triton.jit
def factors(points, data_size, PRIORS: tl.constexpr):
    """Return the objective's factors of the data term, 1 / B, and of log-priors, 1 / n or 0."""
    data = 1.0 / points.to(tl.float64)
    prior = 1.0 / data_size.to(tl.float64)
    if PRIORS == "none":
        prior = prior * 0.0
    return data, prior


@triton.jit
def store_logit_gradient(grad_logits, parameters, hyper, c, mass, data, prior, count, priors):
    """Write the gradient of the loss by component c's logit."""
    log_pi = tl.load(parameters.logits + c).to(tl.float64) - tl.load(hyper)
    # Weights of all pairs sum to the number of points.
    everywhere = -1.0
    own = -data * mass
    if priors.PRIORS != "none":
        gamma = 1.0 / softplus(tl.load(parameters.raw_alpha).to(tl.float64))
        by_log_pi = weight_prior_slope(log_pi, c, gamma, hyper, count, priors)
        own -= prior * tl.where(log_pi >= priors.FLOOR, by_log_pi, 0.0)
        everywhere = everywhere - prior * weight_prior_total(gamma, hyper, count, priors)
    tl.store(grad_logits + c, own - tl.exp(log_pi) * everywhere)


@triton.jit
def store_loss(
    loss,
    grad_raw_alpha,
    data_parts,
    log_priors,
    parameters,
    hyper,
    data,
    prior,
    count,
    point_splits,
    priors,
    BLOCK: tl.constexpr,
):
    """Write the loss and its gradient by the concentration."""
    raw_alpha_value = tl.load(parameters.raw_alpha).to(tl.float64)
    gamma = 1.0 / softplus(raw_alpha_value)
    index = tl.arange(0, BLOCK)
    data_total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, point_splits, BLOCK):
        mask = begin + index < point_splits
        data_total += tl.load(data_parts + begin + index, mask=mask, other=0.0)
    value = data * tl.sum(data_total, 0) - tl.load(hyper)
    slope = tl.full([], 0.0, tl.float64)
    if priors.PRIORS != "none":
        log_prior = tl.zeros([BLOCK], tl.float64)
        for begin in range(0, count, BLOCK):
            mask = begin + index < count
            log_prior += tl.load(log_priors + begin + index, mask=mask, other=0.0)
        of_weights, slope = weight_prior(gamma, hyper, count, priors, BLOCK)
        value += prior * (tl.sum(log_prior, 0) + of_weights + priors.NORMALISER)
    tl.store(loss, -value)
    chain = gamma * gamma * softplus_slope(raw_alpha_value)  # gamma = 1 / softplus(raw_alpha)
    tl.store(grad_raw_alpha, prior * slope * chain)
