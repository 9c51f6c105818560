"""Methods of models that return how new cells are; see :mod:`vmm_fast.scvi.novelty`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from scvi.utils import unsupported_if_adata_minified
from torch import Tensor

from vmm_fast.scvi.novelty import KEPT_CELLS

__all__ = ["NewCells"]


class NewCells:
    """Mixin for models whose module is a ``LatentPrior``: how new cells are."""

    adata: Any
    module: Any
    _check_if_trained: Any
    _make_data_loader: Any
    _validate_anndata: Any
    get_cluster_tree: Any

    def calibrate_novelty(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dataloader: Iterable[dict[str, Tensor]] | None = None,
    ) -> None:
        """Keep what novelty is compared with, of up to 4,096 cells that are not new.

        :meth:`train` calls this at its end with the held-out cells, or if there are none with cells
        that it trained on, which fit the model better than others can. With fewer than 100, novelty
        is coarse. See :meth:`get_novelty`.
        """
        if dataloader is None:
            number = (self.adata if adata is None else adata).n_obs
            chosen = np.arange(number)[slice(None) if indices is None else indices]
            indices = np.sort(np.random.default_rng(0).permutation(chosen)[:KEPT_CELLS]).tolist()
        self.module.keep_novelty(
            self._rarity(adata, indices, batch_size, dataloader, most=KEPT_CELLS)
        )

    @unsupported_if_adata_minified
    def get_novelty(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dataloader: Iterable[dict[str, Tensor]] | None = None,
    ) -> np.ndarray:
        """Return how new each cell is to the model, [cells] in [0, 1].

        It is the share of held-out cells that fit the model better, judged by the prior's density,
        neighbours in the latent space, and how well counts are decoded
        (:mod:`vmm_fast.scvi.novelty`): uniform for cells such as those, near 1 for other types of
        cells. Also cells of other quality, or of a batch that the model does not know, fit it less
        well. With n held-out cells it has steps of 1 / (n + 1) and is at most n / (n + 1): coarse,
        if n is below 100. See :meth:`get_cluster_probabilities` for the parameters.

        Raises
        ------
        ValueError
            If the model was saved before models had novelty: call :meth:`calibrate_novelty`.
        """
        cells = self._rarity(adata, indices, batch_size, dataloader)
        novelty: np.ndarray = self.module.novelty(cells).numpy()
        return novelty

    @torch.inference_mode()
    def _rarity(
        self,
        adata: AnnData | None,
        indices: Any,
        batch_size: int | None,
        dataloader: Iterable[dict[str, Tensor]] | None,
        most: float = math.inf,
    ) -> Tensor:
        """Return what tells new cells [3, cells], of the first batches with so many cells."""
        self._check_if_trained(warn=False)
        self.get_cluster_tree()  # raises if there are no clusters, whose points are neighbours
        if dataloader is None:
            adata = self._validate_anndata(adata)
            dataloader = self._make_data_loader(adata, indices=indices, batch_size=batch_size)
        rarity_of, found, number = self.module.rarity(), [], 0
        for tensors in dataloader:
            outputs = self.module.inference(**self.module._get_inference_input(tensors))
            found.append(rarity_of(tensors, outputs["qz"].loc))
            number += found[-1].shape[1]
            if number >= most:
                break
        return torch.cat(found, 1)
