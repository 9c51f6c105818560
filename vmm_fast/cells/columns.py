"""The columns of obs that a run trains with: batches, covariates and labels, checked.

A column is taken as categories, in memory and on disk alike.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData

from vmm_fast._errors import InputError
from vmm_fast._text import counted, joined
from vmm_fast.cells.reading import column
from vmm_fast.cells.settings import Settings
from vmm_fast.cells.store import CellStore
from vmm_fast.cells.writing import RESERVED

CONSTANT = "has one value alone, as a covariate it tells nothing"
LARGE = 100.0  # a continuous covariate beyond this is worth a note
FEW = 3  # scvi-tools warns of labels with fewer cells


def training_columns(
    cells: AnnData | CellStore, settings: Settings
) -> tuple[pd.DataFrame, list[str]]:
    """Return batches, covariates and labels of all cells, and notes on them.

    Raises InputError if a column is missing or cannot be used.
    """
    categorical = settings.categorical_covariates or []
    continuous = settings.continuous_covariates or []
    trained_with = [
        ("--batch-key", settings.batch_key),
        *(("--categorical-covariates", key) for key in categorical),
        *(("--continuous-covariates", key) for key in continuous),
        ("--train-labels", settings.train_labels),
    ]
    used: dict[str, str] = {}
    for option, key in (*trained_with, ("--labels-key", settings.labels_key)):
        if key in RESERVED:
            raise InputError(
                f"{option} {key}: must be another column, results are written to this one; rename "
                "it"
            )
        if key in used and option != "--labels-key":
            twice = "must be given once, but is given twice"
            fault = f"must be another column than that of {used[key]}"
            raise InputError(
                f"{option} {key}: {twice if used[key] == option else fault}; leave it out"
            )
        if key is not None:
            used.setdefault(key, option)
    if settings.labels_key is not None:
        column_of(cells, "--labels-key", settings.labels_key)
    found: dict[str, pd.Categorical | np.ndarray] = {}
    notes: list[str] = []
    if (key := settings.batch_key) is not None:
        found[key] = batches = _groups(cells, "--batch-key", key, "a batch", "batches")
        notes += _notes_on_batches(pd.Series(batches).value_counts())
    for key in categorical:
        found[key] = groups = _groups(
            cells, "--categorical-covariates", key, "a category", "groups"
        )
        if len(groups.categories) == 1:
            notes.append(f"{key} {CONSTANT}")
    for key in continuous:
        option = "--continuous-covariates"
        found[key] = numbers = numbers_of(column_of(cells, option, key), f"{option} {key}:")
        notes += _notes_on_numbers(key, numbers)
    if (key := settings.train_labels) is not None:
        found[key], more = _labels(cells, key, settings.unlabelled)
        notes += more
        if key == settings.labels_key:
            notes.append(f"scores are of labels that were trained on, those of {key}")
    disk = isinstance(cells, CellStore)
    index = pd.RangeIndex(cells.n_obs) if disk else cells.obs_names
    return pd.DataFrame(found, index=index), notes


def column_of(cells: AnnData | CellStore, option: str, key: str) -> pd.Categorical:
    """Return a column of obs as categories that cells have; ``option`` names it in an error."""
    if isinstance(cells, CellStore):
        return cells.column(key, option)
    return pd.Categorical(column(cells, option, key)).remove_unused_categories()


def _groups(
    cells: AnnData | CellStore, option: str, key: str, one: str, several: str
) -> pd.Categorical:
    """Return a column with a value for every cell, but not another value for each."""
    values = column_of(cells, option, key)
    if missing := int((values.codes < 0).sum()):
        raise InputError(
            f"{option} {key}: every cell must have {one}, {missing:,} of {len(values):,} have "
            "none; give them one of their own"
        )
    if len(values.categories) == len(values):
        raise InputError(
            f"{option} {key}: must name {several}, but has another value for every cell"
        )
    return values


def _notes_on_batches(sizes: pd.Series) -> list[str]:
    """Return notes on small batches, given their sizes."""
    notes = []
    if len(sizes) == 1:
        notes.append("one batch alone: there is nothing to integrate, cells are clustered")
    if single := list(sizes.index[sizes == 1]):
        batches = "a batch" if len(single) == 1 else f"{len(single)} batches"
        notes.append(f"{batches} of one cell: {joined(single, 5)}")
    return notes


def numbers_of(values: pd.Categorical, name: str) -> np.ndarray:
    """Return a column as finite numbers [cells] in float32; errors begin with ``name``."""
    if len(values.categories) and values.categories.dtype.kind not in "biuf":
        raise InputError(
            f"{name} must hold numbers, but holds {str(values.categories[0])!r}; groups are "
            "categorical covariates"
        )
    with np.errstate(over="ignore"):
        each = np.append(values.categories.to_numpy(np.float64), np.nan).astype(np.float32)
    numbers: np.ndarray = each[values.codes]
    if missing := int((~np.isfinite(numbers)).sum()):
        raise InputError(
            f"{name} every cell must have a finite number, {missing:,} of "
            f"{len(numbers):,} have none; fill them in"
        )
    return numbers


def _notes_on_numbers(key: str, numbers: np.ndarray) -> list[str]:
    if numbers.min() == numbers.max():
        return [f"{key} {CONSTANT}"]
    if (largest := float(np.abs(numbers).max())) <= LARGE:
        return []
    return [
        f"{key} has values up to {largest:g}: scale it to about 1, for instance by its mean and "
        "standard deviation, since the network sees values as they are"
    ]


def _labels(
    cells: AnnData | CellStore, key: str, unlabelled: str
) -> tuple[pd.Categorical, list[str]]:
    """Return a column of labels as text, with the unlabelled category last, and notes on it."""
    option = "--train-labels"
    values = column_of(cells, option, key)
    names = pd.Index([str(name) for name in values.categories], dtype=object)
    known = pd.Index(sorted(set(names) - {unlabelled}), dtype=object)
    codes = np.append(known.get_indexer(names), -1)[values.codes]
    sizes = np.bincount(codes[codes >= 0], minlength=len(known))
    number = int(sizes.sum())
    without = f"labels of cells that have no value or {unlabelled!r} are unknown (--unlabelled)"
    if not number:
        raise InputError(f"{option} {key}: must label some cells, but labels none; {without}")
    if len(known) == 1:
        raise InputError(
            f"{option} {key}: must hold two labels or more, but holds {known[0]!r} alone; {without}"
        )
    if len(known) == number:
        raise InputError(
            f"{option} {key}: must name groups of cells, but has another value for every cell"
        )
    notes = [f"{number:,} of {counted(len(values), 'cell')} have one of {len(known):,} labels"]
    if (few := known[sizes < FEW]).size:
        are = "a label" if few.size == 1 else f"{few.size} labels"
        notes.append(f"{are} of fewer than {FEW} cells: {joined(list(few), 5)}")
    codes[codes < 0] = len(known)
    return pd.Categorical.from_codes(codes, [*known, unlabelled]), notes
