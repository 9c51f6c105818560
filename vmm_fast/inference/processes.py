"""Sums over the processes of ``torch.distributed``, so that every one of them takes the same step.

Statistics are sums, hence all-reduced exactly; gradients are averaged, as those of the network are.
Without an initialised process group nothing happens.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor

__all__ = ["sum_over_processes"]


def sum_over_processes(tensors: Iterable[Tensor]) -> int:
    """All-reduce ``tensors`` in place; returns the number of processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    for tensor in tensors:
        dist.all_reduce(tensor)
    return dist.get_world_size()
