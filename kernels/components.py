"""The components' matrices and offsets, :func:`vmm_fast.ops.whitened_components`, and backward.

With L the precision's Cholesky factor, S = s s^T the covariance of the center and P = s^T L

    marginal   I + P^T P = U U^T, U upper triangular,   A = L U^-T
    expected   A = L,   the offset loses 1/2 |P|^2
    without Lambda^-1   A = s^-1

and offset = log(pi / K) - D/2 log 2 pi + log det A. Backward, for gradients G of A and g of the
offset, with M = tril(A^T G) + g I made symmetric

    marginal   grad_s = -tril(A M A^T s),   grad_L = tril(L^-T U^-T M U^-1)
    expected   grad_s = -g tril(L L^T s),   grad_L = G + g (diag(1 / L) - tril(S L))
    without Lambda^-1   grad_s = -tril(A^T G A^T) - g diag(A)

so that no Cholesky factorisation is differentiated (as in ``csrc/components.h``). L and log pi may
come from a prior's stored parameters on the way: L = tril(raw, -1) + diag softplus(diag raw) and
log pi = log softmax(logits). A matrix is a tile [P, P] in registers, where single elements cannot
be accessed: a row or a column is read by a masked sum, and each step of a factorisation is a rank-1
update of the tile. Arithmetic is in float64, since scales may differ by a factor of a thousand.
One program computes one center or, in the backward, all centers of a component in order: the same
input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmm_fast.kernels import launch
from vmm_fast.kernels.blocks import BLOCK, log_normaliser, log_pivot, padded, softplus

WARPS = {16: 1, 32: 4}


@triton.jit
def load_lower(pointer, index, D: tl.constexpr):
    """Return the lower triangle of a matrix of [.., D, D], float64."""
    P: tl.constexpr = padded(D)
    row = tl.arange(0, P)[:, None]
    column = tl.arange(0, P)[None, :]
    addresses = pointer + tl.cast(index, tl.int64) * (D * D) + row * D + column
    return tl.load(addresses, mask=(row < D) & (column <= row), other=0.0).to(tl.float64)


@triton.jit
def store_lower(pointer, index, matrix, D: tl.constexpr):
    """Write the lower triangle of a matrix, and zeros above it."""
    P: tl.constexpr = padded(D)
    row = tl.arange(0, P)[:, None]
    column = tl.arange(0, P)[None, :]
    addresses = pointer + tl.cast(index, tl.int64) * (D * D) + row * D + column
    matrix = tl.where(column <= row, matrix, 0.0)
    tl.store(addresses, matrix, mask=(row < D) & (column < D))


@triton.jit
def load_diagonal(pointer, index, D: tl.constexpr):
    """Return one diagonal of [.., D], float64."""
    P: tl.constexpr = padded(D)
    columns = tl.arange(0, P)
    addresses = pointer + tl.cast(index, tl.int64) * D + columns
    return tl.load(addresses, mask=columns < D, other=0.0).to(tl.float64)


@triton.jit
def diagonal(matrix, D: tl.constexpr):
    """Return the diagonal [P] of a tile, with ones from D on."""
    P: tl.constexpr = padded(D)
    row = tl.arange(0, P)[:, None]
    column = tl.arange(0, P)[None, :]
    return tl.sum(tl.where(row == column, tl.where(column < D, matrix, 1.0), 0.0), 0)


@triton.jit
def constrained(raw, D: tl.constexpr):
    """Return L from its unconstrained form."""
    P: tl.constexpr = padded(D)
    row = tl.arange(0, P)[:, None]
    column = tl.arange(0, P)[None, :]
    return tl.where((row == column) & (row < D), softplus(raw), raw)


@triton.jit
def dot(X, Y, COLUMNWISE: tl.constexpr = False):
    """Return X Y; if COLUMNWISE one column of X at a time, in fewer registers than ``tl.dot``."""
    if COLUMNWISE:
        row = tl.arange(0, X.shape[0])[:, None]
        column = tl.arange(0, X.shape[0])[None, :]
        total = tl.zeros_like(X)
        for k in range(X.shape[0]):
            x = tl.sum(tl.where(column == k, X, 0.0), 1)
            y = tl.sum(tl.where(row == k, Y, 0.0), 0)
            total += x[:, None] * y[None, :]
    else:
        total = tl.dot(X, Y, input_precision="ieee", out_dtype=tl.float64)
    return total


def scale_form(scale: Tensor | None) -> str:
    """Return the layout of s as kernels name it: "none", "diagonal" or "full"."""
    return "none" if scale is None else "diagonal" if scale.ndim == 2 else "full"


@triton.jit
def scaled_precision(
    scale, j, L, D: tl.constexpr, SCALE: tl.constexpr, COLUMNWISE: tl.constexpr = False
):
    """Return P = s^T L."""
    if SCALE == "diagonal":
        return load_diagonal(scale, j, D)[:, None] * L
    else:
        s = load_lower(scale, j, D)
        return dot(tl.trans(s), L, COLUMNWISE)


@triton.jit
def identity(D: tl.constexpr):
    """Return an identity matrix as a tile."""
    P: tl.constexpr = padded(D)
    row = tl.arange(0, P)[:, None]
    column = tl.arange(0, P)[None, :]
    return tl.where(row == column, 1.0, 0.0).to(tl.float64)


@triton.jit
def times_inverse_root(gram, X, D: tl.constexpr):
    """Return X U^-T for U U^T = gram, U upper triangular, by elimination from the last column.

    If ``gram`` is not positive definite, the result is not finite.
    """
    P: tl.constexpr = padded(D)
    row = tl.arange(0, P)
    column = tl.arange(0, P)[None, :]
    for step in range(D):
        t = D - 1 - step
        # gram is symmetric: its row t is its column t.
        across = tl.sum(tl.where(row[:, None] == t, gram, 0.0), 0)
        down = tl.sum(tl.where(column == t, gram, 0.0), 1)
        pivot = tl.sum(tl.where(row == t, down, 0.0), 0)
        root = tl.sqrt(pivot)
        across = tl.where(row < t, across, 0.0)
        # Divided once by the pivot, not twice by its root: it rounds less, if gram is singular.
        down = tl.where(row < t, down / pivot, 0.0)
        x = tl.sum(tl.where(column == t, X, 0.0), 1) / root
        X = tl.where(column == t, x[:, None], X - x[:, None] * (across / root)[None, :])
        gram -= down[:, None] * across[None, :]
    return X


@triton.jit
def times_inverse_factor(scaled, X, D: tl.constexpr, COLUMNWISE: tl.constexpr = False):
    """Return X U^-T for U U^T = I + P^T P, given P."""
    gram = dot(tl.trans(scaled), scaled, COLUMNWISE)
    return times_inverse_root(gram + identity(D), X, D)


@triton.jit
def solve_lower(pointer, index, X, D: tl.constexpr):
    """Return L^-1 X for a matrix L of [.., D, D]."""
    P: tl.constexpr = padded(D)
    row = tl.arange(0, P)
    origin = pointer + tl.cast(index, tl.int64) * (D * D)
    for k in range(D):
        below = tl.load(origin + row * D + k, mask=(row > k) & (row < D), other=0.0).to(tl.float64)
        pivot = tl.load(origin + k * D + k).to(tl.float64)
        x = tl.sum(tl.where(row[:, None] == k, X, 0.0), 0) / pivot
        X = tl.where(row[:, None] == k, x[None, :], X - below[:, None] * x[None, :])
    return X


@triton.jit
def solve_lower_transposed(pointer, index, X, D: tl.constexpr):
    """Return L^-T X for a matrix L of [.., D, D]."""
    P: tl.constexpr = padded(D)
    row = tl.arange(0, P)
    origin = pointer + tl.cast(index, tl.int64) * (D * D)
    for step in range(D):
        k = D - 1 - step
        before = tl.load(origin + k * D + row, mask=row < k, other=0.0).to(tl.float64)
        pivot = tl.load(origin + k * D + k).to(tl.float64)
        x = tl.sum(tl.where(row[:, None] == k, X, 0.0), 0) / pivot
        X = tl.where(row[:, None] == k, x[None, :], X - before[:, None] * x[None, :])
    return X


@triton.jit(do_not_specialize=["count", "per_component"])
def components_kernel(
    log_weights,  # [C]; the logits where STORED
    precision_cholesky,  # [C, D, D], or not read; in its unconstrained form where STORED
    scale,  # [J, D, D], [J, D], or not read
    whitening,  # [J, D, D]
    offsets,  # [J]
    log_weights_out,  # [C], written if STORED
    precision_cholesky_out,  # [C, D, D], written if STORED
    count,  # C
    per_component,  # K
    D: tl.constexpr,
    FORM: tl.constexpr,  # "marginal", "expected", "precision" (no scale), "scale" (no precision)
    SCALE: tl.constexpr,  # "none", "diagonal" or "full"
    STORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write A_j and the offset of one center; if STORED also log pi_c and L_c."""
    j = tl.program_id(0)
    c = j // per_component
    log_weight = tl.load(log_weights + c).to(tl.float64)
    if STORED:
        log_weight -= log_normaliser(log_weights, count, BLOCK)
        if j % per_component == 0:
            tl.store(log_weights_out + c, log_weight)
    penalty = tl.zeros([1], tl.float64)
    if FORM == "scale":
        if SCALE == "diagonal":
            P: tl.constexpr = padded(D)
            inside = (tl.arange(0, P) < D)[:, None]
            s = load_diagonal(scale, j, D)[:, None]
            A = identity(D) / tl.where(inside, s, 1.0)
        else:
            A = solve_lower(scale, j, identity(D), D)
    else:
        A = load_lower(precision_cholesky, c, D)
        if STORED:
            A = constrained(A, D)
            if j % per_component == 0:
                store_lower(precision_cholesky_out, c, A, D)
        if FORM != "precision":
            scaled = scaled_precision(scale, j, A, D, SCALE)
            if FORM == "marginal":
                A = times_inverse_factor(scaled, A, D)
            else:
                penalty += 0.5 * tl.sum(tl.sum(scaled * scaled, 1), 0)
    store_lower(whitening, j, A, D)
    log_det = tl.sum(log_pivot(diagonal(A, D)), 0)
    share = log_weight - tl.log(per_component.to(tl.float64))
    # 1/2 log 2 pi
    constant = tl.full([1], 0.9189385332046727, tl.float64) * D
    tl.store(offsets + j + tl.arange(0, 1), share + (log_det - constant - penalty))


@triton.jit(do_not_specialize=["per_component"])
def components_backward_kernel(
    log_weights,  # its gradient [C], or not written
    precision_cholesky,  # [C, D, D], or not read
    grad_precision,  # [C, D, D], or not written
    scale,  # [J, D, D], [J, D], or not read
    grad_scale,  # as scale, or not written
    whitening,  # [J, D, D]
    grad_whitening,  # [J, D, D]
    grad_offsets,  # [J]
    per_component,  # K
    D: tl.constexpr,
    FORM: tl.constexpr,
    SCALE: tl.constexpr,
    WANT_WEIGHTS: tl.constexpr,
    WANT_PRECISION: tl.constexpr,
    WANT_SCALE: tl.constexpr,
):
    """Write the wanted gradients of one component and of its K centers' scales."""
    P: tl.constexpr = padded(D)
    row = tl.arange(0, P)[:, None]
    column = tl.arange(0, P)[None, :]
    # With the precision's gradient in registers too, products of larger tiles would spill.
    COLUMNWISE: tl.constexpr = WANT_PRECISION and D > 16
    c = tl.program_id(0)
    by_weight = tl.zeros([1], tl.float64)
    by_precision = tl.zeros([P, P], tl.float64)
    for k in range(per_component):
        j = c * per_component + k
        g = tl.load(grad_offsets + j).to(tl.float64)
        by_weight += g
        if WANT_PRECISION or WANT_SCALE:
            G = load_lower(grad_whitening, j, D)
            if FORM == "marginal":
                A = load_lower(whitening, j, D)
                M = dot(tl.trans(A), G, COLUMNWISE)
                M = tl.where(column <= row, M, 0.0)
                M = tl.where(column < row, M, 0.0) + tl.trans(M) + g * identity(D)
                if WANT_SCALE:
                    H = dot(A, M, COLUMNWISE)
                    store_scale_product(grad_scale, scale, j, H, A, -1.0, D, SCALE, COLUMNWISE)
                if WANT_PRECISION:
                    L = load_lower(precision_cholesky, c, D)
                    scaled = scaled_precision(scale, j, L, D, SCALE, COLUMNWISE)
                    inverse = times_inverse_factor(scaled, identity(D), D, COLUMNWISE)
                    N = dot(inverse, M, COLUMNWISE)
                    N = dot(N, tl.trans(inverse), COLUMNWISE)
                    by_precision += solve_lower_transposed(precision_cholesky, c, N, D)
            elif FORM == "scale":
                A = load_lower(whitening, j, D)
                H = dot(tl.trans(A), G)
                H = dot(H, tl.trans(A))
                H = -H - g * tl.where(row == column, A, 0.0)
                if SCALE == "diagonal":
                    store_diagonal(grad_scale, j, tl.sum(tl.where(row == column, H, 0.0), 1), D)
                else:
                    store_lower(grad_scale, j, H, D)
            else:
                L = load_lower(precision_cholesky, c, D)
                if WANT_PRECISION:
                    inside = (row == column) & (row < D)
                    by_precision += G + tl.where(inside, g / tl.where(inside, L, 1.0), 0.0)
                if FORM == "expected":
                    if WANT_PRECISION:
                        scaled = scaled_precision(scale, j, L, D, SCALE, COLUMNWISE)
                        if SCALE == "diagonal":
                            product = load_diagonal(scale, j, D)[:, None] * scaled
                        else:
                            s = load_lower(scale, j, D)
                            product = dot(s, scaled, COLUMNWISE)
                        by_precision -= g * product
                    if WANT_SCALE:
                        store_scale_product(grad_scale, scale, j, L, L, -g, D, SCALE, COLUMNWISE)
    if WANT_WEIGHTS:
        tl.store(log_weights + c + tl.arange(0, 1), by_weight)
    if WANT_PRECISION:
        store_lower(grad_precision, c, by_precision, D)


@triton.jit
def store_diagonal(pointer, index, values, D: tl.constexpr):
    """Write one diagonal of [.., D]."""
    P: tl.constexpr = padded(D)
    columns = tl.arange(0, P)
    tl.store(pointer + tl.cast(index, tl.int64) * D + columns, values, mask=columns < D)


@triton.jit
def store_scale_product(
    grad_scale,
    scale,
    j,
    X,
    Y,
    factor,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    COLUMNWISE: tl.constexpr,
):
    """Write the scale's gradient factor tril(X Y^T s)."""
    if SCALE == "diagonal":
        slope = factor * tl.sum(X * Y, 1) * load_diagonal(scale, j, D)
        store_diagonal(grad_scale, j, slope, D)
    else:
        s = load_lower(scale, j, D)
        product = dot(X, dot(tl.trans(Y), s, COLUMNWISE), COLUMNWISE)
        store_lower(grad_scale, j, factor * product, D)


def form(precision_cholesky: Tensor | None, scale: Tensor | None, expected: bool) -> str:
    """Return the name of the formula that applies: a kernel's constant FORM."""
    if precision_cholesky is None:
        return "scale"
    if scale is None:
        return "precision"
    return "expected" if expected else "marginal"


def whitened_components(
    log_weights: Tensor,
    precision_cholesky: Tensor | None,
    scale: Tensor | None,
    num_centers: int,
    expected: bool,
) -> tuple[Tensor, Tensor]:
    """Return A [J, D, D] and offsets [J]; tensors are contiguous and share dtype and device.

    A component whose covariance is not finite and positive definite gives NaN.
    """
    inputs = (log_weights, precision_cholesky, scale)
    return _build(*inputs, num_centers, form(precision_cholesky, scale, expected))


def stored_components(
    logits: Tensor, raw_precision: Tensor, scale: Tensor | None, num_centers: int
) -> tuple[Tensor, ...]:
    """Return marginal A and offsets, log pi [C] and L [C, D, D] of a prior's stored parameters."""
    made = (torch.empty_like(logits), torch.empty_like(raw_precision))
    kind = form(raw_precision, scale, expected=False)
    return *_build(logits, raw_precision, scale, num_centers, kind, made), *made


def _build(
    log_weights: Tensor,
    precision_cholesky: Tensor | None,
    scale: Tensor | None,
    num_centers: int,
    form: str,
    made: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    given = scale if precision_cholesky is None else precision_cholesky
    assert given is not None
    dim, count = given.shape[-1], len(log_weights)
    whitening = log_weights.new_empty(num_centers, dim, dim)
    offsets = log_weights.new_empty(num_centers)
    arguments = (
        log_weights,
        log_weights if precision_cholesky is None else precision_cholesky,
        log_weights if scale is None else scale,
        whitening,
        offsets,
        *(made or (offsets, whitening)),  # not written unless STORED
    )
    constants = {
        "D": dim,
        "FORM": form,
        "SCALE": scale_form(scale),
        "STORED": made is not None,
        "BLOCK": BLOCK,
        **launch.options(WARPS[padded(dim)]),
    }
    with launch.on(log_weights.device):
        components_kernel[(num_centers,)](*arguments, count, num_centers // count, **constants)
    return whitening, offsets


def whitened_components_backward(
    grad_whitening: Tensor,
    grad_offsets: Tensor,
    log_weights: Tensor,
    precision_cholesky: Tensor | None,
    scale: Tensor | None,
    whitening: Tensor,
    expected: bool,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Return gradients of log_weights, precision_cholesky and scale, None if not wanted."""
    inputs = (log_weights, precision_cholesky, scale)
    grads = [
        torch.empty_like(x) if x is not None and want else None
        for x, want in zip(inputs, wanted, strict=True)
    ]
    components, dim = len(log_weights), whitening.shape[-1]
    per_component = len(whitening) // components

    def present(x: Tensor | None) -> Tensor:
        return whitening if x is None else x  # the kernel does not access it

    arguments = (
        present(grads[0]),
        present(precision_cholesky),
        present(grads[1]),
        present(scale),
        present(grads[2]),
        whitening,
        grad_whitening,
        grad_offsets,
    )
    constants = {
        "D": dim,
        "FORM": form(precision_cholesky, scale, expected),
        "SCALE": scale_form(scale),
        "WANT_WEIGHTS": grads[0] is not None,
        "WANT_PRECISION": grads[1] is not None,
        "WANT_SCALE": grads[2] is not None,
        **launch.options(WARPS[padded(dim)]),
    }
    with launch.on(log_weights.device):
        components_backward_kernel[(components,)](*arguments, per_component, **constants)
    return grads
