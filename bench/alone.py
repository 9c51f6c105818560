"""One function in a process of its own, so that peak memory is the function's.

    python -m bench.alone MODULE FUNCTION JSON

calls it with the arguments in JSON and prints, as the last line, the dictionary that it returns,
with ``peak_bytes`` unless that is in it: the resident memory at its peak, interpreter and libraries
included. For Linux.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run(
    function: Callable[..., dict[str, Any]], *, threads: int, **arguments: Any
) -> dict[str, Any]:
    """Call a module's function in a fresh process, on so many threads.

    Raises
    ------
    RuntimeError
        If it fails; with the end of what it wrote to stderr.
    """
    names = [function.__module__, function.__name__]
    done = subprocess.run(
        [sys.executable, "-m", "bench.alone", *names, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        env=environment(threads),
    )
    if done.returncode:
        raise RuntimeError(f"{'.'.join(names)} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def environment(threads: int) -> dict[str, str]:
    """Return the environment in which libraries start so many threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}


def resident_bytes(field: str) -> int:
    """Return this process's memory, ``VmRSS`` now or ``VmHWM`` at its peak.

    Unlike getrusage's, it is no parent's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def start_peak() -> int:
    """Let this process's peak of memory count from here; return the memory that it has now."""
    # Pages that are free but not given back would hide what a call takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def main(module: str, function: str, arguments: str) -> None:
    """Call it and print what it returns."""
    found = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(json.dumps({"peak_bytes": resident_bytes("VmHWM"), **found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
