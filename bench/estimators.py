"""Gaussian mixtures as estimators: time to convergence, likelihood, clusters and memory.

All get the same points in float32, as many components, full covariances, k-means to start from and
one rule to stop: an iteration gains less than 1e-3 nats a point. Each runs in a process of its own.

- synthetic: points of 20 Gaussians that overlap, in 30 dimensions.
- mnist: the first 30 principal components of MNIST's images; held out are its test images.

Likelihoods are those of points that are held out, under the weights, means and covariances that a
fit ends with, in nats a point. ARI compares them with the Gaussian or the digit that a point is of,
for clusters where an estimator has any, else for components. Where scikit-learn would take too
long, it takes a few iterations, and the time of one counts as often as it needed for fewer points:
its seconds are ``scaled`` then, and it has neither likelihood nor ARI. Left out: dpgmm, which draws
samples and does not converge.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench import alone
from bench.measurement import Check, Measurement, Run
from bench.records import DATA, Row, select
from bench.tables import duration, table
from vmm_fast.mixture import Components

OURS, BAYESIAN, MAXIMUM_LIKELIHOOD = "vmm_fast", "BayesianGaussianMixture", "GaussianMixture"
PROVIDERS = {OURS: "sklearn", BAYESIAN: "sklearn", MAXIMUM_LIKELIHOOD: "sklearn"}
PROVIDERS |= {"tgmm": "tgmm", "torchgmm": "torchgmm"}
SYNTHETIC, MNIST = "synthetic", "mnist"
DIM, GROUPS, HELD_OUT = 30, 20, 10_000
TOLERANCE = 1e-3  # nats a point
MOST_ITERATIONS, FEW_ITERATIONS = 500, 3
REASON = (
    "The prior adds (D + 2) C^(-2/D) covariances of all points to each component's scatter: 25 at "
    "D = 30 and C = 50, and MNIST's components are that much wider. A weaker prior on points of "
    "unit variance raises the likelihood and leaves one Gaussian in many clusters. Next: a prior "
    "whose strength is chosen on held-out points."
)


class Plan(NamedTuple):
    """Points of each data set, the number from which others are scaled, and components."""

    points: dict[str, tuple[int, ...]]
    scaled_from: int
    components: int


FULL = Plan({SYNTHETIC: (100_000, 1_000_000), MNIST: (60_000,)}, 1_000_000, 50)
QUICK = Plan({SYNTHETIC: (500, 1_000)}, 1_000, 10)


# --- data ---


def points(name: str, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return points [count, D] and what they are of, then those that are held out."""
    if name == SYNTHETIC:
        random = np.random.default_rng(0)
        centers = 0.5 * random.normal(size=(GROUPS, DIM))
        factors = 0.5 * np.tril(random.normal(size=(GROUPS, DIM, DIM)), -1) / DIM**0.5
        factors += random.uniform(0.5, 1.5, (GROUPS, DIM))[:, :, None] * np.eye(DIM)
        of = random.integers(GROUPS, size=count + HELD_OUT)
        x = random.normal(size=(count + HELD_OUT, DIM)).astype(np.float32)
        for group in range(GROUPS):
            x[of == group] = x[of == group] @ factors[group].T + centers[group]
        return x[:count], of[:count], x[count:], of[count:]
    parts = [np.load(DATA / f"mnist_{part}.npz") for part in ("train", "test")]
    train, test = (part["images"].reshape(-1, 784).astype(np.float32) / 255 for part in parts)
    mean = train.mean(0)
    axes = np.linalg.eigh(np.cov(train.T))[1][:, : -DIM - 1 : -1].astype(np.float32)
    labels = [part["labels"] for part in parts]
    return (train - mean)[:count] @ axes, labels[0][:count], (test - mean) @ axes, labels[1]


# --- providers, each of which runs in a process of its own ---


class Fit(NamedTuple):
    """A fit: when each iteration began, and the last ended, if known; parameters; who assigns."""

    starts: list[float]
    iterations: int
    weights: Any
    means: Any
    covariances: Any
    assign: Any


def fit(provider: str, folder: str, components: int, iterations: int) -> dict[str, Any]:
    """Return seconds, iterations, held-out log-likelihood and ARI of one estimator's fit."""
    from sklearn.metrics import adjusted_rand_score

    x, test, of = (np.load(f"{folder}/{name}.npy") for name in ("x", "test", "of"))
    estimate = ESTIMATES.get(provider, partial(sklearn, provider))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fits that end early, and others' own
        start = time.perf_counter()
        found = estimate(x, components, iterations)
        seconds = time.perf_counter() - start
        peak = alone.resident_bytes("VmHWM")
        labels = found.assign(test)
    if found.starts:  # the time of the start, and of an iteration
        begun, steps = found.starts[0] - start, np.diff(found.starts)
        split = {"start_seconds": begun, "iteration_seconds": float(np.mean(steps))}
    else:
        split = {}
    return {
        "seconds": seconds,
        **split,
        "iterations": found.iterations,
        "log_likelihood": log_likelihood(found, test),
        "ari": float(adjusted_rand_score(of, labels)),
        "groups": len(np.unique(labels)),
        "peak_bytes": peak,
    }


def log_likelihood(found: Fit, test: np.ndarray) -> float:
    """Return the mean log-density of points under weights, means and covariances, in nats."""
    weights, means, covariances = (torch.as_tensor(x).double() for x in found[2:5])
    scale = torch.linalg.cholesky(covariances)
    mixture = Components(means, (weights / weights.sum()).log(), None, scale)
    return float(mixture.log_prob(torch.from_numpy(test).double()).mean())


def ours(x: np.ndarray, components: int, iterations: int) -> Fit:
    from vmm_fast import DirichletMixture

    model = DirichletMixture(components, tol=TOLERANCE, max_iter=iterations, random_state=0).fit(x)
    parameters = model.weights_, model.means_, model.covariances_
    return Fit([], model.n_iter_, *parameters, model.predict)


def sklearn(provider: str, x: np.ndarray, components: int, iterations: int) -> Fit:
    from sklearn import mixture

    starts: list[float] = []

    class Timed(getattr(mixture, provider)):
        def _e_step(self, *arguments: Any, **options: Any) -> Any:
            starts.append(time.perf_counter())
            return super()._e_step(*arguments, **options)

    # The bound of the Bayesian one is that of all points together.
    options: dict[str, Any] = {"tol": TOLERANCE}
    if provider == BAYESIAN:
        options = {
            "tol": TOLERANCE * len(x),
            "weight_concentration_prior_type": "dirichlet_distribution",
        }
    model = Timed(n_components=components, max_iter=iterations, random_state=0, **options).fit(x)
    parameters = model.weights_, model.means_, model.covariances_
    # The last E-step is that of the labels, after the last iteration.
    return Fit(starts, model.n_iter_, *parameters, model.predict)


def tgmm(x: np.ndarray, components: int, iterations: int) -> Fit:
    from tgmm import GaussianMixture

    # Its tolerance is relative to the mean log-density, for which that of one Gaussian stands.
    one = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * np.cov(x.T))[1]
    options = {"tol": TOLERANCE / abs(one), "max_iter": iterations, "random_state": 0}
    model = GaussianMixture(components, x.shape[1], **options)
    model.fit(torch.from_numpy(x))
    parameters = model.weights_, model.means_, model.covariances_
    return Fit([], model.n_iter_, *parameters, lambda z: model.predict(torch.from_numpy(z)).numpy())


def torchgmm(x: np.ndarray, components: int, iterations: int) -> Fit:
    from torchgmm.bayes import GaussianMixture

    torch.manual_seed(0)
    model = GaussianMixture(
        components,
        covariance_type="full",
        convergence_tolerance=TOLERANCE,
        trainer_params={"max_epochs": iterations, "enable_progress_bar": False},
    )
    model.fit(torch.from_numpy(x))
    found = model.model_
    parameters = found.component_probs, found.means, found.covariances
    return Fit(
        [], model.num_iter_, *parameters, lambda z: model.predict(torch.from_numpy(z)).numpy()
    )


ESTIMATES = {OURS: ours, "tgmm": tgmm, "torchgmm": torchgmm}


# --- rows, targets, table ---


def rows(run: Run) -> Iterator[Row]:
    """Yield a row for each data set, number of points and provider."""
    plan = run.choose(FULL, QUICK)
    for name, counts in plan.points.items():
        needed: dict[str, int] = {}  # iterations of each provider for fewer points
        for count in counts:
            with tempfile.TemporaryDirectory() as folder:
                x, _, test, of = points(name, count)
                for part, values in {"x": x, "test": test, "of": of}.items():
                    np.save(Path(folder) / f"{part}.npy", values)
                case = {"mode": name, "B": count, "J": plan.components, "D": x.shape[1]}
                del x
                for provider, module in PROVIDERS.items():
                    scaled = provider != OURS and count >= plan.scaled_from
                    if importlib.util.find_spec(module) is None or (scaled and module != "sklearn"):
                        continue
                    found = alone.run(
                        fit,
                        threads=run.args.threads,
                        provider=provider,
                        folder=folder,
                        components=plan.components,
                        iterations=FEW_ITERATIONS if scaled else MOST_ITERATIONS,
                    )
                    if scaled:
                        found = _scaled(found, needed[provider])
                    needed[provider] = found["iterations"]
                    yield {"provider": provider, **case, "scaled": scaled, **found}


def _scaled(found: dict[str, Any], iterations: int) -> dict[str, Any]:
    """Return what a fit that ended early would have taken for so many iterations."""
    seconds = found["start_seconds"] + iterations * found["iteration_seconds"]
    left_out = ("log_likelihood", "ari", "groups")
    kept = {name: value for name, value in found.items() if name not in left_out}
    return {**kept, "seconds": seconds, "iterations": iterations}


def checks(rows: Sequence[Row]) -> Iterator[Check]:
    """Yield time and likelihood against scikit-learn's Bayesian mixture."""
    for row in select(rows, provider=OURS):
        for other in select(rows, provider=BAYESIAN, mode=row["mode"], B=row["B"]):
            case = f"{row['mode']}, ({row['B']}, {row['J']}, {row['D']})"
            if other["scaled"]:
                target, ratio = f"fit against {BAYESIAN}", other["seconds"] / row["seconds"]
                yield Check(target, case, ratio, 10.0, reason=REASON)
            else:
                gain = row["log_likelihood"] - other["log_likelihood"]
                target = f"held-out log-likelihood of a fit, over {BAYESIAN}'s"
                yield Check(target, case, gain, -0.05, unit=" nats", reason=REASON)


def tables(rows: Sequence[Row]) -> str:
    """Return a line for each fit."""
    lines = []
    for row in rows:
        (base,) = select(rows, provider=OURS, mode=row["mode"], B=row["B"])
        ratio = f" ({row['seconds'] / base['seconds']:.3g}x)" * (row is not base)
        scores = (
            f"{row[name]:{form}}" if name in row else "-"
            for name, form in (("log_likelihood", ".3f"), ("ari", ".3f"), ("groups", ""))
        )
        lines.append(
            (
                f"{row['mode']} ({row['B']:,}, {row['J']}, {row['D']})",
                row["provider"] + ", scaled" * row["scaled"],
                str(row["iterations"]),
                duration(row["seconds"]) + ratio,
                *scores,
                f"{row['peak_bytes'] / 2**30:.2f} GiB",
            )
        )
    head = ("points (B, J, D)", "estimator", "iterations", "time")
    return table((*head, "held-out log-likelihood", "ARI", "groups", "peak memory"), lines)


MEASUREMENT = Measurement(
    "estimators",
    "Gaussian mixtures as estimators: scikit-learn's, torchgmm, tgmm",
    rows,
    needs=("sklearn",),
    checks=checks,
    introduction="Fits to convergence (less than 1e-3 nats a point); the top of "
    "`bench/estimators.py` says what is compared. Groups are clusters for vmm_fast and components "
    "for the others; *scaled*: the time of an iteration times its number for fewer points. Memory "
    "counts with the interpreter, its libraries and the points.",
    tables=tables,
)
