"""Share of the machine's own peak that each kernel reaches, and growth of time with B, J and D.

``bench/peak.py`` says what the peak is, and what operations count.

Time grows as B^b J^j D^d. Each exponent is a least-squares fit to logarithms along one axis, the
other two held; overheads of small problems make it smaller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from bench import figures, gpu, problems, providers
from bench.measurement import Check, Measurement, Run, exponent, size_of
from bench.peak import PEAK, QUICK_ROUNDS, ROUNDS, fma, operations
from bench.problems import Size
from bench.records import Row, select
from bench.tables import table
from bench.throughput import BACKWARD, FORWARD, forward_call, gradient_call
from bench.timing import threads
from vmm_fast import ops

SIZES = (Size(256, 100, 10), Size(4096, 100, 10), Size(256, 100, 30), Size(4096, 500, 30))
QUICK = (Size(64, 5, 3),)
AXES = {
    "B": tuple(Size(b, 100, 16) for b in (512, 1024, 2048, 4096, 8192, 16384)),
    "J": tuple(Size(1024, j, 16) for j in (50, 100, 200, 400, 800, 1600)),
    "D": tuple(Size(1024, 100, d) for d in (4, 8, 12, 16, 24, 32, 48, 64)),
}
QUICK_AXES = {axis: (Size(32, 4, 3), Size(32, 4, 3)._replace(**{axis: 64})) for axis in AXES}
GROWING = {FORWARD: forward_call, BACKWARD: gradient_call}


# --- rows ---


def rows(run: Run) -> Iterator[Row]:
    """Yield the kernels of each size with the peak, then the sizes along each axis; by threads."""
    for count in sorted({run.args.threads, 1}, reverse=True):
        with threads(count):
            for size in run.choose(SIZES, QUICK):
                yield from ({"threads": count, **row} for row in _kernel_rows(run, size, count))
            for axis, sizes in run.choose(AXES, QUICK_AXES).items():
                for row in _axis_rows(run, sizes):
                    yield {"threads": count, "axis": axis, **row}


def _kernel_rows(run: Run, size: Size, thread_count: int) -> Iterator[Row]:
    inputs = problems.whitened(size)
    with_weight = int((ops.mixture_responsibilities(*inputs) > 0).sum())
    multiply, multiplied = fma(thread_count, run.choose(ROUNDS, QUICK_ROUNDS))
    calls = gpu.kernels(inputs)
    errors = gpu.errors(inputs, calls)
    for row in run.compare("", {PEAK: multiply, **calls}, errors, repeats=10, seconds=4.0):
        kernel = row.pop("provider")
        provider = "machine" if kernel == PEAK else "vmm_fast"
        made = multiplied if kernel == PEAK else operations(kernel, size, with_weight)
        yield {**row, "mode": kernel, "provider": provider, **size._asdict(), "operations": made}


def _axis_rows(run: Run, sizes: Sequence[Size]) -> Iterator[Row]:
    calls, errors, cases = {}, {}, {}
    for size in sizes:
        inputs = problems.whitened(size)
        truth = problems.reference_log_prob(inputs)
        for mode, make in GROWING.items():
            name = f"{mode} {tuple(size)}"
            calls[name] = make(providers.vmm_fast_whitened, inputs)
            errors[name] = problems.error(calls[name](), truth)
            cases[name] = {"mode": mode, "provider": "vmm_fast", **size._asdict()}
    for row in run.compare("", calls, errors, seconds=2.5 * len(sizes)):
        yield {**row, **cases[row["provider"]]}


# --- targets, tables, picture ---

FORWARD_REASON = """\
At D = 10 a pair's 65 multiply-adds come with some 20 cycles a vector that are not counted: \
subtracting the center, the exponential, the maximum. The start of threads, packing and Python \
take a tenth of a call. Next: A z - A m for A (z - m) where centers are so near that it is as \
precise."""
BACKWARD_REASON = """\
As above; with 256 points the start of threads, packing and Python take half of a call. The best \
of a hundred calls on a shared machine reaches up to 1.8 times the median's rate, where the loop \
of the peak, which touches no memory, loses a tenth. Besides, at D = 10 the sums are over so few \
products that storing d, w d and the sums' lanes takes as long as they do. Next: a body for each \
small dimension that keeps d and y in registers, as the forward pass has."""
# % of the FMA peak, below 30 latent dimensions and from there on.
LIMITS = {
    "log_prob": (75.0, 75.0, FORWARD_REASON),
    "log_prob, backward": (50.0, 60.0, BACKWARD_REASON),
}


def rate(row: Row) -> float:
    """Return operations a second."""
    return row["operations"] / row["p50"]


def share(row: Row, rows: Sequence[Row]) -> float:
    """Return the percentage that a kernel reaches of the peak in the same turns."""
    (peak,) = select(rows, mode=PEAK, **{key: row[key] for key in ("threads", "B", "J", "D")})
    return 100 * rate(row) / rate(peak)


def fits(rows: Sequence[Row]) -> Iterator[tuple[str, str, str, list[Row], float]]:
    """Yield mode, threads in words, axis, rows and exponent of every fit."""
    lines: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        if "axis" in row:
            lines.setdefault((row["mode"], row["threads"], row["axis"]), []).append(row)
    for (mode, count, axis), line in lines.items():
        said = f"{count} thread{'s' * (count > 1)}"
        yield mode, said, axis, line, exponent(line, axis, "p50")


def checks(rows: Sequence[Row]) -> Iterator[Check]:
    """Yield shares of the peak with most threads, and the exponents."""
    for kernel, (few, many, reason) in LIMITS.items():
        found = select(rows, mode=kernel)
        most = max((row["threads"] for row in found), default=0)
        for row in select(found, threads=most):
            target, value = f"{kernel}: share of the FMA peak", share(row, rows)
            limit = many if row["D"] >= 30 else few
            yield Check(target, size_of(row), value, limit, unit=" %", reason=reason, bound=100.0)
    for mode, count, axis, _, value in fits(rows):
        limit = 2.1 if axis == "D" else 1.1  # a tenth of it for the noise of the fit
        yield Check(f"exponent of {mode}", f"in {axis}, {count}", value, limit, False, "")


def tables(rows: Sequence[Row]) -> str:
    """Return the operations a second of every kernel, with the share of the peak."""
    lines: dict[tuple[str, str], list[str]] = {}
    kernels = [row for row in rows if "operations" in row]
    for row in kernels:
        of_peak = "" if row["mode"] == PEAK else f" ({share(row, rows):.0f} %)"
        cells = lines.setdefault((str(row["threads"]), size_of(row)), [])
        cells.append(f"{rate(row) / 1e9:.0f}{of_peak}")
    head = ("threads", "(B, J, D)", *dict.fromkeys(row["mode"] for row in kernels))
    return table(head, ((*case, *cells) for case, cells in lines.items()))


def plot(figure: Figure, rows: Sequence[Row]) -> None:
    """Draw each kernel's share of the peak, and time along each axis."""
    figure.set_size_inches(15, 8)
    above, below = figure.subfigures(2, 1)
    counts = sorted({row["threads"] for row in rows})
    for ax, count in zip(above.subplots(1, len(counts), squeeze=False)[0], counts, strict=True):
        found = [r for r in select(rows, threads=count, provider="vmm_fast") if "operations" in r]
        named = [{**row, "provider": row["mode"]} for row in found]
        figures.bars(ax, named, lambda row: share(row, rows), size_of, "{:.0f}")
        figures.bare(ax, f"% of the FMA peak, float32, threads: {count}")
    axes = dict(zip(AXES, below.subplots(1, len(AXES)), strict=True))
    for mode, count, axis, line, value in fits(rows):
        x, y = ([row[key] for row in line] for key in (axis, "p50"))
        ax, others = axes[axis], ", ".join(f"{k} = {line[0][k]}" for k in AXES if k != axis)
        ax.loglog(x, y, "o-", ms=3.5, label=f"{mode}, {count}: {axis}^{value:.2f}")
        ax.set_xticks(x, map(str, x))
        ax.set_xticks([], minor=True)
        ax.legend(**figures.LEGEND)
        figures.bare(ax, f"Time against {axis} ({others})", axis, "seconds")


MEASUREMENT = Measurement(
    "limits",
    "kernels against the machine's own peak, and exponents in B, J and D",
    rows,
    checks=checks,
    introduction="GFLOP/s, and the share of the peak in the same turns; exponents are among the "
    "targets above. The tops of `bench/peak.py` and `bench/limits.py` say how both are found.",
    tables=tables,
    plot=plot,
)
