"""Tile sizes, splits and options of kernel launches, from a small fixed table.

Autotuning needs a device to time on and would make results differ from run to run. So tile sizes
depend on the dimension, the dtype and the kind of GPU alone, and splits on those and the numbers of
points and components: the same input gives the same bits on one kind of GPU. No launch waits for
the device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmm_fast.kernels.blocks import Pairs, padded

LARGEST_DIM = 128
# Enough programs to fill today's largest GPUs (132 to 304 multiprocessors) about twice.
PROGRAMS = 512
# Triton's name for the kind of GPU.
BACKEND = "hip" if torch.version.hip else "cuda"
# With more splits, the second pass that merges them would cost more than they save.
MOST_SPLITS = 16


class Tile(NamedTuple):
    """Number of points that a program processes at a time, and number of its warps."""

    BLOCK_B: int
    num_warps: int


# By padded dimension, such that d, y and a component's matrix stay in registers.
TILES = {
    torch.float32: {16: Tile(64, 4), 32: Tile(32, 4), 64: Tile(32, 8), 128: Tile(16, 8)},
    torch.float64: {16: Tile(32, 4), 32: Tile(32, 4), 64: Tile(16, 4), 128: Tile(32, 8)},
}
# Major compute capabilities with registers for twice the points in float32 at 32 dimensions: a
# component's matrix is read half as often, and as many programs run at a time. On capability 10
# registers would spill, and on AMD's GPUs half as many programs would run.
ROOMY = (8, 9)


@functools.cache
def capability(device: torch.device) -> int:
    """Return the major number of an NVIDIA GPU's compute capability, 0 for other devices."""
    if BACKEND == "cuda" and device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0]
    return 0


def tile(dtype: torch.dtype, dim: int, capability: int) -> Tile:
    """Return the tile for a dimension of at most :data:`LARGEST_DIM`."""
    columns = padded(dim)
    if capability in ROOMY and (dtype, columns) == (torch.float32, 32):
        return Tile(64, 4)
    return TILES[dtype][columns]


def precision(dtype: torch.dtype) -> str:
    """Return Triton's ``input_precision`` for products of matrices."""
    # AMD's matrix instructions multiply float32 without rounding it first.
    return "tf32x3" if dtype == torch.float32 and BACKEND == "cuda" else "ieee"


def splits(tiles: int, work: int) -> tuple[int, int]:
    """Return the number of programs among which each tile's work is split, and items of each."""
    wanted = max(1, min(work, MOST_SPLITS, PROGRAMS // max(tiles, 1)))
    each = triton.cdiv(max(work, 1), wanted)
    return triton.cdiv(max(work, 1), each), each


def options(num_warps: int) -> dict[str, Any]:
    """Return compile options; products are fused with sums, whatever Triton's default is."""
    if BACKEND == "hip":  # a wavefront has twice the lanes of a warp
        return {"num_warps": max(1, num_warps // 2), "enable_fp_fusion": True}
    # Left to itself, NVIDIA's assembler spills a few registers so that more programs run at once.
    return {"num_warps": num_warps, "enable_fp_fusion": True, "maxnreg": 255}


def pairs(mixture: Sequence[Tensor], transpose: bool, block: int) -> Pairs:
    """Return z, centers, whitening and offsets with constants, as one argument of a kernel."""
    z = mixture[0]
    dtype = tl.float64 if z.dtype == torch.float64 else tl.float32
    constants = (z.shape[1], block, transpose, dtype, precision(z.dtype))
    return Pairs(*mixture, *map(tl.constexpr, constants))


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which a device is current, so that Triton launches on its stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
