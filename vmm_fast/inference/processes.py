"""Sums over the processes of ``torch.distributed``, so that every one of them takes the same step.

Statistics are sums, hence all-reduced exactly; gradients are averaged, as those of the network are.
Without an initialised process group nothing happens.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor

__all__ = ["number_of_processes", "sum_over_processes"]


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
