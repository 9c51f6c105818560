"""Pseudo-inputs that are cells: learnt counts, batches and covariates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

__all__ = ["Cells", "PseudoCells"]

# Initial membership of a pseudo-cell in the batch or category of its cell. The rest is spread over
# all, so that gradients can still reach every one.
MEMBERSHIP = 0.9
# Logit before the start, and in categories that only query cells have: a share of about e^-10.
ABSENT = -10.0


class Cells(NamedTuple):
    """What an encoder sees of J cells.

    Attributes
    ----------
    log_counts : Tensor [J, G]
        log(1 + counts).
    categories : tuple of Tensor [J, n]
        Membership in the n batches, then for every categorical covariate in its n categories;
        rows sum to 1. Empty where the encoder sees neither.
    continuous : Tensor [J, n_continuous]
    """

    log_counts: Tensor
    categories: tuple[Tensor, ...]
    continuous: Tensor


class PseudoCells(nn.Module):
    """J learnt cells: the pseudo-inputs of a prior.

    Counts are softplus(r) - 1, so that log(1 + counts) = log softplus(r) is smooth in r and a
    count of 0 lies where it has a slope; memberships are softmax(logits). All are learnt.

    Parameters
    ----------
    number : int
        J.
    n_genes : int
        G.
    n_categories : sequence of int
        Number of batches, then of the categories of every categorical covariate.
    n_continuous : int
        Number of continuous covariates.

    Notes
    -----
    Shapes do not depend on the cells, so that a saved model can be rebuilt before its weights are
    loaded. ``started`` is False until :meth:`start_from` is called or a state is loaded.
    """

    def __init__(
        self,
        number: int,
        n_genes: int,
        n_categories: Sequence[int] = (),
        n_continuous: int = 0,
    ):
        super().__init__()
        self.raw_counts = nn.Parameter(torch.zeros(number, n_genes))
        self.category_logits = nn.ParameterList(
            torch.full((number, n), ABSENT) for n in n_categories
        )
        self.continuous = nn.Parameter(torch.zeros(number, n_continuous))
        self.register_buffer("started", torch.tensor(False))

    started: Tensor

    def forward(self) -> Cells:
        """Return the cells as an encoder sees them."""
        return Cells(
            softplus(self.raw_counts).log(),
            tuple(logits.softmax(-1) for logits in self.category_logits),
            self.continuous,
        )

    @torch.no_grad()
    def start_from(
        self, counts: Tensor, categories: Sequence[Tensor] = (), continuous: Tensor | None = None
    ) -> None:
        """Set the pseudo-cells to J given cells.

        Parameters
        ----------
        counts : Tensor [J, G]
        categories : sequence of Tensor [J]
            Index of each cell's batch, then of its category for every categorical covariate.
        continuous : Tensor [J, number of continuous covariates], optional
        """
        # softplus(r) = 1 + x has r = log(e^(1 + x) - 1) = 1 + x + log(1 - e^-(1 + x))
        above = 1 + counts
        self.raw_counts.copy_(above + torch.log(-torch.expm1(-above)))
        for logits, index in zip(self.category_logits, categories, strict=True):
            number = logits.shape[1]
            share = one_hot(index.long(), number) * MEMBERSHIP + (1 - MEMBERSHIP) / number
            logits.copy_(share.log())
        if continuous is not None:
            self.continuous.copy_(continuous)
        self.started.fill_(True)
