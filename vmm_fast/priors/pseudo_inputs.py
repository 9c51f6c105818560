"""What priors share whose centers are the encoder's outputs at learnt pseudo-inputs.

With ``reuse_encoding`` the two steps of training share one encoding of the pseudo-inputs u: `kl`
encodes an alias of u, so that the gradient of the empirical-Bayes objective can be taken through
the same graph, with the same z, and `update` has nothing left to do but to move. The alias shares
u's memory, and collects in u's stead the gradient that the variational step must not give it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal
from torch.func import functional_call

from vmm_fast.mixture import check_sample, gaussian_parameters, gaussian_sample
from vmm_fast.priors.base import EmpiricalBayesStep, Encoder, LearntPrior

__all__ = ["PseudoInputsPrior"]


class PseudoInputsPrior(LearntPrior):
    """J learnt inputs whose posteriors are the components' centers.

    ``pseudo_inputs`` is a Parameter [J, ...] or a module whose call gives what the encoder takes.
    """

    pseudo_inputs: nn.Parameter | nn.Module
    reuse_encoding: bool
    _num_pseudo_inputs: int
    _kept: EmpiricalBayesStep | None = None  # of the last `kl`, until `update` takes it

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is kept between two calls of one training step."""
        return {k: v for k, v in self.__dict__.items() if k != "_kept"}

    def _set_pseudo_inputs(self, pseudo_inputs: Tensor | nn.Module) -> tuple[int, torch.dtype]:
        """Register them (a tensor is copied); returns J and the dtype of the prior's parameters."""
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
        return self._encoded(inputs, encoder)

    def _encoded(self, inputs: Any, encoder: Encoder | None) -> tuple[Tensor, Tensor]:
        """m [J, D] and s [J, D(, D)] of the pseudo-inputs."""
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
        """Posteriors of a batch, and what :meth:`kl` takes in place of ``encoder`` in this step.

        See :meth:`vmm_fast.priors.Prior.encode`. With ``reuse_encoding`` there are two calls: the
        empirical-Bayes gradient must not run back through the batch's rows.
        """
        u = self.pseudo_inputs
        if self.reuse_encoding or not (
            isinstance(u, Tensor)
            and isinstance(x, Tensor)
            and (x.shape[1:], x.dtype, x.device) == (u.shape[1:], u.dtype, u.device)
        ):
            return encoder(x), encoder
        q, at_pseudo_inputs = _split(
            encoder(torch.cat([x, u if self.joint else u.detach()])), len(x)
        )
        return q, _Encoded(at_pseudo_inputs)

    # --- one encoding for both steps ---

    def kl(
        self, q: Distribution, encoder: Encoder | None = None, z: Tensor | None = None
    ) -> Tensor:
        """Estimate KL(q || p) [B]; see :meth:`vmm_fast.priors.Prior.kl`.

        With ``reuse_encoding``, and where gradients are enabled in eager mode, the empirical-Bayes
        step of ``z`` is evaluated along with it and kept for :meth:`update`.
        """
        reused = self.reuse_encoding and not self.joint and torch.is_grad_enabled()
        if torch.compiler.is_compiling() or not reused:
            return super().kl(q, encoder, z)
        mean, _ = gaussian_parameters(self._check_posterior(q))
        z = gaussian_sample(q) if z is None else check_sample(z, mean)
        if len(z) == 0:  # no step can be taken with it
            return super().kl(q, encoder, z)
        inputs, aliases = self._aliased()
        centers, scale = self._encoded(inputs, encoder)
        kl = self._mixture(centers, scale).kl(q, z)
        learnt = [aliases.get(p, p) for p in self._learnt()]
        points = self._latents(z)
        gradients = self._map_gradients(centers, scale, points, learnt, retain_graph=True)
        self._kept = EmpiricalBayesStep(points, centers.detach(), scale.detach(), *gradients)
        return kl

    def _aliased(self) -> tuple[Any, dict[nn.Parameter, Tensor]]:
        """Inputs for the encoder, and by parameter the alias that stands for it in their graph."""
        u = self.pseudo_inputs
        if isinstance(u, nn.Module):
            named = dict(u.named_parameters())
            aliases = {
                name: p.detach().requires_grad_(p.requires_grad) for name, p in named.items()
            }
            return functional_call(u, aliases, ()), {p: aliases[name] for name, p in named.items()}
        alias = u.detach().requires_grad_(u.requires_grad)
        return alias, {u: alias}

    def _step(self, z: Tensor, encoder: Encoder | None) -> EmpiricalBayesStep:
        kept, self._kept = self._kept, None
        if kept is not None and _same_tensor(kept.z, z):
            return kept
        return super()._step(z, encoder)


class _Encoded:
    """Takes the encoder's place where the pseudo-inputs have been encoded already."""

    def __init__(self, posterior: Distribution):
        self.posterior = posterior

    def __call__(self, inputs: Tensor) -> Distribution:
        return self.posterior


@torch.no_grad()
def _without_gradient(module: nn.Module) -> Any:
    """Its output where nothing has a gradient, not a parameter either that it gives as it is."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    return functional_call(module, parameters, ())


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one in memory; comparing values would wait for a GPU."""
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (
        b.data_ptr(),
        b.shape,
        b.stride(),
        b.dtype,
    )


def _split(q: Distribution, count: int) -> tuple[Distribution, Distribution]:
    """Divide a Gaussian [B, D] into its first ``count`` rows and the rest."""
    mean, scale = gaussian_parameters(q)
    sizes = [count, len(mean) - count]
    first, rest = zip(mean.split(sizes), scale.split(sizes), strict=True)
    return _gaussian(*first), _gaussian(*rest)


def _gaussian(mean: Tensor, scale: Tensor) -> Distribution:
    """Invert :func:`gaussian_parameters`."""
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
