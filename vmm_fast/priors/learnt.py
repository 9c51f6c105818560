"""The base of priors that learn: the empirical-Bayes step, and the mixture that kl keeps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vmm_fast._schema import flag, list_of, optional, table, tensor, whole
from vmm_fast.dispatch import is_transformed
from vmm_fast.inference.closed_form import Statistics
from vmm_fast.inference.gradient import PrivateAdam
from vmm_fast.inference.processes import (
    average_over_processes,
    number_of_processes,
    sum_over_processes,
)
from vmm_fast.mixture import Components
from vmm_fast.priors.base import Encoder, Prior
from vmm_fast.priors.options import LearntOptions

__all__ = ["EmpiricalBayesStep", "LearntPrior"]


class EmpiricalBayesStep(NamedTuple):
    """Loss, gradients and sums of an empirical-Bayes step, and the points it is computed from.

    Attributes
    ----------
    z : Tensor [B, D]
    centers : Tensor [J, D]
    scale : Tensor [J, D, D] or [J, D] or None
    loss : float or Tensor
        In nats per point.
    gradients : sequence of Tensor or None
        One for each parameter that the private Adam moves.
    sums : Statistics or None
        The sums for the closed form, if they are a by-product.
    """

    z: Tensor
    centers: Tensor
    scale: Tensor | None
    loss: float | Tensor
    gradients: Sequence[Tensor | None]
    sums: Statistics | None


@dataclass
class _SinceStep:
    """State of a prior since its pseudo-inputs moved last.

    Attributes
    ----------
    calls : int
        Of ``update``, with the one that moved them.
    kept : Components or None
        The mixture at the centers of the first ``kl`` since, without gradients.
    reused : int
        Gradients of calls of ``kl`` that took the kept mixture again, since a gradient last went
        through a mixture to the encoder: those through it that are still to come.
    reusable : bool
        Whether ``update`` has been called since the last ``kl``. If not, nothing says that the kept
        mixture is recent.
    points : list of Tensor [B, D]
        Of the calls of ``update`` in which pseudo-inputs stood still: the next step is for all.
    """

    calls: int = 0
    kept: Components | None = None
    reused: int = 0
    reusable: bool = False
    points: list[Tensor] = field(default_factory=list)


class LearntPrior(Prior):
    """A prior with an empirical-Bayes step of its own."""

    num_components: int
    pseudo_inputs_per_component = 1
    options: LearntOptions
    _adam: PrivateAdam | None
    _since: _SinceStep

    def _learn(self, parameters: Iterable[nn.Parameter]) -> None:
        """Set up the empirical-Bayes step, which moves these parameters with a private Adam."""
        own = {id(p) for p in self._pseudo_inputs()}
        runs = itertools.groupby(parameters, lambda p: id(p) in own)
        kinds = [(seldom, list(run)) for seldom, run in runs]
        self._seldom = [seldom for seldom, _ in kinds]
        rates = list(zip((x for _, x in kinds), self._rates(), strict=True))
        self._adam = PrivateAdam(rates) if rates and not self.joint else None
        self._since = _SinceStep()
        self._versions: list[int] = []
        self._restored = False  # whether the kept mixture comes from a state that is being loaded
        self.register_load_state_dict_post_hook(_keep_restored)  # type: ignore[no-untyped-call]

    def _rates(self) -> list[float]:
        """Return the rate of each group of parameters: higher for those that move seldom.

        A step's direction is mostly noise of the batch, whose root grows with the number of steps;
        at so many times the rate, cells of several batches had few and mixed clusters.
        """
        rate, root = self.options.learning_rate, self.options.update_every**0.5
        return [root * rate if seldom else rate for seldom in self._seldom]

    def _pseudo_inputs(self) -> Iterable[nn.Parameter]:
        """Return the parameters that reach the mixture through the encoder alone."""
        raise NotImplementedError

    @property
    def is_due(self) -> bool:
        """Return whether the next call of :meth:`update` moves the pseudo-inputs."""
        return self._since.calls % self.options.update_every == 0

    def kl(
        self, q: Distribution, encoder: Encoder | None = None, z: Tensor | None = None
    ) -> Tensor:
        """Return the estimate -H(q) - log p(z) of KL(q || p) [B] in nats; see :meth:`Prior.kl`.

        In training mode pseudo-inputs are encoded in the first call after they have moved. Those up
        to the next such call, which must have the same encoder, take these centers without a
        gradient to the encoder there; the next call that encodes counts it for them too. They are
        encoded anew after any other change of the prior's, and in each call of compiled code.
        """
        if not self._keeps_mixture():
            return super().kl(q, encoder, z)
        kept = self._kept_mixture()
        self._since.reusable = False
        if kept is not None:
            found = kept.kl(self._check_posterior(q), z)
            if found.requires_grad:
                found.register_hook(self._owe)
            return found
        components = self.components(encoder).map(self._weighted())
        if not components.centers.requires_grad:  # the network stands still
            self._since.reused = 0
        found = components.kl(self._check_posterior(q), z)
        # Copied: a posterior's scale may be a parameter of the network, which moves in place.
        self._keep(components.detach().map(torch.clone))
        return found

    def _owe(self, gradient: Tensor) -> None:
        """Count a gradient that did not go through the mixture."""
        self._since.reused += 1

    def _weighted(self) -> Callable[[Tensor], Tensor]:
        """Return the function that makes gradients of a mixture's tensors count for all owed.

        They are counted when the gradient comes: a loss that is only looked at owes and pays none.
        """
        weights: list[int] = []

        def weigh(gradient: Tensor) -> Tensor:
            if not weights:  # the mixture's first tensor
                weights.append(1 + self._since.reused)
                self._since.reused = 0
            return weights[0] * gradient

        def view(x: Tensor) -> Tensor:
            if not x.requires_grad:
                return x
            x = x.view_as(x)
            x.register_hook(weigh)
            return x

        return view

    def _keep(self, mixture: Components | None) -> None:
        """Let the following calls of kl take a mixture, as long as no parameter changes."""
        self._since.kept = mixture
        self._versions = self._parameter_versions()

    def _parameter_versions(self) -> list[int]:
        """Return a number for each parameter, and each buffer of pseudo-inputs that are a module.

        Any change in place raises it.
        """
        tensors: list[Tensor] = [x for x in self._parameters.values() if x is not None]
        for child in self.children():
            tensors += [*child.parameters(), *child.buffers()]
        return [x._version for x in tensors]

    def _recent(self) -> Components | None:
        """Return the mixture that is kept, None if the prior has changed since."""
        return self._since.kept if self._versions == self._parameter_versions() else None

    def _keeps_mixture(self) -> bool:
        """Return whether kl keeps the mixture between two moves of the pseudo-inputs."""
        return (
            self.options.update_every > 1
            and self.training
            and not self.joint
            and not getattr(self, "_is_replica", False)  # of DataParallel, on another device
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not is_transformed()
        )

    def _kept_mixture(self) -> Components | None:
        """Return the mixture that the next kl takes again, None if it builds one."""
        return self._recent() if self._since.reusable and self._keeps_mixture() else None

    def update(self, q_or_z: Distribution | Tensor, encoder: Encoder | None = None) -> None:
        """Take an empirical-Bayes step: the prior moves, the network is held fixed.

        Pseudo-inputs move in the first of ``update_every`` calls, for the points of all since they
        moved last, or in several processes for those of the call in all of them; all else moves in
        each. Nothing happens with ``joint=True``.

        Parameters
        ----------
        q_or_z : Distribution or Tensor [B, D]
            The batch's posteriors, of which one sample is drawn, or a sample of them.
        encoder : callable

        Raises
        ------
        FloatingPointError
            If the loss, a gradient or a sum over points is not finite; no parameter has changed
            then, and points that waited for pseudo-inputs to move are forgotten.
        """
        z = self._latents(q_or_z)
        if self.joint:
            return
        since = self._since
        if self.is_due:
            try:
                self._take_step(z, encoder)
            finally:  # points that cannot be learnt from must not be in the way of later ones
                since.points = []
            since.calls, since.kept = 0, None
        else:
            kept = self._recent()
            self._keep(_averaged(kept, z.device) if since.calls == 1 else kept)
            self._follow(z, encoder)
            if number_of_processes() == 1:  # all go on from the checkpoint of one
                with torch.inference_mode(False):  # an inference tensor could not enter a graph
                    since.points.append(z.clone())
        since.calls += 1
        since.reusable = True

    def _take_step(self, z: Tensor, encoder: Encoder | None) -> None:
        """Take the empirical-Bayes step for points z [B, D] with all parameters."""
        raise NotImplementedError

    def _follow(self, z: Tensor, encoder: Encoder | None) -> None:
        """Take the step with all parameters but pseudo-inputs."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearntPrior:
        """Move and cast as a module does, the mixture that kl keeps too."""
        kept = self._recent()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._keep(None if kept is None else kept.map(fn))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of."""
        since = replace(self._since, kept=self._recent(), points=self._since.points.copy())
        return self.__dict__ | {"_since": since}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, whose parameters' versions are counted from 0 again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._versions = self._parameter_versions()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; after a parameter has changed, the mixture is built anew."""
        if name in ("learning_rate", "update_every"):  # nothing would follow
            raise AttributeError(f"{name} must be given when the prior is made")
        super().__setattr__(name, value)
        if any(name in self.__dict__.get(kind, {}) for kind in ("_parameters", "_modules")):
            self._forget_mixture()

    def _forget_mixture(self) -> None:
        """Let the next kl build the mixture anew."""
        if "_since" in self.__dict__:  # not while the prior is made
            self._since.kept = None

    @property
    def joint(self) -> bool:
        """Return whether :meth:`kl` trains the prior's own parameters too."""
        return self.options.joint

    def _centers(
        self, encoder: Encoder | None, differentiable: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return centers m [J, D] and scales s or None.

        The prior's own parameters get a gradient only if ``differentiable``.
        """
        raise NotImplementedError

    def _mixture(self, centers: Tensor, scale: Tensor | None) -> Components:
        """Return the mixture with given centers; other parameters get no gradient unless joint."""
        raise NotImplementedError

    def _map_gradients(
        self,
        centers: Tensor,
        scale: Tensor | None,
        z: Tensor,
        learnt: Sequence[Tensor],
        batch: int,
    ) -> tuple[float | Tensor, Sequence[Tensor | None], Statistics | None]:
        """Return :meth:`map_loss` at given centers, its gradients by ``learnt``, and the sums.

        ``batch`` is the number of points in one call of :meth:`update`.
        """
        raise NotImplementedError

    def components(self, encoder: Encoder | None = None) -> Components:
        """Return the mixture at this moment, for repeated use; see :meth:`Prior.components`."""
        return self._mixture(*self._centers(encoder, differentiable=self.joint))

    def _learnt(self) -> list[nn.Parameter]:
        """Return the parameters that the private Adam would move now."""
        return [] if self._adam is None else self._adam.parameters

    def _step(self, z: Tensor, encoder: Encoder | None) -> EmpiricalBayesStep:
        """Return the step for points z [B, D] and those since the last one, without taking it."""
        batch = len(z)
        with torch.inference_mode(False), torch.enable_grad():
            z = torch.cat([z, *(points.to(z) for points in self._since.points)])
            centers, scale = self._centers(encoder, differentiable=True)
            gradients = self._map_gradients(centers, scale, z, self._learnt(), batch)
        return EmpiricalBayesStep(z, centers, scale, *gradients)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the private optimizer's state, the options and what kl keeps."""
        private = {} if self._adam is None else self._adam.state_dict()
        kept = self._recent()
        since = vars(self._since) | {
            "kept": None if kept is None else kept.state_dict(),
            "points": self._since.points.copy(),
        }
        return {**private, "options": vars(self.options).copy(), "since_step": since}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`get_extra_state` gave, or raise ValueError if it does not fit."""
        self.check_extra_state(state)
        if not state:  # of a model that was saved without it
            return
        private = _of_optimizer(state)
        if self._adam is not None and private:
            self._adam.load_state_dict(private)
        if "options" in state:
            self.options = self.options.of_state(state["options"])
            if self._adam is not None:
                self._adam.set_rates(self._rates())
        else:  # of a version in which pseudo-inputs moved in every call
            self.options = replace(self.options, update_every=1)  # type: ignore[type-var]
        self._since = _SinceStep(**state.get("since_step", {}))
        self._since.points = self._since.points.copy()
        if self._since.kept is not None:
            device = next(itertools.chain(self.parameters(), self.buffers())).device
            kept = state["since_step"]["kept"].items()
            self._keep(Components(**{name: x.to(device) for name, x in kept}))
            self._restored = True

    def check_extra_state(self, state: Any) -> None:
        """Raise ValueError if a state does not fit; states of old versions have no options."""
        if isinstance(state, dict) and "options" in state:
            found = self.options.of_state(state["options"])
            for name in ("inference", "joint"):  # they decide what else a state holds
                own, other = getattr(self.options, name, None), getattr(found, name, None)
                if own != other:
                    raise ValueError(f"{name} must be {own!r}, as the prior's, but is {other!r}")
        private = _of_optimizer(state)
        if self._adam is not None and private != {}:
            try:
                self._adam.check_state_dict(private)
            except ValueError as error:
                raise ValueError(f"optimizer {error}") from error
        if isinstance(state, dict) and "since_step" in state:
            self._check_since_step(state["since_step"])

    def _check_since_step(self, since: Any) -> None:
        """Raise ValueError unless this is a number of calls and a mixture of this prior's shape."""
        total = self.num_components * self.pseudo_inputs_per_component
        mixture = {
            "centers": tensor(shape=[total, self.latent_dim]),
            "log_weights": tensor(shape=[self.num_components], pruned=True),
        }
        rules = {
            "calls": whole(),
            "kept": optional(table(mixture, tensor())),
            "reused": whole(),
            "reusable": flag,
            "points": list_of(tensor()),
        }
        if isinstance(since, dict):
            since = {"points": [], **since}  # of a version in which none waited
        table(rules, None)("since_step", since)
        if any(x.ndim != 2 or x.shape[1] != self.latent_dim for x in since["points"]):
            raise ValueError(f"since_step.points must be [B, {self.latent_dim}], but are not")
        if (kept := since["kept"]) is not None:
            try:
                Components(**kept)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"since_step.kept must be a mixture, but is not: {error}"
                ) from error
            if not all(x.is_floating_point() for x in kept.values()):
                raise ValueError("since_step.kept must be of a floating dtype, but is not")

    def check_same_run(self, state: Any) -> None:
        """Raise ValueError unless a state has this prior's options; n may follow a schedule."""
        self.check_extra_state(state)
        if "options" in state:
            found = self.options.of_state(state["options"])
            for name, own in vars(self.options).items():
                if name != "data_size" and getattr(found, name) != own:
                    raise ValueError(f"{name} must be {own!r}, but is {getattr(found, name)!r}")
        if self._adam is not None and (private := _of_optimizer(state)) != {}:
            try:
                self._adam.check_same_run(private)
            except ValueError as error:
                raise ValueError(f"optimizer {error}") from error

    def extra_repr(self) -> str:
        """Return the settings as text."""
        options = vars(self.options).copy()
        options.pop("concentration", None)  # where it began
        settings = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{self.num_components}, {self.latent_dim}, {settings}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load a whole state or, if any part does not fit, nothing: parameters match moments."""
        errors: list[str] = args[-1]
        self._restored = False
        own = (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False))
        problems = [
            f"{name} must have shape {list(tensor.shape)}, but has {list(given.shape)}"
            for name, tensor in own
            if isinstance(given := state_dict.get(prefix + name), Tensor)
            and given.shape != tensor.shape
        ]
        private = state_dict.get(f"{prefix}_extra_state")
        if not problems:
            self._forget_mixture()
        if private and not problems:
            try:
                self.check_extra_state(private)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            errors += problems
        else:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _keep_restored(prior: LearntPrior, _: Any) -> None:
    """Let the mixture of a loaded state count as recent, after a module of pseudo-inputs loads."""
    if prior._restored:
        prior._keep(prior._since.kept)
        prior._restored = False


def _averaged(mixture: Components | None, device: torch.device) -> Components | None:
    """Return the mean over all processes, whose encoders may have running statistics of their own.

    All processes must have one prior, and go on with it from the checkpoint of one. It is None
    unless all have a mixture: one may have had no batch.
    """
    if number_of_processes() == 1:
        return mixture
    having = torch.full((), float(mixture is not None), device=device)
    if sum_over_processes([having]) != having or mixture is None:
        return None
    mixture = mixture.map(torch.clone)
    average_over_processes(x for x in (mixture.centers, mixture.scale) if x is not None)
    return mixture


def _of_optimizer(state: Any) -> Any:
    """Return the part of a prior's extra state that is the optimizer's."""
    if not isinstance(state, dict):
        return state
    return {name: value for name, value in state.items() if name != "options"}
