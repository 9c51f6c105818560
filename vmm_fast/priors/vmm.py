"""The VampPrior Mixture Model (Stirn & Knowles, arXiv 2402.04412)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from vmm_fast.priors.base import check_integer
from vmm_fast.priors.bayesian_mixture import BayesianMixturePrior
from vmm_fast.priors.pseudo_inputs import PseudoInputsPrior

__all__ = ["VMMPrior"]


class VMMPrior(PseudoInputsPrior, BayesianMixturePrior):
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
        How :meth:`update` moves weights, concentration and precisions.
    responsibility_gradient : bool
        Whether the gradient of :meth:`map_loss` runs through the responsibilities as well, which
        rewards crisp assignments (the authors' rule), or not (expectation maximisation).
    data_size : int or None
        n, by which the parameter priors are divided; None is the batch size, the authors' weight.
        The number of training points keeps more components.
    learning_rate : float
        Of the private Adam.
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
    """

    def __init__(
        self,
        pseudo_inputs: Tensor | nn.Module,
        latent_dim: int,
        pseudo_inputs_per_component: int = 1,
        weights: str = "dirichlet",
        inference: str = "gradient",
        responsibility_gradient: bool = True,
        data_size: int | None = None,
        learning_rate: float = 1e-3,
        joint: bool = False,
        map_prior: str = "learnt",
        concentration: float = 1.0,
        discount: float = 0.0,
        statistics_rate: float = 0.003,
    ):
        nn.Module.__init__(self)
        total, dtype = self._set_pseudo_inputs(pseudo_inputs)
        pseudo_inputs_per_component = check_integer(
            "pseudo_inputs_per_component", pseudo_inputs_per_component
        )
        if total % pseudo_inputs_per_component:
            raise ValueError(
                f"pseudo_inputs_per_component must divide the number of pseudo-inputs {total}, "
                f"but is {pseudo_inputs_per_component}"
            )
        BayesianMixturePrior.__init__(
            self,
            total // pseudo_inputs_per_component,
            latent_dim,
            pseudo_inputs_per_component=pseudo_inputs_per_component,
            weights=weights,
            inference=inference,
            responsibility_gradient=responsibility_gradient,
            data_size=data_size,
            learning_rate=learning_rate,
            joint=joint,
            map_prior=map_prior,
            concentration=concentration,
            discount=discount,
            statistics_rate=statistics_rate,
            dtype=dtype,
        )

    _free_centers = False

    def _gradient_parameters(self) -> Iterable[nn.Parameter]:
        if isinstance(self.pseudo_inputs, nn.Module):
            return self.pseudo_inputs.parameters()
        return (self.pseudo_inputs,)
