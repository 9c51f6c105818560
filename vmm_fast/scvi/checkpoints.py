"""Checkpoints from which training goes on as if it had never stopped, in one process or several.

Lightning's own checkpoints have parameters, optimizers and the progress of training. They lack what
differs between processes: the state of the generators of random numbers, and the sums of losses of
the current epoch. Here these are gathered from all processes.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from scvi.train._metrics import ElboMetric
from torch.optim import Adam, Optimizer

from vmm_fast._checks import check_integer
from vmm_fast._errors import InputError
from vmm_fast._files import load_checked, save_atomically
from vmm_fast._schema import (
    anything,
    check,
    flag,
    generator_state,
    like,
    list_of,
    plain,
    table,
    tensor,
    text,
    weights_of,
    whole,
)
from vmm_fast.inference.gradient import check_adam_state, check_same_settings
from vmm_fast.inference.processes import number_of_processes
from vmm_fast.scvi.loading import CellDataModule
from vmm_fast.scvi.training import EmpiricalBayes

__all__ = ["CheckpointFile", "Checkpoints"]

STATES = "state of each process"
RUN = "cells and settings"  # of the run that wrote the checkpoint
STOPPED = "stopped"  # whether that run ended before its last epoch
LIGHTNING = "pytorch-lightning_version"
GPU_STATE = tensor(torch.uint8, [16])
OF_A_RUN = table(
    {
        STATES: list_of(anything),
        RUN: table({}, plain),
        STOPPED: flag,
        "state_dict": table({}, tensor(finite=False)),
    }
)
STEPS_BETWEEN_LOOKS = 16  # steps after which several processes compare their clocks, which is slow


class CheckpointFile(TorchCheckpointIO):
    """Lightning's checkpoint files, but written whole or not at all, on any file system.

    Attributes
    ----------
    check : callable or None
        Called with the path and the checkpoint that was read, before anything is restored from it.
    """

    check: Callable[[Any, dict[str, Any]], None] | None = None

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`, and replace any file there.

        Raises
        ------
        InputError
            If it cannot be written.
        """
        try:
            save_atomically(path, checkpoint)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read a checkpoint and check it.

        Raises
        ------
        InputError
            If the file is absent, damaged or no checkpoint of training, or ``check`` refuses it.
        """
        if not os.path.isfile(path):
            raise InputError(f"{path}: must be a checkpoint to go on from, but is no file")
        try:
            checkpoint = load_checked(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: is damaged and cannot be read: {error}") from None
        if not {LIGHTNING, "state_dict"} <= checkpoint.keys():
            raise InputError(f"{path}: is no checkpoint of training")
        if self.check is not None:
            self.check(path, checkpoint)
        return checkpoint


class Checkpoints(Callback):
    """Callback that writes checkpoints, during an epoch or after it, from which training goes on.

    A checkpoint is written right after an optimizer step or at the end of an epoch, and when
    training ends: after its last epoch, or earlier by ``max_steps``, ``max_time`` or early
    stopping. A run that had ended and is resumed ends at once, with the same result. There are two
    differences from training that was never stopped. If a file was written by the clock after an
    epoch, early stopping has not yet seen that epoch. And training that ``max_steps`` ended just
    after an epoch is not meant to be made longer.

    On a CPU with one thread a process, the results have the same bits as without the stop. Cells
    must come from a :class:`vmm_fast.scvi.CellDataModule`, which finds its place in an epoch::

        keep = Checkpoints("atlas.ckpt", seconds=600)
        model.train(10, datamodule=cells, callbacks=[keep])
        # Later, with a new model that was made in the same way:
        model.train(10, datamodule=cells, callbacks=[keep], ckpt_path="atlas.ckpt")

    With several processes, a resumed run needs the same number. The first writes the file, all read
    it.

    Parameters
    ----------
    path : str or os.PathLike
        File to write, whole or not at all; each checkpoint replaces the last one.
    seconds : float
        Time between two checkpoints, during an epoch or at its end. Several processes must write
        together, and compare their clocks every 16 steps.
    steps : int, optional
        Also write after every so many optimizer steps.

    Raises
    ------
    ValueError
        If ``seconds`` is negative or no number, or ``steps`` no integer of at least 1.
    InputError
        During training, if `path` cannot be written. When training begins, if ``ckpt_path`` is
        absent or damaged, was not written by this callback, or comes from a run with another number
        of processes, other cells, another batch size or another model.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, seconds: float = 30, steps: int | None = None
    ):
        if not seconds >= 0:
            raise ValueError(f"seconds must be at least 0, but is {seconds!r}")
        self.path, self.seconds = Path(path), seconds
        self.steps = None if steps is None else check_integer("steps", steps)
        self._begin()

    def _begin(self) -> None:
        """Forget any earlier run."""
        self._loaded: dict[str, Any] | None = None
        self._written = time.monotonic()
        self._step = 0  # before the current batch
        # Step of the last file, and whether training ended there.
        self._kept: tuple[int, bool] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Write files whole or not at all, unless another plugin writes them; check those read."""
        self._begin()
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFile()
        if isinstance(trainer.strategy.checkpoint_io, CheckpointFile):
            trainer.strategy.checkpoint_io.check = partial(_check_all, trainer, pl_module)
        # Timers first, so that a time limit is seen right after the batch. The order of the others
        # stays: only the first process may have a bar, whose losses wait for the other processes.
        trainer.callbacks = sorted(trainer.callbacks, key=lambda each: not isinstance(each, Timer))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget what was loaded; it is still there if the run had already ended."""
        self._begin()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Forget what was loaded."""
        self._begin()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self._written = time.monotonic()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start counting steps at the step of the checkpoint."""
        self._step = trainer.global_step

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add to the checkpoint what differs between processes; all of them must take part."""
        states: list[Any] = [_state(pl_module)] * number_of_processes()
        if len(states) > 1:
            dist.all_gather_object(states, states[0])
        checkpoint[STATES], checkpoint[RUN] = states, _run(trainer)
        # A run that a time limit ended can go on if it is given more time.
        checkpoint[STOPPED] = trainer.should_stop and not any(map(_is_over, trainer.callbacks))

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Check a checkpoint, and keep this process's part of it until the first batch."""
        # Checked again, since another plugin may have read the file.
        _check(trainer, pl_module, trainer.ckpt_path, checkpoint)
        self._loaded = checkpoint[STATES][trainer.global_rank]
        trainer.should_stop = trainer.should_stop or checkpoint[STOPPED]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Restore what was loaded: not earlier, because random numbers are drawn before this."""
        if self._loaded is not None:
            _restore(pl_module, self._loaded)
            self._loaded = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write during an epoch, but only after a step: an accumulated gradient would be lost."""
        before, step = self._step, trainer.global_step
        self._step = step
        # The checkpoint of the last batch comes later, after the losses of held-out cells.
        if step == before or batch_idx + 1 >= trainer.num_training_batches:
            return
        # An end during an epoch must not look like the epoch's end: training may be made longer.
        by_steps = self.steps is not None and step // self.steps > before // self.steps
        looks = trainer.world_size == 1 or (
            step // STEPS_BETWEEN_LOOKS > before // STEPS_BETWEEN_LOOKS
        )
        if by_steps or self._is_end(trainer) or (looks and self._is_time(trainer)):
            self._write(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write after an epoch, if it is time or training ends."""
        is_last = trainer.current_epoch + 1 == trainer.max_epochs or self._is_end(trainer)
        if self._kept != (trainer.global_step, True) and (is_last or self._is_time(trainer)):
            self._write(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the final state unless it is written; early stopping acts after other callbacks."""
        step, ended = self._kept or (None, False)
        if step != trainer.global_step or (trainer.should_stop and not ended):
            self._write(trainer)

    def _is_end(self, trainer: Any) -> bool:
        """Return whether training stops here, before its last epoch."""
        stops = trainer.should_stop and trainer.fit_loop._can_stop_early
        return bool(stops or trainer.global_step == trainer.max_steps)

    def _is_time(self, trainer: Any) -> bool:
        """Return whether it is time to write by any process's clock; all processes agree."""
        is_time = time.monotonic() - self._written >= self.seconds
        return bool(trainer.strategy.reduce_boolean_decision(is_time, all=False))

    def _write(self, trainer: Any) -> None:
        trainer.save_checkpoint(self.path)
        self._written = time.monotonic()
        self._kept = trainer.global_step, self._is_end(trainer)


def _is_over(callback: Callback) -> bool:
    """Return whether a callback is a timer without time left."""
    left = callback.time_remaining() if isinstance(callback, Timer) else None
    return left is not None and left <= 0


def _run(trainer: Any) -> dict[str, int]:
    """Return the cells and settings that must be the same in a resumed run."""
    cells = trainer.datamodule
    if not isinstance(cells, CellDataModule):
        return {}
    return {
        "number of cells": int(cells.n_obs),
        "number of genes": int(cells.n_vars),
        "number of cells held out": int(cells.n_val),
        "batch_size": int(cells.batch_size),
        "seed of the cells": int(cells.seed),
    }


def _check(trainer: Any, plan: Any, path: Any, checkpoint: dict[str, Any]) -> None:
    """Raise InputError unless the checkpoint comes from this run."""
    if not {STATES, RUN, STOPPED} <= checkpoint.keys():
        raise InputError(
            f"{path}: must be a checkpoint with the state of random numbers, but has none: it was "
            "not written by vmm_fast.scvi.Checkpoints"
        )
    try:
        check(str(path), checkpoint, OF_A_RUN)
    except ValueError as error:
        raise InputError(str(error)) from None
    processes, of_file, given = len(checkpoint[STATES]), checkpoint[RUN], _run(trainer)
    if processes != trainer.world_size:
        raise InputError(
            f"{path}: must go on in as many processes as wrote it, {processes}, but is given "
            f"{trainer.world_size}"
        )
    _compare(path, of_file, given)
    _compare(path, _shapes(checkpoint["state_dict"]), _shapes(plan.state_dict()))


def _check_all(trainer: Any, plan: Any, path: Any, checkpoint: dict[str, Any]) -> None:
    """Raise InputError unless the checkpoint comes from this run and its whole content is valid.

    Lightning would restore it part by part, and check little.
    """
    _check(trainer, plan, path, checkpoint)
    try:
        check(str(path), checkpoint, partial(_check_content, trainer, plan))
    except ValueError as error:
        raise InputError(str(error)) from None


def _check_content(trainer: Any, plan: Any, name: str, checkpoint: Any) -> None:
    own = table({"random": generator_state, "losses": like(_state(plan)["losses"])}, GPU_STATE)
    entries = {
        LIGHTNING: text,
        "state_dict": weights_of(plan.state_dict()),
        STATES: list_of(own),
        "epoch": whole(),
        "global_step": whole(),
        "callbacks": table({}),
        "optimizer_states": list_of(table({})),
        "lr_schedulers": list_of(table({})),
        "loops": table({"fit_loop": table({})}),
    }
    table(entries)(name, checkpoint)
    optimizers = _optimizers(plan.configure_optimizers())
    list_of(table({}), len(optimizers))("optimizer_states", checkpoint["optimizer_states"])
    for optimizer, state in zip(optimizers, checkpoint["optimizer_states"], strict=True):
        if isinstance(optimizer, Adam):
            check_adam_state(optimizer, state)
            check_same_settings(optimizer, state, scheduled=bool(checkpoint["lr_schedulers"]))
    if isinstance(plan, EmpiricalBayes):
        plan.check_prior_optimizer(checkpoint)
    if checkpoint[LIGHTNING] == lightning.__version__:  # others are converted first
        _check_loops(trainer, checkpoint)
    elif not re.match(r"\d+\.\d+", checkpoint[LIGHTNING]):
        raise ValueError(f"{LIGHTNING} must be a version, but is {checkpoint[LIGHTNING]!r}")


def _check_loops(trainer: Any, checkpoint: dict[str, Any]) -> None:
    """Raise ValueError unless the progress of Lightning's loops is valid and consistent."""
    own = {**trainer.fit_loop.state_dict(), "state_dict": None}
    fit = checkpoint["loops"]["fit_loop"]
    like(own)("loops.fit_loop", fit)
    places = fit["state_dict"]
    if isinstance(trainer.datamodule, CellDataModule):
        batches = whole(0, len(trainer.datamodule.train_dataloader()))
        place = table({"pass": whole(), "done": batches}, None)
        loaders = table({"combined_loader": list_of(place, 1)}, None)
        loaders("loops.fit_loop.state_dict", places)
    automatic, manual = (
        fit[f"epoch_loop.{kind}_optimization.{progress}"]
        for kind, progress in (("automatic", "optim_progress"), ("manual", "optim_step_progress"))
    )
    steps = automatic["optimizer"]["step"]["total"]["completed"] + manual["total"]["completed"]
    epoch = fit["epoch_progress"]["current"]["completed"]
    for key, value in (("global_step", steps), ("epoch", epoch)):
        whole(value, value)(key, checkpoint[key])


def _optimizers(found: Any) -> list[Optimizer]:
    """Return the optimizers in the result of ``configure_optimizers``, which has many forms."""
    if isinstance(found, Optimizer):
        return [found]
    if isinstance(found, dict):
        return _optimizers(found["optimizer"])
    return (
        [each for one in found for each in _optimizers(one)]
        if isinstance(found, tuple | list)
        else []
    )


def _shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {f"shape of {name}": tuple(value.shape) for name, value in state.items()}


def _compare(path: Any, of_file: dict[str, Any], given: dict[str, Any]) -> None:
    for name in {**of_file, **given}:
        was, now = of_file.get(name), given.get(name)
        if was != now:
            raise InputError(
                f"{path}: must go on with the run that wrote it: {name} was {was}, but "
                f"is given {now}"
            )


def _losses(plan: Any) -> list[ElboMetric]:
    return [metric for metric in plan.modules() if isinstance(metric, ElboMetric)]


def _state(plan: Any) -> dict[str, Any]:
    """Return the state of training that is this process's own."""
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
