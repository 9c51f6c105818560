"""Shared by all tests: small random mixtures."""

import torch

import vmm_fast  # noqa: F401  registers the ops

# Small problems: threads would cost more than they give, most of all on a busy machine.
torch.set_num_threads(1)


def random_mixture(num, components, dim, dtype=torch.float64, seed=0, spread=2.0):
    """z [B, D], centers [J, D], well-conditioned lower-triangular whitening, offsets [J]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    whitening = 0.3 * normal(components, dim, dim).tril()
    whitening.diagonal(dim1=-2, dim2=-1).abs_().add_(0.5)
    tensors = (
        normal(num, dim) * spread,
        normal(components, dim) * spread,
        whitening,
        normal(components),
    )
    return tuple(t.to(dtype) for t in tensors)
