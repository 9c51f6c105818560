"""Run a measurement: its rows are printed and written, then its page is made again."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path

from bench import report
from bench.measurement import Measurement, Run
from bench.records import Row, command, environment, write_rows
from bench.tables import duration
from bench.timing import threads

# What is printed of a row, besides its time.
SHOWN = (
    *("dataset", "method", "seed", "mode", "provider", "B", "J", "D", "threads", "axis", "cells"),
    *("call", "operators", "absent", "density", "times as fast", "times as fast, by CPU"),
    *("times stock", "cells/s", "difference", "losses", "name", "kernel", "error", "launches"),
    *("fraction", "ratio", "peak_bytes", "kills", "lost", "clusters", "nmi", "ari"),
)


def _line(row: Row) -> str:
    values = {key: row[key] for key in SHOWN if key in row}
    shown = [f"{k} {f'{v:.4g}' if isinstance(v, float) else v}" for k, v in values.items()]
    seconds = row.get("p50", row.get("seconds"))
    return "  ".join(shown if seconds is None else [*shown, duration(seconds)])


def run(measurement: Measurement, args: argparse.Namespace) -> int:
    """Run a measurement and write its files; gives its exit status."""
    if not all(importlib.util.find_spec(module) for module in measurement.needs):
        print(f'{measurement.name} is left out: pip install "vmm-fast[scvi]"')
        return 0
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with threads(args.threads) if "threads" in args else nullcontext():
        common = {"command": command(sys.argv[1:]), **environment()}
        common |= {"part": measurement.name, "dtype": "float32"}
        try:
            for row in measurement.rows(Run(args)):
                # A row that was kept has what it was made with.
                rows.append(row if "command" in row else {**common, **row})
                print(_line(row), flush=True)
        finally:  # what was measured is there if a later row fails
            if measurement.collect is not None:
                rows = measurement.collect(args)
            if rows:
                write_rows(folder / f"{measurement.name}.jsonl", rows)
    if rows:
        for path in report.write(folder, [measurement]):
            print(path)
    for check in measurement.checks(rows):
        print(
            f"{check.verdict:6}  {check.target}, {check.case}: {check.measured}, "
            f"asked {check.asked}"
        )
    return measurement.status(rows)
