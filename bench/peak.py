"""The machine's own peak of fused multiply-adds, and the operations that a kernel needs.

The peak is that of independent fused multiply-adds (``bench/peak.cpp``). Operations are two for
each multiply-add. With P = D (D + 1) / 2 + D multiply-adds for l_ij (A times z, then the squares),
a pair of a point and a component costs

    log_prob            P, and so responsibilities and assign
    log_prob, backward  P, then P again (nothing of size [B, J] is kept), D (D + 1) / 2 for the
                        gradient of z, D (D + 1) / 2 + D for M and D + 1 for s and N
    statistics          P (l is kept from the log-sum-exp to the sums), then D (D + 1) / 2 + D and
                        D + 1 as above

A pair whose responsibility is exactly 0 in float32 needs no more than l and is counted so. The
exponential, the maximum and the subtraction of the center are not counted.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from bench.problems import Size

PEAK = "FMA peak"
ROUNDS, QUICK_ROUNDS = 4_000_000, 400_000  # ten milliseconds, next to which a thread starts at once


@cache
def _library() -> ctypes.CDLL:
    """Build peak.cpp for this machine and load it."""
    flags = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC")
    with tempfile.TemporaryDirectory() as folder:
        built = f"{folder}/peak.so"
        source = Path(__file__).with_name("peak.cpp")
        subprocess.run([os.environ.get("CXX", "c++"), *flags, source, "-o", built], check=True)
        library = ctypes.CDLL(built)
    library.fma_loop.argtypes, library.fma_loop.restype = [ctypes.c_int64], ctypes.c_float
    return library


def fma(thread_count: int, rounds: int) -> tuple[Callable[[], object], int]:
    """Return a call of fused multiply-adds, and the operations that it makes."""
    pool = ThreadPoolExecutor(thread_count)  # ctypes lets go of the interpreter's lock
    operations = thread_count * rounds * _library().fma_operations()
    return lambda: list(pool.map(_library().fma_loop, [rounds] * thread_count)), operations


def operations(kernel: str, size: Size, with_weight: int) -> int:
    """Return a kernel's operations, of which some only for pairs whose responsibility is not 0."""
    triangle = size.D * (size.D + 1) // 2
    pair = triangle + size.D
    sums = (triangle + size.D) + (size.D + 1)
    more = {"log_prob, backward": (2 * pair, triangle + sums), "statistics": (pair, sums)}
    every, weighted = more.get(kernel, (pair, 0))
    return 2 * (every * size.B * size.J + weighted * with_weight)
