"""Rows of results: JSON lines, each with command, revision, versions and machine, to repeat it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_info

from vmm_fast import _core
from vmm_fast._files import write_atomically
from vmm_fast._text import counted

RESULTS = Path(__file__).parent / "results"
# Real data, which are not part of the project.
DATA = Path(
    os.environ.get("VMM_FAST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)
# Options that say where something lies, and nothing of what is measured.
PLACES = ("atlases", "data", "out", "checkpoint")

Row = dict[str, Any]


def command(arguments: list[str]) -> str:
    """Return the command that repeats a run, without the places on this machine."""
    kept: list[str] = []
    options = iter(arguments)
    for option in options:
        name, joined, _ = option.partition("=")
        if name.removeprefix("--") in PLACES:
            if not joined:
                next(options)
        elif option != "--resume":
            kept.append(option)
    return "python -m bench " + shlex.join(kept)


def environment() -> dict[str, Any]:
    """Return everything about the machine that a value may depend on."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    cpu, instructions, threads = _cpu_name(), _core.instruction_set(), torch.get_num_threads()
    return {
        "machine": f"{cpu}, {instructions}, {counted(threads, 'thread')}",
        "revision": revision,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "instruction_set": instructions,
        "openmp": _openmp_runtimes(),
        "threads": threads,
    }


def _openmp_runtimes() -> str:
    """Return file names of the OpenMP runtimes that are loaded; torch's wheels bring their own."""
    found = (x["filepath"] for x in threadpool_info() if x["user_api"] == "openmp")
    return ", ".join(sorted(Path(path).name for path in found))


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON lines, whole or not at all."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda file: file.write(text), text=True)


def read_rows(path: Path) -> list[Row]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_machine(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows of each processor and number of threads, in the order of the first ones."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["machine"], []).append(row)
    return found


def select(rows: Iterable[Row], **fields: Any) -> list[Row]:
    """Return rows that have all these values; a field that a row lacks counts as None."""
    return [row for row in rows if all(row.get(k) == v for k, v in fields.items())]


def keep(path: Path, make: Callable[[], Row]) -> Row:
    """Return the row in a file, or make it and write it there."""
    if not path.exists():
        text = json.dumps(make())
        write_atomically(path, lambda file: file.write(text), text=True)
    return json.loads(path.read_text())


def kept(folder: Path, **orders: Iterable[Any]) -> list[Row]:
    """Return all rows that :func:`keep` wrote, in the order of these fields' values, then seeds."""
    places = {key: {value: i for i, value in enumerate(order)} for key, order in orders.items()}
    rows = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(rows, key=lambda row: (*(places[k][row[k]] for k in places), row["seed"]))
