"""Compare two runs of the bench on one machine: which rows became slower or faster beyond noise.

A row's noise is the distance of its 20th and 80th percentile. A change counts where the medians
differ by more than the noise of both rows together and by more than 5 %, which is what the machine
itself drifts between runs. Rows of other machines, versions or threads are different rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from bench.records import Row, read_rows

KEY = (
    *("part", "mode", "axis", "provider", "B", "J", "D", "dtype"),
    *("threads", "cpu", "instruction_set"),
    *("python", "torch", "numpy", "provider_version"),
)
DRIFT = 0.05


class Change(NamedTuple):
    """A row in both files."""

    row: Row
    before: float
    after: float
    verdict: str  # "slower", "faster" or "same"


def _timed(rows: list[Row]) -> dict[str, Row]:
    # As text, since a provider may have several versions: one of each of its packages.
    return {json.dumps([row.get(key) for key in KEY]): row for row in rows if "p50" in row}


def compare(before: list[Row], after: list[Row]) -> list[Change]:
    """Changes of the rows that are in both."""
    old, new = _timed(before), _timed(after)
    return [_change(old[key], new[key]) for key in old if key in new]


def _change(old: Row, new: Row) -> Change:
    noise = sum(row["p80"] - row["p20"] for row in (old, new))
    difference = new["p50"] - old["p50"]
    verdict = "same"
    if abs(difference) > max(noise, DRIFT * old["p50"]):
        verdict = "slower" if difference > 0 else "faster"
    return Change(new, old["p50"], new["p50"], verdict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of ``python -m bench compare``."""
    parser.add_argument("before", type=Path, help="JSON lines of a run")
    parser.add_argument("after", type=Path, help="JSON lines of a later run")


def main(args: argparse.Namespace) -> int:
    """Print what changed; 1 where something became slower, else 0."""
    before, after = read_rows(args.before), read_rows(args.after)
    changes = compare(before, after)
    for change in changes:
        if change.verdict != "same":
            row = change.row
            case = ", ".join(f"{k} = {row[k]}" for k in ("B", "J", "D", "threads") if k in row)
            times = f"{change.before:.3g} s -> {change.after:.3g} s"
            print(
                f"{change.verdict}: {row['part']}, {row['mode']}, {row['provider']}, {case}: "
                f"{times} ({change.after / change.before:.2f}x)"
            )
    counts = {v: sum(c.verdict == v for c in changes) for v in ("slower", "faster", "same")}
    only = len(_timed(before)) + len(_timed(after)) - 2 * len(changes)
    print(", ".join(f"{n} {v}" for v, n in counts.items()) + f", {only} in one file alone")
    return int(counts["slower"] > 0)
