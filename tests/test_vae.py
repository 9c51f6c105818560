"""The VAE: likelihoods, posteriors and shapes, against torch.distributions and autograd."""

import copy
import math
import pickle

import pytest
import torch
from torch.distributions import Bernoulli, Independent, MultivariateNormal, Normal

from vmm_fast.models import VAE, RandomShifts
from vmm_fast.models.vae import POSTERIOR_FLOOR, SIGMA_FLOOR
from vmm_fast.priors import VMMPrior


def make(input_shape=7, latent_dim=3, **arguments):
    torch.manual_seed(1)
    return VAE(input_shape, latent_dim, hidden=(8, 6), **arguments).double()


def data(n, shape=(7,), seed=2):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize(
    ("input_shape", "shape", "posterior", "likelihood", "dtype"),
    [
        (7, (7,), "full", "gaussian", torch.float64),
        (7, (7,), "diagonal", "bernoulli", torch.float32),
        ((3, 4), (3, 4), "full", "bernoulli", torch.float64),
        ((3, 4), (3, 4), "diagonal", "gaussian", torch.float64),
        ((2, 3, 4), (2, 3, 4), "full", "gaussian", torch.float32),
        ((2, 3, 4), (2, 3, 4), "diagonal", "bernoulli", torch.float64),
    ],
)
def test_shapes_and_dtypes(input_shape, shape, posterior, likelihood, dtype):
    model = make(input_shape, posterior=posterior, likelihood=likelihood).to(dtype)
    x = data(5, shape).to(dtype)
    q = model.encode(x)
    assert isinstance(q, MultivariateNormal if posterior == "full" else Independent)
    assert (q.batch_shape, q.event_shape) == ((5,), (3,))
    terms = model(x)
    assert [term.shape for term in (*terms[:3], terms.z)] == [(5,), (5,), (5,), (5, 3)]
    torch.testing.assert_close(terms.elbo, terms.log_likelihood - terms.kl)
    decoded = model.decode(terms.z)
    assert decoded.shape == (5, *shape)
    assert model.sample(4).shape == (4, *shape)
    assert {t.dtype for t in (*terms[:3], terms.z, decoded)} == {dtype}
    if likelihood == "bernoulli":
        assert 0 < decoded.min() <= decoded.max() < 1
        assert model.scale is None
    else:
        assert model.scale.dtype == dtype


@pytest.mark.parametrize(
    "shape",
    [(36,), (6, 9), (1, 5, 7), (3, 8, 8), (8, 7, 3), (4, 4, 4), (5, 4, 4), (2, 6, 5), (6, 7, 2)],
)
def test_convolutions_take_pictures_of_any_size_and_order(shape):
    torch.manual_seed(0)
    model = VAE(shape, 3, hidden=(8,), channels=(4, 6)).double()
    x = data(5, shape)
    terms = model(x)
    terms.elbo.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.decode(terms.z).shape == x.shape
    # The first convolution sees neighbours, wherever the colours are.
    pictures = {1: x[:, None], 2: x[:, None]}.get(len(shape), x)
    if len(shape) == 1:
        pictures = x.unflatten(1, (1, 6, 6))
    elif len(shape) == 3 and shape[2] < shape[0]:
        pictures = x.permute(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(
        pictures, model.encoder[1].weight, model.encoder[1].bias, 2, 1
    )
    torch.testing.assert_close(model.encoder[:2](x.flatten(1)), expected)
    # The decoder gives every value back where it was.
    back = model.decoder[-1](pictures)
    torch.testing.assert_close(back, x.flatten(1))


@pytest.mark.parametrize("shape", [(784,), (28, 14), (3, 28, 14), (28, 14, 3)])
def test_random_shifts_move_whole_pictures_by_up_to_their_share(shape):
    torch.manual_seed(0)
    x = data(400, shape)
    moved = RandomShifts(shape)(x)
    assert moved.shape == x.shape
    views = [
        images.unflatten(1, (28, 28))[:, None]
        if len(shape) == 1
        else images.movedim(-1, 1)
        if shape[-1] == 3
        else images.reshape(400, -1, 28, 14)
        for images in (x, moved)
    ]
    found = set()
    for before, after in zip(*views, strict=True):
        wide = torch.nn.functional.pad(before, (2, 2, 2, 2), mode="replicate")
        height, width = before.shape[-2:]
        fits = [
            (i - 2, j - 2)
            for i in range(5)
            for j in range(5)
            if torch.equal(wide[:, i : i + height, j : j + width], after)
        ]
        assert len(fits) == 1
        found.add(fits[0])
    sideways = range(-2, 3) if shape == (784,) else range(-1, 2)
    assert found == {(i, j) for i in range(-2, 3) for j in sideways}
    for share, shape in ((-0.1, 784), (1.0, 784), (math.nan, 784), ("a", 784), (0.1, 10)):
        with pytest.raises(ValueError, match=r"(share|shape) must be"):
            RandomShifts(shape, share)
    small = data(20, (8, 8))  # a 14th of it is no whole pixel
    assert torch.equal(RandomShifts((8, 8))(small), small)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (7, "input_shape must be a picture for channels"),
        ((2, 8, 8, 8), "input_shape must be a picture for channels"),
        ((3, 8), "channels must be few enough to halve 3 x 8 values each time"),
    ],
)
def test_what_is_no_picture_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        VAE(shape, 3, channels=(4, 6))


@pytest.mark.parametrize("latent_dim", [1, 2, 5])
def test_full_posterior_is_lower_triangular_with_positive_diagonal(latent_dim):
    model = make(latent_dim=latent_dim)
    q = model.encode(100 * data(6) - 50)  # far inputs, where softplus underflows
    torch.testing.assert_close(q.scale_tril, q.scale_tril.tril(), rtol=0, atol=0)
    assert (q.scale_tril.diagonal(dim1=-2, dim2=-1) >= POSTERIOR_FLOOR).all()
    # Every number that the encoder puts out is used once.
    assert model.encoder[-1].out_features == latent_dim + latent_dim * (latent_dim + 1) // 2
    if latent_dim > 1:
        below = torch.tril_indices(latent_dim, latent_dim, -1)
        raw = model.encoder(100 * data(6) - 50)[:, 2 * latent_dim :]
        torch.testing.assert_close(q.scale_tril[:, below[0], below[1]], raw)


@pytest.mark.parametrize("training", [True, False])
def test_learnt_gaussian_likelihood_against_torch(training):
    model = make((3, 4), scale="learnt").train(training)
    assert model.scale.item() == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        model.raw_scale.fill_(0.3)
    x, z = data(5, (3, 4)), torch.randn(5, 3, dtype=torch.float64)
    expected = Independent(Normal(model.decode(z), model.scale), 2).log_prob(x)
    torch.testing.assert_close(model.log_likelihood(x, z), expected)
    model.log_likelihood(x, z).mean().backward()
    assert model.raw_scale.grad.abs() > 0


def test_bernoulli_likelihood_against_torch():
    model = make((3, 4), likelihood="bernoulli")
    x, z = data(5, (3, 4)).round(), torch.randn(5, 3, dtype=torch.float64)
    expected = Independent(Bernoulli(model.decode(z)), 2).log_prob(x)
    torch.testing.assert_close(model.log_likelihood(x, z), expected)


def test_maximum_likelihood_scale_gradient_is_that_of_the_profile_likelihood():
    model = make()
    x, z = data(5), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    inputs = [z, *model.decoder.parameters()]
    got = torch.autograd.grad(model.log_likelihood(x, z).mean(), inputs)
    variance = (x - model.decode(z)).square().mean()
    of_each = Independent(Normal(model.decode(z), variance.sqrt()), 1).log_prob(x)
    torch.testing.assert_close(model.log_likelihood(x, z), of_each)
    profile = -7 / 2 * (variance.log() + 1 + math.log(2 * math.pi))
    torch.testing.assert_close(model.log_likelihood(x, z).mean(), profile)
    for a, b in zip(got, torch.autograd.grad(profile, inputs), strict=True):
        torch.testing.assert_close(a, b)
    # No other sigma gives the batch a higher likelihood.
    for factor in (0.99, 1.01):
        other = Independent(Normal(model.decode(z), factor * variance.sqrt()), 1).log_prob(x)
        assert other.mean() < profile


def test_maximum_likelihood_scale_in_evaluation_is_the_average_of_training():
    model = make()
    assert float(model.scale) == 1
    z = torch.randn(5, 3, dtype=torch.float64)
    variances = []
    for seed in range(10):
        x = data(5, seed=seed)
        model.log_likelihood(x, z)
        variances.append((x - model.decode(z)).square().mean())
    average = torch.stack(variances).mean().detach()
    torch.testing.assert_close(model.scale**2, average)
    model.eval()
    expected = Independent(Normal(model.decode(z), average.sqrt()), 1).log_prob(x)
    torch.testing.assert_close(model.log_likelihood(x, z), expected)
    one = model.log_likelihood(x[:1], z[:1])
    torch.testing.assert_close(one, expected[:1])
    torch.testing.assert_close(model.scale**2, average)  # evaluation does not move it


def test_average_scale_follows_a_falling_error():
    model = make()
    z = torch.zeros(5, 3, dtype=torch.float64)
    target = model.decode(z).detach()
    for step in range(400):
        error = math.exp(-min(step, 200) / 100)
        model.log_likelihood(target + error, z)
    assert float(model.scale) == pytest.approx(math.exp(-2), rel=1e-3)


def test_perfect_reconstruction_is_finite():
    model = make()
    z = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    x = model.decode(z).detach()
    value = model.log_likelihood(x, z)
    assert torch.isfinite(value).all()
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert torch.isfinite(gradient).all()
    assert float(model.scale.detach()) == pytest.approx(SIGMA_FLOOR)
    assert torch.isfinite(model.eval().log_likelihood(x, z)).all()


def test_elbo_with_standard_normal_prior():
    model = make()
    x = data(20_000, seed=3)
    terms = model.elbo(x)
    exact = torch.distributions.kl_divergence(
        terms.q,
        MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double()),
    )
    torch.testing.assert_close(terms.kl.mean(), exact.mean(), rtol=0.05, atol=0)
    torch.manual_seed(5)
    first = model.elbo(x[:4])
    torch.manual_seed(5)
    torch.testing.assert_close(model.encode(x[:4]).rsample(), first.z, rtol=0, atol=0)


def test_elbo_calls_the_encoder_once_and_the_prior_does_not_keep_it():
    model, x = make(prior=VMMPrior(data(4), latent_dim=3)), data(5)
    rows = []
    model.encoder.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    terms = model.elbo(x)
    assert rows == [5 + 4]
    expected = model.prior.kl(model.encode(x), model.encode, z=terms.z)
    torch.testing.assert_close(terms.kl, expected)
    (-terms.elbo.mean()).backward()
    assert not [n for n in model.state_dict() if n.startswith("prior.") and "encoder" in n]
    assert all(parameter.grad is None for parameter in model.prior.parameters())
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    assert model.sample(6, component=1).shape == (6, 7)


@pytest.mark.parametrize(
    ("prior", "scale"), [("normal", "learnt"), ("mixture", "maximum-likelihood")]
)
def test_copies_are_equal_and_independent(prior, scale):
    mixture = VMMPrior(data(4), latent_dim=3) if prior == "mixture" else None
    model = make(prior=mixture, scale=scale)
    model(data(5))
    fresh = make(prior=copy.deepcopy(mixture), scale=scale)
    fresh.load_state_dict(model.state_dict())
    x = data(6)
    model.eval()
    torch.manual_seed(3)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh.eval()):
        torch.manual_seed(3)
        torch.testing.assert_close(other(x).elbo, expected.elbo, rtol=0, atol=0)
        with torch.no_grad():
            next(other.parameters()).zero_()
        torch.manual_seed(3)
        torch.testing.assert_close(model(x).elbo, expected.elbo, rtol=0, atol=0)


def test_autocast_keeps_the_densities_in_full_precision():
    model = make().float()
    x = data(5).float()
    with torch.autocast("cpu", torch.bfloat16):
        terms = model(x)
    assert {term.dtype for term in (*terms[:3], terms.z)} == {torch.float32}
    (-terms.elbo.mean()).backward()
    model.eval()
    with torch.no_grad():
        exact = model.encode(x).mean
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model.encode(x).mean, exact, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": 0}, "input_shape"),
        ({"input_shape": ()}, "input_shape"),
        ({"input_shape": (3, 2.5)}, "input_shape"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"hidden": (3, 0)}, "hidden"),
        ({"posterior": "banded"}, r"posterior must be one of .*'banded'"),
        ({"likelihood": "poisson"}, r"likelihood must be one of .*'poisson'"),
        ({"scale": "fixed"}, r"scale must be one of .*'fixed'"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        VAE(**{"input_shape": 4, "latent_dim": 2, **arguments})


def test_input_errors():
    model = make((3, 4))
    with pytest.raises(ValueError, match=r"x must have shape \[B, 3, 4\], but has \[5, 12\]"):
        model.encode(data(5, (12,)))
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, but is torch\.uint8"):
        model(torch.zeros(5, 3, 4, dtype=torch.uint8))
    with pytest.raises(TypeError, match="but is list"):
        model.check_data([1.0])
    x = data(5, (3, 4))
    x[1, 1, 1] = math.inf
    with pytest.raises(ValueError, match="x must be finite, but has 1"):
        model.check_data(x)
    bernoulli = make((3, 4), likelihood="bernoulli")
    for call in (bernoulli, bernoulli.check_data):
        with pytest.raises(ValueError, match=r"x must lie in \[0, 1\].*but is in \[-1, 0\.5\]"):
            call(torch.tensor([-1.0, 0.5] * 6).double().view(1, 3, 4))
