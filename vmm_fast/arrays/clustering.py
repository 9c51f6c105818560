"""From rows to clusters: train a VAE, assign every row, write ``clusters.csv`` and the rest.

A tenth of the rows is held out. The network gets the weights of the epoch with the best validation
ELBO, and training stops when that has not improved for long. True labels play no part.
Clusters are groups of the mixture's components (:mod:`vmm_fast.clusters`). Both are numbered by how
many rows they hold, so 0 is the largest.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vmm_fast._cut import Cut
from vmm_fast._errors import InputError
from vmm_fast._files import as_csv, load_checked, save_atomically, write_atomically
from vmm_fast._schema import RATE, check, list_of, table, tensor, weights_of, whole
from vmm_fast.arrays.data import Data, Scaling
from vmm_fast.clusters import Clusters, ClusterTree, Confusion, find_clusters, order_by_size
from vmm_fast.metrics import ACTIVE_SHARE, clustering_scores_from_assignment
from vmm_fast.mixture import Components
from vmm_fast.models import VAE, History, RandomShifts, fit
from vmm_fast.priors import VMMPrior

FORMAT = "clusterer 2"
MANY_ROWS = 20_000  # from here on, larger batches and the paper's network
CHUNK = 4096  # rows that are encoded together
FEWEST_EPOCHS, FEWEST_STEPS = 40, 2800
LONGER_FOR_PICTURES = 1.5  # times as many epochs, since each epoch shifts pictures differently
PRIOR_WARMUP = 0.1  # of the epochs
TSNE_ROWS = 2000
SAMPLES = 10  # of each cluster, in the picture


@dataclass(frozen=True, kw_only=True)
class Settings(Cut):
    """Settings of a run: all that it depends on besides its data."""

    epochs: Annotated[
        int, whole(1), "N", "passes at most (default: 40, pictures 60; more for few rows)"
    ]
    latent_dim: Annotated[
        int, whole(1), "D", "latent dimensions (default: 10, at most the columns)"
    ]
    batch_size: Annotated[
        int, whole(1), "B", "rows per step (default: 16 to 64; 256 from 20,000 rows on)"
    ]
    learning_rate: Annotated[float, RATE, "R", "of the network (default: 0.001, pictures 0.002)"]
    seed: Annotated[int, whole(), "N", "of all randomness (default: 0)"] = 0

    @classmethod
    def for_data(cls, data: Data, **given: Any) -> Settings:
        """Return settings in which the size of the data determines what is not given, or None.

        Raises InputError if there are too few rows, more components than rows to start them from,
        or more clusters than components.
        """
        rows, pictures = len(data.values), data.picture_size is not None
        training = rows - _held_out(rows)
        batch_size = 256 if rows >= MANY_ROWS else min(64, max(16, rows // 8))
        steps = max(1, training // (given.get("batch_size") or batch_size))
        longer = LONGER_FOR_PICTURES if pictures else 1
        return cls._filled(
            given,
            rows,
            "rows",
            training,
            # Enough steps for few rows, enough passes for many.
            epochs=max(round(longer * FEWEST_EPOCHS), math.ceil(longer * FEWEST_STEPS / steps)),
            latent_dim=min(10, data.values[0].numel()),
            learning_rate=2e-3 if pictures else 1e-3,
            batch_size=batch_size,
        )


def _held_out(rows: int) -> int:
    return max(1, rows // 10)


def _few_pictures(data: Data) -> bool:
    """Return whether pictures are so few that they must be shifted against overfitting."""
    return data.picture_size is not None and len(data.values) < MANY_ROWS


def _network(data: Data) -> dict[str, Any]:
    """Return the encoder's layers: convolutions for pictures, else the paper's or smaller ones."""
    size = data.picture_size
    if size is None:
        many = len(data.values) >= MANY_ROWS
        return {"hidden": (500, 500, 2000) if many else (512, 256)}
    halvings = max(0, int(math.log2(min(size) / 3)))  # until 3 to 5 values are left
    return {"channels": tuple(min(16 << k, 128) for k in range(halvings)), "hidden": (256,)}


class Assigned(NamedTuple):
    """Rows in latent space and their clusters.

    Attributes
    ----------
    z : Tensor [N, D]
        Latent means.
    labels, probability, entropy : Tensor [N]
        Cluster, its probability, and the entropy of all clusters' probabilities in nats.
    components : Tensor [N]
        Most probable component, which need not belong to the most probable cluster.
    """

    z: Tensor
    labels: Tensor
    probability: Tensor
    entropy: Tensor
    components: Tensor


@dataclass(frozen=True)
class Clusterer:
    """A trained model that assigns new rows, and whose tree of components can be cut elsewhere.

    Attributes
    ----------
    network : VAE
        In evaluation mode; its own prior plays no part.
    clusters : Clusters
        Clusters and components of the mixture, numbered by the rows that they held in training.
    tree : ClusterTree
        From all rows of the training.
    scaling : Scaling
    """

    network: VAE
    clusters: Clusters
    tree: ClusterTree
    scaling: Scaling

    @property
    def components(self) -> Components:
        """The mixture of the prior."""
        return self.clusters.components

    @torch.no_grad()
    def assign(self, values: Tensor) -> Assigned:
        """Assign rows [N, *shape] in the units of the training data."""
        parts = []
        for rows in values.split(CHUNK):
            z = self.network.encode(self.scaling.apply(rows)).mean
            parts.append((z, *self.clusters.assign(z), self.components.assign(z).labels))
        return Assigned(*map(torch.cat, zip(*parts, strict=True)))

    @torch.no_grad()
    def representatives(self, z: Tensor) -> Tensor:
        """Return the index of each cluster's most probable row [G], given latent means [N, D]."""
        best = torch.full((self.clusters.num_clusters,), -1.0)
        index = torch.zeros(len(best), dtype=torch.int64)
        for number, rows in enumerate(z.split(CHUNK)):
            top, at = self.clusters.probabilities(rows).max(0)
            index = torch.where(top > best, at + number * CHUNK, index)
            best = torch.maximum(top, best)
        return index

    @torch.no_grad()
    def samples(self, cluster: int, n: int) -> Tensor:
        """Decode draws from one cluster [n, *shape], scaled as the network sees data."""
        return self.network.decode(self.clusters.sample(n, cluster))

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain values, for `from_state_dict`."""
        return {
            "vmm_fast": FORMAT,
            "network": {
                "input_shape": list(self.network.input_shape),
                "latent_dim": self.network.latent_dim,
                "hidden": self.network.hidden,
                "channels": self.network.channels,
            },
            "weights": self.network.state_dict(),
            "components": self.components.state_dict(),
            "clusters": self.clusters.of_component,
            "confusion": self.tree.confusion._asdict(),
            "scaling": self.scaling.state_dict(),
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Clusterer:
        """Read the model.pt of ``vmm-fast cluster``.

        Raises
        ------
        OSError
            If it cannot be read.
        ValueError
            If it is damaged, or of another version.
        """
        return cls.from_state_dict(load_checked(path), repr(os.fspath(path)))

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], what: str = "state") -> Clusterer:
        """Return the Clusterer of a `state_dict`, which messages call `what`.

        Raises ValueError if the state is of another version, which may have no tree of components,
        or its entries are not as `state_dict` returns them. Further entries are ignored.
        """
        if state.get("vmm_fast") != FORMAT:
            raise ValueError(f"{what} must be of {FORMAT!r}, but is of {state.get('vmm_fast')!r}")
        check(what, state, _check_state)
        try:
            network = VAE(**state["network"])
            network.load_state_dict(state["weights"])
            clusters = Clusters(Components(**state["components"]), state["clusters"])
            clusters.assign(torch.zeros(1, network.latent_dim))  # raises if it cannot be evaluated
            tree = ClusterTree(Confusion(**state["confusion"]))
            tree.check_fits(clusters)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{what} is damaged: {error}") from None
        return cls(network.eval(), clusters, tree, Scaling(**state["scaling"]))


def _check_state(name: str, state: Any) -> None:
    """Raise ValueError unless the entries are of the kinds and sizes that a Clusterer's have."""
    table({"weights": table({}, tensor())})(name, state)
    # A layer has a weight for each of its values: no size can exceed the number of weights.
    size = whole(1, sum(value.numel() for value in state["weights"].values()))
    sizes = {
        "input_shape": list_of(size, least=1),
        "hidden": list_of(size),
        "channels": list_of(size),
    }
    table({"network": table({"latent_dim": size, **sizes}, None)})(name, state)
    try:
        with torch.device("meta"):
            network = VAE(**state["network"])
    except (RuntimeError, TypeError, OverflowError) as error:  # of sizes that no tensor has
        raise ValueError(f"network must be that of a VAE, but is not: {error}") from None
    single, double = tensor(torch.float32), tensor(torch.float64)
    components = {"centers": single, "log_weights": tensor(torch.float32, pruned=True)}
    confusion = {"sums": double, "counts": tensor(torch.int64)}
    table(
        {
            "weights": weights_of(network.state_dict()),
            "components": table(components, single),
            "clusters": tensor(torch.int64),
            "confusion": table(confusion, None),
            "scaling": table({"offset": double, "scale": double}, None),
        }
    )(name, state)
    offset, scale = state["scaling"]["offset"], state["scaling"]["scale"]
    if not offset.shape == scale.shape in ((), network.input_shape) or not (scale > 0).all():
        raise ValueError("scaling must have an offset and a positive scale, of all or each column")


@dataclass(frozen=True)
class Clustering:
    """A finished run: its data, settings and history, the model, and the assigned rows."""

    data: Data
    settings: Settings
    clusterer: Clusterer
    history: History
    assigned: Assigned

    @property
    def component_shares(self) -> Tensor:
        """Share of the rows that is assigned to each component [C]."""
        count = self.assigned.components.bincount(minlength=self.settings.components)
        return count / len(self.assigned.components)

    @property
    def cluster_shares(self) -> Tensor:
        """Share of the rows that is assigned to each cluster [G]."""
        return self.assigned.labels.bincount() / len(self.assigned.labels)

    def metrics(self) -> dict[str, Any]:
        """Return scores, settings and history for JSON; ``scores`` is None without true labels."""
        best = self.history.best_epoch
        assert best is not None  # there always are validation data
        scores = None
        if self.data.labels is not None:
            index = self.clusterer.representatives(self.assigned.z)
            every = clustering_scores_from_assignment(
                self.assigned.labels, self.data.labels, index
            ).as_dict()
            # The numbers of clusters are in the record below, under other names.
            scores = {k: v for k, v in every.items() if not k.startswith("components_")}
        record = self.history[best - 1]
        return {
            "rows": len(self.data.values),
            "rows_held_out": _held_out(len(self.data.values)),
            "shape": list(self.data.values.shape[1:]),
            "scaling": "images" if self.data.images else "columns",
            "constant_columns": self.clusterer.scaling.constant,
            "settings": asdict(self.settings),
            "epochs": len(self.history),
            "best_epoch": best,
            "training_seconds": sum(row["seconds"] for row in self.history),
            "validation_elbo": record["validation_elbo"],
            "validation_log_likelihood": record["validation_log_likelihood"],
            "validation_kl": record["validation_kl"],
            "clusters": self.clusterer.clusters.num_clusters,
            "clusters_active": int((self.cluster_shares > ACTIVE_SHARE).sum()),
            "components_used": int((self.component_shares > 0).sum()),
            "scores": scores,
            "history": list(self.history),
        }

    def write_table(self, path: Path) -> None:
        """Write clusters.csv: a line per row, in the order of the input."""
        header = ["index", "cluster", "probability", "entropy", "component"]
        columns = zip(*(column.tolist() for column in self.assigned[1:]), strict=True)
        rows = (
            [index, row[0], f"{row[1]:.6f}", f"{row[2]:.6f}", row[3]]
            for index, row in enumerate(columns)
        )
        write_atomically(path, as_csv(header, rows), text=True)

    def write_model(self, path: Path) -> None:
        """Write model.pt, which `Clusterer.load` reads."""
        state = {**self.clusterer.state_dict(), "settings": asdict(self.settings)}
        save_atomically(path, state)

    def write_metrics(self, path: Path, metrics: dict[str, Any]) -> None:
        """Write metrics.json."""
        text = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
        write_atomically(path, lambda file: file.write(text), text=True)

    def write_pictures(self, folder: Path) -> None:
        """Write latent.png, samples.png, training.png, tree.png and weights.png."""
        from vmm_fast import plots

        rows = np.random.default_rng(self.settings.seed).permutation(len(self.data.values))
        rows = np.sort(rows[:TSNE_ROWS])
        plots.plot_latent(
            self.assigned.z[rows],
            self.assigned.labels[rows],
            None if self.data.labels is None else self.data.labels[rows],
            path=folder / "latent.png",
            projection="tsne",
            seed=self.settings.seed,
        )
        shares = self.cluster_shares
        active = (shares > ACTIVE_SHARE).nonzero()[:, 0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            samples = torch.stack([self.clusterer.samples(int(c), SAMPLES) for c in active])
        pictures = self.data.pictures(samples)
        if pictures is None:
            pictures = samples.flatten(2)
        else:
            pictures = (pictures / 2 + 0.5).clamp(0, 1)
        plots.plot_cluster_samples(
            pictures, shares[active], folder / "samples.png", clusters=active
        )
        plots.plot_training_curves(self.history, folder / "training.png")
        plots.plot_tree(self.clusterer.tree, self.clusterer.clusters, folder / "tree.png")
        weights = self.clusterer.components.component_weights
        plots.plot_component_weights(weights, self.component_shares, folder / "weights.png")


def train(
    data: Data,
    scaling: Scaling,
    settings: Settings,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = False,
    on_epoch_end: Callable[[dict[str, Any]], object] | None = None,
) -> Clustering:
    """Train a model and assign every row; see `vmm_fast.models.fit` for the arguments.

    Raises InputError if the checkpoint is damaged or of another run, FloatingPointError if training
    diverges.
    """
    shape = tuple(data.values.shape[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        order = torch.randperm(len(data.values))
        held_out = _held_out(len(order))
        x_val, x_train = data.values[order[:held_out]], data.values[order[held_out:]]
        start = torch.randperm(len(x_train))[: settings.components]
        prior = VMMPrior(
            scaling.apply(x_train[start]),
            settings.latent_dim,
            inference="closed-form",
            data_size=len(x_train),
        )
        network = _network(data)
        model = VAE(shape, settings.latent_dim, prior, **network)

    try:
        history = fit(
            model,
            x_train,
            x_val,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            schedule="cosine",
            prior_warmup=PRIOR_WARMUP,
            patience=max(5, settings.epochs // 4),
            seed=settings.seed,
            transform=scaling.apply,
            augment=RandomShifts(shape) if _few_pictures(data) else None,
            checkpoint=checkpoint,
            resume=resume,
            progress=progress,
            on_epoch_end=on_epoch_end,
        )
    except ValueError as error:
        raise InputError(str(error)) from error

    model.eval()
    bare = VAE(shape, settings.latent_dim, **network)
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("prior.")}
    bare.load_state_dict(weights)
    with torch.no_grad():
        components = model.prior.components(model.encode).detach()
    z = torch.cat([bare.eval().encode(scaling.apply(x)).mean for x in data.values.split(CHUNK)])
    counts = components.assign(z).labels.bincount(minlength=components.num_components)
    order = order_by_size(components, counts)
    sorted_ = {name: value[order] for name, value in components.state_dict().items()}
    components = Components(**sorted_)
    tree = ClusterTree(Confusion.of(components, z))
    cut = settings.at_most(len(tree.leaves))
    with warnings.catch_warnings():  # the result says how many there are
        warnings.filterwarnings("ignore", message="n_clusters is")
        clusters = find_clusters(components, z, tree=tree, **cut)
    clusterer = Clusterer(bare, clusters, tree, scaling)
    return Clustering(data, settings, clusterer, history, clusterer.assign(data.values))
