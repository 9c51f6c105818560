"""Time several providers against each other on a machine that is never quite quiet.

Providers take turns, A B C A B C .., so that whatever else the machine does meets all of them
alike; figures are quantiles over the turns, and only ratios of one run mean anything. A sample of a
cheap call is a batch of calls of at least a millisecond. Each turn begins with an untimed call:
it brings the provider's data back into the caches and lets the threads of the one before fall
asleep.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

SAMPLE_SECONDS = 1e-3
WARM_UPS = 3
EXPENSIVE_SECONDS = 0.3  # a call from here up is warm after one call and needs no untimed one

Sampler = Callable[[int], float]


def sampler(call: Callable[[], object]) -> Sampler:
    """Return the function from a number of calls to the seconds until the last one is done."""

    def sample(n: int) -> float:
        _finish()
        start = time.perf_counter()
        for _ in range(n):
            call()
        _finish()
        return time.perf_counter() - start

    return sample


def _finish() -> None:
    """Wait for the GPU, if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def take_turns(
    samplers: Mapping[str, Sampler], *, repeats: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Time every provider in turns.

    Parameters
    ----------
    samplers : mapping from a provider's name to its sampler
    repeats : int
        Turns at least.
    seconds : float
        Go on until this much time has passed, but for ten times ``repeats`` turns at most.

    Returns
    -------
    dict
        For each provider ``min``, ``p20``, ``p50``, ``p80`` in seconds a call, and ``repeats``.
    """
    batch = {name: _batch_size(sample) for name, sample in samplers.items()}
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(10 * repeats):
            if turn >= repeats and time.perf_counter() - start > seconds:
                break
            for name, sample in samplers.items():
                calls, cheap = batch[name]
                if cheap:
                    sample(1)
                samples[name].append(sample(calls) / calls)
    finally:
        if was_enabled:
            gc.enable()
    return {name: quantiles(values) for name, values in samples.items()}


def _batch_size(sample: Sampler) -> tuple[int, bool]:
    """Warm up; return calls that make a sample, and whether an untimed one costs little."""
    seconds = sample(1)
    if seconds < EXPENSIVE_SECONDS:
        seconds = min(sample(1) for _ in range(WARM_UPS))
    return max(1, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9))), seconds < EXPENSIVE_SECONDS


def quantiles(samples: list[float]) -> dict[str, Any]:
    """Return the smallest, the 20th, 50th and 80th percentile, and the number of samples."""
    p20, p50, p80 = np.quantile(samples, (0.2, 0.5, 0.8)).tolist()
    return {"min": min(samples), "p20": p20, "p50": p50, "p80": p80, "repeats": len(samples)}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch, vmm_fast, KeOps and the BLAS of numpy use ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)
