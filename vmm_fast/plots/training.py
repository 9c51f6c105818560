"""Pictures of the training history."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vmm_fast.metrics import ACTIVE_SHARE
from vmm_fast.plots import drawing

__all__ = ["curves_figure", "plot_training_curves"]


_OF_POINTS = "nats per point"
# the name in the history, the title, and the label of the y axis
_QUANTITIES = (
    ("elbo", "ELBO: log-likelihood less KL", _OF_POINTS),
    ("log_likelihood", "log-likelihood of the decoded data", _OF_POINTS),
    ("kl", "KL divergence from the prior", _OF_POINTS),
    ("components_active", "active components", f"over {100 * ACTIVE_SHARE:g} % of the points each"),
    ("concentration", "concentration of the weights", "low: few large components"),
    ("scale", "decoder's standard deviation", "of the scaled data"),
)
_SPLITS = (("train_", "training"), ("validation_", "held out"))


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
    """
    drawing.save(curves_figure(history), path)


def curves_figure(history: Sequence[Mapping[str, float]]) -> Any:
    """Return the figure of :func:`plot_training_curves`."""
    epochs = np.array([row.get("epoch", i) for i, row in enumerate(history)], dtype=float)
    panels, keys = [], []
    for quantity, title, unit in _QUANTITIES:
        splits = _SPLITS if unit == _OF_POINTS else (("", ""),)
        keys += [split + quantity for split, _ in splits]
        curves = [(name, _column(history, split + quantity)) for split, name in splits]
        curves = [(name, y) for name, y in curves if np.isfinite(y).any()]
        if curves:
            panels.append((quantity, title, unit, curves))
    if not panels:
        raise ValueError(f"history must hold a finite value of at least one of {', '.join(keys)}")

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = drawing.figure_of(3.6 * columns, 2.8 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (quantity, title, unit, curves) in zip(axes.flat, panels, strict=False):
        for name, y in curves:
            # A curve of one point would have no line.
            marker = "o" if np.isfinite(y).sum() == 1 else ""
            color = drawing.SECONDARY if name == "held out" else drawing.PRIMARY
            ax.plot(epochs, y, color=color, label=name, linewidth=1.4, marker=marker, zorder=2)
        values = np.stack([y for _, y in curves])
        factors = quantity == "concentration" and np.nanmax(values) > 10 * np.nanmin(values) > 0
        if factors:
            ax.set_yscale("log")
        hidden = not factors and _limit_to_later_epochs(ax, values)
        ax.set_title(title + "\n(the first epochs lie outside)" * hidden)
        ax.set_ylabel(unit)
        ax.xaxis.get_major_locator().set_params(integer=True, nbins=6, min_n_ticks=1)
        if quantity == "components_active":
            ax.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        drawing.tidy(ax)
        if len(curves) > 1:
            ax.legend(frameon=False, fontsize=8, loc="best")
    for ax in axes.flat[max(0, len(panels) - columns) : len(panels)]:
        ax.set_xlabel("epoch")
    return figure


def _column(history: Sequence[Mapping[str, float]], key: str) -> np.ndarray:
    values = [row.get(key) for row in history]
    y = np.array([math.nan if v is None else float(v) for v in values], dtype=float)
    y[~np.isfinite(y)] = math.nan
    return y


def _limit_to_later_epochs(ax: Any, values: np.ndarray) -> bool:
    """Limit the y axis to later epochs if the first would squeeze them flat; return whether so."""
    skip = max(1, values.shape[1] // 10)
    later = values[:, skip:]
    if values.shape[1] < 10 or not np.isfinite(later).any():
        return False
    low, high = np.nanmin(later), np.nanmax(later)
    if np.nanmax(values) - np.nanmin(values) < 4 * (high - low) or high == low:
        return False
    ax.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    return True
