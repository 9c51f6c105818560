"""Settings of how components are grouped into clusters, shared by every command that trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from vmm_fast._errors import InputError
from vmm_fast._schema import number, optional, whole

__all__ = ["Cut"]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The number of components, and where their tree is cut into clusters.

    Raises
    ------
    InputError
        If there are to be more clusters than components.
    """

    components: Annotated[int, whole(1)]
    resolution: Annotated[float | None, optional(number("of at least 0", lambda x: x >= 0))] = None
    separation: Annotated[
        float | None, optional(number("between 0 and 1", lambda x: 0 < x < 1))
    ] = None
    clusters: Annotated[int | None, optional(whole(1))] = None

    def __post_init__(self) -> None:
        if self.clusters is not None and self.clusters > self.components:
            raise InputError(
                f"--clusters must be at most {self.components}, the number of components, but "
                f"is {self.clusters}"
            )

    def at_most(self, most: int) -> dict[str, Any]:
        """Return the keyword arguments of :func:`vmm_fast.clusters.find_clusters`.

        The number of clusters is limited to `most`, the number of components that hold points:
        asking for more must not fail after a whole training.
        """
        return {
            "resolution": self.resolution,
            "separation": self.separation,
            "n_clusters": None if self.clusters is None else min(self.clusters, most),
        }
