"""Peak memory of one forward with backward, in a process that does nothing else.

    python -m bench.memory PROVIDER B J D THREADS

prints JSON: ``peak_bytes``, the resident memory at its peak over that before the call (inputs
included in both), and quantiles of the seconds that a call takes. For Linux with glibc.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path

import torch

from bench import problems, providers, throughput
from bench.problems import Size
from bench.timing import quantiles, sampler

MAX_CALLS = 20
SECONDS = 2.0  # no further call after so many
PROVIDERS = {"vmm_fast": providers.vmm_fast_whitened, "matmul": providers.matmul}


def _status(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main(provider: str, *numbers: str) -> None:
    *size, threads = map(int, numbers)
    torch.set_num_threads(threads)
    density = PROVIDERS[provider]
    throughput.gradient_call(density, problems.whitened(Size(256, 4, size[2])))()  # libraries
    call = throughput.gradient_call(density, problems.whitened(Size(*size)))
    # Pages that are free but not given back would hide what the call takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    start = time.perf_counter()
    samples = [sampler(call)(1)]
    while len(samples) < MAX_CALLS and time.perf_counter() - start < SECONDS:
        samples.append(sampler(call)(1))
    print(json.dumps({"peak_bytes": _status("VmHWM") - before, **quantiles(samples)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
