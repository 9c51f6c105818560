"""Style and layout that all pictures of the bench share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.records import Row
from vmm_fast._files import write_atomically

LEGEND = {"fontsize": 7, "frameon": False, "loc": "upper left"}


def draw(path: Path, plot: Callable[[Figure], None]) -> Path:
    """Write the picture that a function draws, whole or not at all."""
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


def bars(
    ax: Axes,
    rows: Sequence[Row],
    value: Callable[[Row], float],
    group: Callable[[Row], str],
    form: str = "{:.2f}",
    start: float = 0.0,
    colors: Mapping[str, str] | None = None,
) -> None:
    """Draw a value of every row as a bar with its number: groups, and in each the providers."""
    found = {(row["provider"], group(row)): value(row) for row in rows}
    names, groups = (list(dict.fromkeys(keys)) for keys in zip(*found, strict=True))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        at = [(x, found[name, of]) for x, of in enumerate(groups) if (name, of) in found]
        x = [x + (i - (len(names) - 1) / 2) * width for x, _ in at]
        height = [v - start for _, v in at]
        color = (colors or {}).get(name, f"C{i}")
        drawn = ax.bar(x, height, 0.92 * width, bottom=start, color=color, label=name)
        ax.bar_label(drawn, [form.format(v) for _, v in at], padding=2, fontsize=7)
    ax.set_xticks(range(len(groups)), groups)
    room = max(0.5, 1.5 - 0.5 * len(groups))  # no giant bars where there are few
    ax.set_xlim(-room, len(groups) - 1 + room)
    ax.margins(y=0.3)
    ax.legend(**LEGEND, ncols=2)
