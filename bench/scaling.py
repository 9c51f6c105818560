"""How time grows with B, J and D, and memory with B J.

    time ~ B^b J^j D^d

Each exponent is a least-squares fit to logarithms along one axis, the other two held. Time must
grow no faster than b = j = 1 and d = 2; overheads of small problems make the fits smaller. Memory
is that of one forward with backward, in a process that does nothing else, for Linux with glibc.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench import alone, figures, problems, providers
from bench.measurement import Check, Measurement, Run, size_of
from bench.problems import Size
from bench.records import Row, select
from bench.tables import duration, table
from bench.throughput import BACKWARD, FORWARD, forward_call, gradient_call
from bench.timing import quantiles, sampler, threads

MEMORY = "memory"
AXES = {
    "B": tuple(Size(b, 100, 16) for b in (512, 1024, 2048, 4096, 8192, 16384)),
    "J": tuple(Size(1024, j, 16) for j in (50, 100, 200, 400, 800, 1600)),
    "D": tuple(Size(1024, 100, d) for d in (4, 8, 12, 16, 24, 32, 48, 64)),
}
QUICK_AXES = {
    "B": (Size(32, 4, 3), Size(64, 4, 3)),
    "J": (Size(32, 4, 3), Size(32, 8, 3)),
    "D": (Size(32, 4, 3), Size(32, 4, 6)),
}
# The smallest twice, for the time a pair just before and after the largest.
SMALL, LARGE = Size(4096, 100, 32), Size(65536, 10_000, 32)
MEASURED = {
    "vmm_fast": (Size(16384, 400, 32), Size(65536, 1600, 32), SMALL, LARGE, SMALL),
    "matmul": (Size(1024, 100, 32), SMALL, Size(8192, 200, 32)),
}
QUICK_MEASURED = {"vmm_fast": (Size(64, 4, 3), Size(128, 8, 3)), "matmul": (Size(64, 4, 3),)}
MODES = {FORWARD: forward_call, BACKWARD: gradient_call}
MAX_CALLS, SECONDS = 20, 2.0  # of which the memory is measured; no further call after so many


def rows(run: Run) -> Iterator[Row]:
    """Yield the sizes along each axis, which take turns, then the memory of one after the other."""
    for count in run.thread_counts:
        with threads(count):
            for axis, sizes in run.choose(AXES, QUICK_AXES).items():
                for row in _axis(run, sizes):
                    yield {"threads": count, "axis": axis, **row}
    for provider, sizes in run.choose(MEASURED, QUICK_MEASURED).items():
        for size in sizes:
            case = {"provider": provider, **size._asdict()}
            found = alone.run(peak_memory, threads=run.args.threads, **case)
            yield {"mode": MEMORY, **case, **found}


def _axis(run: Run, sizes: Sequence[Size]) -> Iterator[Row]:
    calls, errors, cases = {}, {}, {}
    for size in sizes:
        inputs = problems.whitened(size)
        truth = problems.reference_log_prob(inputs, lambda p: p)
        for mode, make in MODES.items():
            name = f"{mode} {tuple(size)}"
            calls[name] = make(providers.vmm_fast_whitened, inputs)
            errors[name] = problems.error(calls[name](), truth)
            cases[name] = {"mode": mode, "provider": "vmm_fast", **size._asdict()}
    for row in run.compare("", calls, errors, seconds=2.5 * len(sizes)):
        yield {**row, **cases[row["provider"]]}


def peak_memory(provider: str, B: int, J: int, D: int) -> dict[str, Any]:
    """Measure in this process the memory and the time of forward with backward.

    Returns
    -------
    dict
        ``peak_bytes``, the resident memory at its peak over that before the call (inputs included
        in both), and quantiles of the seconds that a call takes.
    """
    density = {"vmm_fast": providers.vmm_fast_whitened, "matmul": providers.matmul}[provider]
    gradient_call(density, problems.whitened(Size(256, 4, D)))()  # loads libraries
    call = gradient_call(density, problems.whitened(Size(B, J, D)))
    # Pages that are free but not given back would hide what the call takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = alone.resident_bytes("VmRSS")
    start = time.perf_counter()
    samples = [sampler(call)(1)]
    while len(samples) < MAX_CALLS and time.perf_counter() - start < SECONDS:
        samples.append(sampler(call)(1))
    return {"peak_bytes": alone.resident_bytes("VmHWM") - before, **quantiles(samples)}


def exponent(rows: Sequence[Row], axis: str, of: str = "p50") -> float:
    """Return the slope of log time against log of the axis."""
    x, y = (np.log([row[key] for row in rows]) for key in (axis, of))
    return float(np.polyfit(x, y, 1)[0])


# --- targets, tables, picture ---


def _lines(rows: Sequence[Row]) -> Iterator[tuple[int, str, str, list[Row]]]:
    """Yield threads, mode, axis and rows of every fit."""
    for count in sorted({row["threads"] for row in rows if "axis" in row}):
        for mode in MODES:
            for axis in ("B", "J", "D"):
                if line := select(rows, mode=mode, axis=axis, threads=count):
                    yield count, mode, axis, line


def checks(rows: Sequence[Row]) -> Iterator[Check]:
    """Yield memory and time of the largest size, and the exponents."""
    found = select(rows, mode=MEMORY, provider="vmm_fast")
    found.sort(key=lambda row: row["B"] * row["J"])
    if found:
        large, small = found[-1], select(found, B=found[0]["B"], J=found[0]["J"])
        peak = large["peak_bytes"] / 2**20
        target = "peak extra memory, forward + backward"
        yield Check(target, size_of(large), peak, 1024, False, " MiB")
        of_small = mean(row["p50"] for row in small) / (small[0]["B"] * small[0]["J"])
        ratio = large["p50"] / (large["B"] * large["J"]) / of_small
        yield Check(f"time a pair against {size_of(small[0])}", size_of(large), ratio, 1.3, False)
    for count, mode, axis, line in _lines(rows):
        case = f"in {axis}, {count} thread{'s' if count > 1 else ''}"
        limit = 2.1 if axis == "D" else 1.1  # a tenth of it for the noise of the fit
        yield Check(f"exponent of {mode}", case, exponent(line, axis), limit, False, "")


def tables(rows: Sequence[Row]) -> str:
    """Return fitted exponents, and memory."""
    fits: dict[tuple[str, str], list[str]] = {}
    for count, mode, axis, line in _lines(rows):
        fits.setdefault((mode, str(count)), []).append(f"{exponent(line, axis):.2f}")
    lines = ((*case, *found) for case, found in fits.items())
    exponents = table(("time of", "threads", "in B", "in J", "in D"), lines)
    lines = (
        (row["provider"], size_of(row), f"{row['peak_bytes'] / 2**20:.1f}", duration(row["p50"]))
        for row in select(rows, mode=MEMORY)
    )
    head = ("provider", "(B, J, D)", "peak extra memory, MiB", "forward + backward")
    return f"{exponents}\n{table(head, lines)}"


def plot(figure: Figure, rows: Sequence[Row]) -> None:
    """Draw time along each axis with its fitted exponent, and memory against B J."""
    figure.set_size_inches(15, 4.2)
    *axes, memory = figure.subplots(1, 4)
    for ax, axis in zip(axes, ("B", "J", "D"), strict=True):
        curves = {
            f"{mode}, {count} thread{'s' if count > 1 else ''}: "
            f"{axis}^{exponent(line, axis):.2f}": (
                [r[axis] for r in line],
                [r["p50"] for r in line],
            )
            for count, mode, of, line in _lines(rows)
            if of == axis
        }
        figures.lines(ax, curves)
        found = select(rows, axis=axis)
        at = sorted({row[axis] for row in found})
        ax.set_xticks(at, map(str, at))
        ax.set_xticks([], minor=True)
        others = ", ".join(f"{key} = {found[0][key]}" for key in "BJD" if key != axis)
        figures.bare(ax, f"Time against {axis} ({others})", axis, "seconds")
    curves = {}
    for provider in ("vmm_fast", "matmul"):
        line = sorted(select(rows, mode=MEMORY, provider=provider), key=lambda r: r["B"] * r["J"])
        peaks = [max(row["peak_bytes"], 4096) / 2**20 for row in line]
        curves[provider] = [row["B"] * row["J"] for row in line], peaks
    pairs = sorted({pair for x, _ in curves.values() for pair in x})
    curves["a [B, J] matrix"] = pairs, [4 * pair / 2**20 for pair in pairs]
    figures.lines(memory, curves)
    figures.limit(memory, 1024, "1 GiB")
    title = "Memory of forward + backward (D = 32)"
    figures.bare(memory, title, "B J", "peak extra memory, MiB")


MEASUREMENT = Measurement(
    "scaling",
    "exponents in B, J and D; memory",
    rows,
    checks=checks,
    introduction="Least-squares fits of log time along one axis, the other two held.",
    tables=tables,
    plot=plot,
)
