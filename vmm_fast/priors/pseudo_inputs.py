"""The base of priors whose centers are the encoder's outputs at learnt pseudo-inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal
from torch.func import functional_call

from vmm_fast.mixture import gaussian_parameters
from vmm_fast.priors.base import Encoder, LearntPrior

__all__ = ["PseudoInputsPrior"]


class PseudoInputsPrior(LearntPrior):
    """A prior whose centers are the posteriors of J learnt inputs.

    ``pseudo_inputs`` is a Parameter [J, ...], or a module whose call returns the encoder's input.
    """

    pseudo_inputs: nn.Parameter | nn.Module
    _num_pseudo_inputs: int

    def _set_pseudo_inputs(self, pseudo_inputs: Tensor | nn.Module) -> tuple[int, torch.dtype]:
        """Register the pseudo-inputs; return J and the dtype for the prior's parameters.

        A tensor is copied.
        """
        if isinstance(pseudo_inputs, nn.Module):
            self.pseudo_inputs = pseudo_inputs
            with torch.no_grad():
                first = _first_tensor(pseudo_inputs())
        elif isinstance(pseudo_inputs, Tensor):
            first = pseudo_inputs.detach()
            if not first.is_floating_point():
                raise TypeError(
                    f"pseudo_inputs must be of a floating dtype, but is {first.dtype}; "
                    "convert as you do for the encoder"
                )
            if not first.isfinite().all():
                raise ValueError("pseudo_inputs must be finite, but has a NaN or infinite value")
            self.pseudo_inputs = nn.Parameter(first.clone())
        else:
            raise TypeError(
                "pseudo_inputs must be a tensor [J, ...] or a torch.nn.Module, "
                f"but is {type(pseudo_inputs).__name__}"
            )
        if first.ndim < 1 or len(first) < 1:
            raise ValueError(
                f"pseudo_inputs must have shape [J, ...] with J >= 1, but has {list(first.shape)}"
            )
        self._num_pseudo_inputs = len(first)
        return len(first), torch.float64 if first.dtype == torch.float64 else torch.float32

    # --- encoding ---

    def _centers(self, encoder: Encoder | None, differentiable: bool) -> tuple[Tensor, Tensor]:
        if differentiable and not self.joint and isinstance(encoder, _Encoded):
            raise TypeError(
                "encoder must be the network's own where pseudo-inputs get a gradient, but is what "
                "encode gave for kl"
            )
        u = self.pseudo_inputs
        if isinstance(u, nn.Module):
            inputs = u() if differentiable else _without_gradient(u)
        else:
            inputs = u if differentiable else u.detach()
        if not callable(encoder):
            raise TypeError(
                "encoder must be a callable from inputs to a Gaussian distribution, "
                f"but is {type(encoder).__name__}"
            )
        mean, scale = gaussian_parameters(encoder(inputs))
        if mean.shape != (self._num_pseudo_inputs, self.latent_dim):
            raise ValueError(
                f"encoder must give {self._num_pseudo_inputs} pseudo-inputs means of shape "
                f"{[self._num_pseudo_inputs, self.latent_dim]}, but gave {list(mean.shape)}"
            )
        return mean, scale

    def encode(self, x: Tensor, encoder: Encoder) -> tuple[Distribution, Encoder]:
        """Return a batch's posteriors, and an encoder for :meth:`kl` in the same training step.

        See :meth:`vmm_fast.priors.Prior.encode`.
        """
        u = self.pseudo_inputs
        if not (
            isinstance(u, Tensor)
            and isinstance(x, Tensor)
            and (x.shape[1:], x.dtype, x.device) == (u.shape[1:], u.dtype, u.device)
        ):
            return encoder(x), encoder
        q, at_pseudo_inputs = _split(
            encoder(torch.cat([x, u if self.joint else u.detach()])), len(x)
        )
        return q, _Encoded(at_pseudo_inputs)


class _Encoded:
    """An encoder that returns the posteriors of pseudo-inputs which have been encoded already."""

    def __init__(self, posterior: Distribution):
        self.posterior = posterior

    def __call__(self, inputs: Tensor) -> Distribution:
        return self.posterior


@torch.no_grad()
def _without_gradient(module: nn.Module) -> Any:
    """Return a module's output without gradients, even if the output is one of its parameters."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    return functional_call(module, parameters, ())


def _split(q: Distribution, count: int) -> tuple[Distribution, Distribution]:
    """Return a Gaussian's first ``count`` rows and its other rows as two Gaussians."""
    mean, scale = gaussian_parameters(q)
    sizes = [count, len(mean) - count]
    first, rest = zip(mean.split(sizes), scale.split(sizes), strict=True)
    return _gaussian(*first), _gaussian(*rest)


def _gaussian(mean: Tensor, scale: Tensor) -> Distribution:
    """Return the Gaussian with this mean and scale: the inverse of :func:`gaussian_parameters`."""
    if scale.ndim == 3:
        return MultivariateNormal(mean, scale_tril=scale, validate_args=False)
    return Independent(Normal(mean, scale, validate_args=False), 1, validate_args=False)


def _first_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, dict) else value
    for item in items if isinstance(items, (tuple, list)) or isinstance(value, dict) else ():
        return _first_tensor(item)
    raise TypeError(
        "pseudo_inputs must give a tensor, or a tuple, list or dict of tensors, "
        f"but gave {type(value).__name__}"
    )
