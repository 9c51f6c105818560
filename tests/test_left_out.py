"""Shares of points that were left out are those of a fit without them."""

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from vmm_fast import Components
from vmm_fast.clusters import Confusion, left_out

POINTS, DIM, COUNT = 40, 3, 2


def fitted(shares, z, degrees=1.0):
    """Return the components of an M-step with a prior of the precision's scale, and their mass."""
    own = shares.sum(0)
    centers = (shares.T @ z) / own[:, None]
    d = z[:, None] - centers
    scatter = torch.eye(DIM) + torch.einsum("ic,ica,icb->cab", shares, d, d)
    precision = (own + degrees)[:, None, None] * scatter.inverse()
    return Components(centers, (own / own.sum()).log(), torch.linalg.cholesky(precision)), own


@pytest.fixture
def problem():
    torch.manual_seed(0)
    z = torch.randn(POINTS, DIM, dtype=torch.float64)
    shares = torch.randn(POINTS, COUNT, dtype=torch.float64).softmax(1)
    return z, shares


def test_densities_are_those_of_a_fit_without_the_point(problem):
    z, shares = problem
    components, own = fitted(shares, z)
    joint = components.log_joint(z)
    found = left_out._log_joint_without(components, joint, shares, own, 1.0)
    for i in range(POINTS):
        others = torch.arange(POINTS) != i
        without, rest = fitted(shares[others], z[others])
        precision = without.precision_cholesky @ without.precision_cholesky.mT
        each = MultivariateNormal(without.centers, precision_matrix=precision)
        expected = (rest / own.sum()).log() + each.log_prob(z[i])
        torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=1e-9)


def test_sums_are_over_all_points_and_weights_repeat_them(problem):
    z, shares = problem
    components, _ = fitted(shares, z)
    repeats = torch.arange(POINTS) % 3
    parts = list(z.split(16))
    weighted = left_out.confusion_left_out(components, parts, repeats.double(), 1.0)
    repeated = left_out.confusion_left_out(
        components, list(z.repeat_interleave(repeats, 0).split(7)), None, 1.0
    )
    torch.testing.assert_close(weighted.sums, repeated.sums)
    assert torch.equal(weighted.counts, repeated.counts.double())
    assert not torch.allclose(
        weighted.sums, Confusion.of(components, parts, repeats.double()).sums, rtol=0.05
    )


def test_a_component_of_one_point_shares_it_with_where_it_would_go():
    z = torch.cat([torch.linspace(-1, 1, 30), torch.tensor([9.0])]).double()[:, None]
    shares = torch.zeros(31, 3).double()
    shares[:15, 0] = shares[15:30, 1] = shares[30, 2] = 1
    own = shares.sum(0)
    centers = (shares.T @ z) / own[:, None]
    components = Components(
        centers, (own / 31).log(), torch.tensor([4.0, 4.0, 50.0]).double()[:, None, None]
    )
    found = left_out.confusion_left_out(components, [z], None, 1.0)
    assert found.counts.tolist() == [15, 15, 1]
    assert torch.equal(found.sums, found.sums.mT)
    assert found.sums[2].argmax() == 1  # the nearer one
    assert found.sums.isfinite().all() and (found.sums >= 0).all()


@pytest.mark.parametrize(("dim", "components"), [(10, 50), (20, 20), (20, 50), (50, 20)])
def test_one_gaussian_is_one_cluster_however_many_components_divide_it(dim, components):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from vmm_fast import DirichletMixture

    x = np.random.default_rng(0).normal(size=(2_000, dim)).astype(np.float32)
    mixture = DirichletMixture(components, random_state=0).fit(x)
    held = np.bincount(mixture.predict_component(x), minlength=components)
    assert (held > 50).sum() >= 5 and set(mixture.labels_) == {0}
    # As they were fitted, components seem to hold their points.
    own = Confusion.of_shares(torch.from_numpy(mixture.predict_component_proba(x)), None).sums
    assert dim == 10 or float(own.trace() / own.sum()) > 0.75


def test_a_lone_far_point_is_a_cluster_if_so_many_are_asked_for():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from vmm_fast import DirichletMixture

    x = np.concatenate([np.random.default_rng(0).normal(size=(60, 2)), [[50.0, 50.0]]])
    assert np.bincount(DirichletMixture(2, n_clusters=2, random_state=0).fit(x).labels_)[1] == 1


def test_new_points_of_a_stream_are_not_learnt_from_before_they_are_looked_at():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from vmm_fast import DirichletMixture

    random = np.random.default_rng(0)
    stream = DirichletMixture(20, random_state=0)
    for _ in range(3):
        stream.partial_fit(random.normal(size=(2_000, 50)))
        assert set(stream.labels_) == {0}
