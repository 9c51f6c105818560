"""Matrices beyond 32 dimensions, in blocks, and the kernels of :mod:`components` with them.

A tile [64, 64] of float64 does not stay in registers. Here a matrix is cut into blocks [Q, Q], Q =
32, of which a few are in registers at a time; what lies between two steps goes through scratch
memory in float64, matrices [R, R] with R the dimension D rounded up to blocks. A program has its
own and reads what it has written behind a barrier. Factorisations are left-looking: a block takes
what all finished blocks have for it, then the inverse of a diagonal block, and only that is found
element by element. Blocks of zeros are left out.

The formulas are those of :mod:`components`. Programs take centers (in the backward components) in
turns, so that scratch memory does not grow with their number: at 128 dimensions it is 134 MB, in
the backward 403 MB. D is no constant: one compilation serves all, and loops that the compiler could
unroll would not stay in registers. What is written is the work of one program, in order: the same
input gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vmm_fast.kernels import launch
from vmm_fast.kernels.blocks import log_normaliser, log_pivot, padded, softplus

Q = tl.constexpr(32)
LARGEST_DIM = tl.constexpr(launch.LARGEST_DIM)


@triton.jit
def rounded(D):
    """R."""
    return tl.cdiv(D, Q) * Q


# --- one block ---


@triton.jit
def identity(D: tl.constexpr):
    """A tile that is 1 on the diagonal."""
    P: tl.constexpr = padded(D)
    row = tl.arange(0, P)[:, None]
    column = tl.arange(0, P)[None, :]
    return tl.where(row == column, 1.0, 0.0).to(tl.float64)


@triton.jit
def times_inverse_root(gram, X, D: tl.constexpr):
    """X U^-T for U U^T = gram, U upper triangular, by elimination from the last column on.

    Where ``gram`` is not positive definite, the result is not finite.
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
        # Divided by the pivot, not twice by its root: what is singular leaves less than rounding.
        down = tl.where(row < t, down / pivot, 0.0)
        x = tl.sum(tl.where(column == t, X, 0.0), 1) / root
        X = tl.where(column == t, x[:, None], X - x[:, None] * (across / root)[None, :])
        gram -= down[:, None] * across[None, :]
    return X


@triton.jit
def inverse_lower(block):
    """Inverse of a lower-triangular block."""
    row = tl.arange(0, Q)
    column = tl.arange(0, Q)[None, :]
    X = identity(Q)
    for k in range(Q):
        down = tl.sum(tl.where(column == k, block, 0.0), 1)
        pivot = tl.sum(tl.where(row == k, down, 0.0), 0)
        x = tl.sum(tl.where(row[:, None] == k, X, 0.0), 0) / pivot
        below = tl.where(row > k, down, 0.0)
        X = tl.where(row[:, None] == k, x[None, :], X - below[:, None] * x[None, :])
    return X


@triton.jit
def dot(x, y):
    """Product of blocks."""
    return tl.dot(x, y, input_precision="ieee", out_dtype=tl.float64)


@triton.jit
def places(row, column):
    """Rows [Q, 1] and columns [1, Q] of the block at ``row``, ``column``."""
    return row + tl.arange(0, Q)[:, None], column + tl.arange(0, Q)[None, :]


@triton.jit
def addresses(matrix, row, column, D):
    """Addresses of a block of a matrix in scratch memory, where every block lies by itself."""
    rows, columns = places(0, 0)
    return matrix + (row * rounded(D) + column * Q) + (rows * Q + columns)


@triton.jit
def load(matrix, row, column, D):
    """A block of a matrix in scratch memory."""
    return tl.load(addresses(matrix, row, column, D))


@triton.jit
def store(matrix, row, column, block, D):
    """Write what :func:`load` reads."""
    tl.store(addresses(matrix, row, column, D), block)


@triton.jit
def store_symmetric(matrix, row, column, block, D):
    """Write the lower triangle of a matrix, of which this is a block, and its mirror image."""
    rows, columns = places(row, column)
    tl.store(addresses(matrix, row, column, D), block, mask=columns <= rows)
    mirrored = tl.trans(addresses(matrix, column, row, D))
    tl.store(mirrored, block, mask=columns < rows)


@triton.jit
def load_lower_block(pointer, index, row, column, D):
    """A block of the lower triangle of a matrix of [.., D, D], float64."""
    rows, columns = places(row, column)
    mask = (rows < D) & (columns <= rows)
    origin = pointer + (tl.cast(index, tl.int64) * (D * D) + row * D + column)
    rows, columns = places(0, 0)
    return tl.load(origin + (rows * D + columns), mask=mask, other=0.0).to(tl.float64)


@triton.jit
def load_stored_block(pointer, index, row, column, D, STORED: tl.constexpr):
    """As :func:`load_lower_block`, of a matrix in its unconstrained form where ``STORED``."""
    block = load_lower_block(pointer, index, row, column, D)
    if STORED:
        rows, columns = places(row, column)
        block = tl.where((rows == columns) & (rows < D), softplus(block), block)
    return block


@triton.jit
def store_lower_block(pointer, index, row, column, block, D):
    """Write a block of a lower triangle, zeros above it."""
    rows, columns = places(row, column)
    block = tl.where(columns <= rows, block, 0.0)
    mask = (rows < D) & (columns < D)
    origin = pointer + (tl.cast(index, tl.int64) * (D * D) + row * D + column)
    rows, columns = places(0, 0)
    tl.store(origin + (rows * D + columns), block, mask=mask)


@triton.jit
def load_part(pointer, index, row, D):
    """Q elements from ``row`` on of a vector of [.., D], float64."""
    rows = row + tl.arange(0, Q)
    addresses = pointer + tl.cast(index, tl.int64) * D + rows
    return tl.load(addresses, mask=rows < D, other=0.0).to(tl.float64)


@triton.jit
def store_part(pointer, index, row, values, D):
    """Write what :func:`load_part` reads."""
    rows = row + tl.arange(0, Q)
    tl.store(pointer + tl.cast(index, tl.int64) * D + rows, values, mask=rows < D)


# --- whole matrices ---


@triton.jit
def copy_lower(matrix, pointer, index, D, STORED: tl.constexpr):
    """Copy a lower triangle of [.., D, D] to scratch memory, continued by the identity.

    Where ``STORED`` it is in its unconstrained form.
    """
    for row in range(0, D, Q):
        for column in range(0, row + Q, Q):
            rows, columns = places(row, column)
            block = load_stored_block(pointer, index, row, column, D, STORED)
            store(matrix, row, column, tl.where((rows == columns) & (rows >= D), 1.0, block), D)
    tl.debug_barrier()


@triton.jit
def store_lower_matrix(pointer, index, matrix, D):
    """Write the lower triangle of a matrix in scratch memory to one of [.., D, D]."""
    for row in range(0, D, Q):
        for column in range(0, D, Q):
            store_lower_block(pointer, index, row, column, load(matrix, row, column, D), D)


@triton.jit
def log_diagonal(matrix, D):
    """Sum of the logarithms of a diagonal in scratch memory."""
    index = tl.arange(0, LARGEST_DIM)
    diagonal = matrix + (index // Q * Q * (rounded(D) + Q) + index % Q * (Q + 1))
    return tl.sum(log_pivot(tl.load(diagonal, mask=index < D, other=1.0)), 0)


@triton.jit
def scaled_precision_block(L, scale, j, row, column, D, DIAGONAL: tl.constexpr):
    """A block of s^T L; of its lower triangle where s is diagonal."""
    if DIAGONAL:
        block = load_part(scale, j, row, D)[:, None] * load(L, row, column, D)
    else:
        block = tl.zeros([Q, Q], tl.float64)
        for k in range(tl.maximum(row, column), D, Q):
            s = load_lower_block(scale, j, k, row, D)
            block += dot(tl.trans(s), load(L, k, column, D))
    return block


@triton.jit
def store_scaled_precision(P, L, scale, j, D, DIAGONAL: tl.constexpr):
    """P = s^T L."""
    for row in range(0, D, Q):
        for column in range(0, row + Q if DIAGONAL else D, Q):
            store(P, row, column, scaled_precision_block(L, scale, j, row, column, D, DIAGONAL), D)
    tl.debug_barrier()


@triton.jit
def squared_scaled_precision(L, scale, j, D, DIAGONAL: tl.constexpr):
    """|s^T L|^2."""
    squares = tl.zeros([Q, Q], tl.float64)
    for row in range(0, D, Q):
        for column in range(0, row + Q if DIAGONAL else D, Q):
            block = scaled_precision_block(L, scale, j, row, column, D, DIAGONAL)
            squares += block * block
    return tl.sum(tl.sum(squares, 1), 0)


@triton.jit
def gram_block(P, row, column, D, DIAGONAL: tl.constexpr):
    """A block of I + P^T P."""
    rows, columns = places(row, column)
    block = tl.where(rows == columns, 1.0, 0.0).to(tl.float64)
    for k in range(tl.maximum(row, column) if DIAGONAL else row * 0, D, Q):
        block += dot(tl.trans(load(P, k, row, D)), load(P, k, column, D))
    return block


@triton.jit
def times_inverse_factor(X, P, D, DIAGONAL: tl.constexpr):
    """Turn X into X U^-T for U U^T = I + P^T P, with the blocks of U above those of X."""
    R = rounded(D)
    for column in range(Q, R, Q):
        for row in range(0, column, Q):
            store(X, row, column, gram_block(P, row, column, D, DIAGONAL), D)
    tl.debug_barrier()
    for step in range(0, R, Q):
        t = R - Q - step
        gram = gram_block(P, t, t, D, DIAGONAL)
        for k in range(t + Q, R, Q):
            U = load(X, t, k, D)
            gram -= dot(U, tl.trans(U))
        inverse = times_inverse_root(gram, identity(Q), Q)
        for row in range(0, R, Q):
            block = load(X, row, t, D)
            for k in range(t + Q, tl.where(row < t, R, row + Q), Q):
                block -= dot(load(X, row, k, D), tl.trans(load(X, t, k, D)))
            block = dot(block, inverse)
            tl.debug_barrier()  # all has been read that is overwritten
            store(X, row, t, block, D)
        tl.debug_barrier()


@triton.jit
def store_inverse(X, scale, j, D, DIAGONAL: tl.constexpr):
    """X = s^-1."""
    for row in range(0, D, Q):
        if DIAGONAL:
            pivot = load_part(scale, j, row, D)
            inverse = identity(Q) / tl.where(row + tl.arange(0, Q) < D, pivot, 1.0)[:, None]
        else:
            rows, columns = places(row, row)
            block = load_lower_block(scale, j, row, row, D)
            inverse = inverse_lower(tl.where((rows == columns) & (rows >= D), 1.0, block))
        for column in range(0, row + Q, Q):
            rows, columns = places(row, column)
            block = tl.where(rows == columns, 1.0, 0.0).to(tl.float64)
            if not DIAGONAL:
                for k in range(column, row, Q):
                    s = load_lower_block(scale, j, row, k, D)
                    block -= dot(s, load(X, k, column, D))
            store(X, row, column, dot(inverse, block), D)
        tl.debug_barrier()


# --- building the components ---


@triton.jit(do_not_specialize=["centers", "count", "per_component", "D"])
def blocked_components_kernel(
    log_weights,  # [C]; the logits where STORED
    precision_cholesky,  # [C, D, D], or not read; in its unconstrained form where STORED
    scale,  # [J, D, D], [J, D], or not read
    whitening,  # [J, D, D]
    offsets,  # [J]
    log_weights_out,  # [C] and
    precision_cholesky_out,  # [C, D, D] where STORED
    scratch,  # [programs, 2, R, R], float64
    centers,  # J
    count,  # C
    per_component,  # K
    D,
    FORM: tl.constexpr,
    DIAGONAL: tl.constexpr,
    STORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As :func:`components.components_kernel`, of some centers."""
    SIZE = rounded(D) * rounded(D)
    A = scratch + tl.program_id(0).to(tl.int64) * (2 * SIZE)
    P = A + SIZE
    log_total = tl.full([], 0.0, tl.float64)
    if STORED:
        log_total += log_normaliser(log_weights, count, BLOCK)
    for j in range(tl.program_id(0), centers, tl.num_programs(0)):
        c = j // per_component
        log_weight = tl.load(log_weights + c).to(tl.float64) - log_total
        penalty = tl.zeros([1], tl.float64)
        if FORM == "scale":
            store_inverse(A, scale, j, D, DIAGONAL)
        else:
            copy_lower(A, precision_cholesky, c, D, STORED)
        if STORED:
            first = j % per_component == 0
            if first:
                tl.store(log_weights_out + c, log_weight)
                store_lower_matrix(precision_cholesky_out, c, A, D)
        if FORM == "expected":
            penalty += 0.5 * squared_scaled_precision(A, scale, j, D, DIAGONAL)
        if FORM == "marginal":
            store_scaled_precision(P, A, scale, j, D, DIAGONAL)
            times_inverse_factor(A, P, D, DIAGONAL)
        store_lower_matrix(whitening, j, A, D)
        share = log_weight - tl.log(per_component.to(tl.float64))
        # 1/2 log 2 pi
        constant = tl.full([1], 0.9189385332046727, tl.float64) * D
        offset = share + (log_diagonal(A, D) - constant - penalty)
        tl.store(offsets + j + tl.arange(0, 1), offset)
        tl.debug_barrier()  # the next center overwrites what this one has read


# --- its backward ---


@triton.jit
def store_identity(matrix, factor, D):
    """The lower blocks of a multiple of I."""
    for row in range(0, D, Q):
        for column in range(0, row + Q, Q):
            rows, columns = places(row, column)
            store(matrix, row, column, tl.where(rows == columns, factor, 0.0).to(tl.float64), D)
    tl.debug_barrier()


@triton.jit
def add(matrix, row, column, block, D):
    """Add to a block in scratch memory."""
    block += load(matrix, row, column, D)
    tl.debug_barrier()  # all has been read that is overwritten
    store(matrix, row, column, block, D)


@triton.jit
def store_slope(M, A, grad_whitening, j, g, D):
    """M = tril(A^T G) + g I made symmetric."""
    for row in range(0, D, Q):
        for column in range(0, row + Q, Q):
            rows, columns = places(row, column)
            block = tl.where(rows == columns, g, 0.0)
            for k in range(row, D, Q):
                G = load_lower_block(grad_whitening, j, k, column, D)
                block += dot(tl.trans(load(A, k, row, D)), G)
            store_symmetric(M, row, column, block, D)
    tl.debug_barrier()


@triton.jit
def store_times(H, Z, M, D):
    """H = Z M for a lower-triangular Z, the blocks of the lower triangle."""
    for row in range(0, D, Q):
        for column in range(0, row + Q, Q):
            block = tl.zeros([Q, Q], tl.float64)
            for k in range(0, row + Q, Q):
                block += dot(load(Z, row, k, D), load(M, k, column, D))
            store(H, row, column, block, D)
    tl.debug_barrier()


@triton.jit
def times_transposed_block(H, Z, row, column, D):
    """A block of H Z^T for a lower-triangular Z."""
    block = tl.zeros([Q, Q], tl.float64)
    for k in range(0, column + Q, Q):
        block += dot(load(H, row, k, D), tl.trans(load(Z, column, k, D)))
    return block


@triton.jit
def store_times_transposed(K, H, Z, D, DIAGONAL: tl.constexpr):
    """K = H Z^T, which is symmetric; with DIAGONAL its diagonal blocks."""
    for row in range(0, D, Q):
        for column in range(row if DIAGONAL else row * 0, row + Q, Q):
            store_symmetric(K, row, column, times_transposed_block(H, Z, row, column, D), D)
    tl.debug_barrier()


@triton.jit
def store_scale_product(grad_scale, scale, j, K, factor, multiple, D, DIAGONAL: tl.constexpr):
    """Write factor tril(K s) + multiple s for a symmetric K."""
    for row in range(0, D, Q):
        if DIAGONAL:
            i = tl.arange(0, Q)
            on_diagonal = tl.load(K + (row * (rounded(D) + Q) + i * (Q + 1)))
            slope = (factor * on_diagonal + multiple) * load_part(scale, j, row, D)
            store_part(grad_scale, j, row, slope, D)
        else:
            for column in range(0, D, Q):
                block = tl.zeros([Q, Q], tl.float64)
                for k in range(column, tl.where(column <= row, D, 0), Q):
                    s = load_lower_block(scale, j, k, column, D)
                    block += dot(load(K, row, k, D), s)
                block = factor * block + multiple * load_lower_block(scale, j, row, column, D)
                store_lower_block(grad_scale, j, row, column, block, D)


@triton.jit
def store_inverse_product(
    grad_scale, whitening, grad_whitening, j, A, M, g, D, DIAGONAL: tl.constexpr
):
    """Write -tril(A^T G A^T) - g diag(A), which is -tril(tril(M) A^T)."""
    if DIAGONAL:
        index = tl.arange(0, LARGEST_DIM)
        on_diagonal = tl.cast(j, tl.int64) * (D * D) + index * (D + 1)
        a = tl.load(whitening + on_diagonal, mask=index < D, other=0.0).to(tl.float64)
        G = tl.load(grad_whitening + on_diagonal, mask=index < D, other=0.0).to(tl.float64)
        slope = -a * (a * G + g)
        tl.store(grad_scale + tl.cast(j, tl.int64) * D + index, slope, mask=index < D)
    else:
        for row in range(0, D, Q):
            for column in range(0, D, Q):
                block = tl.zeros([Q, Q], tl.float64)
                for k in range(0, tl.where(column <= row, column + Q, 0), Q):
                    block -= dot(load(M, row, k, D), tl.trans(load(A, column, k, D)))
                store_lower_block(grad_scale, j, row, column, block, D)


@triton.jit
def add_expected_slope(
    N,
    L,
    P,  # not read without a scale
    scale,
    grad_whitening,
    j,
    g,
    D,
    FORM: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Add G + g (diag(1 / L) - tril(S L)) to N, by P = s^T L."""
    for row in range(0, D, Q):
        for column in range(0, row + Q, Q):
            rows, columns = places(row, column)
            block = load_lower_block(grad_whitening, j, row, column, D)
            pivot = tl.where(rows == columns, load(L, row, column, D), 1.0)
            block += tl.where(rows == columns, g / pivot, 0.0)
            if FORM == "expected":
                if DIAGONAL:
                    block -= g * load_part(scale, j, row, D)[:, None] * load(P, row, column, D)
                else:
                    product = tl.zeros([Q, Q], tl.float64)
                    for k in range(0, row + Q, Q):
                        s = load_lower_block(scale, j, row, k, D)
                        product += dot(s, load(P, k, column, D))
                    block -= g * product
            add(N, row, column, block, D)


@triton.jit
def solve_lower_transposed(X, L, D):
    """Turn X into L^-T X, in the blocks of the lower triangle."""
    R = rounded(D)
    for step in range(0, R, Q):
        row = R - Q - step
        inverse = tl.trans(inverse_lower(load(L, row, row, D)))
        for column in range(0, row + Q, Q):
            block = load(X, row, column, D)
            for k in range(row + Q, R, Q):
                block -= dot(tl.trans(load(L, k, row, D)), load(X, k, column, D))
            block = dot(inverse, block)
            tl.debug_barrier()  # all has been read that is overwritten
            store(X, row, column, block, D)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["components", "per_component", "D"])
def blocked_components_backward_kernel(
    log_weights,  # its gradient [C], or not written
    precision_cholesky,  # [C, D, D], or not read
    grad_precision,  # [C, D, D], or not written
    scale,  # [J, D, D], [J, D], or not read
    grad_scale,  # as scale, or not written
    whitening,  # [J, D, D]
    grad_whitening,  # [J, D, D]
    grad_offsets,  # [J]
    scratch,  # [programs, 6, R, R], float64
    components,  # C
    per_component,  # K
    D,
    FORM: tl.constexpr,
    DIAGONAL: tl.constexpr,
    WANT_WEIGHTS: tl.constexpr,
    WANT_PRECISION: tl.constexpr,
    WANT_SCALE: tl.constexpr,
):
    """As :func:`components.components_backward_kernel`, of some components."""
    SIZE = rounded(D) * rounded(D)
    A = scratch + tl.program_id(0).to(tl.int64) * (6 * SIZE)
    M = A + SIZE
    T = M + SIZE
    K = T + SIZE
    L = K + SIZE
    N = L + SIZE
    for c in range(tl.program_id(0), components, tl.num_programs(0)):
        by_weight = tl.zeros([1], tl.float64)
        if WANT_PRECISION or (WANT_SCALE and FORM == "expected"):
            copy_lower(L, precision_cholesky, c, D, False)
        if WANT_PRECISION:
            store_identity(N, 0.0, D)
        if WANT_SCALE and FORM == "expected":
            store_times_transposed(K, L, L, D, DIAGONAL)
        for k in range(per_component):
            j = c * per_component + k
            g = tl.load(grad_offsets + j).to(tl.float64)
            by_weight += g
            if (FORM == "marginal" and (WANT_PRECISION or WANT_SCALE)) or (
                FORM == "scale" and WANT_SCALE and not DIAGONAL
            ):
                copy_lower(A, whitening, j, D, False)
                store_slope(M, A, grad_whitening, j, g, D)
            if WANT_SCALE:
                if FORM == "scale":
                    store_inverse_product(
                        grad_scale, whitening, grad_whitening, j, A, M, g, D, DIAGONAL
                    )
                elif FORM == "expected":
                    store_scale_product(grad_scale, scale, j, K, -g, 0.0, D, DIAGONAL)
                else:
                    store_times(T, A, M, D)
                    store_times_transposed(K, T, A, D, DIAGONAL)
                    store_scale_product(grad_scale, scale, j, K, -1.0, 0.0, D, DIAGONAL)
                tl.debug_barrier()  # what follows overwrites what this has read
            if WANT_PRECISION:
                if FORM != "precision":
                    store_scaled_precision(T, L, scale, j, D, DIAGONAL)
                if FORM == "marginal":
                    store_identity(A, 1.0, D)
                    times_inverse_factor(A, T, D, DIAGONAL)
                    store_times(T, A, M, D)
                    for row in range(0, D, Q):
                        for column in range(0, row + Q, Q):
                            add(N, row, column, times_transposed_block(T, A, row, column, D), D)
                else:
                    add_expected_slope(N, L, T, scale, grad_whitening, j, g, D, FORM, DIAGONAL)
                tl.debug_barrier()
        if WANT_WEIGHTS:
            tl.store(log_weights + c + tl.arange(0, 1), by_weight)
        if WANT_PRECISION:
            if FORM == "marginal":
                solve_lower_transposed(N, L, D)
            store_lower_matrix(grad_precision, c, N, D)
            tl.debug_barrier()
