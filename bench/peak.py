"""The machine's own limits: fused multiply-adds and copied bytes a second, on so many threads."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("peak.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC")
ROUNDS = 4_000_000  # over ten milliseconds, next to which starting threads is nothing
COPIED_BYTES = 2**28  # far more than a cache holds


@cache
def _library() -> ctypes.CDLL:
    """Build peak.cpp once for this source, compiler, flags and machine."""
    compiler = os.environ.get("CXX", "c++")
    host = subprocess.run(
        [compiler, "-march=native", "-E", "-v", "-x", "c++", os.devnull],
        capture_output=True,
        check=True,
    ).stderr
    key = hashlib.sha256(SOURCE.read_bytes() + host + repr(FLAGS).encode()).hexdigest()[:16]
    folder = Path(__file__).parents[1] / "build" / "bench"
    path = folder / f"peak-{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / path.name
            subprocess.run([compiler, *FLAGS, SOURCE, "-o", built], check=True)
            built.replace(path)
    library = ctypes.CDLL(str(path))
    for name in ("fma_float32", "fma_float64"):
        getattr(library, name).argtypes = [ctypes.c_int64]
        getattr(library, name).restype = ctypes.c_double
    return library


def fma(dtype: str, threads: int) -> tuple[Callable[[], object], int]:
    """Give a call, and the floating-point operations that it makes, two for each multiply-add."""
    library = _library()
    loop = getattr(library, f"fma_{dtype}")  # ctypes lets go of the interpreter's lock
    pool = ThreadPoolExecutor(threads)
    operations = threads * ROUNDS * getattr(library, f"fma_{dtype}_operations")()
    return lambda: list(pool.map(loop, [ROUNDS] * threads)), operations


def copy() -> tuple[Callable[[], object], int]:
    """Give a call on torch's threads, and the bytes that it reads and writes."""
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * COPIED_BYTES
