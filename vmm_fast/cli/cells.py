"""``vmm-fast integrate``, ``sweep``, ``assign`` and ``prepare``: files of single cells."""

from __future__ import annotations

import argparse
import atexit
import ctypes
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vmm_fast._cut import Cut
from vmm_fast._errors import InputError, LostProcessError
from vmm_fast._folder import Folder, digest, folder_of_model, must_hold_run
from vmm_fast._text import counted, joined, print_step
from vmm_fast.cells.processes import processes_of_run
from vmm_fast.cells.settings import REPLACED, Settings, SweepSettings
from vmm_fast.cli.config import read_config, write_config
from vmm_fast.cli.options import (
    CUT,
    Option,
    add_existing,
    add_options,
    add_settings,
    at_least_0,
    cut_of,
    file_to_write,
    must_exist,
    note_few,
    print_files,
    print_table,
    require,
    whole,
    with_cut,
)

SCVI_NEEDS = ("scvi", "vmm_fast.scvi", "scanpy", "matplotlib", "sklearn", "tqdm")
TORCHRUN = ("torchrun", "--nproc-per-node")
NEW = 0.95  # novelty above which one in twenty cells like those of the training lie
CELLS_OF_PROCESS = 10  # at least: a tenth of them is held out
EXAMPLE = "pbmc68k"  # names the example's results, and stands for the input file in run.json
ASSIGN = """\
Genes are matched by name; up to 5 % of the model's may be missing and are taken
as 0. Cells of a batch, or of a category of a covariate, that the model does not
know are encoded as of all that it knows, in equal shares, or with weights of
their own (--train). The results have all that CELLS has; of cells that stay on
disk, obs and var alone.
"""
SWEEP = """\
The table has, for every run: clusters of over 0.2 % of the cells; the ELBO of
held-out cells; mean entropy; how well batches mix (1: as by chance, 0: never);
NMI of clusters with batches (low is mixed); ARI and NMI with labels. Choose
without labels where you can: batches that mix, and no more clusters than you
can name. KEY is a column of obs, FILE as for integrate.
"""
CELLS = """\
KEY is a column of obs. FILE is .h5ad, .zarr, .loom, the .h5 or the folder with
matrix.mtx of 10x Genomics (genes alone are read), or a folder of .h5ad files
with the same genes. Values must be counts. Results have all cells and genes.
"""


def add_commands(commands: Any) -> None:
    """Add the commands integrate, sweep, assign and prepare to a parser."""
    memory: Option = (
        "--memory",
        "GIB",
        lambda text: math.inf if text == "inf" else at_least_0(text),
        "counts that take more stay on disk (default: 1)",
    )
    integrate = commands.add_parser(
        "integrate",
        help="integrate batches of single cells and cluster them",
        usage="vmm-fast integrate FILE [options]",
        description="Integrate batches of single cells and cluster them: scVI with a mixture "
        "prior.\n\n"
        "  vmm-fast integrate cells.h5ad --batch-key batch --labels-key type\n"
        "  torchrun --nproc-per-node 2 -m vmm_fast.cli integrate cells.h5ad",
        epilog=CELLS,
    )
    _add_cells_options(integrate, Settings, "-vmm")
    add_options(
        integrate,
        memory,
        ("--checkpoint-steps", "N", whole(1), "steps between checkpoints, besides every 30 s"),
    )
    _add_json(integrate)
    add_existing(integrate, "more --epochs, --labels-key and where the tree is cut")
    integrate.set_defaults(run=partial(_summarised, _integrate))

    sweep = commands.add_parser(
        "sweep",
        help="try batch sizes and prior learning rates on single cells",
        usage="vmm-fast sweep FILE [options]",
        description="Integrate with every batch size and every ratio of learning rates, prior\n"
        "over network: between many fine clusters and few, well mixed ones.\n\n"
        "  vmm-fast sweep cells.h5ad --batch-key batch --ratios 1 5",
        epilog=SWEEP,
    )
    _add_cells_options(sweep, SweepSettings, "-sweep", ("batch_size", "prior_learning_rate"))
    add_existing(sweep, "more --epochs, --batch-sizes and --ratios")
    sweep.set_defaults(run=_sweep)

    assign = commands.add_parser(
        "assign",
        help="put new cells into the clusters of a trained model",
        usage="vmm-fast assign MODEL CELLS [options]",
        description="Put new cells into the clusters of a trained model. It does not change.\n\n"
        "  vmm-fast assign cells-vmm new.h5ad --out new-vmm.h5ad",
        epilog=ASSIGN,
    )
    assign.add_argument("model", metavar="MODEL", help="folder that integrate wrote, or its model")
    assign.add_argument("file", metavar="CELLS", help="as integrate reads them")
    add_options(
        assign,
        ("--out", "FILE.h5ad", str, "(default: CELLS's name with -vmm.h5ad, here)"),
        ("--layer", "NAME", str, "with the counts (default: the model's, else X)"),
        memory,
    )
    assign.add_argument(
        "--train",
        metavar="EPOCHS",
        nargs="?",
        const=0,
        type=whole(1),
        help="learn weights of new batches first (default: 100; less from 80,000 cells)",
    )
    add_settings(assign, Cut, ("components",), usual="default: the model's")
    _add_json(assign)
    assign.add_argument("--overwrite", action="store_true", help="replace FILE.h5ad")
    assign.add_argument(
        "--trust",
        action="store_true",
        help="read a MODEL that may run anything: only your own",
    )
    assign.set_defaults(run=partial(_summarised, _assign))

    prepare = commands.add_parser(
        "prepare",
        help="write single cells so that they are read fast, part by part",
        usage="vmm-fast prepare CELLS [options]",
        description="Write counts, obs and var to one .h5ad file of which integrate reads random\n"
        "cells fast. In bounded memory, if CELLS is .h5ad, .h5mu, a zarr folder or a\n"
        "folder of .h5ad files, with cells in its rows.\n\n"
        "  vmm-fast prepare cells.loom --out cells.h5ad",
    )
    prepare.add_argument("file", metavar="CELLS", help="as integrate reads them, or .h5mu")
    add_options(
        prepare,
        ("--out", "FILE.h5ad", str, "(default: CELLS's name with -prepared.h5ad, here)"),
        ("--layer", "NAME", str, "layer with the counts, which become X (default: X)"),
        ("--modality", "NAME", str, "the one to write of a .h5mu file, such as rna"),
    )
    prepare.add_argument("--overwrite", action="store_true", help="replace FILE.h5ad")
    prepare.set_defaults(run=_prepare)


def _add_cells_options(
    parser: argparse.ArgumentParser, settings: type, suffix: str, leave_out: Sequence[str] = ()
) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", help="of counts; see below")
    parser.add_argument(
        "--example", action="store_true", help="in place of FILE: 700 blood cells of scanpy's"
    )
    add_options(
        parser, ("--out", "DIR", str, f"of results (default: FILE's name with {suffix}, here)")
    )
    add_settings(parser, settings, leave_out)
    parser.add_argument(
        "--config", metavar="FILE.toml", help="read settings; other options overrule them"
    )
    parser.add_argument(
        "--accelerator",
        metavar="NAME",
        choices=("auto", "cpu", "gpu", "mps"),
        default="auto",
        help="auto, cpu, gpu, mps (default: %(default)s)",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print the summary as JSON, all else to stderr"
    )


def _summarised(
    command: Callable[[argparse.Namespace], dict[str, Any]], arguments: argparse.Namespace
) -> None:
    """Run a command; with --json, print the summary that it returns, and nothing else, to stdout.

    JSON has no nan: it becomes null. Of several processes the first alone prints.
    """
    with ExitStack() as redirected:
        first = processes_of_run().rank == 0
        if not first:
            nowhere = redirected.enter_context(open(os.devnull, "w"))
            redirected.enter_context(redirect_stdout(nowhere))
        elif arguments.json:
            redirected.enter_context(redirect_stdout(sys.stderr))
        summary = command(arguments)
    if arguments.json and first:
        print(json.dumps(json.loads(json.dumps(summary), parse_constant=lambda _: None), indent=1))


def _require_scvi() -> None:
    """Import the packages that cells need, or raise InputError that says how to install them.

    numba, which scanpy and UMAP need, fails if it finds no folder for its cache. If neither the
    installation nor the home can be written to, it gets a temporary one.
    """
    scanpy = importlib.util.find_spec("scanpy")
    if scanpy is not None and scanpy.origin is not None and "NUMBA_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        usual = (Path(scanpy.origin).parent / "__pycache__", Path(home) / "numba")
        if not any(map(_can_be_written, usual)):
            cache = tempfile.mkdtemp(prefix="vmm-fast-numba-")
            atexit.register(shutil.rmtree, cache, ignore_errors=True)
            os.environ["NUMBA_CACHE_DIR"] = cache
    require(*SCVI_NEEDS, extra="cli,scvi")


def _can_be_written(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


class _Run(NamedTuple):
    """Cells, settings and folder of a command that trains on cells."""

    cells: Any  # AnnData as read, or CellStore
    training: Any  # AnnData of the cells to train on, or of some of them
    on_disk: Any  # OnDisk, or None
    settings: Any
    folder: Folder
    again: str  # the command that resumes the run
    notes: list[str]


def _read_cells(arguments: argparse.Namespace, kind: Any, checkpoint: str, **folder: Any) -> _Run:
    """Read, check and describe the cells to train on, and make the folder for results."""
    from vmm_fast.cells import reading, selection, writing
    from vmm_fast.cells.quiet import quiet

    file, command, out = arguments.file, arguments.command, arguments.out
    place = Folder(out, command=command, settings=kind, checkpoint=checkpoint, **folder)
    cells: Any = None
    notes: list[str] = []
    if file is None:
        source = EXAMPLE
        arguments.labels_key = arguments.labels_key or "bulk_labels"
    else:
        reading.kind_of(Path(file))  # raises if the file cannot be used
        place.must_not_hold(file)
        source = digest(file)
    given = {} if arguments.config is None else read_config(arguments.config, kind)
    if command == "sweep" and (unused := [name for name in REPLACED if given.pop(name, None)]):
        what = joined([name.replace("_", "-") for name in unused])
        notes.append(f"{arguments.config}: a sweep has settings of its own in place of {what}")
    names = [f.name for f in fields(kind) if getattr(arguments, f.name, None) is not None]
    in_config = {f"--{name.replace('_', '-')}" for name in given.keys() - names}
    given |= {name: getattr(arguments, name) for name in names}
    processes = processes_of_run()
    if (before := given.get("processes", processes.number)) != processes.number:
        notes.append(
            f"{arguments.config} is of a run in {counted(before, 'process', 'processes')}: in "
            f"{processes.number} the results differ"
        )
    given["processes"] = processes.number
    if arguments.resume:
        with _naming(file or EXAMPLE):
            given = place.resumed(source, given)
    given = with_cut(dict.fromkeys(f.name for f in fields(kind)) | given, arguments)
    with ExitStack() as opened:  # a store is closed if anything else is refused
        if file is not None and command == "integrate":
            before = given["on_disk"] if arguments.resume or arguments.memory is None else None
            cells, on_reading = _on_disk(file, given["layer"], arguments.memory, before)
            notes += on_reading
            opened.enter_context(cells or nullcontext())
        given["on_disk"] = cells is not None
        if cells is None:
            read = reading.example() if file is None else reading.read_cells(file, given["layer"])
            cells, notes = read.adata, notes + read.notes
        on_disk = None
        with _naming(file or EXAMPLE), _naming_config(in_config, arguments.config), quiet():
            settings = kind.for_cells(cells, **given)
            if settings.on_disk:
                training, on_disk, more = selection.training_cells_on_disk(cells, settings)
            else:
                training, more = selection.training_cells(cells, settings)
        if command == "integrate":
            with quiet():
                more = more + writing.notes_on_writing(cells)
        _check_accelerator(arguments.accelerator)
        needed = CELLS_OF_PROCESS * processes.number
        if processes.number > 1 and cells.n_obs < needed:
            raise InputError(
                f"{file or EXAMPLE}: must have at least {needed} cells for "
                f"{processes.number} processes, but has {cells.n_obs}"
            )
        if processes.rank == 0:
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
        notes += more
        for note in notes:
            print(f"note: {note}", flush=True)
        start = ["vmm-fast"]
        if processes.number > 1:
            start = [*TORCHRUN, str(processes.on_this_machine), "-m", "vmm_fast.cli"]
        if processes.number > processes.on_this_machine:
            start = ["..", *start[3:]]  # as it was started on several machines
        again = [*start, command, file or "--example", "--out", out, "--resume"]
        if arguments.accelerator != "auto":
            again += ["--accelerator", arguments.accelerator]
        opened.pop_all()
        return _Run(cells, training, on_disk, settings, place, shlex.join(again), notes)


def _check_before_imports(arguments: argparse.Namespace, suffix: str) -> None:
    """Check arguments before scvi-tools is imported, which is slow, and set the folder's name."""
    file = arguments.file
    if (file is None) != arguments.example:
        raise InputError(f"give either FILE or --example; see vmm-fast {arguments.command} --help")
    cut_of(vars(arguments))
    if file is not None:
        must_exist(file)
    name = EXAMPLE if file is None else Path(file).resolve().stem
    arguments.out = arguments.out or f"{name}{suffix}"
    if arguments.resume:
        must_hold_run(arguments.out)


def _size(cells: Any) -> str:
    return f"{counted(cells.n_obs, 'cell')} x {counted(cells.n_vars, 'gene')}"


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Let errors begin with the name of the file, unless a store has named one of its files."""
    try:
        yield
    except InputError as error:
        paths = (file, str(Path(file)))
        if str(error).startswith(tuple(path + end for path in paths for end in (":", os.sep))):
            raise
        raise InputError(f"{file}: {error}") from None


@contextmanager
def _naming_config(options: set[str], config: str) -> Iterator[None]:
    """Let errors about options that a file of settings gives say so."""
    try:
        yield
    except InputError as error:
        there = sorted(options & set(re.findall(r"--[a-z-]+", str(error))))
        if not there:
            raise
        raise InputError(f"{error} ({joined(there)} as in {config})") from None


def _on_disk(
    file: str,
    layer: str | None,
    memory: float | None,
    before: bool | None = None,
    **options: Any,
) -> tuple[Any, list[str]]:
    """Return a store if the cells are to stay on disk, else None; and notes.

    `before` is the choice of the run that is resumed, if any; `options` are those of the store.
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
        # They may still be readable into memory; if not, the error comes there.
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

    Otherwise windows of cells, whose sizes differ, would leave some hundred megabytes of holes.
    """
    with suppress(OSError, AttributeError):
        M_MMAP_THRESHOLD = -3
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 24)


def _integrate(arguments: argparse.Namespace) -> dict[str, Any]:
    _check_before_imports(arguments, "-vmm")
    _require_scvi()
    from vmm_fast.cells import integration, report

    run = _read_cells(
        arguments,
        Settings,
        "checkpoint.ckpt",
        results=integration.RESULTS,
        changeable=("epochs", "labels_key", *CUT),
    )
    folder, settings = run.folder, run.settings
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
                progress=processes_of_run().rank == 0 and sys.stderr is not None,
            )
            if found is None:  # the first process writes the results
                return {}
            print_step("writing the cells, finding marker genes, drawing the report")
            if run.on_disk is None:
                record = found.add_to(run.cells)
                found.write(run.cells, folder.path)
                shown, drawn_from = run.cells, None
            else:
                record, shown, drawn_from = found.write_on_disk(run.on_disk, folder.path)
            write_config(folder.path / "settings.toml", arguments.command, settings)
            tree = (found.model.get_cluster_tree(), found.model.kept_clusters())
            page, cells = folder.path / "report.html", (shown, found.history, found.markers)
            report.write_report(page, *cells, drawn_from, tree)
        except (KeyboardInterrupt, LostProcessError) as stop:
            if processes_of_run().rank > 0:
                raise
            raise type(stop)(f"{stop}; go on with: {run.again}") from None
    rows = [
        (f"{s.upper()}, by {settings.labels_key}", f"{value:.3f}")
        for s, value in record.get("scores", {}).items()
    ]
    note_few(settings.clusters, record["clusters_used"], "cells")
    seconds = round(record["training_seconds"])
    rows += [
        ("clusters", str(record["clusters_used"])),
        ("non-empty components", f"{record['components_used']} of {settings.components}"),
        (
            f"ELBO, {counted(record['held_out_cells'], 'cell')} held out",
            f"{record['held_out_elbo']:.2f} nats",
        ),
        ("epochs", str(settings.epochs)),
        ("training time", f"{seconds // 60}:{seconds % 60:02d} min"),
    ]
    print_table(rows, folder.path, integration.RESULTS)
    return {"out": str(folder.path), **record, "notes": run.notes}


def _sweep(arguments: argparse.Namespace) -> None:
    _check_before_imports(arguments, "-sweep")
    _require_scvi()
    from vmm_fast.cells import sweep

    run = _read_cells(
        arguments,
        SweepSettings,
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
    print_files(folder.path, sweep.RESULTS)


def _check_accelerator(name: str) -> None:
    import torch

    absent = (name == "gpu" and not torch.cuda.is_available()) or (
        name == "mps" and not torch.backends.mps.is_available()
    )
    if absent:
        raise InputError(f"--accelerator {name}: torch finds none on this machine")
    started, gpus = processes_of_run().on_this_machine, torch.cuda.device_count()
    if name != "cpu" and 0 < gpus < started:
        raise InputError(
            f"torchrun --nproc-per-node must be at most {gpus}, the GPUs of this machine, but is "
            f"{started}; --accelerator cpu trains on its cores"
        )


def _assign(arguments: argparse.Namespace) -> dict[str, Any]:
    file = arguments.file
    cut = cut_of(vars(arguments))
    cut["n_clusters"] = cut.pop("clusters")
    folder_of_model(arguments.model)  # raises if there is none
    must_exist(file)
    out = file_to_write(arguments, "-vmm")
    _require_scvi()
    from vmm_fast.cells import assignment, mapping, reading, writing
    from vmm_fast.cells.quiet import quiet

    train: int | None = arguments.train
    model = assignment.find_model(arguments.model, trust=arguments.trust, **cut)
    if train is not None:
        mapping.check_can_be_trained(model)
    cells, notes = _on_disk(file, arguments.layer, arguments.memory, preferred=model.layer)
    with ExitStack() as opened:
        if cells is not None:
            opened.enter_context(cells)
        else:
            read = reading.read_cells(file, arguments.layer or model.layer)
            cells, notes = read.adata, notes + read.notes
        with _naming(file):
            matched = assignment.match(cells, model, arguments.layer, train is not None)
            print(_size(cells))
            with quiet():
                more = writing.notes_on_writing(cells)
            notes += matched.notes + more
            for note in notes:
                print(f"note: {note}", flush=True)
            progress = sys.stderr is not None
            found = assignment.assign(matched, model, train=train, progress=progress)
        found.write(cells, out)
    clusters = len(found.clusters["vmm_cluster"].cat.categories)
    probability = float(found.clusters["vmm_cluster_probability"].median())
    print(f"{counted(clusters, 'cluster')}, median probability {probability:.3f}, in {out}")
    novelty = found.clusters["vmm_novelty"]
    new = math.nan if novelty.isna().any() else float((novelty > NEW).mean())
    if math.isfinite(new):
        like = f"{1 - NEW:.0%} of cells like those of the training"
        print(f"vmm_novelty above {NEW}: {new:.1%} of the cells ({like})")
    sizes = {"cells": cells.n_obs, "genes": cells.n_vars, "clusters_used": clusters}
    sizes |= found.trained
    return {
        **{"out": str(out), **sizes, "median_probability": probability},
        **{"share_of_new": new, "notes": notes},
    }


def _prepare(arguments: argparse.Namespace) -> None:
    must_exist(arguments.file)
    out = file_to_write(arguments, "-prepared")
    _require_scvi()
    from vmm_fast.cells import preparing

    start = time.monotonic()
    found = preparing.prepare(
        Path(arguments.file),
        out,
        arguments.layer,
        arguments.modality,
        progress=sys.stderr is not None and sys.stderr.isatty(),
        tell=lambda note: print(f"note: {note}", flush=True),
    )
    print(
        f"{_size(found)}, {found.nbytes / 1e6:,.1f} MB in "
        f"{time.monotonic() - start:.1f} s, in {out}"
    )
