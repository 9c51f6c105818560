"""The CUDA kernels: device addresses in. Missing where they were not built.

See csrc/cuda_bindings.cpp.
"""

# fmt: off

def is_served(device: int, /) -> bool: ...
def stick_breaking_posterior(
    counts: int, num_components: int, concentration: int, discount: float, prior_shape: float,
    prior_rate: float, order: int, a: int, b: int, expected_log_weights: int, mean_weights: int,
    map_weights: int, concentration_update: int, scratch: int, device: int, stream: int, /
) -> None: ...
