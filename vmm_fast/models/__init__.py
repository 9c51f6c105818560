"""A small torch VAE for vectors and pictures, and its training loop."""

from vmm_fast.models.pictures import RandomShifts
from vmm_fast.models.training import History, fit
from vmm_fast.models.vae import VAE, ELBOTerms

__all__ = ["VAE", "ELBOTerms", "History", "RandomShifts", "fit"]
