"""Stick-breaking weights: the posterior given counts, and the prior's density in plain torch.

With concentration gamma > 0 and discount 0 <= d < 1 (d = 0 is the Dirichlet process, d > 0 the
Pitman-Yor process), truncated at C components,

    v_c ~ Beta(1 - d, gamma + c d)  for c = 1, .., C-1,   v_C = 1,   pi_c = v_c prod_{l<c} (1 - v_l)

Components are ordered by size, the largest first. The posterior is computed in float64 by the
compiled core (``csrc/stick_breaking.h``, with formulas and sources). Counts on an NVIDIA GPU are
left there for a CUDA kernel if the build had a CUDA toolkit and there are up to 100,000 components.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmm_fast import _core
from vmm_fast.backends import in_memory

__all__ = [
    "StickBreakingPosterior",
    "log_stick_breaking_prior",
    "log_weights_to_sticks",
    "posterior_without_checks",
    "stick_breaking_posterior",
    "sticks_to_log_weights",
]

# The kernel runs in one block of threads, a small part of a GPU.
_MAX_COMPONENTS_ON_GPU = 100_000


class StickBreakingPosterior(NamedTuple):
    """Posterior of stick-breaking weights given counts; see `stick_breaking_posterior`.

    Attributes
    ----------
    order : Tensor
        [C] int64, the components by decreasing count; ties keep the order of their indices.
    a, b : Tensor
        [C-1], v_(c) ~ Beta(a_c, b_c) for the c-th component *in that order*.
    expected_log_weights : Tensor
        [C], E[log pi_c] in nats. This and the weights below are in the components' own order.
    mean_weights : Tensor
        [C], E[pi_c]; they sum to 1.
    map_weights : Tensor
        [C], the weights with every stick at its mode; they sum to 1.
    concentration : float
        The maximum over gamma of its prior times the sticks' expected density.
    """

    order: Tensor
    a: Tensor
    b: Tensor
    expected_log_weights: Tensor
    mean_weights: Tensor
    map_weights: Tensor
    concentration: float


class Float64Posterior(NamedTuple):
    """A :class:`StickBreakingPosterior` in float64, with the concentration as a tensor []."""

    order: Tensor
    a: Tensor
    b: Tensor
    expected_log_weights: Tensor
    mean_weights: Tensor
    map_weights: Tensor
    concentration: Tensor


def stick_breaking_posterior(
    counts: Tensor,
    concentration: float,
    discount: float = 0.0,
    concentration_prior: tuple[float, float] = (1.0, 1.0),
) -> StickBreakingPosterior:
    r"""Return the posterior of stick-breaking weights given counts, and the new concentration.

    With the components (c) ordered by decreasing count,

    .. math::
        v_{(c)} \sim \mathrm{Beta}(1 - d + N_{(c)}, \; \gamma + c d + \sum_{l>c} N_{(l)})

        E[\log \pi_{(c)}] = E[\log v_{(c)}] + \sum_{l<c} E[\log(1 - v_{(l)})]

    and the new concentration maximises, over gamma ~ Gamma(shape, rate),

    .. math::
        (\mathrm{shape} - 1) \log\gamma - \mathrm{rate}\,\gamma + \sum_{c<C}
        [(\gamma + c d - 1) E[\log(1 - v_{(c)})] - \log B(1 - d, \gamma + c d)]

    which for d = 0 is the mode of Gamma(shape + C - 1, rate - sum_c E[log(1 - v_(c))]).

    Parameters
    ----------
    counts : Tensor
        [C] float32 or float64, C >= 1: the (soft) counts N_c >= 0, in any order. The work is done
        in float64, by a CUDA kernel on NVIDIA GPUs if it was built and C <= 100,000, else on the
        CPU, at the cost of a copy there and back. A GPU is waited for in either case, to check
        the values and to return the concentration. Carries no gradient.
    concentration : float
        gamma > 0.
    discount : float
        d in [0, 1).
    concentration_prior : tuple of float
        Shape and rate of gamma's prior, both > 0.

    Returns
    -------
    StickBreakingPosterior
        Tensors with the dtype and device of `counts` (`order` is int64).

    Raises
    ------
    TypeError
        If `counts` is not a float32 or float64 tensor.
    ValueError
        If an argument lies outside its domain.

    Notes
    -----
    Modes are taken in v, where they are (a - 1) / (a + b - 2) for a, b > 1; 0 for a <= 1 < b; 1
    for b <= 1 < a; for a, b <= 1 the end with more mass (1 if both are alike), but 1/2 for the flat
    Beta(1, 1). So where gamma + c d > 1, components with N_c <= d have a MAP weight of exactly 0,
    and the last in `order`, even if empty, holds all that the others leave; mean weights spread it.

    The concentration is at least 1e-8, returned where the maximum lies at zero (for d = 0: where
    shape + C - 2 <= 0). With shape < 1 and d > 0 the objective is also unbounded at zero; the
    interior maximum is returned where there is one.

    References
    ----------
    Ishwaran & James (2001), Gibbs sampling methods for stick-breaking priors, section 3;
    Blei & Jordan (2006), Variational inference for Dirichlet process mixtures;
    Kurihara, Welling & Teh (2007), Collapsed variational Dirichlet process mixture models.

    Examples
    --------
    >>> posterior = stick_breaking_posterior(torch.tensor([2.0, 0.0, 7.0]), concentration=1.0)
    >>> posterior.order
    tensor([2, 0, 1])
    >>> posterior.mean_weights
    tensor([0.2045, 0.0682, 0.7273])
    """
    _check_vector("counts", counts, minimum_size=1)
    concentration = _check_concentration(concentration)
    _check_discount(discount)
    shape, rate = concentration_prior
    for name, value in (("shape", shape), ("rate", rate)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"concentration_prior's {name} must be finite and above 0, but is {value}"
            )
    # The sum is NaN or infinite as soon as one count is, and must itself be finite.
    n = counts.detach().double()
    low, high, total = torch.stack([*n.aminmax(), n.sum()]).tolist()
    if low < 0 or not math.isfinite(total):
        raise ValueError(
            "counts must be non-negative and finite, with a finite sum, but has values from "
            f"{low} to {high} with sum {total}"
        )
    found = posterior_without_checks(n, concentration, discount, concentration_prior)
    return StickBreakingPosterior(
        order=found.order,
        a=found.a.to(counts),
        b=found.b.to(counts),
        expected_log_weights=found.expected_log_weights.to(counts),
        mean_weights=found.mean_weights.to(counts),
        map_weights=found.map_weights.to(counts),
        concentration=found.concentration.item(),
    )


def posterior_without_checks(
    counts: Tensor,
    concentration: float | Tensor,
    discount: float = 0.0,
    concentration_prior: tuple[float, float] = (1.0, 1.0),
) -> Float64Posterior:
    """Return :func:`stick_breaking_posterior` without checks, which would wait for a GPU.

    A count or a concentration that is negative or NaN gives NaN.

    Parameters
    ----------
    counts : Tensor
        [C], C >= 1, any floating dtype.
    concentration : float or Tensor
        A number, or a 0-d tensor.
    discount, concentration_prior
        As in :func:`stick_breaking_posterior`.

    Returns
    -------
    Float64Posterior
        On the device of ``counts``.
    """
    size = counts.numel()
    cuda = _cuda_kernels(counts.device) if size <= _MAX_COMPONENTS_ON_GPU else None
    device = counts.device if cuda else torch.device("cpu")
    n = in_memory(counts.detach().to(device, torch.float64))
    if isinstance(concentration, Tensor):
        gamma = in_memory(concentration.detach().to(n))
    else:
        gamma = n.new_full((), concentration)
    found = Float64Posterior(
        order=torch.empty(size, dtype=torch.int64, device=device),
        a=n.new_empty(size - 1),
        b=n.new_empty(size - 1),
        expected_log_weights=n.new_empty(size),
        mean_weights=n.new_empty(size),
        map_weights=n.new_empty(size),
        concentration=n.new_empty(()),
    )
    addresses = [x.data_ptr() for x in found]
    given = (n.data_ptr(), size, gamma.data_ptr(), discount, *concentration_prior)
    arguments: tuple[Any, ...] = (*given, *addresses)
    if cuda is None:
        _core.stick_breaking_posterior(*arguments)
    else:
        scratch = n.new_empty(4 * size)  # counts and indices while they are sorted, twice
        stream = torch.cuda.current_stream(device).cuda_stream
        cuda.stick_breaking_posterior(*arguments, scratch.data_ptr(), device.index, stream)
    return Float64Posterior(*(x.to(counts.device) for x in found))


@functools.lru_cache
def _cuda_kernels(device: torch.device) -> Any | None:
    """Return the module of CUDA kernels if it was built and runs on this device, else None."""
    if device.type != "cuda" or torch.version.hip:
        return None
    try:
        from vmm_fast import _cuda
    except ImportError:
        return None
    return _cuda if _cuda.is_served(device.index) else None


def sticks_to_log_weights(sticks: Tensor) -> Tensor:
    r"""Return log weights from sticks, :math:`\log\pi_c = \log v_c + \sum_{l<c} \log(1 - v_l)`.

    The last stick is v_C = 1.

    Parameters
    ----------
    sticks : Tensor
        [C-1] float32 or float64 in [0, 1]; may be empty. Carries no gradient.

    Returns
    -------
    Tensor
        [C], nats, dtype and device of `sticks`, computed on the CPU in float64; -inf where a weight
        is 0.

    Raises
    ------
    TypeError
        If `sticks` is not a float32 or float64 tensor.
    ValueError
        If it is not one-dimensional or has values outside [0, 1].
    """
    _check_vector("sticks", sticks, minimum_size=0)
    v = in_memory(sticks.detach().to("cpu", torch.float64))
    if not bool(((v >= 0) & (v <= 1)).all()):
        raise ValueError(
            f"sticks must lie in [0, 1], but has values from {v.min().item()} to {v.max().item()}"
        )
    log_weights = v.new_empty(v.numel() + 1)
    _core.sticks_to_log_weights(v.data_ptr(), log_weights.numel(), log_weights.data_ptr())
    return log_weights.to(sticks)


def log_weights_to_sticks(log_weights: Tensor) -> Tensor:
    r"""Return sticks from log weights, :math:`v_c = \pi_c / \sum_{l \geq c} \pi_l` for c < C.

    The inverse of `sticks_to_log_weights`, as far as 1 - v has digits left.

    Parameters
    ----------
    log_weights : Tensor
        [C] float32 or float64, nats; any common offset drops out. -inf is a weight of 0; at least
        one must be finite. Carries no gradient.

    Returns
    -------
    Tensor
        [C-1], dtype and device of `log_weights`, computed on the CPU in float64; 0 where
        nothing is left to break.

    Raises
    ------
    TypeError
        If `log_weights` is not a float32 or float64 tensor.
    ValueError
        If it is not one-dimensional, is empty, has NaN or +inf, or has no finite value.
    """
    _check_vector("log_weights", log_weights, minimum_size=1)
    w = in_memory(log_weights.detach().to("cpu", torch.float64))
    if not math.isfinite(w.max().item()):  # the maximum of a tensor with NaN is NaN
        raise ValueError(
            f"log_weights must have a finite maximum and no NaN, but has maximum {w.max().item()}"
        )
    sticks = w.new_empty(w.numel() - 1)
    _core.log_weights_to_sticks(w.data_ptr(), w.numel(), sticks.data_ptr())
    return sticks.to(log_weights)


def log_stick_breaking_prior(
    log_weights: Tensor,
    concentration: float | Tensor,
    discount: float = 0.0,
    floor: float = -20.0,
) -> Tensor:
    r"""Return the log density of the sticks of given weights, differentiable.

    .. math::
        \sum_{c<C} \log \mathrm{Beta}(v_{(c)}; \, 1 - d, \, \gamma + c d), \qquad
        v_{(c)} = \pi_{(c)} / r_c, \quad 1 - v_{(c)} = r_{c+1} / r_c, \quad
        r_c = \sum_{l \geq c} \pi_{(l)}

    with pi the softmax of `log_weights`, the largest first. It is a density over v: no Jacobian
    from v to pi or to `log_weights`. The gradient takes the order as given, and is discontinuous
    where two weights swap.

    Parameters
    ----------
    log_weights : Tensor
        [C], any floating dtype, nats; need not be normalised. -inf (a pruned component) is allowed
        as long as one value is finite.
    concentration : float or Tensor
        gamma > 0; gradient flows to a 0-d tensor, whose value is not checked.
    discount : float
        d in [0, 1).
    floor : float
        Log weights (normalised, nats) below it count as equal to it and get no gradient, since the
        density has no finite value at pi = 0 unless d = 0.

    Returns
    -------
    Tensor
        0-d, nats, dtype of `log_weights`.

    Raises
    ------
    TypeError
        If `log_weights` is not a floating-point tensor.
    ValueError
        If `log_weights` is not one-dimensional or is empty, or `concentration` (a float) or
        `discount` lies outside its domain.

    References
    ----------
    Pitman & Yor (1997), The two-parameter Poisson-Dirichlet distribution; Ishwaran & James (2001),
    Gibbs sampling methods for stick-breaking priors, section 3.
    """
    _check_vector("log_weights", log_weights, minimum_size=1, dtypes=None)
    _check_discount(discount)
    if not isinstance(concentration, Tensor):
        concentration = _check_concentration(concentration)

    log_pi = torch.log_softmax(log_weights, dim=0).clamp(min=floor)
    log_pi = torch.sort(log_pi, descending=True, stable=True).values
    log_rest = torch.logcumsumexp(log_pi.flip(0), dim=0).flip(0)
    log_v = (log_pi - log_rest)[:-1]
    log_one_minus_v = log_rest[1:] - log_rest[:-1]

    # The normaliser in float64: float32 leaves few digits of a difference of lgamma of thousands.
    gamma = torch.as_tensor(concentration, dtype=torch.float64, device=log_weights.device)
    c = torch.arange(1, log_weights.numel(), dtype=torch.float64, device=log_weights.device)
    b = gamma + c * discount
    if discount == 0.0:
        log_normaliser = log_v.numel() * gamma.log()
    else:
        terms = torch.lgamma(b + (1.0 - discount)) - torch.lgamma(b) - math.lgamma(1.0 - discount)
        log_normaliser = terms.sum()
    log_density = (b - 1.0).to(log_v) * log_one_minus_v - discount * log_v
    return log_density.sum() + log_normaliser.to(log_v)


def _check_vector(
    name: str,
    value: Tensor,
    minimum_size: int,
    dtypes: tuple[torch.dtype, ...] | None = (torch.float32, torch.float64),
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, but is a {type(value).__name__}")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name} must be float32 or float64, but is {value.dtype}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be of a floating dtype, but is {value.dtype}")
    if value.dim() != 1 or value.numel() < minimum_size:
        at_least = f" and at least {minimum_size} long" if minimum_size else ""
        raise ValueError(
            f"{name} must be one-dimensional{at_least}, but has shape {list(value.shape)}"
        )


def _check_concentration(concentration: float | Tensor) -> float:
    concentration = float(concentration)
    if not (math.isfinite(concentration) and concentration > 0):
        raise ValueError(f"concentration must be finite and above 0, but is {concentration}")
    return concentration


def _check_discount(discount: float) -> None:
    if not 0.0 <= discount < 1.0:
        raise ValueError(f"discount must be in [0, 1), but is {discount}")
