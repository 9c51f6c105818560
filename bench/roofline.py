"""How near each kernel comes to the machine's limits, which are measured in the same turns.

Operations are those that a kernel needs, two for each multiply-add, and bytes those of its inputs
and outputs. With P = D (D + 1) / 2 + D multiply-adds for l_ij (A times z, then the squares), a pair
of a point and a component costs

    log_prob            P
    log_prob, backward  P, then P again (nothing of size [B, J] is kept), D (D + 1) / 2 for the
                        gradient of z, D (D + 1) / 2 + D for M and D + 1 for s and N
    statistics          P (l is kept from the log-sum-exp to the sums), then D (D + 1) / 2 + D and
                        D + 1 as above
    responsibilities    P
    assign              P

A pair whose responsibility is exactly 0 in float32 needs no more than l and is counted so; clusters
overlap here (``bench/problems.py``), and there are few such pairs. The exponential and the maximum
are not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from bench import peak, problems, throughput
from bench.problems import Size, Whitened
from bench.records import Row
from bench.timing import sampler, take_turns, threads
from vmm_fast import ops, reference

PEAK = "FMA peak"
COPY = "copy bandwidth"
LOG_PROB = "log_prob"
LOG_PROB_BACKWARD = "log_prob, backward"
STATISTICS = "statistics"
RESPONSIBILITIES = "responsibilities"
ASSIGN = "assign"
KERNELS = (LOG_PROB, LOG_PROB_BACKWARD, STATISTICS, RESPONSIBILITIES, ASSIGN)


def operations(kernel: str, size: Size, with_weight: int) -> int:
    """Floating-point operations of a kernel, as the top of this file counts them.

    ``with_weight`` is the number of pairs whose responsibility is not 0.
    """
    triangle = size.D * (size.D + 1) // 2
    pair = triangle + size.D
    sums = (triangle + size.D) + (size.D + 1)
    every, weighted = {
        LOG_PROB: (pair, 0),
        LOG_PROB_BACKWARD: (2 * pair, triangle + sums),
        STATISTICS: (pair, sums),
        RESPONSIBILITIES: (pair, 0),
        ASSIGN: (pair, 0),
    }[kernel]
    return 2 * (every * size.B * size.J + weighted * with_weight)


def moved_bytes(kernel: str, size: Size) -> int:
    """Bytes of a kernel's float32 inputs and outputs."""
    points, mixture = size.B * size.D, size.J * (size.D**2 + size.D + 1)
    numbers = {
        LOG_PROB: points + mixture + 5 * size.B,
        # The second half reads it all again, with the gradients of lse and expected.
        LOG_PROB_BACKWARD: 3 * points + 3 * mixture + 12 * size.B,
        STATISTICS: points + 2 * mixture,
        RESPONSIBILITIES: points + mixture + size.B * size.J,
        ASSIGN: points + mixture + 4 * size.B,
    }[kernel]
    return 4 * numbers


def kernels(inputs: Whitened) -> dict[str, Callable[[], Any]]:
    """Give a call for each kernel."""
    return {
        LOG_PROB: partial(ops.mixture_log_prob, *inputs),
        LOG_PROB_BACKWARD: throughput.gradient_call(lambda p: ops.mixture_log_prob(*p)[0], inputs),
        STATISTICS: partial(ops.mixture_statistics, *inputs),
        RESPONSIBILITIES: partial(ops.mixture_responsibilities, *inputs),
        ASSIGN: partial(ops.mixture_assign, *inputs),
    }


def errors(inputs: Whitened) -> dict[str, float]:
    """Relative errors of the kernels against float64; of assign, of the largest probability."""
    exact = Whitened(*(x.double() for x in inputs))
    found = {kernel: call() for kernel, call in kernels(inputs).items()}
    log_prob = problems.reference_log_prob(inputs, lambda p: p)
    responsibilities = reference.mixture_responsibilities(*exact)
    return {
        LOG_PROB: problems.error(found[LOG_PROB][:1], log_prob[:1]),
        LOG_PROB_BACKWARD: problems.error(found[LOG_PROB_BACKWARD], log_prob),
        STATISTICS: problems.error(found[STATISTICS], problems.reference_statistics(exact)),
        RESPONSIBILITIES: problems.error([found[RESPONSIBILITIES]], [responsibilities]),
        ASSIGN: problems.error([found[ASSIGN][1]], [responsibilities.amax(-1)]),
    }


class Plan(NamedTuple):
    """Sizes, and how long each takes turns with the peak."""

    sizes: tuple[Size, ...]
    repeats: int
    seconds: float


FULL = Plan((Size(256, 100, 10), Size(4096, 100, 10), Size(4096, 500, 30)), 10, 4.0)
QUICK = Plan((Size(64, 5, 3),), 3, 0.0)


def rows(plan: Plan, thread_counts: tuple[int, ...]) -> Iterator[Row]:
    """Kernels and limits take turns; on one thread, then on more."""
    for count in thread_counts:
        with threads(count):
            common = {"part": "roofline", "dtype": "float32", "threads": count}
            fma, fma_operations = peak.fma("float32", count)
            copy, copied = peak.copy()
            limits = {PEAK: fma, COPY: copy}
            work = {PEAK: {"operations": fma_operations}, COPY: {"bytes": copied}}
            for size in plan.sizes:
                inputs = problems.whitened(size)
                calls = {**limits, **kernels(inputs)}
                error = errors(inputs)
                with_weight = problems.pairs_with_weight(inputs)
                timings = take_turns(
                    {name: sampler(call) for name, call in calls.items()},
                    repeats=plan.repeats,
                    seconds=plan.seconds,
                )
                for name, timing in timings.items():
                    if name in limits:
                        row = {"provider": "machine", **work[name]}
                    else:
                        row = {
                            "provider": "vmm_fast",
                            "operations": operations(name, size, with_weight),
                            "pairs_with_weight": with_weight,
                            "bytes": moved_bytes(name, size),
                            "error": error[name],
                        }
                    yield {**common, "mode": name, **size._asdict(), **row, **timing}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options that no other part has: none."""


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Rows for the command line's options."""
    return rows(QUICK if args.quick else FULL, tuple(sorted({1, args.threads})))
