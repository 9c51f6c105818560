"""Triton kernels for GPUs, installed as ``vmm_fast.kernels``; GPUs run the reference meanwhile."""
