"""What the GPU kernels must take at least: a roofline on paper, of operations, bytes and launches.

``python -m bench gpu --on-paper`` writes it to ``gpu-roofline.md``. For every kernel it counts what
one call does to the padded tiles that :mod:`vmm_fast.kernels.launch` chooses, P the dimension
rounded up, per pair of a point and a component

    a product of matrices          2 P^2 operations, three times over where float32 is split into
                                   three passes of TF32: one product in log_prob, two in each half
                                   of the backward (l once more, then the sum)
    everything else                3 P (difference, square, sum) + 30 (online softmax) vector
                                   operations, and P for each weighted sum
    exponentials                   2 in log_prob, 1 in each half of the backward

and what goes through memory: inputs and outputs once, what splits leave written and read. The time
of a resource is its count over the device's rate, and the largest of these bounds the kernel. On
small sizes none of them does, but the wait: launches, and the components that a program takes one
after the other. Components are built in float64 on the vector units, as many operations as the
formulas of ``kernels/components.py`` have. What the caches between memory and processor carry is
left out. Rates are those of the makers' data sheets; the waits are assumptions, named below. No
figure on the page is measured.
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

SIZES = (Size(256, 100, 10), Size(4096, 500, 30), Size(1_048_576, 10_000, 32))
LAUNCH = 3e-6  # seconds between two dependent launches in a CUDA graph; eager Python takes longer
STEP = 1e-6  # seconds that a program waits for one component's loads, product and exponential
FLOAT64 = 2  # float32 operations in the time of one in float64, on these devices
RESIDENT = 1000  # small programs that run at once


class Device(NamedTuple):
    """Rates of a device, a second."""

    name: str
    target: str
    vector: float  # float32 operations
    matrix: float  # dense operations of the matrix instructions that the kernels use
    passes: int  # of these for one product in float32
    special: float  # exponentials
    bandwidth: float  # bytes
    source: str


DEVICES = (
    Device(
        "A100 80 GB SXM",
        "sm_80",
        19.5e12,
        156e12,
        3,
        108 * 16 * 1.41e9,
        2.04e12,
        "NVIDIA A100 data sheet",
    ),
    Device(
        "H100 SXM",
        "sm_90",
        66.9e12,
        494.7e12,
        3,
        132 * 16 * 1.83e9,
        3.35e12,
        "NVIDIA H100 data sheet",
    ),
    Device(
        "B200",
        "sm_100",
        80e12,
        1100e12,
        3,
        148 * 16 * 1.85e9,
        8e12,
        "NVIDIA Blackwell data sheet",
    ),
    Device(
        "MI300X",
        "gfx942",
        163.4e12,
        163.4e12,
        1,
        304 * 16 * 2.1e9,
        5.3e12,
        "AMD MI300X data sheet",
    ),
)
H100 = DEVICES[1]


class Work(NamedTuple):
    """Counts of one call."""

    launches: int
    bytes: float
    vector: float
    matrix: float  # one pass
    special: float
    steps: int  # components, or tiles of points, that a program takes one after the other


class Plan(NamedTuple):
    """Tiles and splits of a size."""

    P: int
    pairs: int
    splits: int
    each: int
    point_splits: int
    tiles_each: int


def _plan(size: Size) -> Plan:
    from vmm_fast.kernels import launch  # needs Triton
    from vmm_fast.kernels.blocks import padded

    block = launch.tile(torch.float32, size.D, 9).BLOCK_B
    tiles = -(-size.B // block)
    splits, each = launch.splits(tiles, size.J)
    point_splits, tiles_each = launch.splits(size.J, tiles)
    return Plan(padded(size.D), tiles * block * size.J, splits, each, point_splits, tiles_each)


def log_prob(size: Size) -> Work:
    p = _plan(size)
    mixture = size.J * (size.D**2 + size.D + 1)
    partial = 3 * size.B * p.splits if p.splits > 1 else 0
    return Work(
        1 + (p.splits > 1),
        4 * (size.B * (size.D + 5) + mixture + 2 * partial),
        p.pairs * (3 * p.P + 30),
        p.pairs * 2 * p.P**2,
        2 * p.pairs,
        p.each,
    )


def _sums(size: Size, p: Plan) -> tuple[float, float, float, float]:
    """Bytes, vector and matrix operations and exponentials of N, s and M."""
    mixture = size.J * (size.D**2 + size.D + 1)
    parts = 2 * mixture * p.point_splits if p.point_splits > 1 else 0
    numbers = size.B * (size.D + 3) + 2 * mixture + parts
    return 4 * numbers, p.pairs * (5 * p.P + 15), p.pairs * 4 * p.P**2, p.pairs


def backward(size: Size) -> Work:
    p = _plan(size)
    moved, vector, matrix, special = _sums(size, p)
    parts = 2 * size.B * size.D * p.splits if p.splits > 1 else 0
    return Work(
        1 + (p.splits > 1 or p.point_splits > 1),
        moved + 4 * (size.B * (2 * size.D + 3) + parts),
        vector + p.pairs * (4 * p.P + 15),
        matrix + p.pairs * 4 * p.P**2,
        special + p.pairs,
        max(p.each, p.tiles_each),
    )


def statistics(size: Size) -> Work:
    """The log-sum-exp, then the sums."""
    p = _plan(size)
    first, (moved, vector, matrix, special) = log_prob(size), _sums(size, p)
    return Work(
        first.launches + 1 + (p.point_splits > 1),
        first.bytes + moved,
        first.vector + vector,
        first.matrix + matrix,
        first.special + special,
        first.steps + p.tiles_each,
    )


def components(size: Size) -> Work:
    """Marginal, s full: s^T L, P^T P and D steps of elimination, in float64."""
    p = _plan(size)
    operations = 4 * p.P**3 + size.D * 7 * p.P**2
    return Work(
        1,
        4 * size.J * (3 * size.D**2 + 2),
        FLOAT64 * size.J * operations,
        0,
        size.J * p.P,
        size.D * -(-size.J // RESIDENT),
    )


def components_backward(size: Size) -> Work:
    """The factorisation again, five products, and D steps of substitution."""
    p, first = _plan(size), components(size)
    return first._replace(
        bytes=4 * size.J * (6 * size.D**2 + 2),
        vector=first.vector + FLOAT64 * size.J * (10 * p.P**3 + size.D * 4 * p.P**2),
        steps=2 * first.steps,
    )


def empirical_bayes(size: Size) -> Work:
    """By gradient: L from its stored form, the log-sum-exp, the sums, and the chain rule."""
    p, first = _plan(size), log_prob(size)
    moved, vector, matrix, special = _sums(size, p)
    small = FLOAT64 * size.J * 10 * p.P**3
    return Work(
        4,
        first.bytes + moved + 4 * size.J * 5 * size.D**2,
        first.vector + vector + small,
        first.matrix + matrix,
        first.special + special,
        first.steps + p.tiles_each + 2,
    )


def assign(size: Size) -> Work:
    p, first = _plan(size), log_prob(size)
    return first._replace(
        launches=1,
        bytes=4 * (size.B * (size.D + 4) + size.J * (size.D**2 + size.D + 1)),
        special=4 * p.pairs,
        steps=size.J,
    )


def responsibilities(size: Size) -> Work:
    p, first = _plan(size), log_prob(size)
    return Work(
        first.launches + 1,
        first.bytes + 4 * size.B * size.J,
        2 * first.vector,
        2 * first.matrix,
        first.special + 2 * p.pairs,
        2 * first.steps,
    )


KERNELS: dict[str, Callable[[Size], Work]] = {
    "components": components,
    "components, backward": components_backward,
    "log_prob": log_prob,
    "log_prob, backward": backward,
    "statistics": statistics,
    "responsibilities": responsibilities,
    "assign": assign,
    "empirical-Bayes step": empirical_bayes,
}


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
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
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
        f"A launch is taken to cost {_seconds(LAUNCH)} and a component of a program's loop "
        f"{_seconds(STEP)} of waiting. float32 throughout.",
        "",
        "| device | target | vector | matrix, passes a product | exponentials | memory | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for d in DEVICES:
        lines.append(
            f"| {d.name} | {d.target} | {_count(d.vector)}FLOP/s | {_count(d.matrix)}FLOP/s, "
            f"{d.passes} | {_count(d.special)}/s | {_count(d.bandwidth)}B/s | {d.source} |"
        )
    lines += ["", f"## Counts, and the time on an {H100.name}", ""]
    lines += [
        "| (B, J, D) | kernel | launches | bytes | vector op. | matrix op., one pass | "
        "exponentials | at least | bound by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        for name, count in KERNELS.items():
            work = count(size)
            found = times(work, H100)
            bound = max(found, key=found.__getitem__)
            lines.append(
                f"| {_name(size)} | {name} | {work.launches} | {_count(work.bytes)}B | "
                f"{_count(work.vector)} | {_count(work.matrix)} | {_count(work.special)} | "
                f"{_seconds(found[bound])} | {bound} |"
            )
    lines += ["", "## The same on every target, log_prob and its backward together", ""]
    lines += [
        "| (B, J, D) | " + " | ".join(d.name for d in DEVICES) + " |",
        "|---|" + "---|" * len(DEVICES),
    ]
    for size in SIZES:
        cells = []
        for device in DEVICES:
            both = [times(count(size), device) for count in (log_prob, backward)]
            cells.append(_seconds(sum(max(found.values()) for found in both)))
        lines.append(f"| {_name(size)} | " + " | ".join(cells) + " |")
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
        ours = [count(size) for count in (log_prob, backward)]
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
