"""Speed of densities, gradients and empirical-Bayes steps, next to that of other packages.

Every provider's result is compared with float64 before it is timed, and providers take turns. The
memory is that of one forward with backward in a process that does nothing else, for Linux with
glibc.
"""

from __future__ import annotations

import importlib.metadata
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import geometric_mean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

from bench import alone, figures, problems, providers
from bench.eager_prior import EagerVMM
from bench.measurement import Check, Less, Measurement, Run, relative, size_of
from bench.peak import PEAK, QUICK_ROUNDS, ROUNDS, fma, operations
from bench.problems import Size
from bench.records import Row, select
from bench.tables import compared, duration, table
from bench.timing import quantiles, sampler
from vmm_fast import VMMPrior
from vmm_fast.mixture import Components, gaussian_parameters

FORWARD = "forward"
BACKWARD = "forward + backward"
PARAMETERS = "forward + backward from (m, S, L, pi)"
STEPS = {
    "gradient": "empirical-Bayes step, gradient",
    "closed-form": "empirical-Bayes step, closed form",
}
EM_STEP = "E- and M-step"
OVERHEAD, NOTHING = "call overhead", "empty autograd function"
MEMORY = "memory"
SHOWN = (FORWARD, BACKWARD, PARAMETERS, *STEPS.values(), EM_STEP)

DENSITY = (
    *(Size(256, 100, 10), Size(1024, 100, 10), Size(4096, 100, 10)),
    *(Size(256, 100, 30), Size(4096, 500, 30)),
)
STEP = (Size(256, 100, 10), Size(1024, 100, 10), Size(256, 100, 30))
EM, EM_FULL = Size(50_000, 500, 30), Size(1_000_000, 500, 30)  # of all, and of vmm_fast as well
LARGE = Size(65_536, 10_000, 32)
MEASURED = {
    "vmm_fast": (Size(4096, 100, 32), Size(65_536, 1600, 32), LARGE),
    "matmul": (Size(4096, 100, 32), Size(8192, 200, 32)),
}
QUICK, QUICK_EM, QUICK_EM_FULL = (Size(32, 5, 3),), Size(500, 4, 3), Size(2000, 4, 3)
QUICK_MEASURED = {"vmm_fast": (Size(2048, 100, 32),)}
MAX_CALLS, SECONDS = 20, 2.0  # of which the memory is measured; no further call after so many

VERSIONS = {"KeOps": "pykeops", "torchgmm": "torchgmm", "GaussianMixture": "scikit-learn"}
COLORS: dict[str, str] = {
    **{"matmul": "C1", "torch.compile": "C2", "KeOps": "C3", "torch.distributions": "C4"},
    **{"torch": "C1", "GaussianMixture": "C6", "torchgmm": "C9"},
}


def rows(run: Run) -> Iterator[Row]:
    """Yield a row for each mode, size and provider."""
    for row in _rows(run):
        if row["provider"] in VERSIONS:
            row["provider_version"] = importlib.metadata.version(VERSIONS[row["provider"]])
        yield row


def _rows(run: Run) -> Iterator[Row]:
    for mode in (FORWARD, BACKWARD, PARAMETERS):
        for size in run.choose(DENSITY, QUICK):
            yield from density_rows(run, mode, size)
    for inference in STEPS:
        for size in run.choose(STEP, QUICK):
            yield from step_rows(run, inference, size)
    yield from _em_rows(run)
    yield from _overhead_rows(run)
    multiply, multiplied = fma(run.args.threads, run.choose(ROUNDS, QUICK_ROUNDS))
    for row in run.compare(PEAK, {"machine": multiply}, repeats=20, seconds=1.0):
        yield {**row, "operations": multiplied}
    for provider, sizes in run.choose(MEASURED, QUICK_MEASURED).items():
        for size in sizes:
            case = {"provider": provider, **size._asdict()}
            found = alone.run(peak_memory, threads=run.args.threads, **case)
            yield {"mode": MEMORY, **case, **found}


# --- densities ---


def gradient_call(density: Callable[..., Tensor], inputs: Any) -> Callable[[], tuple]:
    """Return the call that computes a density and the gradients of its sum for all inputs."""
    leaves = type(inputs)(*(x.detach().requires_grad_() for x in inputs))
    upstream = torch.ones_like(inputs.z[:, 0])

    def call() -> tuple:
        out = density(leaves)
        return out, *torch.autograd.grad(out, leaves, upstream)

    return call


def forward_call(density: Callable[..., Tensor], inputs: Any) -> Callable[[], tuple]:
    """Return the call that computes a density alone."""

    def call() -> tuple:
        with torch.no_grad():
            return (density(inputs),)

    return call


def density_rows(run: Run, mode: str, size: Size, device: str = "cpu") -> Iterator[Row]:
    """Compare densities of a mixture that is built, or from its parameters."""
    if mode == PARAMETERS:
        inputs, whiten = problems.parameters(size), problems.whiten
        wanted = providers.PARAMETER_DENSITIES
    else:
        inputs, whiten = problems.whitened(size), lambda p: p
        wanted = providers.whitened_densities(run.args.quick)
    inputs = type(inputs)(*(x.to(device) for x in inputs))
    make = forward_call if mode == FORWARD else gradient_call
    calls = {name: make(density, inputs) for name, density in wanted.items()}
    truth = problems.reference_log_prob(inputs, whiten)
    yield from run.compare(mode, calls, truth=truth, **size._asdict())


class Nothing(torch.autograd.Function):
    """A function that does nothing."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        """Return the first argument."""
        ctx.save_for_backward(*inputs)
        return inputs[0][:, 0]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        """Return the arguments as their gradients."""
        return ctx.saved_tensors


def _overhead_rows(run: Run) -> Iterator[Row]:
    """Time forward with backward of the smallest problem there is, and of no problem."""
    size = Size(1, 1, 1)
    inputs = problems.whitened(size)
    call = gradient_call(providers.vmm_fast_whitened, inputs)
    truth = problems.reference_log_prob(inputs)
    # Together in one vector: a gradient of its own may well be zero.
    found, exact = (torch.cat([x.detach().flatten() for x in v]) for v in (call(), truth))
    errors = {"vmm_fast": problems.error([found], [exact])}
    calls = {
        "vmm_fast": call,
        NOTHING: gradient_call(lambda leaves: Nothing.apply(*leaves), inputs),
    }
    yield from run.compare(OVERHEAD, calls, errors, repeats=50, seconds=1.0, **size._asdict())


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
    before = alone.start_peak()
    start = time.perf_counter()
    samples = [sampler(call)(1)]
    while len(samples) < MAX_CALLS and time.perf_counter() - start < SECONDS:
        samples.append(sampler(call)(1))
    return {"peak_bytes": alone.resident_bytes("VmHWM") - before, **quantiles(samples)}


# --- the empirical-Bayes step ---


def step_rows(run: Run, inference: str, size: Size, device: str = "cpu") -> Iterator[Row]:
    """Compare ``VMMPrior.update`` with the same in eager torch, less what the encoder takes."""
    ours, encoder = vmm_prior(size, inference)
    ours, z = ours.to(device), problems.parameters(size).z.to(device)
    priors = {"vmm_fast": ours, "torch": EagerVMM(ours)}
    exact = step_values(EagerVMM(ours).double(), z.double(), encoder)
    errors = {
        name: problems.error(step_values(prior, z, encoder), exact)
        for name, prior in priors.items()
    }
    calls = {
        name: Less(partial(prior.update, z, encoder), partial(encode, encoder, prior.pseudo_inputs))
        for name, prior in priors.items()
    }
    yield from run.compare(STEPS[inference], calls, errors, **size._asdict())


def encode(encoder: Callable[[Tensor], Distribution], pseudo_inputs: Tensor) -> None:
    """Take pseudo-inputs through an encoder and gradients back, as a step does."""
    mean, scale = gaussian_parameters(encoder(pseudo_inputs))
    torch.autograd.grad((mean, scale), pseudo_inputs, (mean.detach(), scale.detach()))


def vmm_prior(size: Size, inference: str) -> tuple[VMMPrior, Callable[[Tensor], Distribution]]:
    """Return a prior whose pseudo-inputs are m and s themselves, and the encoder that reads them.

    The encoder costs next to nothing but makes the gradient reach the pseudo-inputs. Adam's steps
    are tiny: a prior that takes thousands of them while it is timed must stay what it was.
    """
    p = problems.parameters(size)
    pseudo_inputs = torch.cat([p.centers[..., None], p.scale], -1)

    def encoder(u: Tensor) -> Distribution:
        # A view would move along with the pseudo-inputs in the middle of a step.
        mean = u[..., 0].clone()
        return MultivariateNormal(mean, scale_tril=u[..., 1:].tril(), validate_args=False)

    options: dict[str, Any] = {"data_size": 60_000, "learning_rate": 1e-6, "statistics_rate": 0.1}
    prior = VMMPrior(pseudo_inputs, size.D, inference=inference, update_every=1, **options)
    return prior, encoder


def step_values(
    prior: VMMPrior | EagerVMM, z: Tensor, encoder: Callable[[Tensor], Distribution]
) -> tuple[Tensor, ...]:
    """Return the objective, the gradients that a step takes, and the parameters after it."""
    if isinstance(prior, VMMPrior):
        step = prior._step(z, encoder)
        loss, gradients = torch.as_tensor(step.loss), step.gradients
    else:
        loss = prior.map_loss(z, encoder)
        gradients = torch.autograd.grad(loss, prior.learnt)
    prior.update(z, encoder)
    after = (prior.raw_precision, prior.logits.softmax(-1), prior.raw_alpha)
    return tuple(x.detach().clone() for x in (loss, *gradients, *after))


# --- expectation maximisation over a data set ---


def _em_rows(run: Run) -> Iterator[Row]:
    """Compare E- and M-steps on what all can hold, and time vmm_fast's on the full data."""
    size = run.choose(EM, QUICK_EM)
    z, mixture = _em_problem(size)
    truth = providers.maximum_likelihood(z, mixture)
    calls, errors = {}, {}
    for name, make in providers.EM_STEPS.items():
        if providers.installed(name):
            step = make(z, mixture)
            step.call()
            calls[name], errors[name] = step.call, problems.error(step.values(), truth)
    yield from run.compare(EM_STEP, calls, errors, repeats=3, **size._asdict())
    # float64 would take minutes on the full data.
    size = run.choose(EM_FULL, QUICK_EM_FULL)
    calls = {"vmm_fast": providers.vmm_fast_em(*_em_problem(size)).call}
    yield from run.compare(EM_STEP, calls, repeats=3, seconds=0.0, **size._asdict())


def _em_problem(size: Size) -> tuple[Tensor, Components]:
    p = problems.parameters(size)
    return p.z, Components(p.centers, p.logits.log_softmax(-1), p.precision_cholesky)


# --- targets, tables, picture ---

FROM_PARAMETERS_REASON = """\
At B = 256 a third of the time at D = 10 is Python and autograd around four calls of the core; at \
D = 30 half of it is building the components and their gradients, in float64. Next: autograd \
functions in C++; float32 where the condition of a component allows it."""
BACKWARD_REASON = """\
At B = 256 the [B, J] matrices of the others stay in the cache, and at D = 30 theirs is one matrix \
product at the peak's rate; it does not subtract first and loses digits as centers move away from \
the origin. Next: y kept from the forward pass while it fits the cache, which saves a quarter of \
the operations."""
STEP_REASON = """\
At D = 10 half of the time is Python: gradients go on through the encoder by torch.autograd.grad, \
and checks and views are taken anew in each step. At D = 30 the float64 arithmetic on components \
counts as much as the points do. Next: views kept from step to step; float32 where the condition \
of a component allows it."""
EM_REASON = """\
Storing d, w d and the sums' lanes for every tile keeps the sums at half of the peak. Next: tiles \
by the size of the first-level cache."""
OVERHEAD_REASON = """\
More than half of it is a torch.autograd.Function that does nothing; the rest is checks and \
allocations. Next: a C++ autograd function."""


def least_seconds(row: Row, rows: Sequence[Row]) -> float:
    """Return the seconds that a density with its gradients takes at least, inf if not known.

    That is an empty autograd function, and each pair's multiply-adds at the machine's peak.
    """
    nothing, peak = select(rows, mode=OVERHEAD, provider=NOTHING), select(rows, mode=PEAK)
    if not (nothing and peak):
        return math.inf
    size = Size(row["B"], row["J"], row["D"])
    needed = operations("log_prob, backward", size, size.B * size.J)
    return nothing[0]["p50"] + needed * peak[0]["p50"] / peak[0]["operations"]


def checks(rows: Sequence[Row]) -> Iterator[Check]:
    """Yield what is asked of densities, steps, calls and memory."""
    others = [row for row in relative(rows, "vmm_fast") if row["provider"] != "vmm_fast"]
    target = "forward + backward from (m, S, L, pi) against torch.distributions"
    for row in select(others, mode=PARAMETERS, provider="torch.distributions"):
        limit = 25.0 if row["B"] * row["J"] >= 1_000_000 else 10.0
        yield Check(target, size_of(row), row["ratio"], limit, reason=FROM_PARAMETERS_REASON)
    target = "forward + backward from A against the best of the others"
    best: dict[str, Row] = {}
    for row in select(others, mode=BACKWARD):
        best[size_of(row)] = min(best.get(size_of(row), row), row, key=lambda row: row["ratio"])
    ratios = [row["ratio"] for row in best.values()]
    bounds = [bound for row in best.values() if (bound := row["p50"] / least_seconds(row, rows))]
    for row, bound in zip(best.values(), bounds or [None] * len(best), strict=True):
        case = size_of(row)
        yield Check(target, case, row["ratio"], 5.0, reason=BACKWARD_REASON, bound=bound)
    if best:
        value, bound = geometric_mean(ratios), geometric_mean(bounds) if bounds else None
        yield Check(target, "geometric mean", value, 8.0, reason=BACKWARD_REASON, bound=bound)
    for mode in STEPS.values():
        for row in select(others, mode=mode):
            target = f"{mode}, against eager torch"
            yield Check(target, size_of(row), row["ratio"], 7.0, reason=STEP_REASON)
    found = select(rows, mode=EM_STEP)
    full = max(select(found, provider="vmm_fast"), key=lambda row: row["B"], default={})
    for other in select(found, provider="GaussianMixture"):
        ratio = other["p50"] * full["B"] / other["B"] / full["p50"]
        target = "E- and M-step against scikit-learn's GaussianMixture"
        case = f"{size_of(full)}, scikit-learn at B = {other['B']} scaled linearly"
        yield Check(target, case, ratio, 10.0, reason=EM_REASON)
    bound = next((1e6 * row["p50"] for row in select(rows, mode=OVERHEAD, provider=NOTHING)), None)
    for row in select(rows, mode=OVERHEAD, provider="vmm_fast"):
        target, microseconds = "call overhead, forward + backward", 1e6 * row["p50"]
        yield Check(target, size_of(row), microseconds, 50.0, False, " us", OVERHEAD_REASON, bound)
    if found := select(rows, mode=MEMORY, provider="vmm_fast"):
        row = max(found, key=lambda row: row["B"] * row["J"])
        target, peak = "peak extra memory, forward + backward", row["peak_bytes"] / 2**20
        yield Check(target, size_of(row), peak, 1024, False, " MiB")


def tables(rows: Sequence[Row]) -> str:
    """Return each provider's median and, in brackets, how many times vmm_fast's that is."""
    text = ""
    for mode in (*SHOWN, OVERHEAD):
        found = relative(rows, "vmm_fast", mode=mode)
        shown = compared(found, ["(B, J, D)"], lambda row: (size_of(row),))
        text += f"{mode[0].upper()}{mode[1:]}:\n\n{shown}\n"
    lines = (
        (row["provider"], size_of(row), f"{row['peak_bytes'] / 2**20:.1f}", duration(row["p50"]))
        for row in select(rows, mode=MEMORY)
    )
    head = ("provider", "(B, J, D)", "peak extra memory, MiB", "forward + backward")
    return f"{text}Memory:\n\n{table(head, lines)}"


def plot(figure: Figure, rows: Sequence[Row]) -> None:
    """Draw how many times longer than vmm_fast each provider takes."""
    figure.set_size_inches(15, 7.5)
    for ax, mode in zip(figure.subplots(2, 3, sharey=True).flat, SHOWN, strict=True):
        found = relative(rows, "vmm_fast", mode=mode)
        others = [row for name in COLORS for row in select(found, provider=name)]
        figures.bars(ax, others, lambda r: r["ratio"], size_of, "{:.1f}", start=1.0, colors=COLORS)
        figures.bare(ax, f"{mode[0].upper()}{mode[1:]}")
        ax.tick_params(axis="x", labelsize=6.5)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}x")
    ax.set_ylim(1, 4 * ax.get_ylim()[1])  # with room for the legends
    figure.supylabel("time, over that of vmm_fast", fontsize=9)


MEASUREMENT = Measurement(
    "throughput",
    "densities, gradients, steps and memory against everybody else's",
    rows,
    checks=checks,
    introduction="Medians of interleaved repeats, float32; in brackets the time over vmm_fast's. "
    "Every result was compared with float64 before it was timed. Clusters overlap, so that the "
    "core can skip next to no pair of a point and a component.",
    tables=tables,
    plot=plot,
)
