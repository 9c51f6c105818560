"""Compile every kernel ahead of time, without a GPU, and check the resources that it uses.

``python -m vmm_fast.kernels.aot`` prints for every kernel and target the configuration that uses
most, and each that breaks a bound: registers per thread, bytes spilled to memory, shared memory,
and whether matrix instructions are used. It exits 0 only when every bound holds. Configurations are
those that the launching functions choose, for dimensions of every tile size: the functions are
called while launches are recorded instead of executed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from vmm_fast.inference.empirical_bayes import Objective
from vmm_fast.inference.map_objective import LOG_WEIGHT_FLOOR
from vmm_fast.kernels import (
    components,
    counts,
    empirical_bayes,
    groups,
    launch,
    log_prob,
    nvcc,
    sums,
)
from vmm_fast.operations import LARGEST_COMPONENT_DIM


class Target(NamedTuple):
    """A GPU architecture and its limits."""

    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int  # most bytes of a program
    registers: int  # most registers of a thread

    @property
    def capability(self) -> int:
        """Major compute capability, as :func:`vmm_fast.kernels.launch.capability` returns it."""
        return self.arch // 10 if isinstance(self.arch, int) else 0


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024, 255),
    "sm_90": Target("cuda", 90, 32, 227 * 1024, 255),
    "sm_100": Target("cuda", 100, 32, 227 * 1024, 255),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, 512),
}

# Dimensions of every tile size; where registers are short, one that fills its tile and one not.
DIMS = (10, 31, 32, 50, 100)
DTYPES = ("float32", "float64")
_TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64"}
_PAIR_KERNELS = (
    "log_prob_kernel",
    "backward_kernel",
    "statistics_kernel",
    "expected_sums_kernel",
    "matrix_kernel",
    "assign_kernel",
)


class Launch(NamedTuple):
    """One compilation: a kernel with its argument types, constants and options."""

    kernel: str
    signature: tuple[tuple[str, Any], ...]  # the type of an argument, or a tuple's types
    constants: tuple[tuple[str, tuple[int, ...], Any], ...]  # name, place and value
    options: tuple[tuple[str, Any], ...]

    @property
    def configuration(self) -> str:
        """The dtype, constants and options as text."""
        _, first = self.signature[0]
        first = first if isinstance(first, str) else first[0]
        dtype = {"*fp32": "float32", "*fp64": "float64"}[first]
        left_out = ("DTYPE", "NORMALISER", "INVERSE_V", "NOISE", "FLOOR", "enable_fp_fusion")
        words = [
            f"{name}={value}"
            for name, value in (*((name, x) for name, _, x in self.constants), *self.options)
            if name not in left_out
        ]
        return " ".join([dtype, *words])


class Row(NamedTuple):
    """The resources that a compiled kernel uses on a target."""

    kernel: str
    configuration: str
    target: str
    registers: int
    spilled_bytes: int
    shared_memory: int
    matrix_instructions: bool
    atomics: bool

    def faults(self) -> list[str]:
        """Return a description of each bound that does not hold."""
        target = TARGETS[self.target]
        found = []
        if self.registers > target.registers:
            found.append(f"{self.registers} registers, at most {target.registers}")
        if self.spilled_bytes:
            found.append(f"{self.spilled_bytes} bytes spilled, at most 0")
        if self.shared_memory > target.shared_memory:
            found.append(f"{self.shared_memory} bytes shared, at most {target.shared_memory}")
        if self.atomics:
            found.append("atomic operations, whose order is not determined")
        if (
            self.kernel in _PAIR_KERNELS
            and self.configuration.startswith("float32")
            and not self.matrix_instructions
        ):
            found.append("no matrix instructions")
        return found


_KERNELS: dict[str, JITFunction] = {
    kernel.__name__: kernel
    for module in (components, counts, empirical_bayes, groups, log_prob, sums)
    for kernel in vars(module).values()
    if isinstance(kernel, JITFunction) and kernel.__name__.endswith("_kernel")
}


def _type(value: Any) -> Any:
    """Return Triton's name of a value's type, or a tuple of names for a tuple."""
    if isinstance(value, tuple):
        types = map(_type, value)
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, tl.constexpr):
        return "constexpr"
    return "fp64" if isinstance(value, float) else "i32"


def _leaves(name: str, place: tuple[int, ...], value: Any) -> Iterator[tuple[str, tuple, Any]]:
    """Yield name, place and value of an argument, or of every item in nested tuples."""
    if not isinstance(value, tuple):
        yield name, place, value
        return
    names = getattr(value, "_fields", [name] * len(value))
    for index, (inner, x) in enumerate(zip(names, value, strict=True)):
        yield from _leaves(inner, (*place, index), x)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record launches inside a ``with`` block, in the list that it yields, without launching."""
    launches: list[Launch] = []

    def take_note(kernel: JITFunction, *arguments: Any, **named: Any) -> None:
        named.pop("grid")
        named.pop("warmup")
        options = {name: named.pop(name) for name in launch.options(0)}
        names = [name for name in kernel.arg_names if name not in named]
        values = dict(zip(names, arguments, strict=True)) | named
        signature, constants = [], []
        for index, parameter in enumerate(kernel.params):
            value, name = values[parameter.name], parameter.name
            if parameter.is_constexpr:
                value = tl.constexpr(value)
            signature.append((name, _type(value)))
            constants += [
                (inner, place, x.value)
                for inner, place, x in _leaves(name, (index,), value)
                if isinstance(x, tl.constexpr)
            ]
        note = Launch(kernel.__name__, tuple(signature), tuple(constants), tuple(options.items()))
        if note not in launches:
            launches.append(note)

    with mock.patch.object(JITFunction, "run", take_note):
        yield launches


def launches(
    target: Target, dims: Iterable[int] = DIMS, dtypes: Iterable[str] = DTYPES
) -> list[Launch]:
    """Return every compilation that the launching functions request on a kind of GPU."""
    with (
        recorded() as found,
        mock.patch.object(launch, "BACKEND", target.backend),
        mock.patch.object(launch, "capability", lambda device: target.capability),
    ):
        for dtype in (getattr(torch, name) for name in dtypes):
            for dim in dims:
                for transpose in (False, True):
                    _launch_on_pairs(dtype, dim, transpose)
                if dim <= LARGEST_COMPONENT_DIM:
                    _launch_on_components(dtype, dim)
                    _launch_empirical_bayes(dtype, dim)
            _launch_on_counts(dtype)
    return found


def _launch_on_pairs(dtype: torch.dtype, dim: int, transpose: bool) -> None:
    for count, number in ((256, 100), (1_000_000, 10_000)):  # with splits, and without

        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        mixture = (
            empty(count, dim),
            empty(number, dim),
            empty(number, dim, dim),
            empty(number),
        )
        diagonal, full, each = empty(count, dim), empty(count, dim, dim), empty(count)
        softmax = empty(3, count)
        for scale in (None, diagonal, full):
            log_prob.log_prob(*mixture, transpose, scale)
            if scale is not None:
                sums.backward(*mixture, softmax, each, None, transpose, scale)
        for grad_expected in (None, each):
            sums.backward(*mixture, softmax, each, grad_expected, transpose)
        sums.statistics(*mixture, softmax, transpose)
        groups.matrix(*mixture, transpose, 1, softmax)
        groups.matrix(*mixture, transpose, 1, None)
        groups.assign(*mixture, transpose, 1)


def _launch_on_components(dtype: torch.dtype, dim: int) -> None:
    count = 100

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    log_weights, full, diagonal = empty(count), empty(count, dim, dim), empty(count, dim)
    forms = [(full, full), (full, diagonal), (full, None), (None, full), (None, diagonal)]
    for precision_cholesky, scale in forms:
        for expected in (False, True):
            inputs = (log_weights, precision_cholesky, scale)
            components.whitened_components(*inputs, count, expected)
            for wanted in ((True, True, True), (False, False, True)):  # joint, or the scale alone
                components.whitened_components_backward(
                    full, log_weights, *inputs, full, expected, wanted
                )
    for scale in (None, diagonal, full):
        components.stored_components(log_weights, full, scale, count)


def _launch_empirical_bayes(dtype: torch.dtype, dim: int) -> None:
    number, count = 100, 256

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    full, diagonal = empty(number, dim, dim), empty(number, dim)
    kinds = [
        (map_prior, *weights)
        for map_prior in ("none", "fixed", "learnt")
        for weights in (("dirichlet", 0.0), ("stick-breaking", 0.0), ("stick-breaking", 0.5))
        if map_prior != "none" or weights == ("dirichlet", 0.0)
    ]
    for scale in (None, diagonal, full):
        for map_prior, weights, discount in kinds:
            # The two gradient rules alternate here, since they differ in the sums alone.
            objective = Objective(map_prior, weights, discount, map_prior == "learnt", count)
            parameters = (diagonal, scale, full, empty(number), empty(1))
            empirical_bayes.map_gradients(
                *parameters, empty(count, dim), objective, 1.0, 0.0, LOG_WEIGHT_FLOOR
            )


def _launch_on_counts(dtype: torch.dtype) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    each, of_genes, of_both = empty(256), empty(1000), empty(256, 1000)
    # With both shapes of the inverse dispersion.
    for theta, logits in ((None, None), (of_both, None), (of_genes, of_both)):
        model = (of_both, of_both, theta, logits)
        counts.log_prob(*model)
        has = [True, theta is not None, logits is not None]
        for wanted in (has, [True, False, has[2]]):
            counts.backward(each, *model, wanted)


def compiled(note: Launch, target_name: str) -> Row:
    """Compile a kernel for a target and return the resources that it uses."""
    target = TARGETS[target_name]
    kernel = _KERNELS[note.kernel]
    aligned = {
        place: [["tt.divisibility", 16]]
        for index, (name, kinds) in enumerate(note.signature)
        for _, place, kind in _leaves(name, (index,), kinds)
        if kind.startswith("*")
    }
    constants = {place: value for _, place, value in note.constants}
    source = ASTSource(kernel, dict(note.signature), constants, aligned)
    binary = triton.compile(
        source,
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options=dict(note.options),
    )
    if target.backend == "cuda":
        registers, spilled = _cuda_resources(binary.asm["cubin"])
        assembly = binary.asm["ptx"]
        matrix = re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", assembly)
        atomics = re.search(r"^\s*(@%\w+ )?(atom|red)\.", assembly, re.MULTILINE)
    else:
        assembly = binary.asm["amdgcn"]
        registers = _metadata(assembly, "vgpr_count")
        spilled = 4 * (_metadata(assembly, "vgpr_spill_count"))
        spilled += _metadata(assembly, "private_segment_fixed_size")
        matrix = re.search(r"\bv_mfma_", assembly)
        atomics = re.search(r"_atomic_", assembly)
    return Row(
        note.kernel,
        note.configuration,
        target_name,
        registers,
        spilled,
        binary.metadata.shared,
        matrix is not None,
        atomics is not None,
    )


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Return registers per thread, and bytes of stack and local memory, which only spills use."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", report)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def _metadata(assembly: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", assembly)
    if found is None:
        raise RuntimeError(f"the compiler's output has no {name}")
    return int(found.group(1))


def rows(target_names: list[str], dims: list[int], dtypes: list[str]) -> list[Row]:
    """Compile everything, on all cores, and return a row for each compilation."""
    jobs = [(note, name) for name in target_names for note in launches(TARGETS[name], dims, dtypes)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, *zip(*jobs, strict=True), chunksize=4))


def cuda_rows(target_names: list[str]) -> list[Row]:
    """Return the rows of the CUDA kernels in ``csrc/``; none without nvcc."""
    return [
        Row(
            row.kernel,
            "CUDA",
            row.target,
            row.registers,
            row.spill_bytes,
            row.shared_bytes,
            False,
            False,
        )
        for row in nvcc.resource_report() or []
        if row.target in target_names
    ]


def worst(found: list[Row]) -> list[Row]:
    """Return each kernel's and target's most demanding row, and all rows that break a bound."""
    most: dict[tuple[str, str], Row] = {}
    for row in sorted(found, key=lambda r: (r.spilled_bytes, r.registers, r.shared_memory)):
        most[row.kernel, row.target] = row
    return [row for row in found if row.faults() or row is most[row.kernel, row.target]]


def table(found: list[Row]) -> str:
    """Return a text table with one line for each row."""
    head = (
        "kernel",
        "configuration",
        "target",
        "registers",
        "spilled",
        "shared",
        "matrix",
        "bounds",
    )
    lines = [head] + [
        (
            row.kernel,
            row.configuration,
            row.target,
            str(row.registers),
            str(row.spilled_bytes),
            str(row.shared_memory),
            "yes" if row.matrix_instructions else "no",
            "; ".join(row.faults()) or "hold",
        )
        for row in found
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 0 if every bound holds, else 1."""
    parser = argparse.ArgumentParser(prog="python -m vmm_fast.kernels.aot", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dim", nargs="+", type=int, default=list(DIMS), help="dimensions D")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET must not be set: the interpreter compiles nothing")
    of_cuda = cuda_rows(options.target)
    found = rows(options.target, options.dim, options.dtype) + of_cuda
    print(table(worst(found)))
    if not of_cuda:
        print("\nthe CUDA kernels of csrc/ are left out: no nvcc, or installed without sources")
    wrong = [row for row in found if row.faults()]
    print(
        f"\n{len(found)} compilations, Triton {triton.__version__}, for "
        f"{', '.join(options.target)}: {len(wrong)} break a bound"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
