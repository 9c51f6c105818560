"""The aggregated posterior of cells, by which scvi-tools compares the abundance of conditions.

    q(z) = 1/n sum_i N(z; mu_i, diag sigma_i^2)

with the posterior of cell i in the i-th term (scvi-tools, ``VAEMixin.differential_abundance``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vmm_fast.mixture import Components, MixtureDistribution

__all__ = ["AggregatedPosterior"]

CHUNK = 8_192  # cells whose terms are summed together


class AggregatedPosterior(MixtureDistribution):
    """The mixture of n posteriors, of which nothing larger than a chunk is built for a density.

    torch's MixtureSameFamily has all terms at all points, times D, in memory.

    Parameters
    ----------
    means, scales : Tensor [n, D]
        mu and sigma.
    """

    def __init__(self, means: Tensor, scales: Tensor):
        log_weights = means.new_full((1,), -math.log(len(means))).expand(len(means))
        super().__init__(Components(means, log_weights, scale=scales))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log q(value) [..] for value [.., D], in nats."""
        every = self.components
        assert every.scale is not None
        parts = zip(
            *(x.split(CHUNK) for x in (every.centers, every.log_weights, every.scale)), strict=True
        )
        found = value.new_full(value.shape[:-1], -math.inf)
        for centers, log_weights, scale in parts:
            part = MixtureDistribution(Components(centers, log_weights, scale=scale))
            found = torch.logaddexp(found, part.log_prob(value))
        return found
