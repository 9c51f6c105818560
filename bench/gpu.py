"""The kernels on a GPU: right, how fast next to everybody else's, and how near its limits.

``python -m bench gpu`` measures, on the current CUDA or ROCm device and in this order

- errors of every operation against float64, which must be below 1e-3;
- forward with backward from A, and from (m, S, L, pi), against torch.distributions, the matmul form
  in eager torch and compiled, and KeOps where it is installed, in turns;
- every kernel against the bound of ``bench/gpu_bound.py``, with the rates of the device's own
  matrix products and copies, measured in the same run;
- a training step of the image VAE under each prior;
- peak memory of forward with backward.

A time is that of the host from a synchronised start to a synchronised end: launches count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import gpu_bound, problems, providers, roofline, step, throughput
from bench.problems import Size
from bench.records import RESULTS, Row, command, environment, write_rows
from bench.report import duration
from bench.timing import Sampler, take_turns

SIZES = (*throughput.FULL.density, Size(65_536, 1000, 32), Size(1_048_576, 10_000, 32))
DEVICE = "cuda"  # torch's name of AMD's as well
LARGE = 5 * 10**7  # pairs from which only what needs no [B, J] matrix takes part
REFERENCE = 10**8  # numbers of a [B, J, D] array that the reference may make
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
            if not error < throughput.TOLERANCE:
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


def device_rates(rows: int, numbers: int) -> gpu_bound.Device:
    """What the device itself reaches in products of square matrices and in copies."""
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
                max(gpu_bound.times(gpu_bound.KERNELS[n](size), device).values()) for n in names
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
            for name in (step.NORMAL, step.GRADIENT, step.CLOSED_FORM, step.GMM, step.VAMP)
        }
        timings = take_turns(samplers, repeats=plan.repeats, seconds=plan.seconds)
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


def table(rows: list[Row]) -> str:
    """One line a row, what it is and what it came to."""
    lines = []
    for row in rows:
        of = f"({row['B']}, {row['J']}, {row['D']})" if "B" in row else ""
        who = row.get("provider") or row.get("kernel") or row.get("name", "")
        found = []
        if "p50" in row:
            found.append(duration(row["p50"]))
        if "error" in row:
            found.append(f"error {row['error']:.2g}")
        if "fraction" in row:
            found.append(f"{100 * row['fraction']:.0f} % of the bound")
        if "ratio" in row:
            found.append(f"{row['ratio']:.2f}x N(0, I)")
        if "peak_bytes" in row:
            found.append(f"{row['peak_bytes'] / 2**20:.0f} MiB")
        lines.append(f"{row['mode']:45}  {of:24}  {who:24}  {', '.join(found)}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--on-paper", action="store_true", help="write the bounds, measure nothing")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the results")


def main(args: argparse.Namespace, arguments: list[str]) -> int:
    """Measure and write ``gpu.jsonl``; 1 where there is no GPU."""
    if args.on_paper:
        print(gpu_bound.write(Path(args.out)))
        return 0
    if not torch.cuda.is_available():
        print("no GPU was found: torch.cuda.is_available() is False")
        return 1
    import triton

    sizes = QUICK_SIZES if args.quick else SIZES
    plan = step.QUICK if args.quick else step.FULL
    common: Row = {
        "part": "gpu",
        "command": command(arguments),
        **environment(),
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": triton.__version__,
    }
    rows = []
    for part in (
        errors(sizes),
        densities(sizes, throughput.SLOW_TO_START if args.quick else ()),
        kernels(sizes, device_rates(*((64, 64) if args.quick else (8192, 2**28)))),
        training_steps(plan),
        memory(QUICK_SIZES[0] if args.quick else MEMORY),
    ):
        found = list(part)
        print(table(found), flush=True)
        rows += found
        # Written after every part: what was measured is kept if a later part fails.
        Path(args.out).mkdir(parents=True, exist_ok=True)
        write_rows(Path(args.out) / "gpu.jsonl", ({**common, **row} for row in rows))
    return 0
