"""The empirical-Bayes step inside Lightning."""

from __future__ import annotations

from typing import Any

from scvi.train import TrainingPlan

__all__ = ["EmpiricalBayesTrainingPlan"]


class EmpiricalBayesTrainingPlan(TrainingPlan):
    """:class:`scvi.train.TrainingPlan` that moves the module's prior after each optimizer step.

    The prior has an optimizer of its own, whose state is in checkpoints; the network's does not
    see the prior's parameters. There is no KL warm-up unless asked for: by the number of epochs
    that large data sets are trained for, scvi-tools' default would have barely begun.
    """

    def __init__(self, module: Any, *, n_epochs_kl_warmup: int | None = None, **kwargs: Any):
        super().__init__(module, n_epochs_kl_warmup=n_epochs_kl_warmup, **kwargs)
        self._steps_taken = 0

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
