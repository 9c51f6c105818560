"""Training as a command does it: quietly, in the processes of torchrun, with progress on stderr.

What Lightning and torch raise becomes one of few errors, and Ctrl-C and SIGTERM end training alike.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import scvi
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

from vmm_fast._errors import InputError
from vmm_fast._stopping import Terminated
from vmm_fast._text import counted, print_progress
from vmm_fast.cells.processes import Processes, processes_of_run
from vmm_fast.cells.quiet import quiet
from vmm_fast.inference.processes import telling_of_lost_processes
from vmm_fast.metrics import ACTIVE_SHARE

try:
    import resource
except ImportError:  # Windows: peak memory is not told there
    resource = None  # type: ignore[assignment]

BAR_SECONDS = 0.5  # between two updates of the progress bar
# How long to wait for a process that hangs: longer than to read a window or to write a checkpoint.
PATIENCE = timedelta(minutes=10)


class Progress(Callback):
    """A callback that records the history of training and shows progress.

    Checkpoints contain the history.
    """

    def __init__(self, progress: bool) -> None:
        self.progress = progress
        self.bar: Any = None
        self.history: dict[str, list[float]] = {}
        self.seconds = 0.0
        self.epoch = 0
        self.stopped_by: type[KeyboardInterrupt] | None = None
        self._since = self._shown = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds of training, including those before the run was stopped and resumed."""
        return self.seconds + time.monotonic() - self._since

    def state_dict(self) -> dict[str, Any]:
        """Return the history, for a checkpoint."""
        return {"history": self.history, "seconds": self.elapsed, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the history of a checkpoint."""
        self.history, self.seconds, self.epoch = (
            state[name] for name in ("history", "seconds", "epoch")
        )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self._since = self._shown = time.monotonic()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Show the bar, on a terminal."""
        if self.progress and sys.stderr.isatty():
            self.bar = _bar(trainer.num_training_batches * trainer.max_epochs, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bar now and then."""
        now = time.monotonic()
        if self.bar is not None and now - self._shown >= BAR_SECONDS:
            self._show(trainer)
            self._shown = now

    def _show(self, trainer: Any) -> None:
        parts = [f"epoch {self.epoch + 1}/{trainer.max_epochs}"]
        if "elbo_train" in self.history:
            parts.append(f"ELBO {-self.history['elbo_train'][-1]:.1f}")
        parts.append(_active(trainer))
        if resource is not None:
            parts.append(f"{_peak_memory():.1f} GiB")
        self.bar.set_description_str(", ".join(parts), refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    def close(self) -> None:
        """Leave the bar as it is, so that other lines may follow."""
        if self.bar is not None:
            self.bar.close()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the epoch's losses; print a line where there is no bar."""
        self.epoch += 1
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        # Lightning's own mean over an epoch is lost if a run is stopped within it; the ELBO is not.
        metrics = {name: x for name, x in metrics.items() if not name.startswith("train_")}
        loss = metrics["elbo_train"]
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} in epoch {self.epoch}")
        for name, value in metrics.items():
            self.history.setdefault(name, []).append(value)
        if self.progress and self.bar is None:
            text = f"ELBO {-loss:.1f}, {_active(trainer)}"
            print_progress(self.epoch, trainer.max_epochs, self.elapsed, text)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Keep what stopped training: Lightning exits instead of raising it."""
        if isinstance(exception, KeyboardInterrupt):
            self.stopped_by = type(exception)
        elif isinstance(exception, SIGTERMException):
            self.stopped_by = Terminated


def _active(trainer: Any) -> str:
    """Return the number of active components, or that the prior is not in use yet."""
    module = trainer.lightning_module.module
    if module.warming_up:
        return "warm-up"
    active = int((module.components().log_weights.exp() > ACTIVE_SHARE).sum())
    return counted(active, "active component")


@contextmanager
def training(during: Progress, seed: int) -> Iterator[None]:
    """Train quietly, with random numbers of this seed; `during` is a callback.

    Each process has its own noise. Its parameters are those of the first.

    Raises
    ------
    InputError
        As the code inside.
    FloatingPointError
        If training diverges.
    KeyboardInterrupt
        On Ctrl-C, and one of :mod:`vmm_fast._stopping` on SIGTERM and SIGHUP.
    """
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        processes = processes_of_run()
        alone = _in_one_process() if processes.number == 1 else nullcontext()
        with torch.random.fork_rng(devices=[]), quiet(), alone:
            scvi.settings.seed = (seed + processes.rank) % 2**32
            yield
    except SystemExit:
        # On Ctrl-C Lightning exits and disables further Ctrl-C; on SIGTERM it exits with status 0.
        if during.stopped_by is None:
            raise
        signal.signal(signal.SIGINT, on_interrupt)
        raise during.stopped_by from None
    except InputError:
        raise
    except ValueError as error:
        # torch's distributions, or the mixture, refuse parameters that are nan or infinite.
        refusals = ("to satisfy the constraint", "no positive-definite covariance")
        if not any(text in str(error) for text in refusals):
            raise
        message = f"a distribution's parameter is nan or inf in epoch {during.epoch + 1}"
        raise FloatingPointError(message) from None
    finally:
        during.close()


def trainer_options(processes: Processes, *plugins: Any) -> dict[str, Any]:
    """Return options of Lightning's trainer: where to train, and how processes work together."""
    if processes.number == 1:
        return {"devices": 1, "plugins": [*plugins, LightningEnvironment()]}
    return {
        "devices": processes.on_this_machine,
        "num_nodes": processes.number // processes.on_this_machine,
        "strategy": DDPStrategy(find_unused_parameters=True, timeout=PATIENCE),
        "plugins": [*plugins, TorchElasticEnvironment()],
    }


def part_from_others(processes: Processes) -> None:
    """End the work of several processes together; each goes on alone."""
    if processes.number > 1:
        with telling_of_lost_processes():
            distributed.barrier()  # one that leaves before the others would break their connections
        distributed.destroy_process_group()


@contextmanager
def _in_one_process() -> Iterator[None]:
    """Let Lightning train in one process, however many tasks SLURM has started.

    Lightning takes a job of the name "interactive" for one whose processes are started by hand.
    """
    before = os.environ.get("SLURM_JOB_NAME")
    os.environ["SLURM_JOB_NAME"] = "interactive"
    try:
        yield
    finally:
        if before is None:
            del os.environ["SLURM_JOB_NAME"]
        else:
            os.environ["SLURM_JOB_NAME"] = before


def _bar(steps: int, initial: int) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=steps,
        initial=initial,
        bar_format="{desc} |{bar}| ETA {remaining}",
        dynamic_ncols=True,
        mininterval=0,  # it is looked at seldom enough
        miniters=1,
    )


def _peak_memory() -> float:
    """Return the peak memory of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
