"""Models of scvi-tools with a mixture prior; needs ``pip install "vmm-fast[scvi]"``."""

from vmm_fast._checks import check_version

check_version("scvi-tools")
check_version("anndata")

from vmm_fast.scvi.checkpoints import Checkpoints  # noqa: E402  needs these versions
from vmm_fast.scvi.latent_prior import LatentPrior  # noqa: E402
from vmm_fast.scvi.latent_prior_model import LatentPriorModel  # noqa: E402
from vmm_fast.scvi.loading import CellDataModule, MemoryCells  # noqa: E402
from vmm_fast.scvi.model import VMMCYTOVI, VMMPEAKVI, VMMSCANVI, VMMSCVI, VMMTOTALVI  # noqa: E402
from vmm_fast.scvi.module import (  # noqa: E402
    VMMPEAKVAE,
    VMMSCANVAE,
    VMMTOTALVAE,
    VMMVAE,
    VMMCytoVAE,
)
from vmm_fast.scvi.training import (  # noqa: E402
    EmpiricalBayes,
    EmpiricalBayesAdversarialTrainingPlan,
    EmpiricalBayesSemiSupervisedTrainingPlan,
    EmpiricalBayesTrainingPlan,
)

__all__ = [
    "VMMCYTOVI",
    "VMMPEAKVAE",
    "VMMPEAKVI",
    "VMMSCANVAE",
    "VMMSCANVI",
    "VMMSCVI",
    "VMMTOTALVAE",
    "VMMTOTALVI",
    "VMMVAE",
    "CellDataModule",
    "Checkpoints",
    "EmpiricalBayes",
    "EmpiricalBayesAdversarialTrainingPlan",
    "EmpiricalBayesSemiSupervisedTrainingPlan",
    "EmpiricalBayesTrainingPlan",
    "LatentPrior",
    "LatentPriorModel",
    "MemoryCells",
    "VMMCytoVAE",
]
