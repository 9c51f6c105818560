"""The modules of scvi-tools with a learnt prior, and with likelihoods in compiled code."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from scvi import REGISTRY_KEYS
from scvi.external.cytovi import CytoVAE
from scvi.module import PEAKVAE, SCANVAE, TOTALVAE, VAE
from scvi.module._constants import MODULE_KEYS
from scvi.module.base import LossOutput, auto_move_data
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as cross_entropy_of

from vmm_fast.counts import SoftmaxMean, nb_log_prob, poisson_log_prob, zinb_log_prob
from vmm_fast.scvi.latent_prior import LatentPrior
from vmm_fast.scvi.loading import LEAST_BATCH
from vmm_fast.scvi.novelty import misfit_of

__all__ = ["VMMPEAKVAE", "VMMSCANVAE", "VMMTOTALVAE", "VMMVAE", "VMMCytoVAE"]


class _PerCell:
    """A distribution of counts whose log_prob [B, 1] is that of whole cells.

    The modules sum over the last dimension.
    """

    def __init__(self, log_prob: Callable[..., Tensor], *parameters: Tensor | SoftmaxMean):
        self._log_prob, self._parameters = log_prob, parameters

    def log_prob(self, counts: Tensor) -> Tensor:
        return self._log_prob(counts, *self._parameters)[:, None]


class _Softmax(nn.Softmax):
    """The decoder's softmax; with ``left_out`` it returns 1 instead, and keeps the logits.

    The likelihood takes the softmax of them. What the decoder multiplies by the library size is
    then 1, so that the library size comes out.
    """

    left_out = False
    logits: Tensor | None = None

    def forward(self, logits: Tensor) -> Tensor:
        if not self.left_out or logits.ndim > 2:  # several samples z of each cell
            return super().forward(logits)
        self.logits = logits
        return torch.ones_like(logits[..., :1])


class VMMVAE(LatentPrior, VAE):
    """:class:`scvi.module.VAE` with a learnt prior; see :class:`vmm_fast.scvi.VMMSCVI`.

    Parameters
    ----------
    *args, **kwargs
        Arguments of :class:`LatentPrior` and of the module.
    fused_likelihood : bool
        Whether to take the log-likelihood of counts from :mod:`vmm_fast.counts` on CPUs and on GPUs
        of NVIDIA and AMD. It is several times as fast on CPUs. It lacks the 1e-8 that scvi-tools
        adds to means and dispersions.
    """

    n_input: int

    def __init__(self, *args: Any, fused_likelihood: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.fused_likelihood = fused_likelihood
        self._softmax = _Softmax(dim=-1)
        if type(self.decoder.px_scale_decoder[-1]) is nn.Softmax:
            self.decoder.px_scale_decoder[-1] = self._softmax

    @property
    def n_features(self) -> int:
        """Number of genes."""
        return self.n_input

    @property
    def _fuses_likelihood(self) -> bool:
        here = self.fused_likelihood and self.device.type in ("cpu", "cuda")
        return here and self.gene_likelihood in ("poisson", "nb", "zinb")

    @contextmanager
    def decoding_for_loss(self) -> Iterator[None]:
        """Let the decoder leave the mean's softmax to the likelihood, if ``loss`` includes it."""
        has_it = type(self).loss in (VMMVAE.loss, VMMSCANVAE.loss)
        self._softmax.left_out = has_it and self._fuses_likelihood
        try:
            yield
        finally:
            self._softmax.left_out, self._softmax.logits = False, None

    def misfit(self, tensors: dict[str, Tensor], z: Tensor) -> Tensor:
        """Return how badly cells are decoded from z [B]; about 1 for cells as in training."""
        return misfit_of(self, tensors, z)

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Any],
        kl_weight: float = 1.0,
    ) -> LossOutput:
        """Return VAE's loss, computed with the fused likelihood."""
        outputs = self.with_fused_likelihood(generative_outputs)
        return VAE.loss(self, tensors, inference_outputs, outputs, kl_weight)

    def with_fused_likelihood(self, generative_outputs: dict[str, Any]) -> dict[str, Any]:
        """Return the outputs with the fused log-likelihood in place of ``px``, where it exists."""
        if not self._fuses_likelihood:
            return generative_outputs
        px = generative_outputs[MODULE_KEYS.PX_KEY]
        mean = px.rate if self.gene_likelihood == "poisson" else px.mu
        if mean.ndim > 2:
            return generative_outputs
        if self._softmax.logits is not None:
            mean = SoftmaxMean(self._softmax.logits, mean[:, 0])
        if self.gene_likelihood == "poisson":
            fused = _PerCell(poisson_log_prob, mean)
        else:
            # px expands a gene's dispersion to all cells, so that each would get its own gradient.
            theta = self.px_r.exp() if self.dispersion == "gene" else px.theta
            if self.gene_likelihood == "nb":
                fused = _PerCell(nb_log_prob, mean, theta)
            else:
                fused = _PerCell(zinb_log_prob, mean, theta, px.zi_logits)
        return {**generative_outputs, MODULE_KEYS.PX_KEY: fused}

    @torch.inference_mode()
    def marginal_ll(
        self,
        tensors: dict[str, Tensor],
        n_mc_samples: int,
        return_mean: bool = False,
        n_mc_samples_per_pass: int = 1,
    ) -> Tensor | float:
        """Return the importance-weighted estimate of log p(x) [B] under the prior, in nats.

        Raises
        ------
        NotImplementedError
            With latent_distribution="ln" and a learnt prior: the decoder does not see q's sample.
        """
        if self.prior is None:
            stock: Tensor | float = super().marginal_ll(
                tensors, n_mc_samples, return_mean, n_mc_samples_per_pass
            )
            return stock
        if self.latent_distribution != "normal":
            raise NotImplementedError(
                "the marginal likelihood is there for latent_distribution='normal' alone, but it "
                f"is {self.latent_distribution!r}"
            )
        components = self.components()
        terms = []
        for _ in range(n_mc_samples):
            outputs, generated, losses = self.forward(
                tensors, get_inference_input_kwargs={"full_forward_pass": True}
            )
            q = outputs["qz"]
            z = q.z
            log_ratio = components.log_prob(z) - q.log_prob(z).sum(-1)
            if not self.use_observed_lib_size:
                library = outputs["library"]
                log_ratio += (
                    generated["pl"].log_prob(library) - outputs["ql"].log_prob(library)
                ).sum(-1)
            terms.append(log_ratio - losses.dict_sum(losses.reconstruction_loss))
        found = torch.stack(terms).logsumexp(0) - math.log(n_mc_samples)
        return found.mean().item() if return_mean else found.cpu()


class VMMSCANVAE(VMMVAE, SCANVAE):
    """:class:`scvi.module.SCANVAE` with a learnt prior; see :class:`vmm_fast.scvi.VMMSCANVI`.

    The prior takes the place of SCANVAE's p(z1 | z2, y) with z2 ~ N(0, I):

        log p(x, y) >= E_q(z1 | x)[log p(x | z1) + log p(y | z1)] - KL(q(z1 | x) || prior)

    with the classifier for p(y | z1); without log p(y | z1) where there is no label.

    Labelled cells come in a mini-batch of their own, as scvi-tools' loaders draw them. Without one,
    as from a data module, they are those of the mini-batch that have a label.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.prior is not None:
            del self.encoder_z2_z1, self.decoder_z1_z2, self.y_prior

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Any],
        kl_weight: float = 1.0,
        labelled_tensors: dict[str, Tensor] | None = None,
        classification_ratio: float | None = None,
    ) -> LossOutput:
        """Return the negative ELBO plus the weighted cross-entropy of the labelled cells."""
        generated = self.with_fused_likelihood(generative_outputs)
        outputs = (tensors, inference_outputs, generated, kl_weight)
        labels = tensors[REGISTRY_KEYS.LABELS_KEY]
        labelled = labels[:, 0] < self.n_labels
        # scvi-tools' plan gives the mini-batch itself, or a copy of it, if it has every key.
        among_them = labelled_tensors is None or bool(
            (labelled_tensors[REGISTRY_KEYS.LABELS_KEY] >= self.n_labels).any()
        )
        if self.prior is None:
            if among_them:
                some = classification_ratio is not None and int(labelled.sum()) >= LEAST_BATCH
                labelled_tensors = {k: x[labelled] for k, x in tensors.items()} if some else None
            return SCANVAE.loss(self, *outputs, labelled_tensors, classification_ratio)
        found = VAE.loss(self, *outputs)
        if classification_ratio is None or (among_them and not labelled.any()):
            return found
        if among_them:
            labels = labels[labelled]
            logits = self.classify_helper(inference_outputs[MODULE_KEYS.QZ_KEY].loc)[labelled]
            cross_entropy = cross_entropy_of(logits, labels[:, 0].long())
        else:
            cross_entropy, labels, logits = self.classification_loss(labelled_tensors)
        return dataclasses.replace(
            found,
            loss=found.loss + classification_ratio * cross_entropy,
            classification_loss=cross_entropy,
            true_labels=labels,
            logits=logits,
        )

    @auto_move_data
    def classify(
        self,
        x: Tensor,
        batch_index: Tensor | None = None,
        cont_covs: Tensor | None = None,
        cat_covs: Tensor | None = None,
        use_posterior_mean: bool = True,
    ) -> Tensor:
        """Return the logits of the labels [B, n_labels]."""
        logits: Tensor
        if self.encode_covariates and self.batch_representation == "embedding":
            # SCANVAE's own method does not look up the embeddings of batches that its encoder sees.
            outputs = self._regular_inference(x, batch_index, cont_covs, cat_covs)
            z = outputs["qz"].loc if use_posterior_mean else outputs["z"]
            logits = self.classify_helper(z)
        else:
            logits = super().classify(x, batch_index, cont_covs, cat_covs, use_posterior_mean)
        return logits


class VMMPEAKVAE(LatentPrior, PEAKVAE):
    """:class:`scvi.module.PEAKVAE` with a learnt prior; see :class:`vmm_fast.scvi.VMMPEAKVI`."""

    n_input_regions: int

    @property
    def n_features(self) -> int:
        """Number of regions."""
        return self.n_input_regions

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Any],
        kl_weight: float = 1.0,
    ) -> LossOutput:
        """Return the negative ELBO, averaged over the cells; with N(0, I), PEAKVAE's own loss.

        PEAKVAE weights the reconstruction by the number of cells in the mini-batch, which makes the
        KL divergence negligible.
        """
        found = super().loss(tensors, inference_outputs, generative_outputs, kl_weight)
        if self.prior is None:
            return found
        mean = (found.reconstruction_loss_sum + kl_weight * found.kl_local_sum) / len(
            tensors[REGISTRY_KEYS.X_KEY]
        )
        return dataclasses.replace(found, loss=mean)


class VMMTOTALVAE(LatentPrior, TOTALVAE):
    """:class:`scvi.module.TOTALVAE` with a learnt prior; see :class:`vmm_fast.scvi.VMMTOTALVI`."""

    n_input_genes: int
    n_input_proteins: int
    encoder: nn.Module

    @property
    def n_features(self) -> int:
        """Number of genes plus number of proteins."""
        return self.n_input_genes + self.n_input_proteins

    @property
    def z_encoder(self) -> nn.Module:
        """TOTALVAE calls its encoder ``encoder``."""
        return self.encoder

    def features(self, tensors: dict[str, Tensor]) -> Tensor:
        """Return the counts [B, G], those of genes first, then those of proteins."""
        return torch.cat([tensors[REGISTRY_KEYS.X_KEY], tensors[REGISTRY_KEYS.PROTEIN_EXP_KEY]], -1)

    def encoder_input(self, log_counts: Tensor) -> Tensor:
        """Return log(1 + x) with x = counts / (1 + their mean) in each modality [B, G].

        Without ``log_variational``, return x.
        """
        parts = log_counts.expm1().split([self.n_input_genes, self.n_input_proteins], -1)
        x = torch.cat([part / (1 + part.mean(-1, keepdim=True)) for part in parts], -1)
        # A pseudo-cell's count may be slightly negative, so that x could fall below -1.
        return x.clamp(min=-0.5).log1p() if self.log_variational else x

    def marginal_ll(self, *args: Any, **kwargs: Any) -> float:
        """Return TOTALVAE's estimate of the marginal likelihood under N(0, I).

        Raises
        ------
        NotImplementedError
            With a learnt prior.
        """
        if self.prior is not None:
            raise NotImplementedError("the marginal likelihood is there for prior='normal' alone")
        stock: float = super().marginal_ll(*args, **kwargs)
        return stock


class VMMCytoVAE(LatentPrior, CytoVAE):
    """CytoVI's module with a learnt prior; see :class:`vmm_fast.scvi.VMMCYTOVI`."""

    def __init__(self, n_input: int, *args: Any, **kwargs: Any):
        mask = kwargs.get("encoder_marker_mask")
        self._n_features = n_input if mask is None else int(mask.sum())
        super().__init__(n_input, *args, **{**kwargs, "prior_mixture": False})

    @property
    def n_features(self) -> int:
        """Number of markers that are encoded."""
        return self._n_features

    def features(self, tensors: dict[str, Tensor]) -> Tensor:
        """Return the intensities [B, G] of the markers that are encoded."""
        x: Tensor = self._get_inference_input(tensors)["x"]
        if (x <= -1).any():
            raise ValueError(f"intensities must be above -1 for pseudo-cells, but one is {x.min()}")
        return x
