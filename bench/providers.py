"""Everybody who computes a mixture's density or its expectation-maximisation step.

A provider of a density is a function from a :class:`bench.problems.Whitened` or
:class:`bench.problems.Parameters` to log p(z) [B] that torch differentiates; TensorFlow Probability
runs in a process of its own. A provider of the EM step makes an :class:`EMStep` from points and a
start.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import subprocess
import tempfile
import venv
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from bench.problems import Parameters, Whitened, reference_statistics
from vmm_fast import ops, reference
from vmm_fast.inference import closed_form
from vmm_fast.mixture import Components

Density = Callable[..., Tensor]

# Modules that optional providers need.
MODULES = {"KeOps": "pykeops", "torchgmm": "torchgmm"}
TFP_PACKAGES = ("tensorflow-cpu", "tensorflow-probability", "tf-keras")


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


def whitened_densities() -> dict[str, Density]:
    """Return the providers from A that are installed."""
    # One compilation a size, not a slower one for all. Only eight of a function are kept before
    # torch goes back to eager without a word, hence none of those from before.
    torch.compiler.reset()
    compiled = torch.compile(matmul, dynamic=False)
    providers = {
        "vmm_fast": vmm_fast_whitened,
        "matmul": matmul,
        "torch.compile": compiled,
        "KeOps": keops,
    }
    return {name: f for name, f in providers.items() if installed(name)}


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


COMPONENT_BUILDERS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "vmm_fast": ops.whitened_components,
    "torch": reference.whitened_components,
}


def make_tfp_environment(folder: str) -> None:
    """Make a virtual environment with TensorFlow Probability, which shares nothing with this."""
    venv.create(folder, with_pip=True)
    python = Path(folder) / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *TFP_PACKAGES], check=True)


class TFPWorker:
    """TensorFlow Probability's density and gradients in a process of its own.

    See ``bench/tfp_worker.py`` for what is said between the two.
    """

    def __init__(self, environment: str, p: Parameters, thread_count: int):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            np.savez(folder / "inputs.npz", **{k: v.numpy() for k, v in p._asdict().items()})
            python, worker = (
                Path(environment) / "bin/python",
                Path(__file__).parent / "tfp_worker.py",
            )
            self._process = subprocess.Popen(
                [python, worker, folder, str(thread_count)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self.versions = self._read()["versions"]
            with np.load(folder / "outputs.npz") as outputs:
                self.outputs = [torch.from_numpy(outputs[str(i)]) for i in range(len(outputs))]

    def _read(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process of TensorFlow Probability ended; run tfp_worker.py")
        return json.loads(line)

    def sample(self, calls: int) -> float:
        """Return the seconds that so many calls take there."""
        print(calls, file=self._process.stdin, flush=True)
        return self._read()["seconds"]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


# --- one step of expectation maximisation ---


class EMStep(NamedTuple):
    """An E- and M-step from one start.

    ``call`` takes the step, ``values`` returns what the last call found: weights [J], means [J, D]
    and covariances [J, D, D]. ``expected`` returns the same in float64 for a provider whose maths
    are its own; None for maximum likelihood.
    """

    call: Callable[[], object]
    values: Callable[[], tuple[Tensor, ...]]
    expected: Callable[[], tuple[Tensor, ...]] | None = None


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


def sklearn_bayesian_em(z: Tensor, mixture: Components) -> EMStep:
    """Return the variational step: other maths of about the same cost, checked by its means."""
    from sklearn.mixture import BayesianGaussianMixture

    responsibilities = mixture.log_joint(z).log_softmax(-1).detach().numpy()
    kind = {"n_components": mixture.num_components}
    kind["weight_concentration_prior_type"] = "dirichlet_distribution"

    def prepare(dtype: type) -> tuple[Callable[[], None], BayesianGaussianMixture]:
        x, model = z.numpy().astype(dtype), BayesianGaussianMixture(**kind)
        model._check_parameters(x)
        model._m_step(x, responsibilities.astype(dtype))
        start = dict(vars(model))

        def call() -> None:
            vars(model).update(start)
            _, log_responsibilities = model._e_step(x)
            model._m_step(x, log_responsibilities)

        return call, model

    call, model = prepare(np.float32)

    def expected() -> tuple[Tensor, ...]:
        exactly, exact = prepare(np.float64)
        exactly()
        return (torch.from_numpy(exact.means_),)

    return EMStep(call, lambda: (torch.from_numpy(model.means_),), expected)


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
    "BayesianGaussianMixture": sklearn_bayesian_em,
    "torchgmm": torchgmm_em,
}
