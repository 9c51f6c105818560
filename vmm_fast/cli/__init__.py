"""The command ``vmm-fast``: cluster vectors, images or single cells.

Results go to one folder. Exit codes: 0 done, 1 the run failed, 2 the input or an option cannot be
used, 130 interrupted, 143 terminated, 129 hung up.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from importlib.metadata import version

from vmm_fast._errors import InputError, LostProcessError
from vmm_fast._stopping import HungUp, Terminated, stoppable
from vmm_fast.cells.processes import processes_of_run
from vmm_fast.cli import arrays, cells
from vmm_fast.cli.options import Parser

__all__ = ["main"]

STOPPED = {
    KeyboardInterrupt: ("interrupted", 130),
    Terminated: ("terminated", 143),
    HungUp: ("hung up", 129),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (``sys.argv`` if None) and return its exit code."""
    # All pictures go to files; a notebook's backend may not be there.
    os.environ["MPLBACKEND"] = "agg"
    # Of several processes the first alone has something to say, and nothing keeps the others.
    with stoppable() if processes_of_run().rank == 0 else nullcontext():
        try:
            arguments = _parser().parse_args(argv)
            if (number := processes_of_run().number) > 1 and arguments.command != "integrate":
                raise InputError(
                    f"{arguments.command}: must run in one process, but torchrun started {number}; "
                    "integrate runs in several"
                )
            arguments.run(arguments)
        except InputError as error:
            return _complain(str(error), 2)
        except FloatingPointError as error:
            return _complain(f"training diverged: {error}", 1)
        except LostProcessError as error:
            return _complain(str(error), 1, of_process=False)
        except (MemoryError, RuntimeError) as error:
            of_memory = re.search("allocate memory|out of memory|Storage size", str(error))
            if not isinstance(error, MemoryError) and not of_memory:
                raise
            return _complain(f"too large for this machine's memory: {error}", 1)
        except BrokenPipeError:
            # Nobody reads the table, but the files are written. The interpreter must not complain
            # again when it flushes stdout at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return _complain(f"{where}{error.strerror or error}", 1)
        except KeyboardInterrupt as stop:
            word, code = STOPPED[type(stop)]
            return _complain(f"{word}{stop.args[0] if stop.args else ''}", code)
    return 0


def _complain(message: str, code: int, of_process: bool = True) -> int:
    # stderr is None if it was closed, and writing to it fails if the terminal is gone.
    with suppress(OSError):
        if sys.stderr is not None:
            rank, number, _ = processes_of_run()
            named = of_process and number > 1
            who = f"vmm-fast, process {rank}" if named else "vmm-fast"
            print(f"{who}: {' '.join(message.split())}", file=sys.stderr)
    return code


def _parser() -> Parser:
    parser = Parser(
        prog="vmm-fast",
        description="Cluster vectors, images or single cells with a variational autoencoder whose\n"
        "prior is a VampPrior mixture: the number of clusters is found, not given.",
    )
    parser.add_argument("--version", action="version", version=f"vmm-fast {version('vmm-fast')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    arrays.add_commands(commands)
    cells.add_commands(commands)
    return parser
