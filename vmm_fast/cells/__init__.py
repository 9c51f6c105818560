"""Files of cells, of any size: what `vmm-fast integrate`, `assign`, `sweep` and `prepare` do.

Needs ``pip install "vmm-fast[scvi]"``.
"""

from vmm_fast.cells.store import CellStore

__all__ = ["CellStore"]
