"""Pictures of components and clusters: samples, weights, tree."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from vmm_fast._text import counted
from vmm_fast.clusters import Clusters, ClusterTree
from vmm_fast.metrics import ACTIVE_SHARE
from vmm_fast.plots import drawing

__all__ = ["plot_cluster_samples", "plot_component_weights", "plot_tree", "tree_figure"]

ROWS_PER_BLOCK = 25
CONFUSIONS = (1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)  # on the axis of the tree


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
    """
    values = drawing.array_of(samples, "samples", (3, 4, 5)).astype(np.float64)
    mass = drawing.weights_of(weights, "weights")
    drawing.check_length(mass, "weights", values, "samples")
    if values.size == 0:
        raise ValueError(f"samples must not be empty, but have shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("samples must be finite, but have NaN or infinity")
    if clusters is None:
        numbers = np.arange(len(mass))
    else:
        numbers = drawing.array_of(clusters, "clusters", 1)
        drawing.check_length(numbers, "clusters", values, "samples")
    if values.ndim == 5 and values.shape[2] not in (1, 3):
        raise ValueError(f"samples must have 1 or 3 channels, but have {values.shape[2]}")

    order = np.argsort(-mass, kind="stable")
    texts = [f"{numbers[c]}  ({drawing.percent(mass[c])})" for c in order]
    if values.ndim == 3:
        drawing.save(_heat_strips(values[order], texts), path)
        return
    if values.ndim == 5:
        values = np.moveaxis(values, 2, -1)
        values = values[..., 0] if values.shape[-1] == 1 else values
    drawing.save(_image_rows(_unit_range(values[order]), texts), path)


def _heat_strips(values: np.ndarray, texts: list[str]) -> Any:
    """Return a figure of values [C, S, V]: a block of S lines per cluster, with gaps between."""
    count, samples, features = values.shape
    gap = max(1, round(samples / 5))
    canvas = np.full((count * (samples + gap) - gap, features), np.nan)
    for c in range(count):
        canvas[c * (samples + gap) : c * (samples + gap) + samples] = values[c]
    figure = drawing.figure_of(8, float(np.clip(0.9 + 0.35 * count, 2, 60)))
    ax = figure.subplots()
    image = ax.imshow(canvas, aspect="auto", interpolation="nearest", cmap="viridis")
    bar = figure.colorbar(image, ax=ax, pad=0.01, aspect=40)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, color="#999999")
    centers = np.arange(count) * (samples + gap) + (samples - 1) / 2
    ax.set_yticks(centers, texts, fontsize=7)
    ax.set_ylabel("cluster (weight)")
    ax.set_xlabel("feature")
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelsize=8, color="#999999")
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    ax.spines[:].set_visible(False)
    return figure


def _image_rows(values: np.ndarray, texts: list[str]) -> Any:
    """Return a figure of images [C, S, H, W(, 3)] in [0, 1]: a row per cluster, in columns."""
    count, samples, height, width = values.shape[:4]
    blocks = math.ceil(count / ROWS_PER_BLOCK)
    rows = math.ceil(count / blocks)
    gap = max(1, round(min(height, width) / 14))
    tall, wide = rows * (height + gap) - gap, samples * (width + gap) - gap
    # Small images get a whole number of screen pixels per image pixel: uneven pixels look like
    # damage. No layout engine, since it would resize the axes.
    fit = 64 / (height + gap)
    scale = float(np.clip(round(fit), 1, 8)) if fit > 0.7 else min(1.0, 1.5 * fit)
    text, margin = round((0.12 + 0.058 * max(map(len, texts))) * drawing.DPI), 10
    block_wide, block_tall = math.ceil(wide * scale), math.ceil(tall * scale)
    total_wide = blocks * (text + block_wide + margin)
    total_tall = block_tall + 2 * margin
    figure = drawing.figure_of(total_wide / drawing.DPI, total_tall / drawing.DPI, layout=None)
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
    """
    mass = drawing.weights_of(weights, "weights")
    if len(mass) == 0:
        raise ValueError("weights must hold at least one component, but have C = 0")
    share = None if shares is None else drawing.weights_of(shares, "shares")
    if share is not None:
        drawing.check_length(share, "shares", mass, "weights")

    order = np.argsort(-mass, kind="stable")
    x = np.arange(len(mass))
    figure = drawing.figure_of(9, 3.6)
    ax = figure.subplots()
    drawing.tidy(ax)
    ax.bar(x, 100 * mass[order], width=0.8, color=drawing.PRIMARY, label="prior weight", zorder=2)
    if share is not None:
        ax.scatter(
            x,
            100 * share[order],
            s=float(np.clip(2400 / len(mass), 3, 26)),
            color=drawing.SECONDARY,
            edgecolors="white",
            linewidths=0.4,
            label="share of points",
            zorder=3,
        )
    active = f"active above {drawing.percent(ACTIVE_SHARE)}"
    dashes = (0, (4, 3))
    ax.axhline(
        100 * ACTIVE_SHARE,
        color=drawing.INK,
        linewidth=0.8,
        linestyle=dashes,
        zorder=4,
        label=active,
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
    drawing.save(figure, path)


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
    """
    tree.check_fits(clusters)
    drawing.save(tree_figure(tree, clusters), path)


def tree_figure(tree: ClusterTree, clusters: Clusters) -> Any:
    """Return the figure of :func:`plot_tree`."""
    figure = drawing.figure_of(9, 4.2)
    ax = figure.subplots()
    drawing.tidy(ax)
    of_leaf = clusters.of_component.numpy()[tree.leaves]
    colors = dict(enumerate(drawing.distinct_colors(clusters.num_clusters)))
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
    non_empty = counted(count, "non-empty component")
    ax.set_title(f"{counted(clusters.num_clusters, 'cluster')} of {non_empty}")
    return figure
