"""Pictures of points in latent space."""

from __future__ import annotations

import os
from itertools import cycle
from typing import Any

import numpy as np

from vmm_fast._text import counted
from vmm_fast.metrics import ACTIVE_SHARE
from vmm_fast.plots import drawing

__all__ = ["matched_colors", "plot_latent", "project", "scatter", "write_where_densest"]


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
    """
    points = drawing.array_of(z, "z", 2).astype(np.float64)
    cluster_of = drawing.array_of(clusters, "clusters", 1)
    drawing.check_length(cluster_of, "clusters", points, "z")
    if cluster_of.dtype.kind not in "iu":
        raise ValueError(f"clusters must be integers, but are {cluster_of.dtype}")
    if len(points) == 0 or points.shape[1] == 0:
        raise ValueError(f"z must hold at least one point, but has shape {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("z must be finite, but has NaN or infinity")
    if labels is not None:
        labels = drawing.array_of(labels, "labels", 1)
        drawing.check_length(labels, "labels", points, "z")

    figure = drawing.figure_of(5.4 if labels is None else 10, 5)
    rng = np.random.default_rng(seed)
    plane, names = project(points, projection, rng, seed)
    order = rng.permutation(len(plane))  # so that no group covers the others

    axes = figure.subplots(1, 1 if labels is None else 2, squeeze=False)[0]
    groups, group_of, counts = np.unique(cluster_of, return_inverse=True, return_counts=True)
    active = counts > ACTIVE_SHARE * len(plane)
    palette = iter(drawing.distinct_colors(int(active.sum())))  # by number, as in the tree
    colors = [next(palette) if a else drawing.INACTIVE for a in active]
    scatter(axes[0], plane, group_of, colors, order)
    write_where_densest(axes[0], plane, group_of, [str(g) for g in groups], np.flatnonzero(active))
    title = counted(len(groups), "cluster")
    if not active.all():
        title += f" (grey: up to {drawing.percent(ACTIVE_SHARE)} of the points)"
    axes[0].set_title(title)

    if labels is not None:
        classes, class_of = np.unique(labels, return_inverse=True)
        shared = np.zeros((len(classes), len(colors)))
        np.add.at(shared, (class_of, group_of), 1)
        colors = matched_colors(shared, colors)
        scatter(axes[1], plane, class_of, colors, order)
        axes[1].set_title("true labels")
        if len(classes) <= 30:
            _legend(axes[1], [str(c) for c in classes], colors)
        else:
            write_where_densest(
                axes[1], plane, class_of, [str(c) for c in classes], np.arange(len(classes))
            )
    for ax in axes:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_xlabel(names[0])
    axes[0].set_ylabel(names[1])
    drawing.save(figure, path)


def project(
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


def scatter(ax: Any, plane: np.ndarray, group_of: np.ndarray, colors: Any, order: Any) -> None:
    """Draw points in the colours of their groups."""
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


def write_where_densest(
    ax: Any, plane: np.ndarray, group_of: np.ndarray, names: list[str], groups: np.ndarray
) -> None:
    """Write the names of groups where their points lie densest, moved apart."""
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
            color=drawing.INK,
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
    found: np.ndarray = members[np.square(members - middle).sum(1).argmin()]
    return found


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


def matched_colors(shared: np.ndarray, colors: list[Any]) -> list[Any]:
    """Return a colour for each class: that of the group that holds most of it, each used once.

    ``shared`` [classes, groups] is the number of points that a class and a group have together.
    """
    shared, found = shared.copy(), {}
    shared[:, [color == drawing.INACTIVE for color in colors]] = 0
    while shared.any():
        kind, group = np.unravel_index(shared.argmax(), shared.shape)
        found[int(kind)] = colors[group]
        shared[kind], shared[:, group] = 0, 0
    many = drawing.distinct_colors(len(colors) + len(shared))
    others = cycle([color for color in many if color not in colors] or many)
    return [found[kind] if kind in found else next(others) for kind in range(len(shared))]
