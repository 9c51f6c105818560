"""Commands killed at random moments: what they leave is whole, and they go on to the same results.

    python -m bench kills --number 200

Each run is a fork of this process, in which everything is imported, and gets SIGKILL at a moment
drawn uniformly from the time that a whole run takes. Then every file that it left under a final
name is read, and the command is given again. A loss is a file that cannot be read, a changed
input, a command that does not go on, or results that are not those of a run that was never killed.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.measurement import OPTIONS, Measurement, Run
from bench.records import Row
from bench.timing import threads
from vmm_fast import cli
from vmm_fast._files import load_checked, read_json
from vmm_fast._folder import digest

LONGEST = 600  # seconds that a run may take
ENDS = {".png": b"IEND\xaeB`\x82", ".html": b"</html>"}


class Command(NamedTuple):
    """A command to kill, without ``--out``; the name of what it writes; options to go on with."""

    arguments: list[str]
    out: str = "out"
    again: tuple[str, ...] = ("--resume",)


def make_inputs(folder: Path) -> dict[str, Command]:
    """Write the input files and return a command of every kind on them."""
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    rng = np.random.default_rng(0)
    kind = rng.integers(3, size=400)
    np.save(folder / "rows.npy", rng.normal(size=(400, 6)) + 5 * np.eye(3, 6)[kind])
    rates = rng.gamma(1, size=(3, 40))[kind] * rng.gamma(5, size=(400, 1))
    cells = AnnData(csr_matrix(rng.poisson(rates).astype(np.float32)))
    cells.obs["batch"] = rng.choice(["a", "b"], size=400)
    cells.write_h5ad(folder / "cells.h5ad")
    rows, h5ad, model = (str(folder / name) for name in ("rows.npy", "cells.h5ad", "model"))
    integrate = ["integrate", h5ad, "--batch-key", "batch", "--epochs", "6", "--components", "20"]
    integrate += ["--checkpoint-steps", "2"]
    sweep = ["sweep", h5ad, "--epochs", "1", "--batch-sizes", "64", "128", "--ratios", "1", "5"]
    return {
        "cluster": Command(["cluster", rows, "--epochs", "8"]),
        "integrate": Command(integrate),
        "integrate on disk": Command([*integrate, "--memory", "0"]),
        "sweep": Command(sweep),
        "assign": Command(["assign", model, h5ad], "out.h5ad", ("--overwrite",)),
        "prepare": Command(["prepare", h5ad], "out.h5ad", ("--overwrite",)),
    }


def start(arguments: list[str], log: Path) -> int:
    """Run the command in a fork of this process, printing to `log`, and return its number."""
    process = os.fork()
    if process == 0:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = 1
        try:
            code = cli.main(arguments)
        finally:
            sys.stderr.flush()
            os._exit(code)
    return process


def finish(arguments: list[str], log: Path) -> None:
    """Run the command in a fork to its end.

    Raises
    ------
    RuntimeError
        With the last line that it printed, if it ends with another code than 0.
    """
    process, since = start(arguments, log), time.monotonic()
    while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0):
        if time.monotonic() - since > LONGEST:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    if code := os.waitstatus_to_exitcode(ended[1]):
        said = log.read_text().splitlines()[-1:]
        raise RuntimeError(f"{arguments[0]} ended with {code}: {''.join(said)}")


def read(path: Path) -> Any:
    """Return a result as something to compare, None where it depends on the clock."""
    import anndata

    if path.suffix == ".h5ad":
        cells = anndata.read_h5ad(path)
        counts = None if cells.X is None else cells.X.toarray().tolist()
        return counts, cells.obs.to_csv(), {k: v.tolist() for k, v in cells.obsm.items()}
    if path.name in ("run.json", "sweep.json"):
        read_json(path)
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.name == "model.pt" and path.parent.name == "model":
        state = torch.load(path, weights_only=False)["model_state_dict"]
        return {key: x.tolist() for key, x in state.items() if torch.is_tensor(x)}
    elif path.suffix in (".pt", ".ckpt"):
        load_checked(path)
    elif path.suffix in ENDS and not path.read_bytes().rstrip().endswith(ENDS[path.suffix]):
        raise ValueError("is cut")
    return path.read_text() if path.suffix == ".csv" else None


def results(out: Path) -> dict[str, Any]:
    """Return every file under its final name."""
    files = [out] if out.is_file() else [p for p in sorted(out.rglob("*")) if p.is_file()]
    shown = (p for p in files if not any(part.startswith(".") for part in p.parts[-2:]))
    return {str(p.relative_to(out)): read(p) for p in shown}


def kill(
    run: Command, out: Path, moment: float, expected: dict[str, Any]
) -> tuple[str, str | None]:
    """Kill the command after `moment` seconds; return what it had done, and what was lost."""
    arguments, log = [*run.arguments, "--out", str(out)], out.with_name("log")
    process = start(arguments, log)
    time.sleep(moment)
    os.kill(process, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        left = results(out)
    except Exception as error:  # of a damaged file, each reader has its own
        return "", f"{type(error).__name__}: {error}"
    was = "ended" if ended != -signal.SIGKILL else "killed"
    if any("checkpoint" in name for name in left):
        was += " with a checkpoint"
    # A folder in which no run has begun is as good as none.
    again = run.again if out.is_file() or (out / "run.json").exists() else ()
    try:
        finish([*arguments, *again], log)
        found = results(out)
    except Exception as error:  # as above
        return was, f"did not go on: {error}"
    differ = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if differ or found.keys() != expected.keys():
        return was, f"other results: {', '.join(differ)}"
    return was, None


def rows(run: Run) -> Iterator[Row]:
    """Kill every command in turn; yield a row for each."""
    args = run.args
    moments = random.Random(args.seed)
    # What has had threads of OpenMP cannot be forked.
    with threads(1), tempfile.TemporaryDirectory() as name:
        for module in (
            "cells.integration",
            "cells.report",
            "cells.sweep",
            "cells.assignment",
            "plots",
        ):
            importlib.import_module(f"vmm_fast.{module}")
        folder = Path(name)
        commands = make_inputs(folder)
        made = [*commands["integrate"].arguments, "--out", str(folder / "made")]
        finish(made, folder / "log")
        shutil.move(folder / "made" / "model", folder / "model")
        inputs = ("rows.npy", "cells.h5ad", "model")
        before = {folder / name: digest(folder / name) for name in inputs}
        chosen = args.commands or list(commands)
        for number, one in enumerate(chosen):
            command, whole = commands[one], folder / f"whole-{commands[one].out}"
            since = time.monotonic()
            finish([*command.arguments, "--out", str(whole)], folder / "log")
            seconds, expected = time.monotonic() - since, results(whole)
            done, lost = Counter[str](), []
            for _ in range(number, args.number, len(chosen)):
                out = folder / command.out
                was, loss = kill(command, out, moments.uniform(0, seconds), expected)
                done[was] += 1
                lost += [loss] if loss else []
                shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
            if any(digest(path) != value for path, value in before.items()):
                lost.append("an input has changed")
            shutil.rmtree(whole) if whole.is_dir() else whole.unlink()
            yield {"name": one, "seconds": seconds, "kills": dict(done), "lost": lost}


MEASUREMENT = Measurement(
    "kills",
    "commands killed at random: what is lost",
    rows,
    options={
        "--number": {"type": int, "default": 200, "help": "of kills"},
        "--seed": {"type": int, "default": 0, "help": "of the moments"},
        "--commands": {"nargs": "+", "help": "of these alone; all by default"},
        "--out": OPTIONS["--out"],
    },
    status=lambda rows: int(any(row["lost"] for row in rows)),
)
