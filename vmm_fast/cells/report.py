"""One HTML page about integrated and clustered cells.

Pictures and styles are inside the page. It needs no network and no scripts, and its
Content-Security-Policy forbids them. Names come from the data, so every one is escaped.
"""

from __future__ import annotations

import base64
import io
import os
import platform
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scanpy as sc
import torch
from anndata import AnnData
from matplotlib import colormaps
from matplotlib.colors import to_hex
from scipy.sparse import csr_matrix
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from vmm_fast import plots
from vmm_fast._files import write_atomically
from vmm_fast._text import counted
from vmm_fast.clusters import Clusters, ClusterTree

__all__ = ["write_report"]

EMBEDDED = 100_000  # most cells in the pictures
TESTED = 500  # most cells of a cluster that its marker genes are sought in
FEW = 10  # clusters of fewer cells have no marker genes
MARKERS = 6  # most marker genes that the table names
DOTS = 40  # most clusters in the dot plot
SHOWN = 100  # most batches or labels that are shown apart
LISTED = 20  # most names in a legend that is not folded
MISSING = "#b5b5b5"


def write_report(
    path: str | os.PathLike[str],
    adata: AnnData,
    history: Mapping[str, Sequence[float]],
    drawn_from: tuple[pd.DataFrame, np.ndarray] | None = None,
    tree: tuple[ClusterTree, Clusters] | None = None,
) -> None:
    """Write a page with pictures, tables and settings of a trained model's clusters.

    Parameters
    ----------
    path : str or os.PathLike
        The file to write, whole or not at all.
    adata : AnnData
        All genes, with counts in ``layers[uns["vmm"]["layer"]]`` or, without a layer, in ``X``;
        ``obsm["X_vmm"]`` [cells, D], ``obs["vmm_cluster"]``, ``obs["vmm_cluster_probability"]``,
        ``obs["vmm_cluster_entropy"]`` (nats), and the settings in ``uns["vmm"]``: of these
        ``batch_key``, ``labels_key``, ``layer`` (each may be absent or empty),
        ``components_used`` and ``seed`` are used, all are shown. It is left as it is.
    history : mapping of str to sequence of float
        Names as in scvi-tools' ``model.history``, one value an epoch.
    drawn_from : tuple of DataFrame and ndarray of int, optional
        If adata's cells are a sample: obs of all cells, which is used instead of adata's, and the
        rows of it that are in adata. The embedding and marker genes are those of the sample, all
        other numbers those of all cells.
    tree : tuple of ClusterTree and Clusters, optional
        Tree of the components, and the clusters that it is cut into.

    Raises
    ------
    KeyError
        If adata, or obs of all cells, lacks an entry named above.
    ValueError
        If ``obsm["X_vmm"]`` is not finite, or there is no cell.
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
            page = _page(adata, z, obs, rows, history, tree)
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

    @property
    def colors(self) -> list[str]:
        """A colour for each name; the last, at index -1, is for cells without a category."""
        return [*map(to_hex, plots._colors(len(self.names))), MISSING]

    def counts_in(self, other: _Groups) -> np.ndarray:
        """Return the number of cells in each pair of groups, [groups, groups of other + 1].

        The last column counts cells that have no group in the other.
        """
        counts = np.zeros((len(self.names) + 1, len(other.names) + 1), dtype=int)
        np.add.at(counts, (self.codes, other.codes), 1)
        return counts[:-1]

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
    order = np.argsort(-groups.sizes, kind="stable")
    rank = np.full(len(order) + 1, -1)  # the last is for the index -1
    rank[order] = np.arange(len(order))
    names = [groups.names[i] for i in order]
    if most is not None and len(names) > most:
        rank = np.minimum(rank, most - 1)
        names = [*names[: most - 1], f"{len(names) - most + 1:,} others"]
    return _Groups(groups.title, names, rank[groups.codes])


def _page(
    adata: AnnData,
    z: np.ndarray,
    obs: pd.DataFrame,
    rows: np.ndarray,
    history: Mapping[str, Any],
    tree: tuple[ClusterTree, Clusters] | None,
) -> str:
    settings = adata.uns["vmm"]
    rng = np.random.default_rng(int(settings.get("seed", 0)))
    clusters = _by_size(_groups(obs, "vmm_cluster", "cluster"))
    batches = labels = None
    if settings.get("batch_key"):
        batches = _groups(obs, settings["batch_key"], "batch")
    if settings.get("labels_key"):
        labels = _groups(obs, settings["labels_key"], "label")
    scores = "" if labels is None else _scores(clusters, labels, str(settings["labels_key"]))
    if batches is not None and len(batches.names) > SHOWN:
        batches = _by_size(batches, SHOWN)
    if labels is not None and len(labels.names) > SHOWN:
        labels = _by_size(labels, SHOWN)

    probability = obs["vmm_cluster_probability"].to_numpy(dtype=float)
    entropy = obs["vmm_cluster_entropy"].to_numpy(dtype=float)
    markers = _Markers(adata, clusters, rows, settings.get("layer"), rng)
    used = counted(int(settings.get("clusters_used", len(clusters.names))), "cluster")
    if settings.get("components_used"):
        used += f" of {counted(int(settings['components_used']), 'component')}"
    summary = ", ".join(
        [
            counted(len(obs), "cell"),
            counted(adata.n_vars, "gene"),
            counted(1 if batches is None else len(batches.names), "batch", "batches"),
            used,
        ]
    )
    sections = [
        _section(
            "Embedding", _embedding(z, rows, clusters, batches, labels, entropy, settings, rng)
        ),
        _section("Clusters", _cluster_table(clusters, batches, labels, probability, markers)),
        _section("Marker genes", markers.dot_plot()),
    ]
    if tree is not None and len(tree[0].leaves) > 1:
        sections.insert(1, _section("Tree of components", _tree_picture(*tree)))
    composition = [
        _where_cells_went(clusters, groups)
        for groups in (batches, labels)
        if groups is not None and len(groups.names) > 1
    ]
    if composition:
        note = "<p>Where each column's cells are, in %: columns sum to 100 over the clusters.</p>"
        sections.append(
            _section(
                "Clusters in batches and labels",
                f'{note}<div class="side">',
                *composition,
                "</div>",
            )
        )
    if scores:
        sections.append(_section("Scores against labels", scores))
    sections += [
        _section("Training", _curves(history)),
        _section("How to read this page", GUIDE),
        _section("Settings", _settings_table(settings)),
    ]
    return TEMPLATE.format(style=STYLE, summary=escape(summary), body="\n".join(sections))


# --- pieces ---


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _swatch(color: str) -> str:
    return f'<i class="swatch" style="background:{color}"></i>'


def _picture(content: bytes, alt: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'


def _tree_picture(tree: ClusterTree, clusters: Clusters) -> str:
    note = (
        "<p>Clusters are groups of components. Two join at their confusion: how likely a cell of "
        "the smaller is taken for one of the larger.</p>"
    )
    file = io.BytesIO()
    plots._tree(tree, clusters).savefig(file, format="png")
    return note + _picture(file.getvalue(), "tree of components, in the colours of their clusters")


# --- embedding ---


def _embedding(
    z: np.ndarray,
    rows: np.ndarray,
    clusters: _Groups,
    batches: _Groups | None,
    labels: _Groups | None,
    entropy: np.ndarray,
    settings: Mapping[str, Any],
    rng: np.random.Generator,
) -> str:
    cells = np.arange(len(z))
    if len(z) > EMBEDDED:
        cells = np.sort(rng.choice(len(z), EMBEDDED, replace=False))
    plane, name = _plane(z[cells], int(settings.get("seed", 0)))
    note = f"{name} of the {z.shape[1]} latent dimensions."
    if len(z) < len(entropy):
        note += f" {counted(len(z), 'cell')} drawn from {len(entropy):,}."
    if len(cells) < len(z):
        note += f" {len(cells):,} random cells of {len(z):,}."

    cells = rows[cells]  # rows among all cells, as in the groups
    order = rng.permutation(len(cells))  # so that no group covers the others
    panels = [_group_panel(plane, clusters, cells, order, written=clusters.names)]
    if batches is not None:
        panels.append(_group_panel(plane, batches, cells, order))
    if labels is not None:
        # Many labels are numbered in the picture, since a long legend is hard to match by colour.
        numbers = [str(i + 1) for i in range(len(labels.names))]
        many = len(labels.names) > LISTED
        panels.append(_group_panel(plane, labels, cells, order, written=numbers if many else None))
    panels.append(_entropy_panel(plane, entropy[cells]))
    return f'<p>{note}</p>\n<div class="panels">' + "\n".join(panels) + "</div>"


def _plane(z: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    """Return points in the plane [cells, 2], and the name of the method that placed them."""
    if len(z) < 15 or z.shape[1] <= 2:  # no neighbourhoods, or no need
        plane, _ = plots._project(z.astype(float), "pca", np.random.default_rng(seed), seed)
        return plane, "Principal components" if z.shape[1] > 2 else "Plot"
    data = AnnData(z)
    # Exact neighbours: cheap in few dimensions, and scanpy's default fails with pynndescent 0.7.
    sc.pp.neighbors(data, use_rep="X", transformer="sklearn", random_state=seed)
    sc.tl.umap(data, random_state=seed)
    return data.obsm["X_umap"], "UMAP"


def _panel(
    title: str,
    plane: np.ndarray,
    colors: Any,
    group_of: np.ndarray,
    order: np.ndarray,
    alt: str,
    written: Sequence[str] | None,
    legend: str,
) -> str:
    figure = plots._figure(4.6, 4.6, layout=None)
    figure.set_dpi(200)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    plots._scatter(ax, plane, group_of, colors, order)
    if written is not None:
        present = np.unique(group_of[group_of >= 0])
        plots._write_where_densest(ax, plane, group_of, list(written), present)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    picture = _picture(file.getvalue(), alt)
    return f"<figure><h3>{title}</h3>{picture}<figcaption>{legend}</figcaption></figure>"


def _group_panel(
    plane: np.ndarray,
    groups: _Groups,
    cells: np.ndarray,
    order: np.ndarray,
    written: Sequence[str] | None = None,
) -> str:
    number = len(groups.names)
    names = groups.names
    if written not in (None, names):
        names = [f"{sign}  {name}" for sign, name in zip(written, names, strict=True)]
    entries = list(zip(names, groups.colors[:-1], strict=True))
    if (groups.codes < 0).any():
        entries.append(("no value", MISSING))
    legend = "".join(
        f'<li title="{escape(name)}">{_swatch(color)}{escape(_short(name))}</li>'
        for name, color in entries
    )
    legend = f'<ul class="legend">{legend}</ul>'
    if number > LISTED:
        if written is groups.names:
            legend = "Numbers stand at each cluster's median; colours as in the table below."
        else:
            legend = f"<details><summary>{number} names</summary>{legend}</details>"
    codes, colors = groups.codes[cells], np.array(groups.colors)
    alt = f"Embedding coloured by {groups.title}, {counted(number, 'colour')}"
    return _panel(groups.title, plane, colors, codes, order, alt, written, legend)


def _entropy_panel(plane: np.ndarray, entropy: np.ndarray) -> str:
    finite = np.nan_to_num(entropy, posinf=0, neginf=0)
    top = max(float(finite.max()), 0.01)
    scale = colormaps["viridis"]
    # Uncertain cells on top: they lie between the others.
    order = np.argsort(finite, kind="stable")
    stops = ",".join(to_hex(scale(x)) for x in np.linspace(0, 1, 9))
    legend = (
        f'<div class="ramp"><span>0</span><i style="background:linear-gradient(90deg,{stops})">'
        f"</i><span>{top:.2g} nats</span></div>"
    )
    alt = f"Embedding coloured by the entropy of cluster probabilities, 0 to {top:.2g} nats"
    cells = np.arange(len(plane))
    return _panel("entropy", plane, scale(finite / top), cells, order, alt, None, legend)


# --- clusters ---


def _cluster_table(
    clusters: _Groups,
    batches: _Groups | None,
    labels: _Groups | None,
    probability: np.ndarray,
    markers: _Markers,
) -> str:
    sizes, total = clusters.sizes, len(clusters.codes)
    mean = np.bincount(clusters.codes, probability, len(sizes)) / np.maximum(sizes, 1)
    heads = ["cluster", "cells", "share", "probability"]
    everything = ["all", f"{total:,}", "100 %", f"{probability.mean():.2f}"]
    columns = []
    for head, groups, show in (
        ("batches", batches, _bar),
        ("most common label", labels, _most_common),
    ):
        if groups is not None:
            counts = clusters.counts_in(groups)
            heads.append(head)
            everything.append(show(groups, counts.sum(0)))
            columns.append([show(groups, row) for row in counts])
    heads.append("marker genes")
    rows = [[*everything, ""]]
    for c, (name, color) in enumerate(zip(clusters.names, clusters.colors[:-1], strict=True)):
        row = [
            f"{_swatch(color)}{escape(name)}",
            f"{sizes[c]:,}",
            plots._percent(sizes[c] / total),
            f"{mean[c]:.2f}",
        ]
        row += [column[c] for column in columns]
        rows.append([*row, markers.named(c)])
    among = f", among the {markers.drawn:,} drawn" if markers.drawn < total else ""
    note = (
        "<p>Largest first. Probability: mean over the cluster's cells of that of their cluster. "
        f"Marker genes: of at most {TESTED} random cells a cluster, against the others'{among}.</p>"
    )
    key = "" if batches is None or len(batches.names) > LISTED else _key(batches)
    return f'{note}{key}<div class="clusters">{_table(heads, rows)}</div>'


def _key(groups: _Groups) -> str:
    entries = zip(groups.names, groups.colors[:-1], strict=True)
    items = "".join(f"<li>{_swatch(color)}{escape(_short(n))}</li>" for n, color in entries)
    return f'<ul class="legend">{items}</ul>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table, given cells in HTML; the first of each row is its head."""
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    body = "\n".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return (
        '<div class="wide"><table>\n<thead><tr>'
        f"{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _bar(groups: _Groups, counts: np.ndarray) -> str:
    """Return counts [groups + 1] as one stacked bar, in HTML."""
    shares = counts / max(counts.sum(), 1)
    names = [*groups.names, "no value"]
    parts = [(n, s, c) for n, s, c in zip(names, shares, groups.colors, strict=True) if s > 0]
    largest = sorted(parts, key=lambda part: -part[1])[:8]
    text = ", ".join(f"{name} {plots._percent(share)}" for name, share, _ in largest)
    if len(largest) < len(parts):
        text += f", {len(parts) - len(largest)} more"
    pieces = "".join(f'<i style="width:{100 * s:.3f}%;background:{c}"></i>' for _, s, c in parts)
    described = escape(text)
    return (
        f'<span class="bar" role="img" aria-label="{described}" title="{described}">{pieces}</span>'
    )


def _most_common(labels: _Groups, counts: np.ndarray) -> str:
    labelled = counts[:-1]  # without cells that have no label
    if labelled.sum() == 0:
        return "-"
    top = int(labelled.argmax())
    share = plots._percent(labelled[top] / labelled.sum())
    return f'{escape(labels.names[top])} <span class="muted">{share}</span>'


def _where_cells_went(clusters: _Groups, groups: _Groups) -> str:
    counts = clusters.counts_in(groups)[:, :-1]
    shares = counts / np.maximum(counts.sum(0), 1)
    numbers = len(groups.names) <= LISTED
    marks = [
        _Mark(
            c,
            g,
            shares[c, g],
            text=f"{100 * shares[c, g]:.0f}" if numbers and shares[c, g] >= 0.005 else "",
            title=f"{groups.names[g]}, cluster {clusters.names[c]}: "
            f"{counted(int(counts[c, g]), 'cell')}, {plots._percent(shares[c, g])}",
        )
        for c, g in zip(*counts.nonzero(), strict=True)
    ]
    alt = f"Share of the cells of each {groups.title} in each cluster"
    picture = _matrix(clusters.names, groups.names, marks, alt, 30 if numbers else 14)
    return f"<div><h3>{groups.title}</h3>{picture}</div>"


# --- marker genes ---


class _Markers:
    """Marker genes: each cluster's most overexpressed genes, by scanpy's t-test."""

    def __init__(
        self,
        adata: AnnData,
        clusters: _Groups,
        rows: np.ndarray,
        layer: str | None,
        rng: np.random.Generator,
    ):
        self.clusters, self.sizes, self.drawn = clusters, clusters.sizes, len(rows)
        self.genes = [str(name) for name in adata.var_names]
        codes = clusters.codes[rows]  # adata may lack cells of some clusters
        members = [np.flatnonzero(codes == c) for c in range(len(clusters.names))]
        chosen = [rng.choice(of_one, min(TESTED, len(of_one)), replace=False) for of_one in members]
        cells = np.sort(np.concatenate(chosen))
        counts = adata.layers[layer] if layer else adata.X
        self.codes = codes[cells]
        # Row numbers stand for gene names, which may occur twice.
        data = AnnData(csr_matrix(counts[cells], dtype=np.float32))
        sc.pp.normalize_total(data, target_sum=1e4)
        sc.pp.log1p(data)
        self.expression = data.X
        self.tested = np.flatnonzero([len(of_one) >= FEW for of_one in members])
        self.found: dict[int, list[int]] = {}
        if len(np.unique(self.codes)) > 1 and len(self.tested):
            data.obs["cluster"] = pd.Categorical(self.codes.astype(str))
            sc.tl.rank_genes_groups(
                data,
                "cluster",
                groups=[str(c) for c in self.tested],
                method="t-test_overestim_var",
                n_genes=min(MARKERS, data.n_vars),
                use_raw=False,
            )
            for c in self.tested.tolist():
                table = sc.get.rank_genes_groups_df(data, str(c))
                clear = (table["pvals_adj"] < 0.05) & (table["logfoldchanges"] > 0)
                self.found[c] = table["names"][clear].astype(int).tolist()

    def named(self, cluster: int) -> str:
        """Return the names of a cluster's marker genes for the table, in HTML."""
        if cluster not in self.tested:
            few = "too few cells" if self.sizes[cluster] < FEW else "too few cells drawn"
            return f'<span class="muted">{few}</span>'
        genes = self.found.get(cluster)
        if not genes:
            return '<span class="muted">none stands out</span>'
        return ", ".join(escape(self.genes[g]) for g in genes)

    def dot_plot(self) -> str:
        """Return a plot of the first markers: mean expression, and share of expressing cells."""
        rows = self.tested[:DOTS]
        each = 3 if len(rows) <= 12 else 2 if len(rows) <= 25 else 1
        chosen = dict.fromkeys(g for c in rows for g in self.found.get(c, [])[:each])
        if not chosen:
            return "<p>No gene stands out in any cluster.</p>"
        genes = list(chosen)
        values = self.expression[:, genes]
        members = csr_matrix(np.equal.outer(rows, self.codes).astype(np.float32))
        number = members.sum(1).A
        mean = (members @ values).toarray() / number
        share = (members @ (values > 0).astype(np.float32)).toarray() / number
        scaled = mean / np.maximum(mean.max(0), np.finfo(np.float32).tiny)
        names = [self.clusters.names[c] for c in rows]
        marks = [
            _Mark(
                c,
                g,
                scaled[c, g],
                radius=7 * np.sqrt(share[c, g]),
                title=f"{self.genes[genes[g]]}, cluster {names[c]}: in {100 * share[c, g]:.0f} % "
                f"of cells, mean {mean[c, g]:.2f}",
            )
            for c, g in zip(*(share >= 0.01).nonzero(), strict=True)
        ]
        columns = [self.genes[g] for g in genes]
        alt = "Expression of marker genes (columns) in clusters (rows)"
        note = (
            "Size: share of the cluster's cells that have the gene. Colour: mean of log(1 + counts "
            "per 10,000), relative to the cluster where the gene is highest."
        )
        if len(self.tested) > DOTS:
            note += f" The {DOTS} largest clusters."
        return f"<p>{note}</p>" + _matrix(names, columns, marks, alt, 16)


# --- drawing ---


@dataclass(frozen=True)
class _Mark:
    """A square in a matrix, or a circle if it has a radius."""

    row: int
    column: int
    strength: float  # 0 to 1
    title: str
    text: str = ""
    radius: float | None = None


def _matrix(
    rows: Sequence[str], columns: Sequence[str], marks: Iterable[_Mark], alt: str, width: int
) -> str:
    """Return an SVG of marks with column and row names, in the colours of the page."""
    height = 16
    rows, columns = [_short(name) for name in rows], [_short(name) for name in columns]
    left = 12 + 7.5 * max(map(len, rows))
    top = 12 + 7.5 * max(map(len, columns))
    right, bottom = left + width * len(columns), top + height * len(rows)
    parts = [
        f'<rect x="{left:g}" y="{top:g}" width="{right - left:g}" height="{bottom - top:g}" '
        'class="field"/>'
    ]
    for r, name in enumerate(rows):
        y = top + (r + 0.5) * height
        parts.append(f'<text x="{left - 5:g}" y="{y:g}" class="row">{escape(name)}</text>')
    for c, name in enumerate(columns):
        x = left + (c + 0.5) * width
        parts.append(
            f'<text transform="translate({x:g},{top - 5:g}) rotate(-90)">{escape(name)}</text>'
        )
    for mark in marks:
        x, y = left + mark.column * width, top + mark.row * height
        title = f"<title>{escape(mark.title)}</title>"
        fill = f'fill-opacity="{0.08 + 0.92 * mark.strength:.2f}"'
        if mark.radius is not None:
            center = f'cx="{x + width / 2:g}" cy="{y + height / 2:g}"'
            parts.append(f'<circle {center} r="{mark.radius:.1f}" {fill}>{title}</circle>')
            continue
        box = f'x="{x:g}" y="{y:g}" width="{width}" height="{height}"'
        parts.append(f'<rect {box} class="cell" {fill}>{title}</rect>')
        if mark.text:
            kind = "number strong" if mark.strength > 0.5 else "number"
            place = f'x="{x + width / 2:g}" y="{y + height / 2:g}"'
            parts.append(f'<text {place} class="{kind}">{mark.text}</text>')
    size = f'width="{right + 2:g}" height="{bottom + 2:g}"'
    return (
        f'<div class="wide"><svg {size} role="img" aria-label="{escape(alt)}">'
        + "".join(parts)
        + "</svg></div>"
    )


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


def _curves(history: Mapping[str, Sequence[float]]) -> str:
    epochs = max((len(history.get(theirs, ())) for theirs, _, _ in _CURVES), default=0)
    rows: list[dict[str, float]] = [{"epoch": e + 1.0} for e in range(epochs)]
    for theirs, ours, sign in _CURVES:
        values = [float(v) for v in history.get(theirs, ())]
        every = epochs // len(values) if values else 1  # validation may be taken every few epochs
        for i, value in enumerate(values):
            rows[(i + 1) * every - 1][ours] = sign * value
    if not any(np.isfinite(v) for row in rows for name, v in row.items() if name != "epoch"):
        return "<p>No training curves were recorded.</p>"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "curves.png"  # an SVG of matplotlib differs from run to run
        plots.plot_training_curves(rows, file)
        picture = _picture(file.read_bytes(), f"Training curves of {epochs} epochs")
    return f"<p>Nats a cell. Higher is better for the ELBO.</p><figure>{picture}</figure>"


# --- scores and settings ---


def _scores(clusters: _Groups, labels: _Groups, key: str) -> str:
    labelled = labels.codes >= 0
    if labelled.sum() < 2:
        return ""
    # Only these two scores: all those of vmm_fast.metrics take many times as long.
    pair = labels.codes[labelled], clusters.codes[labelled]
    ari, nmi = adjusted_rand_score(*pair), normalized_mutual_info_score(*pair)
    rows = [
        ["ARI", f"{ari:.3f}", "adjusted Rand index: 1 is agreement, 0 is chance"],
        ["NMI", f"{nmi:.3f}", "normalised mutual information: 1 is agreement"],
    ]
    note = (
        f"The clusters against {escape(key)} of {counted(int(labelled.sum()), 'labelled cell')}. "
        "Labels were used for these scores alone, and are shown above: training did not see them."
    )
    return f"<p>{note}</p>" + _table(["score", "value", "meaning"], rows)


def _settings_table(settings: Mapping[str, Any]) -> str:
    packages = ("vmm-fast", "scvi-tools", "torch", "scanpy", "anndata")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    rows = [[escape(name), escape(value)] for name, value in _flat(settings)]
    rows.append(["page made with", f"{versions}, Python {platform.python_version()}"])
    return _table(["setting", "value"], rows)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
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
        yield f"{prefix}{name}", text or "-"


# --- the page ---

GUIDE = f"""<ul>
<li>A cluster is a group of components of the model's prior: those whose cells the model cannot tell
apart. --resume with --resolution or --clusters cuts them elsewhere, without training.</li>
<li>A batch that has clusters of its own can be biology that only this batch holds, or missed
integration. Neither this page nor the model knows which: look at the marker genes, and at whether
its cells should exist in other batches too. The reverse holds as well: batches mixed in every
cluster can hide a difference that is real.</li>
<li>Entropy is how undecided a cell's cluster is, in nats: 0 is certain, 0.69 is an even choice
between two clusters. Between neighbouring clusters it marks transitions; a whole cluster of high
entropy is not apart from its neighbour.</li>
<li>Clusters with fewer than {FEW} cells can be rare types, doublets or noise: check them before
they are named.</li>
<li>Marker genes were sought in the cells that were clustered, so that any p-value would be too
small: take them as a ranking. They are compared on the counts as they are, batches not taken
out.</li>
<li>Training curves break where the mixture takes over: in the steps before it, N(0, I) stands in
for it, so that batches come to overlap.</li>
<li>In a UMAP, the distance between separate groups and their size mean little.</li>
</ul>"""

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1c2126;--muted:#5b6570;--line:#d8dde2;
--soft:#f3f5f7;--accent:#1f5fa8}
@media (prefers-color-scheme:dark){:root{--paper:#15181c;--ink:#e6e9ec;--muted:#9aa5b0;
--line:#343b43;--soft:#1e2329;--accent:#7db4f0}}
@media print{:root{color-scheme:light;--paper:#fff;--ink:#000;--muted:#444;--line:#bbb;
--soft:#f3f5f7;--accent:#1f5fa8}section,figure,tr{break-inside:avoid}.wide{overflow:visible}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem;max-width:1200px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;
-webkit-print-color-adjust:exact;print-color-adjust:exact}
h1{font-size:1.6rem;margin:0}
h2{font-size:1.2rem;margin:2.4rem 0 .5rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:.8rem 0 .3rem;overflow-wrap:anywhere}
p{margin:.4rem 0 .8rem}li{margin:.2rem 0}
.summary{font-size:1.05rem}.muted,figcaption{color:var(--muted)}
.panels{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:1rem 1.5rem;max-width:1000px}
@media (max-width:560px){.panels{grid-template-columns:minmax(0,1fr)}}
.side{display:flex;flex-wrap:wrap;gap:0 3rem}.side>div{max-width:100%}
figure{margin:0;min-width:0}figcaption{font-size:.85rem;margin-top:.4rem}
img{display:block;max-width:100%;height:auto;background:#fff;border-radius:6px;
border:1px solid var(--line)}
.panels img{width:100%}
.legend{display:flex;flex-wrap:wrap;gap:.1rem .9rem;list-style:none;margin:.3rem 0;padding:0;
font-size:.85rem;color:var(--ink)}
.legend li{margin:0;white-space:pre}
.swatch{display:inline-block;width:.75em;height:.75em;border-radius:50%;margin-right:.4em;
box-shadow:0 0 0 1px var(--line)}
.ramp{display:flex;align-items:center;gap:.5rem}.ramp i{flex:1;height:.7rem;border-radius:3px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem;border-bottom:1px solid var(--line);text-align:left;
vertical-align:middle}
th{font-weight:600}thead th{color:var(--muted);font-weight:normal;white-space:nowrap}
tbody th{white-space:nowrap}
.clusters td{min-width:8rem;overflow-wrap:anywhere}.clusters td:last-child{min-width:14rem}
.clusters td:nth-child(-n+4){min-width:0;white-space:nowrap;text-align:right}
.bar{display:flex;width:9rem;height:.9rem;gap:1px;border-radius:3px;overflow:hidden}
svg{display:block;font-size:11px}
svg text{fill:var(--ink);dominant-baseline:central}
svg .row{text-anchor:end}
svg .field{fill:var(--soft)}
svg .cell,svg circle{fill:var(--accent)}
svg .number{text-anchor:middle;font-size:10px}svg .strong{fill:var(--paper)}
"""

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vmm-fast: integrated cells</title>
<style>{style}</style>
</head>
<body>
<h1>Integrated and clustered cells</h1>
<p class="summary">{summary}</p>
{body}
</body>
</html>
"""
