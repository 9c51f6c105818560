"""Novelty of cells to a trained model, compared with that of held-out cells.

Three things tell, the first two of a cell's posterior mean z: the prior's density log p(z), the
distance d to the 15th nearest of the latent means that the model keeps, and the misfit of the
counts that are decoded from z,

    s = 1/G sum_g min((x_g - mu_g)^2 / var_g, 100)

with the mean and variance of each gene given the cell's library size. It is about 1 for every
library size if the model is right. Each has a tail probability among held-out cells, and these are
combined as by Fisher (1925, Statistical Methods for Research Workers, section 21.1):

    t = -log P(log p(z') <= log p(z)) - log P(d' >= d) - log P(s' >= s)

Novelty is the share of held-out cells with a smaller t. It is uniform in [0, 1] for cells such as
the held-out ones, whatever the three depend on. Cells that cannot be decoded, because the model
lacks their batch or category, have no misfit; the others' t is without it, too, for them.
"""

from __future__ import annotations

from typing import Any

import torch
from scvi import REGISTRY_KEYS
from torch import Tensor

from vmm_fast.scvi.columns import UNKNOWN, shares_of

__all__ = ["KEPT_CELLS", "distance_of", "misfit_of", "neighbours_among", "novelty_of"]

KEPT_CELLS = 4_096  # most held-out cells that novelty is compared with, and most neighbours
NEIGHBOURS = 15
CLIP = 100.0  # a single count of a gene that is never seen is not to outweigh all others


def neighbours_among(points: Tensor) -> Tensor:
    """Return those of the latent means [N, D] that count as neighbours, at most KEPT_CELLS."""
    return points[:: -(-len(points) // KEPT_CELLS)].clone()


def distance_of(z: Tensor, points: Tensor) -> Tensor:
    """Return d [B] of z [B, D], given the latent means that count as neighbours.

    That a held-out cell may be among them hardly shows in the 15th nearest.
    """
    number = min(NEIGHBOURS, len(points))
    return torch.cdist(z, points).topk(number, largest=False).values[:, -1]


def misfit_of(module: Any, tensors: dict[str, Tensor], z: Tensor) -> Tensor:
    """Return s [B] of cells whose counts are decoded from z [B, D] by a module such as VAE.

    Return NaN for cells of an unknown category of a covariate, and for those of an unknown batch if
    the decoder takes no shares of batches.
    """
    x = tensors[REGISTRY_KEYS.X_KEY].to(z)
    index = tensors[REGISTRY_KEYS.BATCH_KEY].to(z.device)
    takes_shares = module.batch_representation == "one-hot" and module.use_observed_lib_size
    takes_shares &= module.dispersion != "gene-batch"
    # Labels play no part, but scvi-tools asks for them.
    tensors = {REGISTRY_KEYS.LABELS_KEY: torch.zeros_like(index), **tensors}
    unknown = index[:, 0] == UNKNOWN
    if unknown.any():
        shares = shares_of(index[:, 0], module.n_batch)
        tensors = {**tensors, REGISTRY_KEYS.BATCH_KEY: shares if takes_shares else index.clamp(0)}
        unknown &= not takes_shares
    if (categories := tensors.get(REGISTRY_KEYS.CAT_COVS_KEY)) is not None:
        unknown |= (categories == UNKNOWN).any(1).to(z.device)
        tensors = {**tensors, REGISTRY_KEYS.CAT_COVS_KEY: categories.clamp(0)}
    if module.latent_distribution == "ln":
        z = z.softmax(-1)
    outputs = {"z": z, "library": x.sum(1, keepdim=True).log()}
    px = module.generative(**module._get_generative_input(tensors, outputs))["px"]
    misfit = ((x - px.mean).square() / (px.variance + 1e-8)).clamp(max=CLIP).mean(1)
    found: Tensor = misfit.masked_fill(unknown, torch.nan)
    return found


def novelty_of(cells: Tensor, held_out: Tensor) -> Tensor:
    """Return the novelty [B] of cells, given -log p(z), d and s [3, B], and those of others.

    Cells whose s is NaN are compared by the other two. Of n held-out cells [3, n], novelty is at
    most n / (n + 1).
    """
    decoded = held_out[:, ~held_out[-1].isnan()]
    blind = cells[-1].isnan() | (decoded.shape[1] == 0)
    found = cells.new_empty(cells.shape[1], dtype=torch.float64)
    found[~blind] = _share_below(cells[:, ~blind], decoded)
    found[blind] = _share_below(cells[:-1, blind], held_out[:-1])
    return found


def _share_below(cells: Tensor, held_out: Tensor) -> Tensor:
    """Return the share of held-out cells [k, n] that have a smaller t than cells [k, B]."""
    pairs = list(zip(cells, held_out, strict=True))
    of_cells = torch.stack([-_tail(x, among, True).log() for x, among in pairs]).sum(0)
    of_held_out = torch.stack([-_tail(among, among, False).log() for _, among in pairs]).sum(0)
    below = torch.searchsorted(of_held_out.sort().values, of_cells)
    return below.double() / (held_out.shape[1] + 1)


def _tail(x: Tensor, among: Tensor, new: bool) -> Tensor:
    """Return the share of cells with at least x [B]; a new cell is counted among them as well."""
    least = len(among) - torch.searchsorted(among.sort().values, x.contiguous())
    return (least + new).double() / (len(among) + new)
