"""How fast the log-likelihoods of counts are, next to scvi-tools' distributions.

Forward, and forward with the gradients of mean, inverse dispersion and dropout logits, summed over
a batch. Counts are drawn from the model itself, scaled to a share of counts above 0; before a case
is timed its results are compared with float64. "ZINB of a softmax" has the mean as scVI's decoder
makes it, a library size times a softmax, whose time counts: taken within the likelihood, or before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.records import Row
from bench.timing import sampler, take_turns, threads
from vmm_fast import counts, reference

OURS, THEIRS, SOFTMAX_BEFORE = "vmm_fast", "scvi-tools", "vmm_fast, softmax before"
FORWARD, BACKWARD = "log-likelihood", "log-likelihood and gradients"
TOLERANCE = 1e-4  # of a sum over cells, relative


class Plan(NamedTuple):
    """Sizes, shares of counts above 0, and how long providers take turns."""

    sizes: tuple[tuple[int, int], ...]  # cells, genes
    densities: tuple[float, ...]
    repeats: int
    seconds: float


FULL = Plan(((128, 2000), (512, 2000), (512, 10_000)), (0.1, 0.27), 10, 4.0)
QUICK = Plan(((8, 30),), (0.2,), 2, 0.0)


def _theirs(model: str, x: Tensor, *parameters: Tensor) -> Tensor:
    from scvi.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial

    names = ("mu", "theta", "zi_logits")
    if model == "Poisson":
        return Poisson(rate=parameters[0]).log_prob(x).sum(-1)
    kind = NegativeBinomial if model == "NB" else ZeroInflatedNegativeBinomial
    return kind(**dict(zip(names, parameters, strict=False))).log_prob(x).sum(-1)


MODELS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "ZINB": (counts.zinb_log_prob, 3),
    "NB": (counts.nb_log_prob, 2),
    "Poisson": (counts.poisson_log_prob, 1),
}
ZINB_OF_SOFTMAX = "ZINB of a softmax"


def problem(cells: int, genes: int, density: float) -> tuple[Tensor, ...]:
    """Counts [B, G], mean [B, G], inverse dispersion [G] and dropout logits [B, G]."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shape = (1.5 * normal(genes) + 0.3 * normal(cells, genes)).exp()
    theta, logits = (0.5 * normal(genes)).exp(), normal(cells, genes) - 1
    kept, kinds = torch.rand(2, cells, genes, generator=generator)
    kept = kept > logits.sigmoid()
    low, high = 1e-6, 1e6
    while high / low > 1.01:  # the share of counts above 0 grows with the mean
        scale = (low * high) ** 0.5
        above = ((theta / (theta + scale * shape)) ** theta < kinds) & kept
        low, high = (scale, high) if above.float().mean() < density else (low, scale)
    mean = scale * shape
    torch.manual_seed(0)
    drawn = torch.distributions.Gamma(theta.expand_as(mean), theta / mean).sample()
    x = torch.where(kept, torch.poisson(drawn), 0)
    return x, mean, theta, logits


def _call(function: Callable[..., Tensor], x: Tensor, parameters: list[Tensor], mode: str) -> Any:
    if mode == FORWARD:
        with torch.no_grad():
            return function(x, *parameters).sum()
    total = function(x, *parameters).sum()
    return total, torch.autograd.grad(total, parameters)


def _cases(
    mean: Tensor, theta: Tensor, dropout: Tensor
) -> Iterator[tuple[str, tuple[Tensor, ...], dict[str, Callable[..., Tensor]]]]:
    """Models, their parameters, and the providers' calls with counts and these."""
    every = (mean, theta, dropout)
    for model, (ours, number) in MODELS.items():
        yield model, every[:number], {OURS: ours, THEIRS: partial(_theirs, model)}
    library_size = mean.sum(-1)

    def within(x: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
        return counts.zinb_log_prob(x, counts.SoftmaxMean(logits, library_size), *rest)

    def before(x: Tensor, logits: Tensor, *rest: Tensor, then: Callable[..., Tensor]) -> Tensor:
        return then(x, library_size[:, None] * logits.softmax(-1), *rest)

    calls: dict[str, Callable[..., Tensor]] = {
        OURS: within,
        SOFTMAX_BEFORE: partial(before, then=counts.zinb_log_prob),
        THEIRS: partial(before, then=partial(_theirs, "ZINB")),
    }
    yield ZINB_OF_SOFTMAX, (mean.log(), theta, dropout), calls


def rows(plan: Plan, thread_count: int) -> Iterator[Row]:
    """A row for each model, size, density, mode and provider."""
    for (cells, genes), density in ((s, d) for s in plan.sizes for d in plan.densities):
        x, *every = problem(cells, genes, density)
        for model, given, calls in _cases(*every):
            parameters = [p.clone().requires_grad_() for p in given]
            doubles = (p.double() for p in every[: len(given)])
            exact = float(reference.count_log_prob(x.double(), *doubles).sum())
            for name, call in calls.items():
                found = float(_call(call, x, parameters, FORWARD))
                if abs(found - exact) > TOLERANCE * abs(exact):
                    raise ValueError(f"{name} gives {found} for {model}, not {exact}")
            for mode in (FORWARD, BACKWARD):
                samplers = {
                    name: sampler(partial(_call, call, x, parameters, mode))
                    for name, call in calls.items()
                }
                with threads(thread_count):
                    timings = take_turns(samplers, repeats=plan.repeats, seconds=plan.seconds)
                for name, timing in timings.items():
                    yield {
                        "part": "likelihood",
                        "dtype": "float32",
                        "threads": thread_count,
                        "mode": f"{model} {mode}",
                        "provider": name,
                        "B": cells,
                        "genes": genes,
                        "density": density,
                        "times as fast": round(timings[THEIRS]["p50"] / timing["p50"], 2),
                        **timing,
                    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options that no other part has: none."""


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Rows for the command line's options; none where scvi-tools is not installed."""
    try:
        import scvi  # noqa: F401
    except ImportError:
        print('likelihood is left out: pip install "vmm-fast[scvi]"')
        return
    yield from rows(QUICK if args.quick else FULL, args.threads)
