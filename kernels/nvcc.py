"""What the CUDA kernels of ``csrc/`` take of a GPU, from the compiler: no GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

__all__ = ["TARGETS", "Resources", "resource_report"]

# As in CMakeLists.txt, and so are the flags below, but that warnings are errors here.
TARGETS = (80, 90, 100)

_FLAGS = ["-std=c++17", "-O3", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]

_REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<target>\w+)'"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


class Resources(NamedTuple):
    """One kernel on one target; ``spill_bytes`` are a thread's, ``shared_bytes`` a block's."""

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int


def resource_report() -> list[Resources] | None:
    """Compile every CUDA source as the build does, and read the assembler's report.

    Returns
    -------
    list of Resources or None
        A row for each kernel and target; None where there is no nvcc, or where the package was
        installed without its sources.

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
