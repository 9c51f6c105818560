"""Packages that compute a mixture's density or its expectation-maximisation step.

A provider of a density is a function from a :class:`bench.problems.Whitened` or
:class:`bench.problems.Parameters` to log p(z) [B] that torch differentiates. A provider of the EM
step makes an :class:`EMStep` from points and a start.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from bench.problems import Parameters, Whitened, reference_statistics
from vmm_fast import ops
from vmm_fast.inference import closed_form
from vmm_fast.mixture import Components

Density = Callable[..., Tensor]

# Modules that providers outside torch need.
MODULES = {"KeOps": "pykeops", "torchgmm": "torchgmm", "GaussianMixture": "sklearn"}


def installed(name: str) -> bool:
    """Whether a provider's module is there."""
    return name not in MODULES or importlib.util.find_spec(MODULES[name]) is not None


# --- densities of a whitened mixture ---


def vmm_fast_whitened(p: Whitened) -> Tensor:
    return ops.mixture_log_prob(*p)[0]


def matmul(p: Whitened) -> Tensor:
    """Return the density by one matrix product for all A z, as one writes it in plain torch."""
    whitening = p.whitening.tril()
    shift = (whitening @ p.centers[..., None]).flatten()
    y = torch.addmm(-shift, p.z, whitening.flatten(0, 1).T)
    y = y.unflatten(1, p.centers.shape)
    return (p.offsets - 0.5 * y.square().sum(-1)).logsumexp(-1)


def keops(p: Whitened) -> Tensor:
    with contextlib.redirect_stdout(io.StringIO()):  # it says at import that there is no GPU
        import pykeops
        from pykeops.torch import LazyTensor
    pykeops.set_verbose(False)
    difference = LazyTensor(p.z[:, None, :]) - LazyTensor(p.centers[None])
    matrix = LazyTensor(p.whitening.tril().flatten(1)[None])
    squares = (matrix.matvecmult(difference) ** 2).sum(-1)
    return (LazyTensor(p.offsets[None, :, None]) - 0.5 * squares).logsumexp(dim=1)[:, 0]


def whitened_densities(quick: bool = False) -> dict[str, Density]:
    """Return the providers from A that are installed; if quick, without those slow to start."""
    found: dict[str, Density] = {"vmm_fast": vmm_fast_whitened, "matmul": matmul}
    if not quick:
        # One compilation a size, not a slower one for all. Only eight of a function are kept before
        # torch goes back to eager without a word, hence none of those from before.
        torch.compiler.reset()
        found |= {"torch.compile": torch.compile(matmul, dynamic=False), "KeOps": keops}
    return {name: f for name, f in found.items() if installed(name)}


# --- densities from (m, S, L, pi) ---


def vmm_fast_parameters(p: Parameters) -> Tensor:
    mixture = Components(p.centers, p.logits.log_softmax(-1), p.precision_cholesky, p.scale)
    return mixture.log_prob(p.z)


def torch_distributions(p: Parameters) -> Tensor:
    eye = torch.eye(p.z.shape[1], dtype=p.z.dtype, device=p.z.device)
    inverse = torch.linalg.solve_triangular(p.precision_cholesky, eye, upper=False)
    scale = p.scale.tril()
    covariance = inverse.mT @ inverse + scale @ scale.mT
    components = MultivariateNormal(p.centers, covariance, validate_args=False)
    weights = Categorical(logits=p.logits, validate_args=False)
    return MixtureSameFamily(weights, components, validate_args=False).log_prob(p.z)


PARAMETER_DENSITIES: dict[str, Density] = {
    "vmm_fast": vmm_fast_parameters,
    "torch.distributions": torch_distributions,
}


# --- one step of expectation maximisation ---


class EMStep(NamedTuple):
    """An E- and M-step from one start.

    ``call`` takes the step, ``values`` returns what the last call found: weights [J], means [J, D]
    and covariances [J, D, D].
    """

    call: Callable[[], object]
    values: Callable[[], tuple[Tensor, ...]]


def maximum_likelihood(z: Tensor, mixture: Components) -> tuple[Tensor, ...]:
    """Return what the EM step is defined to find, in float64."""
    mixture = mixture.to(torch.float64)
    n, s, m = reference_statistics(Whitened(z.double(), *mixture.expected[:3]), transpose=True)
    shift = s / n[:, None]
    covariances = m / n[:, None, None] - shift[:, :, None] * shift[:, None, :]
    return n / len(z), mixture.centers + shift, covariances


def vmm_fast_em(z: Tensor, mixture: Components) -> EMStep:
    found = SimpleNamespace()

    def call() -> None:
        assert mixture.precision_cholesky is not None
        sums = closed_form.statistics(mixture, z)
        found.centers = closed_form.maximise_centers(sums, mixture.precision_cholesky, False)
        found.precision_cholesky = closed_form.maximise_precision(
            sums.around(found.centers), None, mixture.precision_cholesky, map_prior=False
        )
        found.log_weights, _ = closed_form.maximise_weights(
            sums.N, 1.0, weights="dirichlet", discount=0.0, map_prior="none"
        )

    def values() -> tuple[Tensor, ...]:
        covariances = torch.cholesky_inverse(found.precision_cholesky.double())
        return found.log_weights.exp(), found.centers, covariances

    return EMStep(call, values)


def _upper_precision(mixture: Components) -> Tensor:
    """Return U [J, D, D] with U U^T = Lambda as scikit-learn has it, chol(Lambda^-1)^-T."""
    assert mixture.precision_cholesky is not None
    covariance = torch.cholesky_inverse(mixture.precision_cholesky.double())
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
    inverse = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), eye, upper=False)
    return inverse.mT.to(mixture.centers.dtype)


def sklearn_em(z: Tensor, mixture: Components) -> EMStep:
    from sklearn.mixture import GaussianMixture

    x = z.numpy()
    model = GaussianMixture(mixture.num_components)
    weights, means = mixture.component_weights.numpy(), mixture.centers.numpy()
    precision = _upper_precision(mixture).numpy()

    def call() -> None:
        model.weights_, model.means_, model.precisions_cholesky_ = weights, means, precision
        _, log_responsibilities = model._e_step(x)
        model._m_step(x, log_responsibilities)

    def values() -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, (model.weights_, model.means_, model.covariances_)))

    return EMStep(call, values)


def torchgmm_em(z: Tensor, mixture: Components) -> EMStep:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated parts of torch and lightning
        from torchgmm.bayes.core import cholesky_precision
        from torchgmm.bayes.gmm.metrics import CovarianceAggregator, MeanAggregator, PriorAggregator
        from torchgmm.bayes.gmm.model import GaussianMixtureModel, GaussianMixtureModelConfig
    count, dim = mixture.centers.shape
    model = GaussianMixtureModel(GaussianMixtureModelConfig(count, dim, "full"))
    model.component_probs.copy_(mixture.component_weights)
    model.means.copy_(mixture.centers)
    model.precisions_cholesky.copy_(_upper_precision(mixture))
    sums = (
        PriorAggregator(count),
        MeanAggregator(count, dim),
        CovarianceAggregator(count, dim, "full", reg=1e-6),
    )

    def call() -> None:
        # What its Lightning module does with data in one batch, without Lightning.
        weights, means, covariances = sums
        for part in sums:
            part.reset()
        responsibilities = model.forward(z)[0].exp()
        weights.update(responsibilities)
        means.update(z, responsibilities)
        covariances.update(z, responsibilities, means.compute())
        cholesky_precision(covariances.compute(), "full")

    return EMStep(call, lambda: tuple(part.compute() for part in sums))


EM_STEPS: dict[str, Callable[[Tensor, Components], EMStep]] = {
    "vmm_fast": vmm_fast_em,
    "GaussianMixture": sklearn_em,
    "torchgmm": torchgmm_em,
}
