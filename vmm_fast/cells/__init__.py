"""Files of cells, of any size: what `vmm-fast integrate`, `assign`, `sweep` and `prepare` do.

Needs ``pip install "vmm-fast[scvi]"``; :mod:`vmm_fast.cells.settings` alone does not.
"""

from typing import Any

__all__ = ["CellStore"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vmm_fast.cells.store import CellStore

    return CellStore
