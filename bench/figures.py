"""What the pictures share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmm_fast._files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEGEND = {"fontsize": 7, "frameon": False, "loc": "upper left"}


def draw(path: Path, plot: Callable[[Figure], None]) -> Path:
    """Write the picture that a function draws, whole or not at all."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", dpi=110)
    plot(figure)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path


def bare(ax: Axes, title: str, x: str = "", y: str = "", grid: str = "y") -> None:
    """Set title and labels, with few lines around the data."""
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.grid(alpha=0.25, which="both", axis=grid, lw=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)


def label(ax: Axes, text: str, at: tuple, by: tuple[float, float], **options: Any) -> None:
    """Write a small text, ``by`` points away from a place."""
    ax.annotate(text, at, by, **{"fontsize": 7, "textcoords": "offset points", **options})


def limit(ax: Axes, value: float, text: str = "") -> None:
    """Draw a horizontal line with its text at the right end."""
    ax.axhline(value, color="0.3", lw=0.8, ls="--", zorder=0)
    label(ax, text, (1, value), (-2, 3), xycoords=("axes fraction", "data"), ha="right")


def bars(
    ax: Axes,
    groups: Sequence[str],
    values: Mapping[str, Sequence[float | None]],
    form: str = "{:.2f}",
    start: float = 0.0,
    colors: Mapping[str, str] | None = None,
) -> None:
    """Draw the values of every name side by side in each group, as bars with their values."""
    width = 0.8 / len(values)
    for i, (name, line) in enumerate(values.items()):
        shift = (i - (len(values) - 1) / 2) * width
        points = [(group + shift, v) for group, v in enumerate(line) if v is not None]
        x, y = zip(*points, strict=True)
        color = (colors or {}).get(name, f"C{i}")
        ax.bar(x, [v - start for v in y], 0.92 * width, bottom=start, color=color, label=name)
        for at, v in points:
            label(ax, form.format(v), (at, max(v, start)), (0, 2), ha="center")
    ax.set_xticks(range(len(groups)), groups)
    room = max(0.5, 1.5 - 0.5 * len(groups))  # no giant bars where there are few
    ax.set_xlim(-room, len(groups) - 1 + room)
    ax.margins(y=0.3)
    ax.legend(**LEGEND, ncols=2)


def lines(ax: Axes, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """Draw curves on logarithmic axes, with room for the legend."""
    for name, (x, y) in curves.items():
        ax.plot(x, y, marker="o", ms=3.5, lw=1.3, label=name)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(top=20 * ax.get_ylim()[1])
    ax.legend(**LEGEND)
