"""Triton kernels for GPUs of NVIDIA and AMD, installed as ``vmm_fast.kernels``; needs Triton."""
