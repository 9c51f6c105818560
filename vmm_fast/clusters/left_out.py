"""Responsibilities of points as if each had been left out of the fit, without fitting again.

A component that was fitted to few points in many dimensions holds them better than it would hold
new ones: pieces of one Gaussian look like clusters. What components share of points left out does
not have this bias. Let a component of n points have the precision Lambda = nu V^-1, with the
prior's scale and the scatter of its points in V, and let d^2 be a point's squared distance from its
center by Lambda. Without the share w of this point,

    n' = n - w,    nu' = nu - w,    h = w n / n' d^2 / nu    (the leverage)
    d'^2 = (nu' / nu) (n / n')^2 d^2 / (1 - h)
    log|Lambda'| = log|Lambda| + D log(nu' / nu) - log(1 - h)

by the formulas of Sherman and Morrison and of the determinant, and its weight is pi n' / n. Shares
of the other points are taken to stay as they are, and the prior's pull on the center is neglected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from vmm_fast.clusters.tree import Confusion
from vmm_fast.mixture import Components

__all__ = ["confusion_left_out"]

PAIRS = 1 << 18  # of points and components that are in memory at once
LEAST_REST = 1e-3  # of a component, below which it would be none without the point
LEAST_KEPT = 1e-9  # 1 - h, which rounding may bring to 0


@torch.no_grad()
def confusion_left_out(
    components: Components, points: Iterable[Tensor], weights: Tensor | None, degrees: float
) -> Confusion:
    """Return what components share of the points that they were fitted to, each one left out.

    A component that would be left with nothing, as one of a single point, shares its points with
    the components that would have them (which have them, too).

    Parameters
    ----------
    components : Components
        Without pseudo-inputs, and fitted to the points.
    points : iterable of Tensor [B, D]
        Read twice, so it must be repeatable.
    weights : Tensor [N], float64, optional
        How many points each counts as, in the order in which they are read. One is left out.
    degrees : float
        nu - n, the degrees of freedom that the precision has from its prior.
    """
    count = components.num_components
    present = Confusion.of(components, points, weights)
    own = present.sums.sum(1)
    sums, moved = (torch.zeros(count, count, dtype=torch.float64) for _ in range(2))
    read = 0
    for z in (part for batch in points for part in batch.split(max(1, PAIRS // count))):
        weight = None if weights is None else weights[read : read + len(z)]
        read += len(z)
        joint = components.log_joint(z).double()
        shared = joint.softmax(1)
        share = shared if weight is None else shared * weight.clamp(max=1)[:, None]
        without = _log_joint_without(components, joint, share, own, degrees).softmax(1)
        sums += Confusion.of_shares(without, weight).sums
        moved += (shared if weight is None else shared * weight[:, None]).mT @ without
    gone = sums.sum(1) < LEAST_REST * own
    sums[gone] = moved[gone]
    sums[:, gone] = moved[gone].mT
    sums.diagonal().clamp_(min=torch.finfo(sums.dtype).tiny)
    return Confusion((sums + sums.mT) / 2, present.counts)


def _log_joint_without(
    components: Components, joint: Tensor, share: Tensor, own: Tensor, degrees: float
) -> Tensor:
    """Return log pi_c N(z; c) [B, C] as if the share [B, C] of each point had not been fitted."""
    assert components.precision_cholesky is not None
    dim, nu = components.latent_dim, own + degrees
    diagonal = components.precision_cholesky.double().diagonal(dim1=-2, dim2=-1)
    log_norm = diagonal.log().sum(-1) - 0.5 * dim * math.log(2 * math.pi)
    log_weights = components.log_weights.double()
    square = (2 * (log_weights + log_norm - joint)).clamp(min=0)
    rest = (own - share).clamp(min=LEAST_REST * own)
    fewer = (nu - share) / nu
    kept = (1 - share * own / rest * square / nu).clamp(min=LEAST_KEPT)
    square = fewer * (own / rest).square() * square / kept
    log_norm = log_norm + 0.5 * (dim * fewer.log() - kept.log())
    without = log_weights + (rest / own).log() + log_norm - 0.5 * square
    without = without.where(rest > LEAST_REST * own, -math.inf).where(share > 0, joint)
    return without.where(without.isfinite().any(1, keepdim=True), joint)
