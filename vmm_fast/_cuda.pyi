# The CUDA kernels; see csrc/cuda_bindings.cpp. Missing where they were not built.
from typing import Any

def __getattr__(name: str) -> Any: ...
