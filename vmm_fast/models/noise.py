"""The random generators behind `rsample` on a device: the CPU's, and a GPU's own.

Not those of `torch.manual_seed`, which would disturb every other GPU of the process.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def seed_noise(seed: int, device: torch.device) -> None:
    """Seed the generators that draw noise on a device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def noise_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of these generators, for :func:`set_noise_state`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_noise_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore states that :func:`noise_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def own_random_state(model: nn.Module) -> Iterator[None]:
    """Restore, after a ``with`` block, the global random generators that the model draws from."""
    device = next(model.parameters()).device
    state = noise_state(device)
    try:
        yield
    finally:
        set_noise_state(state, device)
