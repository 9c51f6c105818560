"""A VAE of vectors or pictures that takes any of the priors.

    ELBO(x) = log p(x | z) - KL,    z ~ q(z | x),    KL = prior.kl(q, encode, z=z)

Posterior q(z | x): a Gaussian with a full (lower-triangular) or a diagonal scale. Likelihood
p(x | z), a sum over the n inputs, with f(z) the decoder:

    gaussian     log p = -1/2 |x - f(z)|^2 / sigma^2 - n (log sigma + 1/2 log 2 pi)
    bernoulli    log p = x log sigmoid(f(z)) + (1 - x) log sigmoid(-f(z))

One sigma is shared by all inputs. With scale="maximum-likelihood" it is not a parameter: in
training sigma^2 is the mean squared error of the batch, which maximises the batch's likelihood
(sigma-VAE, Rybkin et al. 2021, arXiv 2006.13202). The batch's mean of log p is then the profile
likelihood -n/2 (log sigma^2 + 1 + log 2 pi).

Source of the architecture: Stirn & Knowles, arXiv 2402.04412 (500-500-2000, mirrored decoder).
Convolutions, for pictures, are not in the paper.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal
from torch.nn import functional

from vmm_fast.models.pictures import Picture
from vmm_fast.priors import Prior, StandardNormalPrior

# Added to the posterior's standard deviations and to a learnt sigma: softplus underflows to zero.
POSTERIOR_FLOOR = 1e-5
# Sigma never falls below this, so that a perfect reconstruction has a finite likelihood.
SIGMA_FLOOR = 1e-6
# Weight of the newest batch in the average of sigma^2 that is used in evaluation: about 40 batches
# count, which keeps the batches' noise and the lag behind a falling error both well under 1 %.
VARIANCE_RATE = 0.05


class ELBOTerms(NamedTuple):
    """The evidence lower bound of a batch, its two terms, and the posterior and its sample.

    Attributes
    ----------
    elbo, log_likelihood, kl : Tensor [B]
        Nats per sample; ``elbo = log_likelihood - kl``.
    q : torch.distributions.Distribution
        Posterior q(z | x), batch shape [B], event shape [D].
    z : Tensor [B, D]
        The one reparametrised sample of `q` that both terms were evaluated at.
    """

    elbo: Tensor
    log_likelihood: Tensor
    kl: Tensor
    q: Distribution
    z: Tensor


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _convolutional(
    shape: tuple[int, ...],
    channels: Sequence[int],
    hidden: Sequence[int],
    latent_dim: int,
    out: int,
) -> tuple[nn.Sequential, nn.Sequential]:
    """Return an encoder with convolutions before its perceptron, and a decoder that mirrors it.

    Every convolution halves height and width; the decoder's transposed ones restore them.
    """
    picture = Picture(shape)
    size = (picture.height, picture.width)
    down: list[nn.Module] = [picture]
    up: list[nn.Module] = [Picture(shape, back=True)]
    for before, after in itertools.pairwise((picture.colours, *channels)):
        odd = (size[0] % 2, size[1] % 2)
        size = (size[0] // 2, size[1] // 2)
        down += [nn.Conv2d(before, after, 4, 2, 1), nn.ReLU()]
        up = [nn.ReLU(), nn.ConvTranspose2d(after, before, 4, 2, 1, output_padding=odd), *up]
    between = (channels[-1], *size)
    values = math.prod(between)
    encoder = [*down, nn.Flatten(), *_mlp([values, *hidden, out])]
    decoder = [*_mlp([latent_dim, *reversed(hidden), values]), up[0], nn.Unflatten(1, between)]
    return nn.Sequential(*encoder), nn.Sequential(*decoder, *up[1:])


class VAE(nn.Module):
    """Variational autoencoder of vectors or pictures; the decoder mirrors the encoder.

    Parameters
    ----------
    input_shape : int or tuple of int
        Shape of one input, ``784`` or ``(28, 28)``. With `channels` it is a picture: height and
        width, with colours in front of them or behind, whichever are fewer; or a flattened square.
    latent_dim : int
        D, the number of latent dimensions.
    prior : Prior, optional
        A prior of `vmm_fast.priors`; ``None`` is ``StandardNormalPrior(latent_dim)``.
    hidden : tuple of int
        Widths of the encoder's hidden layers; the decoder has them in reverse.
    posterior : {"full", "diagonal"}
        Covariance of q(z | x).
    likelihood : {"gaussian", "bernoulli"}
        p(x | z). Bernoulli takes x in [0, 1].
    scale : {"maximum-likelihood", "learnt"}
        Where the Gaussian's sigma comes from: the mean squared error of each training batch, or a
        parameter that starts at 1. Without effect for a Bernoulli likelihood.
    channels : tuple of int
        Widths of convolutions before the hidden layers (4 x 4, stride 2); none is the paper's.

    Raises
    ------
    ValueError
        If an argument is none of the above.

    Notes
    -----
    With ``scale="maximum-likelihood"`` each call of `log_likelihood` in training mode also moves a
    running average of sigma^2 (as batch normalisation does): a plain mean over the first 20
    batches, then an exponential one. Evaluation mode uses that average, hence the likelihood of one
    sample does not depend on its neighbours there. It is 1 before the first training batch.

    Examples
    --------
    >>> model = VAE(input_shape=(8, 8), latent_dim=2, hidden=(32,))
    >>> x = torch.rand(5, 8, 8)
    >>> model.elbo(x).elbo.shape
    torch.Size([5])
    >>> model.encode(x).mean.shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        input_shape: int | Sequence[int],
        latent_dim: int = 10,
        prior: Prior | None = None,
        hidden: Sequence[int] = (500, 500, 2000),
        posterior: str = "full",
        likelihood: str = "gaussian",
        scale: str = "maximum-likelihood",
        channels: Sequence[int] = (),
    ) -> None:
        super().__init__()
        shape = (input_shape,) if isinstance(input_shape, int) else tuple(input_shape)
        for name, sizes in (
            ("input_shape", shape),
            ("latent_dim", (latent_dim,)),
            ("hidden", tuple(hidden)),
            ("channels", tuple(channels)),
        ):
            if not all(isinstance(size, int) and size >= 1 for size in sizes):
                raise ValueError(f"{name} must hold integers of at least 1, but is {sizes}")
        if not shape:
            raise ValueError("input_shape must have at least one dimension, but is ()")
        for name, value, allowed in (
            ("posterior", posterior, ("full", "diagonal")),
            ("likelihood", likelihood, ("gaussian", "bernoulli")),
            ("scale", scale, ("maximum-likelihood", "learnt")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, but is {value!r}")

        if channels:
            try:
                picture = Picture(shape)
            except ValueError:
                raise ValueError(
                    f"input_shape must be a picture for channels, but is {shape}"
                ) from None
            if min(picture.height, picture.width) < 2 ** len(channels):
                raise ValueError(
                    f"channels must be few enough to halve {picture.height} x {picture.width} "
                    f"values each time, but is {tuple(channels)}"
                )

        self.input_shape = shape
        self.hidden, self.channels = tuple(hidden), tuple(channels)
        self.latent_dim = latent_dim
        self.posterior = posterior
        self.likelihood = likelihood
        self.scale_mode = scale
        self.prior = StandardNormalPrior(latent_dim) if prior is None else prior
        if self.prior.latent_dim != latent_dim:
            raise ValueError(
                f"prior must have latent_dim = {latent_dim} dimensions, "
                f"but has {self.prior.latent_dim}"
            )

        full = posterior == "full"
        scales = latent_dim * (latent_dim + 1) // 2 if full else latent_dim
        inputs = math.prod(shape)
        if channels:
            self.encoder, self.decoder = _convolutional(
                shape, channels, hidden, latent_dim, latent_dim + scales
            )
        else:
            self.encoder = _mlp([inputs, *hidden, latent_dim + scales])
            self.decoder = _mlp([latent_dim, *reversed(hidden), inputs])
        if full:  # where the strictly lower triangle lies in a flattened [D, D]
            rows, columns = torch.tril_indices(latent_dim, latent_dim, -1)
            self._below: Tensor
            self.register_buffer("_below", rows * latent_dim + columns, persistent=False)

        if likelihood == "gaussian" and scale == "learnt":
            self.raw_scale = nn.Parameter(torch.tensor(math.log(math.expm1(1 - SIGMA_FLOOR))))
        elif likelihood == "gaussian":
            self._variance: Tensor
            self._variance_batches: Tensor
            self.register_buffer("_variance", torch.ones(()))
            self.register_buffer("_variance_batches", torch.zeros((), dtype=torch.int64))

    @property
    def scale(self) -> Tensor | None:
        """Sigma of the Gaussian likelihood (a scalar tensor), None for a Bernoulli one."""
        if self.likelihood == "bernoulli":
            return None
        if self.scale_mode == "learnt":
            return functional.softplus(self.raw_scale) + SIGMA_FLOOR
        return self._variance.clamp_min(SIGMA_FLOOR**2).sqrt()

    def check_data(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless `x` can be trained on: dtype, shape, every value.

        Parameters
        ----------
        x : Tensor [B, *input_shape], floating point

        Raises
        ------
        TypeError
            If `x` is no floating-point tensor.
        ValueError
            If the shape is another, a value is not finite, or a value lies outside [0, 1] under a
            Bernoulli likelihood.
        """
        self._check_shape(x)
        if not torch.isfinite(x).all():
            raise ValueError(
                f"x must be finite, but has {int((~torch.isfinite(x)).sum())} NaN or inf"
            )
        if self.likelihood == "bernoulli":
            self._check_unit_interval(x)

    def _check_shape(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor, but is {kind}")
        if x.shape[1:] != self.input_shape:
            shape = ", ".join(map(str, self.input_shape))
            raise ValueError(f"x must have shape [B, {shape}], but has {list(x.shape)}")

    @staticmethod
    def _check_unit_interval(x: Tensor) -> None:
        if x.numel() == 0:
            return
        low, high = x.detach().aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"x must lie in [0, 1] for a Bernoulli likelihood, but is in [{low:g}, {high:g}]"
            )

    def encode(self, x: Tensor) -> Distribution:
        """Return the posterior q(z | x).

        Parameters
        ----------
        x : Tensor [B, *input_shape], floating point

        Returns
        -------
        MultivariateNormal with a `scale_tril`, or Independent(Normal, 1)
            Batch shape [B], event shape [D].
        """
        self._check_shape(x)
        # Under autocast the perceptron's output is in half precision; the density is not.
        h = self.encoder(x.flatten(1)).to(x.dtype)
        d = self.latent_dim
        loc, raw, rest = h[:, :d], h[:, d : 2 * d], h[:, 2 * d :]
        diagonal = functional.softplus(raw) + POSTERIOR_FLOOR
        if self.posterior == "diagonal":
            normal = Normal(loc, diagonal, validate_args=False)
            return Independent(normal, 1, validate_args=False)
        flat = torch.diag_embed(diagonal).flatten(1).index_copy(1, self._below, rest)
        return MultivariateNormal(loc, scale_tril=flat.view(-1, d, d), validate_args=False)

    def _decoder_output(self, z: Tensor) -> Tensor:
        output: Tensor = self.decoder(z).to(z.dtype).unflatten(-1, self.input_shape)
        return output

    def decode(self, z: Tensor) -> Tensor:
        """Return the mean of p(x | z): the decoder's output, or probabilities if Bernoulli.

        Parameters
        ----------
        z : Tensor [B, D]

        Returns
        -------
        Tensor [B, *input_shape]
        """
        output = self._decoder_output(z)
        return output.sigmoid() if self.likelihood == "bernoulli" else output

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Return log p(x | z), summed over the inputs (see the top of this file).

        In training mode with a maximum-likelihood scale, sigma is this batch's: the mean over the
        batch is differentiated exactly, a single sample's term also depends on the others.

        Parameters
        ----------
        x : Tensor [B, *input_shape], floating point
        z : Tensor [B, D]

        Returns
        -------
        Tensor [B], nats

        Raises
        ------
        ValueError
            If a value of `x` lies outside [0, 1] under a Bernoulli likelihood.
        """
        output = self._decoder_output(z)
        if self.likelihood == "bernoulli":
            if not torch.compiler.is_compiling():
                self._check_unit_interval(x)
            loss = functional.binary_cross_entropy_with_logits(output, x, reduction="none")
            return -loss.flatten(1).sum(1)
        squares = (x - output).square().flatten(1).sum(1)
        inputs = math.prod(self.input_shape)
        variance = self._likelihood_variance(squares / inputs)
        return -0.5 * (squares / variance + inputs * (variance.log() + math.log(2 * math.pi)))

    def _likelihood_variance(self, squared_errors: Tensor) -> Tensor:
        """Return sigma^2 (a scalar) for a batch with these mean squared errors per sample [B]."""
        if self.scale_mode == "learnt" or not self.training:
            scale = self.scale
            assert scale is not None
            return scale.square()
        variance = squared_errors.mean()
        with torch.no_grad():
            # An error that is not finite ends the training; the average stays as it was.
            finite = variance.isfinite()
            self._variance_batches += finite
            rate = (1 / self._variance_batches.to(variance.dtype)).clamp(VARIANCE_RATE, 1)
            newest = torch.where(finite, variance.to(self._variance.dtype), self._variance)
            self._variance.lerp_(newest, rate.to(self._variance.dtype))
        return variance.clamp_min(SIGMA_FLOOR**2)

    def elbo(self, x: Tensor, prior: Prior | None = None) -> ELBOTerms:
        """Return the evidence lower bound from one posterior sample, with one call of the encoder.

        Parameters
        ----------
        x : Tensor [B, *input_shape], floating point
        prior : Prior, optional
            Used instead of the model's own.

        Returns
        -------
        ELBOTerms
        """
        prior = self.prior if prior is None else prior
        q, at_pseudo_inputs = prior.encode(x, self.encode)
        z = q.rsample()
        log_likelihood = self.log_likelihood(x, z)
        kl = prior.kl(q, at_pseudo_inputs, z=z)
        return ELBOTerms(log_likelihood - kl, log_likelihood, kl, q, z)

    def forward(self, x: Tensor) -> ELBOTerms:
        """Return :meth:`elbo`, for wrappers that call the module (DistributedDataParallel)."""
        return self.elbo(x)

    @torch.no_grad()
    def sample(self, n: int, component: int | None = None) -> Tensor:
        """Return means of p(x | z) at `n` draws of z from the prior or from one of its components.

        Parameters
        ----------
        n : int
        component : int, optional
            Index of a mixture component; None draws from the whole prior.

        Returns
        -------
        Tensor [n, *input_shape]
        """
        return self.decode(self.prior.sample(n, self.encode, component=component))

    def extra_repr(self) -> str:
        """Return the settings as text, to tell apart models of the same shapes."""
        return (
            f"input_shape={self.input_shape}, latent_dim={self.latent_dim}, "
            f"posterior={self.posterior!r}, likelihood={self.likelihood!r}, "
            f"scale={self.scale_mode!r}"
        )
