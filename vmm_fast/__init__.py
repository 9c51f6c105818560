"""vmm_fast: the VampPrior Mixture Model as a drop-in, compiled prior for torch VAEs."""

from typing import TYPE_CHECKING, Any

import torch  # first: it loads the OpenMP runtime that the compiled core then shares

from vmm_fast._checks import check_version

check_version("torch", torch.__version__)

from vmm_fast import ops  # noqa: E402  older versions of torch lack what it calls
from vmm_fast.mixture import Assignment, Components  # noqa: E402
from vmm_fast.priors import (  # noqa: E402
    GaussianMixturePrior,
    StandardNormalPrior,
    VampPrior,
    VMMPrior,
)

if TYPE_CHECKING:
    from vmm_fast.estimators import DirichletMixture as DirichletMixture

    __version__: str

__all__ = [
    "Assignment",
    "Components",
    "GaussianMixturePrior",
    "StandardNormalPrior",
    "VMMPrior",
    "VampPrior",
    "__version__",
    "ops",
]


def __getattr__(name: str) -> Any:
    """Return what few users ask for: the class that needs scikit-learn, and the version."""
    if name == "__version__":
        from importlib.metadata import version

        return version("vmm-fast")
    if name == "DirichletMixture":
        from vmm_fast.estimators import DirichletMixture

        return DirichletMixture
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
