"""What a training step of the image VAE costs under each prior, next to the same VAE with N(0, I).

A step is that of ``vmm_fast.models.fit``: the variational step with Adam on the network, then the
prior's empirical-Bayes step. Priors take turns at every batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench import figures
from bench.eager_prior import EagerVMM
from bench.measurement import Check, Measurement, Run, ratios
from bench.records import Row, select
from bench.tables import duration, pivot
from vmm_fast import GaussianMixturePrior, StandardNormalPrior, VampPrior, VMMPrior
from vmm_fast.models import VAE
from vmm_fast.priors import Prior

NORMAL, GRADIENT, CLOSED_FORM = "N(0, I)", "VMM, gradient", "VMM, closed form"
GMM, VAMP, EAGER = "GMM", "VampPrior", "VMM, eager torch"
PRIORS = (NORMAL, GRADIENT, CLOSED_FORM, GMM, VAMP, EAGER)


class Plan(NamedTuple):
    """The network and its batches."""

    inputs: int
    hidden: tuple[int, ...]
    latent_dim: int
    components: int
    batches: tuple[int, ...]


FULL = Plan(784, (500, 500, 2000), 10, 100, (128, 256, 512, 1024))
QUICK = Plan(20, (16,), 3, 4, (16,))


def make_prior(name: str, plan: Plan, x: Tensor) -> Prior:
    """Return a prior; pseudo-inputs start at training images."""
    start, dim = x[: plan.components], plan.latent_dim
    if name == NORMAL:
        return StandardNormalPrior(dim)
    if name == VAMP:
        return VampPrior(start, dim)
    if name == GMM:
        return GaussianMixturePrior(plan.components, dim, data_size=len(x))
    if name == CLOSED_FORM:
        return VMMPrior(start, dim, data_size=len(x), inference="closed-form")
    prior = VMMPrior(start, dim, data_size=len(x))
    return EagerVMM(prior) if name == EAGER else prior


def make_step(name: str, plan: Plan, x: Tensor, batch_size: int) -> Callable[[], None]:
    """Return the call that trains one step on the next batch."""
    torch.manual_seed(0)
    model = VAE(plan.inputs, plan.latent_dim, make_prior(name, plan, x), hidden=plan.hidden)
    model.to(x.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, eps=1e-7, fused=True)
    batches = x.split(batch_size)
    steps = 0

    def step() -> None:
        nonlocal steps
        terms = model.elbo(batches[steps % len(batches)])
        steps += 1
        optimizer.zero_grad()
        (-terms.elbo.mean()).backward()
        optimizer.step()
        model.prior.update(terms.z.detach(), model.encode)

    return step


def rows(run: Run) -> Iterator[Row]:
    """Yield a row for each prior and batch size."""
    plan = run.choose(FULL, QUICK)
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(4 * max(plan.batches), plan.inputs, generator=generator) - 1
    for size in plan.batches:
        calls = {name: make_step(name, plan, x, size) for name in PRIORS}
        case = {"B": size, "J": plan.components, "D": plan.latent_dim}
        yield from run.compare("training step", calls, {}, repeats=10, seconds=30.0, **case)


def checks(rows: Sequence[Row]) -> Iterator[Check]:
    """Yield the time over that with N(0, I)."""
    reason = (
        "Matrix products of the encoder on the pseudo-inputs: J rows pass it forward and back "
        "beside the batch's in `kl`, and once more in `update`, which at J = 100 and B = 256 is a "
        "third of all products of the step with N(0, I). Next: fewer pseudo-inputs a step."
    )
    for provider in (GRADIENT, CLOSED_FORM):
        for row, ratio in ratios(rows, provider, NORMAL):
            if row["B"] >= 256:
                target = f"training step, {provider}, against N(0, I)"
                yield Check(target, f"B = {row['B']}", ratio, 1.10, False, reason=reason)


def _normal(rows: Sequence[Row]) -> dict[int, float]:
    return {row["B"]: row["p50"] for row in select(rows, provider=NORMAL)}


def tables(rows: Sequence[Row]) -> str:
    """Return the median of a training step and, in brackets, how many times N(0, I)'s that is."""
    normal = _normal(rows)

    def cell(row: Row) -> str:
        return f"{duration(row['p50'])} ({row['p50'] / normal[row['B']]:.2f}x)"

    return pivot(rows, ["B"], lambda row: (str(row["B"]),), cell)


def plot(figure: Figure, rows: Sequence[Row]) -> None:
    """Draw the time of a training step next to that under N(0, I)."""
    figure.set_size_inches(10, 4.2)
    ax, normal = figure.subplots(), _normal(rows)
    others = [row for row in rows if row["provider"] != NORMAL]
    figures.bars(
        ax,
        others,
        lambda row: row["p50"] / normal[row["B"]],
        lambda row: f"B = {row['B']}\n{NORMAL}: {duration(normal[row['B']])}",
        start=1.0,
    )
    figures.limit(ax, 1.10, "1.10")
    figures.bare(ax, f"Training step of the image VAE, time / that under {NORMAL}")


MEASUREMENT = Measurement(
    "step",
    "training steps of the image VAE under each prior",
    rows,
    checks=checks,
    introduction="784 inputs, hidden layers of 500, 500 and 2000, D = 10, 100 components; in "
    "brackets the time over that of N(0, I).",
    tables=tables,
    plot=plot,
)
