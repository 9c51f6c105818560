"""The empirical-Bayes step inside Lightning."""

from __future__ import annotations

from typing import Any

from scvi.train import TrainingPlan

__all__ = ["EmpiricalBayesTrainingPlan"]


# Of all steps, the most that are spent under N(0, I).
WARMUP_SHARE = 0.3


class EmpiricalBayesTrainingPlan(TrainingPlan):
    """:class:`scvi.train.TrainingPlan` that moves the module's prior after each optimizer step.

    The prior has an optimizer of its own, whose state is in checkpoints; the network's does not
    see the prior's parameters.

    Parameters
    ----------
    module : LatentPrior
    n_epochs_prior_warmup : int
        For how many epochs N(0, I) stands in for a prior that has not been trained yet, but for
        :data:`WARMUP_SHARE` of the steps at most. Under N(0, I) batches come to overlap. A mixture
        lets the clusters of one type, each in its own batch, lie apart where they begin apart: both
        have components, and nothing pulls them together. Where they overlap they share components,
        and to part would cost.
    n_epochs_kl_warmup : int, optional
        None, unlike in scvi-tools: by the number of epochs that large data sets are trained for,
        its 400 would have barely begun.
    **kwargs
        Of :class:`scvi.train.TrainingPlan`.
    """

    def __init__(
        self,
        module: Any,
        *,
        n_epochs_prior_warmup: int = 30,
        n_epochs_kl_warmup: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(module, n_epochs_kl_warmup=n_epochs_kl_warmup, **kwargs)
        self.n_epochs_prior_warmup = n_epochs_prior_warmup
        self._warmup_steps = 0.0
        self._steps_taken = 0

    def on_train_start(self) -> None:
        """Find out how many steps N(0, I) stands in for the prior."""
        super().on_train_start()
        module = self.module
        if module.prior is None or module.prior_learnt or module.frozen:
            return
        share = min(self.n_epochs_prior_warmup / self.trainer.max_epochs, WARMUP_SHARE)
        self._warmup_steps = share * self.trainer.estimated_stepping_batches

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Begin or end the warm-up."""
        super().on_train_batch_start(*args, **kwargs)
        self.module.warming_up = self.global_step < self._warmup_steps

    def on_train_end(self) -> None:
        """Leave the module with its prior."""
        super().on_train_end()
        self.module.warming_up = False

    def configure_optimizers(self) -> dict[str, Any]:
        """Leave out the prior's parameters, which its own optimizer moves."""
        prior = self.module.prior
        hidden = [] if prior is None else [p for p in prior.parameters() if p.requires_grad]
        for parameter in hidden:
            parameter.requires_grad_(False)
        try:
            return super().configure_optimizers()
        finally:
            for parameter in hidden:
                parameter.requires_grad_(True)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Take the empirical-Bayes step, where the network took one (see gradient accumulation)."""
        super().on_train_batch_end(*args, **kwargs)
        if self.module.prior is not None and self.global_step != self._steps_taken:
            self._steps_taken = self.global_step
            self.module.update_prior()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the private optimizer's state."""
        super().on_save_checkpoint(checkpoint)
        if self.module.prior is not None:
            checkpoint["prior_optimizer"] = self.module.prior.get_extra_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        super().on_load_checkpoint(checkpoint)
        if self.module.prior is not None and "prior_optimizer" in checkpoint:
            self.module.prior.set_extra_state(checkpoint["prior_optimizer"])
