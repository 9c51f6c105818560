"""Priors for torch VAEs, with one interface."""

from vmm_fast.priors.base import Prior
from vmm_fast.priors.gaussian_mixture import GaussianMixturePrior
from vmm_fast.priors.standard_normal import StandardNormalPrior
from vmm_fast.priors.vamp import VampPrior
from vmm_fast.priors.vmm import VMMPrior

__all__ = ["GaussianMixturePrior", "Prior", "StandardNormalPrior", "VMMPrior", "VampPrior"]
