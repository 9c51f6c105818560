"""Checkpoints of training, in one process or several, that it goes on from as if never stopped.

Lightning's own have parameters, optimizers and how far training has come. What they lack differs
between processes, and is gathered from all of them: the state of the generators of random numbers,
and the sums of the losses of an epoch that has begun.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from scvi.train._metrics import ElboMetric

from vmm_fast._files import write_atomically
from vmm_fast.data import InputError
from vmm_fast.inference.processes import number_of_processes

__all__ = ["CheckpointFile", "Checkpoints"]

STATES = "state of each process"
STEPS_BETWEEN_LOOKS = 16  # at the clocks of several processes, which have to wait for each other


class CheckpointFile(TorchCheckpointIO):
    """Lightning's checkpoints, but written whole or not at all, on any file system."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`, in place of what is there.

        Raises
        ------
        InputError
            If it cannot be written.
        """
        try:
            write_atomically(path, lambda file: torch.save(checkpoint, file))
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read it.

        Raises
        ------
        InputError
            If it is not there, or damaged.
        """
        if not os.path.isfile(path):
            raise InputError(f"{path}: must be a checkpoint to go on from, is no file")
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except Exception:  # pickle raises of all kinds
            raise InputError(f"{path}: is damaged and cannot be read") from None


class Checkpoints(Callback):
    """Write a checkpoint amid an epoch or after it; with it training goes on where it was.

    On a CPU with one thread a process it comes to the same bits as training that was never stopped.
    Cells must come from a :class:`vmm_fast.scvi.CellDataModule`, which finds its place in a pass::

        keep = Checkpoints("atlas.ckpt", seconds=600)
        model.train(10, datamodule=cells, callbacks=[keep])
        # Later, with a new model that was made in the same way:
        model.train(10, datamodule=cells, callbacks=[keep], ckpt_path="atlas.ckpt")

    With several processes, as many must go on. The first writes the file, all read it.

    Parameters
    ----------
    path : str or os.PathLike
        File to write, whole or not at all, in place of the last one.
    seconds : float
        Write if the last one is as long ago: after an epoch, and amid it. Several processes, which
        must write together, look every 16 steps. The end of the last epoch is always written.
    steps : int, optional
        Write after every so many optimizer steps, besides.

    Raises
    ------
    InputError
        While training, if `path` cannot be written; as training begins, if ``ckpt_path`` is not
        there, damaged, of another number of processes, or was not written by this.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, seconds: float = 30, steps: int | None = None
    ):
        self.path, self.seconds, self.steps = Path(path), seconds, steps
        self._loaded: dict[str, Any] | None = None
        self._written = time.monotonic()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let files be written whole or not at all, unless there is a plugin that writes them."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFile()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count the seconds."""
        self._written = time.monotonic()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add what differs between processes; all of them must take part."""
        states: list[Any] = [_state(pl_module)] * number_of_processes()
        if len(states) > 1:
            dist.all_gather_object(states, states[0])
        checkpoint[STATES] = states

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep this process's part until the first batch."""
        states, path = checkpoint.get(STATES), trainer.ckpt_path
        if states is None:
            raise InputError(
                f"{path}: must be a checkpoint with the state of random numbers, has none: it was "
                "not written by vmm_fast.scvi.Checkpoints"
            )
        if len(states) != trainer.world_size:
            raise InputError(
                f"{path}: must go on in as many processes as wrote it, {len(states)}, is given "
                f"{trainer.world_size}"
            )
        self._loaded = states[trainer.global_rank]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Restore what was loaded; not before, for what comes before the first batch draws, too."""
        if self._loaded is not None:
            _restore(pl_module, self._loaded)
            self._loaded = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write amid an epoch."""
        # The last batch's comes after the losses of the cells held out.
        if batch_idx + 1 < trainer.num_training_batches:
            step = trainer.global_step
            if (self.steps and step % self.steps == 0) or self._is_time(trainer, step):
                self._write(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write after an epoch."""
        if trainer.current_epoch + 1 == trainer.max_epochs or self._is_time(trainer):
            self._write(trainer)

    def _is_time(self, trainer: Any, step: int = 0) -> bool:
        """Whether it is by the clock of any process: all write or none."""
        if trainer.world_size > 1 and step % STEPS_BETWEEN_LOOKS:
            return False
        is_time = time.monotonic() - self._written >= self.seconds
        return trainer.strategy.reduce_boolean_decision(is_time, all=False)

    def _write(self, trainer: Any) -> None:
        trainer.save_checkpoint(self.path)
        self._written = time.monotonic()


def _losses(plan: Any) -> list[ElboMetric]:
    return [metric for metric in plan.modules() if isinstance(metric, ElboMetric)]


def _state(plan: Any) -> dict[str, Any]:
    """What of training is this process's own."""
    state: dict[str, Any] = {
        "random": torch.get_rng_state(),
        "losses": [
            {name: value.cpu() for name, value in metric.metric_state.items()}
            for metric in _losses(plan)
        ],
    }
    if plan.device.type == "cuda":
        state["random on the GPU"] = torch.cuda.get_rng_state(plan.device)
    return state


def _restore(plan: Any, state: dict[str, Any]) -> None:
    torch.set_rng_state(state["random"])
    if plan.device.type == "cuda" and "random on the GPU" in state:
        torch.cuda.set_rng_state(state["random on the GPU"], plan.device)
    for metric, values in zip(_losses(plan), state["losses"], strict=True):
        for name, value in values.items():
            setattr(metric, name, value.to(metric.device))
