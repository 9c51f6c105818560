"""scVI with a mixture prior, for single cells; needs ``pip install "vmm-fast[scvi]"``."""

from vmm_fast.scvi.model import VMMSCVI
from vmm_fast.scvi.module import VMMVAE, LatentPrior
from vmm_fast.scvi.training import EmpiricalBayesTrainingPlan

__all__ = ["VMMSCVI", "VMMVAE", "EmpiricalBayesTrainingPlan", "LatentPrior"]
