"""The operations on a whitened mixture: checked, dispatched by device, differentiable, compilable.

A whitened mixture has centers m [J, D], lower-triangular matrices A [J, D, D] (``whitening``) and
offsets c [J]. All operations are functions of

    l_ij = c_j - 1/2 |A_j (z_i - m_j)|^2          (``transpose=True``: A_j^T in place of A_j)

For a Gaussian mixture, A = chol(Sigma)^-1 and c = log pi - D/2 log 2 pi + log det A. Only the lower
triangle of ``whitening`` is read. An offset of -inf prunes its component.

CPUs run the compiled core, GPUs of NVIDIA and AMD the Triton kernels, other devices plain torch
(:mod:`vmm_fast.backends`); float16 and bfloat16 are computed in float32, to which each such
tensor is converted first. Nothing of size [B, J] is stored by :func:`mixture_log_prob` (its
backward recomputes), :func:`mixture_statistics` and :func:`mixture_assign`.

Every function raises ``ValueError`` or ``TypeError``, naming the argument, for wrong shapes, dtypes
or devices. On CPUs it does so for values that are not finite, and for a z so far from every center
that its log-density overflows the dtype; on GPUs, where to look would be to wait, these give NaN
and -inf.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vmm_fast import backends, reference
from vmm_fast.backends.core import latent_dim
from vmm_fast.backends.plain import check_near, check_values, kl_from_lse

__all__ = [
    "mixture_assign",
    "mixture_kl",
    "mixture_log_joint",
    "mixture_log_prob",
    "mixture_responsibilities",
    "mixture_statistics",
    "stored_components",
    "whitened_components",
]

_FLOATS = (torch.float32, torch.float64)
_HALVES = (torch.float16, torch.bfloat16)

# A float32 whitening matrix A of this condition number or more (as bounded from below by its norm
# over its smallest diagonal element) loses digits of |A (z - m)|^2 that a user would miss.
_FLOAT32_CONDITION = 1e4


# --- the border: everything is checked here, once ---


def _check(
    z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, per_component: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (z, centers, whitening, offsets)
    for name, value in zip(("z", "centers", "whitening", "offsets"), arguments, strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, but is {type(value).__name__}")
        if value.dtype not in _FLOATS and value.dtype not in _HALVES:
            raise TypeError(
                f"{name} must be float64, float32, float16 or bfloat16, but is {value.dtype}"
            )
    if z.ndim != 2 or z.shape[1] < 1:
        raise ValueError(f"z must have shape [B, D] with D >= 1, but has {list(z.shape)}")
    dim = z.shape[1]
    if centers.ndim != 2 or centers.shape[1] != dim or centers.shape[0] < 1:
        raise ValueError(
            f"centers must have shape [J, D] with J >= 1 and D = {dim} as in z, "
            f"but has {list(centers.shape)}"
        )
    components = centers.shape[0]
    if whitening.shape != (components, dim, dim):
        raise ValueError(
            f"whitening must have shape [J, D, D] = {[components, dim, dim]}, "
            f"but has {list(whitening.shape)}"
        )
    if offsets.shape != (components,):
        raise ValueError(
            f"offsets must have shape [J] = {[components]}, but has {list(offsets.shape)}"
        )
    if per_component < 1 or components % per_component:
        raise ValueError(
            f"pseudo_inputs_per_component must divide J = {components}, but is {per_component}"
        )
    if any(a.dtype in _HALVES for a in arguments):
        z, centers, whitening, offsets = (a.float() if a.dtype in _HALVES else a for a in arguments)
        arguments = (z, centers, whitening, offsets)
    for name, value in zip(("centers", "whitening", "offsets"), arguments[1:], strict=True):
        if value.dtype != z.dtype:
            raise TypeError(f"{name} must have z's dtype {z.dtype}, but has {value.dtype}")
        if value.device != z.device:
            raise ValueError(f"{name} must be on z's device {z.device}, but is on {value.device}")
    return arguments


def _check_components(
    log_weights: Tensor, precision_cholesky: Tensor | None, scale: Tensor | None, num_centers: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    arguments = {
        "log_weights": log_weights,
        "precision_cholesky": precision_cholesky,
        "scale": scale,
    }
    for name, value in arguments.items():
        if value is None and name != "log_weights":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, but is {type(value).__name__}")
        if value.dtype not in _FLOATS and value.dtype not in _HALVES:
            raise TypeError(
                f"{name} must be float64, float32, float16 or bfloat16, but is {value.dtype}"
            )
        if value.device != log_weights.device:
            raise ValueError(
                f"{name} must be on log_weights' device {log_weights.device}, "
                f"but is on {value.device}"
            )
    if precision_cholesky is None and scale is None:
        raise ValueError("precision_cholesky and scale must not both be None")
    if log_weights.ndim != 1 or len(log_weights) < 1:
        raise ValueError(
            f"log_weights must have shape [C] with C >= 1, but has {list(log_weights.shape)}"
        )
    components = log_weights.shape[0]
    if num_centers < 1 or num_centers % components:
        raise ValueError(
            f"num_centers must be a multiple of C = {components}, but is {num_centers}"
        )
    dim = latent_dim(precision_cholesky, scale)
    if precision_cholesky is not None and (
        precision_cholesky.shape != (components, dim, dim) or dim < 1
    ):
        raise ValueError(
            f"precision_cholesky must have shape [C, D, D] with C = {components} and D >= 1, "
            f"but has {list(precision_cholesky.shape)}"
        )
    if scale is not None and (
        scale.shape not in ((num_centers, dim), (num_centers, dim, dim)) or dim < 1
    ):
        raise ValueError(
            f"scale must have shape [J, D] or [J, D, D] with J = {num_centers} and "
            f"{'D >= 1' if precision_cholesky is None else f'D = {dim}'}, "
            f"but has {list(scale.shape)}"
        )
    dtypes = {value.dtype for value in arguments.values() if value is not None}
    if len(dtypes) == 1 and dtypes <= set(_FLOATS):
        return log_weights, precision_cholesky, scale
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    return (
        log_weights.to(dtype),
        None if precision_cholesky is None else precision_cholesky.to(dtype),
        None if scale is None else scale.to(dtype),
    )


# --- the torch ops: schema, implementation, fake, autograd ---

_MIXTURE = "Tensor z, Tensor centers, Tensor whitening, Tensor offsets"
_GROUPED = f"{_MIXTURE}, bool transpose, int pseudo_inputs_per_component"

_library = torch.library.Library("vmm_fast", "DEF")
# softmax [3, B] is for the backward: max_j l_ij, lse - max, expected - max (csrc/mixture.h).
_library.define(
    f"mixture_log_prob({_MIXTURE}, bool transpose) -> (Tensor lse, Tensor expected, Tensor softmax)"
)
_library.define(
    f"mixture_log_prob_backward(Tensor grad_lse, Tensor grad_expected, {_MIXTURE}, "
    "Tensor softmax, bool transpose) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(f"mixture_statistics({_MIXTURE}, bool transpose) -> (Tensor N, Tensor s, Tensor M)")
_library.define(f"mixture_log_joint({_GROUPED}) -> Tensor")
_library.define(f"mixture_responsibilities({_GROUPED}) -> Tensor")
_library.define(f"mixture_assign({_GROUPED}) -> (Tensor label, Tensor probability, Tensor entropy)")
_COMPONENTS = "Tensor log_weights, Tensor? precision_cholesky, Tensor? scale"
_library.define(
    f"whitened_components({_COMPONENTS}, int num_centers, bool expected) "
    "-> (Tensor whitening, Tensor offsets)"
)
# Returns the gradients that are wanted, of log_weights, precision_cholesky and scale.
_library.define(
    f"whitened_components_backward(Tensor grad_whitening, Tensor grad_offsets, {_COMPONENTS}, "
    "Tensor whitening, bool expected, bool[3] wanted) -> Tensor[]"
)


def _on_mixture(name: str):
    def implementation(z: Tensor, *rest: Any) -> Any:
        return backends.call(name, z, z.shape[1], z, *rest)

    return implementation


def _log_prob_backward(grad_lse, grad_expected, z, *rest):
    return backends.call("log_prob_backward", z, z.shape[1], grad_lse, grad_expected, z, *rest)


def _whitened_components(log_weights, precision_cholesky, scale, num_centers, expected):
    inputs = (log_weights, precision_cholesky, scale, num_centers, expected)
    dim = latent_dim(precision_cholesky, scale)
    return backends.call("whitened_components", log_weights, dim, *inputs)


def _whitened_components_backward(grad_whitening, *rest):
    dim = grad_whitening.shape[-1]
    return backends.call("whitened_components_backward", grad_whitening, dim, grad_whitening, *rest)


_IMPLEMENTATIONS = {
    "mixture_log_prob": _on_mixture("log_prob"),
    "mixture_log_prob_backward": _log_prob_backward,
    "mixture_statistics": _on_mixture("statistics"),
    "mixture_log_joint": _on_mixture("log_joint"),
    "mixture_responsibilities": _on_mixture("responsibilities"),
    "mixture_assign": _on_mixture("assign"),
    "whitened_components": lambda *inputs: _whitened_components(*inputs)[:2],
    "whitened_components_backward": lambda *inputs: [
        g for g in _whitened_components_backward(*inputs) if g is not None
    ],
}
for _name, _implementation in _IMPLEMENTATIONS.items():
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")


@torch.library.register_fake("vmm_fast::mixture_log_prob", lib=_library)
def _(z, centers, whitening, offsets, transpose):
    size = z.shape[0]
    return z.new_empty(size), z.new_empty(size), z.new_empty(3, size)


@torch.library.register_fake("vmm_fast::mixture_log_prob_backward", lib=_library)
def _(grad_lse, grad_expected, z, centers, whitening, offsets, softmax, transpose):
    return tuple(x.new_empty(x.shape) for x in (z, centers, whitening, offsets))


@torch.library.register_fake("vmm_fast::mixture_statistics", lib=_library)
def _(z, centers, whitening, offsets, transpose):
    return tuple(x.new_empty(x.shape) for x in (offsets, centers, whitening))


@torch.library.register_fake("vmm_fast::mixture_log_joint", lib=_library)
@torch.library.register_fake("vmm_fast::mixture_responsibilities", lib=_library)
def _(z, centers, whitening, offsets, transpose, pseudo_inputs_per_component):
    return z.new_empty(z.shape[0], centers.shape[0] // pseudo_inputs_per_component)


@torch.library.register_fake("vmm_fast::mixture_assign", lib=_library)
def _(z, centers, whitening, offsets, transpose, pseudo_inputs_per_component):
    size = z.shape[0]
    return z.new_empty(size, dtype=torch.int64), z.new_empty(size), z.new_empty(size)


@torch.library.register_fake("vmm_fast::whitened_components", lib=_library)
def _(log_weights, precision_cholesky, scale, num_centers, expected):
    dim = latent_dim(precision_cholesky, scale)
    return log_weights.new_empty(num_centers, dim, dim), log_weights.new_empty(num_centers)


@torch.library.register_fake("vmm_fast::whitened_components_backward", lib=_library)
def _(
    grad_whitening,
    grad_offsets,
    log_weights,
    precision_cholesky,
    scale,
    whitening,
    expected,
    wanted,
):
    inputs = zip((log_weights, precision_cholesky, scale), wanted, strict=True)
    return [x.new_empty(x.shape) for x, want in inputs if want]


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.transpose = inputs
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx, grad_lse, grad_expected, _):
    saved = ctx.saved_tensors
    backward = torch.ops.vmm_fast.mixture_log_prob_backward
    return *backward(grad_lse, grad_expected, *saved, ctx.transpose), None


def _save_components(ctx, inputs, output) -> None:
    *tensors, _, ctx.expected = inputs
    ctx.save_for_backward(*tensors, output[0])


def _backward_components(ctx, grad_whitening, grad_offsets):
    wanted = ctx.needs_input_grad[:3]
    backward = torch.ops.vmm_fast.whitened_components_backward
    grads = iter(
        backward(grad_whitening, grad_offsets, *ctx.saved_tensors, ctx.expected, list(wanted))
    )
    return *(next(grads) if want else None for want in wanted), None, None


def _refuse_double_backward(name: str):
    def refuse(ctx, *grads):
        raise RuntimeError(
            f"{name} has no second derivative in compiled code; use "
            f"vmm_fast.reference.{name}, which has"
        )

    return refuse


torch.library.register_autograd(
    "vmm_fast::mixture_log_prob", _backward, setup_context=_save, lib=_library
)
torch.library.register_autograd(
    "vmm_fast::whitened_components",
    _backward_components,
    setup_context=_save_components,
    lib=_library,
)
for _name in ("mixture_log_prob", "whitened_components"):
    torch.library.register_autograd(
        f"vmm_fast::{_name}_backward", _refuse_double_backward(_name), lib=_library
    )


class _LogProb(torch.autograd.Function):
    """The same autograd without the op's dispatch, which costs more than a small kernel."""

    @staticmethod
    def forward(ctx, z, centers, whitening, offsets, transpose):
        inputs = (z, centers, whitening, offsets, transpose)
        lse, expected, softmax = backends.call("log_prob", z, z.shape[1], *inputs)
        ctx.set_materialize_grads(False)
        ctx.transpose = transpose
        ctx.save_for_backward(z, centers, whitening, offsets, softmax)
        return lse, expected

    @staticmethod
    def backward(ctx, grad_lse, grad_expected):
        if torch.is_grad_enabled():  # only under create_graph=True
            _refuse_double_backward("mixture_log_prob")(ctx)
        return *_log_prob_backward(grad_lse, grad_expected, *ctx.saved_tensors, ctx.transpose), None


class _WhitenedComponents(torch.autograd.Function):
    """As :class:`_LogProb`; returns the condition too."""

    @staticmethod
    def forward(ctx, log_weights, precision_cholesky, scale, num_centers, expected):
        inputs = (log_weights, precision_cholesky, scale)
        whitening, offsets, condition = _whitened_components(*inputs, num_centers, expected)
        ctx.expected = expected
        ctx.save_for_backward(*inputs, whitening)
        return whitening, offsets, condition

    @staticmethod
    def backward(ctx, grad_whitening, grad_offsets, _):
        if torch.is_grad_enabled():  # only under create_graph=True
            _refuse_double_backward("whitened_components")(ctx)
        return (
            *_whitened_components_backward(
                grad_whitening,
                grad_offsets,
                *ctx.saved_tensors,
                ctx.expected,
                ctx.needs_input_grad[:3],
            ),
            None,
            None,
        )


class _StoredComponents(torch.autograd.Function):
    """Build from what a prior stores; see :func:`stored_components`."""

    @staticmethod
    def forward(ctx, logits, raw_precision, scale, num_centers):
        inputs = (logits, raw_precision, scale, num_centers)
        made = backends.call("stored_components", logits, raw_precision.shape[-1], *inputs)
        whitening, _, log_weights, precision_cholesky = made
        ctx.save_for_backward(log_weights, precision_cholesky, scale, whitening)
        ctx.mark_non_differentiable(log_weights, precision_cholesky)
        ctx.set_materialize_grads(False)
        return made

    @staticmethod
    def backward(ctx, grad_whitening, grad_offsets, *_):
        if torch.is_grad_enabled():  # only under create_graph=True
            _refuse_double_backward("whitened_components")(ctx)
        _, _, _, whitening = saved = ctx.saved_tensors
        if grad_whitening is None:
            grad_whitening = torch.zeros_like(whitening)
        if grad_offsets is None:
            grad_offsets = whitening.new_zeros(len(whitening))
        upstream, wanted = (grad_whitening, grad_offsets), (False, False, True)
        *_, grad_scale = _whitened_components_backward(*upstream, *saved, False, wanted)
        return None, None, grad_scale, None


class _KL(torch.autograd.Function):
    """Entropy and log-density of a batch in one call; see :func:`mixture_kl`."""

    @staticmethod
    def forward(ctx, z, centers, whitening, offsets, scale, transpose):
        inputs = (z, centers, whitening, offsets, scale)
        kl, softmax = backends.call("kl", z, z.shape[1], *inputs, transpose)
        ctx.transpose = transpose
        ctx.save_for_backward(*inputs, softmax)
        return kl

    @staticmethod
    def backward(ctx, grad_kl):
        if torch.is_grad_enabled():  # only under create_graph=True
            _refuse_double_backward("mixture_log_prob")(ctx)
        saved = ctx.saved_tensors
        grads = backends.call(
            "kl_backward", grad_kl, saved[0].shape[1], grad_kl, *saved, ctx.transpose
        )
        return *grads, None


# --- the public functions ---


def whitened_components(
    log_weights: Tensor,
    precision_cholesky: Tensor | None,
    scale: Tensor | None,
    num_centers: int,
    expected: bool = False,
) -> tuple[Tensor, Tensor]:
    """Whitening matrices and offsets of Gaussian components whose centers are uncertain.

    Center j = c K + k is q(mu_j) = N(m_j, S_j) with S = s s^T; the K centers of component c share
    the weight pi_c and the precision Lambda_c = L_c L_c^T:

        marginal   A A^T = (Lambda^-1 + S)^-1,  c = log(pi/K) - D/2 log 2 pi + log det A
        expected   A = L,  c = log(pi/K) - D/2 log 2 pi + log det L - 1/2 tr(Lambda S)

    Both whiten transposed, l = c - 1/2 |A^T (z - m)|^2: log(pi/K) + log N(z; m, Lambda^-1 + S) and
    log(pi/K) + E_q(mu)[log N(z; mu, Lambda^-1)]. Without S both are A = L. Without Lambda^-1 both
    are A = s^-1, which whitens untransposed.

    Differentiable once in all tensors; for A's gradient G, g that of c, and
    M = tril(A^T G) + g I made symmetric, the marginal gradient of s is -tril(A M A^T s) and needs
    neither L nor a Cholesky factorisation.

    Parameters
    ----------
    log_weights : Tensor [C]
        log pi; -inf for a pruned component. float32 or float64 (half precisions are computed in
        float32; of several dtypes the widest).
    precision_cholesky : Tensor [C, D, D] or None
        L, of which the lower triangle is read, with a positive diagonal; None for Lambda^-1 = 0.
    scale : Tensor [J, D, D] or [J, D] or None
        s, of which the lower triangle is read, or its diagonal; None for S = 0.
    num_centers : int
        J; a multiple of C, K = J / C.
    expected : bool
        The expected form instead of the marginal one.

    Returns
    -------
    whitening : Tensor [J, D, D]
        A, lower triangular with a positive diagonal; to be used with ``transpose=True`` unless
        ``precision_cholesky`` is None.
    offsets : Tensor [J]
        Both are float64 in spite of float32 arguments where float32 would lose digits of
        |A^T (z - m)|^2; never on GPUs and under ``torch.compile``, which do not look at values.

    Raises
    ------
    TypeError, ValueError
        As the module says, and for a component without a positive-definite covariance.

    Notes
    -----
    Stirn & Knowles (2024), arXiv 2402.04412, equations of the prior. With P = s^T L and
    I + P^T P = U U^T, U upper triangular, the marginal A is L U^-T: nothing ill-conditioned is
    inverted. Arithmetic is in float64.
    """
    inputs = _check_components(log_weights, precision_cholesky, scale, num_centers)
    if torch.compiler.is_compiling():
        return torch.ops.vmm_fast.whitened_components(*inputs, num_centers, expected)
    whitening, offsets, condition = _WhitenedComponents.apply(*inputs, num_centers, expected)
    if (
        condition is not None
        and whitening.dtype == torch.float32
        and condition > _FLOAT32_CONDITION
    ):
        L, s = (None if x is None else x.double() for x in inputs[1:])
        return whitened_components(inputs[0].double(), L, s, num_centers, expected)
    return whitening, offsets


def stored_components(
    logits: Tensor, raw_precision: Tensor, scale: Tensor | None, num_centers: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Marginal :func:`whitened_components` from what a prior stores, in one launch on GPUs.

    log pi = log softmax(logits) and L = tril(raw_precision, -1) + diag softplus(diag
    raw_precision). Differentiable once, in ``scale`` alone.

    Parameters
    ----------
    logits : Tensor [C]
    raw_precision : Tensor [C, D, D]
    scale, num_centers
        As for :func:`whitened_components`.

    Returns
    -------
    whitening : Tensor [J, D, D]
    offsets : Tensor [J]
    log_weights : Tensor [C]
    precision_cholesky : Tensor [C, D, D]

    Raises
    ------
    TypeError, ValueError
        As the module says.
    """
    logits, L, scale = _check_components(logits, raw_precision, scale, num_centers)
    assert L is not None
    return _StoredComponents.apply(logits.detach(), L.detach(), scale, num_centers)


def mixture_log_prob(
    z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, transpose: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and expectation of the log-joint, in nats.

    lse_i = log sum_j exp l_ij and expected_i = sum_j q_ij l_ij with q = softmax(l). Their
    difference is the entropy of the assignment q_i.

    Differentiable once in all tensors: with w_ij = q_ij (g_i + h_i (1 + l_ij - expected_i)) for
    upstream gradients g of lse and h of expected, and N, s, M the sums of
    :func:`mixture_statistics` with w in place of q, the gradients are
    N for offsets, A^T A s for centers, -tril(A M) for whitening, -sum_j w A^T A (z - m) for z.

    Parameters
    ----------
    z : Tensor [B, D]
        Points; float32 or float64 (half precisions are computed in float32).
    centers : Tensor [J, D]
    whitening : Tensor [J, D, D]
        Lower triangular.
    offsets : Tensor [J]
        Finite, or -inf for a pruned component.
    transpose : bool
        Whiten with A^T, as with a precision's Cholesky factor A.

    Returns
    -------
    lse : Tensor [B]
    expected : Tensor [B]

    Raises
    ------
    TypeError, ValueError
        As the module says.

    Notes
    -----
    The online log-sum-exp is that of Milakov & Gimelshein (2018), arXiv 1805.02867.
    """
    z, centers, whitening, offsets = _check(z, centers, whitening, offsets)
    if torch.compiler.is_compiling():
        return torch.ops.vmm_fast.mixture_log_prob(z, centers, whitening, offsets, transpose)[:2]
    return _LogProb.apply(z, centers, whitening, offsets, transpose)


def mixture_kl(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    transpose: bool,
    scale: Tensor,
) -> Tensor:
    """Estimate KL(q_i || p) of Gaussian posteriors from a sample z_i of each, in nats.

    kl_i = -H(q_i) - lse_i with lse of :func:`mixture_log_prob` and
    H(q_i) = sum_r log s_irr + D/2 log 2 pi e. Differentiable once in all tensors.

    Parameters
    ----------
    z, centers, whitening, offsets, transpose
        As for :func:`mixture_log_prob`; z_i ~ q_i.
    scale : Tensor [B, D] or [B, D, D]
        Standard deviations of q_i, or the lower-triangular s_i of which the diagonal is read;
        positive.

    Returns
    -------
    Tensor [B]

    Raises
    ------
    TypeError, ValueError
        As the module says, and for a scale that is not finite and positive.
    """
    z, centers, whitening, offsets = _check(z, centers, whitening, offsets)
    size, dim = z.shape
    if not isinstance(scale, Tensor) or scale.shape not in ((size, dim), (size, dim, dim)):
        shape = list(scale.shape) if isinstance(scale, Tensor) else type(scale).__name__
        raise ValueError(
            f"scale must have shape [B, D] = {[size, dim]} or [B, D, D], but has {shape}"
        )
    if scale.dtype not in _FLOATS and scale.dtype not in _HALVES:
        raise TypeError(
            f"scale must be float64, float32, float16 or bfloat16, but is {scale.dtype}"
        )
    if scale.device != z.device:
        raise ValueError(f"scale must be on z's device {z.device}, but is on {scale.device}")
    if scale.dtype != z.dtype:
        scale = scale.to(z.dtype)
    if torch.compiler.is_compiling():
        lse, _ = mixture_log_prob(z, centers, whitening, offsets, transpose)
        return kl_from_lse(lse, scale)
    return _KL.apply(z, centers, whitening, offsets, scale, transpose)


def mixture_statistics(
    z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, transpose: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Sufficient statistics under the responsibilities q = softmax(l), summed around the centers.

    N_j = sum_i q_ij, s_j = sum_i q_ij (z_i - m_j), M_j = sum_i q_ij (z_i - m_j)(z_i - m_j)^T.
    Not differentiable. Sums are taken in a fixed order; on CPUs in float64 from tile to tile of
    points, on GPUs in z's dtype (N and s with the rounding error carried along; Kahan 1965).

    Parameters
    ----------
    z, centers, whitening, offsets, transpose
        As for :func:`mixture_log_prob`.

    Returns
    -------
    N : Tensor [J]
    s : Tensor [J, D]
    M : Tensor [J, D, D]

    Raises
    ------
    TypeError, ValueError
        As the module says.
    """
    arguments = (x.detach() for x in _check(z, centers, whitening, offsets))
    return torch.ops.vmm_fast.mixture_statistics(*arguments, transpose)


def mixture_log_joint(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    transpose: bool = False,
    pseudo_inputs_per_component: int = 1,
) -> Tensor:
    """Log-joint of every component, l_ic = log sum_k exp l_i(c,k), in nats.

    Components are runs of ``pseudo_inputs_per_component`` neighbours j = c K + k. Where a gradient
    is asked for, the reference computes it.

    Parameters
    ----------
    z, centers, whitening, offsets, transpose
        As for :func:`mixture_log_prob`.
    pseudo_inputs_per_component : int
        K; must divide J.

    Returns
    -------
    Tensor [B, C]
        C = J / K.

    Raises
    ------
    TypeError, ValueError
        As the module says.
    """
    return _grouped(
        "mixture_log_joint", z, centers, whitening, offsets, transpose, pseudo_inputs_per_component
    )


def mixture_responsibilities(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    transpose: bool = False,
    pseudo_inputs_per_component: int = 1,
) -> Tensor:
    """Responsibilities softmax_c(l_ic), with the arguments of :func:`mixture_log_joint`.

    Returns
    -------
    Tensor [B, C]
        Rows sum to 1.

    Raises
    ------
    TypeError, ValueError
        As the module says.
    """
    return _grouped(
        "mixture_responsibilities",
        z,
        centers,
        whitening,
        offsets,
        transpose,
        pseudo_inputs_per_component,
    )


def _grouped(name, z, centers, whitening, offsets, transpose, per_component) -> Tensor:
    inputs = _check(z, centers, whitening, offsets, per_component)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        look = z.is_cpu and not torch.compiler.is_compiling()
        if look:
            check_values(*inputs)
        found = getattr(reference, name)(*inputs, transpose, per_component)
        if look:
            check_near(found)
        return found
    return getattr(torch.ops.vmm_fast, name)(*inputs, transpose, per_component)


def mixture_assign(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    transpose: bool = False,
    pseudo_inputs_per_component: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Assign every point to its most probable component, without a [B, C] matrix.

    Arguments are those of :func:`mixture_log_joint`. Not differentiable.

    Returns
    -------
    label : Tensor [B], int64
        argmax_c l_ic, the first among equals.
    probability : Tensor [B]
        Responsibility of that component.
    entropy : Tensor [B]
        Entropy of the responsibilities, in nats, 0 to log C.

    Raises
    ------
    TypeError, ValueError
        As the module says.
    """
    inputs = _check(z, centers, whitening, offsets, pseudo_inputs_per_component)
    arguments = (x.detach() for x in inputs)
    return torch.ops.vmm_fast.mixture_assign(*arguments, transpose, pseudo_inputs_per_component)
