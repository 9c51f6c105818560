"""Pictures of a trained model: latent space, samples, the tree of components, training curves.

Each function draws on a ``matplotlib.figure.Figure`` of its own, so that no display, no pyplot
state and no backend setting is involved, and writes the file whole or not at all. The ending of
`path` chooses the format (png, pdf, svg).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vmm_fast._files import write_atomically
from vmm_fast.clusters import Clusters, ClusterTree
from vmm_fast.metrics import ACTIVE_SHARE

__all__ = [
    "plot_cluster_samples",
    "plot_component_weights",
    "plot_latent",
    "plot_training_curves",
    "plot_tree",
]

DPI = 150
INK = "#2b2b2b"
GRID = "#e4e4e4"
PRIMARY = "#1f5fa8"
SECONDARY = "#e0842b"
INACTIVE = (0.80, 0.80, 0.80)  # points of components that are not active
ROWS_PER_BLOCK = 25
CONFUSIONS = (1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)  # on the axis of the tree

# Okabe & Ito's colour-blind-safe palette (yellow and black left out: unreadable on white, and
# text), then Tol's "muted"; :func:`_colors` finds further ones.
PALETTE = [
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7",
    "#332288", "#999933", "#882255", "#44aa99", "#117733", "#ddcc77",
]  # fmt: skip


def plot_latent(
    z: Any,
    clusters: Any,
    labels: Any = None,
    *,
    path: str | os.PathLike[str],
    projection: str = "pca",
    seed: int = 0,
) -> None:
    """Draw latent points, coloured by cluster and, in a second panel, by true label.

    Clusters that hold more than 0.2 % of the points have a colour each and their number at the
    median of their points; the others are grey.

    Parameters
    ----------
    z : Tensor or array [N, D], floating dtype
        Latent points. D = 2 is drawn as it is, D = 1 over a random height, more is projected.
    clusters : Tensor, array or sequence [N] of integers
        The cluster of each point.
    labels : Tensor, array or sequence [N], optional
        True labels of any sortable kind; without them there is one panel.
    path : str or os.PathLike
        The picture to write, 10 x 5 inches (5.4 x 5 with one panel).
    projection : {"pca", "tsne"}, default "pca"
        For D > 2: principal components, or t-SNE of scikit-learn (readable for many clusters, but
        takes minutes above some thousand points: pass a sample).
    seed : int, default 0
        Seed of the drawing order, of t-SNE, and of the heights for D = 1.

    Raises
    ------
    ValueError
        If a shape does not fit, z is not finite, or `projection` is unknown.
    ImportError
        If matplotlib, or scikit-learn for t-SNE, is not installed.
    """
    points = _array(z, "z", 2).astype(np.float64)
    cluster_of = _array(clusters, "clusters", 1)
    _check_length(cluster_of, "clusters", points, "z")
    if cluster_of.dtype.kind not in "iu":
        raise ValueError(f"clusters must be integers, but are {cluster_of.dtype}")
    if len(points) == 0 or points.shape[1] == 0:
        raise ValueError(f"z must hold at least one point, but has shape {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("z must be finite, but has NaN or infinity")
    if labels is not None:
        labels = _array(labels, "labels", 1)
        _check_length(labels, "labels", points, "z")

    figure = _figure(5.4 if labels is None else 10, 5)
    rng = np.random.default_rng(seed)
    plane, names = _project(points, projection, rng, seed)
    order = rng.permutation(len(plane))  # so that no group covers the others

    axes = figure.subplots(1, 1 if labels is None else 2, squeeze=False)[0]
    groups, group_of, counts = np.unique(cluster_of, return_inverse=True, return_counts=True)
    active = counts > ACTIVE_SHARE * len(plane)
    ranks = np.empty(len(groups), dtype=int)  # the largest cluster takes the first colour
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(groups))
    palette = _colors(int(active.sum()))
    colors = [palette[r] if a else INACTIVE for r, a in zip(ranks, active, strict=True)]
    _scatter(axes[0], plane, group_of, colors, order)
    _write_where_densest(axes[0], plane, group_of, [str(g) for g in groups], np.flatnonzero(active))
    title = f"{len(groups)} clusters" if len(groups) != 1 else "1 cluster"
    if not active.all():
        title += f" (grey: up to {_percent(ACTIVE_SHARE)} of the points)"
    axes[0].set_title(title)

    if labels is not None:
        classes, class_of = np.unique(labels, return_inverse=True)
        colors = _matched(class_of, group_of, colors)
        _scatter(axes[1], plane, class_of, colors, order)
        axes[1].set_title("true labels")
        if len(classes) <= 30:
            _legend(axes[1], [str(c) for c in classes], colors)
        else:
            _write_where_densest(
                axes[1], plane, class_of, [str(c) for c in classes], np.arange(len(classes))
            )
    for ax in axes:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_xlabel(names[0])
    axes[0].set_ylabel(names[1])
    _save(figure, path)


def plot_cluster_samples(
    samples: Any,
    weights: Any,
    path: str | os.PathLike[str],
    *,
    clusters: Sequence[int] | Any = None,
) -> None:
    """Draw samples of each cluster, one row per cluster, the largest weight first.

    Parameters
    ----------
    samples : Tensor or array
        Images [G, S, H, W] or [G, S, channels, H, W] with 1 or 3 channels, or vectors [G, S, V],
        which are drawn as heat strips: a line per sample, a column per feature.
    weights : Tensor or array [G]
        Weight of each cluster, for instance its share of the points.
    path : str or os.PathLike
        The picture to write; its size follows from the number of clusters and samples.
    clusters : sequence [G] of integers, optional
        The numbers to write; 0 to G - 1 if not given.

    Raises
    ------
    ValueError
        If a shape does not fit or a value is not finite.
    ImportError
        If matplotlib is not installed.
    """
    values = _array(samples, "samples", (3, 4, 5)).astype(np.float64)
    mass = _weights(weights, "weights")
    _check_length(mass, "weights", values, "samples")
    if values.size == 0:
        raise ValueError(f"samples must not be empty, but have shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("samples must be finite, but have NaN or infinity")
    if clusters is None:
        numbers = np.arange(len(mass))
    else:
        numbers = _array(clusters, "clusters", 1)
        _check_length(numbers, "clusters", values, "samples")
    if values.ndim == 5 and values.shape[2] not in (1, 3):
        raise ValueError(f"samples must have 1 or 3 channels, but have {values.shape[2]}")

    order = np.argsort(-mass, kind="stable")
    texts = [f"{numbers[c]}  ({_percent(mass[c])})" for c in order]
    if values.ndim == 3:
        _save(_heat_strips(values[order], texts), path)
        return
    if values.ndim == 5:
        values = np.moveaxis(values, 2, -1)
        values = values[..., 0] if values.shape[-1] == 1 else values
    _save(_image_rows(_unit_range(values[order]), texts), path)


def plot_component_weights(weights: Any, shares: Any, path: str | os.PathLike[str]) -> None:
    """Draw each component's prior weight and share of the points, the largest weight first.

    Parameters
    ----------
    weights : Tensor or array [C]
        Prior weights.
    shares : Tensor or array [C], or None
        Share of the points assigned to each component; None leaves it out.
    path : str or os.PathLike
        The picture to write, 9 x 3.6 inches.

    Raises
    ------
    ValueError
        If a shape does not fit or a value is negative or not finite.
    ImportError
        If matplotlib is not installed.
    """
    mass = _weights(weights, "weights")
    if len(mass) == 0:
        raise ValueError("weights must hold at least one component, but have C = 0")
    share = None if shares is None else _weights(shares, "shares")
    if share is not None:
        _check_length(share, "shares", mass, "weights")

    order = np.argsort(-mass, kind="stable")
    x = np.arange(len(mass))
    figure = _figure(9, 3.6)
    ax = figure.subplots()
    _tidy(ax)
    ax.bar(x, 100 * mass[order], width=0.8, color=PRIMARY, label="prior weight", zorder=2)
    if share is not None:
        ax.scatter(
            x,
            100 * share[order],
            s=float(np.clip(2400 / len(mass), 3, 26)),
            color=SECONDARY,
            edgecolors="white",
            linewidths=0.4,
            label="share of points",
            zorder=3,
        )
    active = f"active above {_percent(ACTIVE_SHARE)}"
    dashes = (0, (4, 3))
    ax.axhline(
        100 * ACTIVE_SHARE, color=INK, linewidth=0.8, linestyle=dashes, zorder=4, label=active
    )
    ax.set_xlim(-0.8, len(mass) - 0.2)
    ax.set_ylim(bottom=0)
    if len(mass) <= 110:
        size = 8 if len(mass) <= 50 else 5.5
        ax.set_xticks(x, [str(c) for c in order], fontsize=size, rotation=90 * (len(mass) > 30))
        ax.set_xlabel("component, by falling weight")
    else:
        ax.set_xlabel("rank by weight")
    ax.tick_params(axis="x", length=0)
    ax.set_ylabel("%")
    ax.legend(frameon=False, fontsize=8, loc="upper right")
    _save(figure, path)


def plot_tree(tree: ClusterTree, clusters: Clusters, path: str | os.PathLike[str]) -> None:
    """Draw the tree of components and its cut into clusters.

    Every leaf is a component that holds points; a branch joins two groups at their confusion, which
    falls from 100 % at the leaves. Branches within a cluster have the cluster's colour. Those
    between clusters have a bar for the 95 % interval of the confusion (see
    :meth:`vmm_fast.clusters.ClusterTree.interval`).

    Parameters
    ----------
    tree : ClusterTree
    clusters : Clusters
        A cut of the tree.
    path : str or os.PathLike
        The picture to write, 9 x 4.2 inches.

    Raises
    ------
    ValueError
        If the clusters are of other components.
    ImportError
        If matplotlib is not installed.
    """
    tree.check_fits(clusters)
    _save(_tree(tree, clusters), path)


def _tree(tree: ClusterTree, clusters: Clusters) -> Any:
    figure = _figure(9, 4.2)
    ax = figure.subplots()
    _tidy(ax)
    of_leaf = clusters.of_component.numpy()[tree.leaves]
    colors = dict(enumerate(_colors(clusters.num_clusters)))
    count = len(of_leaf)
    members = {leaf: [leaf] for leaf in range(count)}
    for merge, (a, b, *_) in enumerate(tree.linkage):
        fewer, more = sorted((members.pop(a), members.pop(b)), key=len)
        members[count + merge] = [*fewer, *more]
    (order,) = members.values()
    at, low = {leaf: float(x) for x, leaf in enumerate(order)}, dict.fromkeys(order, 0.0)
    inside = dict(enumerate(of_leaf.tolist()))  # cluster of each group that lies within one
    top = 1.0
    bounds = [-np.log10(bound.clip(CONFUSIONS[-1])) for bound in tree.interval()]
    for merge, (a, b, distance, _) in enumerate(tree.linkage):
        a, b, group = int(a), int(b), count + merge
        height = -math.log10(max(1 - distance, CONFUSIONS[-1]))
        cluster = inside.get(a) if inside.get(a) == inside.get(b) else None
        color = "#8a8a8a" if cluster is None else colors[cluster]
        xs, ys = (at[a], at[a], at[b], at[b]), (low[a], height, height, low[b])
        ax.plot(xs, ys, color=color, linewidth=1.1, solid_joinstyle="miter", zorder=3)
        at[group], low[group] = (at[a] + at[b]) / 2, height
        if cluster is not None:
            inside[group] = cluster
        else:
            ends = [bound[merge] for bound in bounds]
            ax.vlines(at[group], *ends, color=color, alpha=0.35, linewidth=5, zorder=2)
            top = max(top, *ends)
    for leaf, x in zip(order, range(count), strict=True):
        ax.scatter(x, 0, s=12, color=colors[of_leaf[leaf]], zorder=4, clip_on=False)
    names = of_leaf[order]
    starts = np.flatnonzero(np.r_[True, names[1:] != names[:-1]])
    last, lower = -math.inf, False
    for start, stop in zip(starts, np.r_[starts[1:], count], strict=True):
        middle = (start + stop - 1) / 2
        # A number that would touch the one before it is written lower.
        lower = not lower and middle - last < 0.025 * count
        last = middle
        ax.annotate(
            str(names[start]),
            (middle, 0),
            xytext=(0, -15 if lower else -6),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
            color=colors[names[start]],
            weight="bold",
        )
    top = max(top, *low.values())
    ticks = [t for t in CONFUSIONS if -math.log10(t) <= top]
    ax.set_yticks([-math.log10(t) for t in ticks], [f"{100 * t:g} %" for t in ticks])
    ax.set_ylim(0, 1.05 * top)
    ax.set_xlim(-1, count)
    ax.set_xticks([])
    ax.set_xlabel(
        "components, under them their cluster; bars are 95 % intervals of the confusion",
        labelpad=24,
    )
    ax.set_ylabel("confusion")
    some = "1 cluster" if clusters.num_clusters == 1 else f"{clusters.num_clusters} clusters"
    ax.set_title(f"{count} components, {some}")
    return figure


# title, unit, and the keys of the history with their names
_CURVES: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("ELBO", "nats", [("train_elbo", "training"), ("validation_elbo", "validation")]),
    (
        "log-likelihood",
        "nats",
        [("train_log_likelihood", "training"), ("validation_log_likelihood", "validation")],
    ),
    ("KL divergence", "nats", [("train_kl", "training"), ("validation_kl", "validation")]),
    ("active components", "", [("components_active", "")]),
    ("concentration", "", [("concentration", "")]),
    ("decoder scale", "", [("scale", "")]),
]


def plot_training_curves(
    history: Sequence[Mapping[str, float]], path: str | os.PathLike[str]
) -> None:
    """Draw the training history, one panel for each quantity that it holds.

    Parameters
    ----------
    history : sequence of mappings
        One for each epoch, with `epoch` (its index in the list if absent) and any of `train_elbo`,
        `validation_elbo`, `train_log_likelihood`, `validation_log_likelihood`, `train_kl`,
        `validation_kl` (nats), `components_active`, `concentration`, `scale`. None, NaN and
        infinity leave a gap.
    path : str or os.PathLike
        The picture to write, three panels of 3.6 x 2.8 inches in a row.

    Raises
    ------
    ValueError
        If the history holds none of these.
    ImportError
        If matplotlib is not installed.
    """
    epochs = np.array([row.get("epoch", i) for i, row in enumerate(history)], dtype=float)
    panels = []
    for title, unit, keys in _CURVES:
        curves = [(name, _column(history, key)) for key, name in keys]
        curves = [(name, y) for name, y in curves if np.isfinite(y).any()]
        if curves:
            panels.append((title, unit, curves))
    if not panels:
        known = ", ".join(key for _, _, keys in _CURVES for key, _ in keys)
        raise ValueError(f"history must hold a finite value of at least one of {known}")

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(3.6 * columns, 2.8 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (title, unit, curves) in zip(axes.flat, panels, strict=False):
        for name, y in curves:
            # A curve of one point would have no line.
            marker = "o" if np.isfinite(y).sum() == 1 else ""
            color = SECONDARY if name == "validation" else PRIMARY
            ax.plot(epochs, y, color=color, label=name, linewidth=1.4, marker=marker, zorder=2)
        hidden = _limit_to_later_epochs(ax, [y for _, y in curves])
        ax.set_title(f"{title} (first epochs lie outside)" if hidden else title)
        ax.set_ylabel(unit)
        ax.xaxis.get_major_locator().set_params(integer=True, nbins=6, min_n_ticks=1)
        _tidy(ax)
        if len(curves) > 1:
            ax.legend(frameon=False, fontsize=8, loc="best")
    for ax in axes.flat[max(0, len(panels) - columns) : len(panels)]:
        ax.set_xlabel("epoch")
    _save(figure, path)


def _column(history: Sequence[Mapping[str, float]], key: str) -> np.ndarray:
    values = [row.get(key) for row in history]
    y = np.array([math.nan if v is None else float(v) for v in values], dtype=float)
    y[~np.isfinite(y)] = math.nan
    return y


def _limit_to_later_epochs(ax: Any, curves: list[np.ndarray]) -> bool:
    """Limit the y axis to later epochs if the first would squeeze them flat; return whether so."""
    values = np.stack(curves)
    skip = max(1, values.shape[1] // 10)
    later = values[:, skip:]
    if values.shape[1] < 10 or not np.isfinite(later).any():
        return False
    low, high = np.nanmin(later), np.nanmax(later)
    if np.nanmax(values) - np.nanmin(values) < 4 * (high - low) or high == low:
        return False
    ax.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    return True


def _heat_strips(values: np.ndarray, texts: list[str]) -> Any:
    """Return a figure of values [C, S, V]: a block of S lines per component, with gaps between."""
    count, samples, features = values.shape
    gap = max(1, round(samples / 5))
    canvas = np.full((count * (samples + gap) - gap, features), np.nan)
    for c in range(count):
        canvas[c * (samples + gap) : c * (samples + gap) + samples] = values[c]
    figure = _figure(8, float(np.clip(0.9 + 0.35 * count, 2, 60)))
    ax = figure.subplots()
    image = ax.imshow(canvas, aspect="auto", interpolation="nearest", cmap="viridis")
    bar = figure.colorbar(image, ax=ax, pad=0.01, aspect=40)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, color="#999999")
    centers = np.arange(count) * (samples + gap) + (samples - 1) / 2
    ax.set_yticks(centers, texts, fontsize=7)
    ax.set_ylabel("component (weight)")
    ax.set_xlabel("feature")
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelsize=8, color="#999999")
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    ax.spines[:].set_visible(False)
    return figure


def _image_rows(values: np.ndarray, texts: list[str]) -> Any:
    """Return a figure of images [C, S, H, W(, 3)] in [0, 1]: a row per component, in columns."""
    count, samples, height, width = values.shape[:4]
    blocks = math.ceil(count / ROWS_PER_BLOCK)
    rows = math.ceil(count / blocks)
    gap = max(1, round(min(height, width) / 14))
    tall, wide = rows * (height + gap) - gap, samples * (width + gap) - gap
    # Small images get a whole number of screen pixels per image pixel: uneven pixels look like
    # damage. No layout engine, since it would resize the axes.
    fit = 64 / (height + gap)
    scale = float(np.clip(round(fit), 1, 8)) if fit > 0.7 else min(1.0, 1.5 * fit)
    text, margin = round((0.12 + 0.058 * max(map(len, texts))) * DPI), 10
    block_wide, block_tall = math.ceil(wide * scale), math.ceil(tall * scale)
    total_wide = blocks * (text + block_wide + margin)
    total_tall = block_tall + 2 * margin
    figure = _figure(total_wide / DPI, total_tall / DPI, layout=None)
    for b in range(blocks):
        left_edge = text + b * (text + block_wide + margin)
        ax = figure.add_axes(
            (
                left_edge / total_wide,
                margin / total_tall,
                block_wide / total_wide,
                block_tall / total_tall,
            )
        )
        part = values[b * rows : (b + 1) * rows]
        canvas = np.ones((tall, wide, *values.shape[4:]))
        for r, c in np.ndindex(*part.shape[:2]):
            top, left = r * (height + gap), c * (width + gap)
            canvas[top : top + height, left : left + width] = part[r, c]
        ax.imshow(
            canvas,
            cmap="gray",
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="nearest" if scale >= 1 else "antialiased",
        )
        centers = np.arange(len(part)) * (height + gap) + (height - 1) / 2
        ax.set_yticks(centers, texts[b * rows : (b + 1) * rows], fontsize=7)
        ax.set_xticks([])
        ax.tick_params(axis="y", length=0)
        ax.spines[:].set_visible(False)
    return figure


def _unit_range(values: np.ndarray) -> np.ndarray:
    """Return values in [0, 1]: clipped if they are close to that range, else scaled to it."""
    low, high = values.min(), values.max()
    if low >= -0.25 and 0.25 <= high <= 1.25:
        return values.clip(0, 1)
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _project(
    points: np.ndarray, projection: str, rng: np.random.Generator, seed: int
) -> tuple[np.ndarray, tuple[str, str]]:
    """Return the points in the plane [N, 2] and the names of its axes."""
    if projection not in ("pca", "tsne"):
        raise ValueError(f'projection must be "pca" or "tsne", but is {projection!r}')
    n, dim = points.shape
    if dim == 1:
        return np.column_stack([points[:, 0], rng.random(n)]), ("z", "random height")
    if dim == 2:
        return points, ("z 1", "z 2")
    if projection == "tsne" and n > 3:  # fewer points have no neighbourhoods
        try:
            from sklearn.manifold import TSNE
        except ImportError as error:
            raise ImportError("t-SNE needs scikit-learn: pip install vmm-fast[cli]") from error
        model = TSNE(perplexity=min(30.0, (n - 1) / 3), init="pca", random_state=seed)
        return model.fit_transform(points), ("t-SNE 1", "t-SNE 2")
    # By the D x D covariance instead of the SVD of all points: memory and time are linear in N.
    centered = points - points.mean(0)
    variance, axes = np.linalg.eigh(centered.T @ centered)
    explained = variance[::-1] / max(variance.sum(), np.finfo(float).tiny)
    return centered @ axes[:, ::-1][:, :2], (
        f"PC 1 ({100 * explained[0]:.0f} % of variance)",
        f"PC 2 ({100 * explained[1]:.0f} % of variance)",
    )


def _scatter(ax: Any, plane: np.ndarray, group_of: np.ndarray, colors: Any, order: Any) -> None:
    size = float(np.clip(16000 / len(plane), 0.4, 14))
    ax.scatter(
        *plane[order].T,
        c=np.asarray(colors)[group_of[order]],
        s=size,
        linewidths=0,
        alpha=0.85 if size > 1 else 0.6,
        rasterized=True,
    )
    ax.spines[:].set_color("#bbbbbb")


def _write_where_densest(
    ax: Any, plane: np.ndarray, group_of: np.ndarray, names: list[str], groups: np.ndarray
) -> None:
    from matplotlib.patheffects import withStroke

    low, high = plane.min(0), plane.max(0)
    span = np.where(high > low, high - low, 1.0)
    anchors = np.stack([_densest(plane[group_of == g], low, span) for g in groups])
    size = 7 if len(groups) <= 40 else 6
    # An axes is about 330 points wide and high, a digit 0.7 times as wide as it is high.
    width = 0.7 * size * max((len(names[group]) for group in groups), default=0) / 330
    spread = low + span * _spread((anchors - low) / span, np.array([width, size / 330]))
    for group, at in zip(groups, spread, strict=True):
        ax.text(
            *at,
            names[group],
            fontsize=size,
            fontweight="bold",
            color=INK,
            ha="center",
            va="center",
            parse_math=False,
            path_effects=[withStroke(linewidth=1.5, foreground="white")],
        )


def _densest(members: np.ndarray, low: np.ndarray, span: np.ndarray) -> np.ndarray:
    """Return the point of a group [2] in the middle of its densest part, for the group's name."""
    cells = np.minimum((24 * (members - low) / span).astype(int), 23) + 1
    counts = np.zeros((26, 26))
    np.add.at(counts, tuple(cells.T), 1)
    around = sum(np.roll(counts, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1))
    best = np.unravel_index(np.argmax(around), counts.shape)
    middle = np.median(members[(np.abs(cells - best) <= 1).all(1)], 0)
    point: np.ndarray = members[np.square(members - middle).sum(1).argmin()]
    return point


def _spread(places: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Move the centres [n, 2] of equal boxes apart, little by little, until few overlap."""
    places = places.copy()
    if len(places) > 300:  # no room to spread
        return places
    for _ in range(60):
        difference = places[:, None] - places[None]
        overlap = (box - np.abs(difference)).clip(min=0)
        overlap *= (overlap > 0).all(-1, keepdims=True)
        overlap[np.diag_indices(len(places))] = 0
        # Up or down, as text is wider than high; the order of indices decides if centres coincide.
        side = np.sign(difference[..., 1] + 1e-9 * np.subtract.outer(*[np.arange(len(places))] * 2))
        push = 0.3 * (overlap[..., 1] * side).sum(1)
        if not push.any():
            break
        places[:, 1] += push
    return places


def _legend(ax: Any, names: list[str], colors: Any) -> None:
    from matplotlib.lines import Line2D

    short = [name if len(name) <= 28 else name[:27] + "…" for name in names]
    handles = [
        Line2D([], [], linestyle="", marker="o", markersize=5, color=color) for color in colors
    ]
    legend = ax.legend(
        handles,
        # A name that begins with an underscore would be left out, a dollar sign would start a
        # formula.
        ["\u200b" + name if name.startswith("_") else name for name in short],
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize=8,
        handletextpad=0.1,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _colors(count: int) -> list[tuple[float, float, float]]:
    """Return distinct colours: a fixed palette, then each as far as possible from those before."""
    from matplotlib.colors import to_rgb

    colors = [to_rgb(color) for color in PALETTE[:count]]
    if count <= len(PALETTE):
        return colors
    steps = np.linspace(0, 1, 21)
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    places = _oklab(candidates)
    # Neither too dark to differ, nor too light for white paper, nor grey.
    lightness, chroma = places[:, 0], np.hypot(places[:, 1], places[:, 2])
    usable = (lightness > 0.38) & (lightness < 0.86) & (chroma > 0.05)
    candidates, places = candidates[usable], places[usable]
    chosen = _oklab(np.array(colors))
    distance = np.linalg.norm(places[:, None] - chosen, axis=-1).min(1)
    for _ in range(count - len(colors)):
        farthest = distance.argmax()
        colors.append(tuple(candidates[farthest]))
        distance = np.minimum(distance, np.linalg.norm(places - places[farthest], axis=-1))
    return colors


def _matched(class_of: np.ndarray, group_of: np.ndarray, colors: list[Any]) -> list[Any]:
    """Return a colour for each class: that of the group that holds most of it, each used once."""
    shared = np.zeros((class_of.max() + 1, len(colors)))
    np.add.at(shared, (class_of, group_of), 1)
    found: dict[int, Any] = {}
    shared[:, [color == INACTIVE for color in colors]] = 0
    while shared.any():
        kind, group = np.unravel_index(shared.argmax(), shared.shape)
        found[int(kind)] = colors[group]
        shared[kind], shared[:, group] = 0, 0
    others = iter([c for c in _colors(len(colors) + len(shared)) if c not in colors])
    return [found[kind] if kind in found else next(others) for kind in range(len(shared))]


def _oklab(colors: np.ndarray) -> np.ndarray:
    """Return sRGB colours [n, 3] in Oklab, where distances match perception (Ottosson 2020)."""
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    opponents = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    places: np.ndarray = np.cbrt(linear @ cones.T) @ opponents.T
    return places


def _figure(width: float, height: float, layout: Any = "constrained") -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install vmm-fast[cli]") from error
    return Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")


def _tidy(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(axis="both", labelsize=8, color="#999999")
    ax.grid(axis="y", color=GRID, linewidth=0.7, zorder=0)
    ax.set_axisbelow(True)


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    for ax in figure.axes:
        ax.title.set_fontsize(10)
        ax.xaxis.label.set_fontsize(9)
        ax.yaxis.label.set_fontsize(9)
    ending = Path(path).suffix[1:].lower()
    if ending not in ("png", "pdf", "svg"):
        raise ValueError(f"path must end in .png, .pdf or .svg, but is {os.fspath(path)!r}")
    with warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes; that is no reason to fail.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        write_atomically(path, lambda file: figure.savefig(file, format=ending))


def _percent(share: float) -> str:
    if share <= 0:
        return "0 %"
    return f"{100 * share:.1f} %" if share >= 0.0005 else "<0.1 %"


def _array(values: Any, name: str, ndim: int | tuple[int, ...]) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    array = np.asarray(values)
    wanted = (ndim,) if isinstance(ndim, int) else ndim
    if array.ndim not in wanted:
        raise ValueError(
            f"{name} must have {' or '.join(map(str, wanted))} dimensions, "
            f"but has shape {array.shape}"
        )
    return array


def _weights(values: Any, name: str) -> np.ndarray:
    array = _array(values, name, 1).astype(np.float64)
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError(f"{name} must be finite and not negative, but is not")
    return array


def _check_length(values: np.ndarray, name: str, other: np.ndarray, other_name: str) -> None:
    if len(values) != len(other):
        raise ValueError(
            f"{name} must have as many entries as {other_name}, {len(other)}, but has {len(values)}"
        )
