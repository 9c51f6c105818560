"""Centers that are the encoder's outputs at learnt pseudo-inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal
from torch.func import functional_call

from vmm_fast.mixture import gaussian_parameters
from vmm_fast.priors.base import Encoder

__all__ = ["as_pseudo_inputs", "centers_at", "encode_with"]


def as_pseudo_inputs(given: Tensor | nn.Module) -> tuple[nn.Parameter | nn.Module, Tensor]:
    """Return what a prior registers as its pseudo-inputs, and their first tensor [J, ...].

    A tensor is copied. A module's call gives what the encoder takes.
    """
    registered: nn.Parameter | nn.Module
    if isinstance(given, nn.Module):
        registered = given
        with torch.no_grad():
            first = _first_tensor(given())
    elif isinstance(given, Tensor):
        first = given.detach()
        if not first.is_floating_point():
            raise TypeError(
                f"pseudo_inputs must be of a floating dtype, but is {first.dtype}; "
                "convert as you do for the encoder"
            )
        if not first.isfinite().all():
            raise ValueError("pseudo_inputs must be finite, but has a NaN or infinite value")
        registered = nn.Parameter(first.clone())
    else:
        raise TypeError(
            "pseudo_inputs must be a tensor [J, ...] or a torch.nn.Module, "
            f"but is {type(given).__name__}"
        )
    if first.ndim < 1 or len(first) < 1:
        raise ValueError(
            f"pseudo_inputs must have shape [J, ...] with J >= 1, but has {list(first.shape)}"
        )
    return registered, first


def centers_at(
    pseudo_inputs: nn.Parameter | nn.Module,
    encoder: Encoder | None,
    shape: tuple[int, int],
    *,
    differentiable: bool,
    joint: bool,
) -> tuple[Tensor, Tensor]:
    """Return the posteriors' means [J, D] and scales [J, D, D] or [J, D] at pseudo-inputs.

    Parameters
    ----------
    pseudo_inputs : Parameter or Module
    encoder : callable
    shape : tuple of int
        J and D.
    differentiable : bool
        Whether the pseudo-inputs get a gradient.
    joint : bool
        Whether they get it from :meth:`vmm_fast.priors.Prior.kl` as well.
    """
    if differentiable and not joint and isinstance(encoder, _Encoded):
        raise TypeError(
            "encoder must be the network's own where pseudo-inputs get a gradient, but is what "
            "encode gave for kl"
        )
    if isinstance(pseudo_inputs, nn.Module):
        inputs = pseudo_inputs() if differentiable else _without_gradient(pseudo_inputs)
    else:
        inputs = pseudo_inputs if differentiable else pseudo_inputs.detach()
    if not callable(encoder):
        raise TypeError(
            "encoder must be a callable from inputs to a Gaussian distribution, "
            f"but is {type(encoder).__name__}"
        )
    mean, scale = gaussian_parameters(encoder(inputs))
    if mean.shape != shape:
        raise ValueError(
            f"encoder must give {shape[0]} pseudo-inputs means of shape {list(shape)}, "
            f"but gave {list(mean.shape)}"
        )
    return mean, scale


def encode_with(
    pseudo_inputs: nn.Parameter | nn.Module, x: Tensor, encoder: Encoder, joint: bool
) -> tuple[Distribution, Encoder]:
    """Return a batch's posteriors, and an encoder that knows those at the pseudo-inputs.

    See :meth:`vmm_fast.priors.Prior.encode`.
    """
    u = pseudo_inputs
    if not (
        isinstance(u, Tensor)
        and isinstance(x, Tensor)
        and (x.shape[1:], x.dtype, x.device) == (u.shape[1:], u.dtype, u.device)
    ):
        return encoder(x), encoder
    q, at_pseudo_inputs = _split(encoder(torch.cat([x, u if joint else u.detach()])), len(x))
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
