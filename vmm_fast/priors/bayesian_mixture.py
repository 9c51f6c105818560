"""The base of VMMPrior and GaussianMixturePrior: a Bayesian Gaussian mixture without centers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vmm_fast._checks import check_integer
from vmm_fast.inference import empirical_bayes
from vmm_fast.inference.closed_form import Statistics, summed_over_processes
from vmm_fast.inference.empirical_bayes import MixtureParameters, Objective, Running
from vmm_fast.inference.processes import number_of_processes
from vmm_fast.mixture import Components
from vmm_fast.priors.base import Encoder
from vmm_fast.priors.learnt import LearntPrior
from vmm_fast.priors.options import MixtureOptions

__all__ = ["BayesianMixturePrior"]


class BayesianMixturePrior(LearntPrior):
    """A Bayesian mixture's weights, precisions and concentration, and their empirical-Bayes step.

    :class:`vmm_fast.VMMPrior` describes the parameters.
    """

    options: MixtureOptions

    def __init__(
        self,
        num_components: int,
        latent_dim: int,
        pseudo_inputs_per_component: int,
        options: MixtureOptions,
        dtype: torch.dtype,
    ):
        latent_dim = self.latent_dim = check_integer("latent_dim", latent_dim)
        self.num_components = num_components
        self.pseudo_inputs_per_component = pseudo_inputs_per_component
        self.options = options
        self.logits = nn.Parameter(torch.zeros(num_components, dtype=dtype))
        self.raw_precision = nn.Parameter(
            torch.zeros(num_components, latent_dim, latent_dim, dtype=dtype)
        )
        self.raw_alpha = nn.Parameter(
            torch.zeros((), dtype=dtype), requires_grad=options.map_prior == "learnt"
        )
        self.precision_cholesky = torch.eye(latent_dim, dtype=dtype).expand(num_components, -1, -1)
        self.concentration = options.concentration
        if options.inference == "closed-form":
            self._register_running_statistics()
        self._learn(self.parameters() if options.inference == "gradient" else self._pseudo_inputs())

    # --- state ---

    @property
    def precision_cholesky(self) -> Tensor:
        """Lower-triangular L [C, D, D] of the precisions Lambda_c = L_c L_c^T. Settable."""
        return empirical_bayes.precision_cholesky(self.raw_precision)

    @precision_cholesky.setter
    def precision_cholesky(self, value: Tensor) -> None:
        raw = self.raw_precision
        value = torch.as_tensor(value, dtype=raw.dtype, device=raw.device).detach()
        if value.shape != raw.shape:
            raise ValueError(
                f"precision_cholesky must have shape {list(raw.shape)}, but has {list(value.shape)}"
            )
        diagonal = value.diagonal(dim1=-2, dim2=-1)
        if not value.isfinite().all() or not (diagonal > 0).all():
            raise ValueError("precision_cholesky must be finite with a positive diagonal")
        if (value.triu(1) != 0).any():
            raise ValueError("precision_cholesky must be lower triangular")
        with torch.no_grad():
            raw.copy_(empirical_bayes.raw_precision(value))
        self._forget_mixture()

    @property
    def concentration(self) -> Tensor:
        """The Dirichlet process's concentration gamma, a scalar; alpha = 1 / gamma. Settable."""
        return empirical_bayes.concentration(self.raw_alpha)

    @concentration.setter
    def concentration(self, value: float | Tensor) -> None:
        value = torch.as_tensor(value, dtype=torch.float64).detach()
        if value.ndim or not 0 < value < math.inf:
            raise ValueError(f"concentration must be a finite number above 0, but is {value}")
        with torch.no_grad():
            self.raw_alpha.copy_(empirical_bayes.raw_alpha(value))

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the two properties call their setters, even for a Parameter."""
        if name in ("precision_cholesky", "concentration"):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def data_size(self) -> int | None:
        """Number of points n that weigh against the parameter priors, None for the batch's.

        Settable between steps. ``state_dict`` keeps it, as it keeps all options.
        """
        return self.options.data_size

    @data_size.setter
    def data_size(self, value: int | None) -> None:
        self.options = replace(self.options, data_size=value)

    def _objective(self, points: int) -> Objective:
        """Return the objective of a step for so many points in this process."""
        return Objective(
            self.options.map_prior,
            self.options.weights,
            self.options.discount,
            self.options.responsibility_gradient,
            self.data_size or points * number_of_processes(),
        )

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the optimizer's state and the options, or raise ValueError if they do not fit."""
        super().set_extra_state(state)
        if self._free_centers:  # versions had such a number for them, too
            self.options = replace(self.options, update_every=1)
        if "options" in state and self.logits.requires_grad:  # else it is frozen, and stays so
            self.raw_alpha.requires_grad_(self.options.map_prior == "learnt")

    # --- the mixture ---

    _free_centers: bool  # whether the centers are parameters of their own

    def _mixture_parameters(self, centers: Tensor, scale: Tensor | None) -> MixtureParameters:
        return MixtureParameters(centers, scale, self.raw_precision, self.logits, self.raw_alpha)

    def _mixture(self, centers: Tensor, scale: Tensor | None) -> Components:
        return self._mixture_parameters(centers, scale).components(fixed=not self.joint)

    # --- the empirical-Bayes step ---

    def map_loss(self, z: Tensor, encoder: Encoder | None = None) -> Tensor:
        """Return the negative empirical-Bayes objective, a scalar in nats per point.

        -(1/n) [ sum_i sum_j q_ij l_ij
                 + log p(pi) + log p(alpha) + sum log p(mu) + sum log p(Lambda) ]

        with n = B for the data term; the parameter priors weigh 1 / ``data_size`` (1/B for None).
        See :mod:`vmm_fast.inference.map_objective` for the densities. ``map_prior="none"`` leaves
        out all parameter priors, ``"fixed"`` that of alpha. Gradients reach the prior's parameters,
        ``z`` and the encoder; :meth:`update` uses those of the parameters alone.
        """
        parameters = self._mixture_parameters(*self._centers(encoder, differentiable=True))
        return empirical_bayes.map_loss(parameters, z, self._objective(len(z)))

    def _map_gradients(
        self,
        centers: Tensor,
        scale: Tensor | None,
        z: Tensor,
        learnt: Sequence[Tensor],
        batch: int,
    ) -> tuple[float | Tensor, Sequence[Tensor | None], Statistics | None]:
        return empirical_bayes.map_gradients(
            self._mixture_parameters(centers, scale),
            z,
            self._objective(batch),
            learnt,
            with_sums=self.options.inference == "closed-form",
        )

    def update(self, q_or_z: Distribution | Tensor, encoder: Encoder | None = None) -> None:
        """Take an empirical-Bayes step; see :meth:`LearntPrior.update`."""
        if self.options.map_prior != "learnt" and self.raw_alpha.requires_grad:
            self.raw_alpha.requires_grad_(False)  # as after model.requires_grad_(True)
        super().update(q_or_z, encoder)

    def _take_step(self, z: Tensor, encoder: Encoder | None) -> None:
        """Take one Adam step on :meth:`map_loss`, or one step of online EM.

        In closed form weights, concentration and precisions (and free centers) jump to their
        maximisers under a decaying average of the batches' statistics; pseudo-inputs take an Adam
        step.
        """
        step = self._step(z, encoder)
        closed_form = self.options.inference == "closed-form"
        centers, scale = step.centers, step.scale
        if closed_form and not self._free_centers:
            centers = _unshared(centers, self._learnt())
            scale = None if scale is None else _unshared(scale, self._learnt())
        if self._adam is not None:
            self._adam.descend(step.loss, step.gradients)
        if closed_form:
            alone = len(step.z) == len(z)  # whose sums are the step's
            self._online_step(centers, scale, z, step.sums if alone else None)

    def _follow(self, z: Tensor, encoder: Encoder | None) -> None:
        """Take a step with all but the pseudo-inputs, around the centers that kl keeps.

        With an eighth of the batches, at eight times the rate too, images and cells had fewer and
        mixed clusters.
        """
        kept = self._since.kept
        if kept is None:
            with torch.no_grad():
                centers, scale = self._centers(encoder, differentiable=True)
        else:
            centers, scale = kept.centers, kept.scale
        if self.options.inference == "closed-form":
            self._online_step(centers, scale, z)
        elif self._adam is not None:
            own = {id(p) for p in self._pseudo_inputs()}
            moved = [p for p in self._learnt() if id(p) not in own]
            with torch.inference_mode(False), torch.enable_grad():
                loss, found, _ = self._map_gradients(centers, scale, z, moved, len(z))
            gradients = {id(p): g for p, g in zip(moved, found, strict=True)}
            self._adam.descend(loss, [gradients.get(id(p)) for p in self._learnt()])
        if kept is not None:
            self._keep(self._mixture(centers, scale).detach())

    @torch.no_grad()
    def _online_step(
        self, centers: Tensor, scale: Tensor | None, z: Tensor, sums: Statistics | None = None
    ) -> None:
        empirical_bayes.online_step(
            self._mixture_parameters(centers, scale),
            z,
            self._running,
            self._objective(len(z)),
            rate=self.options.statistics_rate,
            free_centers=self._free_centers,
            sums=sums,
        )

    running_N: Tensor
    running_s: Tensor
    running_M: Tensor
    running_centers: Tensor
    running_steps: Tensor

    def _register_running_statistics(self) -> None:
        total, dim = self.num_components * self.pseudo_inputs_per_component, self.latent_dim
        for name, shape in (("N", ()), ("s", (dim,)), ("M", (dim, dim)), ("centers", (dim,))):
            self.register_buffer(f"running_{name}", torch.zeros(total, *shape, dtype=torch.float64))
        self.register_buffer("running_steps", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BayesianMixturePrior:
        """Move and cast as a module does, but keep running sums in float64 for compiled code."""
        before = [(k, v) for k, v in self.named_buffers(recurse=False) if v.is_floating_point()]
        super()._apply(fn, recurse)
        for name, old in before:
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self

    @property
    def _running(self) -> Running:
        sums = Statistics(self.running_N, self.running_s, self.running_M, self.running_centers)
        return Running(sums, self.running_steps)

    @torch.no_grad()
    def fit(
        self,
        z: Tensor | Iterable[Tensor],
        encoder: Encoder | None = None,
        *,
        weights: Tensor | None = None,
        max_iterations: int = 100,
        tolerance: float = 1e-6,
    ) -> list[float]:
        """Run exact closed-form EM over a whole data set and return the objective's history.

        Pseudo-inputs and network do not change. Each iteration is a pass over the points for the
        statistics and the objective, and one exact M-step in which the parameter priors have their
        full-data weight (n is the number of points).

        Parameters
        ----------
        z : Tensor [N, D] or iterable of Tensor [B, D]
            Points; an iterable is read once in each iteration and must be repeatable.
        encoder : callable
        weights : Tensor [N], optional
            How many points each counts as, in the order in which they are read; at least 0.
        max_iterations : int
        tolerance : float
            Stop when the objective gains less than this, in nats per point, or falls.

        Returns
        -------
        list of float
            The objective before each iteration, in nats per point: the mean log-sum-exp of the
            expected log-joint, plus the parameters' log-priors divided by the number of points.
            With Dirichlet weights of a fixed concentration it never falls.

        Raises
        ------
        ValueError
            If there are no points, or an iterable can be read only once, or ``weights`` is not as
            described.
        """
        if weights is not None and not ((weights >= 0) & weights.isfinite()).all():
            raise ValueError("weights must be finite numbers of at least 0, but are not")
        batches = (z,) if isinstance(z, Tensor) else z
        if iter(batches) is batches:
            raise ValueError(
                "z must be repeatable, such as a list or a DataLoader, not an iterator"
            )
        history: list[float] = []
        for _ in range(max_iterations):
            parameters = self._mixture_parameters(*self._centers(encoder, differentiable=True))
            components = parameters.components()
            sums: Statistics | None = None
            count, total, read = 0.0, 0.0, 0
            for batch in batches:
                if len(batch) == 0:
                    continue
                points = self._latents(batch)
                own = None if weights is None else weights[read : read + len(batch)]
                read += len(batch)
                if own is not None and len(own) != len(batch):
                    break
                part, part_total = empirical_bayes.statistics(parameters, points, own)
                sums = part if sums is None else sums.plus(part)
                if part_total is None:
                    lse, _ = components.log_joint_expectation(points)
                    part_total = float((lse.double() if own is None else lse * own.double()).sum())
                total += part_total
                count += len(batch) if own is None else float(own.sum(dtype=torch.float64))
            if weights is not None and read != len(weights):
                raise ValueError(f"weights must be of as many points as z, but has {len(weights)}")
            if sums is None or count == 0:
                raise ValueError("z must have at least one point, but is empty")
            sums, (count, total) = summed_over_processes(sums, count, total)
            objective = self._objective(int(count))
            log_prior = empirical_bayes.log_parameter_prior(parameters, components, objective)
            history.append((total + float(log_prior)) / count)
            if len(history) > 1 and history[-1] - history[-2] < tolerance:
                break
            empirical_bayes.maximise(parameters, sums, objective, self._free_centers)
            self._forget_mixture()
        return history


def _unshared(x: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Return a copy of a tensor that shares memory with a parameter, else the tensor itself.

    The private Adam is about to move the parameters, and an encoder may return views of them.
    """
    memory = x.untyped_storage().data_ptr()
    shared = any(memory == p.untyped_storage().data_ptr() for p in parameters)
    return x.detach().clone() if shared else x
