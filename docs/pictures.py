"""Draw the site's pictures of runs, in colours that colour-blind readers tell apart.

    vmm-fast integrate --example --out example-vmm && vmm-fast demo --out demo-output
    python docs/pictures.py example-vmm demo-output

Pictures have a white ground, on which the site's dark theme shows them too.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
from anndata import read_h5ad
from matplotlib.figure import Figure
from PIL import Image
from sklearn.manifold import TSNE

from vmm_fast.plots.drawing import distinct_colors

IMAGES = Path(__file__).parent / "images"
COLOURS = 64  # of a palette: a quarter of the size, and no difference to see


def draw_cells(folder: Path) -> None:
    """Draw the embedding of ``vmm-fast integrate --example`` by cluster and by cell type."""
    cells = read_h5ad(folder / "cells.h5ad")
    place = TSNE(random_state=0).fit_transform(cells.obsm["X_vmm"])
    figure = Figure(figsize=(8, 4.6), dpi=110, layout="constrained", facecolor="white")
    for ax, key, title in zip(
        figure.subplots(1, 2),
        ("vmm_cluster", "bulk_labels"),
        ("clusters that were found", "scanpy's cell types"),
        strict=True,
    ):
        groups = cells.obs[key].value_counts().index
        for group, colour in zip(groups, distinct_colors(len(groups)), strict=True):
            inside = (cells.obs[key] == group).to_numpy()
            ax.scatter(*place[inside].T, s=7, color=colour, label=group, linewidths=0)
        if key == "vmm_cluster":
            for group in groups:
                x, y = np.median(place[(cells.obs[key] == group).to_numpy()], axis=0)
                ax.text(x, y, group, fontsize=13, weight="bold", ha="center", va="center")
        else:
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2, frameon=False,
                      fontsize=9, markerscale=2.2, handletextpad=0.1)  # fmt: skip
        ax.set(title=title, xticks=[], yticks=[])
        ax.spines[:].set_color("#bbbbbb")
    figure.savefig(IMAGES / "cells.png")


def shrink(path: Path) -> None:
    """Reduce a picture to the colours of a palette."""
    Image.open(path).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def main() -> None:
    """Draw all pictures."""
    example, demo = map(Path, sys.argv[1:])
    draw_cells(example)
    for name in ("latent.png", "samples.png", "tree.png"):
        shutil.copy(demo / name, IMAGES / name)
    for path in IMAGES.glob("*.png"):
        shrink(path)


if __name__ == "__main__":
    main()
