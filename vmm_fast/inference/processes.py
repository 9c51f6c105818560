"""Sums over the processes of ``torch.distributed``, so that every one of them takes the same step.

Statistics are sums, hence all-reduced exactly; gradients are averaged, as those of the network are.
Without an initialised process group nothing happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor

__all__ = [
    "average_over_processes",
    "number_of_processes",
    "sum_over_processes",
    "telling_of_lost_processes",
]


def number_of_processes() -> int:
    """Size of the process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(tensors: Iterable[Tensor]) -> int:
    """All-reduce ``tensors`` in place; returns the number of processes."""
    processes = number_of_processes()
    if processes > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
    return processes


def average_over_processes(tensors: Iterable[Tensor]) -> None:
    """Make ``tensors`` their means over the processes, in place."""
    tensors = list(tensors)
    processes = sum_over_processes(tensors)
    if processes > 1:
        for tensor in tensors:
            tensor.div_(processes)


@contextmanager
def telling_of_lost_processes() -> Iterator[None]:
    """Say what a connection's error means: most often that another process has ended.

    Raises
    ------
    RuntimeError
        In place of the error.
    """
    try:
        yield
    except RuntimeError as error:
        processes = number_of_processes()
        if processes > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise RuntimeError(
                f"process {dist.get_rank()} has lost its connection to another of the {processes} "
                "processes, which has failed or was killed: see its own output"
            ) from error
        raise
