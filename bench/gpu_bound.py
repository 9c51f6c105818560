"""Least time that the GPU kernels on pairs of points and components can take: a paper roofline.

``python -m bench gpu --on-paper`` writes it to ``gpu-roofline.md``. For each kernel it counts the
operations, bytes and launches of one call on the padded tiles that :mod:`vmm_fast.kernels.launch`
chooses for the target. P is the dimension D rounded up; the matrices are taken in n x n blocks of
Q = min(P, 32) columns, of which the T = n (n + 1) / 2 of a triangle are not zero. Per pair

    a block of a product           2 Q^2 operations, three times over where float32 is split into
                                   three passes of TF32
    l                              T blocks
    its gradient by z              for each of n blocks of columns l once more, and beyond Q columns
                                   y as far as these need it, n (n + 1) (2 n + 1) / 6 blocks in all;
                                   then T blocks for y W^T
    M                              for each of n blocks of columns l once more and P / Q blocks
    everything else                Q for every block of l and 2 Q for every Q columns of y
                                   (difference, square, sum), 30 in the online softmax, 15 for a
                                   weight, and P for each weighted sum: vector operations
    exponentials                   2 in log_prob, 1 for every weight

and what goes through memory: inputs and outputs once, what splits leave written and read. The time
of a resource is its count over the device's rate, and the largest of these bounds the kernel. On
small sizes none of them does, but the wait: launches, and the blocks of the components that a
program takes one after the other. It also bounds the kernels that build components and take the
prior's own step, which are left out, as is what caches carry between memory and processor. Rates
are those of the makers' data sheets; the waits are assumptions, named below. No figure on the page
is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.problems import Size
from bench.tables import duration, table, write_text

SIZES = (
    Size(256, 100, 10),
    Size(4096, 500, 30),
    Size(4096, 500, 100),
    Size(1_048_576, 10_000, 32),
)
LAUNCH = 3e-6  # seconds between two dependent launches in a CUDA graph; eager Python takes longer
STEP = 1e-6  # seconds that a program waits for the loads and product of a component's block


class Device(NamedTuple):
    """Rates of a device, a second."""

    name: str
    target: str
    capability: int  # as vmm_fast.kernels.launch has it
    vector: float  # float32 operations
    matrix: float  # dense operations of the matrix instructions that the kernels use
    passes: int  # of these for one product in float32
    special: float  # exponentials
    bandwidth: float  # bytes
    source: str  # its data sheet


DEVICES = (
    Device(
        "A100 80 GB SXM", "sm_80", 8, 19.5e12, 156e12, 3, 108 * 16 * 1.41e9, 2.04e12, "NVIDIA A100"
    ),
    Device("H100 SXM", "sm_90", 9, 66.9e12, 494.7e12, 3, 132 * 16 * 1.83e9, 3.35e12, "NVIDIA H100"),
    Device("B200", "sm_100", 10, 80e12, 1100e12, 3, 148 * 16 * 1.85e9, 8e12, "NVIDIA Blackwell"),
    Device("MI300X", "gfx942", 0, 163.4e12, 163.4e12, 1, 304 * 16 * 2.1e9, 5.3e12, "AMD MI300X"),
)
H100 = DEVICES[1]


class Work(NamedTuple):
    """Counts of one call."""

    launches: int
    bytes: float
    vector: float
    matrix: float  # one pass
    special: float
    steps: int  # blocks of components or of tiles of points that a program takes in turn


class Plan(NamedTuple):
    """Tiles, blocks and splits of a size."""

    P: int
    Q: int
    blocks: int  # n
    triangle: int  # T
    pairs: int
    splits: int
    each: int
    point_splits: int
    tiles_each: int


def plan(size: Size, device: Device) -> Plan:
    from vmm_fast.kernels import launch  # needs Triton
    from vmm_fast.kernels.blocks import chunk, padded

    block = launch.tile(torch.float32, size.D, device.capability).BLOCK_B
    tiles = -(-size.B // block)
    columns = chunk(size.D)
    n = -(-size.D // columns)
    return Plan(
        padded(size.D),
        columns,
        n,
        n * (n + 1) // 2,
        tiles * block * size.J,
        *launch.splits(tiles, size.J),
        *launch.splits(size.J, tiles),
    )


def _log_joint(p: Plan) -> tuple[float, float]:
    """Vector and matrix operations of l, once for every pair."""
    return p.pairs * (p.triangle + 2 * p.blocks) * p.Q, p.pairs * p.triangle * 2 * p.Q**2


def _mixture(size: Size) -> int:
    return size.J * (size.D**2 + size.D + 1)


def log_prob(size: Size, p: Plan) -> Work:
    vector, matrix = _log_joint(p)
    partial = 3 * size.B * p.splits if p.splits > 1 else 0
    return Work(
        1 + (p.splits > 1),
        4 * (size.B * (size.D + 5) + _mixture(size) + 2 * partial),
        vector + 30 * p.pairs,
        matrix,
        2 * p.pairs,
        p.each * p.triangle,
    )


def _sums(size: Size, p: Plan, second: bool) -> Work:
    """N, s and M, one launch, or with a ``second`` one that adds up what the first leaves."""
    vector, matrix = _log_joint(p)
    parts = 2 * _mixture(size) * p.point_splits if second else 0
    return Work(
        1 + second,
        4 * (size.B * (size.D + 3) + 2 * _mixture(size) + parts),
        p.blocks * (vector + p.pairs * (15 + 2 * p.P)),
        p.blocks * (matrix + p.pairs * 2 * p.P * p.Q),
        p.blocks * p.pairs,
        p.tiles_each * p.triangle,
    )


def backward(size: Size, p: Plan) -> Work:
    """Both halves in one launch; then M W, and what splits have left."""
    vector, matrix = _log_joint(p)
    sums = _sums(size, p, p.point_splits > 1 or p.blocks > 1)
    parts = 2 * size.B * size.D * p.splits if p.splits > 1 else 0
    # One block of y is the one that l was taken of.
    again = p.triangle * (2 * p.blocks + 1) // 3 if p.blocks > 1 else 0
    return Work(
        max(sums.launches, 1 + (p.splits > 1)),
        sums.bytes + 4 * (size.B * (2 * size.D + 3) + parts),
        sums.vector + p.blocks * (vector + 15 * p.pairs) + p.pairs * (again + p.triangle) * p.Q,
        sums.matrix
        + p.blocks * matrix
        + p.pairs * (again + p.triangle) * 2 * p.Q**2
        + size.J * 2 * (p.blocks * p.Q) ** 3,
        sums.special + p.blocks * p.pairs,
        max(p.each * p.triangle, sums.steps),
    )


def _after(first: Work, second: Work) -> Work:
    return Work(*(a + b for a, b in zip(first, second, strict=True)))


def statistics(size: Size, p: Plan) -> Work:
    """The log-sum-exp, then the sums."""
    return _after(log_prob(size, p), _sums(size, p, p.point_splits > 1))


def assign(size: Size, p: Plan) -> Work:
    parts = 2 * size.B * 5 * p.splits if p.splits > 1 else 0  # as log_prob's, and labels
    return log_prob(size, p)._replace(
        bytes=4 * (size.B * (size.D + 4) + _mixture(size) + parts), special=4 * p.pairs
    )


def responsibilities(size: Size, p: Plan) -> Work:
    first = log_prob(size, p)
    return _after(first, first._replace(launches=1, bytes=4 * size.B * size.J))


KERNELS: dict[str, Callable[[Size, Plan], Work]] = {
    "log_prob": log_prob,
    "log_prob, backward": backward,
    "statistics": statistics,
    "responsibilities": responsibilities,
    "assign": assign,
}


def work(kernel: str, size: Size, device: Device) -> Work:
    """Return the counts of a kernel."""
    return KERNELS[kernel](size, plan(size, device))


def times(kernel: str, size: Size, device: Device) -> dict[str, float]:
    """Return the seconds that each resource needs."""
    found = work(kernel, size, device)
    return {
        "memory": found.bytes / device.bandwidth,
        "vector units": found.vector / device.vector,
        "matrix units": found.matrix * device.passes / device.matrix,
        "exponentials": found.special / device.special,
        "waiting": found.launches * LAUNCH + found.steps * STEP,
    }


def _count(value: float) -> str:
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g}"


def page() -> str:
    """Everything as Markdown."""
    assert __doc__ is not None
    lines = ["# A roofline on paper for the GPU kernels", "", *__doc__.strip().splitlines(), ""]
    lines += [
        f"A launch is taken to cost {duration(LAUNCH)} and a block of a program's loop "
        f"{duration(STEP)} of waiting. float32 throughout.",
        "",
    ]
    head = ("device", "target", "vector", "matrix, passes a product", "exponentials", "memory")
    rates = (
        (
            d.name,
            d.target,
            f"{_count(d.vector)}FLOP/s",
            f"{_count(d.matrix)}FLOP/s, {d.passes}",
            f"{_count(d.special)}/s",
            f"{_count(d.bandwidth)}B/s",
            f"{d.source} data sheet",
        )
        for d in DEVICES
    )
    lines += [
        table((*head, "source"), rates),
        "## Every kernel on every target",
        "",
        f"Counts are those of an {H100.name}; tiles, and with them splits and bytes, differ a "
        "little between targets. A target's column has the time and what it is bound by.",
    ]
    head = ("kernel", "launches", "bytes", "vector op.", "matrix op., one pass", "exponentials")
    for size in SIZES:
        cells = []
        for name in KERNELS:
            launches, *counts, _ = work(name, size, H100)
            bounds = (times(name, size, device) for device in DEVICES)
            largest = (max(zip(t.values(), t.keys(), strict=True)) for t in bounds)
            found = (f"{duration(seconds)}, {resource}" for seconds, resource in largest)
            cells.append((name, str(launches), *map(_count, counts), *found))
        lines += ["", f"### (B, J, D) = ({size.B:,}, {size.J:,}, {size.D})", ""]
        lines.append(table((*head, *(device.name for device in DEVICES)), cells).rstrip())
    return "\n".join(lines) + "\n"


def write(folder: Path) -> Path:
    """Write the page into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_text(folder / "gpu-roofline.md", page())
