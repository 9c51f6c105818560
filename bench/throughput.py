"""How fast densities, gradients and empirical-Bayes steps are, next to everybody else's.

Every provider's result is compared with float64 before it is timed, and providers take turns.
Clusters overlap, but for two modes that say otherwise (``bench/problems.py`` tells why there are
two kinds); ``share_with_weight`` is the share of pairs of a point and a component whose
responsibility is above 0 in float32.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.profiler import profile
from torch.distributions import Distribution, MultivariateNormal

from bench import problems, providers
from bench.eager_prior import EagerVMM
from bench.problems import Size, Whitened
from bench.records import Row, select
from bench.timing import Sampler, sampler, take_turns, threads
from vmm_fast import VMMPrior, ops, reference
from vmm_fast.mixture import Components, gaussian_parameters

TOLERANCE = 1e-3  # of a float32 result against float64; who is further off is wrong

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


class Plan(NamedTuple):
    """Sizes of a run, and how long each case takes turns."""

    density: tuple[Size, ...]
    far_apart: tuple[Size, ...]  # of these, with clusters far apart as well
    step: tuple[Size, ...]
    components: tuple[Size, ...]  # without points
    em: Size  # what all providers run
    em_full: Size  # what vmm_fast runs as well
    operators: Size
    repeats: int
    seconds: float
    em_repeats: int
    slow_to_start: bool  # whether providers that compile for seconds take part


FULL = Plan(
    density=(
        Size(256, 100, 10),
        Size(1024, 100, 10),
        Size(4096, 100, 10),
        Size(256, 100, 30),
        Size(4096, 500, 30),
    ),
    far_apart=(Size(256, 100, 30), Size(4096, 500, 30)),
    step=(Size(256, 100, 10), Size(1024, 100, 10), Size(256, 100, 30)),
    components=(Size(0, 100, 10), Size(0, 100, 30)),
    em=Size(50_000, 500, 30),
    em_full=Size(1_000_000, 500, 30),
    operators=Size(256, 100, 10),
    repeats=5,
    seconds=5.0,
    em_repeats=3,
    slow_to_start=True,
)
QUICK = Plan(
    density=(Size(32, 5, 3),),
    far_apart=(Size(32, 5, 3),),
    step=(Size(32, 5, 3),),
    components=(Size(0, 5, 3),),
    em=Size(500, 4, 3),
    em_full=Size(2000, 4, 3),
    operators=Size(16, 4, 3),
    repeats=3,
    seconds=0.0,
    em_repeats=3,
    slow_to_start=False,
)
SLOW_TO_START = ("torch.compile", "KeOps")

VERSIONS = {
    "KeOps": "pykeops",
    "torchgmm": "torchgmm",
    "GaussianMixture": "scikit-learn",
    "BayesianGaussianMixture": "scikit-learn",
}


def rows(plan: Plan, thread_count: int, tfp_environment: str | None) -> Iterator[Row]:
    """Measure everything; a row each."""
    with threads(thread_count):
        for part in (
            whitened(plan),
            from_parameters(plan, thread_count, tfp_environment),
            components(plan),
            empirical_bayes(plan),
            em(plan),
            overhead(plan),
            operators(plan),
        ):
            for row in part:
                yield {"part": "throughput", "dtype": "float32", "threads": thread_count, **row}


def _rows(
    mode: str,
    size: Size,
    samplers: Mapping[str, Sampler],
    errors: Mapping[str, float],
    repeats: int,
    seconds: float,
) -> Iterator[Row]:
    for provider, error in errors.items():
        if not error < TOLERANCE:
            raise RuntimeError(f"{provider}, {mode}, {tuple(size)}: error {error:.2g} in float32")
    for provider, timing in take_turns(samplers, repeats=repeats, seconds=seconds).items():
        row: Row = {"mode": mode, "provider": provider, **size._asdict()}
        if provider in VERSIONS:
            row["provider_version"] = importlib.metadata.version(VERSIONS[provider])
        yield {**row, **timing, "error": errors[provider]}


def _absent(mode: str, names: Iterable[str], why: str) -> Iterator[Row]:
    for name in names:
        yield {"mode": mode, "provider": name, "absent": why}


def share_with_weight(p: Whitened, transpose: bool = False) -> float:
    """Share of the pairs of a point and a component whose responsibility is above 0."""
    return problems.pairs_with_weight(p, transpose) / (len(p.z) * len(p.centers))


def gradient_call(density: Callable[..., Tensor], inputs: Any) -> Callable[[], tuple]:
    """Give the call that computes a density and the gradients of its sum for all inputs."""
    leaves = type(inputs)(*(x.detach().requires_grad_() for x in inputs))
    upstream = torch.ones_like(inputs.z[:, 0])

    def call() -> tuple:
        out = density(leaves)
        return out, *torch.autograd.grad(out, leaves, upstream)

    return call


def _without_graph(call: Callable[..., Tensor], inputs: Any) -> Callable[[], Tensor]:
    def without_graph() -> Tensor:
        with torch.no_grad():
            return call(inputs)

    return without_graph


def whitened(plan: Plan) -> Iterator[Row]:
    """Forward, and forward with backward, of a mixture that is built."""
    for mode, sizes in (
        (FORWARD, plan.density),
        (BACKWARD, plan.density),
        (BACKWARD_FAR_APART, plan.far_apart),
    ):
        wanted = providers.whitened_densities()
        if not plan.slow_to_start:
            yield from _absent(mode, SLOW_TO_START, "left out by --quick")
            wanted = {k: v for k, v in wanted.items() if k not in SLOW_TO_START}
        elif "KeOps" not in wanted:
            yield from _absent(mode, ["KeOps"], "not installed")
        for size in sizes:
            inputs = problems.whitened(size, far_apart=mode == BACKWARD_FAR_APART)
            truth = problems.reference_log_prob(inputs, lambda p: p)
            calls: dict[str, Callable[[], Any]] = {}
            errors = {}
            for name, density in wanted.items():
                if mode == FORWARD:
                    calls[name] = _without_graph(density, inputs)
                    errors[name] = problems.error([calls[name]()], truth[:1])
                else:
                    calls[name] = gradient_call(density, inputs)
                    errors[name] = problems.error(calls[name](), truth)
            samplers = {name: sampler(call) for name, call in calls.items()}
            share = share_with_weight(inputs)
            for row in _rows(mode, size, samplers, errors, plan.repeats, plan.seconds):
                yield {**row, "share_with_weight": share}


def from_parameters(plan: Plan, thread_count: int, tfp_environment: str | None) -> Iterator[Row]:
    """Forward with backward from the mixture's parameters."""
    name = "TensorFlow Probability"
    if tfp_environment is None:
        yield from _absent(PARAMETERS, [name], "not installed")
    for size in plan.density:
        inputs = problems.parameters(size)
        truth = problems.reference_log_prob(inputs, problems.whiten)
        share = share_with_weight(problems.whitened(size))
        samplers, errors = {}, {}
        for provider, density in providers.PARAMETER_DENSITIES.items():
            call = gradient_call(density, inputs)
            errors[provider] = problems.error(call(), truth)
            samplers[provider] = sampler(call)
        with ExitStack() as stack:
            versions = None
            if tfp_environment is not None:
                worker = stack.enter_context(
                    providers.tfp_worker(tfp_environment, inputs, thread_count)
                )
                errors[name] = problems.error(worker.outputs, truth)
                samplers[name], versions = worker.sample, worker.versions
            for row in _rows(PARAMETERS, size, samplers, errors, plan.repeats, plan.seconds):
                if row["provider"] == name:
                    row["provider_version"] = versions
                yield {**row, "share_with_weight": share}


def components(plan: Plan) -> Iterator[Row]:
    """A and c from (L, s, log pi), and the gradients of all three."""
    for size in plan.components:
        p = problems.parameters(size)
        inputs = (p.logits.log_softmax(-1), p.precision_cholesky, p.scale)
        exact = building(reference.whitened_components, [x.double() for x in inputs])
        truth = [x.detach() for x in exact()]
        calls = {
            name: building(build, inputs) for name, build in providers.COMPONENT_BUILDERS.items()
        }
        errors = {name: problems.error(call(), truth) for name, call in calls.items()}
        samplers = {name: sampler(call) for name, call in calls.items()}
        yield from _rows(COMPONENTS, size, samplers, errors, plan.repeats, plan.seconds)


def building(
    build: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> Callable[[], tuple]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    count = len(inputs[0])
    upstream = [torch.ones_like(x) for x in build(*leaves, count)]

    def call() -> tuple:
        built = build(*leaves, count)
        return *built, *torch.autograd.grad(built, leaves, upstream)

    return call


# --- the empirical-Bayes step ---


def empirical_bayes(plan: Plan) -> Iterator[Row]:
    """``VMMPrior.update`` against the same maths in eager torch, less what the encoder takes."""
    for inference, mode in (("gradient", GRADIENT_STEP), ("closed-form", CLOSED_FORM_STEP)):
        for size in plan.step:
            ours, encoder = vmm_prior(size, inference)
            priors = {"vmm_fast": ours, "torch": EagerVMM(ours)}
            z = problems.parameters(size).z
            exact = step_values(EagerVMM(ours).double(), z.double(), encoder)
            errors = {
                name: problems.error(step_values(prior, z, encoder), exact)
                for name, prior in priors.items()
            }
            samplers = {
                name: less(
                    sampler(partial(prior.update, z, encoder)),
                    sampler(partial(encode, encoder, prior.pseudo_inputs)),
                )
                for name, prior in priors.items()
            }
            yield from _rows(mode, size, samplers, errors, plan.repeats, plan.seconds)


def less(whole: Sampler, part: Sampler) -> Sampler:
    """Time what a call takes beside a part of it, which is timed right after it.

    A disturbed turn may make the part longer than the whole: a tenth of the whole is the least that
    counts as left.
    """

    def sample(calls: int) -> float:
        seconds = whole(calls)
        return max(seconds - part(calls), 0.1 * seconds)

    return sample


def encode(encoder: Callable[[Tensor], Distribution], pseudo_inputs: Tensor) -> None:
    """Take pseudo-inputs through an encoder and gradients back, as a step does."""
    mean, scale = gaussian_parameters(encoder(pseudo_inputs))
    torch.autograd.grad((mean, scale), pseudo_inputs, (mean.detach(), scale.detach()))


def vmm_prior(size: Size, inference: str) -> tuple[VMMPrior, Callable[[Tensor], Distribution]]:
    """Give a prior whose pseudo-inputs are m and s themselves, and the encoder that reads them.

    The encoder costs next to nothing but makes the gradient reach the pseudo-inputs. Adam's steps
    are tiny: a prior that takes thousands of them while it is timed must stay what it was.
    """
    p = problems.parameters(size)
    pseudo_inputs = torch.cat([p.centers[..., None], p.scale], -1)

    def encoder(u: Tensor) -> Distribution:
        # A view would move along with the pseudo-inputs in the middle of a step.
        mean = u[..., 0].clone()
        return MultivariateNormal(mean, scale_tril=u[..., 1:].tril(), validate_args=False)

    prior = VMMPrior(
        pseudo_inputs,
        size.D,
        inference=inference,
        data_size=60_000,
        learning_rate=1e-6,
        statistics_rate=0.1,
    )
    return prior, encoder


def step_values(
    prior: VMMPrior | EagerVMM, z: Tensor, encoder: Callable[[Tensor], Distribution]
) -> tuple[Tensor, ...]:
    """The objective, the gradients that a step takes, and the parameters after it."""
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


def em(plan: Plan) -> Iterator[Row]:
    """E- and M-step; vmm_fast also on the full data, the others on what they can hold."""
    absent = [name for name in providers.EM_STEPS if not providers.installed(name)]
    yield from _absent(EM_STEP, absent, "not installed")
    found = list(_em(EM_STEP, [name for name in providers.EM_STEPS if name not in absent], plan))
    yield from found
    # float64 would take minutes on the full data: its error is that on the part.
    (ours,) = select(found, provider="vmm_fast")
    z, mixture = _em_problem(plan.em_full)
    full = {"vmm_fast": sampler(providers.vmm_fast_em(z, mixture).call)}
    errors = {"vmm_fast": ours["error"]}
    share = _em_share(z, mixture)
    for row in _rows(EM_STEP, plan.em_full, full, errors, plan.em_repeats, 0.0):
        yield {**row, "share_with_weight": share}
    yield from _em(EM_STEP_FAR_APART, ["vmm_fast", "GaussianMixture"], plan)


def _em(mode: str, names: Iterable[str], plan: Plan) -> Iterator[Row]:
    z, mixture = _em_problem(plan.em, far_apart=mode == EM_STEP_FAR_APART)
    truth = providers.maximum_likelihood(z, mixture)
    samplers, errors = {}, {}
    for name in names:
        step = providers.EM_STEPS[name](z, mixture)
        step.call()
        expected = truth if step.expected is None else step.expected()
        errors[name] = problems.error(step.values(), expected)
        samplers[name] = sampler(step.call)
    share = _em_share(z, mixture)
    for row in _rows(mode, plan.em, samplers, errors, plan.em_repeats, plan.seconds):
        yield {**row, "share_with_weight": share}


def _em_problem(size: Size, *, far_apart: bool = False) -> tuple[Tensor, Components]:
    p = problems.parameters(size, far_apart=far_apart)
    return p.z, Components(p.centers, p.logits.log_softmax(-1), p.precision_cholesky)


def _em_share(z: Tensor, mixture: Components) -> float:
    return share_with_weight(Whitened(z, *mixture.expected[:3]), transpose=True)


# --- what a call costs beside its arithmetic ---


def overhead(plan: Plan) -> Iterator[Row]:
    """Forward with backward of the smallest problem there is."""
    size = Size(1, 1, 1)
    inputs = problems.whitened(size)
    call = gradient_call(lambda p: ops.mixture_log_prob(*p)[0], inputs)
    truth = problems.reference_log_prob(inputs, lambda p: p)
    # Together in one vector: a gradient of its own may well be zero.
    error = problems.error([_joined(call())], [_joined(truth)])
    samplers, errors = {"vmm_fast": sampler(call)}, {"vmm_fast": error}
    yield from _rows(OVERHEAD, size, samplers, errors, 10 * plan.repeats, min(plan.seconds, 1.0))


def _joined(values: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in values])


def operators(plan: Plan) -> Iterator[Row]:
    """Count the torch operators of ``prior.kl``, its backward and ``prior.update``."""
    size = plan.operators
    p = problems.parameters(size)
    identity = torch.eye(size.D).expand(size.B, -1, -1)
    q = MultivariateNormal(p.z, scale_tril=identity, validate_args=False)
    at_pseudo_inputs = MultivariateNormal(
        p.centers.requires_grad_(), scale_tril=p.scale.requires_grad_(), validate_args=False
    )
    z = p.z.clone().requires_grad_()
    upstream = torch.ones(size.B)
    for inference in ("gradient", "closed-form"):
        prior = VMMPrior(torch.zeros(size.J, 1), size.D, inference=inference)
        kl = partial(prior.kl, q, lambda _: at_pseudo_inputs, z=z)
        update = partial(prior.update, p.z, lambda _: at_pseudo_inputs)
        for call in (kl, update):  # the first of each also makes what is kept
            call()
        calls = {
            "prior.kl": kl,
            "backward of prior.kl": partial(kl().backward, upstream),
            "prior.update": update,
        }
        for name, call in calls.items():
            nested, top_level = count_operators(call)
            yield {
                "mode": OPERATORS,
                "provider": "vmm_fast",
                **size._asdict(),
                "inference": inference,
                "call": name,
                "operators": nested,
                "operators_top_level": top_level,
            }


# Kineto, under the profiler, would write a line at every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def count_operators(call: Callable[[], object]) -> tuple[int, int]:
    """Torch operators of a call: with those that operators call in turn, and without."""
    with profile() as profiler:
        call()
    events = [e for e in profiler.function_events if e.name.startswith("aten::")]

    def nested(event: Any) -> bool:
        parent = event.cpu_parent
        while parent is not None:
            if parent.name.startswith("aten::"):
                return True
            parent = parent.cpu_parent
        return False

    return len(events), sum(not nested(event) for event in events)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options that no other part has."""
    parser.add_argument(
        "--tfp-environment",
        metavar="FOLDER",
        help="virtual environment with TensorFlow Probability; without it that provider is absent",
    )
    parser.add_argument(
        "--make-tfp-environment", metavar="FOLDER", help="make it there, measure nothing"
    )


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Rows for the command line's options."""
    plan = QUICK if args.quick else FULL
    return rows(plan, args.threads, args.tfp_environment)
