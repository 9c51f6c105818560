"""Clusters: groups of components whose points the mixture cannot tell apart.

A component is a Gaussian; a class is not, and takes several. With the responsibilities r_i(c) of
points i (the softmax of the expected log-joint, summed over a component's pseudo-inputs), all that
follows is read off one matrix of sums over points,

    S[a, b] = sum_i r_i(a) r_i(b),    N_a = sum_b S[a, b] = sum_i r_i(a)

Sums over points add up over batches, files and processes; a group of components has the sums of
its components. So the whole tree of merges needs no second look at the data.

    confusion(a, b) = S[a, b] / min(N_a, N_b)

is the probability that a point of the smaller group is taken for one of the larger group. (The
point is drawn by its responsibilities, and so is what it is taken for.) The tree merges the most
confused pair until one group is left. Heights of its branches are the least confusion so far, which
never rises; a pair that has merged may be more confused with a third group than the two were.

(Directly estimated misclassification probabilities: Hennig 2010, "Methods for merging Gaussian
mixture components", Advances in Data Analysis and Classification 4. An entropy version: Baudry,
Raftery, Celeux, Lo & Gottardo 2010, "Combining mixture components for clustering", Journal of
Computational and Graphical Statistics 19. Modularity: Newman & Girvan 2004; its resolution:
Reichardt & Bornholdt 2006.)

The tree is cut by

    resolution    the level with the largest modularity of S without its diagonal,
                  sum_g [ S_gg / T - resolution (S_g. / T)^2 ]; T the sum of all. It does not depend
                  on how crisp the mixture is, and is what users of Leiden know: more gives more
                  clusters.
    separation    no pair that is less confused than this is merged
    n_clusters    merge until so many are left

Resolution and separation hold both, each with a default: modularity alone takes two classes for one
that have more to do with each other than with any third, however rarely they are confused. Groups
that are confused by more than 0.22 are one cluster whatever the resolution: so much are two equal
Gaussians two standard deviations apart, and closer ones have a single peak together. A resolution
of 0 leaves the cut to the separation alone.

Limits: a cluster is a union of components, so it is never finer than these. Confusion is measured
on the points given, with the mixture that was trained on them, and training decides how crisp that
is. Modularity compares pairs with all confusion that there is: where nearly all is within one
class, the resolution divides that class.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vmm_fast.inference.processes import sum_over_processes
from vmm_fast.mixture import Assignment, Components

__all__ = [
    "RESOLUTION",
    "SEPARATION",
    "ClusterTree",
    "Clusters",
    "Confusion",
    "Interval",
    "find_clusters",
]

RESOLUTION, SEPARATION = 2.0, 0.02
# Confusion of N(-1, 1) and N(1, 1), the farthest apart that have one peak together.
ONE_PEAK = 0.2248
CHUNK = 16_384  # points whose responsibilities are in memory at once
LEAST_SHARED = 20  # with fewer points shared between components, the shares are mostly noise


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
    counts : Tensor [C], int64
        Points whose most probable component this is.
    """

    sums: Tensor
    counts: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, components: Components, points: Tensor | Iterable[Tensor]) -> Confusion:
        """Return the sums over points, in one pass and with memory for the sums alone.

        Parameters
        ----------
        components : Components
        points : Tensor [N, D] or iterable of Tensor [B, D]

        Returns
        -------
        Confusion
            The sums over this process's points; see :meth:`over_processes` for all.
        """
        count, device = components.num_components, components.centers.device
        sums = torch.zeros(count, count, dtype=torch.float64, device=device)
        counts = torch.zeros(count, dtype=torch.int64, device=device)
        for part in _parts(points, components):
            shared = components.responsibilities(part).double()
            sums += shared.mT @ shared
            counts += shared.argmax(1).bincount(minlength=count)
        return cls(sums, counts)

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
        z = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
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
            "correlation_matrix": self._similarity(of_component, total),
        }

    def _similarity(self, of_component: Tensor, total: int) -> np.ndarray:
        """Confusion between each pair of clusters [G, G]."""
        member = np.eye(total)[of_component.numpy()]
        sums = member.T @ self.confusion.sums.cpu().numpy() @ member
        mass = sums.sum(1)
        found: np.ndarray = np.minimum(sums / np.minimum(mass[:, None], mass), 1)
        np.fill_diagonal(found, 1)
        return found

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
            At least 0; :data:`RESOLUTION` unless given. It does not divide what has one peak.
        separation : float, optional
            In (0, 1); :data:`SEPARATION` unless given. The finer of both cuts is taken.
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
        counts = self.confusion.counts.cpu().numpy()[self.leaves]
        groups, inverse = np.unique(group, return_inverse=True)
        held = np.bincount(inverse, counts, len(groups))
        number = np.empty(len(groups), dtype=int)
        number[np.argsort(-held, kind="stable")] = np.arange(len(groups))
        return torch.from_numpy(number[inverse][self._leaf_of])

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


@dataclass(frozen=True, eq=False)
class Clusters:
    """A mixture whose components are grouped into clusters, to which it can assign points.

    Parameters
    ----------
    components : Components
    of_component : Tensor [C], int64
        Cluster of each component, numbered from 0 without a gap.
    """

    components: Components
    of_component: Tensor

    def __repr__(self) -> str:
        count = self.components.num_components
        return f"{type(self).__name__}({self.num_clusters} of {count} components)"

    def __post_init__(self) -> None:
        count, of = self.components.num_components, self.of_component
        if not isinstance(of, Tensor) or of.dtype != torch.int64:
            kind = of.dtype if isinstance(of, Tensor) else type(of).__name__
            raise TypeError(f"of_component must be an int64 tensor, but is {kind}")
        if of.shape != (count,) or len(of.unique()) != int(of.max()) + 1 or of.min() < 0:
            raise ValueError(
                f"of_component must number the clusters of {count} components from 0 on, "
                f"but is {of.tolist()}"
            )

    @property
    def num_clusters(self) -> int:
        """G, the number of clusters."""
        return int(self.of_component.max()) + 1

    @torch.no_grad()
    def probabilities(self, z: Tensor) -> Tensor:
        """Return the probability of each cluster [B, G]: the sum over its components."""
        return self.sums(self.components.responsibilities(z))

    def sums(self, shared: Tensor) -> Tensor:
        """Sum responsibilities [B, C] over each cluster's components [B, G]."""
        out = shared.new_zeros(len(shared), self.num_clusters)
        out.index_add_(1, self.of_component.to(shared.device), shared)
        return out.clamp_(max=1)  # rounding may bring a sum above 1

    @torch.no_grad()
    def assign(self, z: Tensor) -> Assignment:
        """Return each point's most probable cluster, its probability, and the entropy over all."""
        rows, device = len(z), self.components.centers.device
        labels = torch.empty(rows, dtype=torch.int64, device=device)
        # Written in place: small results allocated between large blocks would keep the freed memory
        # from being returned.
        top, entropy = (self.components.centers.new_empty(rows) for _ in range(2))
        for start in range(0, rows, CHUNK):
            here = slice(start, start + CHUNK)
            probabilities = self.probabilities(z[here])
            top[here], labels[here] = probabilities.max(1)
            entropy[here] = torch.special.entr(probabilities).sum(1)
        return Assignment(labels, top, entropy)

    @torch.no_grad()
    def sample(self, n: int, cluster: int) -> Tensor:
        """Draw points [n, D] from one cluster, choosing its components by their weights."""
        whole = isinstance(cluster, (int, np.integer)) and not isinstance(cluster, bool)
        if not whole or not 0 <= cluster < self.num_clusters:
            raise ValueError(f"cluster must be in 0 .. {self.num_clusters - 1}, but is {cluster}")
        logits = self.components.log_weights.detach()  # weights may underflow
        inside = self.of_component.to(logits.device) == cluster
        own = logits.where(inside, -math.inf).softmax(0)
        return self.components.sample(n, own.multinomial(max(n, 1), replacement=True)[:n])


def find_clusters(
    components: Components,
    points: Tensor | Iterable[Tensor],
    *,
    tree: ClusterTree | None = None,
    resolution: float | None = None,
    separation: float | None = None,
    n_clusters: int | None = None,
) -> Clusters:
    """Group a mixture's components into clusters by the points that they share.

    Every cluster holds points: one that is no point's most probable cluster is merged into another.
    If no cut has ``n_clusters`` clusters that hold points, there are fewer and a warning says so.

    Parameters
    ----------
    components : Components
    points : Tensor [N, D] or iterable of Tensor [B, D]
        For instance posterior means. An iterable is read several times, so it must be repeatable.
    tree : ClusterTree, optional
        Tree of these components and of all points. If absent, it is built from the points of all
        processes of ``torch.distributed``, and each of them must call this function.
    resolution, separation, n_clusters
        Where to cut; see :meth:`ClusterTree.cut`.
    """
    if not isinstance(points, Tensor) and iter(points) is points:
        raise ValueError("points must be repeatable, such as a list of tensors, but is an iterator")
    everywhere = tree is None
    if tree is None:
        confusion = Confusion.of(components, points).over_processes()
        if not confusion.counts.any():
            raise ValueError("points must hold at least one point, but are empty")
        tree = ClusterTree(confusion)
    elif len(tree.confusion.counts) != components.num_components:
        raise ValueError(
            f"tree must be of these {components.num_components} components, "
            f"but is of {len(tree.confusion.counts)}"
        )
    if n_clusters is None:
        of_component = tree.cut(resolution, separation)
        return _that_hold_points(components, of_component, points, tree, everywhere)
    tree.cut(resolution, separation, n_clusters)  # raises an error for a wrong argument
    found: Clusters | None = None
    # Some clusters of a cut may hold no points; then a finer cut has the number asked for.
    for level in range(n_clusters, len(tree.leaves) + 1):
        of_component = tree.cut(n_clusters=level)
        finer = _that_hold_points(components, of_component, points, tree, everywhere)
        if found is None or finer.num_clusters <= n_clusters:
            found = finer
        if finer.num_clusters >= n_clusters:
            break
    while finer.num_clusters > n_clusters:  # one level added several that hold points
        for of_component in _merged(finer.of_component, tree.confusion.sums.cpu()):
            coarser = _that_hold_points(components, of_component, points, tree, everywhere)
            if coarser.num_clusters == finer.num_clusters - 1:
                break
        else:
            break
        finer = coarser
        if finer.num_clusters == n_clusters:
            found = finer
    assert found is not None
    if found.num_clusters != n_clusters:
        warnings.warn(
            f"n_clusters is {n_clusters}, but {found.num_clusters} were found: the others would "
            "hold no points",
            stacklevel=2,
        )
    return found


def _that_hold_points(
    components: Components,
    of_component: Tensor,
    points: Tensor | Iterable[Tensor],
    tree: ClusterTree,
    everywhere: bool,
) -> Clusters:
    """Merge clusters that are no point's most probable one; number the rest, the largest first."""
    while True:
        found = Clusters(components, of_component)
        device = components.centers.device  # processes sum tensors on this device
        held = torch.zeros(found.num_clusters, dtype=torch.int64, device=device)
        own = torch.zeros_like(tree.confusion.counts, device=device)
        sums: Tensor | None = None  # of the first points, enough to compare with the tree's
        for part in _parts(points, components):
            shared = components.responsibilities(part)
            if sums is None and not everywhere:
                sums = (shared.double().mT @ shared.double()).detach().cpu()
            held += found.sums(shared).argmax(1).bincount(minlength=len(held))
            own += shared.argmax(1).bincount(minlength=len(own))
        if everywhere:
            sum_over_processes([held])
        else:
            _check_points(own.cpu(), sums, tree.confusion)
        held = held.cpu()
        if not held.any():
            raise ValueError("points must hold at least one point, but are empty")
        if held.all() or len(held) == 1:
            break
        of_component = _without(int(held.argmin()), of_component, tree.confusion.sums.cpu())
    number = torch.empty_like(held)
    number[held.argsort(descending=True, stable=True)] = torch.arange(len(held))
    return Clusters(components, number[of_component])


def _check_points(own: Tensor, sums: Tensor | None, confusion: Confusion) -> None:
    """Raise ValueError if the components hold or share points very differently from the tree's."""
    counts = confusion.counts.cpu()
    elsewhere = {
        "in other components": float((own / own.sum() - counts / counts.sum()).abs().sum() / 2)
    }
    if sums is not None:
        between = [(x - x.diagonal().diag()) for x in (sums, confusion.sums.cpu().double())]
        if min(float(x.sum()) for x in between) > LEAST_SHARED:
            one, other = (x / x.sum() for x in between)
            elsewhere["between other components"] = float((one - other).abs().sum() / 2)
    for where, share in elsewhere.items():
        if share > 0.5:  # False for NaN, the share if there are no points
            raise ValueError(
                "tree must be of these components and points, but is of others: it has "
                f"{share:.0%} of the points {where}"
            )


def _as_float(value: Any) -> float:
    """Return a number as a float, and NaN for anything else."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return float(value) if number else math.nan


def _without(empty: int, of_component: Tensor, sums: Tensor) -> Tensor:
    """Return the clusters with one of them merged into the cluster that it shares most with."""
    member = torch.nn.functional.one_hot(of_component).double()
    shared = (member.mT @ sums @ member)[empty]
    shared[empty] = -1
    joined = of_component.where(of_component != empty, shared.argmax())
    return joined - (joined > empty).long()


def _merged(of_component: Tensor, sums: Tensor) -> Iterator[Tensor]:
    """Yield the clusters with one pair merged, for each pair in turn, the most confused first."""
    member = torch.nn.functional.one_hot(of_component).double()
    shared = member.mT @ sums @ member
    mass = shared.sum(1)
    rate = shared / torch.minimum(mass[:, None], mass)
    pairs = torch.triu_indices(len(rate), len(rate), 1).T
    order = rate[pairs[:, 0], pairs[:, 1]].argsort(descending=True, stable=True)
    for a, b in pairs[order].tolist():
        joined = of_component.where(of_component != b, a)
        yield joined - (joined > b).long()


def _parts(points: Tensor | Iterable[Tensor], components: Components) -> Iterable[Tensor]:
    """Yield points in parts of at most :data:`CHUNK`, without empty ones."""
    width = components.latent_dim
    for batch in (points,) if isinstance(points, Tensor) else points:
        if not isinstance(batch, Tensor) or batch.ndim != 2 or batch.shape[1] != width:
            what = list(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(
                f"points must be a tensor [N, {width}] or an iterable of such, but one is {what}"
            )
        yield from (part for part in batch.split(CHUNK) if len(part))
