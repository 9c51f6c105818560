"""The empirical-Bayes step by gradient: Adam on the prior's own parameters, and on nothing else."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from vmm_fast import _core
from vmm_fast.inference.processes import sum_over_processes

__all__ = ["PrivateAdam"]

_SUFFIXES = {torch.float32: "_float32", torch.float64: "_float64"}


def _all_finite(x: Tensor) -> bool:
    if x.is_cpu and x.is_contiguous() and x.dtype in _SUFFIXES:
        return getattr(_core, f"all_finite{_SUFFIXES[x.dtype]}")(x.data_ptr(), x.numel())
    return bool(x.isfinite().all())


def _in_core(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> bool:
    """Whether the compiled step serves these tensors, else torch's does."""
    tensors = (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])
    return (
        not torch.compiler.is_compiling()
        and parameter.dtype in _SUFFIXES
        and all(x.is_cpu and x.dtype == parameter.dtype for x in tensors)
        and all(x.is_contiguous() for x in tensors if x is not gradient)
        and state["step"].is_cpu
        and state["step"].dtype == torch.float32
    )


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
    def parameters(self) -> list[torch.nn.Parameter]:
        """Those that a step moves now."""
        (group,) = self._adam.param_groups
        return [p for p in group["params"] if p.requires_grad]

    def descend(self, loss: float | Tensor, gradients: Sequence[Tensor | None]) -> None:
        """Take one step.

        Parameters
        ----------
        loss : float or Tensor
            Must be finite; not used otherwise.
        gradients : sequence of Tensor or None
            One for each of :attr:`parameters`; None lets that parameter stand still.

        Raises
        ------
        FloatingPointError
            If the loss or a gradient is not finite; nothing has changed then.
        """
        processes = sum_over_processes(g for g in gradients if g is not None)
        if processes > 1:
            gradients = [g if g is None else g / processes for g in gradients]
        moved = [(p, g) for p, g in zip(self.parameters, gradients, strict=True) if g is not None]
        if not (math.isfinite(loss) and all(_all_finite(g) for _, g in moved)):
            raise FloatingPointError(
                f"the empirical-Bayes step's loss is {float(loss)} or has a gradient that is not "
                "finite; the prior is unchanged. Lower learning_rate, or check the encoder's output"
            )
        self._follow_parameters()
        states = [self._state(p) for p, _ in moved]
        if all(_in_core(p, g, state) for (p, g), state in zip(moved, states, strict=True)):
            for (p, g), state in zip(moved, states, strict=True):
                self._core_step(p, g.contiguous(), state)
            return
        kept = [p.grad for p in self.parameters]
        try:
            for p, gradient in zip(self.parameters, gradients, strict=True):
                p.grad = gradient
            self._adam.step()
        finally:
            for p, old in zip(self.parameters, kept, strict=True):
                p.grad = old

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Steps and moments, where torch.optim.Adam keeps them."""
        state = self._adam.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _core_step(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
        (group,) = self._adam.param_groups
        getattr(_core, f"adam_step{_SUFFIXES[parameter.dtype]}")(
            group["lr"],
            *group["betas"],
            group["eps"],
            parameter.numel(),
            torch.get_num_threads(),
            gradient.data_ptr(),
            parameter.data_ptr(),
            state["exp_avg"].data_ptr(),
            state["exp_avg_sq"].data_ptr(),
            state["step"].data_ptr(),
        )
        increment_version(parameter)

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
