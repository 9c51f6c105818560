"""Settings of ``vmm-fast integrate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from anndata import AnnData

from vmm_fast._cut import Cut
from vmm_fast._schema import RATE, flag, optional, text, whole
from vmm_fast.cells.store import CellStore
from vmm_fast.scvi.latent_prior import PRIOR_LEARNING_RATE


@dataclass(frozen=True, kw_only=True)
class Settings(Cut):
    """Settings of a run: all that it depends on besides its cells, and the column of labels."""

    batch_key: Annotated[str | None, optional(text)]
    layer: Annotated[str | None, optional(text)]
    labels_key: Annotated[str | None, optional(text)]
    genes: Annotated[int | None, optional(whole(1))]
    epochs: Annotated[int, whole(1)]
    latent_dim: Annotated[int, whole(1)] = 10
    batch_size: Annotated[int, whole(2)] = 128
    learning_rate: Annotated[float, RATE] = 1e-3
    prior_learning_rate: Annotated[float, RATE] = PRIOR_LEARNING_RATE
    seed: Annotated[int, whole(0, 2**32 - 1)] = 0
    # Whether counts are read from disk while training, which changes the order of the cells.
    on_disk: Annotated[bool, flag] = False

    @classmethod
    def for_cells(cls, cells: AnnData | CellStore, **given: Any) -> Settings:
        """Return settings in which the number of cells determines what is not given, or None.

        Raises InputError if there are too few cells, more components than cells, or more clusters
        than components.
        """
        number = cells.n_obs
        # At most as many steps as by scvi-tools' default: 400 epochs of 20,000 cells.
        epochs = max(1, min(100, round(400 * 20_000 / number)))
        absent = dict.fromkeys(("batch_key", "layer", "labels_key", "genes"))
        return cls._filled(given, number, "cells", number, epochs=epochs, **absent)
