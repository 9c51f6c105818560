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
    separation    no pair that is less confused than this is merged, but for the last step below
    n_clusters    merge until so many are left

Resolution and separation hold both, each with a default: modularity alone takes two classes for one
that have more to do with each other than with any third, however rarely they are confused. Groups
that are confused by more than 0.22 are one cluster whatever the resolution: so much are two equal
Gaussians two standard deviations apart, and closer ones have a single peak together. Last, a group
that keeps less than three quarters of its points' probability, S_gg / N_g, joins the one that it
shares most with: where many components divide one Gaussian, each pair is confused little, but a
component with all others together a lot. A resolution of 0 leaves the cut to the separation alone.

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
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vmm_fast.clusters.tree import (
    CHUNK,
    ONE_PEAK,
    RESOLUTION,
    SEPARATION,
    ClusterTree,
    Confusion,
    Interval,
    between,
    confusion_of,
    parts_of,
    ranks_by_size,
)
from vmm_fast.inference.processes import sum_over_processes
from vmm_fast.mixture import Assignment, Components

__all__ = [
    "ONE_PEAK",
    "RESOLUTION",
    "SEPARATION",
    "ClusterTree",
    "Clusters",
    "Confusion",
    "Interval",
    "clusters_of_cut",
    "find_clusters",
    "order_by_size",
]

MOST_KEPT = 1 << 24  # responsibilities that are kept: 64 MiB in float32
PAIRS = 256  # pairs of clusters, the most confused first, that are tried for one merge
LEAST_SHARED = 20  # with fewer points shared between components, the shares are mostly noise


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
        dtype = torch.promote_types(z.dtype, self.components.centers.dtype)
        top, entropy = (torch.empty(rows, dtype=dtype, device=device) for _ in range(2))
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


@torch.no_grad()
def find_clusters(
    components: Components,
    points: Tensor | Iterable[Tensor],
    *,
    weights: Tensor | None = None,
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
    weights : Tensor [N], float64, optional
        How many points each counts as, in the order in which they are read.
    tree : ClusterTree, optional
        Tree of these components and of all points. If absent, it is built from the points of all
        processes of ``torch.distributed``, and each of them must call this function.
    resolution, separation, n_clusters
        Where to cut; see :meth:`ClusterTree.cut`.

    Examples
    --------
    >>> from vmm_fast import Components
    >>> centers = torch.tensor([[-4.0], [-3.5], [4.0]])
    >>> components = Components(centers, torch.full((3,), 1 / 3).log(), torch.ones(3, 1, 1))
    >>> clusters = find_clusters(components, torch.cat([centers - 0.5, centers + 0.5]))
    >>> clusters
    Clusters(2 of 3 components)
    >>> clusters.of_component
    tensor([0, 0, 1])
    >>> clusters.assign(torch.tensor([[3.0]])).labels
    tensor([1])
    """
    if not isinstance(points, Iterable):
        kind = type(points).__name__
        raise TypeError(f"points must be a tensor or an iterable of tensors, but is {kind}")
    if not isinstance(points, Tensor) and iter(points) is points:
        raise ValueError("points must be repeatable, such as a list of tensors, but is an iterator")
    shares = _Shares(components, points, weights, check=tree, over_processes=tree is None)
    if tree is None:
        confusion = Confusion.of(components, points, weights).over_processes()
        if not confusion.counts.any():
            raise ValueError("points must hold at least one point, but are empty")
        tree = ClusterTree(confusion)
    elif len(tree.confusion.counts) != components.num_components:
        raise ValueError(
            f"tree must be of these {components.num_components} components, "
            f"but is of {len(tree.confusion.counts)}"
        )
    return _of_cut(tree, shares, resolution, separation, n_clusters)


@torch.no_grad()
def clusters_of_cut(
    tree: ClusterTree,
    components: Components,
    points: Iterable[Tensor],
    weights: Tensor | None,
    **cut: Any,
) -> Clusters:
    """Return :func:`find_clusters` of a tree whose sums are not those of `points` as they are."""
    return _of_cut(tree, _Shares(components, points, weights), **cut)


def _of_cut(
    tree: ClusterTree,
    shares: _Shares,
    resolution: float | None,
    separation: float | None,
    n_clusters: int | None,
) -> Clusters:
    cut = tree.cut(resolution, separation, n_clusters)
    if n_clusters is None:
        return _that_hold_points(cut, shares, tree)
    found = _of_number(n_clusters, shares, tree)
    if found.num_clusters != n_clusters:
        warnings.warn(
            f"n_clusters is {n_clusters}, but {found.num_clusters} were found: the others would "
            "hold no points",
            stacklevel=4,  # past find_clusters and torch.no_grad
        )
    return found


class _Shares:
    """Responsibilities of points in parts, kept if they are few: a cut may need them many times.

    The first pass checks that a tree is of these points. With ``over_processes`` the other
    processes make the same passes.
    """

    def __init__(
        self,
        components: Components,
        points: Tensor | Iterable[Tensor],
        weights: Tensor | None,
        check: ClusterTree | None = None,
        over_processes: bool = False,
    ):
        self.components, self.points, self.weights = components, points, weights
        self.over_processes, self._tree = over_processes, check
        self._kept: list[tuple[Tensor, Tensor | None]] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield responsibilities and weights."""
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[tuple[Tensor, Tensor | None]] = []
        total = read = 0
        own = torch.zeros(self.components.num_components, dtype=torch.int64, device="cpu")
        sums: Tensor | None = None  # of the first points, enough to compare with the tree's
        for part in parts_of(self.points, self.components):
            shared = self.components.responsibilities(part)
            weights = None if self.weights is None else self.weights[read : read + len(part)]
            read += len(part)
            if self._tree is not None:
                found = Confusion.of_shares(shared, weights)
                own = own + found.counts.cpu()
                sums = found.sums.cpu() if sums is None else sums
            total += shared.numel()
            kept = [*kept, (shared, weights)] if total <= MOST_KEPT else []
            yield shared, weights
        if total <= MOST_KEPT:
            self._kept = kept
        if self._tree is not None:
            _check_points(own, sums, self._tree.confusion)
            self._tree = None

    def held(self, clusters: Clusters) -> tuple[Tensor, bool]:
        """Return how many points each cluster holds, and whether a point lies between two."""
        device = self.components.centers.device  # processes sum tensors on this device
        held = torch.zeros(clusters.num_clusters + 1, dtype=torch.int64, device=device)
        for shared, weights in self:
            probabilities = clusters.sums(shared)
            top, label = probabilities.max(1)
            held = held + label.bincount(weights, minlength=len(held))
            held[-1] += (probabilities == top[:, None]).sum() - len(label)
        if self.over_processes:
            sum_over_processes([held])
        held = held.cpu()
        if not held[:-1].any():
            raise ValueError("points must hold at least one point, but are empty")
        return held[:-1], bool(held[-1])


def _of_number(n_clusters: int, shares: _Shares, tree: ClusterTree) -> Clusters:
    """Return so many clusters that hold points, or fewer if no such cut is found."""
    best: Clusters | None = None
    # Some clusters of a cut may hold no points; then a finer cut has the number asked for.
    for level in range(n_clusters, len(tree.leaves) + 1):
        of_component = tree.cut(n_clusters=level)
        held, _ = shares.held(Clusters(shares.components, of_component))
        # Merging those without points seldom makes more clusters than hold points now.
        if best is not None and held.count_nonzero() <= min(best.num_clusters, n_clusters - 1):
            continue
        finer = _that_hold_points(of_component, shares, tree)
        if best is None or best.num_clusters < finer.num_clusters <= n_clusters:
            best = finer
        if finer.num_clusters >= n_clusters:
            break
    assert best is not None
    while finer.num_clusters > n_clusters:  # one level added several that hold points
        for of_component in islice(_merged(finer.of_component, tree.confusion.sums.cpu()), PAIRS):
            if shares.held(Clusters(shares.components, of_component))[0].all():
                coarser = _that_hold_points(of_component, shares, tree)
                if coarser.num_clusters == finer.num_clusters - 1:
                    break
        else:
            return best
        finer = coarser
        if finer.num_clusters == n_clusters:
            best = finer
    return best


def _that_hold_points(of_component: Tensor, shares: _Shares, tree: ClusterTree) -> Clusters:
    """Merge clusters that are no point's most probable one; number the rest, the largest first."""
    rounds = 0
    while True:
        found = Clusters(shares.components, of_component)
        held, between_two = shares.held(found)
        if not held.all():
            of_component = _without(int(held.argmin()), of_component, tree.confusion.sums.cpu())
            continue
        ranks = torch.from_numpy(ranks_by_size(held))
        if (ranks.diff() > 0).all() or rounds == len(held):
            return found
        of_component, rounds = ranks[of_component], rounds + 1
        if not between_two:
            return Clusters(shares.components, of_component)
        # A point between two clusters belongs to the lower number: they hold others now.


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


def order_by_size(components: Components, counts: Tensor) -> Tensor:
    """Return the components (K = 1) with the most points first; ties are in order of weight."""
    weights = components.log_weights.detach().cpu()
    return torch.from_numpy(np.lexsort((-weights.numpy(), -counts.cpu().numpy())))


def _without(empty: int, of_component: Tensor, sums: Tensor) -> Tensor:
    """Return the clusters with one of them merged into the cluster that it shares most with."""
    shared = between(of_component, sums)[empty]
    shared[empty] = -1
    joined = of_component.where(of_component != empty, shared.argmax())
    return joined - (joined > empty).long()


def _merged(of_component: Tensor, sums: Tensor) -> Iterator[Tensor]:
    """Yield the clusters with one pair merged, for each pair in turn, the most confused first."""
    rate = confusion_of(between(of_component, sums))
    pairs = torch.triu_indices(len(rate), len(rate), 1).T
    order = rate[pairs[:, 0], pairs[:, 1]].argsort(descending=True, stable=True)
    for a, b in pairs[order].tolist():
        joined = of_component.where(of_component != b, a)
        yield joined - (joined > b).long()
