"""How fast densities, gradients and empirical-Bayes steps are, next to everybody else's.

Every provider's result is compared with float64 before it is timed, and providers take turns.
Clusters overlap, but for two modes that say otherwise (``bench/problems.py`` tells why there are
two kinds); ``share_with_weight`` is the share of pairs of a point and a component whose
responsibility is above 0 in float32.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import geometric_mean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.autograd.profiler import profile
from torch.distributions import Distribution, MultivariateNormal

from bench import figures, problems, providers
from bench.eager_prior import EagerVMM
from bench.measurement import OPTIONS, Check, Less, Measurement, Run, ratios, size_of
from bench.problems import Size, Whitened
from bench.records import Row, select
from bench.tables import duration, pivot, table
from vmm_fast import VMMPrior, reference
from vmm_fast.mixture import Components, gaussian_parameters

FORWARD = "forward"
BACKWARD = "forward + backward"
PARAMETERS = "forward + backward from (m, S, L, pi)"
GRADIENT_STEP = "empirical-Bayes step, gradient"
CLOSED_FORM_STEP = "empirical-Bayes step, closed form"
EM_STEP = "E- and M-step"
COMPONENTS = "building the components, forward + backward"
BACKWARD_FAR_APART = f"{BACKWARD}, clusters far apart"
EM_STEP_FAR_APART = f"{EM_STEP}, clusters far apart"
OVERHEAD = "call overhead"
OPERATORS = "torch operators"
SHOWN = (
    *(FORWARD, BACKWARD, BACKWARD_FAR_APART, PARAMETERS, COMPONENTS),
    *(GRADIENT_STEP, CLOSED_FORM_STEP, EM_STEP, EM_STEP_FAR_APART),
)

DENSITY = (
    *(Size(256, 100, 10), Size(1024, 100, 10), Size(4096, 100, 10)),
    *(Size(256, 100, 30), Size(4096, 500, 30)),
)
FAR_APART = DENSITY[3:]
STEP = (Size(256, 100, 10), Size(1024, 100, 10), Size(256, 100, 30))
BUILT = (Size(0, 100, 10), Size(0, 100, 30))
EM, EM_FULL = Size(50_000, 500, 30), Size(1_000_000, 500, 30)  # of all, and of vmm_fast as well
QUICK = (Size(32, 5, 3),)
QUICK_BUILT, QUICK_EM, QUICK_EM_FULL = (Size(0, 5, 3),), Size(500, 4, 3), Size(2000, 4, 3)

TFP = "TensorFlow Probability"
SLOW_TO_START = ("torch.compile", "KeOps")
VERSIONS = {
    "KeOps": "pykeops",
    "torchgmm": "torchgmm",
    "GaussianMixture": "scikit-learn",
    "BayesianGaussianMixture": "scikit-learn",
}
COLORS: dict[str, str] = {
    **{"matmul": "C1", "torch.compile": "C2", "KeOps": "C3", "torch.distributions": "C4"},
    **{TFP: "C5", "torch": "C1"},
    **{"GaussianMixture": "C6", "BayesianGaussianMixture": "C8", "torchgmm": "C9"},
}


def rows(run: Run) -> Iterator[Row]:
    """Yield a row for each measurement."""
    if folder := run.args.make_tfp_environment:
        providers.make_tfp_environment(folder)
        return
    for part in (whitened, from_parameters, components, empirical_bayes, em, overhead, operators):
        for row in part(run):
            if row["provider"] in VERSIONS and "p50" in row:
                row["provider_version"] = importlib.metadata.version(VERSIONS[row["provider"]])
            yield row


def _absent(mode: str, names: Iterable[str], why: str) -> Iterator[Row]:
    for name in names:
        yield {"mode": mode, "provider": name, "absent": why}


def share_with_weight(p: Whitened, transpose: bool = False) -> float:
    """Return the share of the pairs of a point and a component whose responsibility is above 0."""
    return problems.pairs_with_weight(p, transpose) / (len(p.z) * len(p.centers))


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


def whitened(run: Run) -> Iterator[Row]:
    """Yield forward, and forward with backward, of a mixture that is built."""
    for mode, sizes in ((FORWARD, DENSITY), (BACKWARD, DENSITY), (BACKWARD_FAR_APART, FAR_APART)):
        wanted = providers.whitened_densities()
        if run.args.quick:
            yield from _absent(mode, SLOW_TO_START, "left out by --quick")
            wanted = {k: v for k, v in wanted.items() if k not in SLOW_TO_START}
        elif "KeOps" not in wanted:
            yield from _absent(mode, ["KeOps"], "not installed")
        make = forward_call if mode == FORWARD else gradient_call
        for size in run.choose(sizes, QUICK):
            inputs = problems.whitened(size, far_apart=mode == BACKWARD_FAR_APART)
            truth = problems.reference_log_prob(inputs, lambda p: p)
            calls = {name: make(density, inputs) for name, density in wanted.items()}
            share = {"share_with_weight": share_with_weight(inputs)}
            yield from run.compare(mode, calls, truth=truth, **size._asdict(), **share)


def from_parameters(run: Run) -> Iterator[Row]:
    """Yield forward with backward from the mixture's parameters."""
    environment = run.args.tfp_environment
    if environment is None:
        yield from _absent(PARAMETERS, [TFP], "not installed")
    for size in run.choose(DENSITY, QUICK):
        inputs = problems.parameters(size)
        truth = problems.reference_log_prob(inputs, problems.whiten)
        share = {"share_with_weight": share_with_weight(problems.whitened(size))}
        densities = providers.PARAMETER_DENSITIES.items()
        calls: dict[str, Any] = {name: gradient_call(f, inputs) for name, f in densities}
        errors, versions = {}, {}
        with ExitStack() as stack:
            if environment is not None:
                worker = providers.TFPWorker(environment, inputs, run.args.threads)
                stack.callback(worker.close)
                calls[TFP], versions[TFP] = worker, {"provider_version": worker.versions}
                errors[TFP] = problems.error(worker.outputs, truth)
            case = {"truth": truth, **size._asdict(), **share}
            for row in run.compare(PARAMETERS, calls, errors, **case):
                yield {**row, **versions.get(row["provider"], {})}


def components(run: Run) -> Iterator[Row]:
    """Yield A and c from (L, s, log pi), with the gradients of all three."""
    for size in run.choose(BUILT, QUICK_BUILT):
        p = problems.parameters(size)
        inputs = (p.logits.log_softmax(-1), p.precision_cholesky, p.scale)
        exact = building(reference.whitened_components, [x.double() for x in inputs])
        truth = [x.detach() for x in exact()]
        calls = {
            name: building(build, inputs) for name, build in providers.COMPONENT_BUILDERS.items()
        }
        yield from run.compare(COMPONENTS, calls, truth=truth, **size._asdict())


def building(
    build: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> Callable[[], tuple]:
    """Return the call that builds the components and takes the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    count = len(inputs[0])
    upstream = [torch.ones_like(x) for x in build(*leaves, count)]

    def call() -> tuple:
        built = build(*leaves, count)
        return *built, *torch.autograd.grad(built, leaves, upstream)

    return call


# --- the empirical-Bayes step ---


def empirical_bayes(run: Run) -> Iterator[Row]:
    """Yield ``VMMPrior.update`` and the same in eager torch, less what the encoder takes."""
    for inference, mode in (("gradient", GRADIENT_STEP), ("closed-form", CLOSED_FORM_STEP)):
        for size in run.choose(STEP, QUICK):
            ours, encoder = vmm_prior(size, inference)
            priors = {"vmm_fast": ours, "torch": EagerVMM(ours)}
            z = problems.parameters(size).z
            exact = step_values(EagerVMM(ours).double(), z.double(), encoder)
            errors = {
                name: problems.error(step_values(prior, z, encoder), exact)
                for name, prior in priors.items()
            }
            calls = {
                name: Less(
                    partial(prior.update, z, encoder), partial(encode, encoder, prior.pseudo_inputs)
                )
                for name, prior in priors.items()
            }
            yield from run.compare(mode, calls, errors, **size._asdict())


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
    return VMMPrior(pseudo_inputs, size.D, inference=inference, **options), encoder


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


def em(run: Run) -> Iterator[Row]:
    """Yield E- and M-steps on what all can hold, and of vmm_fast also on the full data."""
    absent = [name for name in providers.EM_STEPS if not providers.installed(name)]
    yield from _absent(EM_STEP, absent, "not installed")
    names = [name for name in providers.EM_STEPS if name not in absent]
    found = list(_em(run, EM_STEP, names))
    yield from found
    # float64 would take minutes on the full data: its error is that on the part.
    (ours,) = select(found, provider="vmm_fast")
    size = run.choose(EM_FULL, QUICK_EM_FULL)
    z, mixture = _em_problem(size)
    calls = {"vmm_fast": providers.vmm_fast_em(z, mixture).call}
    case = {**size._asdict(), "share_with_weight": _em_share(z, mixture)}
    yield from run.compare(
        EM_STEP, calls, {"vmm_fast": ours["error"]}, repeats=3, seconds=0.0, **case
    )
    yield from _em(run, EM_STEP_FAR_APART, ["vmm_fast", "GaussianMixture"])


def _em(run: Run, mode: str, names: Iterable[str]) -> Iterator[Row]:
    size = run.choose(EM, QUICK_EM)
    z, mixture = _em_problem(size, far_apart=mode == EM_STEP_FAR_APART)
    truth = providers.maximum_likelihood(z, mixture)
    calls, errors = {}, {}
    for name in names:
        step = providers.EM_STEPS[name](z, mixture)
        step.call()
        calls[name] = step.call
        errors[name] = problems.error(
            step.values(), truth if step.expected is None else step.expected()
        )
    case = {**size._asdict(), "share_with_weight": _em_share(z, mixture)}
    yield from run.compare(mode, calls, errors, repeats=3, **case)


def _em_problem(size: Size, *, far_apart: bool = False) -> tuple[Tensor, Components]:
    p = problems.parameters(size, far_apart=far_apart)
    return p.z, Components(p.centers, p.logits.log_softmax(-1), p.precision_cholesky)


def _em_share(z: Tensor, mixture: Components) -> float:
    return share_with_weight(Whitened(z, *mixture.expected[:3]), transpose=True)


# --- what a call costs beside its arithmetic ---


def overhead(run: Run) -> Iterator[Row]:
    """Yield forward with backward of the smallest problem there is."""
    size = Size(1, 1, 1)
    inputs = problems.whitened(size)
    call = gradient_call(providers.vmm_fast_whitened, inputs)
    truth = problems.reference_log_prob(inputs, lambda p: p)
    # Together in one vector: a gradient of its own may well be zero.
    found, exact = (torch.cat([x.detach().flatten() for x in v]) for v in (call(), truth))
    errors = {"vmm_fast": problems.error([found], [exact])}
    calls = {"vmm_fast": call}
    yield from run.compare(OVERHEAD, calls, errors, repeats=50, seconds=1.0, **size._asdict())


def operators(run: Run) -> Iterator[Row]:
    """Count the torch operators of ``prior.kl``, its backward and ``prior.update``."""
    size = run.choose(Size(256, 100, 10), Size(16, 4, 3))
    p = problems.parameters(size)
    identity = torch.eye(size.D).expand(size.B, -1, -1)
    q = MultivariateNormal(p.z, scale_tril=identity, validate_args=False)
    at_pseudo_inputs = MultivariateNormal(
        p.centers.requires_grad_(), scale_tril=p.scale.requires_grad_(), validate_args=False
    )
    z = p.z.clone().requires_grad_()
    for inference in ("gradient", "closed-form"):
        prior = VMMPrior(torch.zeros(size.J, 1), size.D, inference=inference)
        kl = partial(prior.kl, q, lambda _: at_pseudo_inputs, z=z)
        update = partial(prior.update, p.z, lambda _: at_pseudo_inputs)
        for call in (kl, update):  # the first of each also makes what is kept
            call()
        backward = partial(kl().backward, torch.ones(size.B))
        calls = {"prior.kl": kl, "backward of prior.kl": backward, "prior.update": update}
        for name, call in calls.items():
            nested, top_level = count_operators(call)
            counted = {"operators": nested, "operators_top_level": top_level}
            case = {"provider": "vmm_fast", **size._asdict(), "inference": inference, "call": name}
            yield {"mode": OPERATORS, **case, **counted}


# Kineto, under the profiler, would write a line at every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def count_operators(call: Callable[[], object]) -> tuple[int, int]:
    """Return the number of torch operators of a call, with those that they call and without."""
    with profile() as profiler:
        call()
    events = [e for e in profiler.function_events if e.name.startswith("aten::")]

    def nested(event: Any) -> bool:
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith("aten::"):
            parent = parent.cpu_parent
        return parent is not None

    return len(events), sum(not nested(event) for event in events)


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


def checks(rows: Sequence[Row]) -> Iterator[Check]:
    """Yield what is asked of densities, steps and calls."""
    target = "forward + backward from (m, S, L, pi) against torch.distributions"
    for row, ratio in ratios(rows, "vmm_fast", "torch.distributions", mode=PARAMETERS):
        limit = 25.0 if row["B"] * row["J"] >= 1_000_000 else 10.0
        yield Check(target, size_of(row), 1 / ratio, limit, reason=FROM_PARAMETERS_REASON)
    target = "forward + backward from A against the best of the others"
    best: dict[str, float] = {}
    for provider in ("matmul", "torch.compile", "KeOps"):
        for row, ratio in ratios(rows, "vmm_fast", provider, mode=BACKWARD):
            best[size_of(row)] = max(best.get(size_of(row), 0.0), ratio)
    for case, ratio in best.items():
        yield Check(target, case, 1 / ratio, 5.0, reason=BACKWARD_REASON)
    if best:
        mean = 1 / geometric_mean(best.values())
        yield Check(target, "geometric mean", mean, 10.0, reason=BACKWARD_REASON)
    for mode in (GRADIENT_STEP, CLOSED_FORM_STEP):
        for row, ratio in ratios(rows, "vmm_fast", "torch", mode=mode):
            target = f"{mode}, against eager torch"
            yield Check(target, size_of(row), 1 / ratio, 10.0, reason=STEP_REASON)
    found = select(rows, mode=EM_STEP)
    full = max(select(found, provider="vmm_fast"), key=lambda row: row["B"], default={})
    for other in select(found, provider="GaussianMixture"):
        ratio = other["p50"] * full["B"] / other["B"] / full["p50"]
        target = "E- and M-step against scikit-learn's GaussianMixture"
        case = f"{size_of(full)}, scikit-learn at B = {other['B']} scaled linearly"
        yield Check(target, case, ratio, 10.0, reason=EM_REASON)
    for row in select(rows, mode=OVERHEAD):
        target, microseconds = "call overhead, forward + backward", 1e6 * row["p50"]
        yield Check(target, size_of(row), microseconds, 55.0, False, " us", OVERHEAD_REASON)
    for row in select(rows, mode=OPERATORS):
        if row["call"] in ("prior.kl", "prior.update"):
            case = f"{size_of(row)}, {row['inference']}; {row['operators_top_level']} at the top"
            yield Check(f"torch operators of {row['call']}", case, row["operators"], 15, False, "")


def _others(rows: Sequence[Row]) -> list[str]:
    return sorted({row["provider"] for row in rows} - {"vmm_fast"}, key=list(COLORS).index)


def tables(rows: Sequence[Row]) -> str:
    """Return each provider's median and, in brackets, how many times vmm_fast's that is."""
    text = ""
    for mode in (*SHOWN, OVERHEAD):
        found = select(rows, mode=mode)
        timed = [row for row in found if "p50" in row]
        ours = {size_of(row): row["p50"] for row in select(timed, provider="vmm_fast")}
        share = {size_of(row): row.get("share_with_weight") for row in timed}

        def case(row: Row, share: dict = share) -> tuple[str, ...]:
            of = share[size_of(row)]
            return size_of(row), "-" if of is None else f"{100 * of:.0f} %"

        def cell(row: Row, ours: dict = ours) -> str:
            ratio = row["p50"] / ours[size_of(row)]
            return duration(row["p50"]) + f" ({ratio:.3g}x)" * (row["provider"] != "vmm_fast")

        names = ("vmm_fast", *_others(found))
        absent = {row["provider"]: row["absent"] for row in found if "absent" in row}
        shown = pivot(timed, ("(B, J, D)", "pairs with weight"), case, cell, names, absent)
        text += f"{mode[0].upper()}{mode[1:]}:\n\n{shown}\n"
    lines = (
        (row["inference"], row["call"], str(row["operators"]), str(row["operators_top_level"]))
        for row in select(rows, mode=OPERATORS)
    )
    head = ("inference", "call", "torch operators", "of these not called by another")
    return f"{text}Torch operators, encoder excluded:\n\n{table(head, lines)}"


def plot(figure: Figure, rows: Sequence[Row]) -> None:
    """Draw how many times longer than vmm_fast everybody takes."""
    figure.set_size_inches(15, 11)
    for ax, mode in zip(figure.subplots(3, 3, sharey=True).flat, SHOWN, strict=True):
        found = [row for row in select(rows, mode=mode) if "p50" in row]
        ours = {size_of(row): row["p50"] for row in select(found, provider="vmm_fast")}
        others = [row for name in _others(found) for row in select(found, provider=name)]

        def ratio(row: Row, ours: dict = ours) -> float:
            return row["p50"] / ours[size_of(row)]

        figures.bars(ax, others, ratio, size_of, "{:.1f}", start=1.0, colors=COLORS)
        figures.bare(ax, f"{mode[0].upper()}{mode[1:]}")
        ax.tick_params(axis="x", labelsize=6.5)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}x")
    ax.set_ylim(1, 4 * ax.get_ylim()[1])  # with room for the legends
    figure.supylabel("time, over that of vmm_fast", fontsize=9)


MEASUREMENT = Measurement(
    "throughput",
    "densities, gradients and steps against everybody else's",
    rows,
    options={
        **OPTIONS,
        "--tfp-environment": {"metavar": "FOLDER", "help": "with TensorFlow Probability, if any"},
        "--make-tfp-environment": {"metavar": "FOLDER", "help": "make it, measure nothing"},
    },
    checks=checks,
    introduction="Medians of interleaved repeats, float32; in brackets the time over vmm_fast's. "
    "Every result was compared with float64 before it was timed. Pairs of a point and a component "
    "have a weight where the responsibility is above 0 in float32; the core skips sums over the "
    "others, which are few unless clusters lie far apart.",
    tables=tables,
    plot=plot,
)
