"""Random mixtures of any size, and what every provider's result is checked against in float64.

Clusters overlap alike at every D, as in a latent space while a model trains: nearly all pairs of a
point and a component have a responsibility above 0 in float32, so that the core, which skips sums
over the others, can skip next to nothing.

The reference is :mod:`vmm_fast.reference`, which the tests check against scipy; it goes through the
points in chunks, since it holds [B, J, D] numbers at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vmm_fast import reference

REFERENCE_NUMBERS = 2**24  # of a [B, J, D] array of the reference, at a time


class Size(NamedTuple):
    """B points, J components, D dimensions."""

    B: int
    J: int
    D: int


class Whitened(NamedTuple):
    """z [B, D], centers m [J, D], lower-triangular A [J, D, D], offsets c [J]."""

    z: Tensor
    centers: Tensor
    whitening: Tensor
    offsets: Tensor


class Parameters(NamedTuple):
    """z [B, D], m [J, D], s [J, D, D] with S = s s^T, L [J, D, D] with Lambda = L L^T, logits [J].

    The density is sum_j pi_j N(z; m_j, Lambda_j^-1 + S_j), pi = softmax(logits).
    """

    z: Tensor
    centers: Tensor
    scale: Tensor
    precision_cholesky: Tensor
    logits: Tensor


def _triangular(size: Size, diagonal: float, generator: torch.Generator) -> Tensor:
    below = torch.randn(size.J, size.D, size.D, generator=generator).tril(-1) / size.D**0.5
    spread = 0.5 + torch.rand(size.J, size.D, generator=generator)
    return diagonal * (0.5 * below + torch.diag_embed(spread))


def parameters(size: Size, dtype: torch.dtype = torch.float32) -> Parameters:
    """Return a random mixture, the distance of whose centers does not grow with D, and points."""
    generator = torch.Generator().manual_seed(0)
    spread = 2 * (10 / size.D) ** 0.5
    centers = spread * torch.randn(size.J, size.D, generator=generator)
    of = torch.randint(size.J, (size.B,), generator=generator)
    z = centers[of] + torch.randn(size.B, size.D, generator=generator)
    values = Parameters(
        z,
        centers,
        _triangular(size, 0.3, generator),
        _triangular(size, 1.0, generator),
        0.1 * torch.randn(size.J, generator=generator),
    )
    return Parameters(*(x.to(dtype) for x in values))


def whiten(p: Parameters) -> Whitened:
    """Return A = chol(Lambda^-1 + S)^-1 and c = log pi - D/2 log 2 pi + log det A."""
    eye = torch.eye(p.z.shape[1], dtype=p.z.dtype, device=p.z.device)
    inverse = torch.linalg.solve_triangular(p.precision_cholesky, eye, upper=False)
    scale = p.scale.tril()
    cholesky = torch.linalg.cholesky(inverse.mT @ inverse + scale @ scale.mT)
    whitening = torch.linalg.solve_triangular(cholesky, eye, upper=False)
    constant = 0.5 * p.z.shape[1] * torch.log(torch.tensor(2 * torch.pi, dtype=p.z.dtype))
    logdet = whitening.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return Whitened(p.z, p.centers, whitening, p.logits.log_softmax(-1) + logdet - constant)


def whitened(size: Size, dtype: torch.dtype = torch.float32) -> Whitened:
    """Return the same mixture as a whitened one, contiguous as a model's own components are."""
    exact = whiten(parameters(size, torch.float64))
    return Whitened(*(x.to(dtype, memory_format=torch.contiguous_format) for x in exact))


def reference_log_prob(
    inputs: Sequence[Tensor], to_whitened: Callable = lambda p: p
) -> tuple[Tensor, ...]:
    """Return lse [B] and the gradients of its sum for all ``inputs``, in float64."""
    z, *rest = (x.detach().double().requires_grad_() for x in inputs)
    per_point = rest[0].numel()
    lse, grad_z = [], []
    for part in z.detach().split(max(1, REFERENCE_NUMBERS // per_point)):
        part = part.requires_grad_()
        values = reference.mixture_log_prob(*to_whitened(type(inputs)(part, *rest)))[0]
        values.sum().backward()
        lse.append(values.detach())
        grad_z.append(part.grad)
    return torch.cat(lse), torch.cat(grad_z), *(x.grad for x in rest)


def reference_statistics(p: Whitened, transpose: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return N, s and M of :func:`vmm_fast.ops.mixture_statistics`, in p's dtype."""
    z, *mixture = p
    parts = [
        reference.mixture_statistics(part, *mixture, transpose)
        for part in z.split(max(1, REFERENCE_NUMBERS // p.centers.numel()))
    ]
    return tuple(sum(values) for values in zip(*parts, strict=True))


def error(values: Sequence[Tensor], reference_values: Sequence[Tensor]) -> float:
    """Return the largest relative error of tensors in the 2-norm, of as many as are given."""
    with torch.no_grad():
        pairs = zip(values, reference_values, strict=False)
        return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)
