"""How well each prior clusters real images: curves of scores against epochs, one run per call.

A run trains the VAE of ``vmm_fast.models`` on the 60,000 training images of MNIST (or 25,000 of
Fashion-MNIST), selects nothing by labels, and after every epoch scores the 10,000 (5,000) test
images. It writes one JSON file with the curve, the command, versions and date; ``--plot`` draws all
runs that lie in the results folder.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vmm_fast
from bench.integration import spread
from bench.records import DATA, PLACES, RESULTS, command, environment
from bench.report import table
from vmm_fast._files import write_atomically
from vmm_fast.metrics import clustering_scores, clustering_scores_from_assignment
from vmm_fast.models import VAE, RandomShifts, fit
from vmm_fast.schedules import SCHEDULES

NETWORKS: dict[str, dict[str, Any]] = {
    "perceptron": {},  # the paper's
    "convolutional": {"channels": (16, 32, 64), "hidden": (256,)},
}
DATASETS = ("mnist", "fashion_mnist")
PRIORS = ("vmm", "vmm-closed-form", "gmm", "vamp", "normal")


def make_prior(name: str, x: Tensor, components: int, latent_dim: int, args: argparse.Namespace):
    """Build the prior of a run; pseudo-inputs start at random training images."""
    if name == "normal":
        return vmm_fast.StandardNormalPrior(latent_dim)
    start = x[torch.randperm(len(x))[: components * args.pseudo_inputs_per_component]]
    data_size = len(x) if args.prior_weight == "data" else None
    common: dict[str, Any] = {"data_size": data_size, "learning_rate": args.prior_learning_rate}
    if name == "vamp":
        return vmm_fast.VampPrior(start, latent_dim, learning_rate=args.prior_learning_rate)
    if name == "gmm":
        return vmm_fast.GaussianMixturePrior(components, latent_dim, **common)
    common["responsibility_gradient"] = not args.true_em
    common["pseudo_inputs_per_component"] = args.pseudo_inputs_per_component
    inference = "closed-form" if name == "vmm-closed-form" else "gradient"
    return vmm_fast.VMMPrior(start, latent_dim, inference=inference, **common)


@torch.no_grad()
def posterior_means(model: VAE, x: Tensor, chunk: int = 4096) -> Tensor:
    """Means of q(z | x) [N, D]."""
    return torch.cat([model.encode(part).mean for part in x.split(chunk)])


def score(model: VAE, x: Tensor, labels: np.ndarray) -> dict[str, Any]:
    """Scores of the model's components; for N(0, I), of k-means on the posterior means.

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
    """Scores on test images of the clusters that are found in the training images."""
    clusters = model.prior.clusters(posterior_means(model, x), model.encode)
    probabilities = clusters.probabilities(posterior_means(model, test))
    scores = clustering_scores(probabilities, labels).as_dict()
    names = ("accuracy", "accuracy_majority", "accuracy_one_to_one", "nmi", "ari")
    return {"clusters": clusters.num_clusters, **{name: scores[name] for name in names}}


def read(folder: Path, dataset: str) -> tuple[Any, Any]:
    """Images and labels to train on and to test with: the official parts where there are such."""
    if dataset == "mnist":
        train, test = (np.load(folder / f"mnist_{part}.npz") for part in ("train", "test"))
        return train, test
    every = dict(np.load(folder / f"{dataset}.npz"))
    cut = len(every["images"]) * 5 // 6
    return ({k: v[:cut] for k, v in every.items()}, {k: v[cut:] for k, v in every.items()})


def run(args: argparse.Namespace, path: Path) -> None:
    """Train one prior; its record is written to ``path`` after every epoch and at the end."""
    train, test = read(Path(args.data), args.dataset)
    torch.manual_seed(args.seed)
    train = {name: train[name][: args.images] for name in ("images", "labels")}
    x, y = (
        torch.from_numpy(part["images"].reshape(-1, 784)).float() / 127.5 - 1
        for part in (train, test)
    )
    prior = make_prior(args.prior, x, args.components, args.latent_dim, args)
    network = NETWORKS[args.network]
    model = VAE(784, args.latent_dim, prior, posterior=args.posterior, scale=args.scale, **network)
    record = {
        "command": command(sys.argv[1:]),
        **environment(),
        "settings": {k: v for k, v in vars(args).items() if k not in (*PLACES, "run")},
    }
    curve: list[dict[str, Any]] = json.loads(path.read_text())["curve"] if args.resume else []
    start = time.perf_counter() - (curve[-1]["seconds_since_start"] if curve else 0)

    def write(final: dict[str, Any] | None = None) -> None:
        text = json.dumps({**record, "final": final, "curve": curve}, indent=1)
        write_atomically(path, lambda file: file.write(text), text=True)

    def on_epoch_end(epoch: dict[str, Any]) -> None:
        model.eval()
        # k-means, and a pass over all training images, cost seconds.
        fifth = epoch["epoch"] % 5 == 0
        if args.prior != "normal" or fifth:
            epoch["test"] = score(model, y, test["labels"])
        if args.prior != "normal" and fifth:
            epoch["test"]["clusters"] = score_clusters(model, x, y, test["labels"])
        epoch["seconds_since_start"] = time.perf_counter() - start
        curve.append(epoch)
        write()
        shown = {
            k: epoch[k]
            for k in ("epoch", "seconds_since_start", "validation_elbo", "validation_kl")
        }
        of_clusters = epoch.get("test", {}).get("clusters", {})
        for k in ("clusters", "accuracy_one_to_one", "nmi", "ari"):
            shown[k] = of_clusters.get(k)
        print("  ".join(f"{k} {v:.4g}" for k, v in shown.items() if v is not None), flush=True)
        model.train()

    history = fit(
        model,
        x,
        y,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        schedule=args.schedule,
        prior_warmup=args.prior_warmup,
        seed=args.seed,
        augment=RandomShifts((784,)) if args.shifts else None,
        on_epoch_end=on_epoch_end,
        checkpoint=args.checkpoint,
        resume=args.resume,
    )
    model.eval()
    parts = {"train": (x, train["labels"]), "test": (y, test["labels"])}
    final = {name: score(model, *part) for name, part in parts.items()}
    if args.prior != "normal":
        final["test"]["clusters"] = score_clusters(model, x, y, test["labels"])
    write({"best_epoch": history.best_epoch, **final})


PANELS = (
    ("accuracy", "accuracy of components (most probable point)"),
    ("nmi", "NMI of components"),
    ("components_active", "components over 0.2 %"),
    ("validation_elbo", "validation ELBO (nats)"),
    ("clusters accuracy_one_to_one", "accuracy of clusters (one a class)"),
    ("clusters nmi", "NMI of clusters"),
    ("clusters ari", "adjusted Rand index of clusters"),
    ("clusters clusters", "clusters"),
)
COLUMNS = ("clusters", "accuracy_one_to_one", "accuracy", "nmi", "ari")
LEGEND = """\
Scores of the test images, mean and standard deviation over the seeds; labels score and choose
nothing. Clusters are groups of components, found in the training images. *One-to-one* lets each
cluster be one class at most; *accuracy* is the paper's rule: the label of a cluster's most probable
image. *Components* are the NMI of the components themselves and how many hold over 0.2 %."""


def write_page(folder: Path, prefix: str) -> Path:
    """Write ``prefix.md``, a line for all seeds of the same settings."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob(f"{prefix}-*.json")):
        record = json.loads(path.read_text())
        final = record["final"]
        if final is None or "clusters" not in final["test"]:
            continue
        alike = " ".join(record["command"].split())
        for name in ("--seed", "--name", "--out", "--data", "--checkpoint"):
            alike = re.sub(rf"{name} \S+ ?", "", alike).strip()
        found.setdefault(alike, []).append(record)
    lines = []
    for alike, records in found.items():
        finals = [record["final"]["test"] for record in records]
        cells = [spread([final["clusters"][name] for final in finals]) for name in COLUMNS]
        cells.append(spread([final["nmi"] for final in finals]))
        cells.append(spread([final["components_active"] for final in finals]))
        minutes = [record["curve"][-1]["seconds_since_start"] / 60 for record in records]
        lines.append([f"`{alike}`", str(len(records)), *cells, f"{mean(minutes):.0f}"])
    about = next(iter(found.values()))[0]
    names = ("date", "revision", "python", "torch", "cpu")
    heads = ["clusters", "one-to-one", "accuracy", "NMI", "ARI", "NMI of components", "components"]
    text = ["# Clusters of images", "", ", ".join(f"{name} {about[name]}" for name in names), ""]
    text += [LEGEND, "", table(["command, with `--seed`", "seeds", *heads, "minutes"], lines), ""]
    if (folder / f"{prefix}.png").exists():
        text += ["", f"![Scores against epochs]({prefix}.png)", ""]
    page = "\n".join(text)
    out = folder / f"{prefix}.md"
    write_atomically(out, lambda file: file.write(page), text=True)
    return out


def plot(folder: Path, prefix: str) -> Path:
    """Draw the curves of all runs of a prefix into one picture, ``prefix.png``."""
    from matplotlib.figure import Figure

    records = {
        path.stem.removeprefix(f"{prefix}-"): json.loads(path.read_text())["curve"]
        for path in sorted(folder.glob(f"{prefix}-*.json"))
    }
    if not records:
        raise FileNotFoundError(f"no {prefix}-*.json in {folder}")
    figure = Figure(figsize=(15, 6.5), layout="constrained", dpi=110)
    for ax, (key, title) in zip(figure.subplots(2, 4).flat, PANELS, strict=True):
        for color, (name, curve) in enumerate(records.items()):
            elbo = ("epoch", "validation_elbo", "validation_kl")
            rows = [{**{k: e[k] for k in elbo}, **_flat(e.get("test", {}))} for e in curve]
            points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
            x, y = zip(*points, strict=True) if points else ((), ())
            ax.plot(x, y, color=f"C{color}", label=name, lw=1.5)
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_xlabel("epoch", fontsize=9)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[3].legend(fontsize=8, frameon=False)
    out = folder / f"{prefix}.png"
    write_atomically(out, lambda file: figure.savefig(file, format="png"))
    return out


def _flat(scores: dict[str, Any]) -> dict[str, Any]:
    """Scores of components, and those of clusters under names of their own."""
    of_clusters = scores.get("clusters", {})
    return {**scores, **{f"clusters {name}": value for name, value in of_clusters.items()}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of ``python -m bench quality``."""
    parser.add_argument("--prior", choices=PRIORS, default="vmm")
    parser.add_argument(
        "--name", help="of the result file, PREFIX-NAME.json; the prior's unless given"
    )
    parser.add_argument(
        "--data",
        default=str(DATA),
        help="folder with mnist_train.npz and mnist_test.npz, or fashion_mnist.npz",
    )
    parser.add_argument("--dataset", choices=DATASETS, default=DATASETS[0])
    parser.add_argument("--network", choices=NETWORKS, default="perceptron")
    parser.add_argument(
        "--prefix", default="mnist", help="of the result files that belong together"
    )
    parser.add_argument("--images", type=int, help="train on the first so many; all unless given")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--schedule", choices=SCHEDULES, default="cosine")
    parser.add_argument(
        "--prior-warmup", type=float, default=0.0, help="share of the steps under N(0, I)"
    )
    parser.add_argument("--shifts", action="store_true", help="train on images shifted at random")
    parser.add_argument("--pseudo-inputs-per-component", type=int, default=1)
    parser.add_argument("--prior-learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--prior-weight",
        choices=("data", "batch"),
        default="data",
        help="divide the parameter priors by the number of images or by the batch size",
    )
    parser.add_argument(
        "--true-em", action="store_true", help="no gradient through the responsibilities"
    )
    parser.add_argument("--components", type=int, default=100)
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--posterior", choices=("full", "diagonal"), default="full")
    parser.add_argument(
        "--scale", choices=("maximum-likelihood", "learnt"), default="maximum-likelihood"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", help="file to keep the run in after every epoch")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the result files")
    parser.add_argument(
        "--plot",
        action="store_true",
        help="draw the runs of --prefix in --out, and write their page; train nothing",
    )


def main(args: argparse.Namespace) -> None:
    """Run and write, or plot."""
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    if args.plot:
        print(plot(folder, args.prefix))
        print(write_page(folder, args.prefix))
        return
    path = folder / f"{args.prefix}-{args.name or args.prior}.json"
    run(args, path)
    print(path)
