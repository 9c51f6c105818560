"""Declarations of measurements, and the timing of their calls.

Its rows are written to ``results/NAME.jsonl``. Targets, tables and pictures are made of these rows
alone, so that a page can be made again at any time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from bench import problems
from bench.records import RESULTS, Row, select
from bench.timing import Sampler, sampler, take_turns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Value = TypeVar("Value")

TOLERANCE = 1e-3  # of a float32 result against float64; a provider that is further off is wrong
OPTIONS: dict[str, dict[str, Any]] = {
    "--quick": {"action": "store_true", "help": "tiny sizes, to see that it runs"},
    "--threads": {"type": int, "default": 2, "help": "of the measurement"},
    "--out": {"default": str(RESULTS), "help": "folder of the results"},
}
SCVI = ("scvi",)  # what measurements of cells need
CASE = ("mode", "threads", "B", "J", "D", "genes", "density", "cells")


class Check(NamedTuple):
    """A measured value next to what is asked, and why it is missed where it is.

    ``bound`` is the value that would be left if our part cost nothing but what it needs.
    """

    target: str
    case: str
    value: float
    limit: float
    at_least: bool = True
    unit: str = "x"
    reason: str = "The reason is not known yet. Next: a profile of these cases."
    bound: float | None = None

    @property
    def met(self) -> bool:
        """Return whether the value is on the right side of its limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def measured(self) -> str:
        """The value with its unit."""
        return _with_unit(self.value, self.unit)

    @property
    def at_best(self) -> str:
        """The bound with its unit, in brackets, or nothing."""
        return "" if self.bound is None else f" ({_with_unit(self.bound, self.unit)})"

    @property
    def asked(self) -> str:
        """The limit in words."""
        return f"{'at least' if self.at_least else 'at most'} {_with_unit(self.limit, self.unit)}"

    @property
    def verdict(self) -> str:
        """``met`` or ``MISSED``."""
        return "met" if self.met else "MISSED"


def _with_unit(value: float, unit: str) -> str:
    return (f"{value:.0f}" if abs(value) >= 99.5 else f"{value:.3g}") + unit


class Run(NamedTuple):
    """The options of a run, and how it compares providers."""

    args: argparse.Namespace

    def choose(self, full: Value, quick: Value) -> Value:
        """Return the sizes of this run: the second ones with ``--quick``."""
        return quick if self.args.quick else full

    def compare(
        self,
        mode: str,
        calls: Mapping[str, Any],
        errors: Mapping[str, float] | None = None,
        *,
        truth: Sequence[Tensor] = (),
        tolerance: float = TOLERANCE,
        repeats: int = 5,
        seconds: float = 5.0,
        **case: Any,
    ) -> Iterator[Row]:
        """Check the results of providers, time them in turns, and give a row for each.

        A provider is a call, or what has a sampler of its own as :class:`Less` has. Its error is
        given, or that of what it returns against ``truth`` in float64; ``case`` holds more fields.

        Raises
        ------
        RuntimeError
            If an error is not below the tolerance.
        """
        errors = dict(errors or {})
        if truth:
            left = (name for name in calls if name not in errors)
            errors |= {name: problems.error(calls[name](), truth) for name in left}
        for provider, error in errors.items():
            if not error < tolerance:
                of = ", ".join(f"{key} {value}" for key, value in case.items())
                raise RuntimeError(f"{provider}, {mode}, {of}: error {error:.2g} in float32")
        samplers: dict[str, Sampler] = {
            name: getattr(call, "sample", None) or sampler(call) for name, call in calls.items()
        }
        timings = take_turns(
            samplers, repeats=self.choose(repeats, 3), seconds=self.choose(seconds, 0.0)
        )
        for provider, timing in timings.items():
            row = {"mode": mode, "provider": provider, **case, **timing}
            yield {**row, "error": errors[provider]} if provider in errors else row


class Less(NamedTuple):
    """A call, and a part of it whose time does not count."""

    whole: Callable[[], object]
    part: Callable[[], object]

    def sample(self, calls: int) -> float:
        """Return the seconds that the calls take beside their part, which is timed right after.

        A disturbed turn may make the part longer than the whole: a tenth of the whole is the least
        that counts as left.
        """
        seconds = sampler(self.whole)(calls)
        return max(seconds - sampler(self.part)(calls), 0.1 * seconds)


def relative(rows: Sequence[Row], over: str, **fields: Any) -> list[Row]:
    """Return rows with their ``ratio``: the median over that of a provider in the same case."""
    timed = [row for row in select(rows, **fields) if "p50" in row]

    def case(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in CASE)

    base = {case(row): row["p50"] for row in select(timed, provider=over)}
    return [{**row, "ratio": row["p50"] / base[case(row)]} for row in timed if case(row) in base]


def exponent(rows: Sequence[Row], axis: str, of: str) -> float:
    """Return the slope of log of a field against log of the axis."""
    x, y = (np.log([row[key] for row in rows]) for key in (axis, of))
    return float(np.polyfit(x, y, 1)[0])


def size_of(row: Row) -> str:
    """(B, J, D) of a row."""
    return f"({row['B']}, {row['J']}, {row['D']})"


class Measurement(NamedTuple):
    """A measurement: its rows, its targets, and the tables and picture that show them.

    Most are sections of speed.md, with ``heading``, ``introduction``, ``tables`` and a picture, and
    ``checks`` are their targets. Others have a ``page`` that writes files into the folder of
    results and returns their paths. ``options`` are the arguments of ``add_argument`` by flag,
    ``needs`` modules without which it is left out. Where each row is kept in a file of its own, so
    that a run that was stopped goes on, ``collect`` returns all that are to be written.
    """

    name: str
    text: str
    rows: Callable[[Run], Iterator[Row]]
    options: Mapping[str, dict[str, Any]] = OPTIONS
    needs: tuple[str, ...] = ()
    checks: Callable[[Sequence[Row]], Iterator[Check]] = lambda rows: iter(())
    heading: str = ""
    introduction: str = ""
    tables: Callable[[Sequence[Row]], str] | None = None
    plot: Callable[[Figure, Sequence[Row]], None] | None = None
    page: Callable[[Path], list[Path]] | None = None
    collect: Callable[[argparse.Namespace], list[Row]] | None = None
    status: Callable[[Sequence[Row]], int] = lambda rows: 0
