"""Training plans of scvi-tools that take the prior's empirical-Bayes step, inside Lightning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from scvi.train import AdversarialTrainingPlan, SemiSupervisedTrainingPlan, TrainingPlan
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import Metric

from vmm_fast.inference.gradient import check_adam_state
from vmm_fast.scvi.loading import CellDataModule

__all__ = [
    "EmpiricalBayes",
    "EmpiricalBayesAdversarialTrainingPlan",
    "EmpiricalBayesSemiSupervisedTrainingPlan",
    "EmpiricalBayesTrainingPlan",
]


def _worst(callback: Any) -> torch.Tensor:
    return torch.tensor(-math.inf if callback.mode == "max" else math.inf)


def _number_of_cells(cells: Any) -> int | None:
    """Return the number of training cells, or None if the user's data module does not tell."""
    if isinstance(cells, CellDataModule):
        return cells.n_train
    indices = getattr(cells, "train_idx", None)  # scvi-tools' own, of cells in memory
    return getattr(cells, "n_obs", None) if indices is None else len(indices)  # and of others


class EmpiricalBayes(LightningModule):
    """Mixin for scvi-tools' training plans: moves the module's prior after each optimizer step.

    The prior has its own optimizer, whose state is in checkpoints. The network's optimizer does not
    see the prior's parameters.

    Parameters
    ----------
    *args
        The module, a :class:`LatentPrior`, and further arguments of the plan.
    prior_warmup : float
        The share of all steps, in [0, 1), in which N(0, I) stands in for a prior that has not been
        trained yet. Under N(0, I) batches come to overlap. Under a mixture, cells of one type that
        begin apart, because they are of different batches, stay apart: each group has components of
        its own, and nothing pulls the groups together. If they overlap, they share components, and
        separating would cost. Early stopping does not end the warm-up. Losses of the warm-up count
        neither for early stopping, nor for the best checkpoint, nor for a learning rate that
        follows the loss.
    n_epochs_kl_warmup : int, optional
        None by default. scvi-tools' default of 400 is far more than the number of epochs that large
        data sets are trained for.
    **kwargs
        Further arguments of the plan.

    Raises
    ------
    ValueError
        If ``prior_warmup`` is not in [0, 1), or not 0 where training has no last step.
    """

    module: Any  # a LatentPrior

    def __init__(
        self,
        *args: Any,
        prior_warmup: float = 0.5,
        n_epochs_kl_warmup: int | None = None,
        **kwargs: Any,
    ):
        if not 0 <= prior_warmup < 1:
            raise ValueError(f"prior_warmup must be in [0, 1), but is {prior_warmup!r}")
        super().__init__(*args, n_epochs_kl_warmup=n_epochs_kl_warmup, **kwargs)
        self.prior_warmup = prior_warmup
        self._warmup_steps = 0
        self._logged: set[str] = set()  # metrics, in this epoch
        self._restored: Any = None  # the prior's state in a checkpoint

    def on_train_start(self) -> None:
        """Determine the number of training cells, and of steps in which N(0, I) stands in."""
        super().on_train_start()
        module = self.module
        if module.prior is not None:
            module.prior.train()  # scvi-tools leaves a trained or loaded module in evaluation mode
            if self._restored is not None:  # weights that were loaded after it let kl forget
                module.prior.set_extra_state(self._restored)
                self._restored = None
        # Any other value was set by the user, or comes from a checkpoint.
        if module.counts_training_cells and module.prior.data_size == module.counted_cells:
            module.counted_cells = _number_of_cells(
                self.trainer.datamodule  # type: ignore[attr-defined]
            )
            module.prior.data_size = module.counted_cells
        if module.prior is None or module.prior_learnt or module.frozen or not self.prior_warmup:
            return
        # Every optimizer's steps count, an adversary's too.
        steps = self.trainer.estimated_stepping_batches * len(self.trainer.optimizers)
        if math.isinf(steps):
            raise ValueError(
                "prior_warmup must be 0 where training has no last step, but is "
                f"{self.prior_warmup!r}: set max_epochs or max_steps"
            )
        self._warmup_steps = int(self.prior_warmup * steps)

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Begin, continue or end the warm-up."""
        super().on_train_batch_start(*args, **kwargs)
        if self._warmup_steps:
            self.module.warming_up = self.global_step < self._warmup_steps
            self._forget_losses()
            if not self.module.warming_up:
                self._warmup_steps = 0

    def _forget_losses(self) -> None:
        """Reset all best losses, so that none under N(0, I) is compared with later ones."""
        trainer = self.trainer
        for stopping in trainer.early_stopping_callbacks:
            stopping.wait_count = 0
            stopping.best_score = _worst(stopping)
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                config.scheduler.best = config.scheduler.mode_worse
                config.scheduler.num_bad_epochs = 0
        for checkpoints in trainer.checkpoint_callbacks:
            if isinstance(checkpoints, ModelCheckpoint) and checkpoints.best_k_models:
                checkpoints.best_model_score = _worst(checkpoints)
                checkpoints.best_k_models = dict.fromkeys(
                    checkpoints.best_k_models, _worst(checkpoints)
                )

    def on_train_epoch_start(self) -> None:
        """Begin to log metrics anew."""
        super().on_train_epoch_start()
        self._logged.clear()

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log a value; metrics of a whole epoch are logged in its first step alone.

        Lightning's method takes half a millisecond. These metrics accumulate by themselves, and are
        read at the end of the epoch.
        """
        once = isinstance(value, Metric) and kwargs.get("on_step") is False
        if once and self._trainer is not None and self._trainer.training:
            if name in self._logged:
                return
            self._logged.add(name)
        super().log(name, value, *args, **kwargs)

    def configure_optimizers(self) -> Any:
        """Return the plan's optimizers, without parameters of the prior, which has its own."""
        prior = self.module.prior
        hidden = [] if prior is None else [p for p in prior.parameters() if p.requires_grad]
        for parameter in hidden:
            parameter.requires_grad_(False)
        try:
            return super().configure_optimizers()
        finally:
            for parameter in hidden:
                parameter.requires_grad_(True)

    def get_optimizer_creator(self) -> Callable[[Iterable[torch.nn.Parameter]], Optimizer]:
        """Return the plan's creator of optimizers; on a CPU, Adam is fused, ten times as fast."""
        create = super().get_optimizer_creator()  # type: ignore[misc]  # the plan has it

        def created(parameters: Iterable[torch.nn.Parameter]) -> Optimizer:
            optimizer: Optimizer = create(parameters)
            if isinstance(optimizer, Adam):
                optimizer.register_load_state_dict_pre_hook(check_adam_state)
                for group in optimizer.param_groups:
                    unset = group["foreach"] is None and group["fused"] is None
                    if unset and all(p.is_cpu for p in group["params"]):
                        group["fused"] = True
            return optimizer

        return created

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the network's step, then the empirical-Bayes step: checkpoints have both or none."""
        super().optimizer_step(*args, **kwargs)
        self._update_prior()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Return the plan's loss; if the plan takes the network's step, take the prior's next."""
        with self.module.decoding_for_loss():
            found = super().training_step(*args, **kwargs)
        if not self.automatic_optimization:
            self._update_prior()
        return found

    def _update_prior(self) -> None:
        if self.module.prior is not None:
            self.module.update_prior()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the prior's optimizer to the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        if self.module.prior is not None:
            checkpoint["prior_optimizer"] = self.module.prior.get_extra_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the state of the prior's optimizer."""
        super().on_load_checkpoint(checkpoint)
        if self.module.prior is not None and "prior_optimizer" in checkpoint:
            self.module.prior.set_extra_state(checkpoint["prior_optimizer"])
            self._restored = checkpoint["prior_optimizer"]

    def check_prior_optimizer(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError unless a checkpoint's prior has the options and rate of this one."""
        prior = self.module.prior
        if prior is not None and prior.get_extra_state():
            prior.check_same_run(checkpoint.get("prior_optimizer"))


class EmpiricalBayesTrainingPlan(EmpiricalBayes, TrainingPlan):
    """:class:`scvi.train.TrainingPlan` with the prior's own step."""


class EmpiricalBayesSemiSupervisedTrainingPlan(EmpiricalBayes, SemiSupervisedTrainingPlan):
    """:class:`scvi.train.SemiSupervisedTrainingPlan` with the prior's own step."""


class EmpiricalBayesAdversarialTrainingPlan(EmpiricalBayes, AdversarialTrainingPlan):
    """:class:`scvi.train.AdversarialTrainingPlan` with the prior's own step."""
