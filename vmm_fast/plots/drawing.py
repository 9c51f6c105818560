"""Sizes, style, colours, files and checks of arguments, which all pictures share."""

from __future__ import annotations

import os
import warnings
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vmm_fast._files import write_atomically

DPI = 150
INK = "#2b2b2b"
GRID = "#e4e4e4"
PRIMARY = "#1f5fa8"
SECONDARY = "#e0842b"
INACTIVE = (0.80, 0.80, 0.80)  # points of components that are not active

# Okabe & Ito's colour-blind-safe palette (yellow and black left out: unreadable on white, and
# text), Tol's "muted", and further ones, each in Oklab (Ottosson 2020) far from those before it.
PALETTE = [
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#332288", "#999933",
    "#882255", "#44aa99", "#117733", "#ddcc77", "#9900ff", "#00f200", "#ff26ff", "#0000ff",
    "#e6bfff", "#00f2cc", "#cc0099", "#594000", "#9980ff", "#ff0059", "#8c59a6", "#00bf1a",
    "#8000a6", "#4d59ff", "#bf000d", "#8c5940", "#004d66", "#ff9999", "#ff80f2", "#5900d9",
    "#ff40b3", "#808cb3", "#99d9f2", "#73cc80", "#bf4de6", "#008cff", "#b3e633", "#bf9980",
    "#bf4d73", "#0d40bf", "#594073", "#b3a6e6", "#801a00", "#407373", "#ff6659", "#808059",
    "#009900", "#005933", "#594db3", "#b3bf00", "#8cbfb3", "#a626bf", "#6673d9", "#b37366",
    "#0099cc", "#b30066", "#f2bfbf", "#cc80e6", "#ff73a6", "#e600cc", "#8c59f2", "#00d9e6",
    "#735973", "#736600", "#730073", "#bf59b3", "#e61a00", "#99e699", "#734040", "#00f28c",
    "#5900a6", "#33598c", "#e699cc", "#99338c", "#66d940", "#ff801a", "#bf8000", "#e65980",
    "#59b359", "#a6b373", "#4d8c8c", "#667399", "#0000cc", "#d9b38c", "#d900ff", "#8033cc",
    "#7399f2", "#a66600", "#d90066", "#993326", "#668c26", "#e659e6", "#9973cc", "#7333ff",
    "#00408c", "#996680", "#1a59d9", "#b34d40",
]  # fmt: skip


def distinct_colors(count: int) -> list[tuple[float, float, float]]:
    """Return colours of the palette, which begins again behind its end."""
    from matplotlib.colors import to_rgb

    return [to_rgb(color) for color in islice(cycle(PALETTE), count)]


def figure_of(width: float, height: float, layout: Any = "constrained") -> Any:
    """Return an empty figure of a size in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install vmm-fast[cli]") from error
    return Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")


def tidy(ax: Any) -> None:
    """Draw two thin axes and horizontal grid lines."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(axis="both", labelsize=8, color="#999999")
    ax.grid(axis="y", color=GRID, linewidth=0.7, zorder=0)
    ax.set_axisbelow(True)


def write(figure: Any, file: Any, kind: str = "png") -> None:
    """Write a figure to an open file."""
    for ax in figure.axes:
        ax.title.set_fontsize(10)
        ax.xaxis.label.set_fontsize(9)
        ax.yaxis.label.set_fontsize(9)
    figure.savefig(file, format=kind)


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure whole or not at all; the ending of `path` chooses the format."""
    ending = Path(path).suffix[1:].lower()
    if ending not in ("png", "pdf", "svg"):
        raise ValueError(f"path must end in .png, .pdf or .svg, but is {os.fspath(path)!r}")
    with warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes; that is no reason to fail.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        write_atomically(path, lambda file: write(figure, file, ending))


def percent(share: float) -> str:
    """Return a share as a percentage, for people."""
    if share <= 0:
        return "0 %"
    return f"{100 * share:.1f} %" if share >= 0.0005 else "<0.1 %"


def array_of(values: Any, name: str, ndim: int | tuple[int, ...]) -> np.ndarray:
    """Return values as an array of one of these numbers of dimensions, or raise ValueError."""
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


def weights_of(values: Any, name: str) -> np.ndarray:
    """Return weights [N], or raise ValueError if one is negative or not finite."""
    array = array_of(values, name, 1).astype(np.float64)
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError(f"{name} must be finite and not negative, but is not")
    return array


def check_length(values: np.ndarray, name: str, other: np.ndarray, other_name: str) -> None:
    """Raise ValueError unless two arrays have equally many entries."""
    if len(values) != len(other):
        raise ValueError(
            f"{name} must have as many entries as {other_name}, {len(other)}, but has {len(values)}"
        )
