"""A check of saved models before scvi-tools reads them with pickle, which runs what a file names.

Every name in the file must be one of those that tensors, arrays and tables need.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch.serialization import get_unsafe_globals_in_checkpoint

from vmm_fast._files import check_archive

__all__ = ["check_model", "check_saved"]

# The classes and functions in scvi-tools' registries, under the names of all versions.
_NUMPY = ("numpy._core", "numpy.core")
_OF_NUMPY = ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
_OF_PANDAS = (
    "arrays.categorical.Categorical",
    "arrays.numpy_.NumpyExtensionArray",
    "arrays.string_.StringArray",
    "arrays.string_.StringDtype",
    "dtypes.dtypes.CategoricalDtype",
    "frame.DataFrame",
    "indexes.base.Index",
    "indexes.base._new_Index",
    "indexes.range.RangeIndex",
    "internals.managers.BlockManager",
    "series.Series",
)
# From pandas 3 on, classes have the names that users know.
_PANDAS_3 = (
    "Categorical",
    "CategoricalDtype",
    "DataFrame",
    "Index",
    "RangeIndex",
    "Series",
    "StringDtype",
    "arrays.NumpyExtensionArray",
    "arrays.StringArray",
)
ALLOWED = {
    "builtins.bytes",
    "builtins.dict",
    "builtins.list",
    "builtins.set",
    "builtins.slice",
    "collections.defaultdict",
    "numpy.dtype",
    "numpy.ndarray",
    "pandas._libs.arrays.__pyx_unpickle_NDArrayBacked",
    "pandas._libs.internals._unpickle_block",
    *(f"{core}.{name}" for core in _NUMPY for name in _OF_NUMPY),
    *(f"pandas.core.{name}" for name in _OF_PANDAS),
    *(f"pandas.{name}" for name in _PANDAS_3),
}


def check_model(path: str | os.PathLike[str], cure: str = "trust=True") -> None:
    """Raise ValueError if a ``model.pt`` is damaged, or could run code when it is read.

    `cure` is the option, named in the message, by which a trusted file can be read nevertheless.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is damaged or could run code; the message names what it would run.
    """
    check_archive(path)
    try:
        held = set(get_unsafe_globals_in_checkpoint(os.fspath(path)))
    except Exception as error:  # torch raises many kinds
        raise ValueError(
            f"{os.fspath(path)!r} must be a saved model, but is damaged ({type(error).__name__})"
        ) from error
    if foreign := sorted(held - ALLOWED):
        raise ValueError(
            f"{os.fspath(path)!r} must hold tensors and tables alone, but holds "
            f"{', '.join(foreign)}, which may run anything; if you made it yourself, load it with "
            f"{cure}"
        )


def check_saved(folder: str, prefix: str | None = None, backup_url: str | None = None) -> None:
    """Raise ValueError if a saved model is damaged or could run code.

    If there is no file, scvi-tools says so.
    """
    path = Path(folder) / f"{prefix or ''}model.pt"
    if path.is_file():
        check_model(path)
    elif backup_url is not None:
        raise ValueError("backup_url must be None unless trust=True: download the file first")
