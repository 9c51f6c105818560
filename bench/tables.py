"""Markdown tables, and numbers as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

from bench.records import Row
from vmm_fast._files import write_atomically


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def compared(
    rows: Iterable[Row], head: Sequence[str], case: Callable[[Row], tuple[str, ...]]
) -> str:
    """Return a table with a line for each case and a column for each provider.

    A cell has the median time and, in brackets, the row's ``ratio`` unless that is 1.
    """
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        ratio = f" ({row['ratio']:.3g}x)" * (row["ratio"] != 1)
        lines.setdefault(case(row), {})[row["provider"]] = duration(row["p50"]) + ratio
    columns = list(dict.fromkeys(name for line in lines.values() for name in line))
    cells = ([*key, *(line.get(name, "-") for name in columns)] for key, line in lines.items())
    return table((*head, *columns), cells)


def duration(seconds: float) -> str:
    """Return seconds in the unit that suits them, with three digits."""
    unit, scale = next((u for u in (("s", 1.0), ("ms", 1e-3)) if seconds >= u[1]), ("us", 1e-6))
    value = seconds / scale
    return (f"{value:.0f}" if value >= 99.5 else f"{value:.3g}") + f" {unit}"


def spread(values: Iterable[float | None], digits: int | None = None) -> str:
    """Return mean and standard deviation of the values that are known.

    Unless digits are asked for, three are shown, and of whole numbers the mean alone with one.
    """
    known = [value for value in values if value is not None]
    if not known:
        return ""
    if digits is None and all(isinstance(value, int) for value in known):
        return f"{mean(known):.1f}"
    digits = 3 if digits is None else digits
    deviation = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{mean(known):.{digits}f}{deviation}"


def write_text(path: Path, text: str) -> Path:
    """Write a text, whole or not at all."""
    write_atomically(path, lambda file: file.write(text), text=True)
    return path
