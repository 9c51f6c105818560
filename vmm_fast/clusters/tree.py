"""The tree by which components merge into clusters, from sums over points; see the package."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vmm_fast.inference.processes import sum_over_processes
from vmm_fast.mixture import Components

if TYPE_CHECKING:
    from vmm_fast.clusters import Clusters

__all__ = [
    "ClusterTree",
    "Confusion",
    "Interval",
    "between",
    "confusion_of",
    "parts_of",
    "ranks_by_size",
]

RESOLUTION, SEPARATION = 2.0, 0.02
# Confusion of N(-1, 1) and N(1, 1), the farthest apart that have one peak together.
ONE_PEAK = 0.2248
OWN_SHARE = 0.75  # least share of a cluster's points that is its own
CHUNK = 16_384  # points whose responsibilities are in memory at once


class Interval(NamedTuple):
    """Lower and upper bounds of the confusion of each merge [M]."""

    low: np.ndarray
    high: np.ndarray


class Confusion(NamedTuple):
    """Sums over points that tell which components share points.

    Attributes
    ----------
    sums : Tensor [C, C], float64
        S[a, b] = sum_i r_i(a) r_i(b).
    counts : Tensor [C], int64, or float64 of weighted points
        Points whose most probable component this is.
    """

    sums: Tensor
    counts: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        components: Components,
        points: Tensor | Iterable[Tensor],
        weights: Tensor | None = None,
    ) -> Confusion:
        """Return the sums over points, in one pass and with memory for the sums alone.

        Parameters
        ----------
        components : Components
        points : Tensor [N, D] or iterable of Tensor [B, D]
        weights : Tensor [N], float64, optional
            How many points each counts as, in the order in which they are read.

        Returns
        -------
        Confusion
            The sums over this process's points; see :meth:`over_processes` for all.
        """
        count, device = components.num_components, components.centers.device
        sums = torch.zeros(count, count, dtype=torch.float64, device=device)
        counts = torch.zeros(count, dtype=torch.int64, device=device)
        read = 0
        for part in parts_of(points, components):
            own = None if weights is None else weights[read : read + len(part)]
            found = cls.of_shares(components.responsibilities(part), own)
            sums, counts = sums + found.sums, counts + found.counts
            read += len(part)
        return cls(sums, counts)

    @classmethod
    def of_shares(cls, shared: Tensor, weights: Tensor | None) -> Confusion:
        """Return the sums over points, given their responsibilities [B, C] and weights [B]."""
        counts = shared.argmax(1).bincount(weights, minlength=shared.shape[1])
        shared = shared.double()
        return cls((shared if weights is None else shared * weights[:, None]).mT @ shared, counts)

    def plus(self, other: Confusion) -> Confusion:
        """Return the sums over the points of self and other, which have the same components."""
        if self.sums.shape != other.sums.shape:
            raise ValueError(
                f"other must be of {len(self.counts)} components, but is of {len(other.counts)}"
            )
        return Confusion(self.sums + other.sums, self.counts + other.counts)

    def over_processes(self) -> Confusion:
        """Return the sums over the points of all processes of ``torch.distributed``."""
        summed = Confusion(self.sums.clone(), self.counts.clone())
        sum_over_processes(summed)
        return summed


@dataclass(frozen=True, eq=False)
class ClusterTree:
    """The tree by which components merge into clusters, the most confused pair first.

    A component without points (it is no point's most probable one) joins the component that it
    shares most with before all other merges, so that no cluster consists of such components alone.

    Parameters
    ----------
    confusion : Confusion

    Raises
    ------
    ValueError
        If no component has a point, or the sums cannot be of points.

    Examples
    --------
    >>> from vmm_fast import Components
    >>> centers = torch.tensor([[-4.0], [-3.5], [4.0]])
    >>> components = Components(centers, torch.full((3,), 1 / 3).log(), torch.ones(3, 1, 1))
    >>> tree = ClusterTree(Confusion.of(components, torch.cat([centers - 0.5, centers + 0.5])))
    >>> tree.heights.round(3)  # confusion of both merges
    array([0.49, 0.  ])
    >>> tree.cut(n_clusters=2)
    tensor([0, 0, 1])
    """

    confusion: Confusion

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.leaves)} of {len(self._leaf_of)} components)"

    def __post_init__(self) -> None:
        sums, counts = self.confusion
        if sums.shape != (len(counts), len(counts)):
            raise ValueError(
                f"sums must have shape {[len(counts)] * 2}, but have {list(sums.shape)}"
            )
        if not (counts >= 0).all() or not counts.any():
            raise ValueError(
                "counts must be of at least one point and not negative, but are "
                f"{int(counts.sum())} in all, {int(counts.min())} the least"
            )
        sound = sums.isfinite().all() and (sums >= 0).all() and torch.allclose(sums, sums.mT)
        if not sound or not (sums.diagonal()[counts > 0] > 0).all():
            raise ValueError(
                "sums must be finite, symmetric, not negative, and positive for components with "
                "points, but are not"
            )

    def check_fits(self, clusters: Clusters) -> None:
        """Raise ValueError unless clusters group this tree's components and all hold points."""
        of_component, own = clusters.of_component.cpu(), len(self.confusion.counts)
        if len(of_component) != own:
            raise ValueError(
                f"tree must be of these {len(of_component)} components, but is of {own}"
            )
        if len(of_component[self.leaves].unique()) != clusters.num_clusters:
            raise ValueError(
                "clusters must be of a cut of this tree, but some hold no points of it"
            )

    # --- the tree ---

    @cached_property
    def leaves(self) -> np.ndarray:
        """Indices of the components that hold points, in rising order: the leaves of the tree."""
        return np.flatnonzero(self.confusion.counts.cpu().numpy())

    @cached_property
    def _leaf_of(self) -> np.ndarray:
        """Index of the leaf that each component belongs to [C]."""
        sums, leaves = self.confusion.sums.cpu().numpy(), self.leaves
        shared = sums[:, leaves]
        nearest: np.ndarray = shared.argmax(1)
        counts = self.confusion.counts.cpu().numpy()[leaves]
        nearest[shared.max(1) <= 0] = counts.argmax()
        nearest[leaves] = np.arange(len(leaves))
        return nearest

    @cached_property
    def _merges(self) -> tuple[np.ndarray, ...]:
        """The merges in order: pairs of groups, by their first leaves [M, 2], and measures [M].

        The measures are the confusion, the number of points of the smaller group, and the gains of
        the modularity's first and second term.
        """
        leaf_of, total = self._leaf_of, len(self.leaves)
        member = np.zeros((len(leaf_of), total))
        member[np.arange(len(leaf_of)), leaf_of] = 1
        sums = member.T @ self.confusion.sums.cpu().numpy() @ member
        mass = sums.sum(1)
        # Modularity counts what leaves share with each other, not with themselves.
        between = sums - np.diag(sums.diagonal())
        degree = between.sum(1)
        everything = degree.sum() or 1.0
        pairs = np.zeros((total - 1, 2), dtype=int)
        confusion, smaller, linked, expected = (np.zeros(total - 1) for _ in range(4))
        rate = between / np.minimum(mass[:, None], mass)
        np.fill_diagonal(rate, -1)
        best, value = rate.argmax(1), rate.max(1)
        for merge in range(total - 1):
            a = int(value.argmax())
            a, b = sorted((a, int(best[a])))
            pairs[merge], confusion[merge] = (a, b), rate[a, b]
            smaller[merge] = min(mass[a], mass[b])
            linked[merge] = 2 * between[a, b] / everything
            expected[merge] = 2 * degree[a] * degree[b] / everything**2
            between[a] += between[b]
            between[:, a] += between[:, b]
            between[a, a] = 0
            mass[a] += mass[b]
            degree[a] += degree[b]
            rate[b], rate[:, b], value[b] = -1, -1, -1
            there = rate[a] >= 0
            rate[a, there] = between[a, there] / np.minimum(mass[a], mass[there])
            rate[there, a] = rate[a, there]
            changed = np.flatnonzero((best == a) | (best == b) | (rate[a] >= value))
            changed = np.union1d(changed[value[changed] >= 0], [a])
            best[changed], value[changed] = rate[changed].argmax(1), rate[changed].max(1)
        return pairs, np.minimum(confusion, 1.0), smaller, linked, expected

    @property
    def heights(self) -> np.ndarray:
        """Confusion of each merge [M], at most that of the merge before."""
        return np.minimum.accumulate(self._merges[1])

    def interval(self, level: float = 0.95) -> Interval:
        """Return a confidence interval of each merge's confusion.

        It is Wilson's interval of a proportion, with as many draws as the smaller group has points.
        Responsibilities vary less than draws of 0 and 1, so the interval is rather too wide.

        Parameters
        ----------
        level : float
            Confidence level, in (0, 1).
        """
        if not 0 < _as_float(level) < 1:
            raise ValueError(f"level must be in (0, 1), but is {level!r}")
        z = math.sqrt(2) * float(
            torch.erfinv(torch.tensor(level, dtype=torch.float64, device="cpu"))
        )
        _, p, n, *_ = self._merges
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
        return Interval(np.maximum(middle - half, 0), np.minimum(middle + half, 1))

    @property
    def linkage(self) -> np.ndarray:
        """Linkage matrix of :mod:`scipy.cluster.hierarchy` [M, 4]; distances are 1 - heights.

        Leaf i is component ``leaves[i]``; merge m forms the group numbered ``len(leaves) + m``.
        """
        total = len(self.leaves)
        name, size = np.arange(total), np.ones(total)
        rows = np.zeros((total - 1, 4))
        for merge, ((a, b), height) in enumerate(zip(self._merges[0], self.heights, strict=True)):
            size[a] += size[b]
            rows[merge] = *sorted((name[a], name[b])), 1 - height, size[a]
            name[a] = total + merge
        return rows

    def dendrogram(self, of_component: Tensor) -> dict[str, Any]:
        """Return the tree of clusters in the form of :func:`scanpy.tl.dendrogram`, for its plots.

        Parameters
        ----------
        of_component : Tensor [C], int64
            Cluster of each component, from :meth:`cut`.

        Raises
        ------
        ImportError
            If scipy is not installed.
        """
        from scipy.cluster.hierarchy import dendrogram

        clusters = of_component.numpy()[self.leaves]
        total = int(clusters.max()) + 1
        similarity = confusion_of(between(of_component, self.confusion.sums.cpu()))
        names = list(map(str, range(total)))
        joined, size = list(range(total)), [1] * total  # by cluster or group: the group it is in
        rows: list[tuple[float, ...]] = []
        for (a, b), height in zip(self._merges[0], self.heights, strict=True):
            one, other = sorted((joined[clusters[a]], joined[clusters[b]]))
            if one != other:
                size.append(size[one] + size[other])
                rows.append((one, other, 1 - height, size[-1]))
                joined = [len(size) - 1 if group in (one, other) else group for group in joined]
        linkage = np.array(rows).reshape(-1, 4)
        # A single cluster has no tree.
        info = dendrogram(linkage, labels=names, no_plot=True) if rows else {"leaves": [0]}
        order = info["leaves"]
        return {
            "linkage": linkage,
            "categories_ordered": [names[i] for i in order],
            "categories_idx_ordered": order,
            "dendrogram_info": info,
            "linkage_method": "confusion",
            "correlation_matrix": similarity.fill_diagonal_(1).numpy(),
        }

    # --- cuts ---

    def cut(
        self,
        resolution: float | None = None,
        separation: float | None = None,
        n_clusters: int | None = None,
    ) -> Tensor:
        """Return the cluster of every component [C], int64, at one level of the tree.

        Clusters are numbered by the points that their components hold, the largest first.

        Parameters
        ----------
        resolution : float, optional
            At least 0; :data:`RESOLUTION` unless given. It does not divide what has one peak. 0
            leaves the cut to the separation alone.
        separation : float, optional
            In (0, 1); :data:`SEPARATION` unless given. The finer of both cuts is taken. Of its
            groups, one that keeps less than three quarters of its points' probability joins the one
            that it shares most with.
        n_clusters : int, optional
            Number of clusters, instead of both; at most the number of components that hold points.

        Raises
        ------
        ValueError
            If a value is outside its range, or ``n_clusters`` is not the only one.
        """
        merges = self._number_of_merges(resolution, separation, n_clusters)
        group = np.arange(len(self.leaves))
        for a, b in self._merges[0][:merges]:
            group[group == b] = a
        if n_clusters is None and resolution != 0:
            group = self._with_shares(np.unique(group, return_inverse=True)[1])
        counts = self.confusion.counts.cpu().numpy()[self.leaves]
        groups, inverse = np.unique(group, return_inverse=True)
        held = np.bincount(inverse, counts, len(groups))
        return torch.from_numpy(ranks_by_size(held)[inverse][self._leaf_of])

    def _number_of_merges(
        self, resolution: float | None, separation: float | None, n_clusters: int | None
    ) -> int:
        pairs, confusion, _, linked, expected = self._merges
        if n_clusters is not None:
            if resolution is not None or separation is not None:
                raise ValueError("n_clusters must be given without resolution and separation")
            most = len(self.leaves)
            if isinstance(n_clusters, bool) or not isinstance(n_clusters, (int, np.integer)):
                raise ValueError(f"n_clusters must be an integer, but is {n_clusters!r}")
            if not 1 <= n_clusters <= most:
                raise ValueError(
                    f"n_clusters must be from 1 to {most}, the components that hold points, "
                    f"but is {n_clusters}"
                )
            return len(pairs) + 1 - int(n_clusters)
        resolution = RESOLUTION if resolution is None else resolution
        separation = SEPARATION if separation is None else separation
        if not 0 <= _as_float(resolution) < math.inf:
            raise ValueError(f"resolution must be at least 0 and finite, but is {resolution!r}")
        if not 0 < _as_float(separation) < 1:
            raise ValueError(f"separation must be in (0, 1), but is {separation!r}")
        by_separation = int((self.heights > separation).sum())
        if resolution == 0:
            return by_separation
        one_peak = int(max(np.flatnonzero(confusion > ONE_PEAK), default=-1)) + 1
        modularity = np.cumsum([0, *(linked - resolution * expected)])[one_peak:]
        finest = int((modularity > modularity.max() - 1e-9).argmax())  # the finest of equal cuts
        return min(by_separation, one_peak + finest)

    def _with_shares(self, group: np.ndarray) -> np.ndarray:
        """Merge groups of leaves until each keeps its share of its own points.

        Those that have merged may have one peak with another: then they merge, too.
        """
        of_leaf = torch.from_numpy(group)
        of_component = of_leaf[torch.from_numpy(self._leaf_of)]
        shared = between(of_component, self.confusion.sums.cpu()).numpy()
        changed = False
        while len(shared) > 1:
            mass = shared.sum(1)
            own = shared.diagonal() / mass
            others = shared - np.diag(shared.diagonal())
            rate = others / np.minimum(mass[:, None], mass)
            if own.min() < OWN_SHARE:
                a = int(own.argmin())
                b = int(others[a].argmax())
            elif changed and rate.max() > ONE_PEAK:
                a, b = divmod(int(rate.argmax()), len(rate))
            else:
                break
            a, b, changed = min(a, b), max(a, b), True
            shared[a] += shared[b]
            shared[:, a] += shared[:, b]
            shared = np.delete(np.delete(shared, b, 0), b, 1)
            group = np.where(group == b, a, group)
            group = group - (group > b)
        return group


def between(of_component: Tensor, sums: Tensor) -> Tensor:
    """Return what clusters share with each other [G, G], given what components share [C, C]."""
    member = torch.nn.functional.one_hot(of_component).double()
    return member.mT @ sums.double() @ member


def confusion_of(sums: Tensor) -> Tensor:
    """Return the confusion of each pair of groups, given what they share [G, G]."""
    mass = sums.sum(1)
    return (sums / torch.minimum(mass[:, None], mass)).clamp(max=1)


def ranks_by_size(sizes: Any) -> np.ndarray:
    """Return the rank of each group [G]: 0 for the largest; equal ones keep their order."""
    return np.argsort(np.argsort(-np.asarray(sizes), kind="stable"))


def _as_float(value: Any) -> float:
    """Return a number as a float, and NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def parts_of(points: Tensor | Iterable[Tensor], components: Components) -> Iterable[Tensor]:
    """Yield points in parts of at most :data:`CHUNK`, without empty ones."""
    width = components.latent_dim
    for batch in (points,) if isinstance(points, Tensor) else points:
        if not isinstance(batch, Tensor) or batch.ndim != 2 or batch.shape[1] != width:
            what = list(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(
                f"points must be a tensor [N, {width}] or an iterable of such, but one is {what}"
            )
        yield from (part for part in batch.split(CHUNK) if len(part))
