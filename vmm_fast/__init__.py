"""vmm_fast: the VampPrior Mixture Model as a drop-in, compiled prior for torch VAEs."""

import torch  # noqa: F401  first: it loads the OpenMP runtime that the compiled core then shares

from vmm_fast import ops

__all__ = ["ops"]
