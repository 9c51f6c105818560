"""Sums over the processes of ``torch.distributed``, so that all of them take the same step.

Statistics are sums, hence all-reduced exactly; gradients are averaged, as those of the network are.
Without an initialised process group nothing happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from vmm_fast._errors import LostProcessError

__all__ = [
    "average_over_processes",
    "number_of_processes",
    "sum_over_processes",
    "telling_of_lost_processes",
]

GLOO_GAVE_UP = "Application timeout caused pair closure"


def number_of_processes() -> int:
    """Return the size of the process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(tensors: Iterable[Tensor]) -> int:
    """Replace tensors, in place, by their sums over the processes; return how many processes.

    Every process must pass the same number of tensors, with the same shapes and dtypes in the same
    order.
    """
    processes = number_of_processes()
    if processes > 1:
        alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for together in alike.values():
            _all_reduce(together)
    return processes


@torch.no_grad()
def _all_reduce(tensors: list[Tensor]) -> None:
    """Sum tensors of one dtype and device in one exchange: for small ones latency dominates."""
    if len(tensors) == 1 and tensors[0].is_contiguous():
        dist.all_reduce(tensors[0])
        return
    buffer = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(buffer)
    for tensor, summed in zip(tensors, buffer.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(summed.view(tensor.shape))


def average_over_processes(tensors: Iterable[Tensor]) -> None:
    """Replace tensors, in place, by their means over the processes."""
    if number_of_processes() == 1:
        return
    tensors = list(tensors)
    processes = sum_over_processes(tensors)
    for tensor in tensors:
        tensor.div_(processes)


@contextmanager
def telling_of_lost_processes() -> Iterator[None]:
    """Explain connection errors inside a ``with`` block: another process has ended, or hangs.

    Raises
    ------
    LostProcessError
        With the explanation, in place of the original error.
    """
    try:
        yield
    except RuntimeError as error:
        processes = number_of_processes()
        # gloo's first error names its source file; those that follow from it do not.
        of_gloo = "gloo" in str(error) or GLOO_GAVE_UP in str(error)
        if processes == 1 or not (isinstance(error, dist.DistError) or of_gloo):
            raise
        rank = dist.get_rank()
        if "timed out" in str(error).lower() or GLOO_GAVE_UP in str(error):
            # Each waits for its neighbour, which may itself be waiting.
            other = f"process {1 - rank}" if processes == 2 else f"another of the {processes}"
            means = (
                f"has waited in vain for {other}, which hangs, was stopped or takes longer than "
                "the timeout of the process group"
            )
        else:
            means = (
                f"has lost its connection to another of the {processes} processes, which has "
                "failed or was killed: see its own output"
            )
        raise LostProcessError(f"process {rank} {means}") from error
