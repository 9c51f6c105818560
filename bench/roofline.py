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

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from bench import figures, problems, throughput
from bench.measurement import Check, Measurement, Run, size_of
from bench.problems import Size, Whitened
from bench.records import Row, select
from bench.tables import table
from bench.timing import threads
from vmm_fast import ops, reference

PEAK, COPY = "FMA peak", "copy bandwidth"
LOG_PROB, LOG_PROB_BACKWARD = "log_prob", "log_prob, backward"
STATISTICS, RESPONSIBILITIES, ASSIGN = "statistics", "responsibilities", "assign"
KERNELS = (LOG_PROB, LOG_PROB_BACKWARD, STATISTICS, RESPONSIBILITIES, ASSIGN)
SIZES, QUICK = (Size(256, 100, 10), Size(4096, 100, 10), Size(4096, 500, 30)), (Size(64, 5, 3),)


# --- the machine's own limits ---

SOURCE = Path(__file__).with_name("peak.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC")
ROUNDS = 4_000_000  # over ten milliseconds, next to which starting threads is nothing
COPIED_BYTES = 2**28  # far more than a cache holds


@cache
def _library() -> ctypes.CDLL:
    """Build peak.cpp once for this source, compiler, flags and machine."""
    compiler = os.environ.get("CXX", "c++")
    host = subprocess.run(
        [compiler, "-march=native", "-E", "-v", "-x", "c++", os.devnull],
        capture_output=True,
        check=True,
    ).stderr
    key = hashlib.sha256(SOURCE.read_bytes() + host + repr(FLAGS).encode()).hexdigest()[:16]
    folder = Path(__file__).parents[1] / "build" / "bench"
    path = folder / f"peak-{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / path.name
            subprocess.run([compiler, *FLAGS, SOURCE, "-o", built], check=True)
            built.replace(path)
    library = ctypes.CDLL(str(path))
    library.fma_loop.argtypes, library.fma_loop.restype = [ctypes.c_int64], ctypes.c_float
    return library


def fma(thread_count: int) -> tuple[Callable[[], object], int]:
    """Return a call of fused multiply-adds, and the operations that it makes."""
    library = _library()
    pool = ThreadPoolExecutor(thread_count)  # ctypes lets go of the interpreter's lock
    operations = thread_count * ROUNDS * library.fma_operations()
    return lambda: list(pool.map(library.fma_loop, [ROUNDS] * thread_count)), operations


def copy() -> tuple[Callable[[], object], int]:
    """Return a call that copies on torch's threads, and the bytes that it reads and writes."""
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * COPIED_BYTES


# --- the kernels ---


def operations(kernel: str, size: Size, with_weight: int) -> int:
    """Return the floating-point operations of a kernel, as the top of this file counts them.

    ``with_weight`` is the number of pairs whose responsibility is not 0.
    """
    triangle = size.D * (size.D + 1) // 2
    pair = triangle + size.D
    sums = (triangle + size.D) + (size.D + 1)
    every, weighted = {
        LOG_PROB_BACKWARD: (2 * pair, triangle + sums),
        STATISTICS: (pair, sums),
    }.get(kernel, (pair, 0))
    return 2 * (every * size.B * size.J + weighted * with_weight)


def moved_bytes(kernel: str, size: Size) -> int:
    """Return the bytes of a kernel's float32 inputs and outputs."""
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
    """Return a call for each kernel."""
    return {
        LOG_PROB: partial(ops.mixture_log_prob, *inputs),
        LOG_PROB_BACKWARD: throughput.gradient_call(lambda p: ops.mixture_log_prob(*p)[0], inputs),
        STATISTICS: partial(ops.mixture_statistics, *inputs),
        RESPONSIBILITIES: partial(ops.mixture_responsibilities, *inputs),
        ASSIGN: partial(ops.mixture_assign, *inputs),
    }


def errors(inputs: Whitened) -> dict[str, float]:
    """Return relative errors of the kernels in float64; of assign, of the largest probability."""
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


def rows(run: Run) -> Iterator[Row]:
    """Yield kernels and limits, which take turns; on one thread, then on more."""
    for count in run.thread_counts:
        with threads(count):
            (multiply, multiplied), (move, moved) = fma(count), copy()
            limits = {PEAK: ("operations", multiplied), COPY: ("bytes", moved)}
            for size in run.choose(SIZES, QUICK):
                inputs = problems.whitened(size)
                with_weight = problems.pairs_with_weight(inputs)
                calls = {PEAK: multiply, COPY: move, **kernels(inputs)}
                error = errors(inputs)
                for row in run.compare("", calls, error, repeats=10, seconds=4.0):
                    kernel = row.pop("provider")
                    row |= {"threads": count, "mode": kernel, **size._asdict()}
                    if kernel in limits:
                        yield {**row, "provider": "machine", **dict([limits[kernel]])}
                        continue
                    row |= {"operations": operations(kernel, size, with_weight)}
                    row |= {"pairs_with_weight": with_weight, "bytes": moved_bytes(kernel, size)}
                    yield {**row, "provider": "vmm_fast"}


# --- targets, table, picture ---

FORWARD_REASON = """\
At D = 10 a pair's 65 multiply-adds come with some 20 cycles a vector that are not counted: \
subtracting the center, the exponential, the maximum. The start of threads, packing and Python \
take a tenth of a call. Next: A z - A m for A (z - m) where centers are so near that it is as \
precise."""
BACKWARD_REASON = """\
As above. Besides, at D = 10 the sums are over so few products that storing d, w d and the sums' \
lanes takes as long as they do. Next: a body for each small dimension that keeps d and y in \
registers, as the forward pass has."""


def fraction_of_peak(row: Row, rows: Sequence[Row]) -> float:
    """Return operations a second over those of the machine's multiply-adds in the same turns."""
    same = {key: row[key] for key in ("threads", "dtype", "B", "J", "D")}
    (peak,) = select(rows, mode=PEAK, **same)
    return row["operations"] / row["p50"] / (peak["operations"] / peak["p50"])


def checks(rows: Sequence[Row]) -> Iterator[Check]:
    """Yield the share of the peak on most threads, where there are enough points to fill them."""
    for kernel, limit, reason in (
        (LOG_PROB, 75.0, FORWARD_REASON),
        (LOG_PROB_BACKWARD, 55.0, BACKWARD_REASON),
    ):
        found = select(rows, mode=kernel)
        most = max((row["threads"] for row in found), default=0)
        for row in select(found, threads=most):
            if row["B"] > 256 or len(found) == 1:
                target, share = f"{kernel}: share of the FMA peak", fraction_of_peak(row, rows)
                yield Check(target, size_of(row), 100 * share, limit, unit=" %", reason=reason)


def tables(rows: Sequence[Row]) -> str:
    """Return the operations a second of every kernel and the share of the peak."""
    lines = []
    for row in rows:
        cells = [str(row["threads"]), size_of(row), row["mode"]]
        if row["mode"] == COPY:
            lines.append([*cells, f"{row['bytes'] / row['p50'] / 1e9:.1f} GB/s", "", ""])
            continue
        cells.append(f"{row['operations'] / row['p50'] / 1e9:.0f} GFLOP/s")
        if row["mode"] == PEAK:
            lines.append([*cells, "", ""])
        else:
            share = f"{100 * fraction_of_peak(row, rows):.0f} %"
            lines.append([*cells, f"{row['operations'] / row['bytes']:.0f}", share])
    head = ("threads", "(B, J, D)", "kernel", "reached", "operations a byte", "of the FMA peak")
    return table(head, lines)


def plot(figure: Figure, rows: Sequence[Row]) -> None:
    """Draw each kernel's share of the FMA peak, which is that in the same turns."""
    counts = sorted({row["threads"] for row in rows})
    figure.set_size_inches(1.5 + 5.5 * len(counts), 4.5)
    axes = figure.subplots(1, len(counts), squeeze=False, sharey=True)[0]
    for ax, count in zip(axes, counts, strict=True):
        found = select(rows, threads=count, provider="vmm_fast")
        named = [{**row, "provider": row["mode"]} for row in found]
        figures.bars(ax, named, lambda r: 100 * fraction_of_peak(r, rows), size_of, "{:.0f}")
        title = f"% of the FMA peak, {count} thread{'s' if count > 1 else ''}, float32"
        figures.bare(ax, title)


MEASUREMENT = Measurement(
    "roofline",
    "kernels against the machine's own limits",
    rows,
    checks=checks,
    introduction="Peak and bandwidth are measured in the same turns as the kernels. How operations "
    "and bytes are counted is said at the top of `bench/roofline.py`.",
    tables=tables,
    plot=plot,
)
