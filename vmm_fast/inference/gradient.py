"""The empirical-Bayes step by gradient: Adam on the prior's own parameters, and on nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vmm_fast.inference.processes import sum_over_processes

__all__ = ["PrivateAdam"]


class PrivateAdam:
    """Adam (Kingma & Ba 2015) that belongs to a prior.

    A step leaves every ``.grad`` as it was, so that it neither disturbs nor is disturbed by the
    model's own optimizer. Gradients are averaged over the processes of ``torch.distributed``.

    Parameters
    ----------
    parameters : iterable of Parameter
        Those without ``requires_grad`` at the time of a step stand still.
    learning_rate : float
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], learning_rate: float):
        # eps is that of the authors' Keras optimizer.
        self._adam = torch.optim.Adam(list(parameters), lr=learning_rate, eps=1e-7)

    @property
    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self._adam.param_groups for p in group["params"]]

    def step(self, loss: Tensor) -> None:
        """Take one step down ``loss``.

        Raises
        ------
        FloatingPointError
            If the loss or a gradient is not finite; nothing has changed then.
        """
        parameters = [p for p in self._parameters if p.requires_grad]
        if not parameters:
            return
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        processes = sum_over_processes(g for g in gradients if g is not None)
        gradients = tuple(g if g is None else g / processes for g in gradients)
        given = [loss.detach(), *(g for g in gradients if g is not None)]
        if not all(bool(g.isfinite().all()) for g in given):
            raise FloatingPointError(
                f"the empirical-Bayes step's loss is {loss.item()} or has a gradient that is not "
                "finite; the prior is unchanged. Lower learning_rate, or check the encoder's output"
            )
        self._follow_parameters()
        kept = [p.grad for p in parameters]
        try:
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            self._adam.step()
        finally:
            for p, old in zip(parameters, kept, strict=True):
                p.grad = old

    def _follow_parameters(self) -> None:
        """Move the moments to where Module.to() has moved the parameters."""
        for p, state in self._adam.state.items():
            moment = state["exp_avg"]
            if moment.device != p.device or moment.dtype != p.dtype:
                self._adam.load_state_dict(self._adam.state_dict())
                return

    def state_dict(self) -> dict[str, Any]:
        """Moments and step counts."""
        return self._adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._adam.load_state_dict(copy.deepcopy(state))  # torch would share the moments
