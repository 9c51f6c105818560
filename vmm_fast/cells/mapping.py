"""Query mapping: a model gets weights for batches and categories that it does not know.

They start at the mean of those that the model has, so that cells begin where they would be without
training, and nothing else is trained (scArches; Lotfollahi et al. 2022, Nature Biotechnology 40,
121-130). The model itself stays as it is, with its clusters and pseudo-cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix
from scvi import REGISTRY_KEYS

from vmm_fast._cut import LEAST_ROWS
from vmm_fast._errors import InputError
from vmm_fast.cells.processes import Processes
from vmm_fast.cells.selection import cells_of_each_category
from vmm_fast.cells.training import Progress, trainer_options, training
from vmm_fast.scvi.loading import CellDataModule, CellSource
from vmm_fast.scvi.model import VMMSCANVI, VMMSCVI

if TYPE_CHECKING:
    from vmm_fast.cells.assignment import SavedModel

# What `integrate` makes. Other models have no weights of batches that the embedding depends on, or
# need parameters of a new batch that are not weights.
NEEDED = {
    "encode_covariates": True,
    "batch_representation": "one-hot",
    "use_observed_lib_size": True,
    "dispersion": "gene",
}


def check_can_be_trained(saved: SavedModel) -> None:
    """Raise InputError if a model has no weights of batches to train, or needs more than these."""
    for name, value in NEEDED.items():
        if (given := getattr(saved.model.module, name)) != value:
            raise InputError(
                f"{saved.folder}: must be a model with {name}={value!r} for --train, but has "
                f"{given!r}; leave out --train"
            )


class OfCells:
    """A CellSource with the cells in ascending `rows` of another."""

    def __init__(self, cells: CellSource, rows: np.ndarray):
        self.n_obs, self.n_vars, self.run = len(rows), cells.n_vars, cells.run
        self.nbytes = cells.nbytes * len(rows) // max(1, cells.n_obs)
        self._cells, self._rows = cells, rows

    def read(self, starts: np.ndarray, stops: np.ndarray) -> csr_matrix:
        """Return the counts of the runs of cells, one after the other."""
        pairs = zip(starts, stops, strict=True)
        rows = np.concatenate([self._rows[start:stop] for start, stop in pairs])
        return self._cells.read(rows, rows + 1)


def map_cells(
    cells: CellSource,
    columns: dict[str, np.ndarray],
    saved: SavedModel,
    epochs: int,
    *,
    progress: bool = False,
) -> VMMSCVI | VMMSCANVI:
    """Return a model with weights for all batches and categories of these cells, trained on them.

    In `columns` those that `saved` does not know are counted on from those that it knows. With
    `progress` a bar is shown on stderr, or a line in every tenth of the epochs. Raises InputError
    if there are too few cells, and what :func:`vmm_fast.cells.training.training` raises.
    """
    if cells.n_obs < LEAST_ROWS:
        raise InputError(
            f"must have at least {LEAST_ROWS} cells of batches or categories that the model does "
            f"not know, to be trained on, but has {cells.n_obs}; leave out --train"
        )
    extended = {key: dict(names) for key, names in saved.columns.items()}
    for key in (REGISTRY_KEYS.BATCH_KEY, REGISTRY_KEYS.CAT_COVS_KEY):
        for i, (name, known) in enumerate(saved.columns[key].items()):
            assert known is not None
            extended[key][name] = _with_new(known, int(columns[key][:, i].max()) + 1 - len(known))
    (labels,) = saved.columns[REGISTRY_KEYS.LABELS_KEY].values()
    assert labels is not None
    during = Progress(progress)
    with training(during, seed=0):
        adata = cells_of_each_category(extended, saved.genes, saved.layer)
        mapped: VMMSCVI | VMMSCANVI = type(saved.model).load_query_data(
            adata, saved.model, freeze_batchnorm_decoder=True
        )
        loading = CellDataModule(
            cells,
            columns[REGISTRY_KEYS.BATCH_KEY][:, 0],
            labels=np.full(cells.n_obs, len(labels) - 1),  # unlabelled, if there is such a label
            categorical=columns.get(REGISTRY_KEYS.CAT_COVS_KEY),
            continuous=columns.get(REGISTRY_KEYS.CONT_COVS_KEY),
            held_out=0,
        )
        mapped.train(
            epochs,
            datamodule=loading,
            plan_kwargs={"weight_decay": 0.0},  # it would move weights whose gradients are 0
            enable_progress_bar=False,
            logger=False,
            callbacks=[during],
            **trainer_options(Processes()),
        )
    return mapped


def _with_new(known: np.ndarray, number: int) -> np.ndarray:
    """Return categories with so many new ones behind them, of the same kind and in order."""
    if known.dtype.kind in "biuf":
        return np.append(known, known.max() + 1 + np.arange(number))
    last = max(map(str, known))
    return np.append(known, np.array([f"{last} {i:09}" for i in range(number)], object))
