"""Draw the site's pictures of runs, in colours that colour-blind readers tell apart.

    vmm-fast integrate --example --out example-vmm && vmm-fast demo --out demo-output
    python docs/pictures.py example-vmm demo-output    # without arguments: sketches alone

Pictures have a white ground, on which the site's dark theme shows them too. Sketches are drawn in
the theme's own colour of text, where the page has them inline.
"""

import math
import shutil
import sys
from pathlib import Path

from anndata import read_h5ad
from PIL import Image

from vmm_fast.plots import plot_latent
from vmm_fast.plots.drawing import PALETTE

IMAGES = Path(__file__).parent / "images"
COLOURS = 256  # of a palette: a third of the size, and no difference to see


# Sketches of trees, from the root down: the confusion of a join and its branches. A leaf is 1, and
# a branch in a list is a cluster.
TREES = {
    "good": (
        "clear: long bare branches between clusters",
        (0.01, (0.02, [(0.3, 1, (0.4, 1, 1))], [(0.25, 1, 1, 1)]),
         (0.03, [(0.2, (0.5, 1, 1), 1)], [(0.3, 1, 1, 1)])),
    ),
    "few": (
        "too few components: each leaf is a cluster",
        (0.02, [1], (0.04, [1], (0.05, [1], (0.07, [1], [1])))),
    ),
    "none": (
        "no structure: all joins lie close together",
        (0.09, [(0.1, 1, (0.11, 1, (0.12, 1, 1)))], [(0.1, (0.11, 1, 1), (0.12, 1, (0.13, 1, 1)))]),
    ),
}  # fmt: skip
WIDTH, TOP, BOTTOM, LEFT = 440, 34, 190, 62


def count_leaves(node) -> int:
    """Return the number of leaves of a tree in TREES."""
    if node == 1:
        return 1
    return sum(map(count_leaves, node if isinstance(node, list) else node[1:]))


def draw_tree(name: str) -> None:
    """Write the sketch of a tree of components."""
    title, root = TREES[name]
    step = (WIDTH - LEFT - 20) / count_leaves(root)
    lines, colours = [], iter(PALETTE)
    place = LEFT - step / 2

    def height(confusion: float) -> float:
        return BOTTOM + (BOTTOM - TOP) * math.log10(confusion) / 2

    def draw(node, colour: str) -> tuple[float, float]:
        nonlocal place
        if node == 1:
            place += step
            lines.append(f'<circle cx="{place:.0f}" cy="{BOTTOM}" r="4" fill="{colour}"/>')
            return place, BOTTOM
        y, ends = height(node[0]), []
        for branch in node[1:]:
            cluster = isinstance(branch, list)
            own = next(colours) if cluster else colour
            branch = branch[0] if cluster else branch
            ends.append(draw(branch, own))
            x, below = ends[-1]
            stem = own if branch == 1 else colour
            lines.append(f'<path d="M{x:.0f} {below:.0f}V{y:.0f}" stroke="{stem}"/>')
        first, last = ends[0][0], ends[-1][0]
        lines.append(f'<path d="M{first:.0f} {y:.0f}H{last:.0f}" stroke="{colour}"/>')
        return (first + last) / 2, y

    draw(root, "currentColor")
    ticks = "".join(
        f'<text x="{LEFT - 8}" y="{height(c) + 5:.0f}" text-anchor="end">{c:.0%}</text>'
        f'<path d="M{LEFT} {height(c):.0f}H{WIDTH - 10}" stroke="currentColor" opacity="0.15"/>'
        for c in (0.01, 0.1, 1)
    )
    (IMAGES / f"tree-{name}.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 206" role="img" '
        'font-family="sans-serif" font-size="14" fill="currentColor">'
        f"<title>A tree, {title}</title>"
        f'<text x="{LEFT}" y="16">{title}</text>{ticks}'
        f'<g fill="none" stroke-width="2.5">{"".join(lines)}</g></svg>\n'
    )


def draw_cells(folder: Path) -> None:
    """Draw the embedding of ``vmm-fast integrate --example`` by cluster and by cell type."""
    cells = read_h5ad(folder / "cells.h5ad")
    plot_latent(
        cells.obsm["X_vmm"],
        cells.obs["vmm_cluster"].astype(int),
        cells.obs["bulk_labels"].astype(str),
        path=IMAGES / "cells.png",
        projection="tsne",
    )


def shrink(path: Path) -> None:
    """Reduce a picture to the colours of a palette."""
    Image.open(path).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def main() -> None:
    """Draw all pictures."""
    for name in TREES:
        draw_tree(name)
    if not sys.argv[1:]:  # sketches alone
        return
    example, demo = map(Path, sys.argv[1:])
    draw_cells(example)
    for name in ("latent.png", "samples.png", "tree.png"):
        shutil.copy(demo / name, IMAGES / name)
    for path in IMAGES.glob("*.png"):
        shrink(path)


if __name__ == "__main__":
    main()
