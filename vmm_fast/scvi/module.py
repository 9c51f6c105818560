"""A learnt prior on the latent of scvi-tools' modules.

In these modules the only KL divergence of q(z | x) is the one against N(0, I), and ``inference``
gives q and its sample z. :class:`LatentPrior` lets ``inference`` give a q whose KL divergence, by
torch's own dispatch, is that against the prior: the modules' losses stay as they are.
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
from vmm_fast.clusters import Clusters, ClusterTree, Confusion, find_clusters
from vmm_fast.counts import SoftmaxMean, nb_log_prob, poisson_log_prob, zinb_log_prob
from vmm_fast.inference.processes import average_over_processes
from vmm_fast.mixture import Components
from vmm_fast.priors import Prior
from vmm_fast.priors.base import check_choice, check_integer
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

# Five times scvi-tools' rate for the network. Data sets have a few thousand steps: at the network's
# rate components that nobody needs have not gone empty by then.
PRIOR_LEARNING_RATE = 5e-3
KEPT_POINTS = 16_384  # of the cells that clusters are found in: for a cut elsewhere later


class PosteriorUnderPrior(Normal):
    """q(z | x), whose KL divergence from any Normal is that from ``module``'s prior.

    ``z`` is the sample [B, D] of q that the module decodes, or None. scvi-tools makes another of
    ``loc`` and ``scale`` alone, to have the densities of many cells together.
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
    """KL(q || prior) [B, 1]: the modules sum over the last dimension."""
    assert q.module is not None
    return q.module.kl(q)[:, None]


# The private optimizer belongs into training checkpoints, not into saved models, all of whose state
# scvi-tools takes for tensors.
def _leave_out_private_state(module: nn.Module, state: dict, prefix: str, *rest: Any) -> None:
    state.pop(f"{prefix}prior._extra_state", None)


def _expect_no_private_state(module: Any, state: dict, prefix: str, *rest: Any) -> None:
    state.setdefault(f"{prefix}prior._extra_state", {})
    # Of models that were saved before there were any:
    for name, value in module.no_clusters().items():
        state.setdefault(prefix + name, value)


class LatentPrior(BaseModuleClass):
    """Mixin for modules of scvi-tools, before the module's class: a learnt prior on its z.

    A class that uses it gives ``n_features``, and what of :meth:`features`, :meth:`encoder_input`
    and ``z_encoder`` its module has otherwise.

    Parameters
    ----------
    *args
        Of the module.
    prior : {"vmm", "gmm", "vamp", "normal"}
        "normal" is N(0, I) as it is.
    n_components : int
        C.
    prior_kwargs : dict, optional
        Of the prior's class; ``learning_rate`` is :data:`PRIOR_LEARNING_RATE` unless given.
    **kwargs
        Of the module.

    Raises
    ------
    ValueError
        For an unknown prior.

    Attributes
    ----------
    prior : Prior or None
        None for N(0, I) as it is.
    warming_up : bool
        Whether N(0, I) stands in for the prior for now.
    prior_learnt : Tensor, a boolean scalar
        Whether training under the prior has begun.
    counts_training_cells : bool
        Whether the prior's ``data_size``, not given, becomes the number of cells trained on.
    confusion_sums, confusion_counts, cluster_of_component : Tensor [C, C], [C], [C]
        What components share and the clusters that they form, as :meth:`keep_clusters` was given.
    cluster_points : Tensor [KEPT_POINTS, D]
        Points that clusters of another cut must hold; infinite where there are no more.
    """

    prior: Prior | None
    prior_learnt: Tensor
    confusion_sums: Tensor
    confusion_counts: Tensor
    cluster_of_component: Tensor
    cluster_points: Tensor
    warming_up = False
    # Of modules that do not have them:
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
        """G: of how many genes, regions, .. a pseudo-cell has counts."""
        raise NotImplementedError

    def features(self, tensors: dict[str, Tensor]) -> Tensor:
        """Counts [B, G] in a batch of cells, as pseudo-cells have them."""
        return tensors[REGISTRY_KEYS.X_KEY]

    def encoder_input(self, log_counts: Tensor) -> Tensor:
        """What ``z_encoder`` sees [B, G] of log(1 + counts)."""
        # Counts that are not taken the logarithm of are what they are.
        return log_counts if self.log_variational else log_counts.expm1()

    def encode(self, cells: Cells) -> Normal:
        """q(z | cells)."""
        inputs = [self.encoder_input(cells.log_counts), cells.continuous]
        categories = list(cells.categories)
        if self.encode_covariates and self.batch_representation == "embedding":
            batch = categories.pop(0)
            inputs.append(batch @ self.get_embedding(REGISTRY_KEYS.BATCH_KEY).weight)
        return self.z_encoder(torch.cat(inputs, -1), *categories)[0]

    def encode_pseudo_cells(self, cells: Cells) -> Normal:
        """Encode as a trained model does, without dropout and by running statistics.

        In training mode a batch normalisation would take the pseudo-cells' own statistics, which
        are not the cells', so that components would move when training ends.
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
        """KL(q || prior) [B] in nats, estimated from q's sample.

        Where the prior is frozen, the encoder is not drawn to move its components either.
        """
        assert self.prior is not None
        z = q.z if q.z is not None and q.z.shape == q.loc.shape else None
        if self.frozen:
            return self.components().kl(q, z)
        return self.prior.kl(q, self.encode_pseudo_cells, z)

    def inference(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the module's, with q under the prior."""
        outputs = super().inference(*args, **kwargs)
        if self.prior is not None and not self.warming_up:
            q = outputs["qz"]
            q = PosteriorUnderPrior(q.loc, q.scale, self.sample_of(outputs), self)
            outputs["qz"] = q
            # Not by training mode: scvi-tools leaves a loaded model's module in evaluation mode.
            if torch.is_grad_enabled():
                self._latest = q
        return outputs

    def sample_of(self, outputs: dict[str, Any]) -> Tensor | None:
        """Give q's own sample; with latent_distribution="ln", z is a function of it."""
        return outputs["z"] if self.latent_distribution == "normal" else None

    def decoding_for_loss(self) -> AbstractContextManager[None]:
        """Within this, a training step, what is decoded need be of no use but for ``loss``."""
        return nullcontext()

    def update_prior(self) -> None:
        """Take the empirical-Bayes step of the last batch, unless the prior is frozen."""
        assert self.prior is not None
        q, self._latest = self._latest, None
        if q is None or self.frozen:
            return
        # Batch normalisations have followed each process's own cells; components must be the same,
        # and models that are saved.
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
        """Give the mixture as it is now.

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
        sums, counts = self.confusion_sums, self.confusion_counts  # which change in place
        return ClusterTree(Confusion(sums.cpu().clone(), counts.cpu().clone()))

    def keep_clusters(self, tree: ClusterTree, clusters: Clusters, points: Tensor) -> None:
        """Keep the tree and a cut of it with the model's weights, and random ones of the points."""
        chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
        chosen = chosen[:KEPT_POINTS].sort().values
        self.forget_clusters()
        self.confusion_sums.copy_(tree.confusion.sums)
        self.confusion_counts.copy_(tree.confusion.counts)
        self.cluster_of_component.copy_(clusters.of_component)
        self.cluster_points[: len(chosen)] = points[chosen]

    def forget_clusters(self) -> None:
        """Be as before clusters were found: components are about to change."""
        for name, value in self.no_clusters().items():
            getattr(self, name).copy_(value)

    def other_clusters(self, **cut: Any) -> Clusters:
        """Cut the tree elsewhere; see :func:`vmm_fast.clusters.find_clusters`."""
        points = self.cluster_points.cpu()
        points = points[points[:, 0].isfinite()]
        return find_clusters(self.components().to("cpu"), points, tree=self.tree, **cut)


class _PerCell:
    """Counts' distribution whose log_prob is of whole cells, [B, 1]: the modules sum over it."""

    def __init__(self, log_prob: Callable[..., Tensor], *parameters: Tensor | SoftmaxMean):
        self._log_prob, self._parameters = log_prob, parameters

    def log_prob(self, counts: Tensor) -> Tensor:
        return self._log_prob(counts, *self._parameters)[:, None]


class _Softmax(nn.Softmax):
    """The decoder's, which it can leave to the likelihood: 1 then stands for it, for a while.

    What the decoder multiplies by the library size is then that size itself.
    """

    left_out = False
    logits: Tensor | None = None

    def forward(self, logits: Tensor) -> Tensor:
        if not self.left_out or logits.ndim > 2:  # of several samples z of each cell
            return super().forward(logits)
        self.logits = logits
        return torch.ones_like(logits[..., :1])


class VMMVAE(LatentPrior, VAE):
    """:class:`scvi.module.VAE` with a learnt prior; see :class:`vmm_fast.scvi.VMMSCVI`.

    Parameters
    ----------
    *args, **kwargs
        Of :class:`LatentPrior` and of the module.
    fused_likelihood : bool
        On CPUs and on GPUs of NVIDIA and AMD, take counts' log-likelihood from
        :mod:`vmm_fast.counts`, several times as fast on CPUs; scvi-tools' own otherwise. They
        differ in scvi-tools' 1e-8 beside means and dispersions.
    """

    def __init__(self, *args: Any, fused_likelihood: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.fused_likelihood = fused_likelihood
        self._softmax = _Softmax(dim=-1)
        if type(self.decoder.px_scale_decoder[-1]) is nn.Softmax:
            self.decoder.px_scale_decoder[-1] = self._softmax

    @property
    def n_features(self) -> int:
        """Genes."""
        return self.n_input

    @property
    def _fuses_likelihood(self) -> bool:
        here = self.fused_likelihood and self.device.type in ("cpu", "cuda")
        return here and self.gene_likelihood in ("poisson", "nb", "zinb")

    @contextmanager
    def decoding_for_loss(self) -> Iterator[None]:
        """Let the decoder leave the softmax of the mean to the likelihood, if ``loss`` has it."""
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
        """As VAE's, with the fused likelihood."""
        outputs = self.with_fused_likelihood(generative_outputs)
        return VAE.loss(self, tensors, inference_outputs, outputs, kl_weight)

    def with_fused_likelihood(self, generative_outputs: dict[str, Any]) -> dict[str, Any]:
        """Give the outputs with what takes the log-likelihood at once, where there is such."""
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
            # px has a gene's expanded to all cells, so that each would get a gradient of its own.
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
        """Importance-weighted estimate of log p(x) [B] under the prior, in nats.

        Raises
        ------
        NotImplementedError
            With latent_distribution="ln" and a learnt prior: what is decoded is not q's sample.
        """
        if self.prior is None:
            return super().marginal_ll(tensors, n_mc_samples, return_mean, n_mc_samples_per_pass)
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
        """Negative bound on log p(x), and the labelled cells' cross-entropy at its weight."""
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
        """Logits of the labels [B, n_labels]."""
        if not (self.encode_covariates and self.batch_representation == "embedding"):
            return super().classify(x, batch_index, cont_covs, cat_covs, use_posterior_mean)
        # SCANVAE's own does not look the batches up that its encoder sees.
        outputs = self._regular_inference(x, batch_index, cont_covs, cat_covs)
        return self.classify_helper(outputs["qz"].loc if use_posterior_mean else outputs["z"])


class VMMPEAKVAE(LatentPrior, PEAKVAE):
    """:class:`scvi.module.PEAKVAE` with a learnt prior; see :class:`vmm_fast.scvi.VMMPEAKVI`."""

    @property
    def n_features(self) -> int:
        """Regions."""
        return self.n_input_regions

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Any],
        kl_weight: float = 1.0,
    ) -> LossOutput:
        """Negative ELBO, mean over the cells; PEAKVAE's own with N(0, I).

        PEAKVAE's weighs the reconstruction by the number of cells in the batch, and so leaves next
        to nothing of the divergence.
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

    @property
    def n_features(self) -> int:
        """Genes, then proteins."""
        return self.n_input_genes + self.n_input_proteins

    @property
    def z_encoder(self) -> nn.Module:
        """Its name elsewhere."""
        return self.encoder

    def features(self, tensors: dict[str, Tensor]) -> Tensor:
        """Counts [B, G] of genes, then of proteins."""
        return torch.cat([tensors[REGISTRY_KEYS.X_KEY], tensors[REGISTRY_KEYS.PROTEIN_EXP_KEY]], -1)

    def encoder_input(self, log_counts: Tensor) -> Tensor:
        """Counts [B, G] over 1 + their mean, by modality, and the logarithm of 1 + that."""
        parts = log_counts.expm1().split([self.n_input_genes, self.n_input_proteins], -1)
        x = torch.cat([part / (1 + part.mean(-1, keepdim=True)) for part in parts], -1)
        # A pseudo-cell's count may be a little below 0, and so its share of a small mean below -1.
        return x.clamp(min=-0.5).log1p() if self.log_variational else x

    def marginal_ll(self, *args: Any, **kwargs: Any) -> float:
        """As TOTALVAE's, which is that of N(0, I).

        Raises
        ------
        NotImplementedError
            With a learnt prior.
        """
        if self.prior is not None:
            raise NotImplementedError("the marginal likelihood is there for prior='normal' alone")
        return super().marginal_ll(*args, **kwargs)
