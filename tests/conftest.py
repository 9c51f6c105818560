"""Shared by all tests: small random mixtures, and where real data lies."""

import os
from pathlib import Path

import pytest
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


@pytest.fixture
def data_folder() -> Path:
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("VMM_FAST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set VMM_FAST_DATA to its folder")
    return folder
