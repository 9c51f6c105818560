"""One HTML page about integrated and clustered cells: ``report.html.jinja`` filled in.

Pictures and styles are inside the page. It needs no network and no scripts, and its
Content-Security-Policy forbids them. Names come from the data: the template escapes every one.
"""

from __future__ import annotations

import base64
import io
import os
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scanpy as sc
import torch
from anndata import AnnData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import colormaps
from matplotlib.colors import to_hex
from scipy.sparse import csr_matrix

from vmm_fast._files import write_atomically
from vmm_fast._text import counted
from vmm_fast.cells.writing import LABEL
from vmm_fast.clusters import Clusters, ClusterTree
from vmm_fast.clusters.tree import ranks_by_size
from vmm_fast.plots import drawing
from vmm_fast.plots.components import tree_figure
from vmm_fast.plots.latent import matched_colors, project, scatter, write_where_densest
from vmm_fast.plots.training import curves_figure
from vmm_fast.scvi.markers import LEAST_CELLS

EMBEDDED = 100_000  # most cells in the pictures
TESTED = 500  # most cells of a cluster in the dot plot
MARKERS = 6  # most marker genes that the table names
DOTS = 40  # most clusters in the dot plot
SHOWN = 100  # most batches or labels that are shown apart
LISTED = 20  # most names in a legend that is not folded
MISSING = "#b5b5b5"

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    undefined=StrictUndefined,
)
TEMPLATES.filters["counted"] = counted
TEMPLATES.filters["short"] = lambda name: name if len(name) <= 28 else name[:27] + "…"


def write_report(
    path: str | os.PathLike[str],
    adata: AnnData,
    history: Mapping[str, Sequence[float]],
    markers: pd.DataFrame,
    drawn_from: tuple[pd.DataFrame, np.ndarray] | None = None,
    tree: tuple[ClusterTree, Clusters] | None = None,
) -> None:
    """Write a page with pictures, tables and settings of a trained model's clusters.

    Parameters
    ----------
    path : str or os.PathLike
        The file to write, whole or not at all.
    adata : AnnData
        Cells with counts, as :class:`vmm_fast.cells.integration.Integration` describes them in
        obs, obsm and ``uns["vmm"]``. They are left as they are.
    history : mapping of str to sequence of float
        Names as in scvi-tools' ``model.history``, one value an epoch.
    markers : DataFrame
        As ``get_marker_genes`` of the model returns them.
    drawn_from : tuple of DataFrame and ndarray of int, optional
        If adata's cells are a sample: obs of all cells, and the rows of it that are in adata. The
        embedding and marker genes are those of the sample, all other numbers those of all cells.
    tree : tuple of ClusterTree and Clusters, optional
        Tree of the components, and the clusters that it is cut into.
    """
    z = np.asarray(adata.obsm["X_vmm"], dtype=np.float32)
    if len(z) == 0 or not np.isfinite(z).all():
        raise ValueError(
            f'adata.obsm["X_vmm"] must hold finite values of at least one cell, but has '
            f"shape {z.shape}"
        )
    obs, rows = (adata.obs, np.arange(len(z))) if drawn_from is None else drawn_from
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            # Warnings are of cells without counts, and of clusters with nothing to compare.
            warnings.simplefilter("ignore")
            page = _page(adata, z, obs, rows, history, markers, tree)
    finally:
        torch.set_num_threads(threads)  # scanpy's compiled code changes OpenMP's number
    # Characters that UTF-8 lacks (lone surrogates) must not prevent the page.
    write_atomically(path, lambda file: file.write(page.encode("utf-8", "replace")))


@dataclass(frozen=True)
class _Groups:
    """A column of categories: their names, and each cell's index among them, -1 for none."""

    title: str
    names: list[str]
    codes: np.ndarray
    palette: Sequence[Any] = tuple(drawing.PALETTE)

    @property
    def colors(self) -> list[str]:
        """A colour for each name; the last, at index -1, is for cells without a category."""
        return [*map(to_hex, islice(cycle(self.palette), len(self.names))), MISSING]

    def counts_in(self, other: _Groups) -> np.ndarray:
        """Return the number of cells in each pair of groups, [groups, groups of other + 1].

        The last column counts cells that have no group in the other.
        """
        counts = np.zeros((len(self.names) + 1, len(other.names) + 1), dtype=int)
        np.add.at(counts, (self.codes, other.codes), 1)
        return counts[:-1]

    @property
    def legend(self) -> list[tuple[str, str]]:
        """Each name with its colour."""
        return list(zip(self.names, self.colors, strict=False))

    @property
    def sizes(self) -> np.ndarray:
        """Number of cells in each group."""
        return np.bincount(self.codes[self.codes >= 0], minlength=len(self.names))


def _groups(obs: pd.DataFrame, key: str, title: str) -> _Groups:
    column = obs[key].astype("category").cat.remove_unused_categories()
    names = [f"{c:g}" if isinstance(c, float) else str(c) for c in column.cat.categories]
    return _Groups(title, names, column.cat.codes.to_numpy(dtype=int))


def _by_size(groups: _Groups, most: int | None = None) -> _Groups:
    """Return the groups with the largest first; those beyond `most` are merged into one."""
    rank = np.append(ranks_by_size(groups.sizes), -1)  # the last is for the index -1
    names = [groups.names[i] for i in np.argsort(rank[:-1])]
    if most is not None and len(names) > most:
        rank = np.minimum(rank, most - 1)
        names = [*names[: most - 1], f"{len(names) - most + 1:,} others"]
    return _Groups(groups.title, names, rank[groups.codes])


def _page(
    adata: AnnData,
    z: np.ndarray,
    obs: pd.DataFrame,
    rows: np.ndarray,
    history: Mapping[str, Sequence[float]],
    found: pd.DataFrame,
    tree: tuple[ClusterTree, Clusters] | None,
) -> str:
    settings = adata.uns["vmm"]
    seed = int(settings.get("seed", 0))
    rng = np.random.default_rng(seed)
    clusters = _by_size(_groups(obs, "vmm_cluster", "cluster"))
    keys: tuple[tuple[str, Any], ...]
    keys = (("batch", settings.get("batch_key")), ("label", settings.get("labels_key")))
    if LABEL in obs:
        keys += (("predicted label", LABEL),)
    every = {title: _groups(obs, key, title) for title, key in keys if key}
    shown = {
        title: groups if len(groups.names) <= SHOWN else _by_size(groups, SHOWN)
        for title, groups in every.items()
    }
    # A label has the colour of its cluster, a batch none of either.
    own = drawing.distinct_colors(len(clusters.names))
    taken = set(clusters.colors)
    by_name: dict[str, str] = {}  # a label has one colour, whether given or predicted
    for title in ("label", "predicted label"):
        if title in shown:
            shared = shown[title].counts_in(clusters)[:, :-1]
            named = zip(shown[title].names, matched_colors(shared, own), strict=False)
            palette = [by_name.get(name, to_hex(color)) for name, color in named]
            shown[title] = replace(shown[title], palette=palette)
            by_name |= dict(shown[title].legend)
            taken.update(shown[title].colors)
    if "batch" in shown:
        others = [color for color in drawing.PALETTE if color not in taken]
        shown["batch"] = replace(shown["batch"], palette=others or drawing.PALETTE)
    batches, labels = shown.get("batch"), shown.get("label") or shown.get("predicted label")
    probability = obs["vmm_cluster_probability"].to_numpy(dtype=float)
    entropy = obs["vmm_cluster_entropy"].to_numpy(dtype=float)
    markers = _Markers(adata, clusters, rows, settings.get("layer"), rng, found)
    used = counted(int(settings.get("clusters_used", len(clusters.names))), "cluster")
    if settings.get("components_used"):
        used += f" of {counted(int(settings['components_used']), 'non-empty component')}"
    sizes = (
        counted(len(obs), "cell"),
        counted(adata.n_vars, "gene"),
        counted(len(every["batch"].names) if "batch" in every else 1, "batch", "batches"),
        used,
    )
    packages = ("vmm-fast", "scvi-tools", "torch", "scanpy", "anndata")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    curves = _curves(history)
    return TEMPLATES.get_template("report.html.jinja").render(
        summary=", ".join(sizes),
        embedding=_embedding(z, rows, [clusters, *shown.values()], entropy, seed, rng),
        tree=tree and len(tree[0].leaves) > 1 and _png(tree_figure(*tree)),
        drawn=len(rows) if len(rows) < len(obs) else 0,
        key=batches.legend if batches is not None and len(batches.names) <= LISTED else [],
        common=labels and f"most common {labels.title}",
        clusters=_cluster_rows(clusters, batches, labels, probability, markers),
        dots=markers.dot_plot(),
        shown=DOTS if len(markers.tested) > DOTS else 0,
        composition=[
            (groups.title, _where_cells_went(clusters, groups))
            for groups in shown.values()
            if len(groups.names) > 1
        ],
        run=settings,
        labelled=0 if labels is None else int((labels.codes >= 0).sum()),
        curves=_png(curves_figure(curves)) if curves else "",
        epochs=len(curves),
        few=LEAST_CELLS,
        listed=LISTED,
        settings=[
            *_flat(settings),
            ("page made with", f"{versions}, Python {platform.python_version()}"),
        ],
    )


def _png(figure: Any) -> str:
    file = io.BytesIO()
    drawing.write(figure, file)
    return base64.b64encode(file.getvalue()).decode()


# --- embedding ---


def _embedding(
    z: np.ndarray, rows: np.ndarray, groups: list[_Groups], entropy: np.ndarray, seed: int, rng: Any
) -> dict[str, Any]:
    cells = np.arange(len(z))
    if len(z) > EMBEDDED:
        cells = np.sort(rng.choice(len(z), EMBEDDED, replace=False))
    plane, name = _plane(z[cells], seed)
    note = f"{name} of the {z.shape[1]} latent dimensions."
    if len(z) < len(entropy):
        note += f" {counted(len(z), 'cell')} drawn from {len(entropy):,}."
    if len(cells) < len(z):
        note += f" {len(cells):,} random cells of {len(z):,}."
    cells = rows[cells]  # rows among all cells, as in the groups
    order = rng.permutation(len(cells))  # so that no group covers the others
    panels = [_group_panel(plane, one, cells, order) for one in groups]
    return {"note": note, "panels": [*panels, _entropy_panel(plane, entropy[cells])]}


def _plane(z: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    """Return points in the plane [cells, 2], and the name of the method that placed them."""
    if len(z) < 15 or z.shape[1] <= 2:  # no neighbourhoods, or no need
        plane, _ = project(z.astype(float), "pca", np.random.default_rng(seed), seed)
        return plane, "Principal components" if z.shape[1] > 2 else "Plot"
    data = AnnData(z)
    # Exact neighbours: cheap in few dimensions, and scanpy's default fails with pynndescent 0.7.
    sc.pp.neighbors(data, use_rep="X", transformer="sklearn", random_state=seed)
    sc.tl.umap(data, random_state=seed)
    return data.obsm["X_umap"], "UMAP"


def _scatter(plane: np.ndarray, colors: Any, group_of: Any, order: Any, names: Any = None) -> str:
    figure = drawing.figure_of(4.6, 4.6, layout=None)
    figure.set_dpi(200)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    scatter(ax, plane, group_of, colors, order)
    if names is not None:
        present = np.unique(group_of[group_of >= 0])
        write_where_densest(ax, plane, group_of, names, present)
    return _png(figure)


def _group_panel(
    plane: np.ndarray, groups: _Groups, cells: np.ndarray, order: np.ndarray
) -> dict[str, Any]:
    number, legend, names = len(groups.names), groups.legend, None
    if groups.title == "cluster":
        names = groups.names
    elif groups.title.endswith("label") and number > LISTED:
        # Numbered in the picture, since a long legend is hard to match by colour.
        names = [str(i + 1) for i in range(number)]
        legend = [(f"{n}  {name}", color) for n, (name, color) in zip(names, legend, strict=True)]
    if (groups.codes < 0).any():
        legend = [*legend, ("no value", MISSING)]
    colors = np.array(groups.colors)
    return {
        "title": groups.title,
        "picture": _scatter(plane, colors, groups.codes[cells], order, names),
        "by": f"{groups.title}, {counted(number, 'colour')}",
        "legend": legend,
        "number": number,
        "ramp": None,
    }


def _entropy_panel(plane: np.ndarray, entropy: np.ndarray) -> dict[str, Any]:
    finite = np.nan_to_num(entropy, posinf=0, neginf=0)
    top = max(float(finite.max()), 0.01)
    scale = colormaps["viridis"]
    # Uncertain cells on top: they lie between the others.
    order = np.argsort(finite, kind="stable")
    return {
        "title": "entropy",
        "picture": _scatter(plane, scale(finite / top), np.arange(len(plane)), order),
        "by": f"the entropy of cluster probabilities, 0 to {top:.2g} nats",
        "ramp": [to_hex(scale(x)) for x in np.linspace(0, 1, 9)],
        "top": f"{top:.2g}",
    }


# --- clusters ---


def _cluster_rows(
    clusters: _Groups,
    batches: _Groups | None,
    labels: _Groups | None,
    probability: np.ndarray,
    markers: _Markers,
) -> list[dict[str, Any]]:
    """Return the rows of the table: one for all cells, and one for each cluster."""
    sizes, total = clusters.sizes, len(clusters.codes)
    mean = np.bincount(clusters.codes, probability, len(sizes)) / np.maximum(sizes, 1)
    rows: list[dict[str, Any]] = [
        {"name": "all", "color": "", "cells": total, "share": "100 %", "genes": [], "why": ""}
        | {"probability": probability.mean()}
    ]
    for c, (name, color) in enumerate(clusters.legend):
        row = {"name": name, "color": color, "cells": sizes[c], "probability": mean[c]}
        rows.append(row | {"share": drawing.percent(sizes[c] / total)} | markers.named(c))
    for name, groups, show in (("bar", batches, _bar), ("label", labels, _most_common)):
        if groups is not None:
            counts = clusters.counts_in(groups)
            for row, of_one in zip(rows, [counts.sum(0), *counts], strict=True):
                row[name] = show(groups, of_one)
    return rows


def _bar(groups: _Groups, counts: np.ndarray) -> dict[str, Any]:
    """Return counts [groups + 1] as parts of a bar, and in words."""
    shares = counts / max(counts.sum(), 1)
    names = [*groups.names, "no value"]
    parts = [(n, s, c) for n, s, c in zip(names, shares, groups.colors, strict=True) if s > 0]
    largest = sorted(parts, key=lambda part: -part[1])[:8]
    text = ", ".join(f"{name} {drawing.percent(share)}" for name, share, _ in largest)
    if len(largest) < len(parts):
        text += f", {len(parts) - len(largest)} more"
    return {"text": text, "parts": parts}


def _most_common(labels: _Groups, counts: np.ndarray) -> tuple[str, str]:
    """Return the most common label, and its share of the cells that have a label."""
    labelled = counts[:-1]
    if labelled.sum() == 0:
        return "-", ""
    top = int(labelled.argmax())
    return labels.names[top], drawing.percent(labelled[top] / labelled.sum())


def _where_cells_went(clusters: _Groups, groups: _Groups) -> dict[str, Any]:
    """Return a matrix of squares for the template."""
    counts = clusters.counts_in(groups)[:, :-1]
    shares = counts / np.maximum(counts.sum(0), 1)
    numbers = len(groups.names) <= LISTED
    marks = [
        {
            "at": (c, g),
            "strength": shares[c, g],
            "text": f"{100 * shares[c, g]:.0f}" if numbers and shares[c, g] >= 0.005 else "",
            "title": f"{groups.names[g]}, cluster {clusters.names[c]}: "
            f"{counted(int(counts[c, g]), 'cell')}, {drawing.percent(shares[c, g])}",
        }
        for c, g in zip(*counts.nonzero(), strict=True)
    ]
    alt = f"Share of the cells of each {groups.title} in each cluster"
    names = {"rows": clusters.names, "columns": groups.names}
    return {**names, "marks": marks, "alt": alt, "width": 30 if numbers else 14}


# --- marker genes ---


class _Markers:
    """Marker genes, and their expression in some cells of each cluster."""

    def __init__(
        self,
        adata: AnnData,
        clusters: _Groups,
        rows: np.ndarray,
        layer: str | None,
        rng: np.random.Generator,
        found: pd.DataFrame,
    ):
        self.clusters, self.sizes, self.drawn = clusters, clusters.sizes, len(rows)
        self.genes = [str(name) for name in adata.var_names]
        codes = clusters.codes[rows]  # adata may lack cells of some clusters
        members = [np.flatnonzero(codes == c) for c in range(len(clusters.names))]
        chosen = [rng.choice(of_one, min(TESTED, len(of_one)), replace=False) for of_one in members]
        cells = np.sort(np.concatenate(chosen))
        counts = adata.layers[layer] if layer else adata.X
        self.codes = codes[cells]
        data = AnnData(csr_matrix(counts[cells], dtype=np.float32))
        sc.pp.normalize_total(data, target_sum=1e4)
        sc.pp.log1p(data)
        self.expression = data.X
        self.tested = np.flatnonzero([len(of_one) >= LEAST_CELLS for of_one in members])
        best = found.groupby("cluster", observed=True).head(MARKERS)
        at = adata.var_names.get_indexer(best["gene"])
        of_cluster = best["cluster"].map(str).to_numpy()
        self.found = {c: at[of_cluster == name].tolist() for c, name in enumerate(clusters.names)}

    def named(self, cluster: int) -> dict[str, Any]:
        """Return the names of a cluster's marker genes, or why there are none."""
        if cluster not in self.tested:
            few = self.sizes[cluster] < LEAST_CELLS
            return {"genes": [], "why": "too few cells" if few else "too few cells drawn"}
        genes = [self.genes[g] for g in self.found.get(cluster, ())]
        return {"genes": genes, "why": "" if genes else "none stands out"}

    def dot_plot(self) -> dict[str, Any] | None:
        """Return a plot of the first markers: mean expression, and share of expressing cells."""
        rows = self.tested[:DOTS]
        each = 3 if len(rows) <= 12 else 2 if len(rows) <= 25 else 1
        chosen = dict.fromkeys(g for c in rows for g in self.found.get(c, [])[:each])
        if not chosen:
            return None
        genes = list(chosen)
        values = self.expression[:, genes]
        members = csr_matrix(np.equal.outer(rows, self.codes).astype(np.float32))
        number = members.sum(1).A
        mean = (members @ values).toarray() / number
        share = (members @ (values > 0).astype(np.float32)).toarray() / number
        scaled = mean / np.maximum(mean.max(0), np.finfo(np.float32).tiny)
        names = [self.clusters.names[c] for c in rows]
        marks = [
            {
                "at": (c, g),
                "strength": scaled[c, g],
                "radius": 7 * np.sqrt(share[c, g]),
                "title": f"{self.genes[genes[g]]}, cluster {names[c]}: in {100 * share[c, g]:.0f} "
                f"% of cells, mean {mean[c, g]:.2f}",
            }
            for c, g in zip(*(share >= 0.01).nonzero(), strict=True)
        ]
        columns = [self.genes[g] for g in genes]
        alt = "Expression of marker genes (columns) in clusters (rows)"
        return {"rows": names, "columns": columns, "marks": marks, "alt": alt, "width": 16}


# --- training and settings ---

# names in scvi-tools' history, names that the curves have, sign
_CURVES = [
    (f"{theirs}_{split}", f"{prefix}_{ours}", sign)
    for theirs, ours, sign in (
        ("elbo", "elbo", -1),  # theirs is the loss
        ("reconstruction_loss", "log_likelihood", -1),
        ("kl_local", "kl", 1),
    )
    for split, prefix in (("train", "train"), ("validation", "validation"))
]


def _curves(history: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """Return the curves as :func:`plot_training_curves` takes them; empty if there are none."""
    epochs = max((len(history.get(theirs, ())) for theirs, _, _ in _CURVES), default=0)
    rows: list[dict[str, float]] = [{"epoch": e + 1.0} for e in range(epochs)]
    for theirs, ours, sign in _CURVES:
        values = [float(v) for v in history.get(theirs, ())]
        every = epochs // len(values) if values else 1  # validation may be taken every few epochs
        for i, value in enumerate(values):
            rows[(i + 1) * every - 1][ours] = sign * value
    drawn = any(np.isfinite(v) for row in rows for name, v in row.items() if name != "epoch")
    return rows if drawn else []


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
            continue
        if isinstance(value, (np.ndarray, list, tuple)):
            entries = [str(v) for v in np.ravel(value)[:8]]
            text = ", ".join(entries)
            if np.size(value) > len(entries):
                text = f"{np.size(value):,} values: {text}, …"
        else:
            text = "" if value is None else str(value)
            text = f"{value:.6g}" if isinstance(value, float) else text
        yield f"{prefix}{name}", text or "-"
