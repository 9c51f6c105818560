"""Densities under samples' aggregated posteriors, which differential abundance compares.

    q(z) = 1/J sum_j N(z; mu_j, diag sigma_j^2)

of the J cells of a sample at B points, in batches of 128 as ``differential_abundance`` asks for
them. scvi-tools' mixture is built as its ``VAEMixin.get_aggregated_posterior`` builds it. Each
runs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal

from bench import alone
from bench.measurement import SCVI, Check, Measurement, Run, relative, size_of
from bench.records import Row, select
from bench.tables import duration, table
from bench.timing import quantiles, sampler

OURS, STOCK = "vmm_fast", "scvi-tools"
DIM, BATCH, REPEATS = 10, 128, 3


class Plan(NamedTuple):
    """Points, cells of the samples, and the most cells for scvi-tools."""

    points: int
    cells: tuple[int, ...]
    most: int


FULL = Plan(1_024, (10_000, 100_000, 1_000_000), 10_000)
QUICK = Plan(256, (1_000, 10_000, 20_000), 1_000)


def posterior(provider: str, means: Tensor, scales: Tensor) -> Distribution:
    """Return the mixture of normal distributions."""
    if provider == STOCK:
        weights = Categorical(logits=torch.ones(len(means)))
        return MixtureSameFamily(weights, Independent(Normal(means, scales), 1))
    from vmm_fast.scvi.abundance import AggregatedPosterior

    return AggregatedPosterior(means, scales)


@torch.inference_mode()
def density(provider: str, cells: int, points: int) -> dict[str, Any]:
    """Return log-densities, their time and the peak of memory over that of the inputs."""
    random = torch.Generator().manual_seed(0)
    means, z = (torch.randn(n, DIM, generator=random) for n in (cells, points))
    scales = torch.empty(cells, DIM).uniform_(0.1, 0.4, generator=random)

    def call(count: int = cells) -> Tensor:
        q = posterior(provider, means[:count], scales[:count])
        return torch.cat([q.log_prob(batch) for batch in z.split(BATCH)])

    call(256)  # loads libraries
    before = alone.start_peak()
    samples = [sampler(call)(1) for _ in range(REPEATS)]
    peak = alone.resident_bytes("VmHWM") - before
    return {"log_prob": call().tolist(), "peak_bytes": peak, **quantiles(samples)}


def rows(run: Run) -> Iterator[Row]:
    """Yield a row for each number of cells and provider."""
    plan = run.choose(FULL, QUICK)
    for cells in plan.cells:
        case = {"mode": "density", "B": plan.points, "J": cells, "D": DIM}
        found: dict[str, np.ndarray] = {}
        for provider in (STOCK, OURS) if cells <= plan.most else (OURS,):
            threads = run.args.threads
            row = alone.run(
                density, threads=threads, provider=provider, cells=cells, points=plan.points
            )
            found[provider] = np.array(row.pop("log_prob"))
            if len(found) == 2:
                difference = np.abs(found[OURS] / found[STOCK] - 1).max()
                row["difference"] = float(difference)
            yield {"provider": provider, **case, **row}


def checks(rows: Sequence[Row]) -> Iterator[Check]:
    """Yield time and differences against scvi-tools, and memory for the most cells."""
    for row in select(relative(rows, OURS), provider=STOCK):
        case = size_of(row)
        yield Check(f"aggregated posterior against {STOCK}", case, row["ratio"], 10.0)
        (ours,) = select(rows, provider=OURS, J=row["J"])
        target = f"aggregated posterior, largest relative difference from {STOCK}"
        yield Check(target, case, ours["difference"], 1e-4, at_least=False, unit="")
    largest = max(select(rows, provider=OURS), key=lambda row: row["J"])
    case = f"{largest['J']:,} cells"
    memory = largest["peak_bytes"] / 2**20
    target = "memory of the aggregated posterior over its inputs"
    yield Check(target, case, memory, 32.0, at_least=False, unit=" MiB")


def tables(rows: Sequence[Row]) -> str:
    """Return a line for each number of cells and provider."""
    lines = []
    for row in rows:
        (base,) = select(rows, provider=OURS, J=row["J"])
        ratio = f" ({row['p50'] / base['p50']:.3g}x)" * (row is not base)
        difference = f"{row['difference']:.1e}" if "difference" in row else ""
        memory = f"{row['peak_bytes'] / 2**20:,.0f} MiB"
        time = duration(row["p50"]) + ratio
        lines.append((f"{row['J']:,}", row["provider"], time, memory, difference))
    head = ("cells", "", "time", "peak memory over inputs", "largest relative difference")
    return table(head, lines)


MEASUREMENT = Measurement(
    "abundance",
    "differential abundance: densities under samples' aggregated posteriors",
    rows,
    needs=SCVI,
    checks=checks,
    heading="Differential abundance",
    introduction=f"Log-densities of {FULL.points:,} points in {DIM} dimensions under the "
    f"posteriors of a sample's cells, in batches of {BATCH} points; J counts cells. "
    "vmm_fast's memory differs by some MiB from run to run, with what the allocator keeps.",
    tables=tables,
)
