"""The empirical-Bayes step by gradient: Adam on the prior's own parameters, and on nothing else."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from vmm_fast import _core
from vmm_fast.backends import in_memory
from vmm_fast.backends.core import SUFFIXES
from vmm_fast.inference.processes import average_over_processes

__all__ = ["PrivateAdam", "check_adam_state", "check_same_settings"]


def check_adam_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raise ValueError unless a state fits an Adam optimizer and its parameters.

    torch compares only the numbers of parameters. With moments of another size, its compiled steps
    and ours would write out of bounds.
    """
    if not isinstance(state, dict):
        raise ValueError(f"state must be a dict, but is {type(state).__name__}")
    groups, entries = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(entries, dict):
        raise ValueError("state must have param_groups, a list, and state, a dict")
    own = optimizer.param_groups
    if len(groups) != len(own):
        raise ValueError(f"state must have {len(own)} groups of parameters, but has {len(groups)}")
    found: dict[Any, tuple[Tensor, bool]] = {}
    for group, own_group in zip(groups, own, strict=True):
        _check_settings(group, own_group)
        numbers, parameters = group["params"], own_group["params"]
        whole = isinstance(numbers, list) and all(isinstance(each, int) for each in numbers)
        if not whole or len(numbers) != len(parameters):
            raise ValueError(f"state must be of {len(parameters)} parameters, but is of {numbers}")
        amsgrad = group.get("amsgrad", False)
        found |= {
            number: (parameter, amsgrad)
            for number, parameter in zip(numbers, parameters, strict=True)
        }
    for number, entry in entries.items():
        if number not in found:
            raise ValueError(f"state must be of parameters that it lists, but is of {number!r}")
        _check_moments(number, entry, *found[number])


def check_same_settings(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], *, scheduled: bool = False
) -> None:
    """Raise ValueError unless a run that goes on from a state takes the steps that it took before.

    What does not change the steps may differ, and so may the rate if it is scheduled.
    """
    free = {"params", "foreach", "fused"} | ({"lr", "initial_lr"} if scheduled else set())
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        for name in sorted(own.keys() - free):
            if group.get(name, own[name]) != own[name]:
                raise ValueError(f"{name} must be {own[name]}, but is {group[name]!r}")


def _check_settings(group: Any, own: dict[str, Any]) -> None:
    """Raise ValueError unless a group has valid settings for Adam."""
    needed = {"params", "lr", "betas", "eps", "weight_decay"}
    if not isinstance(group, dict) or not needed <= group.keys():
        raise ValueError(f"a group must have {', '.join(sorted(needed))}")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, but are {betas!r}")
    numbers = {name: group[name] for name in ("lr", "eps", "weight_decay")}
    for name, value in (*numbers.items(), ("beta1", betas[0]), ("beta2", betas[1])):
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        below = 1.0 if "beta" in name else math.inf
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < below:
            raise ValueError(f"{name} must be a number in [0, {below:g}), but is {value!r}")
    for name, value in group.items():
        if isinstance(own.get(name, 0.0), (bool, type(None))) and not (
            isinstance(value, bool) or (value is None and own[name] is None)
        ):
            raise ValueError(f"{name} must be True or False, but is {value!r}")
    for name in ("capturable", "differentiable"):  # not every device supports them
        if group.get(name, own[name]) != own[name]:
            raise ValueError(f"{name} must be {own[name]}, but is {group[name]}")


def _check_moments(number: int, entry: Any, parameter: Tensor, amsgrad: bool) -> None:
    """Raise ValueError unless an entry holds the step count and moments of a parameter."""
    names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad
    if not isinstance(entry, dict) or not {"step", *names} <= entry.keys():
        raise ValueError(f"parameter {number} must have steps and moments, but lacks some")
    steps = entry["step"]
    if isinstance(steps, Tensor) and steps.numel() == 1:
        steps = steps.item()
    if isinstance(steps, bool) or not isinstance(steps, (int, float)) or not 0 <= steps < math.inf:
        raise ValueError(f"steps of parameter {number} must be a number of at least 0")
    for name in names:
        moment = entry[name]
        dense = isinstance(moment, Tensor) and moment.layout == torch.strided
        if not dense or moment.is_meta or not moment.is_floating_point():
            raise ValueError(f"{name} of parameter {number} must be a dense floating tensor")
        if moment.shape != parameter.shape:
            raise ValueError(
                f"{name} of parameter {number} must have shape {list(parameter.shape)}, but has "
                f"{list(moment.shape)}"
            )
        if not moment.isfinite().all() or ("sq" in name and (moment < 0).any()):
            sign = " and nowhere negative" if "sq" in name else ""
            raise ValueError(f"{name} of parameter {number} must be finite{sign}, but is not")


def _in_core(moved: Sequence[tuple[Tensor, Tensor]], states: Sequence[dict[str, Tensor]]) -> bool:
    """Return whether the compiled step serves these parameters and gradients."""
    if torch.compiler.is_compiling() or not moved:
        return False
    dtype = moved[0][0].dtype
    if dtype not in SUFFIXES:
        return False
    for (parameter, gradient), state in zip(moved, states, strict=True):
        written = (parameter, state["exp_avg"], state["exp_avg_sq"])
        steps = state["step"]
        if not (
            all(x.is_cpu and x.dtype == dtype and x.is_contiguous() for x in written)
            and all(x.shape == parameter.shape for x in (*written, gradient))
            and gradient.is_cpu
            and gradient.dtype == dtype
            and steps.is_cpu
            and steps.dtype == torch.float32
        ):
            return False
    return True


class PrivateAdam:
    """A prior's own Adam optimizer (Kingma & Ba 2015), apart from the network's.

    A step leaves every ``.grad`` as it was, so it does not interfere with the model's optimizer.
    Gradients are averaged over the processes of ``torch.distributed``.

    Parameters
    ----------
    rates : iterable of (list of Parameter, float)
        Parameters, and the rate of their steps. Those that have no ``requires_grad`` at the time of
        a step stay as they are.
    """

    def __init__(self, rates: Iterable[tuple[list[torch.nn.Parameter], float]]):
        groups = [{"params": parameters, "lr": rate} for parameters, rate in rates]
        # eps is that of the authors' Keras optimizer.
        self._adam = torch.optim.Adam(groups, eps=1e-7)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Parameters that a step would move now: those with ``requires_grad``."""
        every = chain(*(group["params"] for group in self._adam.param_groups))
        return [p for p in every if p.requires_grad]

    def descend(self, loss: float | Tensor, gradients: Sequence[Tensor | None]) -> None:
        """Take one Adam step with the given gradients.

        Parameters
        ----------
        loss : float or Tensor
            Must be finite; not used otherwise.
        gradients : sequence of Tensor or None
            One for each of :attr:`parameters`; a parameter whose gradient is None stays as it is.

        Raises
        ------
        FloatingPointError
            If the loss or a gradient is not finite; nothing has changed then.
        """
        average_over_processes(g for g in gradients if g is not None)
        moved = [(p, g) for p, g in zip(self.parameters, gradients, strict=True) if g is not None]
        self._follow_parameters()
        states = [self._state(p) for p, _ in moved]
        in_core, finite = _in_core(moved, states), math.isfinite(loss)
        if finite and in_core:
            finite = self._core_step(moved, states)
        elif finite:
            finite = all(bool(g.isfinite().all()) for _, g in moved)
        if not finite:
            raise FloatingPointError(
                f"the empirical-Bayes step's loss is {float(loss)} or has a gradient that is not "
                "finite; the prior is unchanged. Lower learning_rate, or check the encoder's output"
            )
        if in_core:
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
        """Return the step count and moments of a parameter, zeros before its first step."""
        return self._adam.state.get(parameter) or {
            "step": torch.zeros((), dtype=torch.float32, device="cpu"),  # as torch's own
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    def _core_step(
        self, moved: Sequence[tuple[Tensor, Tensor]], states: Sequence[dict[str, Tensor]]
    ) -> bool:
        """Take the compiled step; return False, with no change, if a gradient is not finite."""
        groups = self._adam.param_groups
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        moved = [(p, in_memory(g)) for p, g in moved]
        taken: bool = getattr(_core, f"adam_step{SUFFIXES[moved[0][0].dtype]}")(
            *groups[0]["betas"],
            groups[0]["eps"],
            torch.get_num_threads(),
            [
                (
                    rates[id(p)],
                    (
                        p.numel(),
                        g.data_ptr(),
                        p.data_ptr(),
                        state["exp_avg"].data_ptr(),
                        state["exp_avg_sq"].data_ptr(),
                        state["step"].data_ptr(),
                    ),
                )
                for (p, g), state in zip(moved, states, strict=True)
            ],
        )
        if taken:
            for (p, _), state in zip(moved, states, strict=True):
                self._adam.state[p] = state
                increment_version(p)
        return taken

    def _follow_parameters(self) -> None:
        """Give the moments the device and dtype of the parameters, which Module.to() may change."""
        for p, state in self._adam.state.items():
            moment = state["exp_avg"]
            if moment.device != p.device or moment.dtype != p.dtype:
                self._adam.load_state_dict(self._adam.state_dict())
                return

    def set_rates(self, rates: Iterable[float]) -> None:
        """Set the rate of each group of parameters."""
        for group, rate in zip(self._adam.param_groups, rates, strict=True):
            group["lr"] = rate

    def _grouped(self, state: Any) -> Any:
        """Return a state in these groups; versions that had one rate had one group."""
        own = self._adam.param_groups
        groups = state.get("param_groups") if isinstance(state, dict) else None
        if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], dict):
            return state
        numbers = groups[0].get("params")
        if not isinstance(numbers, list) or len(numbers) != sum(len(g["params"]) for g in own):
            return state
        rest = iter(numbers)
        split = [{**groups[0], "params": list(islice(rest, len(g["params"])))} for g in own]
        return {**state, "param_groups": split}

    def state_dict(self) -> dict[str, Any]:
        """Return the moments, step counts and settings, as ``torch.optim.Adam`` does."""
        return self._adam.state_dict()

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ValueError unless a state is a :meth:`state_dict` that fits these parameters."""
        state = self._grouped(state)
        check_adam_state(self._adam, state)
        for name in ("betas", "eps"):  # of the compiled step, which is one for all
            if len({str(group[name]) for group in state["param_groups"]}) > 1:
                raise ValueError(f"{name} must be the same for all parameters, but are not")

    def check_same_run(self, state: dict[str, Any]) -> None:
        """Raise ValueError unless a :meth:`state_dict` is of a run with these settings."""
        check_same_settings(self._adam, self._grouped(state))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a :meth:`state_dict`; if it does not fit, raise ValueError and change nothing."""
        self.check_state_dict(state)
        state = copy.deepcopy(self._grouped(state))
        self._adam.load_state_dict(state)  # torch would share the moments
