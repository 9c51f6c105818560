"""Models of scvi-tools with a mixture prior; needs ``pip install "vmm-fast[scvi]"``."""

from vmm_fast.scvi.checkpoints import Checkpoints
from vmm_fast.scvi.loading import CellDataModule, MemoryCells
from vmm_fast.scvi.model import VMMPEAKVI, VMMSCANVI, VMMSCVI, VMMTOTALVI, LatentPriorModel
from vmm_fast.scvi.module import VMMPEAKVAE, VMMSCANVAE, VMMTOTALVAE, VMMVAE, LatentPrior
from vmm_fast.scvi.training import (
    EmpiricalBayes,
    EmpiricalBayesAdversarialTrainingPlan,
    EmpiricalBayesSemiSupervisedTrainingPlan,
    EmpiricalBayesTrainingPlan,
)

__all__ = [
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
]
