"""The compiled core: addresses, sizes and flags in, results written to addresses.

An address of 0 stands for None. ``tests/test_core_types.py`` compares this with the core and with
the table of operations.
"""

# fmt: off

from collections.abc import Sequence
from typing import ClassVar

def instruction_set() -> str: ...

# --- the operations of vmm_fast/operations.py, in its order (csrc/bind_mixture.cpp, ..) ---

def mixture_log_prob_float32(
    z: int, centers: int, whitening: int, offsets: int, B: int, D: int, J: int, transpose: bool,
    num_threads: int, lse: int, expected: int, softmax: int, /
) -> None: ...
mixture_log_prob_float64 = mixture_log_prob_float32
def mixture_log_prob_backward_float32(
    grad_lse: int, grad_expected: int, z: int, centers: int, whitening: int, offsets: int,
    softmax: int, B: int, D: int, J: int, transpose: bool, num_threads: int, grad_z: int,
    grad_centers: int, grad_whitening: int, grad_offsets: int, /
) -> None: ...
mixture_log_prob_backward_float64 = mixture_log_prob_backward_float32
def mixture_kl_float32(
    z: int, centers: int, whitening: int, offsets: int, scale: int, full_scale: bool, B: int,
    D: int, J: int, transpose: bool, num_threads: int, kl: int, softmax: int, /
) -> None: ...
mixture_kl_float64 = mixture_kl_float32
def mixture_kl_backward_float32(
    grad_kl: int, z: int, centers: int, whitening: int, offsets: int, scale: int, full_scale: bool,
    softmax: int, B: int, D: int, J: int, transpose: bool, num_threads: int, grad_z: int,
    grad_centers: int, grad_whitening: int, grad_offsets: int, grad_scale: int, /
) -> None: ...
mixture_kl_backward_float64 = mixture_kl_backward_float32
def mixture_statistics_float32(
    z: int, centers: int, whitening: int, offsets: int, B: int, D: int, J: int, transpose: bool,
    num_threads: int, N: int, s: int, M: int, /
) -> None: ...
mixture_statistics_float64 = mixture_statistics_float32
def mixture_log_joint_float32(
    z: int, centers: int, whitening: int, offsets: int, B: int, D: int, J: int, K: int,
    transpose: bool, num_threads: int, log_joint: int, /
) -> None: ...
mixture_log_joint_float64 = mixture_log_joint_float32
def mixture_responsibilities_float32(
    z: int, centers: int, whitening: int, offsets: int, B: int, D: int, J: int, K: int,
    transpose: bool, num_threads: int, responsibilities: int, /
) -> None: ...
mixture_responsibilities_float64 = mixture_responsibilities_float32
def mixture_assign_float32(
    z: int, centers: int, whitening: int, offsets: int, B: int, D: int, J: int, K: int,
    transpose: bool, num_threads: int, label: int, probability: int, entropy: int, /
) -> None: ...
mixture_assign_float64 = mixture_assign_float32
def whitened_components_float32(
    log_weights: int, precision_cholesky: int, scale: int, full_scale: bool, C: int, D: int, J: int,
    expected: bool, num_threads: int, whitening: int, offsets: int, /
) -> float: ...
whitened_components_float64 = whitened_components_float32
def whitened_components_backward_float32(
    grad_whitening: int, grad_offsets: int, log_weights: int, precision_cholesky: int, scale: int,
    full_scale: bool, whitening: int, C: int, D: int, J: int, expected: bool, num_threads: int,
    grad_log_weights: int, grad_precision_cholesky: int, grad_scale: int, /
) -> None: ...
whitened_components_backward_float64 = whitened_components_backward_float32
def count_log_prob_float32(
    counts: int, row_starts: int, gene_indices: int, mean: int, inverse_dispersion: int,
    full_inverse_dispersion: bool, dropout_logits: int, library_size: int, B: int, G: int,
    num_threads: int, log_prob: int, /
) -> None: ...
count_log_prob_float64 = count_log_prob_float32
def count_log_prob_backward_float32(
    grad_log_prob: int, counts: int, row_starts: int, gene_indices: int, mean: int,
    inverse_dispersion: int, full_inverse_dispersion: bool, dropout_logits: int, library_size: int,
    B: int, G: int, num_threads: int, grad_mean: int, grad_inverse_dispersion: int,
    grad_dropout_logits: int, grad_library_size: int, /
) -> None: ...
count_log_prob_backward_float64 = count_log_prob_backward_float32

# --- the empirical-Bayes steps (csrc/bind_empirical_bayes.cpp) ---

class Weights:
    dirichlet: ClassVar[Weights]
    stick_breaking: ClassVar[Weights]

class MapPrior:
    none: ClassVar[MapPrior]
    fixed: ClassVar[MapPrior]
    learnt: ClassVar[MapPrior]

class ParameterPriors:
    def __init__(self, map_prior: MapPrior, weights: Weights, discount: float, /) -> None: ...

class Learnt:
    def __init__(
        self, centers: bool, precision: bool, weights: bool, concentration: bool, /
    ) -> None: ...

class MixtureParameters_float32:
    def __init__(
        self, centers: int, scale: int, full_scale: bool, raw_precision: int, logits: int,
        raw_alpha: int, C: int, K: int, D: int, /
    ) -> None: ...

class MixtureParameters_float64:
    def __init__(
        self, centers: int, scale: int, full_scale: bool, raw_precision: int, logits: int,
        raw_alpha: int, C: int, K: int, D: int, /
    ) -> None: ...

def constrained_float32(
    parameters: MixtureParameters_float32, num_threads: int, precision_cholesky: int,
    log_weights: int, /
) -> None: ...
def constrained_float64(
    parameters: MixtureParameters_float64, num_threads: int, precision_cholesky: int,
    log_weights: int, /
) -> None: ...
def map_gradients_float32(
    parameters: MixtureParameters_float32, z: int, B: int, priors: ParameterPriors,
    responsibility_gradient: bool, prior_weight: float, num_threads: int, grad_centers: int,
    grad_scale: int, grad_raw_precision: int, grad_logits: int, grad_raw_alpha: int, N: int, s: int,
    M: int, /
) -> float: ...
def map_gradients_float64(
    parameters: MixtureParameters_float64, z: int, B: int, priors: ParameterPriors,
    responsibility_gradient: bool, prior_weight: float, num_threads: int, grad_centers: int,
    grad_scale: int, grad_raw_precision: int, grad_logits: int, grad_raw_alpha: int, N: int, s: int,
    M: int, /
) -> float: ...
def mixture_sums_float32(
    parameters: MixtureParameters_float32, z: int, weights: int, B: int, num_threads: int, N: int,
    s: int, M: int, /
) -> float: ...
def mixture_sums_float64(
    parameters: MixtureParameters_float64, z: int, weights: int, B: int, num_threads: int, N: int,
    s: int, M: int, /
) -> float: ...
def maximise_float32(
    parameters: MixtureParameters_float32, N: int, s: int, M: int, priors: ParameterPriors,
    learnt: Learnt, num_threads: int, /
) -> None: ...
def maximise_float64(
    parameters: MixtureParameters_float64, N: int, s: int, M: int, priors: ParameterPriors,
    learnt: Learnt, num_threads: int, /
) -> None: ...
def online_step_float32(
    parameters: MixtureParameters_float32, N: int, s: int, M: int, count: float, rate: float,
    data_size: float, free_centers: bool, priors: ParameterPriors, learnt: Learnt, num_threads: int,
    running_N: int, running_s: int, running_M: int, running_centers: int, running_steps: int, /
) -> None: ...
def online_step_float64(
    parameters: MixtureParameters_float64, N: int, s: int, M: int, count: float, rate: float,
    data_size: float, free_centers: bool, priors: ParameterPriors, learnt: Learnt, num_threads: int,
    running_N: int, running_s: int, running_M: int, running_centers: int, running_steps: int, /
) -> None: ...
# A parameter is its rate, its size and the addresses of gradient, values, moments and step count.
def adam_step_float32(
    beta1: float, beta2: float, epsilon: float, num_threads: int,
    parameters: Sequence[tuple[float, Sequence[int]]], /
) -> bool: ...
adam_step_float64 = adam_step_float32
def maximise_concentration(counts: int, C: int, start: float, /) -> float: ...

# --- stick-breaking weights (csrc/bind_stick_breaking.cpp) ---

def stick_breaking_posterior(
    counts: int, num_components: int, concentration: int, discount: float, prior_shape: float,
    prior_rate: float, order: int, a: int, b: int, expected_log_weights: int, mean_weights: int,
    map_weights: int, concentration_update: int, /
) -> None: ...
def stick_breaking_posterior_emulated(
    counts: int, num_components: int, concentration: int, discount: float, prior_shape: float,
    prior_rate: float, order: int, a: int, b: int, expected_log_weights: int, mean_weights: int,
    map_weights: int, concentration_update: int, scratch: int, members: int, falling: bool, /
) -> None: ...
def sticks_to_log_weights(sticks: int, num_components: int, log_weights: int) -> None: ...
def log_weights_to_sticks(log_weights: int, num_components: int, sticks: int) -> None: ...
