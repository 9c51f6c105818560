"""Methods that find clusters of images without labels: ours, and those that it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from torch import Tensor

from vmm_fast import GaussianMixturePrior, StandardNormalPrior, VampPrior, VMMPrior
from vmm_fast.arrays.clustering import Assigned, Settings, train
from vmm_fast.arrays.data import Data, Scaling
from vmm_fast.priors import Prior

CLASSES = 10


class Problem(NamedTuple):
    """Images to train on and new ones [M, H, W] to assign, if any, all without labels."""

    data: Data
    new: Tensor | None
    seed: int
    epochs: int | None  # None: each method takes its own number


# The cluster of each training image [N], and of each new one [M] if the method can assign them.
Found = list[Any]


class Method(NamedTuple):
    """A method that takes a Problem, or posterior means under N(0, I) and a seed."""

    title: str
    given: bool  # whether the number of classes is
    find: Callable[..., Found]
    on_means: bool = False


MakePrior = Callable[..., Prior]  # what stands in the place of `VMMPrior(start, latent_dim, ..)`


def gmm(start: Tensor, latent_dim: int, **options: Any) -> Prior:
    """Return a Gaussian mixture of as many components."""
    return GaussianMixturePrior(len(start), latent_dim, **options)


def vamp(start: Tensor, latent_dim: int, **options: Any) -> Prior:
    """Return a VampPrior of the same pseudo-inputs."""
    return VampPrior(start, latent_dim)


def normal(start: Tensor, latent_dim: int, **options: Any) -> Prior:
    """Return N(0, I)."""
    return StandardNormalPrior(latent_dim)


def train_with(prior: MakePrior, problem: Problem, **changed: Any) -> list[Assigned]:
    """Cluster as ``vmm-fast cluster`` does, but for this prior and settings, and assign images."""
    data, new, seed, epochs = problem
    settings = Settings.for_data(data, **{"seed": seed, "epochs": epochs, **changed})
    with mock.patch("vmm_fast.VMMPrior", side_effect=prior) as made:
        clusterer = train(data, Scaling.of(data), settings).clusterer
    made.assert_called_once()
    return [clusterer.assign(images) for images in (data.values, new) if images is not None]


def ours(prior: MakePrior = VMMPrior, **changed: Any) -> Callable[[Problem], Found]:
    """Cluster with one of our priors: clusters are groups of its components."""

    def find(problem: Problem) -> Found:
        return [assigned.labels for assigned in train_with(prior, problem, **changed)]

    return find


def k_means(means: list[Tensor], seed: int) -> Found:
    """Run k-means, given the number of classes."""
    from sklearn.cluster import KMeans

    model = KMeans(CLASSES, n_init=10, random_state=seed).fit(means[0].numpy())
    return [model.predict(z.numpy()) for z in means]


def dirichlet_process(means: list[Tensor], seed: int) -> Found:
    """Fit the mixture of scikit-learn with a Dirichlet process; each component is a cluster."""
    from sklearn.mixture import BayesianGaussianMixture

    kind = "dirichlet_process"
    model = BayesianGaussianMixture(  # with its own limit of 100 steps it would not converge
        n_components=100, weight_concentration_prior_type=kind, max_iter=500, random_state=seed
    )
    model.fit(means[0].numpy())
    return [model.predict(z.numpy()) for z in means]


def leiden(means: list[Tensor], seed: int) -> Found:
    """Cut a graph of 15 neighbours; new images cannot be assigned."""
    import scanpy
    from anndata import AnnData

    adata = AnnData(means[0].numpy())
    scanpy.pp.neighbors(adata, n_neighbors=15, use_rep="X", random_state=seed)
    scanpy.tl.leiden(adata, flavor="igraph", n_iterations=2, resolution=1, random_state=seed)
    return [adata.obs["leiden"].astype(int).to_numpy()]


def clustpy(name: str) -> Callable[[Problem], Found]:
    """Run a method of clustpy with its defaults, on images scaled as in its examples of MNIST.

    There all pixels together have mean 0 and standard deviation 1. The loss of VaDE needs [0, 1].
    """

    def find(problem: Problem) -> Found:
        import clustpy.deep

        every = (problem.data.values, problem.new)
        x, *new = (part.flatten(1).numpy().astype(np.float32) for part in every if part is not None)
        low, high = float(x.min()), float(x.max())
        shift, scale = (low, high - low) if name == "VaDE" else (float(x.mean()), float(x.std()))
        given: dict[str, Any] = {} if name == "DipDECK" else {"n_clusters": CLASSES}
        if problem.epochs is not None:
            given |= dict.fromkeys(("pretrain_epochs", "clustering_epochs"), problem.epochs)
        model = getattr(clustpy.deep, name)(**given, device="cpu", random_state=problem.seed)
        model.fit((x - shift) / scale)
        return [model.labels_, *(model.predict((part - shift) / scale) for part in new)]

    return find


METHODS = {
    "vmm": Method("VMM, as `vmm-fast cluster`", False, ours()),
    "gmm": Method("Gaussian mixture, same network", False, ours(gmm)),
    "vamp": Method("VampPrior, same network", False, ours(vamp)),
    "k-means": Method("N(0, I), same network, k-means", True, k_means, True),
    "dirichlet": Method("N(0, I), same network, Dirichlet process", False, dirichlet_process, True),
    "leiden": Method("N(0, I), same network, Leiden", False, leiden, True),
    "vade": Method("VaDE, clustpy", True, clustpy("VaDE")),
    "dec": Method("DEC, clustpy", True, clustpy("DEC")),
    "idec": Method("IDEC, clustpy", True, clustpy("IDEC")),
    "dipdeck": Method("DipDECK, clustpy", False, clustpy("DipDECK")),
}
