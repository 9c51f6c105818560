"""How fast the log-likelihoods of counts are, next to scvi-tools' distributions.

Log-likelihoods are summed over a batch, with the gradients of mean, inverse dispersion and dropout
logits. Counts are drawn from the model itself, scaled to a share of counts above 0; before a case
is timed its results are compared with float64. "ZINB of a softmax" has the mean as scVI's decoder
makes it, a library size times a softmax, whose time counts: taken within the likelihood, or before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.measurement import SCVI, Check, Measurement, Run, relative
from bench.records import Row, select
from bench.tables import compared
from vmm_fast import counts, reference

OURS, THEIRS, SOFTMAX_BEFORE = "vmm_fast", "scvi-tools", "vmm_fast, softmax before"
MODE = "log-likelihood and gradients"
SIZES, QUICK = ((128, 2000), (512, 2000), (512, 10_000)), ((8, 30),)  # cells and genes
DENSITIES, QUICK_DENSITIES = (0.1, 0.27), (0.2,)  # shares of counts above 0
TOLERANCE = 1e-4  # of a sum over cells, relative


def _theirs(model: str, x: Tensor, *parameters: Tensor) -> Tensor:
    from scvi.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial

    if model == "Poisson":
        return Poisson(rate=parameters[0]).log_prob(x).sum(-1)
    kind = NegativeBinomial if model == "NB" else ZeroInflatedNegativeBinomial
    names = ("mu", "theta", "zi_logits")
    return kind(**dict(zip(names, parameters, strict=False))).log_prob(x).sum(-1)


MODELS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "ZINB": (counts.zinb_log_prob, 3),
    "NB": (counts.nb_log_prob, 2),
    "Poisson": (counts.poisson_log_prob, 1),
}


def problem(cells: int, genes: int, density: float) -> tuple[Tensor, ...]:
    """Return counts [B, G], mean [B, G], inverse dispersion [G] and dropout logits [B, G]."""
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
    return torch.where(kept, torch.poisson(drawn), 0), mean, theta, logits


def _call(function: Callable[..., Tensor], x: Tensor, parameters: list[Tensor]) -> tuple:
    total = function(x, *parameters).sum()
    return total, *torch.autograd.grad(total, parameters)


def _cases(
    mean: Tensor, theta: Tensor, dropout: Tensor
) -> Iterator[tuple[str, tuple[Tensor, ...], dict[str, Callable[..., Tensor]]]]:
    """Yield models, their parameters, and the providers' calls with counts and these."""
    every = (mean, theta, dropout)
    for model, (ours, number) in MODELS.items():
        yield model, every[:number], {OURS: ours, THEIRS: partial(_theirs, model)}
    library_size = mean.sum(-1)

    def within(x: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
        return counts.zinb_log_prob(x, counts.SoftmaxMean(logits, library_size), *rest)

    def before(then: Callable[..., Tensor], x: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
        return then(x, library_size[:, None] * logits.softmax(-1), *rest)

    calls: dict[str, Callable[..., Tensor]] = {
        OURS: within,
        SOFTMAX_BEFORE: partial(before, counts.zinb_log_prob),
        THEIRS: partial(before, partial(_theirs, "ZINB")),
    }
    yield "ZINB of a softmax", (mean.log(), theta, dropout), calls


def rows(run: Run) -> Iterator[Row]:
    """Yield a row for each model, size, density, mode and provider."""
    sizes, densities = run.choose((SIZES, DENSITIES), (QUICK, QUICK_DENSITIES))
    for (cells, genes), density in itertools.product(sizes, densities):
        x, *every = problem(cells, genes, density)
        case = {"B": cells, "genes": genes, "density": density}
        for model, given, providers in _cases(*every):
            parameters = [p.clone().requires_grad_() for p in given]
            doubles = (p.double() for p in every[: len(given)])
            exact = reference.count_log_prob(x.double(), *doubles).sum()
            calls = {name: partial(_call, call, x, parameters) for name, call in providers.items()}
            turns = {"tolerance": TOLERANCE, "repeats": 10, "seconds": 4.0}
            yield from run.compare(f"{model} {MODE}", calls, truth=[exact], **turns, **case)


def checks(rows: Sequence[Row]) -> Iterator[Check]:
    """Yield how many times as fast as scvi-tools' ZINB is."""
    mode = f"ZINB {MODE}"
    case = {"B": 512, "genes": 2000, "density": 0.1}
    for row in select(relative(rows, OURS, mode=mode), provider=THEIRS, **case):
        text = "512 cells, 2,000 genes, 10% above 0"
        yield Check(f"{mode}, against scvi-tools", text, row["ratio"], 8.0)


def tables(rows: Sequence[Row]) -> str:
    """Return times of log-likelihood and gradients, and those of others over ours."""

    def case(row: Row) -> tuple[str, ...]:
        model = row["mode"].removesuffix(MODE).strip()
        return model, f"({row['B']}, {row['genes']:,})", f"{row['density']:.0%}"

    return compared(relative(rows, OURS), ("model", "(B, G)", "above 0"), case)


MEASUREMENT = Measurement(
    "likelihood",
    "log-likelihoods of counts, next to scvi-tools'",
    rows,
    needs=SCVI,
    checks=checks,
    heading="Likelihood of counts",
    introduction="Log-likelihood and gradients of B cells with G genes; in brackets the time over "
    "vmm_fast's. *ZINB of a softmax* has the mean as scVI's decoder makes it, a library size times "
    "a softmax, whose time counts: within the likelihood, or before it.",
    tables=tables,
)
