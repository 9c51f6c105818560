"""An opened file of cells, or of several modalities of which one is read."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import h5py

from vmm_fast.cells.reading import beside_modality, modality_in


class Opened:
    """An opened file and the opened arrays of its counts: HDF5 caches chunks of open arrays."""

    def __init__(self, root: Any, modality: str | None) -> None:
        self._root, self._modality = root, modality
        self._arrays: dict[str, Any] = {}

    @cached_property
    def group(self) -> Any:
        """The group of the cells: the file, or that of its modality."""
        return modality_in(self._root, self._modality)

    def beside(self) -> list[str]:
        """Return the names of what the file has besides the modality that is read."""
        return [] if self._modality is None else beside_modality(self._root, self._modality)

    def __getitem__(self, name: str) -> Any:
        """Return the array of this name."""
        if name not in self._arrays:
            self._arrays[name] = self.group[name]
        return self._arrays[name]

    def close(self) -> None:
        """Close the file."""
        if isinstance(self._root, h5py.File):
            self._root.close()
