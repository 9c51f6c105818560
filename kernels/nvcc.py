"""The resources of the CUDA kernels in ``csrc/``, as the compiler reports them without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

__all__ = ["TARGETS", "Resources", "resource_report"]

# Targets and flags are those of CMakeLists.txt, except that warnings are errors here.
TARGETS = (80, 90, 100)

_FLAGS = ["-std=c++17", "-O3", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]

_REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<target>\w+)'"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


class Resources(NamedTuple):
    """Resources of a kernel on a target; spills are per thread, shared memory per block."""

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int


def resource_report() -> list[Resources] | None:
    """Return the assembler's report on every CUDA source, compiled with the flags of the build.

    Returns
    -------
    list of Resources or None
        A row for each kernel and target; None without nvcc, or if the package was installed without
        its sources.

    Raises
    ------
    RuntimeError
        If a source does not compile without a warning.
    """
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    sources = sorted((Path(__file__).resolve().parent.parent / "csrc").glob("*.cu"))
    if nvcc is None or not sources:
        return None
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in TARGETS]
    rows = []
    for source in sources:
        with tempfile.TemporaryDirectory() as folder:
            output = f"{folder}/{source.stem}.o"
            command = [nvcc, *_FLAGS, *targets, "-Xptxas=-v", "-c", str(source), "-o", output]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        for found in _REPORT.finditer(done.stdout + done.stderr):
            shared = re.search(r"(\d+) bytes smem", found["rest"])
            rows.append(
                Resources(
                    kernel=found["kernel"],
                    target=found["target"],
                    registers=int(found["registers"]),
                    spill_bytes=int(found["stores"]) + int(found["loads"]),
                    shared_bytes=int(shared[1]) if shared else 0,
                )
            )
    return rows
