"""Run a measurement: its rows are printed and written, then its page is made again."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path

from bench import report
from bench.measurement import Measurement, Run
from bench.records import Row, command, environment, read_rows, write_rows
from bench.tables import duration
from bench.timing import threads

HIDDEN = ("min", "p20", "p50", "p80", "repeats")


def _line(row: Row, common: Row) -> str:
    """Return what a row has beside its machine, with its time at the end."""
    values = {k: v for k, v in row.items() if k not in common and k not in HIDDEN}
    shown = [f"{k} {f'{v:.4g}' if isinstance(v, float) else v}" for k, v in values.items()]
    return "  ".join([*shown, duration(row["p50"])] if "p50" in row else shown)


def _elsewhere(path: Path, machine: str) -> list[Row]:
    """Return the rows in a file that were made on other machines, which a run leaves there."""
    return (
        [row for row in read_rows(path) if row.get("machine") != machine] if path.exists() else []
    )


def run(measurement: Measurement, args: argparse.Namespace) -> int:
    """Run a measurement and write its files; return its exit status."""
    if not all(importlib.util.find_spec(module) for module in measurement.needs):
        print(f'{measurement.name} is left out: pip install "vmm-fast[bench]"')
        return 0
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    file = f"{measurement.name}-unfinished.jsonl"
    with threads(args.threads) if "threads" in args else nullcontext():
        common = {"command": command(sys.argv[1:]), **environment()}
        common |= {"part": measurement.name, "dtype": "float32"}
        try:
            for row in measurement.rows(Run(args)):
                # A row that was kept has what it was made with.
                rows.append(row if "command" in row else {**common, **row})
                print(_line(row, common), flush=True)
            file = f"{measurement.name}.jsonl"
        finally:  # what was measured is there if a later row fails
            if measurement.collect is not None:
                rows = measurement.collect(args)
            if rows:
                others = _elsewhere(folder / file, common["machine"]) if measurement.tables else []
                write_rows(folder / file, [*others, *rows])
    if rows:
        for path in report.write(folder, [measurement]):
            print(path)
    for check in measurement.checks(rows):
        print(
            f"{check.verdict:6}  {check.target}, {check.case}: {check.measured}, "
            f"asked {check.asked}"
        )
    return measurement.status(rows)
