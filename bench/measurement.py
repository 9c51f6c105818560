"""What a measurement declares, and how its calls are timed.

Its rows are written to ``results/NAME.jsonl``. Targets, tables and pictures are made of these rows
alone, so that a page can be made again at any time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

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
SCVI = ("scvi",)


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
        """Whether the value is on the right side of its limit."""
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
    """The options of a run, and its clock."""

    args: argparse.Namespace
    sampler: Callable[[Callable[[], object]], Sampler] = sampler

    def choose(self, full: Value, quick: Value) -> Value:
        """Return the sizes of this run: the second ones with ``--quick``."""
        return quick if self.args.quick else full

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """One thread, and as many as were asked for."""
        return tuple(sorted({1, self.args.threads}))

    def take_turns(
        self, samplers: Mapping[str, Sampler], repeats: int, seconds: float
    ) -> dict[str, dict[str, Any]]:
        """Time providers in turns, as :func:`bench.timing.take_turns`; briefly with ``--quick``."""
        seconds = self.choose(seconds, 0.0)
        return take_turns(samplers, repeats=self.choose(repeats, 3), seconds=seconds)

    def compare(
        self,
        mode: str,
        calls: Mapping[str, Callable[[], object] | Sampler],
        errors: Mapping[str, float],
        *,
        repeats: int = 5,
        seconds: float = 5.0,
        **case: Any,
    ) -> Iterator[Row]:
        """Time providers in turns and give a row for each.

        Parameters
        ----------
        mode : str
            What is timed.
        calls : mapping from a provider's name to its call, or to its sampler where it has one
        errors : mapping from a provider's name to the relative error of its result
            Providers without an error need not be there.
        repeats, seconds : int, float
            As in :func:`bench.timing.take_turns`.
        **case
            Further fields of every row.

        Raises
        ------
        RuntimeError
            If an error is not below :data:`TOLERANCE`.
        """
        for provider, error in errors.items():
            if not error < TOLERANCE:
                of = ", ".join(f"{key} {value}" for key, value in case.items())
                raise RuntimeError(f"{provider}, {mode}, {of}: error {error:.2g} in float32")
        timings = self.take_turns(
            {name: as_sampler(call, self.sampler) for name, call in calls.items()}, repeats, seconds
        )
        for provider, timing in timings.items():
            row = {"mode": mode, "provider": provider, **case, **timing}
            yield {**row, "error": errors[provider]} if provider in errors else row


class Less(NamedTuple):
    """A call, and a part of it whose time does not count."""

    whole: Callable[[], object]
    part: Callable[[], object]


def as_sampler(call: Any, make: Callable[[Callable[[], object]], Sampler]) -> Sampler:
    """Return the sampler of a call, of a :class:`Less`, or of what has one of its own."""
    if isinstance(call, Less):
        return less(make(call.whole), make(call.part))
    return getattr(call, "sample", None) or make(call)


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
    """What is run, what is asked of it, and how it is shown.

    Attributes
    ----------
    name, text : str
        Name on the command line and of its files; what it measures.
    rows : function of a Run that yields rows
    options : mapping from a flag to the arguments of ``add_argument``
    needs : tuple of str
        Modules without which it is left out.
    checks : function of all rows of a file that yields its targets
    heading, introduction, tables, plot
        Its section of speed.md, and its picture.
    page : function of the folder of results that writes pages of its own instead
        Gives the paths of all files that it wrote.
    collect : function of the options that gives the rows to write
        Where each row is kept in a file of its own, so that a run that was stopped goes on.
    status : function of the rows that gives the exit status
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
