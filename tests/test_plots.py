"""Pictures: their size, what they show, and that nothing is written when something is wrong."""

import math
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from vmm_fast.clusters import ClusterTree, Confusion, find_clusters
from vmm_fast.mixture import Components
from vmm_fast.plots import (
    components,
    drawing,
    plot_cluster_samples,
    plot_component_weights,
    plot_latent,
    plot_training_curves,
)
from vmm_fast.plots.components import tree_figure


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def figures(monkeypatch):
    """Collect the figures that are saved."""
    caught = []
    save = drawing.save

    def catch(figure, path):
        caught.append(figure)
        save(figure, path)

    monkeypatch.setattr(drawing, "save", catch)
    return caught


def check_picture(path, width, height):
    """A PNG of that many inches at 150 dpi that is not blank and leaves a white border."""
    picture = imread(path)
    assert picture.shape[:2] == (round(height * 150), round(width * 150))
    assert picture[..., :3].std() > 0.01
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert np.all(edge[:, :3] == 1)  # nothing is cut off


def written(ax):
    return [text.get_text() for text in ax.texts]


def history(epochs=30):
    return [
        {
            "epoch": e,
            "train_elbo": -100 - 50 / e,
            "validation_elbo": -102 - 50 / e,
            "train_kl": 20.0,
            "validation_kl": 21.0 - 1 / e,
            "train_log_likelihood": -80 - 50 / e,
            "validation_log_likelihood": -82 - 50 / e,
            "components_active": 100 - e,
            "concentration": 20.0 / e,
            "scale": 0.3,
        }
        for e in range(1, epochs + 1)
    ]


@pytest.mark.parametrize("projection", ["pca", "tsne"])
def test_latent_by_cluster_and_label(tmp_path, rng, figures, projection):
    clusters = rng.integers(0, 5, 120)
    z = torch.tensor(10 * np.eye(5)[clusters] + rng.normal(size=(120, 5)), dtype=torch.float32)
    plot_latent(
        z, torch.tensor(clusters), clusters > 2, path=tmp_path / "a.png", projection=projection
    )
    check_picture(tmp_path / "a.png", 10, 5)
    left, right = figures[0].axes
    assert left.get_title() == "5 clusters"
    assert sorted(written(left)) == list("01234")
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["False", "True"]
    assert len(np.unique(left.collections[0].get_facecolors(), axis=0)) == 5
    assert len(np.unique(right.collections[0].get_facecolors(), axis=0)) == 2


def test_a_class_has_the_colour_of_its_cluster_and_a_number_lies_in_the_larger_piece(
    tmp_path, rng, figures
):
    places = np.array([[0.0, 0.0], [10, 0], [20, 0], [0, 10]])
    # Cluster 0 is in two pieces, of 60 and 40 points; it shares most with class "b".
    clusters, classes = (
        np.repeat([0, 0, 1, 2], [60, 40, 50, 30]),
        np.repeat(list("bbca"), [60, 40, 50, 30]),
    )
    piece = np.repeat([0, 2, 1, 3], [60, 40, 50, 30])
    z = places[piece] + rng.normal(size=(180, 2))
    plot_latent(z, clusters, classes, path=tmp_path / "a.png")
    left, right = figures[0].axes
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["a", "b", "c"]
    np.testing.assert_array_equal(
        left.collections[0].get_facecolors(), right.collections[0].get_facecolors()
    )
    number = {text.get_text(): text.get_position() for text in left.texts}["0"]
    assert np.linalg.norm(number - places[0]) < 3


def test_latent_in_two_dimensions_is_drawn_as_it_is(tmp_path, rng, figures):
    z = rng.normal(size=(1000, 2))
    clusters = np.repeat([7, 70, 700], [600, 398, 2])  # the last holds 0.2 %, not more
    plot_latent(z, clusters, path=tmp_path / "a.png")
    check_picture(tmp_path / "a.png", 5.4, 5)
    (ax,) = figures[0].axes
    drawn = np.asarray(ax.collections[0].get_offsets())
    assert set(map(tuple, drawn)) == set(map(tuple, z))
    assert ax.get_title() == "3 clusters (grey: up to 0.2 % of the points)"
    assert sorted(written(ax)) == ["7", "70"]
    colors = {
        tuple(p): c[:3] for p, c in zip(drawn, ax.collections[0].get_facecolors(), strict=True)
    }
    for cluster, color in [
        (7, drawing.PALETTE[0]),
        (70, drawing.PALETTE[1]),
        (700, drawing.INACTIVE),
    ]:
        for point in z[clusters == cluster]:
            assert colors[tuple(point)] == pytest.approx(to_rgb(color))


def test_pca_finds_the_main_axes(tmp_path, rng, figures):
    plane = rng.normal(size=(500, 2)) * [5, 2]
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0][:2]
    plot_latent(plane @ rotation, np.zeros(500, int), path=tmp_path / "a.png")
    drawn = np.asarray(figures[0].axes[0].collections[0].get_offsets())
    distances = [np.sort(np.linalg.norm(p - p.mean(0), axis=1)) for p in (plane, drawn)]
    np.testing.assert_allclose(*distances, atol=1e-9)
    assert np.var(drawn[:, 0]) > np.var(drawn[:, 1])


def test_a_hundred_clusters_have_a_hundred_colours_and_readable_numbers(tmp_path, rng, figures):
    clusters = np.arange(5000) % 100
    z = rng.normal(size=(100, 2))[clusters] * 0.3 + 0.05 * rng.normal(size=(5000, 2))
    plot_latent(z, clusters, path=tmp_path / "a.png")
    assert len(set(drawing.distinct_colors(100))) == 100
    (ax,) = figures[0].axes
    assert sorted(map(int, written(ax))) == list(range(100))
    boxes = [text.get_window_extent() for text in ax.texts]
    hidden = 0  # numbers of which another one covers more than half
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            wide = min(a.x1, b.x1) - max(a.x0, b.x0)
            high = min(a.y1, b.y1) - max(a.y0, b.y0)
            hidden += wide > 0 and high > 0 and wide * high > 0.5 * a.width * a.height
    assert hidden <= 2


@pytest.mark.parametrize(
    ("points", "projection"),
    [(np.zeros((1, 1)), "pca"), (np.zeros((1, 3)), "tsne"), (np.zeros((6, 4)), "pca")],
)
def test_degenerate_points(tmp_path, points, projection):
    plot_latent(points, [3] * len(points), path=tmp_path / "a.png", projection=projection)
    check_picture(tmp_path / "a.png", 5.4, 5)


def test_awkward_label_names(tmp_path, figures):
    """Formula signs, leading underscores, long names and unknown scripts, without a warning."""
    names = ["$x", "_hidden", "a" * 60, "\u4e2d\u6587"]
    plot_latent(np.eye(4), range(4), names, path=tmp_path / "a.png")
    legend = [t.get_text().lstrip("\u200b") for t in figures[0].axes[1].get_legend().get_texts()]
    assert legend == ["$x", "_hidden", "a" * 27 + "…", "\u4e2d\u6587"]


def test_many_labels_are_written_in_the_picture(tmp_path, rng, figures):
    labels = np.arange(200) % 40
    plot_latent(rng.normal(size=(200, 2)), labels, labels, path=tmp_path / "a.png")
    right = figures[0].axes[1]
    assert right.get_legend() is None
    assert sorted(map(int, written(right))) == list(range(40))


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_image_samples_are_rows_by_falling_weight(tmp_path, rng, figures, channels):
    values = rng.random((3, 4, 8, 6) if channels is None else (3, 4, channels, 8, 6))
    plot_cluster_samples(
        torch.tensor(values),
        torch.tensor([0.2, 0.5, 0.3]),
        tmp_path / "a.png",
        clusters=[4, 8, 9],
    )
    (ax,) = figures[0].axes
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "8  (50.0 %)",
        "9  (30.0 %)",
        "4  (20.0 %)",
    ]
    canvas = np.asarray(ax.images[0].get_array())
    gap = 1
    for row, component in enumerate([1, 2, 0]):
        for sample in range(4):
            top, left = row * (8 + gap), sample * (6 + gap)
            expected = values[component, sample]
            if channels == 1:
                expected = expected[0]
            elif channels == 3:
                expected = expected.transpose(1, 2, 0)
            np.testing.assert_allclose(
                canvas[top : top + 8, left : left + 6], expected.astype(np.float32)
            )
    picture = imread(tmp_path / "a.png")
    assert np.all(picture[:, 0, :3] == 1) and np.all(picture[0, :, :3] == 1)
    # image pixels are whole screen pixels
    bounds = ax.get_window_extent()
    assert bounds.width / canvas.shape[1] == pytest.approx(round(bounds.width / canvas.shape[1]))


def test_a_hundred_components_are_folded_into_blocks(tmp_path, rng, figures):
    plot_cluster_samples(rng.random((100, 5, 28, 28)), np.full(100, 0.01), tmp_path / "a.png")
    assert len(figures[0].axes) == 4
    labels = [t.get_text() for ax in figures[0].axes for t in ax.get_yticklabels()]
    assert labels == [f"{c}  (1.0 %)" for c in range(100)]
    picture = imread(tmp_path / "a.png")
    assert picture.shape[0] < picture.shape[1] < 3000


def test_values_outside_the_unit_range_are_scaled_but_small_overshoots_are_cut():
    np.testing.assert_allclose(components._unit_range(np.array([-2.0, 0.0, 2.0])), [0, 0.5, 1])
    np.testing.assert_allclose(components._unit_range(np.array([-0.1, 0.5, 1.1])), [0, 0.5, 1])
    np.testing.assert_allclose(components._unit_range(np.zeros(2)), [0, 0])
    np.testing.assert_allclose(components._unit_range(np.full(2, 9.0)), [0, 0])


def test_vector_samples_are_heat_strips(tmp_path, rng, figures):
    values = rng.normal(size=(3, 5, 20))
    plot_cluster_samples(values, [0.1, 0.0, 0.9], tmp_path / "a.png")
    check_picture(tmp_path / "a.png", 8, 2)
    ax = figures[0].axes[0]
    canvas = ax.images[0].get_array()
    np.testing.assert_allclose(canvas[:5], values[2])
    np.testing.assert_allclose(canvas[12:], values[1])
    assert np.all(np.ma.getmaskarray(canvas)[5])  # the gap
    assert ax.get_yticklabels()[2].get_text() == "1  (0 %)"


@pytest.mark.parametrize("count, with_shares", [(1, False), (7, True), (100, False), (400, True)])
def test_weights_are_sorted_bars(tmp_path, rng, figures, count, with_shares):
    weights = rng.dirichlet(np.ones(count))
    shares = rng.dirichlet(np.ones(count)) if with_shares else None
    plot_component_weights(torch.tensor(weights), shares, tmp_path / "a.png")
    check_picture(tmp_path / "a.png", 9, 3.6)
    (ax,) = figures[0].axes
    order = np.argsort(-weights)
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], 100 * weights[order])
    if with_shares:
        points = np.asarray(ax.collections[0].get_offsets())
        np.testing.assert_allclose(points[:, 1], 100 * shares[order])
    if count <= 100:
        assert [int(t.get_text()) for t in ax.get_xticklabels()] == list(order)


def test_training_curves(tmp_path, figures):
    plot_training_curves(history(), tmp_path / "a.png")
    check_picture(tmp_path / "a.png", 10.8, 5.6)
    titles = {ax.get_title(): ax for ax in figures[0].axes}
    assert list(titles) == [
        "ELBO: log-likelihood less KL",
        "log-likelihood of the decoded data",
        "KL divergence from the prior",
        "active components",
        "concentration of the weights",
        "decoder's standard deviation",
    ]
    scales = {title: ax.get_yscale() for title, ax in titles.items()}
    assert scales == {**dict.fromkeys(titles, "linear"), "concentration of the weights": "log"}
    elbo, *_, active, _, _ = titles.values()
    assert [text.get_text() for text in elbo.get_legend().get_texts()] == ["training", "held out"]
    assert active.get_ylabel() == "over 0.2 % of the points each"
    train, validation = elbo.lines
    np.testing.assert_allclose(train.get_xdata(), range(1, 31))
    np.testing.assert_allclose(train.get_ydata(), [row["train_elbo"] for row in history()])
    np.testing.assert_allclose(
        validation.get_ydata(), [row["validation_elbo"] for row in history()]
    )


def test_training_curves_with_missing_keys_and_values(tmp_path, figures):
    rows = [{"train_elbo": -3.0, "validation_elbo": None}, {"train_elbo": math.inf}, {"scale": 2.0}]
    plot_training_curves(rows, tmp_path / "a.png")
    check_picture(tmp_path / "a.png", 7.2, 2.8)
    elbo, scale = figures[0].axes
    np.testing.assert_array_equal(elbo.lines[0].get_ydata(), [-3, math.nan, math.nan])
    assert len(elbo.lines) == 1
    assert scale.lines[0].get_marker() == "o"  # a line of one point would not be seen


def test_wild_first_epochs_do_not_flatten_the_curve(tmp_path, figures):
    rows = history(40)
    rows[0]["train_elbo"] = -1e6
    plot_training_curves(rows, tmp_path / "a.png")
    assert figures[0].axes[0].get_ylim()[0] > -200
    titles = [ax.get_title() for ax in figures[0].axes]
    assert titles[0].endswith("\n(the first epochs lie outside)") and "\n" not in titles[3]


@pytest.mark.parametrize("ending", ["pdf", "svg", "PNG"])
def test_other_formats(tmp_path, ending):
    plot_component_weights([0.5, 0.5], None, tmp_path / f"a.{ending}")
    start = (tmp_path / f"a.{ending}").read_bytes()[:5]
    assert start in (b"%PDF-", b"<?xml", b"\x89PNG\r")


def test_neither_pyplot_nor_scikit_learn_is_imported(tmp_path):
    code = (
        "import sys; from vmm_fast.plots import *; import numpy as np; "
        "plot_latent(np.eye(5), range(5), path=sys.argv[1]); "
        "print([m for m in ('matplotlib.pyplot', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path / "a.png")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "DISPLAY": ""},
    )
    assert done.stdout.strip() == "['matplotlib']"


ERRORS = [
    (plot_latent, [np.eye(3), [0, 1]], "clusters must have as many entries as z"),
    (plot_latent, [np.eye(3), [0, 1, 2], [0]], "labels must have as many"),
    (plot_latent, [np.ones(3), [0, 1, 2]], "z must have 2 dimensions"),
    (plot_latent, [np.eye(3), [0.0, 1, 2]], "clusters must be integers"),
    (plot_latent, [np.eye(1) * math.nan, [0]], "z must be finite"),
    (plot_latent, [np.zeros((0, 2)), np.zeros(0, int)], "z must hold at least one point"),
    (partial(plot_latent, projection="x"), [np.eye(3), [0, 1, 2]], "projection must be"),
    (plot_cluster_samples, [np.zeros((2, 2)), [1, 1]], "samples must have 3 or 4"),
    (plot_cluster_samples, [np.zeros((2, 0, 3)), [1, 1]], "must not be empty"),
    (plot_cluster_samples, [np.zeros((2, 1, 3)), [1]], "weights must have as many"),
    (plot_cluster_samples, [np.zeros((1, 1, 2, 8, 8)), [1]], "1 or 3 channels, but have 2"),
    (plot_cluster_samples, [np.full((1, 1, 3), math.nan), [1]], "samples must be finite"),
    (
        partial(plot_cluster_samples, clusters=[1]),
        [np.zeros((2, 1, 3)), [1, 1]],
        "clusters must have as",
    ),
    (plot_component_weights, [[0.5, -0.5], None], "weights must be finite and not"),
    (plot_component_weights, [[1.0], [math.nan]], "shares must be finite and not"),
    (plot_component_weights, [[], None], "weights must hold at least one"),
    (plot_component_weights, [[1.0], [1.0, 0.0]], "shares must have as many"),
    (plot_training_curves, [[]], "history must hold a finite value"),
    (plot_training_curves, [[{"epoch": 1}]], "history must hold a finite value"),
]


@pytest.mark.parametrize(("plot", "arguments", "message"), ERRORS)
def test_errors_write_nothing(tmp_path, plot, arguments, message):
    with pytest.raises(ValueError, match=message):
        plot(*arguments, path=tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_unknown_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in \.png, \.pdf or \.svg"):
        plot_component_weights([1.0], None, tmp_path / "a.txt")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("module", "options"), [("matplotlib.figure", {}), ("sklearn.manifold", {"projection": "tsne"})]
)
def test_missing_packages_name_the_extra(tmp_path, monkeypatch, module, options):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"vmm-fast\[cli\]"):
        plot_latent(np.eye(5), range(5), path=tmp_path / "a.png", **options)


def test_the_tree_shows_how_sure_each_merge_between_clusters_is():
    centers = 6 * torch.tensor([[0.0, 0], [0, 1], [1, 0]]).repeat_interleave(3, 0)
    torch.manual_seed(0)
    components = Components(
        centers + torch.randn(9, 2) / 2,
        torch.full((9,), -math.log(9)),
        torch.eye(2).expand(9, 2, 2),
    )
    z = components.sample(400)
    tree = ClusterTree(Confusion.of(components, z))
    clusters = find_clusters(components, z, tree=tree, n_clusters=3)
    (ax,) = tree_figure(tree, clusters).axes
    bars = [line.get_segments()[0] for line in ax.collections if isinstance(line, LineCollection)]
    assert len(bars) == 2
    shown = np.array([[10**-y for _, y in bar] for bar in bars])
    np.testing.assert_allclose(shown, np.transpose(tree.interval())[-2:].clip(1e-4), rtol=1e-6)
    assert max(y for bar in bars for _, y in bar) < ax.get_ylim()[1]
    assert "95 % intervals" in ax.get_xlabel()
    assert ax.get_title() == "3 clusters of 9 non-empty components"
