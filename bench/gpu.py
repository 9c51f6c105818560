"""The kernels on a GPU: right, how fast next to everybody else's, and how near its limits.

``python -m bench gpu`` measures, on the current CUDA or ROCm device and in this order

- errors of every operation against float64, which must be below 1e-3;
- forward with backward from A, and from (m, S, L, pi), against torch.distributions, the matmul form
  in eager torch and compiled, and KeOps where it is installed, in turns;
- what the prior adds to a training step, in turns with the same in eager torch, with errors against
  float64 and the number of launches: ``prior.kl`` with its backward, from the stored parameters;
  building the components with the backward of that; the empirical-Bayes step by gradient and in
  closed form, the private Adam included, the encoder not;
- every kernel against the bound of ``bench/gpu_bound.py``, with the rates of the device's own
  matrix products and copies, measured in the same run;
- a training step of the image VAE under each prior;
- peak memory of forward with backward.

A time is that of the host from a synchronised start to a synchronised end: launches count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.distributions import Independent, MultivariateNormal, Normal
from torch.profiler import ProfilerActivity, profile

from bench import gpu_bound, problems, providers, roofline, step, throughput
from bench.eager_prior import EagerVMM
from bench.measurement import OPTIONS, TOLERANCE, Measurement, Run, less
from bench.problems import Size
from bench.records import Row
from bench.timing import Sampler, take_turns
from vmm_fast import VMMPrior, reference

SIZES = (*throughput.DENSITY, Size(65_536, 1000, 32), Size(1_048_576, 10_000, 32))
DEVICE = "cuda"  # torch's name of AMD's as well
LARGE = 5 * 10**7  # pairs from which only what needs no [B, J] matrix takes part
REFERENCE = 10**8  # numbers of a [B, J, D] array that the reference may make
KL = "prior.kl, forward + backward"
MEMORY = Size(65_536, 10_000, 32)
QUICK_SIZES = (Size(32, 5, 3),)


def sampler(call: Callable[[], object]) -> Sampler:
    """Give the function that tells how many seconds n calls take, until the device is done."""

    def sample(n: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            call()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return sample


def _on_device(inputs: Any) -> Any:
    return type(inputs)(*(x.to(DEVICE) for x in inputs))


def errors(sizes: tuple[Size, ...]) -> Iterator[Row]:
    """Largest relative error of every operation; raises where one is wrong."""
    for size in sizes:
        if size.B * size.J * size.D > REFERENCE:
            continue
        for kernel, error in roofline.errors(_on_device(problems.whitened(size))).items():
            if not error < TOLERANCE:
                raise RuntimeError(f"{kernel}, {tuple(size)}: error {error:.2g} in float32")
            yield {"mode": "error", "kernel": kernel, **size._asdict(), "error": error}


def densities(sizes: tuple[Size, ...], absent: tuple[str, ...]) -> Iterator[Row]:
    """Forward with backward, from A and from the parameters, but for providers that are absent."""
    for size in sizes:
        large = size.B * size.J > LARGE
        for mode, inputs, wanted in (
            (throughput.BACKWARD, problems.whitened(size), providers.whitened_densities()),
            (throughput.PARAMETERS, problems.parameters(size), providers.PARAMETER_DENSITIES),
        ):
            inputs = _on_device(inputs)
            calls = {
                name: throughput.gradient_call(density, inputs)
                for name, density in wanted.items()
                if name not in absent and (not large or name in ("vmm_fast", "KeOps"))
            }
            samplers = {name: sampler(call) for name, call in calls.items()}
            for name, timing in take_turns(samplers, repeats=5, seconds=5.0).items():
                yield {"mode": mode, "provider": name, **size._asdict(), **timing}


def prior_steps(sizes: tuple[Size, ...]) -> Iterator[Row]:
    """What the prior adds to a training step; torch where a [B, J, D] array fits."""
    for size in sizes:
        fits = size.B * size.J * size.D <= REFERENCE
        yield from _compared(KL, size, *_variational(size, fits))
        yield from _compared(throughput.COMPONENTS, size, *_building(size))
        for inference, mode in (
            ("gradient", throughput.GRADIENT_STEP),
            ("closed-form", throughput.CLOSED_FORM_STEP),
        ):
            yield from _compared(mode, size, *_empirical_bayes(size, inference, fits))


# Of each provider the call to be timed, a part of it that does not count, and its error.
Compared = tuple[dict[str, Callable[[], object]], Callable[[], object] | None, dict[str, float]]


def _variational(size: Size, fits: bool) -> Compared:
    """The encoder is left out: its outputs are leaves."""
    p = _on_device(problems.parameters(size))
    ours = throughput.vmm_prior(size, "gradient")[0].to(DEVICE)
    inputs = (p.z, 0.5 + p.z.sigmoid(), p.centers, p.scale)

    def call(prior: VMMPrior | EagerVMM, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]

        def kl() -> tuple[Tensor, ...]:
            z, deviation, centers, scale = leaves
            q = Independent(Normal(z, deviation, validate_args=False), 1, validate_args=False)
            at_pseudo_inputs = MultivariateNormal(
                centers, scale_tril=scale.tril(), validate_args=False
            )
            value = prior.kl(q, lambda _: at_pseudo_inputs, z=z)
            return value, *torch.autograd.grad(value, leaves, torch.ones_like(value))

        return kl

    calls = {"vmm_fast": call(ours, torch.float32)}
    if not fits:
        return calls, None, {}
    calls["torch.distributions"] = call(EagerVMM(ours), torch.float32)
    exact = call(EagerVMM(ours).double(), torch.float64)()
    return calls, None, {name: problems.error(f(), exact) for name, f in calls.items()}


def _building(size: Size) -> Compared:
    """A and c from (L, s, log pi); in torch in float64, as ours is inside."""
    p = _on_device(problems.parameters(size._replace(B=0)))
    inputs = (p.logits.log_softmax(-1), p.precision_cholesky, p.scale)
    exact = throughput.building(reference.whitened_components, [x.double() for x in inputs])()
    calls = {
        name: throughput.building(build, inputs)
        for name, build in providers.COMPONENT_BUILDERS.items()
    }
    return calls, None, {name: problems.error(call(), exact) for name, call in calls.items()}


def _empirical_bayes(size: Size, inference: str, fits: bool) -> Compared:
    """The pseudo-inputs' way through the encoder and back is timed, and taken off."""
    ours, encoder = throughput.vmm_prior(size, inference)
    ours, z = ours.to(DEVICE), _on_device(problems.parameters(size)).z
    priors = {"vmm_fast": ours}
    errors = {}
    if fits:
        priors["torch"] = EagerVMM(ours)
        exact = throughput.step_values(EagerVMM(ours).double(), z.double(), encoder)
        errors = {
            name: problems.error(throughput.step_values(prior, z, encoder), exact)
            for name, prior in priors.items()
        }
    calls = {name: partial(prior.update, z, encoder) for name, prior in priors.items()}
    return calls, partial(throughput.encode, encoder, ours.pseudo_inputs), errors


def _compared(
    mode: str,
    size: Size,
    calls: dict[str, Callable[[], object]],
    left_out: Callable[[], object] | None,
    errors: dict[str, float],
) -> Iterator[Row]:
    for provider, error in errors.items():
        if not error < TOLERANCE:
            raise RuntimeError(f"{provider}, {mode}, {tuple(size)}: error {error:.2g} in float32")
    samplers, launched = {}, {}
    for provider, call in calls.items():
        samplers[provider], launched[provider] = sampler(call), launches(call)
        if left_out is not None:
            samplers[provider] = less(samplers[provider], sampler(left_out))
            launched[provider] -= launches(left_out)
    for provider, timing in take_turns(samplers, repeats=5, seconds=2.0).items():
        row: Row = {"mode": mode, "provider": provider, **size._asdict(), **timing}
        if provider in errors:
            row["error"] = errors[provider]
        yield {**row, "launches": launched[provider]}


def launches(call: Callable[[], object]) -> int:
    """Kernels, copies and fills that a call has the device do."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[getattr(ProfilerActivity, DEVICE.upper())]) as profiler:
        call()
        torch.cuda.synchronize()
    device = getattr(DeviceType, DEVICE.upper())
    return sum(event.device_type == device for event in profiler.events())


def device_rates(rows: int, numbers: int) -> gpu_bound.Device:
    """What the device itself reaches in products of square matrices and in copies."""
    from vmm_fast.kernels import launch  # needs Triton

    a = torch.randn(rows, rows, device=DEVICE)
    rates = []
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        timing = take_turns({"": sampler(lambda: a @ a)}, repeats=5, seconds=1.0)[""]
        rates.append(2 * rows**3 / timing["p50"])
    torch.backends.cuda.matmul.allow_tf32 = False
    x = torch.empty(numbers, device=DEVICE)
    y = torch.empty_like(x)
    copied = take_turns({"": sampler(lambda: y.copy_(x))}, repeats=5, seconds=1.0)[""]
    vector, matrix = rates
    amd = torch.version.hip is not None
    return gpu_bound.Device(
        torch.cuda.get_device_name(),
        "",
        launch.capability(torch.device(DEVICE)),
        vector,
        vector if amd else matrix,
        1 if amd else 3,
        vector / 16,  # a multiprocessor issues one exponential to eight multiply-adds
        2 * x.numel() * 4 / copied["p50"],
        "measured",
    )


def kernels(sizes: tuple[Size, ...], device: gpu_bound.Device) -> Iterator[Row]:
    """Every kernel, and what it must take at least."""
    yield {"mode": "rates", **device._asdict()}
    for size in sizes:
        inputs = _on_device(problems.whitened(size))
        for name, call in roofline.kernels(inputs).items():
            if name == roofline.RESPONSIBILITIES and size.B * size.J > LARGE:
                continue
            timing = take_turns({"": sampler(call)}, repeats=5, seconds=2.0)[""]
            names = [name]
            if name == roofline.LOG_PROB_BACKWARD:  # the call is forward and backward
                names = [roofline.LOG_PROB, name]
            bound = sum(
                max(gpu_bound.times(gpu_bound.KERNELS[n](size, device), device).values())
                for n in names
            )
            yield {
                "mode": "kernel",
                "kernel": name,
                **size._asdict(),
                **timing,
                "bound": bound,
                "fraction": bound / timing["p50"],
            }


def training_steps(plan: step.Plan) -> Iterator[Row]:
    """The image VAE under each prior, in turns."""
    x = 2 * torch.rand(4 * max(plan.batches), plan.inputs, device=DEVICE) - 1
    for size in plan.batches:
        samplers = {
            name: sampler(step.make_step(name, plan, x, size))
            for name in step.PRIORS
            if name != step.EAGER
        }
        timings = take_turns(samplers, repeats=10, seconds=30.0)
        for name, timing in timings.items():
            yield {
                "mode": "training step",
                "provider": name,
                "B": size,
                "J": plan.components,
                "D": plan.latent_dim,
                **timing,
                "ratio": timing["p50"] / timings[step.NORMAL]["p50"],
            }


def memory(size: Size) -> Iterator[Row]:
    """Peak over what the inputs take."""
    inputs = _on_device(problems.whitened(size))
    call = throughput.gradient_call(providers.vmm_fast_whitened, inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    peak = torch.cuda.max_memory_allocated() - before
    yield {"mode": "memory", "provider": "vmm_fast", **size._asdict(), "peak_bytes": peak}


def rows(run: Run) -> Iterator[Row]:
    """Yield all measurements, or write the bounds on paper alone."""
    if run.args.on_paper:
        print(gpu_bound.write(Path(run.args.out)))
        return
    if not torch.cuda.is_available():
        raise SystemExit("no GPU was found: torch.cuda.is_available() is False")
    import triton

    sizes, plan = run.choose(SIZES, QUICK_SIZES), run.choose(step.FULL, step.QUICK)
    common: Row = {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": triton.__version__,
    }
    for part in (
        errors(sizes),
        densities(sizes, throughput.SLOW_TO_START if run.args.quick else ()),
        prior_steps(sizes),
        kernels(sizes, device_rates(*run.choose((8192, 2**28), (64, 64)))),
        training_steps(plan),
        memory(run.choose(MEMORY, QUICK_SIZES[0])),
    ):
        for row in part:
            yield {**common, **row}


MEASUREMENT = Measurement(
    "gpu",
    "the kernels on a GPU: errors, speed, limits, memory",
    rows,
    options={
        "--quick": OPTIONS["--quick"],
        "--on-paper": {"action": "store_true", "help": "write the bounds, measure nothing"},
        "--out": OPTIONS["--out"],
    },
)
