"""The prior as a mixture: from posteriors at the pseudo-inputs and precisions to densities.

J = C K Gaussian components, j = c K + k, of which component c's K share a weight pi_c and a
precision Lambda_c = L_c L_c^T, and each has an uncertain center, q(mu_j) = N(m_j, S_j), S = s s^T:

    marginal   p(z) = sum_c pi_c 1/K sum_k N(z; m_ck, Lambda_c^-1 + S_ck)
    expected   l_ck(z) = log pi_c - log K + E_q(mu)[log N(z; mu, Lambda_c^-1)]
                       = log pi_c - log K + 1/2 logdet(Lambda_c / 2 pi)
                         - 1/2 |L_c^T (z - m_ck)|^2 - 1/2 tr(Lambda_c S_ck)

(Stirn & Knowles, arXiv 2402.04412.) Without S both are the Gaussian mixture; without Lambda^-1 both
are the VampPrior (Tomczak & Welling 2018), whose expected form would be -inf and is the exact
log-joint instead. :func:`vmm_fast.ops.whitened_components` builds both as whitened mixtures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
    constraints,
)

from vmm_fast import ops
from vmm_fast.backends.plain import check_values

if TYPE_CHECKING:
    from vmm_fast.clusters import Clusters

__all__ = ["Assignment", "Components", "MixtureDistribution", "WhitenedMixture"]


class WhitenedMixture(NamedTuple):
    """Arguments of :mod:`vmm_fast.ops` after z: l_ij = offset_j - 1/2 |A_j (z_i - m_j)|^2."""

    centers: Tensor
    whitening: Tensor
    offsets: Tensor
    transpose: bool


class Assignment(NamedTuple):
    """Most probable component [B] (int64), its probability [B], entropy over all [B] in nats."""

    labels: Tensor
    probability: Tensor
    entropy: Tensor


def gaussian_parameters(q: Distribution) -> tuple[Tensor, Tensor]:
    """Return the mean [B, D] and the scale, diagonal [B, D] or lower triangle [B, D, D].

    Raises
    ------
    TypeError
        If ``q`` is not a Normal (with or without Independent) or a MultivariateNormal.
    ValueError
        If its mean is not of shape [B, D].
    """
    base = q.base_dist if isinstance(q, Independent) else q
    if isinstance(base, Normal):
        mean, scale = base.loc, base.scale
    elif isinstance(base, MultivariateNormal):
        mean, scale = base.loc, base.scale_tril
    else:
        raise TypeError(
            "q must be a torch.distributions Normal (with or without Independent) or "
            f"MultivariateNormal, but is {type(q).__name__}"
        )
    if mean.ndim != 2:
        raise ValueError(f"q must have a mean of shape [B, D], but it has {list(mean.shape)}")
    if mean.dtype in (torch.float16, torch.bfloat16):  # autocast: arithmetic is in float32
        mean, scale = mean.float(), scale.float()
    return mean, scale


def check_kl(kl: Tensor) -> Tensor:
    """Return a KL estimate after checking that it is finite.

    As z and the prior were checked before, only q can have made it NaN or infinite.

    Raises
    ------
    ValueError
        If a value is not finite, on CPUs alone: on other devices the check would wait for them.
    """
    if kl.is_cpu and not torch.compiler.is_compiling() and not kl.isfinite().all():
        row = int((~kl.isfinite()).nonzero()[0, 0])
        raise ValueError(f"q must be finite with a positive scale, but row {row} is not")
    return kl


def check_sample(z: Tensor, mean: Tensor) -> Tensor:
    """Return z after checking that it has the shape of q's mean.

    Raises
    ------
    ValueError
        If it has another shape.
    """
    if z.shape != mean.shape:
        raise ValueError(
            f"z must have q's shape [B, D] = {list(mean.shape)}, but has {list(z.shape)}"
        )
    return z


def gaussian_sample(q: Distribution) -> Tensor:
    """Return a sample of a Gaussian q as ``q.rsample()`` does, in fewer operations."""
    base = q.base_dist if isinstance(q, Independent) else q
    if type(base) is Normal:
        noise = torch.empty_like(base.loc).normal_()
        return torch.addcmul(base.loc, base.scale, noise)
    if type(base) is MultivariateNormal:
        rows, dim = base.loc.shape
        noise = base.loc.new_empty(rows, 1, dim).normal_()
        return (base.scale_tril * noise).sum(-1) + base.loc
    return q.rsample()


def gaussian_entropy(q: Distribution) -> Tensor:
    """Return the entropy H(q) [B] in nats: D/2 log 2 pi e + log det s."""
    mean, scale = gaussian_parameters(q)
    diagonal = scale if scale.ndim == 2 else scale.diagonal(dim1=-2, dim2=-1)
    return diagonal.log().sum(-1) + 0.5 * mean.shape[-1] * math.log(2 * math.pi * math.e)


@dataclass(frozen=True, eq=False, repr=False)
class Components:
    """A mixture prior at one point in training: densities, responsibilities, samples.

    A trained model keeps it to assign new points without encoder and pseudo-inputs. Gradients flow
    to whatever its tensors were computed from, unless :meth:`detach` cuts them off.

    Parameters
    ----------
    centers : Tensor [J, D]
        m.
    log_weights : Tensor [C]
        log pi, normalised; C divides J and K = J / C.
    precision_cholesky : Tensor [C, D, D] or None
        L, lower triangular with a positive diagonal; None for Lambda^-1 = 0.
    scale : Tensor [J, D, D] or [J, D] or None
        s, lower triangular or diagonal; None for S = 0.

    Raises
    ------
    ValueError
        If shapes do not fit, or both ``precision_cholesky`` and ``scale`` are None.

    Examples
    --------
    >>> centers, weights = torch.tensor([[-2.0], [2.0]]), torch.tensor([0.25, 0.75])
    >>> components = Components(centers, weights.log(), torch.ones(2, 1, 1))
    >>> components.log_prob(torch.zeros(1, 1))
    tensor([-2.9189])
    >>> components.assign(torch.tensor([[1.0]])).probability
    tensor([0.9939])
    >>> components.distribution().mean
    tensor([1.])
    """

    centers: Tensor
    log_weights: Tensor
    precision_cholesky: Tensor | None = None
    scale: Tensor | None = None
    _built: dict[tuple[bool, bool, bool], WhitenedMixture] = field(default_factory=dict, init=False)

    def _values(self) -> tuple[Tensor | None, ...]:
        return self.centers, self.log_weights, self.precision_cholesky, self.scale

    def __repr__(self) -> str:
        total, dim = self.centers.shape
        return f"Components({self.num_components} components, {total} centers, {dim} dimensions)"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_built": {}}

    def __post_init__(self) -> None:
        if self.centers.ndim != 2:
            raise ValueError(f"centers must have shape [J, D], but has {list(self.centers.shape)}")
        total, dim = self.centers.shape
        count = len(self.log_weights)
        if self.log_weights.ndim != 1 or count < 1 or total % count:
            raise ValueError(
                f"log_weights must have shape [C] with C dividing J = {total}, "
                f"but has {list(self.log_weights.shape)}"
            )
        precision, scale = self.precision_cholesky, self.scale
        if precision is None and scale is None:
            raise ValueError("precision_cholesky and scale must not both be None")
        if precision is not None and precision.shape != (count, dim, dim):
            raise ValueError(
                f"precision_cholesky must have shape {[count, dim, dim]}, "
                f"but has {list(precision.shape)}"
            )
        if scale is not None and scale.shape not in ((total, dim), (total, dim, dim)):
            raise ValueError(
                f"scale must have shape {[total, dim]} or {[total, dim, dim]}, "
                f"but has {list(scale.shape)}"
            )

    @property
    def num_components(self) -> int:
        """C, the number of components."""
        return self.log_weights.shape[0]

    @property
    def pseudo_inputs_per_component(self) -> int:
        """K, the number of centers of each component."""
        return self.centers.shape[0] // self.num_components

    @property
    def latent_dim(self) -> int:
        """D, the number of latent dimensions."""
        return self.centers.shape[1]

    @property
    def component_weights(self) -> Tensor:
        """The weights pi [C]."""
        return self.log_weights.exp()

    def evaluate(
        self,
        operation: Callable[..., Tensor | tuple[Tensor, ...]],
        z: Tensor,
        mixture: WhitenedMixture,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        """Return an operation's results, computed in the wider dtype of z and the mixture.

        Results have the wider dtype of z and the centers m.
        """
        if not isinstance(z, Tensor) or not z.is_floating_point():
            raise TypeError(
                "z must be a tensor of a floating dtype, "
                f"but is {z.dtype if isinstance(z, Tensor) else type(z).__name__}"
            )
        *tensors, transpose = mixture
        if z.dtype == mixture.centers.dtype == self.centers.dtype:
            out = operation(z, *tensors, transpose, *rest)
            return (out,) if isinstance(out, Tensor) else out
        dtype = torch.promote_types(z.dtype, mixture.centers.dtype)
        out = operation(z.to(dtype), *(x.to(dtype) for x in tensors), transpose, *rest)
        result = torch.promote_types(z.dtype, self.centers.dtype)
        values = (out,) if isinstance(out, Tensor) else out
        return tuple(x.to(result) if x.is_floating_point() else x for x in values)

    def detach(self) -> Components:
        """Return the same mixture without gradients."""
        return self.map(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> Components:
        """Return the mixture moved or cast as by ``Tensor.to``."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def map(self, function: Callable[[Tensor], Tensor]) -> Components:
        """Return the mixture of the tensors that a function returns for those of this one."""
        optional = (self.precision_cholesky, self.scale)
        return Components(
            function(self.centers),
            function(self.log_weights),
            *(None if v is None else function(v) for v in optional),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name; ``Components(**state)`` restores the mixture."""
        names = ("centers", "log_weights", "precision_cholesky", "scale")
        values = zip(names, self._values(), strict=True)
        return {name: v.detach() for name, v in values if v is not None}

    # --- the two whitened mixtures ---

    @property
    def marginal(self) -> WhitenedMixture:
        """log(pi_c / K) + log N(z; m_ck, Lambda_c^-1 + S_ck) as a whitened mixture."""
        return self._once(expected=False)

    @property
    def expected(self) -> WhitenedMixture:
        """The expected log-joint as a whitened mixture; the marginal one if S or Lambda^-1 is 0."""
        if self.precision_cholesky is None or self.scale is None:
            return self.marginal
        return self._once(expected=True)

    @classmethod
    def from_stored(
        cls, centers: Tensor, logits: Tensor, raw_precision: Tensor, scale: Tensor | None
    ) -> Components:
        """Return the mixture of a prior's stored parameters, with its marginal form already built.

        For :class:`vmm_fast.inference.empirical_bayes.MixtureParameters`. Gradients reach centers
        and scale alone.
        """
        made = ops.stored_components(logits, raw_precision, scale, len(centers))
        whitening, offsets, log_weights, precision_cholesky = made
        components = cls(centers, log_weights, precision_cholesky, scale)
        mixture = WhitenedMixture(centers, whitening, offsets, True)
        components._built[components._key(expected=False)] = mixture
        return components

    def _key(self, expected: bool) -> tuple[bool, bool, bool]:
        """Cache key: a form built under no_grad is not reused when gradients are needed."""
        graph = torch.is_grad_enabled() and any(
            v is not None and v.requires_grad for v in self._values()
        )
        # Tensors made in inference mode cannot enter a graph later.
        return (
            expected,
            graph,
            not torch.compiler.is_compiling() and torch.is_inference_mode_enabled(),
        )

    def _once(self, expected: bool) -> WhitenedMixture:
        """Return the marginal or the expected form, building it at the first use."""
        key = self._key(expected)
        if key not in self._built:
            self._built[key] = self._build(expected)
        return self._built[key]

    def _build(self, expected: bool) -> WhitenedMixture:
        total = self.centers.shape[0]
        whitening, offsets = ops.whitened_components(
            self.log_weights, self.precision_cholesky, self.scale, total, expected
        )
        centers = self.centers
        if centers.dtype != whitening.dtype:
            centers = centers.to(torch.promote_types(centers.dtype, whitening.dtype))
        return WhitenedMixture(centers, whitening, offsets, self.precision_cholesky is not None)

    @property
    def _log_shares(self) -> Tensor:
        """Log-weight log(pi_c / K) of every center [J], float64."""
        per_component = self.pseudo_inputs_per_component
        shares = self.log_weights.double() - math.log(per_component)
        return shares.repeat_interleave(per_component)

    @property
    def _covariance(self) -> Tensor:
        """Covariance Lambda_c^-1 + S_ck around every center [J, D, D], float64."""
        total = torch.zeros((), dtype=torch.float64, device=self.centers.device)
        if self.precision_cholesky is not None:
            factor = self.precision_cholesky.double()
            eye = torch.eye(self.latent_dim, dtype=factor.dtype, device=factor.device)
            inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
            total = _per_center(inverse.mT @ inverse, self.pseudo_inputs_per_component)
        if self.scale is not None:
            scale = _matrix(self.scale.double())
            total = total + scale @ scale.mT
        return total

    # --- densities ---

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log p(z) [B] of the marginal prior, in nats."""
        return self.evaluate(ops.mixture_log_prob, z, self.marginal)[0]

    def kl(self, q: Distribution, z: Tensor | None = None) -> Tensor:
        """Return the estimate -H(q) - log p(z) of KL(q || p) [B] in nats, z ~ q unless given."""
        mean, scale = gaussian_parameters(q)
        z = gaussian_sample(q) if z is None else check_sample(z, mean)
        return self.evaluate(ops.mixture_kl, z, self.marginal, scale)[0]

    def log_joint(self, z: Tensor) -> Tensor:
        """Return the expected log-joint l_c(z) = log sum_k exp l_ck(z) [B, C], in nats."""
        per_component = self.pseudo_inputs_per_component
        return self.evaluate(ops.mixture_log_joint, z, self.expected, per_component)[0]

    def log_joint_expectation(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-sum-exp and softmax-weighted mean of all l_ck(z), both [B] in nats."""
        lse, expected = self.evaluate(ops.mixture_log_prob, z, self.expected)
        return lse, expected

    def responsibilities(self, z: Tensor) -> Tensor:
        """Return the probability of each component, softmax_c l_c(z) [B, C]."""
        per_component = self.pseudo_inputs_per_component
        return self.evaluate(ops.mixture_responsibilities, z, self.expected, per_component)[0]

    def assign(self, z: Tensor) -> Assignment:
        """Return the most probable component, its probability and the entropy over all; each [B].

        No [B, C] matrix is stored.
        """
        per_component = self.pseudo_inputs_per_component
        return Assignment(*self.evaluate(ops.mixture_assign, z, self.expected, per_component))

    def clusters(self, z: Tensor | Iterable[Tensor], **cut: Any) -> Clusters:
        """Group components by the points ``z`` [N, D], or batches of them, that they share.

        The options are those of :func:`vmm_fast.clusters.find_clusters`.
        """
        from vmm_fast.clusters import find_clusters  # that module imports this one

        return find_clusters(self, z, **cut)

    def active_components(self, z: Tensor | None = None, threshold: float = 0.002) -> Tensor:
        """Return the indices of components whose share exceeds ``threshold``, largest first.

        The share is the fraction of the points ``z`` [B, D] assigned to the component or, without
        ``z``, its weight.
        """
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be in [0, 1), but is {threshold}")
        if z is None:
            share = self.component_weights.detach()
        else:
            if len(z) == 0:
                raise ValueError("z must have at least one row, but is empty")
            labels = self.assign(z).labels
            share = labels.bincount(minlength=self.num_components) / len(z)
        order = share.argsort(descending=True, stable=True)
        return order[share[order] > threshold]

    # --- samples ---

    def distribution(self) -> MixtureDistribution:
        """Return the marginal prior as a torch distribution."""
        return MixtureDistribution(self)

    def sample(self, n: int, component: int | Tensor | None = None) -> Tensor:
        """Draw z [n, D] from the prior or from one ``component`` (an index, or [n] of them).

        Raises
        ------
        ValueError
            If ``n`` is negative or ``component`` is outside 0 .. C - 1; on CPUs also if the mixture
            has values that are not finite or no covariance, or is too wide for its dtype.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"n must be an integer of at least 0, but is {n!r}")
        device, count = self.centers.device, self.num_components
        look = self.centers.is_cpu and not torch.compiler.is_compiling()
        if look:  # at all components, not only those that are drawn
            with torch.no_grad():
                centers, whitening, offsets, _ = self.marginal
                check_values(centers[:0], centers, whitening, offsets)
        if component is None:  # multinomial() refuses n = 0
            component = self.component_weights.detach().multinomial(max(n, 1), replacement=True)[:n]
        component = torch.as_tensor(component, device=device)
        if component.dtype not in (torch.int64, torch.int32) or component.shape not in ((), (n,)):
            raise ValueError(
                f"component must be an integer or a tensor of {n} integers, but is {component}"
            )
        if ((component < 0) | (component >= count)).any():
            raise ValueError(f"component must be in 0 .. {count - 1}, but is {component}")
        component = component.expand(n)
        per_component = self.pseudo_inputs_per_component
        index = component * per_component
        if per_component > 1:
            index = index + torch.randint(per_component, (n,), device=device)
        with torch.no_grad():
            z = self.centers[index]
            if self.scale is not None:
                z = z + scale_times(self.scale[index], torch.randn_like(z))
            if self.precision_cholesky is not None:
                noise = torch.randn_like(z)[..., None]
                factor = self.precision_cholesky[component]
                z = z + torch.linalg.solve_triangular(factor.mT, noise, upper=True)[..., 0]
        if look and not z.isfinite().all():
            raise ValueError(f"samples must be finite, but the mixture is too wide for {z.dtype}")
        return z


class MixtureDistribution(Distribution):
    """The marginal prior of :class:`Components` as a torch distribution over z [D]."""

    arg_constraints = {}  # noqa: RUF012  the base class' name and type
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, components: Components):
        self.components = components
        event_shape = torch.Size([components.latent_dim])
        super().__init__(torch.Size(), event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(value) [..] for value [.., D], in nats."""
        flat = self.components.log_prob(value.reshape(-1, self.components.latent_dim))
        return flat.reshape(value.shape[:-1])

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draw samples [*sample_shape, D]."""
        return self.component_sample(None, sample_shape)

    def component_sample(
        self, component: int | None, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()
    ) -> Tensor:
        """Draw samples [*sample_shape, D] from one component, or from all if it is None."""
        shape = torch.Size(sample_shape)
        flat = self.components.sample(shape.numel(), component)
        return flat.reshape(*shape, self.components.latent_dim)

    @property
    def _shares(self) -> Tensor:
        return self.components._log_shares.exp()[:, None]

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture [D]: sum_j w_j m_j."""
        centers = self.components.centers
        return (self._shares * centers.double()).sum(0).to(centers.dtype)

    @property
    def variance(self) -> Tensor:
        """Marginal variances [D]: sum_j w_j (diag Sigma_j + (m_j - mean)^2)."""
        centers = self.components.centers
        spread = (centers.double() - self.mean.double()).square()
        within = self.components._covariance.diagonal(dim1=-2, dim2=-1)
        return (self._shares * (within + spread)).sum(0).to(centers.dtype)


def _matrix(scale: Tensor) -> Tensor:
    return torch.diag_embed(scale) if scale.ndim == 2 else scale.tril()


def scale_times(scale: Tensor, x: Tensor) -> Tensor:
    """Return s x [n, D] for a diagonal [n, D] or lower-triangular [n, D, D] s."""
    return scale * x if scale.ndim == 2 else (scale.tril() @ x[..., None])[..., 0]


def _per_center(per_component: Tensor, count: int) -> Tensor:
    return per_component if count == 1 else per_component.repeat_interleave(count, 0)
