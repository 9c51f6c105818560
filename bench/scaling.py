"""How time grows with B, J and D, and memory with B J.

    time ~ B^b J^j D^d

Each exponent is a least-squares fit to logarithms along one axis, the other two held. Time must
grow no faster than b = j = 1 and d = 2; overheads of small problems make the fits smaller.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import problems, providers, throughput
from bench.problems import Size
from bench.records import Row
from bench.timing import sampler, take_turns, threads

FORWARD = "forward"
BACKWARD = "forward + backward"
MEMORY = "memory"


class Plan(NamedTuple):
    """The axes, the sizes whose memory is measured, and the turns."""

    axes: dict[str, tuple[Size, ...]]
    memory: dict[str, tuple[Size, ...]]
    repeats: int
    seconds: float


FULL = Plan(
    axes={
        "B": tuple(Size(b, 100, 16) for b in (512, 1024, 2048, 4096, 8192, 16384)),
        "J": tuple(Size(1024, j, 16) for j in (50, 100, 200, 400, 800, 1600)),
        "D": tuple(Size(1024, 100, d) for d in (4, 8, 12, 16, 24, 32, 48, 64)),
    },
    memory={
        "vmm_fast": (
            Size(16384, 400, 32),
            Size(65536, 1600, 32),
            Size(4096, 100, 32),
            Size(65536, 10_000, 32),
            Size(4096, 100, 32),  # again, for the time a pair just before and after the largest
        ),
        "matmul": (Size(1024, 100, 32), Size(4096, 100, 32), Size(8192, 200, 32)),
    },
    repeats=5,
    seconds=2.5,
)
QUICK = Plan(
    axes={
        "B": (Size(32, 4, 3), Size(64, 4, 3)),
        "J": (Size(32, 4, 3), Size(32, 8, 3)),
        "D": (Size(32, 4, 3), Size(32, 4, 6)),
    },
    memory={"vmm_fast": (Size(64, 4, 3), Size(128, 8, 3)), "matmul": (Size(64, 4, 3),)},
    repeats=3,
    seconds=0.0,
)


def calls(size: Size) -> dict[str, Callable[[], Any]]:
    """Forward, and forward with backward, of a mixture that is built."""
    inputs = problems.whitened(size)
    density = providers.vmm_fast_whitened
    return {
        FORWARD: partial(density, inputs),
        BACKWARD: throughput.gradient_call(density, inputs),
    }


def rows(plan: Plan, thread_counts: tuple[int, ...]) -> Iterator[Row]:
    """Along each axis all sizes take turns, then the memory of one size after the other."""
    for count in thread_counts:
        with threads(count):
            for axis, sizes in plan.axes.items():
                yield from _axis(axis, sizes, count, plan)
    for provider, sizes in plan.memory.items():
        for size in sizes:
            yield {
                "part": "scaling",
                "dtype": "float32",
                "threads": max(thread_counts),
                "mode": MEMORY,
                "provider": provider,
                **size._asdict(),
                **peak_memory(provider, size, max(thread_counts)),
            }


def _axis(axis: str, sizes: Sequence[Size], threads: int, plan: Plan) -> Iterator[Row]:
    work = {(mode, size): call for size in sizes for mode, call in calls(size).items()}
    error = {}
    for size in sizes:
        inputs = problems.whitened(size)
        truth = problems.reference_log_prob(inputs, lambda p: p)
        error[FORWARD, size] = problems.error([work[FORWARD, size]()], truth[:1])
        error[BACKWARD, size] = problems.error(work[BACKWARD, size](), truth)
    keys = {f"{mode} {tuple(size)}": (mode, size) for mode, size in work}
    timings = take_turns(
        {key: sampler(work[value]) for key, value in keys.items()},
        repeats=plan.repeats,
        seconds=plan.seconds * len(sizes),
    )
    for key, timing in timings.items():
        mode, size = keys[key]
        yield {
            "part": "scaling",
            "dtype": "float32",
            "threads": threads,
            "mode": mode,
            "axis": axis,
            "provider": "vmm_fast",
            **size._asdict(),
            **timing,
            "error": error[mode, size],
        }


def exponent(rows: Sequence[Row], axis: str) -> float:
    """Slope of log p50 against log of the axis."""
    x, y = (np.log([row[key] for row in rows]) for key in (axis, "p50"))
    return float(np.polyfit(x, y, 1)[0])


def peak_memory(provider: str, size: Size, thread_count: int) -> dict[str, Any]:
    """What ``python -m bench.memory`` finds in a fresh process."""
    arguments = [provider, *map(str, size), str(thread_count)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    return json.loads(done.stdout)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options that no other part has: none."""


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Rows for the command line's options."""
    return rows(QUICK if args.quick else FULL, tuple(sorted({1, args.threads})))
