"""Scores of a clustering and of a latent-variable model.

Clusterings: accuracy, normalised mutual information (NMI), adjusted Rand index (ARI) and adjusted
mutual information (AMI), from hard assignments alone, so that no [N, C] matrix is needed.

Models, in nats, with N data points, posteriors q(z|x_n) and prior p(z):

- ELBO surgery (Hoffman & Johnson, "ELBO surgery", NIPS workshop 2016). With the aggregated
  posterior q(z) = 1/N sum_n q(z|x_n),

      1/N sum_n KL(q(z|x_n) || p(z))  =  I_q(n; z)  +  KL(q(z) || p(z)),    I_q(n; z) <= log N

- the importance-weighted bound (Burda, Grosse & Salakhutdinov, ICLR 2016, equation 8),

      log p(x) >= E[log 1/S sum_s p(x|z_s) p(z_s) / q(z_s|x)],    z_s ~ q(z|x)

Both are evaluated in pieces: memory grows with N (the posteriors' parameters), never with M N or
with S.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from vmm_fast.mixture import gaussian_parameters, scale_times
from vmm_fast.ops import mixture_log_prob

__all__ = [
    "ClusteringScores",
    "ELBOSurgery",
    "clustering_scores",
    "clustering_scores_from_assignment",
    "elbo_surgery",
    "importance_weighted_log_likelihood",
    "importance_weighted_log_prob",
]

ACTIVE_SHARE = 0.002  # a component that holds more than this share of the points counts as active


@dataclass(frozen=True)
class ClusteringScores:
    """How well hard assignments agree with true labels.

    Attributes
    ----------
    accuracy : float
        Each cluster takes the true label of its most probable point, the point i with the largest
        responsibility r_ic: the rule of Stirn & Knowles (arXiv 2402.04412). NaN where those points
        are not given.
    accuracy_majority : float
        Each cluster takes the label most frequent among its points (the "purity").
    accuracy_one_to_one : float
        Each cluster takes a label of its own, the best way (Kuhn 1955, the Hungarian method);
        clusters beyond the number of labels count as wrong. Many pure clusters do not raise it.
    nmi : float
        Normalised mutual information, arithmetic mean (scikit-learn).
    ari : float
        Adjusted Rand index (Hubert & Arabie 1985), scikit-learn's ``adjusted_rand_score``.
    ami : float
        Adjusted mutual information, scikit-learn's ``adjusted_mutual_info_score``. This is what
        Stirn & Knowles report under the name ARI.
    nmi_merged, ari_merged : float
        After merging the clusters that share a majority label. Uses the true labels, so it is an
        upper bound on what merging could reach, not a score of the model.
    components_used : int
        Components that hold at least one point.
    components_active : int
        Components that hold more than 0.2 % of the points.
    """

    accuracy: float
    accuracy_majority: float
    accuracy_one_to_one: float
    nmi: float
    ari: float
    ami: float
    nmi_merged: float
    ari_merged: float
    components_used: int
    components_active: int

    def as_dict(self) -> dict[str, float | int]:
        """Return the scores as a plain dictionary, in the order of the fields."""
        return asdict(self)


def clustering_scores(responsibilities: Any, true_labels: Any) -> ClusteringScores:
    """Score responsibilities against true labels.

    Parameters
    ----------
    responsibilities : Tensor or array [N, C], any floating dtype
        Probability of component c for point i; rows sum to 1. Each point is assigned to its most
        probable component, the first of equals.
    true_labels : Tensor, array or sequence [N]
        True labels of any sortable kind: integers, strings, booleans.

    Returns
    -------
    ClusteringScores

    Raises
    ------
    ValueError
        If the shapes do not fit, there is no point, or rows are not probabilities.
    ImportError
        If scikit-learn is not installed (``pip install vmm-fast[cli]``).
    """
    if isinstance(responsibilities, Tensor):
        responsibilities = responsibilities.detach().cpu()
        if responsibilities.dtype in (torch.bfloat16, torch.float16):
            responsibilities = responsibilities.float()  # numpy has no bfloat16
    r = np.asarray(responsibilities)
    if r.ndim != 2 or r.shape[1] == 0:
        raise ValueError(f"responsibilities must have shape [N, C] with C >= 1, but has {r.shape}")
    if r.shape[0] == 0:
        raise ValueError("responsibilities must hold at least one point, but have N = 0")
    # The tolerance allows for bfloat16; the check is to catch log-probabilities and NaN.
    if not (np.all(r >= 0) and np.all(np.abs(r.sum(1) - 1) < 0.05)):
        raise ValueError("responsibilities must be probabilities: rows >= 0 that sum to 1, no NaN")
    return clustering_scores_from_assignment(r.argmax(1), true_labels, r.argmax(0))


def clustering_scores_from_assignment(
    labels: Any, true_labels: Any, representative: Any = None
) -> ClusteringScores:
    """Score hard assignments against true labels, with memory O(N + C).

    Parameters
    ----------
    labels : Tensor, array or sequence [N]
        The component of each point. Integers in [0, C) if `representative` is given; otherwise of
        any sortable kind, so that clusters of other methods can be scored.
    true_labels : Tensor, array or sequence [N]
        True labels of any sortable kind: integers, strings, booleans.
    representative : Tensor, array or sequence [C] of integers, optional
        Index of each component's most probable point, argmax_i r_ic, or -1 for none (only for a
        component that holds no point). Without it `accuracy` is NaN.

    Returns
    -------
    ClusteringScores
        If several majority labels are equally frequent, the first in sorted order counts. If both
        sides put all points into one cluster, NMI, ARI and AMI are 1 (scikit-learn's convention).

    Raises
    ------
    ValueError
        If lengths differ, there is no point, labels are NaN or not sortable, or `representative`
        does not fit.
    ImportError
        If scikit-learn is not installed (``pip install vmm-fast[cli]``).

    Examples
    --------
    >>> scores = clustering_scores_from_assignment([0, 0, 1, 1, 2], ["a", "a", "b", "b", "b"])
    >>> scores.accuracy_majority, scores.accuracy_one_to_one
    (1.0, 0.8)
    """
    clusters, cluster_of, sizes = _codes(labels, "labels")
    classes, class_of, _ = _codes(true_labels, "true_labels")
    n = len(cluster_of)
    if len(class_of) != n:
        raise ValueError(
            f"true_labels must have as many points as labels, but has {len(class_of)}, not {n}"
        )

    contingency = np.bincount(
        cluster_of * len(classes) + class_of, minlength=len(clusters) * len(classes)
    ).reshape(len(clusters), len(classes))
    merged = contingency.argmax(1)[cluster_of]
    if representative is None:
        accuracy = math.nan
    else:
        points = _representatives(representative, clusters, n)
        accuracy = float(np.mean(class_of[points][cluster_of] == class_of))

    nmi, ari = agreement(cluster_of, class_of)
    nmi_merged, ari_merged = agreement(merged, class_of)
    ami = _sklearn("adjusted_mutual_info_score", cluster_of, class_of)
    from scipy.optimize import linear_sum_assignment  # installed with scikit-learn

    return ClusteringScores(
        accuracy=accuracy,
        accuracy_majority=float(contingency.max(1).sum() / n),
        accuracy_one_to_one=float(
            contingency[linear_sum_assignment(contingency, maximize=True)].sum() / n
        ),
        nmi=nmi,
        ari=ari,
        ami=ami,
        nmi_merged=nmi_merged,
        ari_merged=ari_merged,
        components_used=len(clusters),
        components_active=int((sizes > ACTIVE_SHARE * n).sum()),
    )


def agreement(labels: Any, true_labels: Any) -> tuple[float, float]:
    """Return the NMI and ARI of an assignment [N] with another, of any integers."""
    pair = labels, true_labels
    return _sklearn("normalized_mutual_info_score", *pair), _sklearn("adjusted_rand_score", *pair)


def _sklearn(score: str, labels: Any, true_labels: Any) -> float:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ImportError(
            "clustering scores need scikit-learn: pip install vmm-fast[cli]"
        ) from error
    with warnings.catch_warnings():
        # If most labels differ, as in small data, scikit-learn warns of a regression target.
        warnings.filterwarnings("ignore", message="The number of unique classes is greater")
        return float(getattr(metrics, score)(true_labels, labels))


def _as_numpy(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    return np.asarray(values)


def _codes(values: Any, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the sorted distinct values, each point's index among them, and their counts."""
    array = _as_numpy(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape [N], but has {array.shape}")
    if len(array) == 0:
        raise ValueError(f"{name} must hold at least one point, but has N = 0")
    try:
        unique, codes, counts = np.unique(array, return_inverse=True, return_counts=True)
    except TypeError as error:
        raise ValueError(
            f"{name} must be of one sortable kind with none missing, but is a mixture ({error})"
        ) from error
    if np.any(unique != unique):  # NaN and NaT, in float, datetime and object arrays alike
        raise ValueError(f"{name} must not hold NaN")
    return unique, codes, counts


def _representatives(representative: Any, clusters: np.ndarray, n: int) -> np.ndarray:
    """Return the representative point of each cluster that holds points, after checking it."""
    points = _as_numpy(representative)
    if points.ndim != 1 or points.dtype.kind not in "iu":
        raise ValueError(
            f"representative must be integers of shape [C], but is {points.dtype} {points.shape}"
        )
    if np.any(points < -1) or np.any(points >= n):
        raise ValueError(f"representative must be -1 or an index below N = {n}, but is {points}")
    if clusters.dtype.kind not in "iu" or clusters[0] < 0 or clusters[-1] >= len(points):
        raise ValueError(
            f"labels must be integers in [0, C) with C = {len(points)} given by representative, "
            f"but are {clusters.dtype} from {clusters[0]} to {clusters[-1]}"
        )
    chosen: np.ndarray = points[clusters]
    if np.any(chosen < 0):
        raise ValueError(
            "representative must name a point for each component that holds points, but is -1 "
            f"for component {clusters[chosen < 0][0]}"
        )
    return chosen


class ELBOSurgery(NamedTuple):
    """The parts of the average KL divergence, in nats.

    Attributes
    ----------
    average_kl : float
        1/N sum_n KL(q(z|x_n) || p(z)) = mutual_information + marginal_kl.
    mutual_information : float
        I_q(n; z): how much z tells of the point that it came from. At most log_num_data.
    marginal_kl : float
        KL(q(z) || p(z)): how far the aggregated posterior is from the prior.
    log_num_data : float
        log N.
    """

    average_kl: float
    mutual_information: float
    marginal_kl: float
    log_num_data: float


@torch.no_grad()
def elbo_surgery(
    q_batches: Iterable[Distribution],
    prior: Any,
    *,
    num_samples: int = 4096,
    chunk: int = 1024,
    generator: torch.Generator | None = None,
) -> ELBOSurgery:
    """Return the average KL divergence, split into mutual information and marginal KL.

    With M of the N points drawn without replacement, one z_i ~ q(z|x_i) for each, and q(z) the
    mixture of all N posteriors (so the point's own is included),

        average_kl         = 1/M sum_i log q(z_i|x_i) - log p(z_i)
        mutual_information = 1/M sum_i log q(z_i|x_i) - log q(z_i)    each term at most log N
        marginal_kl        = 1/M sum_i log q(z_i) - log p(z_i)

    Each is unbiased for the empirical q(z) of these N points, for which log q(z_i) is exact:
    nothing but the choice of i and z_i is random. Their standard error falls as 1/sqrt(M). The
    three share their samples, so the identity holds exactly, not just in expectation; by chance the
    marginal KL can come out slightly negative. About the population rather than these N points, the
    mutual information is biased low: it cannot exceed log N.

    The M N densities are streamed in blocks of `chunk` x `chunk`. Memory is O(N D^2) (O(N D) for
    diagonal posteriors) for the posteriors' parameters, and O(chunk D^2) besides.

    Parameters
    ----------
    q_batches : iterable of torch.distributions.Distribution
        Posteriors of the data, in batches: Normal [n, D], with or without Independent, or
        MultivariateNormal with batch shape [n]; all of one kind. Read once. For a model:
        ``(model.encode(x) for x in batches)``.
    prior : object with ``log_prob`` or callable
        z [m, D] -> log p(z) [m], such as ``prior.components(encoder)`` or a torch distribution.
    num_samples : int, default 4096
        M; all N points are used if there are fewer.
    chunk : int, default 1024
        Sample points, and posteriors, in one block.
    generator : torch.Generator, optional
        Source of the randomness, on the device of the posteriors.

    Returns
    -------
    ELBOSurgery
        Four floats, in nats.

    Raises
    ------
    TypeError
        If a posterior is of another kind, or the kinds are mixed.
    ValueError
        If there is no posterior, shapes do not fit, parameters are not finite, or a number is not
        positive.

    Notes
    -----
    Hoffman & Johnson, "ELBO surgery: yet another way to carve up the variational evidence lower
    bound", NIPS 2016 workshop on advances in approximate Bayesian inference.
    """
    _check_positive(num_samples, "num_samples")
    _check_positive(chunk, "chunk")
    log_prior = getattr(prior, "log_prob", prior)
    loc, scale = _stack_posteriors(q_batches)
    n, dim = loc.shape
    log_n = math.log(n)

    device = loc.device
    chosen = torch.randperm(n, generator=generator, device=device)[:num_samples]
    z = torch.empty(len(chosen), dim, dtype=loc.dtype, device=device)
    log_q_own = torch.empty(len(chosen), dtype=torch.float64, device=device)
    log_p = torch.empty_like(log_q_own)
    for block, index in zip(z.split(chunk), chosen.split(chunk), strict=True):
        noise = torch.randn(block.shape, generator=generator, dtype=z.dtype, device=device)
        block.copy_(loc[index] + scale_times(scale[index], noise))
    for start in range(0, len(chosen), chunk):
        part = slice(start, start + chunk)
        index = chosen[part]
        # From z, not from the noise: z is rounded, and log q(z_i) below uses the rounded z too.
        white = _solve(scale[index], z[part] - loc[index])
        log_q_own[part] = _log_normalizer(scale[index]) - 0.5 * white.double().square().sum(-1)
        log_p[part] = _checked(log_prior(z[part]), z[part].shape[:-1], "prior")

    log_q = torch.full_like(log_q_own, -math.inf)
    for loc_block, scale_block in zip(loc.split(chunk), scale.split(chunk), strict=True):
        whitening = _inverse(scale_block)
        offsets = (_log_normalizer(scale_block) - log_n).to(loc.dtype)
        for start in range(0, len(chosen), chunk):
            part = slice(start, start + chunk)
            lse = mixture_log_prob(z[part], loc_block, whitening, offsets)[0]
            log_q[part] = torch.logaddexp(log_q[part], lse.double())

    information = (log_q_own - log_q).mean().item()
    marginal = (log_q - log_p).mean().item()
    return ELBOSurgery(information + marginal, information, marginal, log_n)


def _check_positive(value: int, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, but is {value!r}")


def _checked(values: Tensor, shape: torch.Size, name: str) -> Tensor:
    if values.shape != shape:
        raise ValueError(
            f"{name} must return shape {list(shape)}, but returned {list(values.shape)}"
        )
    if values.isnan().any():
        raise ValueError(f"{name} must return log-densities, but returned NaN")
    return values.double()


def _stack_posteriors(q_batches: Iterable[Distribution]) -> tuple[Tensor, Tensor]:
    """Return means [N, D] and standard deviations [N, D] or Cholesky factors [N, D, D]."""
    if isinstance(q_batches, Distribution):
        raise TypeError(
            "q_batches must be an iterable of posteriors, but is one: wrap it in a list"
        )
    locs: list[Tensor] = []
    scales: list[Tensor] = []
    for q in q_batches:
        try:
            loc, scale = gaussian_parameters(q)
        except (TypeError, ValueError) as error:
            raise type(error)(f"q_batches: {error}") from None
        if locs and loc.shape[1] != locs[0].shape[1]:
            raise ValueError(
                "q_batches must hold posteriors with means of one shape [n, D], but has "
                f"{list(loc.shape)} after {list(locs[0].shape)}"
            )
        if scales and scale.ndim != scales[0].ndim:
            raise TypeError("q_batches must be all Normal or all MultivariateNormal, but are both")
        locs.append(loc)
        scales.append(scale)
    if not locs or not sum(map(len, locs)):
        raise ValueError("q_batches must hold at least one posterior, but has none")
    loc, scale = torch.cat(locs), torch.cat(scales)
    if not (torch.isfinite(loc).all() and torch.isfinite(scale).all()):
        raise ValueError("q_batches must have finite means and scales, but has NaN or infinity")
    return loc, scale


def _solve(scale: Tensor, difference: Tensor) -> Tensor:
    if scale.ndim == 2:
        return difference / scale
    columns: Tensor = torch.linalg.solve_triangular(scale, difference[..., None], upper=False)
    return columns.squeeze(-1)


def _inverse(scale: Tensor) -> Tensor:
    """Return the whitening matrices [n, D, D]: the inverse Cholesky factor of each covariance."""
    if scale.ndim == 2:
        return torch.diag_embed(scale.reciprocal())
    identity = torch.eye(scale.shape[-1], dtype=scale.dtype, device=scale.device)
    whitening: Tensor = torch.linalg.solve_triangular(scale, identity.expand_as(scale), upper=False)
    return whitening


def _log_normalizer(scale: Tensor) -> Tensor:
    """Return the log density at the mean [n] in float64: -D/2 log 2 pi - logdet(scale)."""
    diagonal = scale if scale.ndim == 2 else scale.diagonal(dim1=-2, dim2=-1)
    return -diagonal.double().log().sum(-1) - 0.5 * diagonal.shape[-1] * math.log(2 * math.pi)


@torch.no_grad()
def importance_weighted_log_likelihood(
    log_likelihood_fn: Callable[[Tensor], Tensor],
    q: Distribution,
    log_prior_fn: Callable[[Tensor], Tensor],
    num_samples: int,
    chunk: int = 64,
) -> Tensor:
    """Return an estimate of log p(x) from below, with samples of the posterior.

        log 1/S sum_s p(x|z_s) p(z_s) / q(z_s|x),    z_s ~ q(z|x)

    The expectation grows with S and tends to log p(x); S = 1 gives the ELBO. Samples are streamed
    through an online log-sum-exp in float64: memory is O(B chunk D) whatever S is, besides what the
    two functions need for that many points. The randomness is torch's own: ``torch.manual_seed``
    repeats it.

    Parameters
    ----------
    log_likelihood_fn : callable
        z [s, B, D] -> log p(x|z) [s, B], nats; z[:, b] are samples for point b.
    q : torch.distributions.Distribution
        Posterior of B points: Normal [B, D], with or without Independent, or any distribution with
        batch shape [B] and event shape [D].
    log_prior_fn : callable
        z [s, B, D] -> log p(z) [s, B], nats.
    num_samples : int
        S.
    chunk : int, default 64
        Samples of each point that are evaluated at once.

    Returns
    -------
    Tensor [B] float64
        Nats.

    Raises
    ------
    ValueError
        If a number is not positive, or `q` or what a function returns has another shape.

    Notes
    -----
    Burda, Grosse & Salakhutdinov, "Importance weighted autoencoders", ICLR 2016, equation 8.
    """
    _check_positive(num_samples, "num_samples")
    _check_positive(chunk, "chunk")
    if len(q.batch_shape) == 2 and not q.event_shape:
        q = Independent(q, 1, validate_args=False)
    if len(q.batch_shape) != 1 or len(q.event_shape) != 1:
        raise ValueError(
            "q must have batch shape [B] and event shape [D], but has "
            f"{list(q.batch_shape)} and {list(q.event_shape)}"
        )
    total = None
    for start in range(0, num_samples, chunk):
        z = q.sample(torch.Size([min(chunk, num_samples - start)]))
        shape = z.shape[:-1]
        log_weight = (
            _checked(log_likelihood_fn(z), shape, "log_likelihood_fn")
            + _checked(log_prior_fn(z), shape, "log_prior_fn")
            - q.log_prob(z).double()
        )
        part = log_weight.logsumexp(0)
        total = part if total is None else torch.logaddexp(total, part)
    assert total is not None  # num_samples >= 1
    return total - math.log(num_samples)


@torch.no_grad()
def importance_weighted_log_prob(
    model: Any, x: Tensor, *, num_samples: int = 512, chunk: int = 16, batch_size: int = 256
) -> Tensor:
    """Return an estimate of log p(x) under a VAE from below.

    See :func:`importance_weighted_log_likelihood`. The model is in evaluation mode during the call
    and returns to its own mode. The prior's mixture is built once. Memory is that of the decoder on
    batch_size x chunk points, whatever N and S are.

    Parameters
    ----------
    model : vmm_fast.models.VAE
        Anything with ``encode(x)``, ``log_likelihood(x, z)`` and ``prior.components(encode)``.
    x : Tensor [N, ...]
        Data, as the model takes it.
    num_samples : int, default 512
        S, samples for each point.
    chunk : int, default 16
        Samples of each point that are evaluated at once.
    batch_size : int, default 256
        Points that are evaluated at once.

    Returns
    -------
    Tensor [N] float64
        Nats.

    Raises
    ------
    ValueError
        If a number is not positive, or the model returns other shapes.
    """
    _check_positive(batch_size, "batch_size")
    if len(x) == 0:
        return torch.zeros(0, dtype=torch.float64, device=x.device)
    with _evaluating(model):
        components = model.prior.components(model.encode)

        def log_prior(z: Tensor) -> Tensor:
            found: Tensor = components.log_prob(z.flatten(0, 1))
            return found.reshape(z.shape[:-1])

        def log_likelihood_of(batch: Tensor) -> Callable[[Tensor], Tensor]:
            def log_likelihood(z: Tensor) -> Tensor:
                repeated = batch.expand(len(z), *batch.shape).flatten(0, 1)
                found: Tensor = model.log_likelihood(repeated, z.flatten(0, 1))
                return found.reshape(z.shape[:-1])

            return log_likelihood

        return torch.cat(
            [
                importance_weighted_log_likelihood(
                    log_likelihood_of(batch), model.encode(batch), log_prior, num_samples, chunk
                )
                for batch in x.split(batch_size)
            ]
        )


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode for a ``with`` block, then restore each one's mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
