"""The empirical-Bayes steps of a Bayesian mixture, in compiled code where there is any.

The core (``csrc/empirical_bayes.h``, with formulas and sources) serves parameters in float32 or
float64 on a CPU, in eager mode. On GPUs the gradients come from ``kernels/empirical_bayes.py``, up
to :data:`vmm_fast.operations.LARGEST_COMPONENT_DIM` dimensions. Elsewhere the same steps run in
plain torch: :mod:`map_objective`, differentiated by autograd, and :mod:`closed_form` are their
definitions.
This module alone decides which code runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.functional import softplus

from vmm_fast import _core
from vmm_fast.backends import core_serves, in_kernels, in_memory, kernels_serve
from vmm_fast.backends.core import SUFFIXES
from vmm_fast.backends.plain import check_log_weights
from vmm_fast.dispatch import is_transformed
from vmm_fast.inference import closed_form, map_objective
from vmm_fast.inference.closed_form import Statistics
from vmm_fast.mixture import Components
from vmm_fast.operations import LARGEST_COMPONENT_DIM
from vmm_fast.reference import precision_cholesky

__all__ = [
    "MixtureParameters",
    "Objective",
    "Running",
    "concentration",
    "map_gradients",
    "map_loss",
    "maximise",
    "online_step",
    "precision_cholesky",
    "raw_alpha",
    "raw_precision",
    "statistics",
]


class Objective(NamedTuple):
    """Settings of the objective, with the meaning that :class:`vmm_fast.VMMPrior` gives them.

    ``data_size`` is the number n of points that weigh against the priors.
    """

    map_prior: str
    weights: str
    discount: float
    responsibility_gradient: bool
    data_size: int


class MixtureParameters(NamedTuple):
    """Stored parameters of a Bayesian mixture: J centers, C components, K = J / C of each.

    Attributes
    ----------
    centers : Tensor [J, D]
    scale : Tensor [J, D, D] or [J, D] or None
        s, lower triangular or diagonal; None for S = 0.
    raw_precision : Tensor [C, D, D]
        L = tril(raw, -1) + diag softplus(diag raw).
    logits : Tensor [C]
        pi = softmax(logits).
    raw_alpha : Tensor, scalar
        1 / gamma = softplus(raw_alpha).
    """

    centers: Tensor
    scale: Tensor | None
    raw_precision: Tensor
    logits: Tensor
    raw_alpha: Tensor

    def components(self, fixed: bool = False) -> Components:
        """Return the mixture; gradients reach all five tensors, or centers and scale if ``fixed``.

        Raises
        ------
        ValueError
            On CPUs, if no logit is finite, or one is NaN or inf.
        """
        _, _, *learnt = self
        fixed = fixed or not (torch.is_grad_enabled() and any(x.requires_grad for x in learnt))
        suffix = _in_core(self)
        if suffix and fixed:
            log_weights = _empty(self.logits)
            precision = _empty(self.raw_precision)
            view = _CoreParameters(self, suffix).view
            threads = torch.get_num_threads()
            _call("constrained", suffix, view, threads, precision, log_weights)
            return Components(self.centers, log_weights, precision, self.scale)
        if fixed and kernels_serve(self.logits) and _alike(self, None):
            return Components.from_stored(self.centers, self.logits, self.raw_precision, self.scale)
        dtype = self.centers.dtype
        with torch.set_grad_enabled(not fixed):
            log_weights = self.logits.log_softmax(-1).to(dtype)
            precision = precision_cholesky(self.raw_precision).to(dtype)
        # On GPUs, which give NaN instead, the check would wait for the device.
        look = self.logits.is_cpu and not torch.compiler.is_compiling()
        if look:
            check_log_weights("logits", self.logits)
        return Components(self.centers, log_weights, precision, self.scale)


def raw_precision(precision_cholesky: Tensor) -> Tensor:
    """Return the unconstrained form of L: the inverse of :func:`precision_cholesky`."""
    diagonal = precision_cholesky.diagonal(dim1=-2, dim2=-1)
    return precision_cholesky.tril(-1) + torch.diag_embed(_inverse_softplus(diagonal))


def concentration(raw_alpha: Tensor) -> Tensor:
    """Return gamma = 1 / softplus(raw_alpha), from the unconstrained form of alpha = 1 / gamma."""
    return 1 / softplus(raw_alpha)


def raw_alpha(concentration: Tensor) -> Tensor:
    """Return the unconstrained form of alpha = 1 / gamma: the inverse of :func:`concentration`."""
    return _inverse_softplus(1 / concentration)


def _inverse_softplus(x: Tensor) -> Tensor:
    # log(e^x - 1) = x + log(1 - e^-x)
    return x + torch.log(-torch.expm1(-x))


# --- the compiled core: addresses and sizes ---


def _in_core(parameters: MixtureParameters, z: Tensor | None = None) -> str | None:
    """Return the suffix of the core's functions for these tensors, None if it has none."""
    served = core_serves(parameters.logits) and _alike(parameters, z)
    return SUFFIXES[parameters.logits.dtype] if served else None


def _alike(parameters: MixtureParameters, z: Tensor | None) -> bool:
    """Return whether the tensors suit compiled code: one device, one dtype, few dimensions."""
    centers, scale, *stored = parameters
    logits = parameters.logits
    given = [x for x in (centers, scale, z) if x is not None]
    return (
        not torch.compiler.is_compiling()
        and not is_transformed()
        and logits.dtype in SUFFIXES
        and (core_serves(logits) or parameters.raw_precision.shape[-1] <= LARGEST_COMPONENT_DIM)
        and all(x.device == logits.device and x.dtype == logits.dtype for x in (*stored, *given))
        and all(x.is_contiguous() and not x.is_neg() for x in stored)  # written in place
    )


def _empty(x: Tensor) -> Tensor:
    """Return a contiguous tensor like another, to be filled."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _widened(z: Tensor) -> Tensor:
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def _call(name: str, suffix: str, *arguments: Any) -> Any:
    return getattr(_core, name + suffix)(
        *(x.data_ptr() if isinstance(x, Tensor) else 0 if x is None else x for x in arguments)
    )


class _CoreParameters:
    """Addresses of parameters for the core (``view``), with the tensors that must stay alive."""

    def __init__(self, parameters: MixtureParameters, suffix: str):
        centers, scale, *stored = parameters
        self.centers = in_memory(centers)
        self.scale = None if scale is None else in_memory(scale)
        full_scale = scale is not None and scale.ndim == 3
        count, (total, dim) = len(parameters.logits), centers.shape
        self.view = _call(
            "MixtureParameters",
            suffix,
            self.centers,
            self.scale,
            full_scale,
            *stored,
            count,
            total // count,
            dim,
        )


@functools.lru_cache(maxsize=16)
def _core_priors(objective: Objective) -> Any:
    weights = {
        "dirichlet": _core.Weights.dirichlet,
        "stick-breaking": _core.Weights.stick_breaking,
    }
    map_prior = getattr(_core.MapPrior, objective.map_prior)
    return _core.ParameterPriors(map_prior, weights[objective.weights], objective.discount)


def _core_learnt(parameters: MixtureParameters, free_centers: bool) -> Any:
    centers, _, *stored = parameters
    return _core.Learnt(free_centers and centers.requires_grad, *(x.requires_grad for x in stored))


def _written(parameters: MixtureParameters, free_centers: bool) -> None:
    """Tell autograd that parameters were written in place, as torch's own operations do."""
    for x in parameters[2:] if not free_centers else (parameters.centers, *parameters[2:]):
        if x.requires_grad:
            increment_version(x)


# --- the gradient step ---


def map_loss(parameters: MixtureParameters, z: Tensor, objective: Objective) -> Tensor:
    """Return :func:`map_objective.map_loss` of ``parameters``, differentiable in all of them."""
    components = parameters.components()
    return map_objective.map_loss(
        components,
        z,
        log_parameter_prior(parameters, components, objective),
        responsibility_gradient=objective.responsibility_gradient,
        data_size=objective.data_size,
    )


def log_parameter_prior(
    parameters: MixtureParameters, components: Components, objective: Objective
) -> Tensor | float:
    """Return the sum of the log-priors of all parameters; 0 for ``map_prior="none"``."""
    if objective.map_prior == "none":
        return 0.0
    return map_objective.log_parameter_prior(
        components,
        concentration(parameters.raw_alpha),
        weights=objective.weights,
        discount=objective.discount,
        learnt_concentration=objective.map_prior == "learnt",
    )


def map_gradients(
    parameters: MixtureParameters,
    z: Tensor,
    objective: Objective,
    learnt: Sequence[Tensor],
    *,
    with_sums: bool = False,
) -> tuple[float | Tensor, list[Tensor | None], Statistics | None]:
    """Return the value and the gradients of :func:`map_loss`.

    Parameters
    ----------
    parameters : MixtureParameters
        ``centers`` and ``scale`` may come from an encoder, with a graph.
    z : Tensor [B, D]
    objective : Objective
    learnt : sequence of Tensor
        What to differentiate by: tensors of ``parameters``, or those that centers and scales were
        computed from.
    with_sums : bool
        Whether to return the sums for the closed form too, if they are a by-product.

    Returns
    -------
    loss : float or Tensor
        In nats per point; 0 where it depends on none of ``learnt``.
    gradients : list of Tensor or None
        One for each of ``learnt``; None where the loss does not depend on it.
    sums : Statistics or None
        What :func:`statistics` returns; None if they are not a by-product.

    Raises
    ------
    TypeError, ValueError
        As :mod:`vmm_fast.ops` and :class:`vmm_fast.Components` say.
    """
    z = _widened(z)
    if not _alike(parameters, z):
        return _map_gradients_in_torch(parameters, z, objective, learnt)

    # Without priors the loss does not depend on the concentration.
    stored = parameters[2:] if objective.map_prior != "none" else parameters[2:-1]
    upstream = [x for x in learnt if all(x is not y for y in parameters[2:])]
    passed = [x for x in parameters[:2] if x is not None and x.requires_grad and upstream]
    own = [x for x in stored if any(x is y for y in learnt)]
    if not passed and not own:
        return 0.0, [None] * len(learnt), None
    loss: float | Tensor
    if core_serves(z):
        with_sums = with_sums and all(x is not parameters.raw_precision for x in own)
        loss, gradients, sums = _map_gradients_in_core(
            parameters, z, objective, (*passed, *own), with_sums
        )
    else:
        found = _map_gradients_in_kernels(parameters, z, objective)
        if found is None:
            return _map_gradients_in_torch(parameters, z, objective, learnt)
        (loss, gradients), sums = found, None
    through: dict[int, Tensor | None] = {id(x): gradients[id(x)] for x in own}
    if passed:
        arrived = [gradients[id(x)] for x in passed]
        left = torch.autograd.grad(passed, upstream, arrived, allow_unused=True)
        through |= {id(x): g for x, g in zip(upstream, left, strict=True)}
    return loss, [through.get(id(x)) for x in learnt], sums


def _map_gradients_in_torch(
    parameters: MixtureParameters,
    z: Tensor,
    objective: Objective,
    learnt: Sequence[Tensor],
) -> tuple[float | Tensor, list[Tensor | None], None]:
    loss = map_loss(parameters, z, objective)
    if not learnt or not loss.requires_grad:
        return 0.0, [None] * len(learnt), None
    found = torch.autograd.grad(loss, learnt, allow_unused=True)
    return loss.detach(), list(found), None


def _map_gradients_in_core(
    parameters: MixtureParameters,
    z: Tensor,
    objective: Objective,
    wanted: Sequence[Tensor],
    with_sums: bool,
) -> tuple[float, dict[int, Tensor], Statistics | None]:
    """Return the loss, the gradients by the ids of the parameters, and the sums."""
    gradients = {id(x): _empty(x) for x in wanted}
    suffix = SUFFIXES[z.dtype]
    core_parameters = _CoreParameters(parameters, suffix)
    z = in_memory(z)
    sums = _empty_statistics(parameters) if with_sums else None
    loss = _call(
        "map_gradients",
        suffix,
        core_parameters.view,
        z,
        len(z),
        _core_priors(objective),
        objective.responsibility_gradient,
        1 / objective.data_size,
        torch.get_num_threads(),
        *(gradients.get(id(x)) for x in parameters),
        *(sums[:3] if sums else (None, None, None)),
    )
    return loss, gradients, sums


def _map_gradients_in_kernels(
    parameters: MixtureParameters, z: Tensor, objective: Objective
) -> tuple[Tensor, dict[int, Tensor]] | None:
    """Return the loss and all gradients by parameters' ids; None if no kernels serve z's device."""
    count, (total, dim) = len(parameters.logits), parameters.centers.shape
    normaliser = -count * map_objective.log_wishart_normaliser(count, dim)
    normaliser -= 0.5 * total * dim * math.log(2 * math.pi)
    inputs = (x if x is None else in_memory(x.detach()) for x in (*parameters, z))
    found = in_kernels(
        "map_gradients",
        z,
        dim,
        (
            *inputs,
            objective,
            map_objective.wishart_scale(count, dim),
            normaliser,
            map_objective.LOG_WEIGHT_FLOOR,
        ),
    )
    if found is None:
        return None
    loss, gradients = found
    return loss, {id(x): g for x, g in zip(parameters, gradients, strict=True)}


# --- the closed form ---


class Running(NamedTuple):
    """Running averages of the sums per point (float64), and the number of steps [] (int64)."""

    sums: Statistics
    steps: Tensor


def _empty_statistics(parameters: MixtureParameters) -> Statistics:
    centers = parameters.centers.detach()
    total, dim = centers.shape
    shapes = ((total,), (total, dim), (total, dim, dim))
    n, s, m = (torch.empty(shape, dtype=torch.float64, device="cpu") for shape in shapes)
    return Statistics(n, s, m, centers)


def statistics(
    parameters: MixtureParameters, z: Tensor, weights: Tensor | None = None
) -> tuple[Statistics, float | None]:
    """Return the :func:`closed_form.statistics` of ``parameters``, and the log-sum-exps' total.

    Returns
    -------
    sums : Statistics
    total : float or None
        sum_i v_i log sum_j exp l_ij, v the weights; None if it is not a by-product.
    """
    z = _widened(z)
    suffix = _in_core(parameters, z)
    if suffix is None:
        return closed_form.statistics(parameters.components().detach(), z, weights), None
    sums = _empty_statistics(parameters)
    core_parameters = _CoreParameters(parameters, suffix)
    z = in_memory(z)
    weights = None if weights is None else in_memory(weights.to(z.dtype))
    total = _call(
        "mixture_sums",
        suffix,
        core_parameters.view,
        z,
        weights,
        len(z),
        torch.get_num_threads(),
        *sums[:3],
    )
    return sums, total


def maximise(
    parameters: MixtureParameters, sums: Statistics, objective: Objective, free_centers: bool
) -> None:
    """Set ``parameters``, in place, to the maximisers of the objective, given sums over points.

    Parameters without ``requires_grad`` stay as they are; so do centers unless ``free_centers``,
    and the logits of pruned components.
    """
    suffix = _in_core(parameters)
    if suffix is None:
        _maximise_in_torch(parameters, sums, objective, free_centers)
        return
    core_parameters = _CoreParameters(parameters, suffix)
    _call(
        "maximise",
        suffix,
        core_parameters.view,
        *(x.contiguous() for x in sums[:3]),
        _core_priors(objective),
        _core_learnt(parameters, free_centers),
        torch.get_num_threads(),
    )
    _written(parameters, free_centers)


def _maximise_in_torch(
    parameters: MixtureParameters, sums: Statistics, objective: Objective, free_centers: bool
) -> None:
    components = parameters.components()
    assert components.precision_cholesky is not None
    map_prior = objective.map_prior != "none"
    if free_centers and parameters.centers.requires_grad:
        centers = closed_form.maximise_centers(sums, components.precision_cholesky, map_prior)
        sums = sums.around(centers)
        parameters.centers.copy_(centers)
    if parameters.raw_precision.requires_grad:
        precision = closed_form.maximise_precision(
            sums, components.scale, precision_cholesky(parameters.raw_precision), map_prior
        )
        parameters.raw_precision.copy_(raw_precision(precision))
    mass = sums.N.unflatten(0, (len(parameters.logits), -1)).sum(1)
    _maximise_weights_in_torch(parameters, mass, objective)


def _maximise_weights_in_torch(
    parameters: MixtureParameters, mass: Tensor, objective: Objective
) -> None:
    kept = parameters.logits > -math.inf  # a pruned component stays pruned
    log_weights, gamma = closed_form.maximise_weights(
        mass[kept],
        concentration(parameters.raw_alpha).double(),
        weights=objective.weights,
        discount=objective.discount,
        map_prior=objective.map_prior,
    )
    if parameters.logits.requires_grad:
        parameters.logits[kept] = log_weights.to(parameters.logits.dtype)
    if parameters.raw_alpha.requires_grad:
        parameters.raw_alpha.copy_(raw_alpha(torch.as_tensor(gamma, dtype=torch.float64)))


def online_step(
    parameters: MixtureParameters,
    z: Tensor,
    running: Running,
    objective: Objective,
    *,
    rate: float,
    free_centers: bool,
    sums: Statistics | None = None,
) -> None:
    """Blend a batch's sums per point into the running ones, and maximise; all in place.

    The first step starts from :func:`closed_form.matching_statistics`. If the centers are free, old
    sums are shifted to the present centers. An encoder moves points and centers together, so with
    one the old differences d = z - m count unchanged.

    Parameters
    ----------
    parameters : MixtureParameters
    z : Tensor [B, D]
    running : Running
    objective : Objective
    rate : float
        Weight of the batch in the running sums.
    free_centers : bool
        Whether the centers are parameters of their own.
    sums : Statistics or None
        The batch's sums, if they are known already.
    """
    if sums is None:
        sums, _ = statistics(parameters, z)
    sums, (count,) = closed_form.summed_over_processes(sums, len(z))
    suffix = _in_core(parameters)
    if suffix is None:
        if not sums.M.isfinite().all():  # the core refuses such points as it sums
            raise FloatingPointError(
                "the points' sums must be finite, but are not; the prior is unchanged. Check the "
                "encoder's output"
            )
        batch = sums.scaled(1 / count)
        if running.steps == 0:
            old = closed_form.matching_statistics(parameters.components())
        elif free_centers:
            old = running.sums.around(batch.centers)
        else:
            old = running.sums._replace(centers=batch.centers)
        new = old.blended(batch, rate)
        for buffer, value in zip(running.sums, new, strict=True):
            buffer.copy_(value)
        running.steps.add_(1)
        _maximise_in_torch(parameters, new.scaled(objective.data_size), objective, free_centers)
        return
    core_parameters = _CoreParameters(parameters, suffix)
    _call(
        "online_step",
        suffix,
        core_parameters.view,
        *sums[:3],
        count,
        rate,
        objective.data_size,
        free_centers,
        _core_priors(objective),
        _core_learnt(parameters, free_centers),
        torch.get_num_threads(),
        *running.sums,
        running.steps,
    )
    _written(parameters, free_centers)
