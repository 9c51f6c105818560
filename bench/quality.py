"""How well each prior clusters real images: curves of scores against epochs, one run per call.

A run trains the VAE of ``vmm_fast.models`` on the 60,000 training images of MNIST (or 25,000 of
Fashion-MNIST), selects nothing by labels, and after every epoch scores the 10,000 (5,000) test
images. It writes one JSON file with the curve, the command, versions and date, and draws all runs
of its prefix that lie in the results folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import vmm_fast
from bench import figures
from bench.measurement import OPTIONS, Measurement, Run
from bench.records import DATA, PLACES, Row, command, environment
from bench.tables import spread, table, write_text
from vmm_fast.metrics import clustering_scores, clustering_scores_from_assignment
from vmm_fast.models import VAE, fit
from vmm_fast.plots.drawing import PALETTE
from vmm_fast.priors import Prior
from vmm_fast.schedules import SCHEDULES

NETWORKS: dict[str, dict[str, Any]] = {
    "perceptron": {},  # the paper's
    "convolutional": {"channels": (16, 32, 64), "hidden": (256,)},
}
DATASETS = ("mnist", "fashion_mnist")
PRIORS = ("vmm", "vmm-closed-form", "gmm", "vamp", "normal")
SCALES = ("maximum-likelihood", "learnt")
COMPONENTS, BATCH_SIZE = 100, 256
PRIOR_WEIGHT = "divide the parameter priors by the number of images or by the batch size"


def make_prior(x: Tensor, args: argparse.Namespace) -> Prior:
    """Return the prior of a run; pseudo-inputs start at random training images."""
    if args.prior == "normal":
        return vmm_fast.StandardNormalPrior(args.latent_dim)
    start = x[torch.randperm(len(x))[:COMPONENTS]]
    if args.prior == "vamp":
        return vmm_fast.VampPrior(start, args.latent_dim)
    data_size = len(x) if args.prior_weight == "data" else None
    if args.prior == "gmm":
        return vmm_fast.GaussianMixturePrior(COMPONENTS, args.latent_dim, data_size=data_size)
    return vmm_fast.VMMPrior(
        start,
        args.latent_dim,
        data_size=data_size,
        inference="closed-form" if args.prior == "vmm-closed-form" else "gradient",
        responsibility_gradient=not args.true_em,
    )


@torch.no_grad()
def posterior_means(model: VAE, x: Tensor, chunk: int = 4096) -> Tensor:
    """Return the means of q(z | x) [N, D]."""
    return torch.cat([model.encode(part).mean for part in x.split(chunk)])


def score(model: VAE, x: Tensor, labels: np.ndarray) -> dict[str, Any]:
    """Return scores of the model's components; for N(0, I), of k-means on the posterior means.

    k-means with ten clusters knows the number of classes, and has no most probable point: its
    accuracy by that rule is None.
    """
    z = posterior_means(model, x)
    if isinstance(model.prior, vmm_fast.StandardNormalPrior):
        from sklearn.cluster import KMeans

        found = KMeans(10, n_init=10, random_state=0).fit_predict(z.numpy())
        return {**clustering_scores_from_assignment(found, labels).as_dict(), "accuracy": None}
    with torch.no_grad():
        responsibilities = model.prior.responsibilities(z, model.encode)
    return clustering_scores(responsibilities, labels).as_dict()


def score_clusters(model: VAE, x: Tensor, test: Tensor, labels: np.ndarray) -> dict[str, Any]:
    """Return scores on test images of the clusters that are found in the training images."""
    clusters = model.prior.clusters(posterior_means(model, x), model.encode)
    probabilities = clusters.probabilities(posterior_means(model, test))
    scores = clustering_scores(probabilities, labels).as_dict()
    names = ("accuracy", "accuracy_majority", "accuracy_one_to_one", "nmi", "ari")
    return {"clusters": clusters.num_clusters, **{name: scores[name] for name in names}}


def read(folder: Path, dataset: str) -> tuple[Any, Any]:
    """Return images and labels to train on and to test with, the official parts of MNIST."""
    if dataset == "mnist":
        train, test = (np.load(folder / f"mnist_{part}.npz") for part in ("train", "test"))
        return train, test
    every = dict(np.load(folder / f"{dataset}.npz"))
    cut = len(every["images"]) * 5 // 6
    return ({k: v[:cut] for k, v in every.items()}, {k: v[cut:] for k, v in every.items()})


def train(args: argparse.Namespace, path: Path) -> None:
    """Train one prior; its record is written to ``path`` after every epoch and at the end."""
    train, test = read(Path(args.data), args.dataset)
    torch.manual_seed(args.seed)
    train = {name: train[name][: args.images] for name in ("images", "labels")}
    x, y = (
        torch.from_numpy(part["images"].reshape(-1, 784)).float() / 127.5 - 1
        for part in (train, test)
    )
    network = NETWORKS[args.network]
    model = VAE(784, args.latent_dim, make_prior(x, args), scale=args.scale, **network)
    has_clusters = args.prior != "normal"
    settings = {k: v for k, v in vars(args).items() if k not in PLACES}
    curve: list[dict[str, Any]] = json.loads(path.read_text())["curve"] if args.resume else []
    record = {"command": command(sys.argv[1:]), **environment(), "settings": settings}
    record |= {"final": None, "curve": curve}
    start = time.perf_counter() - (curve[-1]["seconds_since_start"] if curve else 0)

    def on_epoch_end(epoch: dict[str, Any]) -> None:
        model.eval()
        # k-means, and a pass over all training images, cost seconds.
        fifth = epoch["epoch"] % 5 == 0
        if has_clusters or fifth:
            epoch["test"] = score(model, y, test["labels"])
        if has_clusters and fifth:
            epoch["test"]["clusters"] = score_clusters(model, x, y, test["labels"])
        epoch["seconds_since_start"] = time.perf_counter() - start
        curve.append(epoch)
        write_text(path, json.dumps(record))
        shown = {**epoch, **epoch.get("test", {}).get("clusters", {})}
        names = ("epoch", "seconds_since_start", "validation_elbo", "validation_kl", *COLUMNS)
        print("  ".join(f"{k} {shown[k]:.4g}" for k in names if k in shown), flush=True)
        model.train()

    history = fit(
        model,
        x,
        y,
        epochs=args.epochs,
        batch_size=BATCH_SIZE,
        learning_rate=args.learning_rate,
        schedule=args.schedule,
        prior_warmup=args.prior_warmup,
        seed=args.seed,
        on_epoch_end=on_epoch_end,
        checkpoint=args.checkpoint,
        resume=args.resume,
    )
    model.eval()
    parts = {"train": (x, train["labels"]), "test": (y, test["labels"])}
    final = {name: score(model, *part) for name, part in parts.items()}
    if has_clusters:
        final["test"]["clusters"] = score_clusters(model, x, y, test["labels"])
    record["final"] = {"best_epoch": history.best_epoch, **final}
    write_text(path, json.dumps(record))


def rows(run: Run) -> Iterator[Row]:
    """Train and write a record of its own; there are no rows."""
    args = run.args
    path = Path(args.out) / f"{args.prefix}-{args.name or args.prior}.json"
    train(args, path)
    for written in write_page(path.parent, args.prefix):
        print(written)
    yield from ()


# --- page and picture ---

PANELS = (
    ("accuracy", "accuracy of components (most probable point)"),
    ("nmi", "NMI of components"),
    ("components_active", "active components"),
    ("validation_elbo", "validation ELBO (nats)"),
    ("clusters accuracy_one_to_one", "accuracy of clusters (one a class)"),
    ("clusters nmi", "NMI of clusters"),
    ("clusters ari", "adjusted Rand index of clusters"),
    ("clusters clusters", "clusters"),
)
COLUMNS = ("clusters", "accuracy_one_to_one", "accuracy", "nmi", "ari")
LEGEND = """\
Scores of the test images; labels score and choose nothing. Clusters are groups of components, found
in the training images. *One-to-one* lets each cluster be one class at most; *accuracy* is the
paper's rule: the label of a cluster's most probable image. *Components* are the NMI of the
components themselves and how many hold over 0.2 % of the images."""


def write_page(folder: Path, prefix: str) -> list[Path]:
    """Draw ``prefix.png``, and write ``prefix.md`` with a line for each run that has clusters."""
    paths = sorted(folder.glob(f"{prefix}-*.json"))
    records = {p.stem.removeprefix(f"{prefix}-"): json.loads(p.read_text()) for p in paths}
    written = [figures.draw(folder / f"{prefix}.png", lambda figure: _plot(figure, records))]
    ended = {n: r for n, r in records.items() if r["final"] is not None}
    ended = {n: r for n, r in ended.items() if "clusters" in r["final"]["test"]}
    if not ended:
        return written
    lines = []
    for name, record in ended.items():
        final, minutes = record["final"]["test"], record["curve"][-1]["seconds_since_start"] / 60
        scores = [final["clusters"][score] for score in COLUMNS] + [final["nmi"]]
        cells = [spread([score]) for score in scores]
        lines.append([name, *cells, str(final["components_active"]), f"{minutes:.0f}"])
    names = ("date", "revision", "python", "torch", "cpu")
    about = ", ".join(f"{name} {next(iter(ended.values()))[name]}" for name in names)
    heads = ["clusters", "one-to-one", "accuracy", "NMI", "ARI", "NMI of components", "components"]
    text = ["# Clusters of images", "", about, "", LEGEND, ""]
    text += [
        table(["run", *heads, "minutes"], lines),
        "\n".join(["```sh", *(record["command"] for record in ended.values()), "```", ""]),
        f"![Scores against epochs]({prefix}.png)",
    ]
    return [*written, write_text(folder / f"{prefix}.md", "\n".join((*text, "")))]


def page(folder: Path) -> list[Path]:
    """Write the pages of every prefix that lies there."""
    runs = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    prefixes = dict.fromkeys(run["settings"].get("prefix", "mnist") for run in runs)
    return [path for prefix in prefixes for path in write_page(folder, prefix)]


def _points(record: dict[str, Any], key: str) -> list[tuple[int, float]]:
    """Return the epochs that have a value of a panel, and the values."""
    points = []
    for epoch in record["curve"]:
        scores = epoch.get("test", {})
        clusters = {f"clusters {k}": v for k, v in scores.get("clusters", {}).items()}
        points.append((epoch["epoch"], {**epoch, **scores, **clusters}.get(key)))
    return [point for point in points if point[1] is not None]


def _plot(figure: Figure, records: dict[str, dict[str, Any]]) -> None:
    """Draw the curves of all runs, in the panels that any run has values of."""
    curves = {
        title: {name: _points(record, key) for name, record in records.items()}
        for key, title in PANELS
    }
    curves = {title: found for title, found in curves.items() if any(found.values())}
    rows = max(1, -(-len(curves) // 2))
    figure.set_size_inches(8, 2.7 * rows)
    axes = figure.subplots(rows, 2, squeeze=False).flat
    for (title, found), ax in zip(curves.items(), axes, strict=False):
        for (name, points), color in zip(found.items(), cycle(PALETTE), strict=False):
            ax.plot(*zip(*points, strict=True) if points else ((), ()), c=color, label=name, lw=1.5)
        figures.bare(ax, title, "epoch", grid="both")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, frameon=False,
                  loc="outside lower center", ncols=5)  # fmt: skip


MEASUREMENT = Measurement(
    "quality",
    "scores on real images against epochs, one prior a run",
    rows,
    options={
        "--prior": {"choices": PRIORS, "default": "vmm"},
        "--name": {"help": "of the result file, PREFIX-NAME.json; the prior's unless given"},
        "--data": {"default": str(DATA), "help": "folder with the .npz files of the images"},
        "--dataset": {"choices": DATASETS, "default": DATASETS[0]},
        "--network": {"choices": NETWORKS, "default": "perceptron"},
        "--prefix": {"default": "mnist", "help": "of the result files that belong together"},
        "--images": {"type": int, "help": "train on the first so many; all unless given"},
        "--epochs": {"type": int, "default": 40},
        "--learning-rate": {"type": float, "default": 1e-3},
        "--schedule": {"choices": SCHEDULES, "default": "cosine"},
        "--prior-warmup": {"type": float, "default": 0.0, "help": "share of steps under N(0, I)"},
        "--prior-weight": {"choices": ("data", "batch"), "default": "data", "help": PRIOR_WEIGHT},
        "--true-em": {"action": "store_true", "help": "no gradient through responsibilities"},
        "--latent-dim": {"type": int, "default": 10},
        "--scale": {"choices": SCALES, "default": SCALES[0]},
        "--seed": {"type": int, "default": 0},
        "--checkpoint": {"help": "file to keep the run in after every epoch"},
        "--resume": {"action": "store_true", "help": "go on from --checkpoint"},
        "--out": OPTIONS["--out"],
    },
    page=page,
)
