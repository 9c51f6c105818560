"""The mixture as an estimator of scikit-learn."""

import pickle
import subprocess
import sys

import joblib
import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.utils.estimator_checks import estimator_checks_generator

import vmm_fast
from vmm_fast import DirichletMixture
from vmm_fast.inference.map_objective import LOG_WEIGHT_FLOOR


def blobs(n=600, dim=3, groups=4, distance=12.0, dtype=np.float64, seed=0):
    """Return points [n, dim] of separated Gaussians in odd units, and their groups [n]."""
    random = np.random.default_rng(seed)
    group = random.integers(groups, size=n)
    turns = np.linalg.qr(random.normal(size=(max(groups, dim), dim)))[0][:groups]
    x = distance * turns[group] + random.normal(size=(n, dim))
    return (x * [3.0, 0.01, 200.0][:dim] + 50).astype(dtype), group


def fitted(x, n_components=8, **options):
    return DirichletMixture(n_components, random_state=0, **options).fit(x)


def density(x, mixture):
    """Return log(pi_c N(x; m_c, S_c)) [N, C] from what users see of a fit."""
    each = zip(mixture.means_, mixture.covariances_, strict=True)
    log_densities = [multivariate_normal(m, s).logpdf(x) for m, s in each]
    return np.log(mixture.weights_) + np.stack(log_densities, 1)


@pytest.mark.parametrize(
    ("estimator", "check"), list(estimator_checks_generator(DirichletMixture(max_iter=500)))
)
def test_what_scikit_learn_checks(estimator, check):
    check(estimator)


def em_step(x, log_joint, mixture, concentration):
    """Return objective and maximisers (weights, means, covariances), of the formulas alone.

    The priors are those on whitened points, written in the units of x.
    """
    count, dim = mixture.means_.shape
    mean, scatter = x.mean(0), np.cov(x.T, bias=True)
    q = np.exp(log_joint - logsumexp(log_joint, 1, keepdims=True))
    mass, precision = q.sum(0), np.linalg.inv(mixture.covariances_)
    excess = np.maximum(mass + concentration / count - 1, 0)
    weights = excess / excess.sum()
    prior = np.linalg.inv(scatter)
    means, covariances = [], []
    for c in range(count):
        total = precision[c] @ (q[:, c] @ x) + prior @ mean
        means.append(np.linalg.solve(mass[c] * precision[c] + prior, total))
        d = x - means[c]
        inverse = (dim + 2) / count ** (2 / dim) * scatter
        covariances.append((inverse + (q[:, c, None] * d).T @ d) / (mass[c] + 1))
    return weights, np.array(means), np.array(covariances)


def test_an_iteration_is_that_of_the_formulas():
    """Compare a fit of one more iteration with the formulas, in the units of x."""
    x, _ = blobs(distance=2.0)
    options = {"n_components": 3, "concentration": 0.5, "tol": 1e-12}
    with pytest.warns(ConvergenceWarning, match="converged in"):
        before, after = (fitted(x, max_iter=n, **options) for n in (4, 5))
    expected = em_step(x, density(x, before), before, 0.5)
    found = after.weights_, after.means_, after.covariances_
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7)
    assert before.objective_ == after.objective_[:4]


def test_the_objective_never_falls():
    x, _ = blobs(distance=2.0)
    mixture = fitted(x, 20, tol=1e-9, max_iter=1000)
    gains = np.diff(mixture.objective_)
    assert mixture.converged_ and mixture.n_iter_ > 20
    assert gains.min() > -1e-12 and gains[0] > 1e-3


def test_a_fit_to_many_points_begins_with_some(monkeypatch):
    """It needs fewer passes over all points, and ends where a whole one does."""
    x, _ = blobs(6000, distance=4.0)
    quick = fitted(x, 4, tol=1e-6)
    monkeypatch.setattr("vmm_fast.estimators.STARTS", 6000)
    whole = fitted(x, 4, tol=1e-6)
    assert quick.n_iter_ < whole.n_iter_ and np.diff(quick.objective_).min() > -1e-12
    assert quick.score(x) == pytest.approx(whole.score(x), abs=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_clusters_of_separated_gaussians_are_found_among_more_components(dtype, init):
    x, group = blobs(dtype=dtype)
    mixture = fitted(x, 12, init=init)
    assert adjusted_rand_score(group, mixture.labels_) > 0.99
    assert mixture.labels_.max() == mixture.component_clusters_.max() == 3
    sizes = np.bincount(mixture.labels_)
    assert (np.diff(sizes) <= 0).all()
    np.testing.assert_array_equal(mixture.predict(x), mixture.labels_)
    probabilities = mixture.predict_proba(x)
    assert probabilities.shape == (600, 4) and probabilities.dtype == dtype
    np.testing.assert_array_equal(probabilities.argmax(1), mixture.labels_)
    components = mixture.predict_component(x)
    assert (mixture.component_clusters_[components] == mixture.labels_).mean() > 0.99
    assert mixture.tree_.cut(n_clusters=2).max() == 1
    assert fitted(x, 12, n_clusters=2).labels_.max() == 1


def test_densities_are_those_of_the_parameters_in_the_units_of_the_points():
    x, _ = blobs(distance=3.0)
    mixture = fitted(x, 5)
    expected = density(x, mixture)
    np.testing.assert_allclose(mixture.score_samples(x), logsumexp(expected, 1), rtol=1e-7)
    assert mixture.score(x) == pytest.approx(logsumexp(expected, 1).mean())
    q = np.exp(expected - logsumexp(expected, 1, keepdims=True))
    np.testing.assert_allclose(mixture.predict_component_proba(x), q, rtol=1e-6, atol=1e-12)
    # In other units the fit is the same one.
    other = fitted(1e4 * x - 3, 5)
    found = other.score_samples(1e4 * x - 3) + 3 * np.log(1e4)
    np.testing.assert_allclose(found, logsumexp(expected, 1), rtol=1e-6)
    np.testing.assert_array_equal(other.labels_, mixture.labels_)


def test_samples_are_of_their_clusters():
    x, _ = blobs()
    mixture = fitted(x)
    drawn, cluster = mixture.sample(4000)
    np.testing.assert_allclose(drawn.mean(0), x.mean(0), atol=0.1 * x.std(0).max(), rtol=0)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(x.T), rtol=0.2, atol=0.1 * x.std(0).max())
    assert (mixture.predict(drawn) == cluster).mean() > 0.99
    np.testing.assert_array_equal(mixture.sample(10)[0], mixture.sample(10)[0])


def test_weights_are_as_good_as_repeated_points():
    x, _ = blobs(distance=3.0)
    weights = np.random.default_rng(1).integers(0, 4, len(x))
    weighted = DirichletMixture(6, random_state=0).fit(x, sample_weight=weights)
    repeated = fitted(np.random.default_rng(2).permutation(x.repeat(weights, 0)), 6)
    np.testing.assert_allclose(weighted.objective_, repeated.objective_, rtol=1e-9)
    np.testing.assert_allclose(weighted.score_samples(x), repeated.score_samples(x), rtol=1e-6)
    np.testing.assert_array_equal(weighted.predict(x), repeated.predict(x))


@pytest.mark.parametrize("kind", ["torch", "bfloat16", "memory-mapped"])
def test_other_arrays_give_the_same_fit(kind, tmp_path):
    x, _ = blobs(dtype=np.float32)
    same = torch.from_numpy(x.copy())
    if kind == "bfloat16":
        same = same.bfloat16()
        x = same.float().numpy()
    elif kind == "memory-mapped":
        np.save(tmp_path / "x.npy", x)
        same = np.load(tmp_path / "x.npy", mmap_mode="r")
    one, other = fitted(x), fitted(same)
    np.testing.assert_array_equal(one.means_, other.means_)
    np.testing.assert_array_equal(one.score_samples(x), other.score_samples(same))


def test_a_saved_fit_is_the_same(tmp_path):
    x, _ = blobs()
    mixture = fitted(x)
    joblib.dump(mixture, tmp_path / "mixture.joblib")
    for same in (pickle.loads(pickle.dumps(mixture)), joblib.load(tmp_path / "mixture.joblib")):
        np.testing.assert_array_equal(same.score_samples(x), mixture.score_samples(x))
        np.testing.assert_array_equal(same.predict_proba(x), mixture.predict_proba(x))
        again = pickle.loads(pickle.dumps(mixture))
        further = (one.partial_fit(x[:100]).means_ for one in (same, again))
        np.testing.assert_array_equal(*further)


def test_batches_lead_to_the_clusters_of_a_whole_fit():
    x, group = blobs(4000)
    online = DirichletMixture(8, random_state=0)
    for _ in range(3):
        for part in np.split(x, 20):
            assert online.partial_fit(part) is online
    whole = fitted(x)
    assert adjusted_rand_score(group, online.predict(x)) > 0.99
    assert abs(online.score(x) - whole.score(x)) < 0.02
    # A fit goes on: what it knows weighs more than a small batch that is not typical.
    before = whole.score(x)
    whole.partial_fit(x[group == 0][:50])
    assert before - 0.1 < whole.score(x) < before


def test_parameters_that_a_mixture_began_with_must_stay():
    x, _ = blobs(60)
    for start in ("fit", "partial_fit"):
        mixture = getattr(DirichletMixture(3, random_state=0), start)(x)
        mixture.set_params(resolution=5, tol=1, random_state=None).partial_fit(x)
        for name, was, now in (("n_components", 3, 4), ("concentration", 1.0, "learnt")):
            message = f"{name} must be {was!r}, as when the mixture began, but is {now!r}"
            with pytest.raises(ValueError, match=message):
                mixture.set_params(**{name: now}).partial_fit(x)
            mixture.set_params(**{name: was})
        assert mixture.set_params(n_components=4).fit(x).partial_fit(x).means_.shape == (4, 3)


def test_components_follow_points_that_lie_elsewhere():
    x = np.random.default_rng(0).normal(size=(500, 2))
    mixture = DirichletMixture(20, random_state=0).partial_fit(x)
    for _ in range(10):
        mixture.partial_fit(x + 7)
    assert np.abs(mixture.weights_ @ mixture.means_ - 7).max() < 0.3
    assert set(mixture.predict(x)).isdisjoint(mixture.predict(x + 7))
    with pytest.warns(UserWarning, match=r"lies 2\d(\.\d)? of their standard dev"):
        mixture.partial_fit(x + 20)


@pytest.mark.slow("imports scikit-learn in a process of its own")
def test_memory_does_not_grow_with_points_times_components():
    """A fit of 40,000 x 200 responsibilities, 64 MB in float64, in less."""
    code = """
import resource, numpy as np
from vmm_fast import DirichletMixture
x = np.random.default_rng(0).normal(size=(40_000, 2)).astype(np.float32)
fit = lambda x: DirichletMixture(200, max_iter=2, tol=1e9, random_state=0).fit(x)
fit(x[:16_384])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fit(x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) * 1024 < 40e6


def test_constant_and_dependent_columns_and_equal_points():
    x, group = blobs()
    wide = np.column_stack([x, np.full(len(x), 7.1), x[:, 0] + x[:, 1]])
    mixture = fitted(wide, 12)
    assert adjusted_rand_score(group, mixture.labels_) > 0.99
    assert np.isfinite(mixture.score_samples(wide)).all()
    same = fitted(np.full((20, 2), 3.0), 3)
    assert not same.labels_.any() and same.converged_ and len(same.weights_) == 1


@pytest.mark.parametrize(
    ("options", "x", "message"),
    [
        ({}, [[0.0, np.nan]] * 30, "contains NaN"),
        ({}, [[0.0, np.inf]] * 30, "contains infinity"),
        ({}, [[1.0, 2.0]], "1 sample"),
        ({}, [[1e200, 2.0], [-1e200, 3.0]] * 20, "X must have variances that are finite"),
        ({"n_components": 31}, None, "n_components must be at most 30, .* but is 31"),
        ({"n_components": 0}, None, "n_components must be an integer of at least 1, but is 0"),
        ({"concentration": 0.0}, None, "concentration must be a finite number above 0"),
        ({"concentration": "none"}, None, "concentration must be one of 'learnt', but is 'none'"),
        ({"init": "kmeans"}, None, "init must be one of 'k-means\\+\\+', 'random', but is"),
        ({"tol": -1.0}, None, "tol must be a finite number above 0, but is -1.0"),
        ({"max_iter": 1.5}, None, "max_iter must be an integer of at least 1, but is 1.5"),
        ({"resolution": -1.0}, None, "resolution must be at least 0"),
        ({"n_clusters": 0}, None, "n_clusters must be an integer of at least 1, but is 0"),
        ({"n_clusters": 2, "separation": 0.5}, None, "n_clusters must be given without"),
    ],
)
def test_bad_input_is_named(options, x, message):
    x = np.random.default_rng(0).normal(size=(30, 2)) if x is None else x
    with pytest.raises(ValueError, match=message):
        DirichletMixture(**options).fit(x)


def test_bad_weights_and_points_after_a_fit_are_named():
    x, _ = blobs(60)
    for weights, message in (
        (-1, "sample_weight must be at least 0, but is -1.0"),
        (0, "non-zero|above 0 for some point"),
        (1e300, r"sample_weight must sum to at most 9.01e\+15, .* sums to 6e\+301: divide it"),
        (1e308, "sums to inf"),
    ):
        with pytest.raises(ValueError, match=message):
            DirichletMixture(3).fit(x, sample_weight=np.full(60, weights))
    with pytest.raises(ValueError, match="at most 59, the number of points of a weight above 0"):
        DirichletMixture(60).fit(x, sample_weight=np.arange(60))
    mixture = fitted(x, 3)
    with pytest.raises(ValueError, match="X has 2 features, but DirichletMixture is expecting 3"):
        mixture.predict(x[:, :2])
    with pytest.raises(ValueError, match="n_samples must be an integer of at least 1, but is 0"):
        mixture.sample(0)


def test_a_point_of_weight_0_is_not_there():
    x, _ = blobs()
    more = np.vstack([x, np.full((1, 3), 1e15)])
    alone, beside = (
        DirichletMixture(4, random_state=0).fit(points, sample_weight=weights)
        for points, weights in ((x, np.ones(len(x))), (more, np.append(np.ones(len(x)), 0)))
    )
    np.testing.assert_array_equal(beside.means_, alone.means_)
    np.testing.assert_array_equal(beside.labels_[:-1], alone.labels_)


def test_a_failed_fit_changes_nothing(monkeypatch):
    x, _ = blobs()
    mixture, fresh = fitted(x, 3), DirichletMixture(3, random_state=0)
    before = {**vars(mixture)}
    densities = mixture.score_samples(x)
    far = np.vstack([x[:40], np.full((1, 3), 1e200)])

    def fails(clusters, z):
        raise RuntimeError("too late")

    with monkeypatch.context() as patch:
        patch.setattr("vmm_fast.estimators.Clusters.assign", fails)
        for estimator in (mixture, fresh):
            for method in (estimator.fit, estimator.partial_fit):
                with pytest.raises(RuntimeError, match="too late"):
                    method(x[:100, :2] if method.__name__ == "fit" else x[:100])
    with pytest.raises(ValueError, match=r"X must be near enough .* but row 40 is too far"):
        mixture.partial_fit(far)
    assert vars(mixture).keys() == before.keys()
    assert all(value is before[name] for name, value in vars(mixture).items())
    np.testing.assert_array_equal(mixture.score_samples(x), densities)
    assert vars(fresh) == vars(DirichletMixture(3, random_state=0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_point_that_is_too_far_is_named_by_its_row(dtype, monkeypatch):
    x, _ = blobs(60, dtype=dtype)
    mixture = fitted(x, 3)
    for module in ("estimators", "_whitening"):
        monkeypatch.setattr(f"vmm_fast.{module}.BATCH", 25)
    x[43] = np.finfo(dtype).max / 4
    for method in (mixture.predict, mixture.predict_proba, mixture.score_samples):
        with pytest.raises(ValueError, match=r"^X must be near enough .* but row 43 is too far$"):
            method(x)


def test_what_fit_alone_knows_is_gone_after_partial_fit():
    x, _ = blobs()
    names = {"objective_", "converged_"}
    online, mixture = DirichletMixture(4).partial_fit(x), fitted(x, 4)
    assert vars(mixture).keys() - vars(online) == names
    assert vars(mixture.partial_fit(x)).keys() == vars(online).keys()


def test_a_learnt_concentration_follows_the_weights():
    x, _ = blobs()
    few, many = fitted(x, 4, concentration="learnt"), fitted(x, 40, concentration="learnt")
    assert few._prior.concentration > many._prior.concentration
    assert np.log(many.weights_).min() >= LOG_WEIGHT_FLOOR - 1e-3


def test_the_package_is_imported_without_scikit_learn(monkeypatch):
    code = "import sys, vmm_fast; print('sklearn' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"
    with pytest.raises(AttributeError, match="has no attribute 'Mixture'"):
        vmm_fast.Mixture  # noqa: B018
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "vmm_fast.estimators")
    with pytest.raises(ImportError, match="needs scikit-learn >= 1"):
        vmm_fast.DirichletMixture  # noqa: B018
