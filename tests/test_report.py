"""The HTML report: what it says, that it needs nothing else, and that a browser shows it."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

pytest.importorskip("scvi", reason="scvi-tools is not installed")
pytest.importorskip("scanpy", reason="the report needs scanpy")

import pandas as pd
from anndata import AnnData
from matplotlib.image import imread
from scipy.sparse import csc_matrix, csr_matrix

from vmm_fast import Components
from vmm_fast.cells import report
from vmm_fast.cells.reading import layers_of
from vmm_fast.cells.report import write_report
from vmm_fast.clusters import Clusters, ClusterTree, Confusion

pytestmark = pytest.mark.filterwarnings("ignore")

HISTORY = {
    "elbo_train": [90.0, 80.0, 70.0, 65.0],
    "elbo_validation": [85.0, 75.0],  # every second epoch
    "reconstruction_loss_train": [80.0, 70.0, 60.0, 55.0],
    "kl_local_train": [10.0, 10.0, 10.0, 10.0],
    "kl_weight": [1.0, 1.0, 1.0, 1.0],
}
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Text, attributes and tables of a page, whose tags must match."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.tags, self.text, self.tables = [], [], "", []
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" in self.open:
            return
        self.text += text
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += text

    def of(self, tag):
        return [attributes for found, attributes in self.tags if found == tag]


def cells(number=240, clusters=4, n_genes=30, seed=0, **settings):
    """Return cells in clusters with genes of their own; cluster c is called 10 c."""
    random = np.random.default_rng(seed)
    cluster = np.minimum(random.geometric(0.4, number) - 1, clusters - 1)
    if clusters > 10:
        cluster = np.arange(number) % clusters
    rates = np.full((clusters, n_genes), 0.5)
    rates[np.arange(clusters), np.arange(clusters) % n_genes] = 20.0
    adata = AnnData(csr_matrix(random.poisson(rates[cluster]).astype(np.float32)))
    adata.var_names = [f"gene{g}" for g in range(n_genes)]
    centers = random.normal(size=(clusters, 5)) * 5
    adata.obsm["X_vmm"] = (centers[cluster] + random.normal(size=(number, 5))).astype(np.float32)
    adata.obs["vmm_cluster"] = pd.Categorical([str(10 * c) for c in cluster])
    adata.obs["vmm_cluster_probability"] = np.linspace(0.5, 1, number)
    adata.obs["vmm_cluster_entropy"] = np.linspace(0.7, 0, number)
    adata.obs["donor"] = [f"donor {d}" for d in random.integers(3, size=number)]
    adata.obs["type"] = [f"type {c // 2}" for c in cluster]
    adata.uns["vmm"] = {"seed": 0, "components": 50, "components_used": 9, "layer": "", **settings}
    return adata


def planted(adata):
    """Return a table of marker genes: for each cluster the gene that is much higher in it."""
    layer = adata.uns["vmm"]["layer"]
    counts = csr_matrix(adata.layers[layer] if layer else adata.X).toarray()
    of_cell, rows = adata.obs["vmm_cluster"].astype(str), []
    for name in of_cell.unique():
        inside = (of_cell == name).to_numpy()
        more = counts[inside].mean(0) - counts[~inside].mean(0) if not inside.all() else [0]
        if max(more) > 5:
            rows.append((name, adata.var_names[np.argmax(more)]))
    return pd.DataFrame(rows, columns=["cluster", "gene"])


PLANE = report._plane


@pytest.fixture(autouse=True, scope="module")
def no_umap():
    """Draw no UMAP, whose first call compiles for ten seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_plane", lambda z, seed: (z[:, :2].astype(float), "Plot"))
        yield


@pytest.fixture
def page_of(tmp_path):
    def write(adata, history=None, **options):
        if "markers" not in options:
            options["markers"] = planted(adata)
        write_report(tmp_path / "report.html", adata, history or {}, **options)
        return Page(tmp_path / "report.html")

    return write


@pytest.fixture(scope="module")
def full(tmp_path_factory, no_umap):
    """Return a page with everything, and the cells that it shows."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    scores = {"ari": 0.25, "nmi": 0.5}
    more = {"genes": ["gene0"] * 30, "rate": {"network": 0.1}, "scores": scores}
    adata = cells(batch_key="donor", labels_key="type", **more)
    write_report(path, adata, HISTORY, planted(adata))
    return path, adata


def test_the_tree_is_shown_where_it_is_one(page_of):
    z = torch.tensor([[0.0], [1], [9]])
    components = Components(z, torch.full((3,), 1 / 3).log(), torch.ones(3, 1, 1))
    tree = ClusterTree(Confusion.of(components, z))
    clusters = Clusters(components, torch.tensor([0, 0, 1]))
    with_tree, without = page_of(cells(), tree=(tree, clusters)), page_of(cells())
    assert "Tree of components" in with_tree.text and "Tree of components" not in without.text
    alone = ClusterTree(Confusion.of(components, torch.tensor([[9.0]])))
    assert "Tree of components" not in page_of(cells(), tree=(alone, clusters)).text


def test_it_says_what_the_cells_are(full):
    path, adata = full
    page = Page(path)
    assert "240 cells, 30 genes, 3 batches, 4 clusters of 9 non-empty components" in page.text
    assert "Plot of the 5 latent dimensions" in page.text
    table = page.tables[0]
    sizes = adata.obs["vmm_cluster"].value_counts()
    assert [row[0] for row in table[2:]] == sizes.index.tolist()
    for row in table[2:]:
        inside = adata.obs[adata.obs["vmm_cluster"] == row[0]]
        assert row[1] == str(len(inside))
        assert row[2] == f"{100 * len(inside) / 240:.1f} %"
        assert row[3] == f"{inside['vmm_cluster_probability'].mean():.2f}"
        assert row[5] == f"{inside['type'].iloc[0]} 100.0 %"
        assert row[6].split(", ")[0] == f"gene{int(row[0]) // 10}"
    settings = dict(row for row in page.tables[-1])
    assert settings["seed"] == "0" and settings["rate.network"] == "0.1"
    assert settings["genes"].startswith("30 values: gene0, gene0")
    assert "scvi-tools" in settings["page made with"]


def test_learnt_labels_are_shown_and_said_to_be_seen(page_of):
    adata = cells(train_labels="type", scores={"ari": 0.25, "nmi": 0.5}, labels_key="type")
    adata.obs["vmm_label"] = np.where(adata.obs["vmm_cluster"] == "0", "one", "other")
    page = page_of(adata)
    assert "Training saw these labels." in page.text and "did not see" not in page.text
    assert "Embedding coloured by predicted label, 2 colours" in [a["alt"] for a in page.of("img")]
    del adata.uns["vmm"]["labels_key"], adata.uns["vmm"]["scores"]
    table = page_of(adata).tables[0]
    column = table[0].index("most common predicted label")
    assert [row[column] for row in table[2:]] == [
        f"{'one' if row[0] == '0' else 'other'} 100.0 %" for row in table[2:]
    ]


def test_bars_are_the_batches_of_each_cluster(full):
    path, adata = full
    bars = [a["aria-label"] for a in Page(path).of("span") if a.get("class") == "bar"]
    order = adata.obs["vmm_cluster"].value_counts().index
    assert len(bars) == 1 + len(order)
    for name, text in zip(order, bars[1:], strict=True):
        donors = adata.obs["donor"][adata.obs["vmm_cluster"] == name]
        shares = donors.value_counts(normalize=True)
        said = dict(part.rsplit(" ", 2)[:2] for part in text.split(", "))
        assert said == {donor: f"{100 * share:.1f}" for donor, share in shares.items()}


def test_a_label_has_the_colour_of_its_cluster_and_a_batch_that_of_none(full):
    legend = r'<li title="([^"]*)"><i class="swatch" style="background:(#\w+)">'
    colors = dict(re.findall(legend, full[0].read_text()))
    for name, clusters in full[1].obs.groupby("type")["vmm_cluster"]:
        assert colors[name] == colors[clusters.value_counts().idxmax()]
    assert len(set(colors.values())) == 4 + 3  # clusters and donors


def test_scores_are_those_of_the_run(full):
    page = Page(full[0])
    (scores,) = [table for table in page.tables if table[0][0] == "score"]
    assert [row[:2] for row in scores[1:]] == [["ARI", "0.250"], ["NMI", "0.500"]]
    assert "The clusters against type of 240 labelled cells." in page.text
    assert "This column was used for these scores alone" in page.text


def test_nothing_is_fetched_or_run(full):
    page = Page(full[0])
    assert not page.of("script") and not page.of("link") and not page.of("a")
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "data"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in page.source and "@import" not in page.source
    assert all(a["alt"] for a in page.of("img"))
    assert all(a["aria-label"] for a in page.of("svg"))
    assert len(page.of("img")) == 5  # cluster, batch, label, entropy, curves


def test_the_cells_are_left_as_they_are(full):
    _, adata = full
    fresh = cells(batch_key="donor", labels_key="type")
    assert set(adata.obsm) == {"X_vmm"} and not adata.obsp and not layers_of(adata)
    assert set(adata.uns) == {"vmm"} and list(adata.obs) == list(fresh.obs)
    assert (adata.X != fresh.X).nnz == 0
    pd.testing.assert_frame_equal(adata.obs, fresh.obs)


def test_two_runs_give_the_same_page(page_of):
    adata = cells(batch_key="donor", labels_key="type")
    assert page_of(adata, HISTORY).source == page_of(adata, HISTORY).source


def test_names_are_escaped(page_of):
    adata = cells(batch_key="donor", labels_key="<i>type", path='a"><script>alert(4)</script>')
    bad = {"donor 0": "<script>alert(1)</script>", "donor 1": '"><img src=x onerror=alert(2)>'}
    adata.obs["donor"] = adata.obs["donor"].replace(bad)
    adata.obs["<i>type"] = (
        adata.obs["type"].astype(object).replace({"type 0": "</style>&amp; $x_1$ \ud800"})
    )
    adata.obs["vmm_cluster"] = adata.obs["vmm_cluster"].cat.rename_categories(
        {"0": "<svg/onload=3>"}
    )
    adata.var_names = [f"<b onclick='{g}'>é\u2028" for g in range(adata.n_vars)]
    page = page_of(adata)
    assert not page.of("script") and not page.of("b")
    assert not [a for _, a in page.tags if {"onerror", "onload", "onclick"} & set(a)]
    for text in ("<script>alert(1)</script>", "</style>&amp; $x_1$ ?", "<svg/onload=3>"):
        assert text in page.text
    assert page.tables[0][2][-1].startswith("<b onclick='0'>é")


LABELS = {  # of 240 cells, and how many there are
    "float": (np.arange(240) % 3 + 0.5, 3),
    "continuous": (np.arange(240) / 240, 100),
    "missing": (np.where(np.arange(240) % 2, np.nan, np.arange(240) % 3), 3),
    "all missing": (np.full(240, np.nan), 0),
    "mixed": (pd.Series([1, "1", None] * 80, dtype=object).to_numpy(), 2),
    "unused": (pd.Categorical(["a"] * 240, categories=["a", "b"]), 1),
    "many": ([f"label {i % 60}" for i in range(240)], 60),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_any_kind(page_of, kind):
    adata = cells(labels_key="label")
    adata.obs["label"], distinct = LABELS[kind]
    page = page_of(adata)
    pictures = [a["alt"] for a in page.of("img")]
    assert f"Embedding coloured by label, {distinct} colour" + "s" * (distinct != 1) in pictures
    assert ("no value" in page.text) == (kind in ("missing", "all missing", "mixed"))
    assert "Scores against labels" not in page.text
    if kind == "continuous":
        assert "141 others" in page.text  # 240 - 99


@pytest.mark.parametrize("clusters", [1, 100])
def test_one_to_a_hundred_clusters(page_of, clusters):
    adata = cells(number=12 * max(clusters, 5), clusters=clusters, n_genes=110, batch_key="donor")
    page = page_of(adata)
    assert len(page.tables[0]) == clusters + 2
    assert "Scores" not in page.text
    circles = page.of("circle")
    if clusters == 1:
        assert "none stands out" in page.text and not circles
    else:
        assert len({a["cx"] for a in circles}) >= min(clusters, report.DOTS)
    # Above twenty, the numbers stand in the picture, and there is no legend to overflow.
    assert ("Numbers stand at each cluster's median" in page.text) == (clusters > 20)


@pytest.mark.parametrize(
    "change",
    ["dense integers", "csc", "layer", "empty cells", "no counts", "one gene", "one batch"],
)
def test_counts_and_batches_of_any_kind(page_of, change):
    adata = cells(batch_key="donor")
    batches = 3
    if change == "dense integers":
        adata.X = adata.X.toarray().astype(np.int64)
    elif change == "csc":
        adata.X = csc_matrix(adata.X)
    elif change == "layer":
        adata.layers["counts"], adata.uns["vmm"]["layer"] = adata.X, "counts"
        adata.X = adata.X * np.nan
    elif change == "empty cells":
        adata.X = csr_matrix(adata.X.toarray() * (np.arange(240) % 3 > 0)[:, None])
    elif change == "no counts":
        adata.X = csr_matrix(adata.shape, dtype=np.float32)
    elif change == "one gene":
        adata = adata[:, :1].copy()
    elif change == "one batch":
        adata.obs["donor"], batches = "only", 1
    page = page_of(adata)
    assert f"{batches} batch" in page.text
    assert page.tables[0][2][-1] == ("none stands out" if change == "no counts" else "gene0")
    assert ("Clusters in batches" in page.text) == (batches > 1)


@pytest.mark.parametrize("number", [1, 14])
def test_few_cells(page_of, number, monkeypatch):
    monkeypatch.setattr(report, "_plane", PLANE)
    page = page_of(cells(number=number, clusters=2, batch_key="donor", labels_key="type"))
    assert "Principal components of the 5 latent dimensions" in page.text
    assert "too few cells" in page.text


def test_clusters_of_few_cells_have_no_markers(page_of):
    adata = cells()
    adata.obs["vmm_cluster"] = pd.Categorical(["7"] * 9 + ["3"] * 231)
    rows = page_of(adata).tables[0][2:]
    assert [row[:2] for row in rows] == [["3", "231"], ["7", "9"]]
    assert rows[1][-1] == "too few cells"


def test_more_cells_than_a_picture_takes(page_of, monkeypatch):
    monkeypatch.setattr(report, "EMBEDDED", 50)
    page = page_of(cells(labels_key="type"))
    assert "50 random cells of 240" in page.text
    assert page.tables[0][1][1] == "240"


def test_numbers_are_of_all_cells_where_some_were_drawn(page_of):
    scores = {"ari": 0.25, "nmi": 0.5}
    adata = cells(batch_key="donor", labels_key="type", scores=scores)
    whole, cluster = adata.obs, adata.obs["vmm_cluster"]
    names = cluster.value_counts().index
    # Of the largest cluster 3 cells, of the smallest none, and so of a batch.
    whole["donor"] = whole["donor"].where(cluster != names[-1], "donor 3")
    rows = np.flatnonzero(cluster.isin(names[1:-1]))
    rows = np.concatenate([rows, np.flatnonzero(cluster == names[0])[:3]])
    drawn = AnnData(adata.X[rows], var=adata.var, uns=adata.uns)
    drawn.obsm["X_vmm"] = adata.obsm["X_vmm"][rows]
    options = {"drawn_from": (whole, rows), "markers": planted(adata)}
    page, full = page_of(drawn, **options), page_of(adata)

    assert "240 cells, 30 genes, 4 batches, 4 clusters of 9 non-empty components" in page.text
    assert f"{len(rows)} cells drawn from 240." in page.text
    assert f"of one batch, among the {len(rows)} drawn cells; markers.csv has more." in page.text
    assert [row[:-1] for row in page.tables[0]] == [row[:-1] for row in full.tables[0]]
    markers = [row[-1].split(", ")[0] for row in page.tables[0][2:]]
    few = "too few cells drawn"
    assert markers == [few, *(f"gene{int(name) // 10}" for name in names[1:-1]), few]
    assert page.tables[1] == full.tables[1] and page.tables[1][0][0] == "score"
    one, other = ([a for a in p.of("span") if a.get("class") == "bar"] for p in (page, full))
    assert one == other


def test_all_drawn_cells_of_one_cluster(page_of):
    adata = cells()
    rows = np.flatnonzero(adata.obs["vmm_cluster"] == "0")
    some = adata[rows].copy()
    page = page_of(some, drawn_from=(adata.obs, rows), markers=planted(some))
    found = [row[-1] for row in page.tables[0][2:]]
    assert found == ["none stands out", *["too few cells drawn"] * 3]


def test_where_cells_lie_in_the_plane(monkeypatch):
    given = []

    def umap(data, **options):
        given.append(options)
        data.obsm["X_umap"] = data.X[:, :2] + 1

    monkeypatch.setattr(report.sc.pp, "neighbors", lambda data, **options: given.append(options))
    monkeypatch.setattr(report.sc.tl, "umap", umap)
    z = np.random.default_rng(0).normal(size=(15, 5)).astype(np.float32)
    plane, name = PLANE(z, 3)
    assert name == "UMAP" and (plane == z[:, :2] + 1).all()
    assert given == [{"use_rep": "X", "transformer": "sklearn", "random_state": 3}, given[1]]
    assert given[1] == {"random_state": 3}
    plane, name = PLANE(z[:14], 3)  # no neighbourhoods
    left, scale, _ = np.linalg.svd(z[:14] - z[:14].mean(0), full_matrices=False)
    assert name == "Principal components"
    np.testing.assert_allclose(np.abs(plane), np.abs(left * scale)[:, :2], atol=1e-5)
    for columns in (1, 2):  # no need
        plane, name = PLANE(z[:, :columns], 3)
        assert name == "Plot" and plane.shape == (15, 2)
        np.testing.assert_allclose(plane[:, :columns], z[:, :columns], atol=1e-6)
    assert len(given) == 2


@pytest.mark.slow("UMAP compiles for ten seconds")
def test_umap_keeps_clusters_apart_and_takes_cells_that_are_all_alike():
    adata = cells(number=120, clusters=2)
    plane, name = PLANE(adata.obsm["X_vmm"], 0)
    assert name == "UMAP"
    first = (adata.obs["vmm_cluster"] == "0").to_numpy()
    centers = [plane[rows].mean(0) for rows in (first, ~first)]
    spread = max(plane[rows].std() for rows in (first, ~first))
    assert np.linalg.norm(centers[0] - centers[1]) > 2 * spread
    assert (PLANE(adata.obsm["X_vmm"], 0)[0] == plane).all()
    assert PLANE(np.zeros((40, 5), dtype=np.float32), 0)[0].shape == (40, 2)


@pytest.mark.parametrize("history", [{}, {"elbo_train": [np.nan]}, {"kl_weight": [1.0]}])
def test_without_curves(history):
    assert report._curves(history) == []


def test_validation_of_every_second_epoch_stands_where_it_was():
    rows = report._curves(HISTORY)
    assert [row["train_elbo"] for row in rows] == [-90, -80, -70, -65]
    assert [row.get("validation_elbo") for row in rows] == [None, -85, None, -75]


def test_what_is_missing_is_named(tmp_path):
    adata = cells()
    adata.obsm["X_vmm"][3, 1] = np.nan
    with pytest.raises(ValueError, match="X_vmm"):
        write_report(tmp_path / "report.html", adata, HISTORY, planted(adata))
    with pytest.raises(KeyError, match="absent"):
        labelled = cells(labels_key="absent")
        write_report(tmp_path / "report.html", labelled, HISTORY, planted(labelled))
    assert not list(tmp_path.iterdir())


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.slow("starts a browser")
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium in the path")
def test_a_browser_shows_it(full, tmp_path):
    path, adata = full

    def browse(*options):
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--enable-logging=stderr", *options, path.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    shot = tmp_path / "page.png"
    shown = browse("--window-size=1000,3000", "--dump-dom")
    assert ":CONSOLE" not in shown.stderr  # nothing refused, nothing broken
    assert len(re.findall("<img ", shown.stdout)) == 5
    for name in adata.obs["vmm_cluster"].cat.categories:
        assert f"</i>{name}</th>" in shown.stdout
    browse("--window-size=1000,3000", f"--screenshot={shot}")
    picture = imread(shot)[..., :3]
    assert picture.shape[:2] == (3000, 1000)
    # Colours of the embedding, text of the guide: no part is empty.
    assert np.ptp(picture[150:600], -1).max() > 0.3
    assert all((part.min((0, 1)) < 0.5).any() for part in np.array_split(picture, 6))
