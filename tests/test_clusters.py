"""Clusters are groups of components that share points, at any level of one tree."""

import itertools
import math
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, is_valid_linkage
from scipy.stats import binomtest
from torch.distributions import Normal

import vmm_fast
from vmm_fast import Components
from vmm_fast.clusters import ONE_PEAK, Clusters, ClusterTree, Confusion, find_clusters
from vmm_fast.clusters.tree import OWN_SHARE

# Two classes of two components each, whose centers are 2 apart, and one component by itself.
CENTERS = torch.tensor([[0.0, 0.0], [2.0, 0.0], [20.0, 0.0], [20.0, 2.0], [0.0, 30.0]])
CLASSES = [0, 0, 1, 1, 2]


def mixture(centers=CENTERS, weights=None):
    count, dim = centers.shape
    weights = torch.ones(count) if weights is None else torch.tensor(weights)
    return Components(
        centers, (weights / weights.sum()).log(), torch.eye(dim).expand(count, -1, -1)
    )


def overlapping(count=12, points=600, seed=0):
    """Return random components and points drawn from them."""
    torch.manual_seed(seed)
    components = mixture(3 * torch.randn(count, 2), (torch.rand(count) + 0.5).tolist())
    return components, components.sample(points)


class Shares:
    """A stand-in for a mixture: a point is the row number of given responsibilities."""

    def __init__(self, rows):
        self.rows = torch.tensor(rows)
        self.num_components = self.rows.shape[1]
        self.centers = self.rows
        self.latent_dim = 1

    def responsibilities(self, z):
        return self.rows[z[:, 0].long()]

    @property
    def points(self):
        return torch.arange(len(self.rows))[:, None].float()


def groups(of_component):
    return {frozenset(np.flatnonzero(of_component == k)) for k in range(max(of_component) + 1)}


def levels(confusion):
    """By the definition: groups of components at every level, and the confusion that led there.

    Also the number of merges up to the last of groups with one peak together.
    """
    sums = confusion.sums.numpy()
    parts = [frozenset([c]) for c in range(len(sums))]

    def shared(a, b):
        return sums[np.ix_(sorted(a), sorted(b))].sum()

    def mass(a):
        return sums[sorted(a)].sum()

    found = [(set(parts), 1.0)]
    one_peak = 0
    while len(parts) > 1:
        rates = {
            (a, b): shared(a, b) / min(mass(a), mass(b))
            for a, b in itertools.combinations(parts, 2)
        }
        a, b = max(rates, key=rates.get)
        parts = [part for part in parts if part not in (a, b)] + [a | b]
        found.append((set(parts), min(found[-1][1], rates[a, b])))
        if rates[a, b] > ONE_PEAK:
            one_peak = len(found) - 1
    return found, one_peak


def with_shares(parts, sums, own_share):
    """By the definition: groups of which each keeps a share of its own points."""
    parts, changed = set(parts), False
    while len(parts) > 1:
        member = {part: sums[sorted(part)].sum(0) for part in parts}
        shared = {(a, b): member[a][sorted(b)].sum() for a in parts for b in parts}
        mass = {part: member[part].sum() for part in parts}
        own = {part: shared[part, part] / mass[part] for part in parts}
        pairs = itertools.permutations(parts, 2)
        rates = {(a, b): shared[a, b] / min(mass[a], mass[b]) for a, b in pairs}
        a = min(own, key=own.get)
        if own[a] < own_share:
            b = max(parts - {a}, key=lambda part: shared[a, part])
        elif changed and max(rates.values()) > ONE_PEAK:
            a, b = max(rates, key=rates.get)
        else:
            break
        parts, changed = parts - {a, b} | {a | b}, True
    return parts


def modularity(parts, sums, resolution):
    weights = sums.numpy() * (1 - np.eye(len(sums)))
    total, degree = weights.sum(), weights.sum(1)
    return sum(
        weights[np.ix_(sorted(part), sorted(part))].sum() / total
        - resolution * (degree[sorted(part)].sum() / total) ** 2
        for part in parts
    )


# --- sums over points ---


def test_sums_are_of_all_points_whatever_their_batches():
    components, z = overlapping()
    shared = components.responsibilities(z).double()
    whole = Confusion.of(components, z)
    torch.testing.assert_close(whole.sums, torch.einsum("ia,ib->ab", shared, shared))
    assert torch.equal(whole.counts, shared.argmax(1).bincount(minlength=12))
    batches = Confusion.of(components, iter(z.split(64)))
    halves = Confusion.of(components, z[:150]).plus(Confusion.of(components, z[150:]))
    for other in (batches, halves, whole.over_processes()):
        torch.testing.assert_close(other.sums, whole.sums)
        assert torch.equal(other.counts, whole.counts)


# --- the tree ---


@pytest.mark.parametrize("own_share", [0.0, 0.4, OWN_SHARE])
@pytest.mark.parametrize("seed", range(2))
def test_the_tree_merges_the_most_confused_pair(seed, own_share, monkeypatch):
    monkeypatch.setattr("vmm_fast.clusters.tree.OWN_SHARE", own_share)
    components, z = overlapping(seed=seed)
    confusion = Confusion.of(components, z)
    assert confusion.counts.all()
    tree, (expected, one_peak) = ClusterTree(confusion), levels(confusion)

    def coarse_enough(parts):
        return with_shares(parts, confusion.sums.numpy(), own_share)

    np.testing.assert_allclose(tree.heights, [height for _, height in expected[1:]], rtol=1e-12)
    for parts, _ in expected:
        assert groups(tree.cut(n_clusters=len(parts)).numpy()) == parts
    least = 1e-12  # as good as no separation
    for resolution in (0.1, 0.5, 1, 2, 5):
        best = max(
            (p for p, _ in expected[one_peak:]),
            key=lambda p: modularity(p, confusion.sums, resolution),
        )
        found = groups(tree.cut(resolution=resolution, separation=least).numpy())
        assert found == coarse_enough(best)
    for separation in (0.01, 0.05, 0.2, 0.9):
        last = [parts for parts, height in expected if height > separation][-1]
        assert groups(tree.cut(resolution=0, separation=separation).numpy()) == last
        both = groups(tree.cut(separation=separation, resolution=5).numpy())
        assert both == coarse_enough(max(last, best, key=len))
    default = tree.cut(resolution=2, separation=0.02)
    for cut in ({}, {"resolution": 2}, {"separation": 0.02}):
        assert torch.equal(tree.cut(**cut), default)


def test_scipy_draws_and_cuts_the_tree():
    components, z = overlapping()
    tree = ClusterTree(Confusion.of(components, z))
    assert is_valid_linkage(tree.linkage)
    for separation in (0.05, 0.3):
        theirs = fcluster(tree.linkage, 1 - separation - 1e-12, "distance") - 1
        assert groups(theirs) == groups(tree.cut(resolution=0, separation=separation).numpy())
    assert tree.linkage[-1, 3] == 12


def test_components_that_divide_one_gaussian_are_one_cluster():
    # Each shares half of its points, evenly with the others of its kind, and few with another.
    kinds = torch.arange(60) // 30
    sums = torch.where(kinds[:, None] == kinds, 0.5 / 29, 0.0).double()
    sums.fill_diagonal_(0.5)
    tree = ClusterTree(Confusion(100 * sums, torch.full((60,), 100)))
    assert tree.heights.max() < 0.02
    assert torch.equal(tree.cut(), kinds)
    assert int(tree.cut(resolution=0).max()) == 59


def test_one_diffuse_component_merges_no_others():
    # Fifty pairs that are confused by 1 %, and a component that shares a little with all of them.
    sums = 98.7 * torch.eye(101).double()
    pairs = torch.arange(100).reshape(50, 2)
    sums[pairs[:, 0], pairs[:, 1]] = sums[pairs[:, 1], pairs[:, 0]] = 1.0
    sums[100, :100] = sums[:100, 100] = 0.3
    sums[100, 100] = 70.0
    tree = ClusterTree(Confusion(sums, torch.full((101,), 100)))
    assert int(tree.cut().max()) + 1 == 100


def test_scanpys_dendrogram_is_of_clusters():
    components, z = overlapping()
    tree = ClusterTree(Confusion.of(components, z))
    for count in (12, 5, 1):
        found = tree.cut(n_clusters=count)
        drawn = tree.dendrogram(found)
        assert sorted(drawn["categories_idx_ordered"]) == list(range(count))
        member = np.eye(count)[found.numpy()]
        sums = member.T @ tree.confusion.sums.numpy() @ member
        similarity = sums / np.minimum.outer(sums.sum(1), sums.sum(1))
        np.fill_diagonal(similarity, 1)
        np.testing.assert_allclose(drawn["correlation_matrix"], similarity)
        order = [str(cluster) for cluster in drawn["categories_idx_ordered"]]
        assert drawn["categories_ordered"] == order
        if count > 1:
            assert drawn["dendrogram_info"]["ivl"] == order
        for fewer in range(1, count):
            merged = fcluster(drawn["linkage"], fewer, "maxclust")[found.numpy()] - 1
            if len(set(tree.heights[-fewer:])) == fewer:  # scipy cuts no pairs of one height
                assert groups(merged) == groups(tree.cut(n_clusters=fewer).numpy())


def test_the_interval_is_wilsons():
    row = [[1.0, 0.0]] * 60 + [
        [0.2, 0.8]
    ] * 50  # the second has 40 points and shares 8 with the first
    tree = ClusterTree(Confusion.of(shares := Shares(row), shares.points))
    assert tree.heights == pytest.approx([8 / 40])
    for level in (0.5, 0.95):
        theirs = binomtest(8, 40).proportion_ci(level, method="wilson")
        (low,), (high,) = tree.interval(level)
        assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    with pytest.raises(ValueError, match="level must be in"):
        tree.interval(1)


# --- clusters ---


@pytest.mark.parametrize("cut", [{}, {"separation": 0.02}, {"n_clusters": 3}, {"resolution": 1}])
def test_classes_of_several_components_are_clusters(cut):
    components = mixture(weights=[1.0, 1.0, 2.0, 3.0, 0.5])
    torch.manual_seed(0)
    kind = torch.randint(5, (600,))
    z = components.sample(600, kind)
    found = find_clusters(components, z, **cut)
    labels = found.assign(z).labels
    for c, true in enumerate(CLASSES):
        assert len(labels[kind == c].unique()) == 1, true
    assert groups(found.of_component.numpy()) == groups(np.array(CLASSES))
    counts = labels.bincount()
    assert (counts.diff() <= 0).all()


def test_assignments_are_sums_over_components():
    components, z = overlapping()
    found = find_clusters(components, z, n_clusters=4)
    shared = components.responsibilities(z)
    expected = torch.stack([shared[:, found.of_component == g].sum(1) for g in range(4)], 1)
    probabilities = found.probabilities(z)
    torch.testing.assert_close(probabilities, expected)
    labels, top, entropy = found.assign(z)
    assert torch.equal(labels, expected.argmax(1))
    torch.testing.assert_close(top, expected.max(1).values)
    torch.testing.assert_close(entropy, -(expected * expected.log()).nan_to_num().sum(1))
    assert found.num_clusters == 4 and (labels.bincount(minlength=4).diff() <= 0).all()
    assert [len(column) for column in found.assign(z[:0])] == [0, 0, 0]
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert torch.equal(
            found.assign(z.to(dtype).float()).labels, found.assign(z.to(dtype)).labels
        )
    for points in (z.double(), z.half()):
        labels, top, entropy = found.assign(points)
        probabilities = found.probabilities(points)
        assert top.dtype == entropy.dtype == probabilities.dtype
        assert torch.equal(top, probabilities.max(1).values)
    assert found.assign(z.double()).probability.dtype == torch.float64


def encode(x):
    return Normal(x[:, :2], 0.3 + x[:, 2:].abs())


@pytest.mark.parametrize(
    "make",
    [
        lambda u: vmm_fast.VMMPrior(u, 2),
        lambda u: vmm_fast.VMMPrior(u, 2, pseudo_inputs_per_component=2),
        lambda u: vmm_fast.VampPrior(u, 2),
        lambda u: vmm_fast.GaussianMixturePrior(6, 2, centers=u[:, :2]),
    ],
)
def test_every_prior_has_clusters(make):
    torch.manual_seed(0)
    u = torch.cat([3 * torch.randn(6, 2), torch.ones(6, 2)], 1)
    prior = make(u)
    z = prior.sample(300, encode)
    found = prior.clusters(z, encode, n_clusters=2)
    assert found.num_clusters == 2
    assert not found.components.centers.requires_grad
    assert torch.equal(found.assign(z).labels, found.probabilities(z).argmax(1))
    batches = prior.clusters(z.split(100), encode, n_clusters=2)
    assert torch.equal(batches.of_component, found.of_component)


def test_processes_are_waited_for_only_where_the_tree_is_made(monkeypatch):
    components, z = overlapping()
    tree, summed = ClusterTree(Confusion.of(components, z)), []

    def of_two(tensors):  # the other process has as many points, all alike
        for tensor in tensors:
            tensor.mul_(2)
            summed.append(tensor.shape)

    for module in ("vmm_fast.clusters", "vmm_fast.clusters.tree"):
        monkeypatch.setattr(f"{module}.sum_over_processes", of_two)
    alone = find_clusters(components, z, tree=tree)
    assert summed == []
    together = find_clusters(components, z)
    assert summed == [(12, 12), (12,), (together.num_clusters + 1,)]
    assert torch.equal(together.of_component, alone.of_component)


# --- at the edges ---


def test_groups_with_one_peak_together_are_one_cluster():
    """Whatever else there is, and however many components lie at one place."""
    x = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    a, b = (Normal(m, 1.0).log_prob(x).exp() for m in (-1.0, 1.0))
    assert pytest.approx(float(torch.trapezoid(a * b / (a + b), x)), abs=1e-4) == ONE_PEAK
    torch.manual_seed(0)
    for count in (2, 3, 10, 30):
        near = 0.1 * torch.randn(count, 2)
        alone = mixture(near)
        assert find_clusters(alone, alone.sample(2000)).num_clusters == 1
        components = mixture(torch.cat([near, torch.tensor([[50.0, 0], [0, 50]])]))
        places = torch.tensor([[0.0, 0], [50, 0], [0, 50]])
        z = torch.cat([torch.randn(500, 2) + place for place in places])
        found = components.clusters(z)
        assert found.assign(z).labels.bincount().tolist() == [500, 500, 500]


@pytest.mark.parametrize(("apart", "clusters"), [(1.8, 1), (2.5, 2)])
def test_two_gaussians_are_one_cluster_while_they_have_one_peak(apart, clusters):
    torch.manual_seed(0)
    components = mixture(torch.tensor([[0.0, 0], [apart, 0]]))
    assert components.clusters(components.sample(20_000)).num_clusters == clusters


def test_components_without_points_are_no_clusters():
    components = mixture(
        torch.cat([CENTERS, torch.tensor([[500.0, 0], [0.5, 0.1]])]), [1.0] * 5 + [0, 1e-9]
    )
    torch.manual_seed(0)
    z = mixture().sample(200)
    tree = ClusterTree(Confusion.of(components, z))
    assert list(tree.leaves) == [0, 1, 2, 3, 4]
    found = find_clusters(components, z, tree=tree, n_clusters=5)
    assert found.num_clusters == 5
    assert found.of_component[6] == found.of_component[0]  # shares its points
    assert find_clusters(components, z, separation=0.02).num_clusters == 3


def test_a_cluster_that_is_nowhere_the_most_probable_is_merged_on():
    # Points of component 0 are its own, but two others have more of them as soon as these merge.
    rows = [[0.4, 0.35, 0.25]] * 10 + [[0.0, 0.5, 0.4]] * 10 + [[0.0, 0.3, 0.6]] * 30
    shares = Shares(rows)
    tree = ClusterTree(Confusion.of(shares, shares.points))
    assert groups(tree.cut(n_clusters=2).numpy()) == {frozenset([0]), frozenset([1, 2])}
    merged = find_clusters(shares, shares.points, tree=tree, resolution=0, separation=0.45)
    assert merged.num_clusters == 1
    # There are two all the same, of another pair than that of the tree.
    for number in (2, 3):
        found = find_clusters(shares, shares.points, tree=tree, n_clusters=number)
        assert len(found.assign(shares.points).labels.unique()) == number


def test_clusters_are_numbered_by_the_points_that_they_hold_themselves():
    # By components the last cluster is the largest, by sums the first: it takes the undecided.
    rows = [[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], *[[0.3, 0.31, 0.39]] * 4, *[[0.0, 0.0, 1.0]] * 3]
    shares = Shares(rows)
    tree = ClusterTree(Confusion.of(shares, shares.points))
    assert tree.cut(n_clusters=2).tolist() == [1, 1, 0]
    found = find_clusters(shares, shares.points, tree=tree, n_clusters=2)
    assert found.of_component.tolist() == [0, 0, 1]
    assert found.assign(shares.points).labels.bincount().tolist() == [6, 3]


def test_a_cluster_without_points_joins_the_one_that_it_shares_most_with():
    # The third has the most of no point; it shares .2 with the first and .42 with the second.
    rows = [
        [0.8, 0.0, 0.2, 0.0],
        [0.0, 0.58, 0.42, 0.0],
        [0.0, 0.0, 0.0, 1.0],
        [0.0, 0.0, 0.0, 1.0],
    ]
    shares = Shares([*rows, [1.0, 0.0, 0.0, 0.0]])
    sums = Confusion.of(shares, shares.points).sums
    tree = ClusterTree(Confusion(sums, torch.tensor([2, 1, 1, 2])))  # as if it held one
    found = find_clusters(shares, shares.points, tree=tree, resolution=0, separation=0.9)
    assert groups(found.of_component.numpy()) == {frozenset([0]), frozenset([1, 2]), frozenset([3])}
    with pytest.warns(UserWarning, match="n_clusters is 4, but 3 were found"):
        assert find_clusters(shares, shares.points, tree=tree, n_clusters=4).num_clusters == 3


def test_points_between_two_clusters_leave_neither_without_points():
    # Five lie between both: they belong to the lower number, which is that of the larger cluster.
    rows = [[0.5, 0.25, 0.25]] * 5 + [[0.4, 0.3, 0.3]] * 10
    rows += [[0.0, 0.6, 0.4]] * 5 + [[0.0, 0.4, 0.6]] * 5
    shares = Shares([*rows, [1.0, 0.0, 0.0]])
    found = find_clusters(shares, shares.points, n_clusters=2)
    assert found.of_component.tolist() == [1, 0, 0]
    assert found.assign(shares.points).labels.bincount().tolist() == [25, 1]
    shares = Shares(rows)  # the smaller one would have none but those
    found = find_clusters(shares, shares.points, n_clusters=2)
    assert found.of_component[0] == 0 and found.num_clusters == 2
    assert found.assign(shares.points).labels.bincount().tolist() == [20, 5]


def test_responsibilities_of_few_points_are_computed_once():
    components, z = overlapping()
    tree = ClusterTree(Confusion.of(components, z))
    compute = Components.responsibilities
    with mock.patch.object(
        Components, "responsibilities", autospec=True, side_effect=compute
    ) as made:
        find_clusters(components, z, tree=tree, n_clusters=5)
    made.assert_called_once()


def test_a_level_that_adds_two_clusters_with_points_is_merged_back():
    # Cut in three, the second and third are nowhere the most probable; cut in four, all are.
    rows = [[0.5, 0.2, 0.16, 0.14]] * 10 + [[0.4, 0.45, 0.1, 0.05]] + [[0.4, 0.05, 0.45, 0.1]]
    rows += [[0.4, 0.0, 0.05, 0.55]]
    shares = Shares(rows)
    tree = ClusterTree(Confusion.of(shares, shares.points))
    for number in (1, 2, 3, 4):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = find_clusters(shares, shares.points, tree=tree, n_clusters=number)
        assert found.num_clusters == number
        assert len(found.assign(shares.points).labels.unique()) == number


def test_a_finer_cut_gives_the_number_that_was_asked_for():
    torch.manual_seed(19)  # close centers: at many levels a cluster is nowhere the most probable
    components = mixture(1.2 * torch.randn(20, 2))
    z = components.sample(2000)
    tree = ClusterTree(Confusion.of(components, z))
    found = [tree.cut(n_clusters=n) for n in range(1, len(tree.leaves) + 1)]
    held = [len(Clusters(components, of).assign(z).labels.unique()) for of in found]
    short = [n for n, a in enumerate(held, 1) if a < n]
    for n in (1, short[0], short[-1], len(tree.leaves)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            clusters = find_clusters(components, z, tree=tree, n_clusters=n)
        assert clusters.num_clusters <= n
        assert len(caught) == (clusters.num_clusters < n)
        assert len(clusters.assign(z).labels.unique()) == clusters.num_clusters


def test_samples_are_of_their_cluster():
    found = find_clusters(mixture(weights=[1.0, 3, 1, 1, 1]), mixture().sample(500), n_clusters=3)
    for cluster in range(3):
        drawn = found.sample(200, cluster)
        assert drawn.shape == (200, 2)
        assert (found.assign(drawn).labels == cluster).all()
    with pytest.raises(ValueError, match=r"cluster must be in 0 \.\. 2, but is 3"):
        found.sample(1, 3)


@pytest.mark.parametrize("cut", [{}, {"separation": 0.05}, {"n_clusters": 1}])
def test_one_component_or_points_that_are_all_alike_are_one_cluster(cut):
    alone = mixture(CENTERS[:1])
    assert find_clusters(alone, torch.randn(10, 2), **cut).num_clusters == 1
    found = find_clusters(mixture(), torch.zeros(10, 2), **cut)
    assert found.num_clusters == 1
    assert torch.equal(found.assign(torch.zeros(3, 2)).labels, torch.zeros(3, dtype=torch.int64))


def test_components_that_share_nothing_stay_apart():
    shares = Shares(np.eye(4, dtype="f4")[[0, 0, 1, 2, 2, 2, 3]].tolist())
    assert find_clusters(shares, shares.points).num_clusters == 4
    assert find_clusters(shares, shares.points, n_clusters=2).num_clusters == 2


@pytest.mark.parametrize(
    "cut, message",
    [
        ({"resolution": -0.1}, "resolution must be at least 0 and finite, but is -0.1"),
        ({"resolution": float("nan")}, "resolution must be at least 0"),
        ({"resolution": "2"}, "resolution must be at least 0 and finite, but is '2'"),
        ({"resolution": 10**400}, "resolution must be at least 0 and finite, but is 1000"),
        ({"resolution": np.complex64(1)}, "resolution must be at least 0 and finite"),
        ({"separation": [0.1]}, r"separation must be in \(0, 1\), but is \[0.1\]"),
        ({"separation": 0.0}, r"separation must be in \(0, 1\), but is 0.0"),
        ({"separation": 1}, r"separation must be in \(0, 1\), but is 1"),
        ({"n_clusters": 0}, "n_clusters must be from 1 to 5, .* but is 0"),
        ({"n_clusters": 6}, "n_clusters must be from 1 to 5, .* but is 6"),
        ({"n_clusters": 2.5}, "n_clusters must be an integer, but is 2.5"),
        ({"n_clusters": 2, "separation": 0.1}, "n_clusters must be given without resolution and"),
    ],
)
def test_cuts_that_there_are_not(cut, message):
    torch.manual_seed(0)
    components = mixture()
    with pytest.raises(ValueError, match=message):
        find_clusters(components, components.sample(100), **cut)


def test_bad_input():
    components = mixture()
    z = components.sample(50)
    with pytest.raises(ValueError, match="points must hold at least one point, but are empty"):
        find_clusters(components, z[:0])
    unusable = (
        ([z[0]], r"\[2\]"), (z.numpy(), "ndarray"), ([z.tolist()], "list"), (z[:, :1], r"\[50, 1")
    )  # fmt: skip
    for points, what in unusable:
        with pytest.raises(ValueError, match=rf"points must be a tensor \[N, 2\] .* one is {what}"):
            find_clusters(components, points)
    with pytest.raises(ValueError, match="points must be repeatable"):
        find_clusters(components, iter([z]))
    with pytest.raises(TypeError, match=r"points must be a tensor or .* but is NoneType"):
        find_clusters(components, None)
    tree = ClusterTree(Confusion.of(components, z))
    with pytest.raises(ValueError, match="points must hold at least one point"):
        find_clusters(components, [], tree=tree)
    broken = z.clone()
    broken[3, 1] = torch.nan
    with pytest.raises(ValueError, match="z must be finite, but row 3"):
        find_clusters(components, broken)
    other = ClusterTree(Confusion.of(mixture(CENTERS[:3]), z))
    with pytest.raises(ValueError, match="tree must be of these 5 components, but is of 3"):
        find_clusters(components, z, tree=other)
    other = ClusterTree(Confusion.of(components, components.sample(50, torch.full((50,), 4))))
    with pytest.raises(ValueError, match="tree must be of these components and points, but"):
        find_clusters(components, z, tree=other)
    # As many points in each component, but shared among others.
    order = torch.tensor([0, 2, 4, 1, 3])
    other = ClusterTree(Confusion.of(mixture(CENTERS[order]), components.sample(2000)))
    with pytest.raises(ValueError, match=r"has .* of the points between other components"):
        find_clusters(components, components.sample(2000), tree=other)
    with pytest.raises(ValueError, match="other must be of 5 components, but is of 3"):
        tree.confusion.plus(Confusion.of(mixture(CENTERS[:3]), z))
    for cluster in (1.5, True, 3):
        with pytest.raises(ValueError, match=r"cluster must be in 0 \.\. 2"):
            find_clusters(components, z).sample(2, cluster)
    with pytest.raises(ValueError, match="of_component must number the clusters of 5 components"):
        Clusters(components, torch.tensor([0, 0, 2, 2, 0]))
    for of in ([0, 0, 1, 1, 1], torch.zeros(5)):
        with pytest.raises(TypeError, match="of_component must be an int64 tensor, but is"):
            Clusters(components, of)


@pytest.mark.parametrize(
    ("sums", "counts"),
    [
        ([[1.0, 0.1], [0.2, 1.0]], [1, 1]),
        ([[1.0, -0.1], [-0.1, 1.0]], [1, 1]),
        ([[0.0, 0.1], [0.1, 1.0]], [1, 1]),
        ([[1.0, math.nan], [math.nan, 1.0]], [1, 1]),
        ([[1.0, 0.1], [0.1, 1.0]], [0, 0]),
        ([[1.0, 0.1], [0.1, 1.0]], [2, -1]),
        ([[1.0, 0.1]], [1, 1]),
    ],
)
def test_sums_that_are_of_no_points(sums, counts):
    confusion = Confusion(torch.tensor(sums).double(), torch.tensor(counts))
    with pytest.raises(ValueError, match=r"(sums|counts) must "):
        ClusterTree(confusion)


def test_a_cluster_whose_weights_underflow_has_samples():
    components = mixture()
    log_weights = torch.tensor([0.0, -200, -300, -300, -300])
    components = Components(**{**components.state_dict(), "log_weights": log_weights})
    assert components.component_weights[1] == 0
    clusters = Clusters(components, torch.tensor([0, 1, 1, 2, 2]))
    z = clusters.sample(200, 1)
    torch.testing.assert_close(z.mean(0), components.centers[1], atol=1.5, rtol=0)
    assert repr(clusters) == "Clusters(3 of 5 components)"


def test_nothing_warns_of_gradients_where_the_encoder_has_parameters():
    components, z = mixture(), mixture().sample(500).requires_grad_()
    tree = ClusterTree(Confusion.of(components, z))
    torch.set_warn_always(True)  # torch gives the warning once a process
    try:
        clusters = find_clusters(components, z, tree=tree)
    finally:
        torch.set_warn_always(False)
    assert clusters.num_clusters == find_clusters(components, z.detach(), tree=tree).num_clusters
