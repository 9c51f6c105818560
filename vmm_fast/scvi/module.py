"""A learnt prior on the latent of scvi-tools' modules.

The losses of these modules have one KL divergence of q(z | x), that from N(0, I), and take q and
its sample z from ``inference``. With :class:`LatentPrior`, ``inference`` returns a q whose KL
divergence is, by torch's own dispatch, that from the prior. The losses stay as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from scvi import REGISTRY_KEYS
from scvi.module import PEAKVAE, SCANVAE, TOTALVAE, VAE
from scvi.module._constants import MODULE_KEYS
from scvi.module.base import BaseModuleClass, LossOutput, auto_move_data
from torch import Tensor, nn
from torch.distributions import Normal, register_kl

from vmm_fast import GaussianMixturePrior, VampPrior, VMMPrior
from vmm_fast._checks import check_choice, check_integer
from vmm_fast.clusters import Clusters, ClusterTree, Confusion, find_clusters
from vmm_fast.counts import SoftmaxMean, nb_log_prob, poisson_log_prob, zinb_log_prob
from vmm_fast.inference.processes import average_over_processes
from vmm_fast.mixture import Components
from vmm_fast.priors import Prior
from vmm_fast.priors.bayesian_mixture import BayesianMixturePrior
from vmm_fast.scvi.pseudo_cells import Cells, PseudoCells

__all__ = [
    "PRIORS",
    "VMMPEAKVAE",
    "VMMSCANVAE",
    "VMMTOTALVAE",
    "VMMVAE",
    "LatentPrior",
    "PosteriorUnderPrior",
]

PRIORS = ("vmm", "gmm", "vamp", "normal")

# Five times scvi-tools' rate for the network. Training takes a few thousand steps: at the network's
# rate superfluous components are not yet empty by then.
PRIOR_LEARNING_RATE = 5e-3
KEPT_POINTS = 16_384  # latent means that a model keeps, at most, to cut the tree elsewhere later


class PosteriorUnderPrior(Normal):
    """q(z | x) whose KL divergence from any Normal is replaced by that from ``module``'s prior.

    ``z`` is the sample [B, D] of q that the module decodes, or None. scvi-tools makes another one
    from ``loc`` and ``scale`` alone, to have the densities of many cells together.
    """

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        z: Tensor | None = None,
        module: LatentPrior | None = None,
    ):
        super().__init__(loc, scale, validate_args=False)
        self.z, self.module = z, module


@register_kl(PosteriorUnderPrior, Normal)
def _kl(q: PosteriorUnderPrior, _: Normal) -> Tensor:
    """Return KL(q || prior) [B, 1]; the modules sum over the last dimension."""
    assert q.module is not None
    return q.module.kl(q)[:, None]


# The state of the prior's own optimizer belongs in checkpoints of training. Saved models must not
# have it, because scvi-tools expects tensors alone there.
def _leave_out_private_state(
    module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any
) -> None:
    state.pop(f"{prefix}prior._extra_state", None)


def _expect_no_private_state(module: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    state.setdefault(f"{prefix}prior._extra_state", {})
    # For models that were saved before models had clusters:
    for name, value in module.no_clusters().items():
        state.setdefault(prefix + name, value)


class LatentPrior(BaseModuleClass):
    """Mixin for modules of scvi-tools, before the module's class: a learnt prior on its z.

    A class that uses it must define ``n_features``. It overrides :meth:`features`,
    :meth:`encoder_input` and ``z_encoder`` if those of its module differ.

    Parameters
    ----------
    *args
        Arguments of the module.
    prior : {"vmm", "gmm", "vamp", "normal"}
        "normal" is N(0, I), without anything learnt.
    n_components : int
        C.
    prior_kwargs : dict, optional
        Arguments of the prior's class; ``learning_rate`` is :data:`PRIOR_LEARNING_RATE` by default.
    **kwargs
        Further arguments of the module.

    Raises
    ------
    ValueError
        For an unknown prior.

    Attributes
    ----------
    prior : Prior or None
        None for N(0, I).
    warming_up : bool
        Whether N(0, I) stands in for the prior at the moment.
    prior_learnt : Tensor, a boolean scalar
        Whether training under the prior has begun.
    counts_training_cells : bool
        Whether the prior's ``data_size`` was not given, and so becomes the number of training
        cells.
    confusion_sums, confusion_counts, cluster_of_component : Tensor [C, C], [C], [C]
        The confusion of components and the clusters that they form, set by :meth:`keep_clusters`.
    cluster_points : Tensor [KEPT_POINTS, D]
        Latent means of cells; every cluster of another cut must hold some. Unused rows are
        infinite.
    """

    prior: Prior | None
    prior_learnt: Tensor
    confusion_sums: Tensor
    confusion_counts: Tensor
    cluster_of_component: Tensor
    cluster_points: Tensor
    warming_up = False
    # Defaults for modules that do not have these attributes:
    log_variational = False
    batch_representation = "one-hot"

    def __init__(
        self,
        *args: Any,
        prior: str = "vmm",
        n_components: int = 100,
        prior_kwargs: dict[str, Any] | None = None,
        n_batch: int = 0,
        n_continuous_cov: int = 0,
        n_cats_per_cov: Sequence[int] | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            *args,
            n_batch=n_batch,
            n_continuous_cov=n_continuous_cov,
            n_cats_per_cov=n_cats_per_cov,
            **kwargs,
        )
        check_choice("prior", prior, PRIORS)
        n_components = check_integer("n_components", n_components)
        prior_kwargs = {"learning_rate": PRIOR_LEARNING_RATE, **(prior_kwargs or {})}
        self.prior = None
        if prior == "gmm":
            self.prior = GaussianMixturePrior(n_components, self.n_latent, **prior_kwargs)
        elif prior != "normal":
            number = n_components * prior_kwargs.get("pseudo_inputs_per_component", 1)
            seen: dict[str, Any] = {}
            if self.encode_covariates:
                categories = (n_batch, *(n_cats_per_cov or ()))
                seen = {"n_categories": categories, "n_continuous": n_continuous_cov}
            cells = PseudoCells(number, self.n_features, **seen)
            make = VMMPrior if prior == "vmm" else VampPrior
            self.prior = make(cells, self.n_latent, **prior_kwargs)
        if self.prior is not None:
            self.register_buffer("prior_learnt", torch.tensor(False))
            mixture = isinstance(self.prior, BayesianMixturePrior)
            self.counts_training_cells = mixture and "data_size" not in prior_kwargs
            self.n_components = n_components
            for name, value in self.no_clusters().items():
                self.register_buffer(name, value)
            self.register_state_dict_post_hook(_leave_out_private_state)
            self.register_load_state_dict_pre_hook(_expect_no_private_state)

    @property
    def n_features(self) -> int:
        """Number G of counts in a pseudo-cell: of genes, regions, and so on."""
        raise NotImplementedError

    def features(self, tensors: dict[str, Tensor]) -> Tensor:
        """Return the counts [B, G] of a mini-batch, in the order that pseudo-cells have."""
        return tensors[REGISTRY_KEYS.X_KEY]

    def encoder_input(self, log_counts: Tensor) -> Tensor:
        """Return the input of ``z_encoder`` [B, G], given log(1 + counts)."""
        # Modules without log_variational encode the counts themselves.
        return log_counts if self.log_variational else log_counts.expm1()

    def encode(self, cells: Cells) -> Normal:
        """Return q(z | cells)."""
        inputs = [self.encoder_input(cells.log_counts), cells.continuous]
        categories = list(cells.categories)
        if self.encode_covariates and self.batch_representation == "embedding":
            batch = categories.pop(0)
            inputs.append(batch @ self.get_embedding(REGISTRY_KEYS.BATCH_KEY).weight)
        q: Normal = self.z_encoder(torch.cat(inputs, -1), *categories)[0]
        return q

    def encode_pseudo_cells(self, cells: Cells) -> Normal:
        """Return q(z | cells) without dropout and with running statistics, as after training.

        In training mode a batch normalisation would use the statistics of the pseudo-cells, which
        differ from those of the cells: components would move when training ends.
        """
        training = self.z_encoder.training
        self.z_encoder.eval()
        try:
            return self.encode(cells)
        finally:
            self.z_encoder.train(training)

    @property
    def frozen(self) -> bool:
        """Whether no parameter of the prior is learnt, as in query mapping."""
        assert self.prior is not None
        return not any(p.requires_grad for p in self.prior.parameters())

    def kl(self, q: PosteriorUnderPrior) -> Tensor:
        """Return KL(q || prior) [B] in nats, estimated from q's sample.

        If the prior is frozen, no gradient reaches the encoder through the components either.
        """
        assert self.prior is not None
        z = q.z if q.z is not None and q.z.shape == q.loc.shape else None
        if self.frozen:
            return self.components().kl(q, z)
        return self.prior.kl(q, self.encode_pseudo_cells, z)

    def inference(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the module's outputs, with a q whose KL divergence is that from the prior."""
        outputs: dict[str, Any] = super().inference(*args, **kwargs)
        if self.prior is not None and not self.warming_up:
            q = outputs["qz"]
            q = PosteriorUnderPrior(q.loc, q.scale, self.sample_of(outputs), self)
            outputs["qz"] = q
            # `self.training` does not tell: scvi-tools leaves a loaded module in evaluation mode.
            if torch.is_grad_enabled():
                self._latest = q
        return outputs

    def sample_of(self, outputs: dict[str, Any]) -> Tensor | None:
        """Return q's sample, or None if ``z`` is a function of it (latent_distribution="ln")."""
        return outputs["z"] if self.latent_distribution == "normal" else None

    def decoding_for_loss(self) -> AbstractContextManager[None]:
        """Return a context for a training step, in which decoded values serve ``loss`` alone."""
        return nullcontext()

    def update_prior(self) -> None:
        """Take the empirical-Bayes step of the last batch, unless the prior is frozen."""
        assert self.prior is not None
        q, self._latest = self._latest, None
        if q is None or self.frozen:
            return
        # Each process's batch normalisations follow its own cells, but all processes must have the
        # same components and save the same model.
        average_over_processes(
            x
            for name, x in self.named_buffers()
            if x.is_floating_point() and not name.startswith(("prior.", "confusion_", "cluster_"))
        )
        self.prior.update(q if q.z is None else q.z, self.encode_pseudo_cells)
        self.prior_learnt.fill_(True)

    _latest: PosteriorUnderPrior | None = None

    @torch.no_grad()
    def components(self) -> Components:
        """Return the mixture at this moment, without gradients.

        Raises
        ------
        ValueError
            For N(0, I), which has no components.
        """
        if self.prior is None:
            raise ValueError("prior must be 'vmm', 'gmm' or 'vamp' for clusters, but is 'normal'")
        return self.prior.components(self.encode_pseudo_cells).detach()

    # --- clusters ---

    def no_clusters(self) -> dict[str, Tensor]:
        """Return the values that the buffers have before clusters have been found."""
        count = self.n_components
        return {
            "confusion_sums": torch.zeros(count, count, dtype=torch.float64),
            "confusion_counts": torch.zeros(count, dtype=torch.int64),
            "cluster_of_component": torch.zeros(count, dtype=torch.int64),
            "cluster_points": torch.full((KEPT_POINTS, self.n_latent), math.inf),
        }

    @property
    def tree(self) -> ClusterTree | None:
        """The tree of components, on the CPU; None before clusters have been found."""
        if not self.confusion_counts.any():
            return None
        sums, counts = self.confusion_sums, self.confusion_counts  # copied: they change in place
        return ClusterTree(Confusion(sums.cpu().clone(), counts.cpu().clone()))

    def keep_clusters(self, tree: ClusterTree, clusters: Clusters, points: Tensor) -> None:
        """Keep the tree, a cut of it and some random points, to be saved with the weights."""
        chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
        chosen = chosen[:KEPT_POINTS].sort().values
        self.forget_clusters()
        self.confusion_sums.copy_(tree.confusion.sums)
        self.confusion_counts.copy_(tree.confusion.counts)
        self.cluster_of_component.copy_(clusters.of_component)
        self.cluster_points[: len(chosen)] = points[chosen]

    def forget_clusters(self) -> None:
        """Reset the clusters, because components are about to change."""
        for name, value in self.no_clusters().items():
            getattr(self, name).copy_(value)

    def other_clusters(self, **cut: Any) -> Clusters:
        """Return the clusters of another cut; see :func:`vmm_fast.clusters.find_clusters`."""
        points = self.cluster_points.cpu()
        points = points[points[:, 0].isfinite()]
        return find_clusters(self.components().to("cpu"), points, tree=self.tree, **cut)


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
        if self.prior is None:
            return SCANVAE.loss(self, *outputs, labelled_tensors, classification_ratio)
        found = VAE.loss(self, *outputs)
        if labelled_tensors is None:
            return found
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
