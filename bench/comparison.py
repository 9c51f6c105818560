"""Scores of methods on data sets, over seeds: rows that are kept one by one, and their page.

Each row is kept in the folder ``--kept``, so that a run that was stopped goes on, and several can
share the work; the page shows all that lie there. Labels score and do nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from bench.measurement import OPTIONS, Measurement, Run
from bench.records import RESULTS, Row, environment, keep, kept, read_rows, select
from bench.tables import table, write_text
from bench.timing import threads


class Comparison(NamedTuple):
    """Description of a comparison: its methods, how one case is scored, and its page.

    ``score`` takes a data set, a method, a seed and the options, and returns the fields of a row.
    ``columns`` return a cell from the rows of all seeds of a method on a data set, ``about`` a line
    and ``verdicts`` several from all rows of a data set, and of the page.
    """

    part: str  # its name on the command line and that of its files
    title: str
    datasets: Mapping[str, str]  # with headings
    methods: Mapping[str, Any]  # each with its title first
    score: Callable[[str, str, int, argparse.Namespace], Row]
    columns: Mapping[str, Callable[[list[Row]], str]]
    legend: str
    versions: tuple[str, ...]  # of packages
    about: Callable[[list[Row]], str] = lambda rows: ""
    verdicts: Callable[[list[Row]], list[str]] = lambda rows: []
    impossible: Collection[tuple[str, str]] = ()  # methods and data sets that do not go together


def folder_of(args: argparse.Namespace) -> Path:
    """Return the folder of rows that are there already."""
    kinds = ("whole", "quick")
    return Path(args.kept, kinds[args.quick]) if "quick" in args else Path(args.kept)


def cases(args: argparse.Namespace, comparison: Comparison) -> list[tuple[str, str, int]]:
    """Return data set, method and seed of all rows that are asked for."""
    return [
        (dataset, method, seed)
        for dataset, seed, method in itertools.product(args.datasets, args.seeds, args.methods)
        if (method, dataset) not in comparison.impossible
    ]


def rows(run: Run, comparison: Comparison) -> Iterator[Row]:
    """Yield a row for each case, made unless it has been kept."""
    folder = folder_of(run.args)
    folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    with threads(1):
        for case in cases(run.args, comparison):
            path = folder / f"{'-'.join(map(str, case))}.json"
            yield keep(path, partial(_scored, comparison, *case, run.args))


def _scored(
    comparison: Comparison, dataset: str, method: str, seed: int, args: argparse.Namespace
) -> Row:
    found = comparison.score(dataset, method, seed, args)
    part, versions = comparison.part, {}
    for name in comparison.versions:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    command = f"python -m bench {part} --dataset {dataset} --methods {method} --seeds {seed}"
    command += " --quick" * getattr(args, "quick", False)
    about = {"command": command, **environment(), **versions}
    return {"part": part, **about, "dataset": dataset, "method": method, "seed": seed, **found}


def write_page(folder: Path, comparison: Comparison) -> list[Path]:
    """Write PART.md from PART.jsonl, if it is there."""
    part = comparison.part
    if not (folder / f"{part}.jsonl").exists():
        return []
    rows = read_rows(folder / f"{part}.jsonl")
    about = ("date", "python", "torch", *comparison.versions, "cpu", "revision")
    values = {key: " and ".join(sorted({row[key] for row in rows if key in row})) for key in about}
    text = [f"# {comparison.title}", "", f"`python -m bench {part}`", ""]
    text.append(", ".join(f"{name} {value}" for name, value in values.items() if value))
    text += ["", comparison.legend]
    if said := comparison.verdicts(rows):
        text += ["", *(f"- {verdict}" for verdict in said)]
    head = ["", "seeds", *comparison.columns]
    for dataset, heading in comparison.datasets.items():
        if found := select(rows, dataset=dataset):
            line = comparison.about(found)
            text += ["", f"## {heading}", "", *([line, ""] if line else [])]
            text.append(table(head, lines(found, comparison)).rstrip())
    return [write_text(folder / f"{part}.md", "\n".join((*text, "")))]


def lines(rows: list[Row], comparison: Comparison) -> list[list[str]]:
    """Return a line of the table for each method in rows of one data set."""
    found = []
    for method, (title, *_) in comparison.methods.items():
        if same := select(rows, method=method):
            cells = (cell(same) for cell in comparison.columns.values())
            found.append([title, str(len(same)), *cells])
    return found


def options(comparison: Comparison, seeds: int, datasets: list[str]) -> dict[str, dict[str, Any]]:
    """Return the command line's options that all comparisons have, with these defaults."""
    part, methods = comparison.part, comparison.methods
    known = list(comparison.datasets)
    return {
        # Or --dataset, which argparse takes for it.
        "--datasets": {"nargs": "+", "choices": known, "default": datasets},
        "--methods": {"nargs": "+", "choices": methods, "default": tuple(methods)},
        "--seeds": {"nargs": "+", "type": int, "default": list(range(seeds))},
        "--kept": {
            "default": str(RESULTS.parents[1] / "build" / part),
            "help": "folder of results that are there already",
        },
        "--out": OPTIONS["--out"],
    }


def measurement(comparison: Comparison, text: str, **fields: Any) -> Measurement:
    """Return the measurement of a comparison."""
    orders = {"dataset": comparison.datasets, "method": comparison.methods}
    common = {
        "rows": partial(rows, comparison=comparison),
        "page": partial(write_page, comparison=comparison),
        "collect": lambda args: kept(folder_of(args), **orders),
    }
    return Measurement(comparison.part, text, **{**common, **fields})
