"""Declarations of measurements, and the timing of their calls.

Its rows are written to ``results/NAME.jsonl``. Targets, tables and pictures are made of these rows
alone, so that a page can be made again at any time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

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
    "--threads": {"type": int, "default": 2, "help": "the most that is measured"},
    "--out": {"default": str(RESULTS), "help": "folder of the results"},
}
SCVI = ("scvi",)  # what measurements of cells need


class Check(NamedTuple):
    """A measured value next to its limit, and why it is missed where it is."""

    target: str
    case: str
    value: float
    limit: float
    at_least: bool = True
    unit: str = "x"
    reason: str = "The reason is not known yet. Next: a profile of these cases."

    @property
    def met(self) -> bool:
        """Return whether the value is on the right side of its limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def measured(self) -> str:
        """The value with its unit."""
        return _with_unit(self.value, self.unit)

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

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """One thread, and as many as were asked for."""
        return tuple(sorted({1, self.args.threads}))

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

        A provider is a call, a :class:`Less`, or what has a sampler of its own. Its error is given,
        or that of what it returns against ``truth`` in float64; ``case`` holds further fields.

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
        timings = take_turns(
            {name: as_sampler(call) for name, call in calls.items()},
            repeats=self.choose(repeats, 3),
            seconds=self.choose(seconds, 0.0),
        )
        for provider, timing in timings.items():
            row = {"mode": mode, "provider": provider, **case, **timing}
            yield {**row, "error": errors[provider]} if provider in errors else row


class Less(NamedTuple):
    """A call, and a part of it whose time does not count."""

    whole: Callable[[], object]
    part: Callable[[], object]


def as_sampler(call: Any) -> Sampler:
    """Return the sampler of a call, of a :class:`Less`, or of what has one of its own."""
    if isinstance(call, Less):
        return less(sampler(call.whole), sampler(call.part))
    return getattr(call, "sample", None) or sampler(call)


def less(whole: Sampler, part: Sampler) -> Sampler:
    """Return the sampler of what a call takes beside a part of it, which is timed right after it.

    A disturbed turn may make the part longer than the whole: a tenth of the whole is the least that
    counts as left.
    """

    def sample(calls: int) -> float:
        seconds = whole(calls)
        return max(seconds - part(calls), 0.1 * seconds)

    return sample


def ratios(rows: Sequence[Row], provider: str, over: str, **fields: Any) -> Iterator[tuple]:
    """Yield a provider's rows, each with its median over that of another in the same case."""
    keys = ("part", "mode", "threads", "dtype", "B", "J", "D")
    for row in select(rows, provider=provider, **fields):
        same = {key: row.get(key) for key in keys}
        for other in select(rows, provider=over, **same):
            yield row, row["p50"] / other["p50"]


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
