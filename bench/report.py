"""The pages and pictures, all from the files in a folder of results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from bench import figures
from bench.measurement import Check, Measurement
from bench.records import Row, by_machine, read_rows
from bench.registry import MEASUREMENTS
from bench.tables import table, write_text

ABOUT = ("date", "revision", "cpu", "instruction_set", "openmp", "python", "torch", "numpy")

BOUNDS = """\
## Bounds

In brackets is what would be left if our part cost nothing but what it cannot do without, on this \
machine and in the same run; noise may go below it.

- Densities: multiply-adds of a pair, those of today's kernels, at the peak's rate \
(`bench/peak.py`), and an empty autograd function in Python, forward and backward.
- Call overhead: that empty autograd function. Only a function in C++ would be below it.
- Training steps and epochs against stock SCVI: our network and likelihood under N(0, I); against \
N(0, I): 1.
- Shares of the peak: 100 %.
"""


def target_tables(found: Iterable[tuple[str, Check]]) -> str:
    """Return a table of the targets for each machine: one with a column each would be too wide."""
    lines: dict[str, list[tuple[str, ...]]] = {}
    for machine, check in found:
        shown = check.measured if check.met else f"**{check.measured}**"
        line = (check.target, check.case, check.asked, shown + check.at_best)
        lines.setdefault(machine, []).append(line)
    head = ("work", "case", "asked", "measured")
    return "\n".join(
        f"## Targets on {name}\n\n{table(head, cells)}" for name, cells in lines.items()
    )


def missed(found: Iterable[Check]) -> str:
    """Return why targets are missed, and what to try next; those of one reason together."""
    targets: dict[str, dict[str, None]] = {}
    for check in found:
        if not check.met:
            targets.setdefault(check.reason, {})[check.target] = None
    return "".join(f"- *{'; '.join(names)}.* {reason}\n" for reason, names in targets.items())


def _section(measurement: Measurement, rows: Sequence[Row]) -> str:
    assert measurement.tables is not None
    heading = measurement.heading or measurement.name.capitalize()
    text = f"\n## {heading}\n\n{measurement.introduction}\n\n"
    text += f"![]({measurement.name}.png)\n\n" * (measurement.plot is not None)
    runs = []
    for run in by_machine(rows).values():
        about = ", ".join(str(run[0][key]) for key in ABOUT)
        command = f"python -m bench {measurement.name} --threads {run[0]['threads']}"
        runs.append(f"{measurement.tables(run)}\n`{command}`: {about}.\n")
    return text + "\n".join(runs)


def speed(parts: Iterable[tuple[Measurement, list[Row]]]) -> str:
    """Return the text of speed.md."""
    parts = list(parts)
    found = [
        (machine, check)
        for measurement, rows in parts
        for machine, run in by_machine(rows).items()
        for check in measurement.checks(run)
    ]
    text = "# Speed\n\nOnly ratios within one table mean anything: the machines are shared. "
    text += "What is bold misses its target. In brackets is the bound, where there is one "
    text += f"([which](#bounds)).\n\n{target_tables(found)}\n{BOUNDS}"
    if reasons := missed(check for _, check in found):
        text += f"\n## What is missed\n\n{reasons}"
    return text + "".join(_section(*part) for part in parts)


def write(folder: Path, of: Iterable[Measurement] = tuple(MEASUREMENTS.values())) -> list[Path]:
    """Write the pages of these measurements, and their pictures; return their paths."""
    parts = {
        name: (measurement, read_rows(folder / f"{name}.jsonl"))
        for name, measurement in MEASUREMENTS.items()
        if measurement.tables is not None and (folder / f"{name}.jsonl").exists()
    }
    written, sections = [], False
    for measurement in of:
        if measurement.page is not None:
            written += measurement.page(folder)
        elif measurement.name in parts:
            sections = True
            if measurement.plot is not None:
                first, *_ = by_machine(parts[measurement.name][1]).values()
                draw = partial(measurement.plot, rows=first)
                written.append(figures.draw(folder / f"{measurement.name}.png", draw))
    if sections:
        written.append(write_text(folder / "speed.md", speed(parts.values())))
    return written
