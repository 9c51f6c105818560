"""Names of genes and cells: where files keep them, if not where anndata looks for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

__all__ = ["CELLS", "GENES", "find_names", "notes_on_genes", "numbered"]

# Columns that hold names, in the order that they are looked for; spelt as _spelt does it.
GENES = (
    *("gene", "genename", "genesymbol", "geneshortname", "symbol", "featurename", "targetname"),
    *("varname", "name", "geneid", "ensemblid", "accession", "featureid", "feature", "index"),
)
CELLS = ("cellid", "obsname", "cellname", "cellbarcode", "barcode", "cell", "index")


def find_names(table: pd.DataFrame, usual: Sequence[str], *, unique: bool = False) -> str | None:
    """Return the column of a table that holds names, or None.

    Parameters
    ----------
    table : DataFrame
    usual : sequence of str
        :data:`GENES` or :data:`CELLS`.
    unique : bool
        Whether no name may occur again.
    """
    columns = {_spelt(key): key for key in reversed(table.columns)}
    for name in usual:
        values = table[columns[name]] if name in columns else None
        if values is not None and _of_text(values) and (values.is_unique or not unique):
            return columns[name]
    return None


def _spelt(key: Any) -> str:
    """Return a column's name in the singular, in lower case and without signs: "genename"."""
    return re.sub(r"[^a-z]", "", str(key).lower()).removesuffix("s")


def _of_text(values: pd.Series) -> bool:
    return pd.api.types.infer_dtype(values, skipna=False) in ("string", "categorical") and all(
        isinstance(value, str) for value in values
    )


def numbered(names: pd.Index) -> bool:
    """Whether names are 0, 1, 2, ..., as anndata counts where there are none; R does from 1 on."""
    return len(names) > 1 and any(
        names[0] == str(first) and all(str(i) == name for i, name in enumerate(names, first))
        for first in (0, 1)
    )


def notes_on_genes(names: pd.Index) -> list[str]:
    """Give a note on genes that are numbered alone, which are matched by their positions."""
    if not numbered(names):
        return []
    return [
        "genes have no names, they are numbered: those of other cells are matched by position, and "
        "must be the same in the same order"
    ]
