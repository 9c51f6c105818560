"""Finding the names of genes and cells in files that keep them in unusual columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

# Columns that hold names, in the order of preference, spelt as by _spelt.
GENES = (
    *("gene", "genename", "genesymbol", "geneshortname", "symbol", "featurename", "targetname"),
    *("varname", "name", "geneid", "ensemblid", "accession", "featureid", "feature", "index"),
)
CELLS = ("cellid", "obsname", "cellname", "cellbarcode", "barcode", "cell", "index")


def find_names(table: pd.DataFrame, usual: Sequence[str], *, unique: bool = False) -> str | None:
    """Return the column of a table that holds names, or None.

    `usual` is :data:`GENES` or :data:`CELLS`. With `unique` names must be distinct.
    """
    columns: dict[str, str] = {_spelt(key): key for key in reversed(table.columns)}
    for name in usual:
        values = table[columns[name]] if name in columns else None
        if values is not None and _of_text(values) and (values.is_unique or not unique):
            return columns[name]
    return None


def _spelt(key: Any) -> str:
    """Return a column's name as lower-case letters, without a plural s: "genename"."""
    return re.sub(r"[^a-z]", "", str(key).lower()).removesuffix("s")


def _of_text(values: pd.Series) -> bool:
    return pd.api.types.infer_dtype(values, skipna=False) in ("string", "categorical") and all(
        isinstance(value, str) for value in values
    )


def numbered(names: pd.Index) -> bool:
    """Return whether names are only numbers: 0, 1, 2, ... by anndata, or 1, 2, 3, ... by R."""
    return len(names) > 1 and any(
        names[0] == str(first) and all(str(i) == name for i, name in enumerate(names, first))
        for first in (0, 1)
    )


def notes_on_genes(names: pd.Index) -> list[str]:
    """Return a note if genes are only numbered, since they are then matched by position."""
    if not numbered(names):
        return []
    return [
        "genes have no names, they are numbered: those of other cells are matched by position, and "
        "must be the same in the same order"
    ]
