"""The kernels on a GPU: right, how fast next to everybody else's, and how near its limits.

``python -m bench gpu`` measures, on the current CUDA or ROCm device and in this order

- densities and empirical-Bayes steps as ``python -m bench throughput`` does on the CPU;
- every kernel, with its error against float64, next to the bound of ``bench/gpu_bound.py``, for the
  rates of the device's own matrix products and copies, measured in the same run;
- a training step of the image VAE under each prior;
- peak memory of forward with backward.

A time is that of the host from a synchronised start to a synchronised end: launches count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import gpu_bound, problems, providers, steps, throughput
from bench.measurement import OPTIONS, Measurement, Run
from bench.problems import Size, Whitened
from bench.records import Row
from bench.timing import sampler, take_turns
from vmm_fast import ops

LARGE = (Size(65_536, 1000, 32), Size(1_048_576, 10_000, 32))  # of the kernels alone
SIZES, QUICK_SIZES = (*throughput.DENSITY, *LARGE), (Size(32, 5, 3),)
DEVICE = "cuda"  # torch's name of AMD's as well
STORED_PAIRS = 10**8  # that a matrix of responsibilities may have


def kernels(inputs: Whitened) -> dict[str, Callable[[], Any]]:
    """Return a call for each kernel on pairs of points and components."""
    return {
        "log_prob": partial(ops.mixture_log_prob, *inputs),
        "log_prob, backward": throughput.gradient_call(providers.vmm_fast_whitened, inputs),
        "statistics": partial(ops.mixture_statistics, *inputs),
        "responsibilities": partial(ops.mixture_responsibilities, *inputs),
        "assign": partial(ops.mixture_assign, *inputs),
    }


def errors(inputs: Whitened, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return relative errors of kernels against the definitions in float64."""
    exact = kernels(Whitened(*(x.double() for x in inputs)))
    with mock.patch("vmm_fast.backends.FORCED", "reference"):
        truth = {name: _values(call) for name, call in exact.items()}
    return {name: problems.error(_values(call), truth[name]) for name, call in calls.items()}


def _values(call: Callable[[], Any]) -> list[Tensor]:
    """Return the results of a call that are no labels."""
    found = call()
    tensors = found if isinstance(found, tuple) else (found,)
    return [x for x in tensors if x.is_floating_point()]


def _on_device(size: Size) -> Whitened:
    return Whitened(*(x.to(DEVICE) for x in problems.whitened(size)))


def device_rates(rows: int, numbers: int) -> gpu_bound.Device:
    """Return what the device itself reaches in products of square matrices and in copies."""
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


def _kernel_rows(run: Run, size: Size, device: gpu_bound.Device) -> Iterator[Row]:
    """Time every kernel, next to what it must take at least."""
    inputs = _on_device(size)
    calls = kernels(inputs)
    if size.B * size.J > STORED_PAIRS:
        del calls["responsibilities"]
    found = {} if size in LARGE else errors(inputs, calls)
    for row in run.compare("kernel", calls, found, seconds=10.0, **size._asdict()):
        kernel = row.pop("provider")
        bound = max(gpu_bound.times(kernel, size, device).values())
        if kernel == "log_prob, backward":  # the call is forward and backward
            bound += max(gpu_bound.times("log_prob", size, device).values())
        yield {"kernel": kernel, **row, "bound": bound, "fraction": bound / row["p50"]}


def _memory_row(size: Size) -> Row:
    call = throughput.gradient_call(providers.vmm_fast_whitened, _on_device(size))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    peak = torch.cuda.max_memory_allocated() - before
    return {"mode": "memory", "provider": "vmm_fast", **size._asdict(), "peak_bytes": peak}


def _rows(run: Run) -> Iterator[Row]:
    for size in run.choose(throughput.DENSITY, QUICK_SIZES):
        for mode in (throughput.BACKWARD, throughput.PARAMETERS):
            yield from throughput.density_rows(run, mode, size, DEVICE)
        for inference in throughput.STEPS:
            yield from throughput.step_rows(run, inference, size, DEVICE)
    device = device_rates(*run.choose((8192, 2**28), (64, 64)))
    yield {"mode": "rates", **device._asdict()}
    for size in run.choose(SIZES, QUICK_SIZES):
        yield from _kernel_rows(run, size, device)
    yield from steps.image_rows(run, DEVICE)
    yield _memory_row(run.choose(throughput.LARGE, QUICK_SIZES[0]))


def rows(run: Run) -> Iterator[Row]:
    """Yield all measurements, or write the bounds on paper alone."""
    if run.args.on_paper:
        print(gpu_bound.write(Path(run.args.out)))
        return
    if not torch.cuda.is_available():
        raise SystemExit("no GPU was found: torch.cuda.is_available() is False")
    import triton

    common: Row = {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": triton.__version__,
    }
    for row in _rows(run):
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
