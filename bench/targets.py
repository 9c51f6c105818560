"""What vmm_fast must reach, as ratios of rows of one run: the figure, the limit, and the verdict.

A target whose rows are not there gives no check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import geometric_mean, mean
from typing import NamedTuple

from bench import likelihood, out_of_core, processes, roofline, scaling, scvi_step, step, throughput
from bench.records import Row, select


class Check(NamedTuple):
    """One figure next to its limit."""

    target: str
    case: str
    value: float
    limit: float
    at_least: bool
    unit: str

    @property
    def met(self) -> bool:
        """Whether the figure is on the right side of its limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def measured(self) -> str:
        """The figure with its unit."""
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
    number = f"{value:.0f}" if abs(value) >= 99.5 else f"{value:.3g}"
    return number + unit


def _size(row: Row) -> str:
    return f"({row['B']}, {row['J']}, {row['D']})"


def _others(rows: Sequence[Row], row: Row, provider: str) -> list[Row]:
    """Another provider's rows of the same case."""
    same = {key: row.get(key) for key in ("part", "mode", "threads", "dtype", "B", "J", "D")}
    return select(rows, **same, provider=provider)


def _speedup(rows: Sequence[Row], mode: str, provider: str) -> Iterator[tuple[Row, float]]:
    for row in select(rows, part="throughput", mode=mode, provider="vmm_fast"):
        for other in _others(rows, row, provider):
            yield row, other["p50"] / row["p50"]


def fraction_of_peak(row: Row, rows: Sequence[Row]) -> float:
    """Operations a second over those of the machine's multiply-adds in the same turns."""
    (peak,) = select(
        rows,
        part="roofline",
        mode=roofline.PEAK,
        **{key: row[key] for key in ("threads", "dtype", "B", "J", "D")},
    )
    return row["operations"] / row["p50"] / (peak["operations"] / peak["p50"])


def _peak(rows: Sequence[Row]) -> Iterator[Check]:
    for kernel, limit in ((roofline.LOG_PROB, 75.0), (roofline.LOG_PROB_BACKWARD, 55.0)):
        found = select(rows, part="roofline", mode=kernel)
        most = max((row["threads"] for row in found), default=0)
        for row in select(found, threads=most):
            if row["B"] > 256 or len(found) == 1:
                value = 100 * fraction_of_peak(row, rows)
                target = f"{kernel}: share of the FMA peak"
                yield Check(target, _size(row), value, limit, True, " %")


def _torch_distributions(rows: Sequence[Row]) -> Iterator[Check]:
    for row, value in _speedup(rows, throughput.PARAMETERS, "torch.distributions"):
        limit = 25.0 if row["B"] * row["J"] >= 1_000_000 else 10.0
        yield Check(
            "forward + backward from (m, S, L, pi) against torch.distributions",
            _size(row),
            value,
            limit,
            True,
            "x",
        )


def _best_other(rows: Sequence[Row]) -> Iterator[Check]:
    target = "forward + backward from A against the best of the others"
    values = []
    for row in select(rows, part="throughput", mode=throughput.BACKWARD, provider="vmm_fast"):
        others = [
            other["p50"]
            for provider in ("matmul", "torch.compile", "KeOps")
            for other in _others(rows, row, provider)
        ]
        if others:
            values.append(min(others) / row["p50"])
            yield Check(target, _size(row), values[-1], 5.0, True, "x")
    if values:
        yield Check(target, "geometric mean", geometric_mean(values), 10.0, True, "x")


def _empirical_bayes(rows: Sequence[Row]) -> Iterator[Check]:
    for mode in (throughput.GRADIENT_STEP, throughput.CLOSED_FORM_STEP):
        for row, value in _speedup(rows, mode, "torch"):
            yield Check(f"{mode}, against eager torch", _size(row), value, 10.0, True, "x")


def _training_step(rows: Sequence[Row]) -> Iterator[Check]:
    for provider in (step.GRADIENT, step.CLOSED_FORM):
        for row in select(rows, part="step", provider=provider):
            (normal,) = _others(rows, row, step.NORMAL)
            if row["B"] >= 256:
                value = row["p50"] / normal["p50"]
                target = f"training step, {provider}, against N(0, I)"
                yield Check(target, f"B = {row['B']}", value, 1.10, False, "x")


def _likelihood(rows: Sequence[Row]) -> Iterator[Check]:
    case = {"B": 512, "genes": 2000, "density": 0.1, "provider": likelihood.OURS}
    mode = f"ZINB {likelihood.BACKWARD}"
    for row in select(rows, part="likelihood", mode=mode, **case):
        shown = f"512 cells, 2,000 genes, {row['density']:.0%} above 0"
        yield Check(f"{mode}, against scvi-tools", shown, row["times as fast"], 8.0, True, "x")


def _scvi_step(rows: Sequence[Row]) -> Iterator[Check]:
    for size, limit in ((128, 0.75), (512, 0.45)):
        for row in select(rows, part="scvi-step", mode=scvi_step.MODE, provider="VMM", B=size):
            target = f"scVI training step, VMM, against {scvi_step.STOCK}"
            yield Check(target, f"B = {size}", row["times stock"], limit, False, "x")


def _atlas(rows: Sequence[Row]) -> Iterator[Check]:
    found = select(rows, part="atlas")
    for size, limit in ((128, 0.75), (512, 0.45)):
        for row in select(found, mode=out_of_core.EPOCH, provider=out_of_core.VMM, B=size):
            target = "scVI training epoch in memory, VMM, against SCVI"
            yield Check(target, f"B = {size}", row["times stock"], limit, False, "x")
    whole = {row["cells"]: row for row in select(found, mode=out_of_core.INTEGRATE)}
    if whole:
        cells = max(whole)
        case, peak = f"{cells:,} cells", whole[cells]["peak_bytes"]
        target = "memory of vmm-fast integrate from disk"
        yield Check(target, case, peak / 2**30, 3.0, False, " GiB")
        few = out_of_core.COMPARED_CELLS
        if few in whole and cells > few:
            ratio = peak / whole[few]["peak_bytes"]
            yield Check(f"{target}, against {few:,} cells", case, ratio, 1.10, False, "x")
    for row in select(found, mode=out_of_core.LOADER, provider=out_of_core.VMM):
        for training in select(found, mode=out_of_core.TRAINING, cells=row["cells"]):
            ratio = row["cells/s"] / training["cells/s"]
            target = "loader from disk, against training"
            yield Check(target, f"{row['cells']:,} cells", ratio, 2.0, True, "x")
    for row in select(found, mode=out_of_core.RESUME):
        case = f"{row['cells']:,} cells, killed {row['kills']} times"
        target = "parameters of a run that was killed, against one left alone"
        yield Check(target, case, row["difference"], 0.0, False, "")


def _memory(rows: Sequence[Row]) -> Iterator[Check]:
    found = select(rows, part="scaling", mode=scaling.MEMORY, provider="vmm_fast")
    if not found:
        return
    found.sort(key=lambda row: row["B"] * row["J"])
    large = found[-1]
    small = select(found, B=found[0]["B"], J=found[0]["J"])
    peak = large["peak_bytes"] / 2**20
    yield Check("peak extra memory, forward + backward", _size(large), peak, 1024, False, " MiB")
    of_small = mean(row["p50"] for row in small) / (small[0]["B"] * small[0]["J"])
    value = large["p50"] / (large["B"] * large["J"]) / of_small
    yield Check(f"time a pair against {_size(small[0])}", _size(large), value, 1.3, False, "x")


def _statistics(rows: Sequence[Row]) -> Iterator[Check]:
    found = select(rows, part="throughput", mode=throughput.EM_STEP)
    full = max(select(found, provider="vmm_fast"), key=lambda row: row["B"], default=None)
    for other in select(found, provider="GaussianMixture"):
        assert full is not None
        value = other["p50"] * full["B"] / other["B"] / full["p50"]
        target = "E- and M-step against scikit-learn's GaussianMixture"
        case = f"{_size(full)}, scikit-learn at B = {other['B']} scaled linearly"
        yield Check(target, case, value, 10.0, True, "x")


def _overhead(rows: Sequence[Row]) -> Iterator[Check]:
    for row in select(rows, part="throughput", mode=throughput.OVERHEAD):
        target = "call overhead, forward + backward"
        yield Check(target, _size(row), 1e6 * row["p50"], 55.0, False, " us")


def _operators(rows: Sequence[Row]) -> Iterator[Check]:
    for row in select(rows, part="throughput", mode=throughput.OPERATORS):
        if row["call"] in ("prior.kl", "prior.update"):
            target = f"torch operators of {row['call']}"
            case = f"{_size(row)}, {row['inference']}; {row['operators_top_level']} at the top"
            yield Check(target, case, row["operators"], 15.0, False, "")


def _processes(rows: Sequence[Row]) -> Iterator[Check]:
    for row in select(rows, part="processes", mode=processes.MODE):
        if row["provider"] != processes.ONE:
            target = f"{row['mode']}, {row['provider']} against one"
            yield Check(target, f"B = {row['B']}", row["times as fast"], 1.0, True, "x")


def _growth(rows: Sequence[Row]) -> Iterator[Check]:
    found = select(rows, part="scaling")
    for thread_count in sorted({row["threads"] for row in found if "axis" in row}):
        for mode in (scaling.FORWARD, scaling.BACKWARD):
            for axis, limit in (("B", 1.0), ("J", 1.0), ("D", 2.0)):
                line = select(found, mode=mode, axis=axis, threads=thread_count)
                case = f"in {axis}, {thread_count} thread{'s' if thread_count > 1 else ''}"
                # A tenth for the noise of the fit.
                value = scaling.exponent(line, axis)
                yield Check(f"exponent of {mode}", case, value, limit + 0.1, False, "")


TARGETS: tuple[Callable[[Sequence[Row]], Iterator[Check]], ...] = (
    _peak,
    _torch_distributions,
    _best_other,
    _empirical_bayes,
    _training_step,
    _likelihood,
    _scvi_step,
    _atlas,
    _processes,
    _memory,
    _statistics,
    _overhead,
    _operators,
    _growth,
)


def checks(rows: Sequence[Row]) -> list[Check]:
    """Every target that these rows have figures for."""
    return [check for target in TARGETS for check in target(rows)]
