"""What the GPU kernels must take at least: a roofline on paper, of operations, bytes and launches.

``python -m bench gpu --on-paper`` writes it to ``gpu-roofline.md``. For every kernel it counts what
one call does to the padded tiles that :mod:`vmm_fast.kernels.launch` chooses for the target. P is
the dimension D rounded up; the matrices are taken in n x n blocks of Q = min(P, 32) columns, of
which the T = n (n + 1) / 2 of a triangle are not zero. Per pair of a point and a component

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
program takes one after the other. Components are built in float64 on the vector units, as many
operations as the formulas of ``kernels/components.py`` have. What the caches between memory and
processor carry is left out. Rates are those of the makers' data sheets; the waits are assumptions,
named below. No figure on the page is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.problems import Parameters, Size
from bench.providers import torch_distributions
from vmm_fast._files import write_atomically
from vmm_fast.operations import LARGEST_COMPONENT_DIM

SIZES = (
    Size(256, 100, 10),
    Size(4096, 500, 30),
    Size(4096, 500, 100),
    Size(1_048_576, 10_000, 32),
)
LAUNCH = 3e-6  # seconds between two dependent launches in a CUDA graph; eager Python takes longer
STEP = 1e-6  # seconds that a program waits for the loads and product of a component's block
FLOAT64 = 2  # float32 operations in the time of one in float64, on these devices
RESIDENT = 1000  # small programs that run at once
NEWTON_STEPS, BLOCK = 10, 256  # for the concentration; components that a step takes at a time
DIGAMMA = 120  # operations of digamma and trigamma


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


def _plan(size: Size, device: Device, halvings: int = 0) -> Plan:
    """Tiles are those of the kernels on pairs, halved so often."""
    from vmm_fast.kernels import launch  # needs Triton
    from vmm_fast.kernels.blocks import chunk, padded

    block = launch.tile(torch.float32, size.D, device.capability).BLOCK_B
    block = max(16, block >> halvings)
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


def _log_prob(size: Size, p: Plan) -> Work:
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


def log_prob(size: Size, device: Device) -> Work:
    return _log_prob(size, _plan(size, device))


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


def backward(size: Size, device: Device) -> Work:
    """Both halves in one launch; then M W, and what splits have left."""
    p = _plan(size, device)
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


def statistics(size: Size, device: Device) -> Work:
    """The log-sum-exp, then the sums."""
    p = _plan(size, device)
    return _after(_log_prob(size, p), _sums(size, p, p.point_splits > 1))


def components(size: Size, device: Device) -> Work:
    """Marginal, s full: s^T L, P^T P and D steps of elimination, in float64.

    From what a prior stores: every program goes through all logits, which C = J of are here.
    """
    p = _plan(size, device)
    operations = 4 * p.P**3 + size.D * 7 * p.P**2
    return Work(
        1,
        4 * size.J * (3 * size.D**2 + 2),
        FLOAT64 * size.J * operations,
        0,
        size.J * (p.P + size.J),
        size.D * -(-size.J // RESIDENT),
    )


def components_backward(size: Size, device: Device) -> Work:
    """The factorisation again, five products, and D steps of substitution."""
    p, first = _plan(size, device), components(size, device)
    return first._replace(
        bytes=4 * size.J * (6 * size.D**2 + 2),
        special=size.J * p.P,
        vector=first.vector + FLOAT64 * size.J * (10 * p.P**3 + size.D * 4 * p.P**2),
        steps=2 * first.steps,
    )


def empirical_bayes(size: Size, device: Device) -> Work:
    """By gradient: L from its stored form, the log-sum-exp, the sums, and the chain rule."""
    # One table for all GPUs: the larger tiles would spill here.
    p = _plan(size, device._replace(capability=0), halvings=1)
    on_pairs = _after(_log_prob(size, p), _sums(size, p, p.point_splits > 1))
    return on_pairs._replace(
        launches=4,
        bytes=on_pairs.bytes + 4 * size.J * 5 * size.D**2,
        vector=on_pairs.vector + FLOAT64 * size.J * 10 * p.P**3,
        steps=on_pairs.steps + 2,
    )


def closed_form(size: Size, device: Device) -> Work:
    """The online step: the same sums; then D steps of elimination, and Newton's over all masses."""
    first = empirical_bayes(size, device)
    newton = NEWTON_STEPS * -(-size.J // BLOCK)
    return first._replace(
        vector=first.vector + FLOAT64 * size.J * (size.D * 7 * size.D**2 + NEWTON_STEPS * DIGAMMA),
        steps=first.steps + size.D * -(-size.J // RESIDENT) + newton,
    )


def log_joint(size: Size, device: Device) -> Work:
    first = log_prob(size, device)
    return first._replace(launches=1, bytes=4 * (size.B * (size.D + size.J) + _mixture(size)))


def assign(size: Size, device: Device) -> Work:
    p, first = _plan(size, device), log_prob(size, device)
    parts = 2 * size.B * 5 * p.splits if p.splits > 1 else 0  # as log_prob's, and labels
    return first._replace(
        bytes=4 * (size.B * (size.D + 4) + _mixture(size) + parts), special=4 * p.pairs
    )


def responsibilities(size: Size, device: Device) -> Work:
    first = log_prob(size, device)
    second = first._replace(launches=1, bytes=4 * size.B * size.J)
    return _after(first, second)


KERNELS: dict[str, Callable[[Size, Device], Work]] = {
    "components": components,
    "components, backward": components_backward,
    "log_prob": log_prob,
    "log_prob, backward": backward,
    "statistics": statistics,
    "log_joint": log_joint,
    "responsibilities": responsibilities,
    "assign": assign,
    "empirical-Bayes step": empirical_bayes,
    "online step in closed form": closed_form,
}


ON_COMPONENTS = (components, components_backward, empirical_bayes, closed_form)


def times(work: Work, device: Device) -> dict[str, float]:
    """Seconds that each resource needs."""
    return {
        "memory": work.bytes / device.bandwidth,
        "vector units": work.vector / device.vector,
        "matrix units": work.matrix * device.passes / device.matrix,
        "exponentials": work.special / device.special,
        "waiting": work.launches * LAUNCH + work.steps * STEP,
    }


class Traffic(TorchDispatchMode):
    """Counts the operators that launch something, and the bytes of their inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view and function.overloadpacket is not torch.ops.aten.detach:
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
            self.launches += 1
            self.bytes += sum(
                x.numel() * x.element_size() for x in leaves if isinstance(x, torch.Tensor)
            )
        return out


def torch_distributions_traffic(size: Size) -> Traffic:
    """Forward and backward of ``MixtureSameFamily`` of ``MultivariateNormal``, nothing computed."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta", requires_grad=True)

    matrix = (size.J, size.D, size.D)
    inputs = Parameters(
        empty(size.B, size.D), empty(size.J, size.D), empty(*matrix), empty(*matrix), empty(size.J)
    )
    with Traffic() as traffic:
        out = torch_distributions(inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    return traffic


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _count(value: float) -> str:
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g}"


def _name(size: Size) -> str:
    return f"({size.B:,}, {size.J:,}, {size.D})"


def page() -> str:
    """Everything as Markdown."""
    assert __doc__ is not None
    lines = ["# A roofline on paper for the GPU kernels", "", *__doc__.strip().splitlines(), ""]
    lines += [
        f"A launch is taken to cost {_seconds(LAUNCH)} and a block of a program's loop "
        f"{_seconds(STEP)} of waiting. float32 throughout.",
        "",
        "| device | target | vector | matrix, passes a product | exponentials | memory | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for d in DEVICES:
        lines.append(
            f"| {d.name} | {d.target} | {_count(d.vector)}FLOP/s | {_count(d.matrix)}FLOP/s, "
            f"{d.passes} | {_count(d.special)}/s | {_count(d.bandwidth)}B/s | {d.source} data "
            "sheet |"
        )
    lines += [
        "",
        "## Every kernel on every target",
        "",
        f"Counts are those of an {H100.name}; tiles, and with them splits and bytes, differ a "
        "little between targets. A target's column has the time and what it is bound by.",
    ]
    for size in SIZES:
        lines += ["", f"### (B, J, D) = {_name(size)}", ""]
        heads = ("launches", "bytes", "vector op.", "matrix op., one pass", "exponentials")
        heads = ("kernel", *heads, *(d.name for d in DEVICES))
        lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for name, count in KERNELS.items():
            if count in ON_COMPONENTS and size.D > LARGEST_COMPONENT_DIM:  # in plain torch
                continue
            launches, *counts, _ = count(size, H100)
            cells = [name, str(launches), *map(_count, counts)]
            for device in DEVICES:
                found = times(count(size, device), device)
                bound = max(found, key=found.__getitem__)
                cells.append(f"{_seconds(found[bound])}, {bound}")
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "## torch.distributions for the same work",
        "",
        "`MixtureSameFamily` of `MultivariateNormal` from (m, S, L, pi), forward and backward: "
        "operators that launch something (one may launch several), and the bytes of their inputs "
        "and outputs, counted on tensors without data.",
        "",
        f"| (B, J, D) | operators | bytes | at an {H100.name}'s bandwidth, at least | "
        "ours, log_prob and backward |",
        "|---|---|---|---|---|",
    ]
    for size in SIZES:
        traffic = torch_distributions_traffic(size)
        ours = [count(size, H100) for count in (log_prob, backward)]
        lines.append(
            f"| {_name(size)} | {traffic.launches} | {_count(traffic.bytes)}B | "
            f"{_seconds(traffic.bytes / H100.bandwidth + traffic.launches * LAUNCH)} | "
            f"{sum(w.launches for w in ours)} launches, {_count(sum(w.bytes for w in ours))}B |"
        )
    return "\n".join(lines) + "\n"


def write(folder: Path) -> Path:
    """Write the page into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gpu-roofline.md"
    write_atomically(path, lambda file: file.write(page()), text=True)
    return path
