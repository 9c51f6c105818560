"""Columns of obs as scvi-tools' loaders give them: batches, labels and covariates as numbers.

The registry of a model says which columns it was set up with, and the order of their categories.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scvi import REGISTRY_KEYS
from torch import Tensor
from torch.nn.functional import one_hot

from vmm_fast._text import counted, joined

__all__ = [
    "UNKNOWN",
    "cell_columns",
    "check_columns",
    "check_continuous",
    "check_names",
    "encode_obs",
    "registered_columns",
    "shares_of",
]

UNKNOWN = -1  # batch or category that the model lacks: encoded as of all in equal shares

# The arguments of :func:`cell_columns`, in the order of the registry.
ARGUMENTS = {
    "batches": REGISTRY_KEYS.BATCH_KEY,
    "labels": REGISTRY_KEYS.LABELS_KEY,
    "categorical": REGISTRY_KEYS.CAT_COVS_KEY,
    "continuous": REGISTRY_KEYS.CONT_COVS_KEY,
}


def cell_columns(
    batches: np.ndarray,
    labels: np.ndarray | None = None,
    categorical: np.ndarray | None = None,
    continuous: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Return columns of cells by scvi-tools' keys, each as an array [cells, n].

    ``batches`` and ``labels`` are [cells]; labels are 0 where there are none. Covariates that are
    not given are left out.
    """
    if labels is None:
        labels = np.broadcast_to(np.int8(0), len(batches))
    given = (batches[:, None], labels[:, None], categorical, continuous)
    return {
        key: values
        for key, values in zip(ARGUMENTS.values(), given, strict=True)
        if values is not None
    }


def shares_of(index: Tensor, number: int) -> Tensor:
    """Return the membership in batches or categories [B, number] of cells with an index [B]."""
    of_one = one_hot(index.clamp(min=0), number).float()
    return of_one.where((index != UNKNOWN)[:, None], 1 / number)


def registered_columns(
    registry: Mapping[str, Any],
) -> dict[str, dict[str, np.ndarray | None]]:
    """Return the columns of obs that a model was set up with, by scvi-tools' keys.

    Each has its categories, in the model's order; None if it holds numbers.
    """
    fields = registry["field_registries"]
    states = {key: fields.get(key, {}).get("state_registry", {}) for key in ARGUMENTS.values()}
    found: dict[str, dict[str, np.ndarray | None]] = {}
    for key in (REGISTRY_KEYS.BATCH_KEY, REGISTRY_KEYS.LABELS_KEY):
        if state := states[key]:
            found[key] = {str(state["original_key"]): np.asarray(state["categorical_mapping"])}
    state = states[REGISTRY_KEYS.CAT_COVS_KEY]
    found[REGISTRY_KEYS.CAT_COVS_KEY] = {
        str(name): np.asarray(state["mappings"][name]) for name in state.get("field_keys", ())
    }
    state = states[REGISTRY_KEYS.CONT_COVS_KEY]
    found[REGISTRY_KEYS.CONT_COVS_KEY] = dict.fromkeys(map(str, state.get("columns", ())))
    return found


def encode_obs(registry: Mapping[str, Any], obs: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return a model's columns of obs as the arguments of :func:`cell_columns`.

    See :meth:`vmm_fast.scvi.LatentPriorModel.encode_obs`.
    """
    columns = registered_columns(registry)
    found: dict[str, np.ndarray] = {}
    for argument, key in ARGUMENTS.items():
        parts = []
        for name, categories in columns.get(key, {}).items():
            if name == f"_scvi_{key}":  # none was given, so that all cells are alike
                parts.append(np.zeros(len(obs), np.int8))
                continue
            _check_name(name, obs)
            if categories is None:
                parts.append(_numbers(name, obs[name]))
                continue
            state = registry["field_registries"][key]["state_registry"]
            parts.append(_codes(name, obs[name], categories, state.get("unlabeled_category")))
        if parts:
            table = np.stack(parts, 1)
            found[argument] = table[:, 0] if argument in ("batches", "labels") else table
    return found


def check_names(registry: Mapping[str, Any], cells: Any) -> None:
    """Raise ValueError unless an AnnData or MuData has the batches and covariates of a model."""
    modalities = registry["setup_args"].get("modalities") or {}
    columns = registered_columns(registry)
    for argument, key in (
        ("batch_key", REGISTRY_KEYS.BATCH_KEY),
        ("categorical_covariate_keys", REGISTRY_KEYS.CAT_COVS_KEY),
        ("continuous_covariate_keys", REGISTRY_KEYS.CONT_COVS_KEY),
    ):
        modality = modalities.get(argument)
        obs = (cells if modality is None else cells.mod[modality]).obs
        for name in columns.get(key, {}):
            if name != f"_scvi_{key}":  # all cells are alike
                _check_name(name, obs)


def check_continuous(registry: Mapping[str, Any], manager: Any) -> None:
    """Raise ValueError unless the continuous covariates of registered cells are finite numbers."""
    if names := list(registered_columns(registry)[REGISTRY_KEYS.CONT_COVS_KEY]):
        table = manager.get_from_registry(REGISTRY_KEYS.CONT_COVS_KEY)
        for name, values in zip(names, np.asarray(table).T, strict=True):
            _numbers(name, pd.Series(values, manager.adata.obs_names))


def _check_name(name: str, obs: pd.DataFrame) -> None:
    if name not in obs:
        raise ValueError(f"obs must have the column {name!r} of the model, but lacks it")


def _numbers(name: str, values: pd.Series) -> np.ndarray:
    try:
        numbers = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"obs[{name!r}] must hold numbers, but holds {values.dtype}") from None
    wrong = ~np.isfinite(numbers)
    if wrong.any():
        raise ValueError(
            f"obs[{name!r}] must hold a finite number for every cell, but {wrong.sum():,} have "
            f"none, the first of which is cell {values.index[wrong][0]}"
        )
    return numbers


def _codes(name: str, values: pd.Series, categories: np.ndarray, unlabelled: Any) -> np.ndarray:
    """Return each cell's index among the categories; cells without a label are unlabelled."""
    given = pd.Categorical(values).remove_unused_categories()
    known = pd.Index(categories)
    at = known.get_indexer(given.categories)
    if (at < 0).any():
        raise ValueError(
            f"obs[{name!r}] must hold categories that the model was set up with, but also holds "
            f"{joined(list(given.categories[at < 0]), 5)}"
        )
    missing = -1 if unlabelled is None else int(known.get_indexer([unlabelled])[0])
    codes: np.ndarray = np.append(at, missing)[given.codes].astype(np.int32)
    if number := int((codes < 0).sum()):
        raise ValueError(
            f"obs[{name!r}] must hold a category for every cell, but {number:,} have none"
        )
    return codes


def check_columns(
    columns: Mapping[str, np.ndarray],
    registry: Mapping[str, Any],
    learns_labels: bool = False,
    query: bool = False,
) -> None:
    """Raise ValueError unless the columns of a data module are those of a model.

    A model that learns labels needs some. A model of query cells (scArches) does not need cells of
    every batch: some are those of the reference model.
    """
    proteins = registry["field_registries"].get(REGISTRY_KEYS.PROTEIN_EXP_KEY, {})
    number = len(proteins.get("state_registry", {}).get("column_names", ()))
    given = columns.get(REGISTRY_KEYS.PROTEIN_EXP_KEY, np.empty((0, 0))).shape[1]
    if given != number:
        raise ValueError(
            f"datamodule must have counts of the {number} proteins that the model was set up with, "
            f"but has those of {given}"
        )
    for key, names in registered_columns(registry).items():
        values = columns.get(key, np.empty((0, 0)))
        if values.shape[1] != len(names):
            kind = "categorical" if key == REGISTRY_KEYS.CAT_COVS_KEY else "continuous"
            raise ValueError(
                f"datamodule must have the {kind} covariates that the model was set up with, "
                f"{joined(list(names)) or 'none'}, but has {counted(values.shape[1], 'column')}; "
                "model.encode_obs(obs) gives them"
            )
        for (name, categories), of_one in zip(names.items(), values.T, strict=True):
            if categories is None:
                _numbers(name, pd.Series(of_one))
                continue
            number = int(of_one.max(initial=-1)) + 1
            if key == REGISTRY_KEYS.BATCH_KEY and number != len(categories) and not query:
                raise ValueError(
                    "datamodule must have the batches that the model's AnnData has categories of, "
                    f"{len(categories)}, but has {number}"
                )
            if of_one.min(initial=0) < 0 or number > len(categories):
                raise ValueError(
                    f"datamodule must have indices from 0 to {len(categories) - 1} for {name!r}, "
                    f"but has them from {of_one.min()} to {number - 1}"
                )
            if key == REGISTRY_KEYS.LABELS_KEY and len(categories) > 1 and not of_one.any():
                raise ValueError(
                    f"datamodule must have the labels that the model was set up with, {name!r}, "
                    "but has none; model.encode_obs(obs) gives them"
                )
            state = registry["field_registries"][key]["state_registry"]
            unknown = state.get("unlabeled_category")
            if learns_labels and unknown is not None and (categories[of_one] == unknown).all():
                raise ValueError(
                    f"datamodule must label some cells in {name!r}, but labels none of "
                    f"{counted(len(of_one), 'cell')}: all are {unknown!r}"
                )
