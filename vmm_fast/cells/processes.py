"""The processes that ``torchrun`` starts for one run; without it there is one."""

from __future__ import annotations

import os
from typing import NamedTuple


class Processes(NamedTuple):
    """The processes of a run, as one of them sees them.

    Attributes
    ----------
    rank : int
        Index of this process; the first, 0, writes the results.
    number : int
        Number of processes, on all machines.
    on_this_machine : int
    """

    rank: int = 0
    number: int = 1
    on_this_machine: int = 1


def processes_of_run() -> Processes:
    """Return the processes of the run, from the environment that torchrun sets."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    if not {"TORCHELASTIC_RUN_ID", *names} <= os.environ.keys():
        return Processes()
    return Processes(*(int(os.environ[name]) for name in names))
