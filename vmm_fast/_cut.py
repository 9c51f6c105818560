"""Settings of how components are grouped into clusters, shared by every command that trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from vmm_fast._errors import InputError
from vmm_fast._schema import AT_LEAST_0, SHARE, optional, whole

LEAST_ROWS = 10  # rows or cells: one is held out and nine are trained on
T = TypeVar("T", bound="Cut")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The number of components, and where their tree is cut into clusters.

    Raises
    ------
    InputError
        If there are to be more clusters than components.
    """

    components: Annotated[int, whole(1), "C", "components at most (default: 10 to 100, by size)"]
    resolution: Annotated[
        float | None, optional(AT_LEAST_0), "R", "higher gives more clusters (default: 2)"
    ] = None
    separation: Annotated[
        float | None, optional(SHARE), "P", "clusters confused less stay apart (default: 0.02)"
    ] = None
    clusters: Annotated[
        int | None, optional(whole(1)), "N", "number of clusters, instead of these"
    ] = None

    def __post_init__(self) -> None:
        if self.clusters is not None and self.clusters > self.components:
            raise InputError(
                f"--clusters must be at most {self.components}, the number of components, but "
                f"is {self.clusters}"
            )

    @classmethod
    def _filled(
        cls: type[T], given: dict[str, Any], number: int, what: str, starts: int, **usual: Any
    ) -> T:
        """Return settings in which usual values stand for those that are not given, or None.

        `number` is that of the things to cluster, which `what` names; components may start from
        `starts` of them. Raises InputError if there are too few of them, or too many components.
        """
        if number < LEAST_ROWS:
            raise InputError(
                f"must have at least {LEAST_ROWS} {what} to be clustered, but has {number}"
            )
        usual["components"] = min(100, max(10, starts // 20), starts)
        found = cls(**usual | {name: x for name, x in given.items() if x is not None})
        if found.components > starts:
            raise InputError(
                f"--components must be at most {starts}, the {what} that they start from, but is "
                f"{found.components}"
            )
        return found

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
