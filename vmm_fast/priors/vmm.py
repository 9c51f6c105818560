"""The VampPrior Mixture Model (Stirn & Knowles, arXiv 2402.04412)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vmm_fast._checks import check_integer
from vmm_fast.priors.base import Encoder
from vmm_fast.priors.bayesian_mixture import BayesianMixturePrior
from vmm_fast.priors.options import MixtureOptions
from vmm_fast.priors.pseudo_inputs import as_pseudo_inputs, centers_at, encode_with

__all__ = ["VMMPrior"]


class VMMPrior(BayesianMixturePrior):
    """A Bayesian Gaussian mixture whose centers are posteriors at learnt pseudo-inputs.

        p(z) = sum_c pi_c 1/K sum_k N(z; m_ck, Lambda_c^-1 + S_ck),   N(m_ck, S_ck) = encoder(u_ck)

    Train the network on ``reconstruction + prior.kl(q, encoder)``, which gives the prior's own
    parameters no gradient. After each optimizer step call ``prior.update(q, encoder)``, which takes
    the empirical-Bayes step with a private Adam and does not change the network.

    Parameters
    ----------
    pseudo_inputs : Tensor [J, ...] or Module
        Initial pseudo-inputs u, for instance J training examples (copied), or a module whose call
        gives what the encoder takes. Component c owns neighbours c K .. c K + K - 1.
    latent_dim : int
        D.
    pseudo_inputs_per_component : int
        K; must divide J. C = J / K.
    weights : {"dirichlet", "stick-breaking"}
        Prior on pi: Dirichlet(gamma / C), or sticks v_c ~ Beta(1 - d, gamma + c d) by size.
    inference : {"gradient", "closed-form"}
        How :meth:`update` moves weights, concentration and precisions: by an Adam step on
        :meth:`map_loss`, or by a step of online EM, in which they jump to their maximisers under a
        decaying average of the batches' statistics. Pseudo-inputs take Adam steps either way.
    responsibility_gradient : bool
        Whether the gradient of :meth:`map_loss` runs through the responsibilities as well, which
        rewards crisp assignments (the authors' rule), or not (expectation maximisation).
    data_size : int or None
        n, by which the parameter priors are divided; None is the batch size over all processes, the
        authors' weight. The number of training points keeps more components. ``data_size`` can be
        set between steps.
    learning_rate : float
        Of the private Adam, per call of :meth:`update`.
    update_every : int
        In how many calls of :meth:`update` pseudo-inputs move once: in the first, at the rate times
        the root of that number, for the points of all calls since they moved last. In training mode
        only the first :meth:`kl` after that encodes them, so that the network's steps cost little
        more than under N(0, I); its gradient counts for the calls before it. Weights, precisions
        and concentration follow every call. 1 is the authors' rule.
    joint : bool
        Let :meth:`kl` train the prior's parameters together with the network; then :meth:`update`
        does nothing and the parameter priors play no part.
    map_prior : {"none", "fixed", "learnt"}
        Maximum likelihood, or maximum a posteriori with a fixed or with a learnt concentration.
    concentration : float
        Initial gamma, the inverse of the authors' alpha.
    discount : float
        d of the Pitman-Yor process in [0, 1); needs ``weights="stick-breaking"``.
    statistics_rate : float
        Closed form alone: weight of a batch in the running statistics, in (0, 1]. The network must
        be able to follow: rates over about 0.01 let one component swallow the others early on.

    Attributes
    ----------
    logits : Parameter [C]
        log pi up to a constant; -inf prunes. Settable, as are all of these.
    precision_cholesky : Tensor [C, D, D]
        L, Lambda = L L^T.
    concentration : Tensor, scalar
        gamma.
    pseudo_inputs : Parameter [J, ...] or Module

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.

    Notes
    -----
    The encoder is called on the pseudo-inputs in the mode it is in: in training mode, running
    statistics of a batch normalisation see them too.

    Examples
    --------
    >>> x, network = torch.randn(100, 5), torch.nn.Linear(5, 2)
    >>> def encoder(x):
    ...     return torch.distributions.Normal(network(x), 0.1)
    >>> prior = VMMPrior(x[:10], latent_dim=2, data_size=len(x))
    >>> prior.kl(encoder(x), encoder).shape  # a term of the loss, for each point
    torch.Size([100])
    >>> prior.update(encoder(x), encoder)  # after the optimizer's step
    >>> prior.assign(encoder(x).mean, encoder).labels.shape
    torch.Size([100])
    """

    def __init__(
        self,
        pseudo_inputs: Tensor | nn.Module,
        latent_dim: int,
        pseudo_inputs_per_component: int = 1,
        weights: Literal["dirichlet", "stick-breaking"] = MixtureOptions.weights,
        inference: Literal["gradient", "closed-form"] = MixtureOptions.inference,
        responsibility_gradient: bool = MixtureOptions.responsibility_gradient,
        data_size: int | None = MixtureOptions.data_size,
        learning_rate: float = MixtureOptions.learning_rate,
        update_every: int = MixtureOptions.update_every,
        joint: bool = MixtureOptions.joint,
        map_prior: Literal["none", "fixed", "learnt"] = MixtureOptions.map_prior,
        concentration: float = MixtureOptions.concentration,
        discount: float = MixtureOptions.discount,
        statistics_rate: float = MixtureOptions.statistics_rate,
    ):
        options = MixtureOptions.of_arguments(locals())
        nn.Module.__init__(self)
        self.pseudo_inputs, first = as_pseudo_inputs(pseudo_inputs)
        total, per_component = len(first), pseudo_inputs_per_component
        if total % check_integer("pseudo_inputs_per_component", per_component):
            raise ValueError(
                f"pseudo_inputs_per_component must divide the number of pseudo-inputs {total}, "
                f"but is {per_component}"
            )
        dtype = torch.promote_types(first.dtype, torch.float32)
        super().__init__(total // per_component, latent_dim, per_component, options, dtype)

    _free_centers = False

    def _pseudo_inputs(self) -> Iterable[nn.Parameter]:
        if isinstance(self.pseudo_inputs, nn.Module):
            return self.pseudo_inputs.parameters()
        return (self.pseudo_inputs,)

    def _centers(self, encoder: Encoder | None, differentiable: bool) -> tuple[Tensor, Tensor]:
        shape = (self.num_components * self.pseudo_inputs_per_component, self.latent_dim)
        u, joint = self.pseudo_inputs, self.joint
        return centers_at(u, encoder, shape, differentiable=differentiable, joint=joint)

    def encode(self, x: Tensor, encoder: Encoder) -> tuple[Distribution, Encoder]:
        """Return a batch's posteriors, and an encoder for :meth:`kl` in the same training step.

        See :meth:`vmm_fast.priors.Prior.encode`.
        """
        if self._kept_mixture() is not None:
            return encoder(x), encoder
        return encode_with(self.pseudo_inputs, x, encoder, self.joint)
