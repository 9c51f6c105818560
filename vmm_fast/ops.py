"""The operations on a whitened mixture: checked, dispatched by device, differentiable, compilable.

A whitened mixture has centers m [J, D], lower-triangular matrices A [J, D, D] (``whitening``) and
offsets c [J]. All operations are functions of

    l_ij = c_j - 1/2 |A_j (z_i - m_j)|^2          (``transpose=True``: A_j^T in place of A_j)

For a Gaussian mixture, A = chol(Sigma)^-1 and c = log pi - D/2 log 2 pi + log det A. Only the lower
triangle of ``whitening`` is read. An offset of -inf prunes its component.

On CPUs, float32 and float64 run in the compiled core; float16 and bfloat16 are computed in float32;
other devices run the reference (which does not look for overflow).
Nothing of size [B, J] is stored by :func:`mixture_log_prob` (its
backward recomputes), :func:`mixture_statistics` and :func:`mixture_assign`.

Every function raises ``ValueError`` or ``TypeError``, naming the argument, for wrong shapes, dtypes
or devices, for values that are not finite, and for a z so far from every center that its
log-density overflows the dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmm_fast import _core, reference

__all__ = [
    "mixture_assign",
    "mixture_log_joint",
    "mixture_log_prob",
    "mixture_responsibilities",
    "mixture_statistics",
]

_FLOATS = {torch.float32: "float32", torch.float64: "float64"}
_HALVES = (torch.float16, torch.bfloat16)


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


def _check_values(z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor) -> None:
    """Check what the compiled core checks by itself, for the devices that it does not serve."""
    for name, value in (("z", z), ("centers", centers), ("whitening", whitening.tril())):
        if not value.isfinite().all():
            raise ValueError(f"{name} must be finite, but has a NaN or infinite value")
    if not (offsets < torch.inf).all():
        raise ValueError("offsets must be finite or -inf, but has a NaN or infinite value")
    if not (offsets > -torch.inf).any():
        raise ValueError("offsets are all -inf, so that every component is pruned")


# --- the compiled core: addresses and sizes ---


def _core_call(name: str, inputs: tuple[Tensor, ...], transpose: bool, *rest: Any) -> None:
    """Call an operation of the compiled core; ``rest`` are tensors (by address) and integers."""
    inputs = tuple(x.contiguous() for x in inputs)
    z, centers = inputs[:2]
    function = getattr(_core, f"{name}_{_FLOATS[z.dtype]}")
    function(
        *(x.data_ptr() for x in inputs),
        z.shape[0],
        centers.shape[0],
        z.shape[1],
        transpose,
        torch.get_num_threads(),
        *(x.data_ptr() if isinstance(x, Tensor) else x for x in rest),
    )


def _log_prob_cpu(
    z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, transpose: bool
) -> tuple[Tensor, Tensor, Tensor]:
    size = z.shape[0]
    out = (z.new_empty(size), z.new_empty(size), z.new_empty(3, size))
    _core_call("log_prob", (z, centers, whitening, offsets), transpose, *out)
    return out


def _log_prob_backward_cpu(
    grad_lse: Tensor,
    grad_expected: Tensor,
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    softmax: Tensor,
    transpose: bool,
) -> tuple[Tensor, ...]:
    inputs = (z, centers, whitening, offsets)
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
    upstream = (grad_lse.contiguous(), grad_expected.contiguous())
    _core_call("log_prob_backward", inputs, transpose, softmax, *upstream, *grads)
    return grads


def _statistics_cpu(
    z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, transpose: bool
) -> tuple[Tensor, ...]:
    out = tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (offsets, centers, whitening)
    )
    _core_call("statistics", (z, centers, whitening, offsets), transpose, *out)
    return out


def _matrix_cpu(name: str):
    def function(
        z: Tensor,
        centers: Tensor,
        whitening: Tensor,
        offsets: Tensor,
        transpose: bool,
        per_component: int,
    ) -> Tensor:
        out = z.new_empty(z.shape[0], centers.shape[0] // per_component)
        _core_call(name, (z, centers, whitening, offsets), transpose, per_component, out)
        return out

    return function


def _assign_cpu(
    z: Tensor,
    centers: Tensor,
    whitening: Tensor,
    offsets: Tensor,
    transpose: bool,
    per_component: int,
) -> tuple[Tensor, Tensor, Tensor]:
    size = z.shape[0]
    label = z.new_empty(size, dtype=torch.int64)
    out = (label, z.new_empty(size), z.new_empty(size))
    _core_call("assign", (z, centers, whitening, offsets), transpose, per_component, *out)
    return out


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


def _with_values_checked(function):
    def checked(z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, *rest: Any):
        _check_values(z, centers, whitening, offsets)
        return function(z, centers, whitening, offsets, *rest)

    return checked


def _log_prob_reference(z, centers, whitening, offsets, transpose):
    lse, expected = reference.mixture_log_prob(z, centers, whitening, offsets, transpose)
    return lse, expected, torch.stack([lse, torch.zeros_like(lse), expected - lse])


def _log_prob_backward_reference(
    grad_lse, grad_expected, z, centers, whitening, offsets, softmax, transpose
):
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (z, centers, whitening, offsets)]
        outputs = reference.mixture_log_prob(*inputs, transpose)
        return torch.autograd.grad(outputs, inputs, (grad_lse, grad_expected))


_IMPLEMENTATIONS = {
    "mixture_log_prob": (_log_prob_cpu, _with_values_checked(_log_prob_reference)),
    "mixture_log_prob_backward": (_log_prob_backward_cpu, _log_prob_backward_reference),
    "mixture_statistics": (_statistics_cpu, _with_values_checked(reference.mixture_statistics)),
    "mixture_log_joint": (
        _matrix_cpu("log_joint"),
        _with_values_checked(reference.mixture_log_joint),
    ),
    "mixture_responsibilities": (
        _matrix_cpu("responsibilities"),
        _with_values_checked(reference.mixture_responsibilities),
    ),
    "mixture_assign": (_assign_cpu, _with_values_checked(reference.mixture_assign)),
}
for _name, (_cpu, _elsewhere) in _IMPLEMENTATIONS.items():
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _elsewhere, "CompositeExplicitAutograd")


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


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.transpose = inputs
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx, grad_lse, grad_expected, _):
    saved = ctx.saved_tensors
    backward = torch.ops.vmm_fast.mixture_log_prob_backward
    return *backward(grad_lse, grad_expected, *saved, ctx.transpose), None


def _refuse_double_backward(ctx, *grads):
    raise RuntimeError(
        "mixture_log_prob has no second derivative in the compiled core; use "
        "vmm_fast.reference.mixture_log_prob, which has"
    )


torch.library.register_autograd(
    "vmm_fast::mixture_log_prob", _backward, setup_context=_save, lib=_library
)
torch.library.register_autograd(
    "vmm_fast::mixture_log_prob_backward", _refuse_double_backward, lib=_library
)


class _LogProb(torch.autograd.Function):
    """The same autograd without the op's dispatch, which costs more than a small kernel."""

    @staticmethod
    def forward(ctx, z, centers, whitening, offsets, transpose):
        lse, expected, softmax = _log_prob_cpu(z, centers, whitening, offsets, transpose)
        ctx.transpose = transpose
        ctx.save_for_backward(z, centers, whitening, offsets, softmax)
        return lse, expected

    @staticmethod
    def backward(ctx, grad_lse, grad_expected):
        if torch.is_grad_enabled():  # only under create_graph=True
            _refuse_double_backward(ctx)
        return *_log_prob_backward_cpu(
            grad_lse, grad_expected, *ctx.saved_tensors, ctx.transpose
        ), None


# --- the public functions ---


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
    if z.is_cpu and not torch.compiler.is_compiling():
        return _LogProb.apply(z, centers, whitening, offsets, transpose)
    return torch.ops.vmm_fast.mixture_log_prob(z, centers, whitening, offsets, transpose)[:2]


def mixture_statistics(
    z: Tensor, centers: Tensor, whitening: Tensor, offsets: Tensor, transpose: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Sufficient statistics under the responsibilities q = softmax(l), summed around the centers.

    N_j = sum_i q_ij, s_j = sum_i q_ij (z_i - m_j), M_j = sum_i q_ij (z_i - m_j)(z_i - m_j)^T.
    Not differentiable. Sums are taken in float64 in a fixed order.

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
        if not torch.compiler.is_compiling():
            _check_values(*inputs)
        return getattr(reference, name)(*inputs, transpose, per_component)
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
