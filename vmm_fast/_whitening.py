"""Points scaled by their own mean and covariance, batch by batch, and drawn from all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["BATCH", "Batches", "Whitening", "distinct"]

BATCH = 16_384  # points in memory at once
LEAST_SPREAD = 1e-6  # eigenvalue of the columns' correlations; smaller ones are rounding noise


class Whitening(NamedTuple):
    """z = (x - offset) matrix, with offset [D], matrix [D, E] and its inverse [E, D] in float64.

    The covariance of z is I. E is less than D where points do not vary in some direction, of which
    nothing is known. ``log_det`` is log |matrix|.
    """

    offset: np.ndarray
    matrix: np.ndarray
    inverse: np.ndarray
    log_det: float

    @classmethod
    def of(cls, X: np.ndarray, weights: np.ndarray) -> Whitening:
        """Return that of points X [N, D], which count as often as ``weights`` [N] say.

        Raises
        ------
        ValueError
            If a variance is not finite.
        """
        shift = X[:BATCH].mean(0, dtype=np.float64)
        first, second = np.zeros(X.shape[1]), np.zeros((X.shape[1],) * 2)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(X), BATCH):
                d = X[start : start + BATCH] - shift
                own = weights[start : start + BATCH]
                first += own @ d
                second += (own[:, None] * d).T @ d
            mean = first / weights.sum()
            covariance = second / weights.sum() - np.outer(mean, mean)
        if not np.isfinite(covariance).all():
            raise ValueError(
                "X must have variances that are finite in float64, but has some that are not: "
                "divide it by its largest value"
            )
        offset, scale = shift + mean, np.sqrt(covariance.diagonal().clip(0))
        if ((scale == 0) & (np.ptp(X[:BATCH], 0) > 0)).any():
            raise ValueError(
                "X must have variances above 0 in float64 where values differ, but has some of 0: "
                "divide it by its largest value"
            )
        constant = scale <= 10 * np.finfo(X.dtype).eps * np.abs(offset)
        scale[constant] = 1
        correlation = covariance / np.outer(scale, scale)
        correlation[constant] = correlation[:, constant] = 0
        values, vectors = np.linalg.eigh(correlation)
        varies = values > LEAST_SPREAD
        varies[-1] = True  # of points that are all the same
        root, vectors = np.sqrt(values[varies].clip(LEAST_SPREAD)), vectors[:, varies]
        return cls(
            offset,
            vectors / root / scale[:, None],
            (vectors * root).T * scale,
            -float(np.log(scale).sum() + np.log(root).sum()),
        )

    def apply(self, X: np.ndarray) -> Tensor:
        """Return z [B, E] of points [B, D], in their dtype."""
        centered = torch.from_numpy(np.subtract(X, self.offset.astype(X.dtype)))
        return centered @ torch.from_numpy(self.matrix.astype(X.dtype))


@dataclass(frozen=True)
class Batches:
    """Whitened points in batches, as often as they are read: only one is in memory."""

    X: np.ndarray
    whitening: Whitening

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.X), BATCH):
            yield self.whitening.apply(self.X[start : start + BATCH])


def distinct(
    X: np.ndarray, weights: np.ndarray, size: int, random: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Return distinct points, of all or of about ``size`` that are drawn, and how often each is.

    So a fit to few points starts the same from weighted and from repeated ones, in whatever order.
    """
    index, own = np.arange(len(X)), weights
    if len(X) > size:
        total = weights.cumsum()
        drawn = total.searchsorted(random.random_sample(size) * total[-1], side="right")
        index, own = np.unique(drawn.clip(max=len(X) - 1), return_counts=True)
    rows, inverse = np.unique(X[index[own > 0]], axis=0, return_inverse=True)
    return rows, np.bincount(inverse.ravel(), own[own > 0])
