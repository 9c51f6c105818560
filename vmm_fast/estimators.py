"""The Bayesian Gaussian mixture as an estimator of scikit-learn, for points that exist already.

Points x [N, D] are scaled by their own mean and covariance: z = (x - a) W has covariance I, and
the model of :class:`vmm_fast.GaussianMixturePrior` with its parameter priors,

    p(x) = |W| sum_c pi_c N(z; m_c, Lambda_c^-1)
    pi ~ Dirichlet(gamma / C, .., gamma / C), m_c ~ N(0, I), Lambda_c ~ Wishart with mean C^(2/D) I

maximised by exact expectation maximisation (:mod:`vmm_fast.inference.closed_form`). In units of x
the priors are centered at the mean of the points and have the shape of their covariance, so a fit
follows changes of units; only k-means, which it starts from, measures distances in those of x.
Directions in which points do not vary, as those of constant columns, are left out of the model.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from vmm_fast._checks import check_choice, check_integer, check_positive
from vmm_fast._whitening import BATCH, Batches, Whitening, distinct
from vmm_fast.clusters import Clusters, ClusterTree, Confusion, clusters_of_cut
from vmm_fast.clusters.left_out import confusion_left_out
from vmm_fast.inference.map_objective import wishart_scale
from vmm_fast.priors import GaussianMixturePrior

try:
    from sklearn.base import BaseEstimator, ClusterMixin, DensityMixin
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    message = "DirichletMixture needs scikit-learn >= 1.6: pip install vmm-fast[cli]"
    raise ImportError(message) from error

__all__ = ["DirichletMixture"]

STARTS = 512  # points per component that a fit starts with, drawn from all of them
LLOYD = 20  # iterations of k-means
FIXED = ("n_components", "concentration")  # from when a mixture begins
FAR = 10.0  # standard deviations of the first points
FORGETTING = 0.6  # of old batches by a new one (Cappe & Moulines 2009, section 3)
# Where the tree is cut: in embeddings, whose components are fewer and overlap more than those of a
# prior that a network has adapted to, the usual cut makes more clusters.
RESOLUTION, SEPARATION = 1.0, 0.05
MOST_WEIGHT = 2.0**53  # of all points: beyond it, float64 cannot count them
# It is cut to see whether arguments are valid, before a fit that would end with an error.
_TREE = ClusterTree(Confusion(torch.ones(1, 1, dtype=torch.float64), torch.ones(1).long()))


Method = TypeVar("Method", bound=Callable[..., Any])


def _all_or_nothing(method: Method) -> Method:
    """Return a method whose errors leave the estimator as it was before."""

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = vars(self).copy()
        try:
            return method(self, *args, **kwargs)
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    return called  # type: ignore[return-value]


class DirichletMixture(ClusterMixin, DensityMixin, BaseEstimator):
    """A Bayesian Gaussian mixture that groups its components into clusters.

    It takes arrays of numpy, also memory-mapped ones, and tensors of torch on a CPU, and computes
    in their dtype, float32 or float64; results are arrays. Points are read in batches: memory does
    not grow with points x components. They are scaled by their own covariance first, so that units
    do not matter. :mod:`vmm_fast.clusters` has the formulas of clusters.

    Parameters
    ----------
    n_components : int, optional
        Largest number C of components: components without points keep a weight of almost 0.
        20 unless given, but never more than distinct points.
    concentration : float or "learnt"
        gamma. The less, the more weights are almost 0. If it is learnt (from 1), the objective may
        fall.
    resolution, separation, n_clusters : optional
        Where the tree of components is cut into clusters; see
        :meth:`vmm_fast.clusters.ClusterTree.cut`. There are at most ``n_clusters``; else the
        resolution is 1 and the separation 0.05, unless given.
    init : "k-means++" or "random"
        How k-means starts, from whose clusters components start.
    tol : float
        A fit ends when an iteration gains less, in nats per point.
    max_iter : int
    random_state : int, numpy.random.RandomState or None

    Attributes
    ----------
    labels_ : ndarray [N], int64
        Cluster of each point of the last ``fit`` or ``partial_fit``; the largest cluster is 0.
    weights_, means_, covariances_ : ndarray [C], [C, D], [C, D, D]
        Of the components, in units of the points.
    component_clusters_ : ndarray [C], int64
        Cluster of each component.
    tree_ : ClusterTree
        Tree of the components: after ``fit`` by what they share of points that are left out of the
        fit, one at a time (``vmm_fast/clusters/left_out.py`` has the formulas).
    objective_ : list of float
        Log-posterior before each iteration, less a constant, in nats per point. It never falls, up
        to rounding. ``partial_fit``, which does not know it, removes it and ``converged_``.
    converged_ : bool
    n_iter_ : int
        Iterations over all points, or steps of ``partial_fit``.
    n_features_in_ : int

    Notes
    -----
    Stirn & Knowles (2024), arXiv 2402.04412; Dempster, Laird & Rubin (1977). This is maximum a
    posteriori estimation, not the variational one of scikit-learn's BayesianGaussianMixture. The
    prior adds (D + 2) C^(-2/D) covariances of all points to a component's scatter: components of
    few points are wider, and densities lower, than by maximum likelihood, and clusters are fewer.

    Densities are those within the directions in which the points of the fit vary: a new point that
    differs from them in a constant column alone is not less dense.

    Examples
    --------
    >>> points = np.random.default_rng(0).normal(size=(400, 2))
    >>> points[:100] += 9
    >>> mixture = DirichletMixture(4, random_state=0).fit(points)
    >>> np.bincount(mixture.labels_)
    array([300, 100])
    >>> mixture.predict_proba(points[:1]).round(2)
    array([[0., 1.]])
    """

    _prior: GaussianMixturePrior

    def __init__(
        self,
        n_components: int | None = None,
        *,
        concentration: float | Literal["learnt"] = 1.0,
        resolution: float | None = None,
        separation: float | None = None,
        n_clusters: int | None = None,
        init: Literal["k-means++", "random"] = "k-means++",
        tol: float = 1e-3,
        max_iter: int = 200,
        random_state: int | np.random.RandomState | None = None,
    ):
        self.n_components = n_components
        self.concentration = concentration
        self.resolution = resolution
        self.separation = separation
        self.n_clusters = n_clusters
        self.init = init
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state

    @_all_or_nothing
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> DirichletMixture:
        """Fit the mixture to points, by exact expectation maximisation.

        Parameters
        ----------
        X : array or Tensor [N, D]
        y : ignored
        sample_weight : array [N], optional
            How many points each counts as.

        Raises
        ------
        ValueError
            Naming the argument, what it must be and what it is.
        """
        X = self._points(X, reset=True)
        weights = None
        if sample_weight is not None:
            weights = _check_sample_weight(sample_weight, X, dtype=np.float64)
            if weights.min() < 0:
                raise ValueError(f"sample_weight must be at least 0, but is {weights.min()}")
            with np.errstate(over="ignore"):
                total = weights.sum()
            if total == 0:  # scikit-learn before 1.8 takes it
                raise ValueError("sample_weight must be above 0 for some point, but is 0 for all")
            if not total <= MOST_WEIGHT:
                raise ValueError(
                    f"sample_weight must sum to at most {MOST_WEIGHT:.3g}, since it says how many "
                    f"points each counts as, but sums to {total:.3g}: divide it"
                )
        points = X
        if weights is not None and not weights.all():  # what counts 0 times is not there
            points, weights = X[weights > 0], weights[weights > 0]
        self._start(points, weights)
        batches = Batches(points, self._whitening)
        own = None if weights is None else torch.from_numpy(weights)
        self.objective_ = self._climb(batches, own)
        self.n_iter_ = len(self.objective_)
        gains = np.diff(self.objective_)
        self.converged_ = bool(len(gains) and gains[-1] < self.tol)
        if not self.converged_:
            warnings.warn(
                f"the fit has not converged in {self.max_iter} iterations: raise max_iter or tol",
                ConvergenceWarning,
                stacklevel=3,
            )
        self._seen = len(X) if weights is None else float(weights.sum())
        components = self._prior.components().detach()
        # The precision has one degree of freedom more than points, as in closed form.
        self.tree_ = ClusterTree(confusion_left_out(components, batches, own, degrees=1))
        cut = self._cut(self.tree_)
        with warnings.catch_warnings():  # there are as many as hold points
            warnings.filterwarnings("ignore", message="n_clusters is")
            clusters = clusters_of_cut(self.tree_, components, batches, own, **cut)
        return self._finish(clusters, X)

    @_all_or_nothing
    def partial_fit(self, X: Any, y: Any = None) -> DirichletMixture:
        """Take a step of online expectation maximisation for every 16,384 points, or once.

        The first call starts the mixture and fixes how points are whitened, so its points must be
        typical ones. Of n points so far, b new ones weigh (b / n)^0.6. After :meth:`fit`, the
        mixture goes on from there.

        As in scikit-learn's MiniBatchKMeans, components follow points that lie elsewhere. But the
        parameter priors keep the scale of the first ones, and hold back means of points that are
        far by it: a warning says if they are over 10 standard deviations away. ``n_components`` and
        ``concentration`` are fixed by the first call; where the tree is cut may change.

        Parameters
        ----------
        X : array or Tensor [B, D]
        y : ignored

        Raises
        ------
        ValueError
            Naming the argument, what it must be and what it is.
        """
        first = not hasattr(self, "_prior")
        X = self._points(X, reset=first)
        if first:
            self._start(X, None)
            self._seen, self.n_iter_ = 0, 0
        for name, before in self._began_with.items():
            if (now := getattr(self, name)) != before:
                raise ValueError(
                    f"{name} must be {before!r}, as when the mixture began, but is {now!r}; "
                    "fit begins anew"
                )
        for of_fit in ("objective_", "converged_"):
            self.__dict__.pop(of_fit, None)
        prior = self._prior = deepcopy(self._prior)  # it changes in place
        for start, z in self._whitened(X):
            away = float(z.double().square().mean().sqrt())
            if FAR < away < math.inf:  # others are named by their rows
                warnings.warn(
                    f"X should be like the points of the first call, but lies {away:.3g} of their "
                    "standard deviations away: means lag behind; fit begins anew",
                    stacklevel=3,
                )
            before = self._seen
            self._seen += len(z)
            rate = (len(z) / self._seen) ** FORGETTING
            prior.options = replace(
                prior.options, statistics_rate=rate, data_size=max(1, round(self._seen))
            )
            with _naming_rows(start):
                # Of points that the mixture has not learnt from: later ones before it does.
                confusion = Confusion.of(prior.components().detach(), z) if before else None
                prior.update(z)
                components = prior.components().detach()
                confusion = confusion or confusion_left_out(components, [z], None, degrees=1)
            self.n_iter_ += 1
            if before and hasattr(self, "tree_"):
                old = self.tree_.confusion
                kept = (1 - rate) * self._seen / before
                new = rate * self._seen / len(z)
                confusion = Confusion(
                    kept * old.sums + new * confusion.sums,
                    kept * old.counts + new * confusion.counts,
                )
            self.tree_ = ClusterTree(confusion)
        clusters = Clusters(components, self.tree_.cut(**self._cut(self.tree_)))
        return self._finish(clusters, X)

    def _points(self, X: Any, reset: bool) -> np.ndarray:
        """Return points as scikit-learn checks them, in float32 or float64, without copying."""
        if isinstance(X, Tensor):
            X = X.detach()
            X = (X.float() if X.dtype in (torch.float16, torch.bfloat16) else X).numpy()
        options = {"reset": reset, "ensure_min_samples": 2 if reset else 1}
        points: np.ndarray = validate_data(self, X, dtype=[np.float64, np.float32], **options)
        return points

    def _cut(self, tree: ClusterTree) -> dict[str, Any]:
        """Return where a tree is cut; it may have fewer leaves than clusters are asked for."""
        number = self.n_clusters
        if number is not None:
            number = min(check_integer("n_clusters", number), len(tree.leaves))
        cut = {"resolution": self.resolution, "separation": self.separation, "n_clusters": number}
        usual = {"resolution": RESOLUTION, "separation": SEPARATION} if number is None else {}
        return cut | {name: value for name, value in usual.items() if cut[name] is None}

    def _check(self, points: int) -> int:
        """Return the number of components, after checking all arguments of the constructor."""
        if isinstance(self.concentration, str):
            check_choice("concentration", self.concentration, ("learnt",))
        else:
            check_positive("concentration", self.concentration)
        check_choice("init", self.init, ("k-means++", "random"))
        check_positive("tol", self.tol)
        check_integer("max_iter", self.max_iter)
        _TREE.cut(**self._cut(_TREE))
        if self.n_components is None:
            return min(20, points)
        if check_integer("n_components", self.n_components) > points:
            raise ValueError(
                f"n_components must be at most {points}, the number of points of a weight above 0, "
                f"but is {self.n_components}"
            )
        return int(self.n_components)

    def _start(self, X: np.ndarray, weights: np.ndarray | None) -> None:
        """Set the whitening, and a mixture of the clusters of k-means with one covariance.

        Of many points a sample takes the first iterations, which are the most, in little time.
        """
        own = np.ones(len(X)) if weights is None else weights
        self._began_with = {name: getattr(self, name) for name in FIXED}
        count = self._check(int(np.count_nonzero(own)))
        random = check_random_state(self.random_state)
        self._whitening = whitening = Whitening.of(X, own)
        rows, share = distinct(X, own, STARTS * count, random)
        count = min(count, len(rows))
        z = whitening.apply(rows).double().numpy()
        # In the units of X up to one factor: distances between points are what k-means knows.
        scale, dim = np.sqrt((whitening.inverse**2).mean()), z.shape[1]
        means = KMeans(count, init=self.init, n_init=1, max_iter=LLOYD, random_state=random)
        with warnings.catch_warnings():  # points that are nearly the same do no harm
            warnings.simplefilter("ignore", ConvergenceWarning)
            means.fit(z @ whitening.inverse / scale, sample_weight=share)
        centers = means.cluster_centers_ * scale @ whitening.matrix
        d = z - centers[means.labels_]
        mass = np.bincount(means.labels_, share, count)
        scatter = (share[:, None] * d).T @ d + np.eye(dim) / wishart_scale(count, dim)
        precision = torch.from_numpy(np.linalg.inv(scatter / (mass.sum() + 1)))
        learnt = self.concentration == "learnt"
        dtype = torch.float32 if X.dtype == np.float32 else torch.float64
        self._prior = GaussianMixturePrior(
            count,
            dim,
            torch.from_numpy(centers).to(dtype),
            inference="closed-form",
            map_prior="learnt" if learnt else "fixed",
            concentration=1.0 if learnt else float(self.concentration),
        )
        self._prior.precision_cholesky = torch.linalg.cholesky(precision).expand(count, -1, -1)
        with torch.no_grad():
            self._prior.logits.copy_(torch.from_numpy(mass + 1).log())
        if len(X) > STARTS * count:
            self._climb(torch.from_numpy(z).to(dtype), torch.from_numpy(share))

    def _climb(self, z: Tensor | Batches, weights: Tensor | None) -> list[float]:
        """Iterate over whitened points; return the objective before each iteration."""
        return self._prior.fit(
            z, weights=weights, max_iterations=int(self.max_iter), tolerance=self.tol
        )

    def _finish(self, clusters: Clusters, X: np.ndarray) -> DirichletMixture:
        """Set what users see of a mixture, and the labels of points."""
        self._clusters = clusters
        mixture, (offset, _, inverse, _) = clusters.components, self._whitening
        assert mixture.precision_cholesky is not None
        covariances = torch.cholesky_inverse(mixture.precision_cholesky.double()).numpy()
        self.weights_ = mixture.component_weights.numpy()
        self.means_ = (offset + mixture.centers.double().numpy() @ inverse).astype(X.dtype)
        self.covariances_ = inverse.T @ covariances @ inverse  # float32 may not hold them
        self.component_clusters_ = clusters.of_component.numpy()
        self.labels_ = self._each(X, lambda z: clusters.assign(z).labels)
        return self

    def _each(self, X: np.ndarray, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        """Return a function of whitened points [B, D] for all points [N, D], batch by batch."""
        found = []
        for start, z in self._whitened(X):
            with torch.no_grad(), _naming_rows(start):
                found.append(function(z))
        values: np.ndarray = torch.cat(found).numpy()
        return values

    def _whitened(self, X: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """Yield whitened points in batches, each with the row of its first point."""
        for number, z in enumerate(Batches(X, self._whitening)):
            yield number * BATCH, z

    def _of(self, X: Any, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        check_is_fitted(self)
        return self._each(self._points(X, reset=False), function)

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable cluster of each point [N], int64."""
        return self._of(X, lambda z: self._clusters.assign(z).labels)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each cluster [N, G], for each point."""
        return self._of(X, lambda z: self._clusters.probabilities(z))

    def predict_component(self, X: Any) -> np.ndarray:
        """Return the most probable component of each point [N], int64."""
        return self._of(X, lambda z: self._clusters.components.assign(z).labels)

    def predict_component_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each component [N, C], for each point."""
        return self._of(X, lambda z: self._clusters.components.responsibilities(z))

    def score_samples(self, X: Any) -> np.ndarray:
        """Return log p(x) of each point [N], in nats."""
        log_det = self._whitening.log_det
        return self._of(X, lambda z: self._clusters.components.log_prob(z) + log_det)

    def score(self, X: Any, y: Any = None) -> float:
        """Return the mean of log p(x) over points, in nats."""
        return float(self.score_samples(X).mean(dtype=np.float64))

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Draw points [n_samples, D] from the mixture; return them and their clusters."""
        check_is_fitted(self)
        check_integer("n_samples", n_samples)
        components = self._clusters.components
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(check_random_state(self.random_state).randint(2**31 - 1)))
            of = components.component_weights.multinomial(n_samples, replacement=True)
            z = components.sample(n_samples, of).numpy()
        x = self._whitening.offset + z @ self._whitening.inverse
        return x.astype(z.dtype), self._clusters.of_component[of].numpy()


@contextmanager
def _naming_rows(start: int) -> Iterator[None]:
    """Let errors about a row of a batch of whitened points name the row of X."""
    try:
        yield
    except ValueError as error:
        row = re.match(r"z must be .*, but row (\d+) ", str(error))
        if row is None:
            raise
        raise ValueError(
            "X must be near enough to the points of the fit for a density in its dtype, but row "
            f"{start + int(row[1])} is too far"
        ) from None
