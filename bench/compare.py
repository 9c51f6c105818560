"""Compare two runs of the bench on one machine: which rows became slower or faster beyond noise.

A row's noise is the distance of its 20th and 80th percentile. A change counts where the medians
differ by more than the noise of both rows together and by more than 5 %, which is what the machine
itself drifts between runs. Rows of other machines, versions or threads are different rows.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from bench.records import Row, read_rows

KEY = (
    *("part", "mode", "axis", "provider", "B", "J", "D", "dtype"),
    *("threads", "cpu", "instruction_set"),
    *("python", "torch", "numpy", "provider_version"),
)
DRIFT = 0.05
OPTIONS = {
    "before": {"type": Path, "help": "JSON lines of a run"},
    "after": {"type": Path, "help": "JSON lines of a later run"},
}


def _timed(path: Path) -> dict[str, Row]:
    # As text, since a provider may have several versions: one of each of its packages.
    rows = (row for row in read_rows(path) if "p50" in row)
    return {json.dumps([row.get(key) for key in KEY]): row for row in rows}


def verdict(old: Row, new: Row) -> str:
    """Return ``slower``, ``faster`` or ``same``."""
    noise = sum(row["p80"] - row["p20"] for row in (old, new))
    difference = new["p50"] - old["p50"]
    if abs(difference) <= max(noise, DRIFT * old["p50"]):
        return "same"
    return "slower" if difference > 0 else "faster"


def main(args: argparse.Namespace) -> int:
    """Print what changed; 1 where something became slower, else 0."""
    before, after = _timed(args.before), _timed(args.after)
    counts = Counter(slower=0, faster=0, same=0)
    for key in (key for key in before if key in after):
        old, new = before[key], after[key]
        changed = verdict(old, new)
        counts[changed] += 1
        if changed != "same":
            case = ", ".join(f"{k} = {new[k]}" for k in ("B", "J", "D", "threads") if k in new)
            times = f"{old['p50']:.3g} s -> {new['p50']:.3g} s"
            print(
                f"{changed}: {new['part']}, {new['mode']}, {new['provider']}, {case}: {times} "
                f"({new['p50'] / old['p50']:.2f}x)"
            )
    only = len(before.keys() ^ after.keys())
    print(", ".join(f"{n} {v}" for v, n in counts.items()) + f", {only} in one file alone")
    return int(counts["slower"] > 0)
