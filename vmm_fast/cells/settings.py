"""Settings of ``vmm-fast integrate`` and ``sweep``: each is declared once, here.

A field has its rule and, if it is an option, what stands for its value in the help, and its help.
The command line, ``--config``, run.json and the record in uns all follow from these.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from vmm_fast._cut import Cut
from vmm_fast._schema import RATE, flag, list_of, one_of, optional, text, whole

if TYPE_CHECKING:
    from anndata import AnnData

    from vmm_fast.cells.store import CellStore

PRIORS = ("vmm", "gmm", "vamp")  # N(0, I) has no clusters
LIKELIHOODS = ("zinb", "nb", "poisson")
REPLACED = ("batch_size", "prior_learning_rate")  # of which a sweep tries several
KEY = optional(text)
KEYS = optional(list_of(text, least=1))


@dataclass(frozen=True, kw_only=True)
class Settings(Cut):
    """Settings of a run: all that it depends on besides its cells, and the column of labels."""

    batch_key: Annotated[str | None, KEY, "KEY", "batches (default: one)"] = None
    categorical_covariates: Annotated[
        list[str] | None, KEYS, "KEY", "groups to correct for, as for batches"
    ] = None
    continuous_covariates: Annotated[
        list[str] | None, KEYS, "KEY", "numbers to correct for, best scaled to about 1"
    ] = None
    train_labels: Annotated[str | None, KEY, "KEY", "labels to learn; gives vmm_label"] = None
    unlabelled: Annotated[str, text, "NAME", "label of cells that have none (default: Unknown)"] = (
        "Unknown"
    )
    labels_key: Annotated[str | None, KEY, "KEY", "labels for colours and scores alone"] = None
    layer: Annotated[str | None, KEY, "NAME", "layer with the counts (default: X)"] = None
    genes: Annotated[
        int | None, optional(whole(1)), "N", "train on so many variable genes (default: all)"
    ] = None
    prior: Annotated[str, one_of(*PRIORS), "P", f"{', '.join(PRIORS)} (default: vmm)"] = "vmm"
    likelihood: Annotated[
        str, one_of(*LIKELIHOODS), "L", f"{', '.join(LIKELIHOODS)} (default: zinb)"
    ] = "zinb"
    latent_dim: Annotated[int, whole(1), "D", "latent dimensions (default: 10)"] = 10
    epochs: Annotated[int, whole(1), "N", "passes (default: 100; less from 80,000 cells)"]
    batch_size: Annotated[int, whole(2), "B", "cells per step (default: 128)"] = 128
    learning_rate: Annotated[float, RATE, "R", "of the network (default: 0.001)"] = 1e-3
    prior_learning_rate: Annotated[float, RATE, "R", "of the prior (default: 0.005)"] = 5e-3
    seed: Annotated[int, whole(0, 2**32 - 1), "N", "of all randomness (default: 0)"] = 0
    # Whether counts are read from disk while training, which changes the order of the cells.
    on_disk: Annotated[bool, flag] = False
    # The processes that train together, each with cells and noise of its own.
    processes: Annotated[int, whole(1)] = 1

    @classmethod
    def for_cells(cls, cells: AnnData | CellStore, **given: Any) -> Settings:
        """Return settings in which the number of cells determines what is not given, or None.

        Raises InputError if there are too few cells, more components than cells, or more clusters
        than components.
        """
        number = cells.n_obs
        return cls._filled(given, number, "cells", number, epochs=usual_epochs(max(1, number)))


def usual_epochs(cells: int) -> int:
    """Return how many epochs to train for by default.

    There are at most as many steps as by scvi-tools' default: 400 epochs of 20,000 cells.
    """
    return max(1, min(100, round(400 * 20_000 / cells)))


@dataclass(frozen=True, kw_only=True)
class SweepSettings(Settings):
    """Settings that all runs share, and the batch sizes and ratios to try."""

    batch_sizes: Annotated[
        list[int], list_of(whole(2), least=1), "B", "cells per step (default: 64 128 256)"
    ] = field(default_factory=lambda: [64, 128, 256])
    ratios: Annotated[
        list[float], list_of(RATE, least=1), "R", "prior's rate over network's (default: 1 2 5 10)"
    ] = field(default_factory=lambda: [1.0, 2.0, 5.0, 10.0])

    def of_runs(self) -> Iterator[tuple[Settings, float]]:
        """Yield the settings of every run, and its ratio."""
        common = asdict(self)
        for name in ("batch_sizes", "ratios", *REPLACED):
            del common[name]
        sizes, ratios = dict.fromkeys(self.batch_sizes), dict.fromkeys(self.ratios)
        for size, ratio in itertools.product(sizes, ratios):
            rate = ratio * self.learning_rate
            yield Settings(**common, batch_size=size, prior_learning_rate=rate), ratio
