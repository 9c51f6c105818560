"""The operations on a whitened mixture: public functions of :mod:`vmm_fast.operations`.

A whitened mixture has centers m [J, D], lower-triangular matrices A [J, D, D] (``whitening``) and
offsets c [J]. All operations are functions of

    l_ij = c_j - 1/2 |A_j (z_i - m_j)|^2          (``transpose=True``: A_j^T in place of A_j)

For a Gaussian mixture, A = chol(Sigma)^-1 and c = log pi - D/2 log 2 pi + log det A. Only the lower
triangle of ``whitening`` is read. An offset of -inf prunes its component.

CPUs run the compiled core, GPUs of NVIDIA and AMD the Triton kernels, other devices plain torch
(:mod:`vmm_fast.backends`), which also computes for forward-mode AD and for transforms of
``torch.func``, but for ``vmap``. Tensors are converted to the widest dtype among them, and at least
to float32. Nothing of size [B, J] is stored by :func:`mixture_log_prob` (its backward recomputes),
:func:`mixture_statistics` and :func:`mixture_assign`.

Every function raises ``ValueError`` or ``TypeError``, naming the argument, for wrong shapes, dtypes
or devices. On CPUs it does so for values that are not finite, and for a z so far from every center
that its log-density overflows the dtype. On GPUs a check would have to wait for the device, so
there these give NaN and -inf.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmm_fast import operations
from vmm_fast.dispatch import check, run

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

# A float32 whitening matrix A of this condition number or more (as bounded from below by its norm
# over its smallest diagonal element) loses digits of |A (z - m)|^2 that a user would miss.
_FLOAT32_CONDITION = 1e4


def _check_centers(num_centers: int, log_weights: Tensor) -> None:
    if not isinstance(num_centers, int):
        return  # :func:`check` refuses what is no integer
    components = len(log_weights) if isinstance(log_weights, Tensor) and log_weights.ndim else 1
    if num_centers < 1 or num_centers % max(components, 1):
        raise ValueError(
            f"num_centers must be a multiple of C = {components}, but is {num_centers}"
        )


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

    Examples
    --------
    >>> log_weights, eye = torch.tensor([0.25, 0.75]).log(), torch.eye(1).expand(2, 1, 1)
    >>> whitening, offsets = whitened_components(log_weights, eye, None, num_centers=2)
    >>> offsets  # log pi - 1/2 log 2 pi
    tensor([-2.3052, -1.2066])
    """
    if precision_cholesky is None and scale is None:
        raise ValueError("precision_cholesky and scale must not both be None")
    _check_centers(num_centers, log_weights)
    operation = operations.WHITENED_COMPONENTS
    given = (log_weights, precision_cholesky, scale, num_centers, expected)
    inputs = check(operation, given, J=num_centers)
    whitening, offsets, condition = run(operation, inputs)
    if condition and whitening.dtype == torch.float32 and condition > _FLOAT32_CONDITION:
        L, s = (x if x is None else x.double() for x in inputs[1:3])
        return whitened_components(inputs[0].double(), L, s, num_centers, expected)
    return whitening, offsets


def stored_components(
    logits: Tensor, raw_precision: Tensor, scale: Tensor | None, num_centers: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the marginal :func:`whitened_components` of a prior's unconstrained parameters.

    One kernel launch on GPUs.

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
    _check_centers(num_centers, logits)
    operation = operations.STORED_COMPONENTS
    inputs = check(operation, (logits, raw_precision, scale, num_centers), J=num_centers)
    return run(operation, inputs)[:4]


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

    Examples
    --------
    >>> mixture = (torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1, 1), torch.zeros(2))
    >>> lse, expected = mixture_log_prob(torch.tensor([[0.0], [1.0]]), *mixture)
    >>> lse
    tensor([0.1931, 0.1269])
    >>> lse - expected  # entropy of the assignment: log 2 half way between two centers
    tensor([0.6931, 0.3653])
    """
    operation = operations.MIXTURE_LOG_PROB
    lse, expected, _ = run(operation, check(operation, (z, centers, whitening, offsets, transpose)))
    return lse, expected


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

    Examples
    --------
    >>> offsets = torch.full((2,), 0.5).log() - 0.5 * np.log(2 * np.pi)
    >>> mixture = (torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1, 1), offsets)
    >>> mixture_kl(torch.ones(1, 1), *mixture, False, scale=torch.full((1, 1), 0.5))
    tensor([0.7594])
    """
    operation = operations.MIXTURE_KL
    inputs = check(operation, (z, centers, whitening, offsets, scale, transpose))
    kl: Tensor = run(operation, inputs)[0]
    return kl


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

    Examples
    --------
    >>> mixture = (torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1, 1), torch.zeros(2))
    >>> counts, sums, squares = mixture_statistics(torch.tensor([[-1.0], [1.5]]), *mixture)
    >>> counts
    tensor([0.9282, 1.0718])
    """
    operation = operations.MIXTURE_STATISTICS
    inputs = check(operation, (z, centers, whitening, offsets, transpose))
    return run(operation, inputs)[:3]


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

    Examples
    --------
    >>> mixture = (torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1, 1), torch.zeros(2))
    >>> mixture_log_joint(torch.tensor([[0.0], [1.0]]), *mixture)
    tensor([[-0.5000, -0.5000],
            [-2.0000,  0.0000]])
    """
    mixture = (z, centers, whitening, offsets)
    operation = operations.MIXTURE_LOG_JOINT
    log_joint: Tensor = _grouped(operation, mixture, transpose, pseudo_inputs_per_component)[0]
    return log_joint


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

    Examples
    --------
    >>> mixture = (torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1, 1), torch.zeros(2))
    >>> mixture_responsibilities(torch.tensor([[0.0], [1.0]]), *mixture)
    tensor([[0.5000, 0.5000],
            [0.1192, 0.8808]])
    """
    mixture = (z, centers, whitening, offsets)
    operation = operations.MIXTURE_RESPONSIBILITIES
    found: Tensor = _grouped(operation, mixture, transpose, pseudo_inputs_per_component)[0]
    return found


def _grouped(
    operation: operations.Operation,
    mixture: tuple[Tensor, ...],
    transpose: bool,
    per_component: int,
) -> tuple[Any, ...]:
    inputs = check(operation, (*mixture, transpose, per_component))
    total = len(inputs[1])
    if per_component < 1 or total % per_component:
        raise ValueError(
            f"pseudo_inputs_per_component must divide J = {total}, but is {per_component}"
        )
    return run(operation, inputs)


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

    Examples
    --------
    >>> mixture = (torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1, 1), torch.zeros(2))
    >>> mixture_assign(torch.tensor([[-1.0], [1.0]]), *mixture)[:2]  # labels and probabilities
    (tensor([0, 1]), tensor([0.8808, 0.8808]))
    """
    mixture = (z, centers, whitening, offsets)
    return _grouped(operations.MIXTURE_ASSIGN, mixture, transpose, pseudo_inputs_per_component)[:3]
