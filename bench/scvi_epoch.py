"""Where the time of a training epoch of scVI goes, phase by phase, before and after this package.

Epochs are real ones: ``train`` of the models in memory, with Lightning, loader and logging, and
without the warm-up under N(0, I). Cells are those of :mod:`bench.atlas`.

- SCVI with N(0, I), as it comes.
- VMM, before: VMMSCVI with scvi-tools' own likelihood and logging, and with Adam as torch sets it,
  which on a CPU goes through the parameters one after the other.
- VMM: VMMSCVI as it is.
- same network, N(0, I): VMMSCVI(prior="normal").

The time is the process's CPU time, since the machine is shared. The calls that a phase consists of
are wrapped while an epoch runs. There is one clock; at each moment it counts for the phase entered
last and not left yet, so that phases add up to the epoch and what nothing wraps, Lightning's own,
is the rest:

- reading: ``next`` of the loader's iterator, which makes the counts dense.
- encoder and decoder, forward: ``inference`` and ``generative``.
- likelihood: what ``loss`` does besides the KL divergence. It may take from the decoder what it
  likes; a softmax that it takes over is its own.
- KL divergence: ``torch.distributions.kl_divergence``, with the encoding of the pseudo-cells.
- optimizer: ``step`` without the closure, which is the rest of the step, and ``zero_grad``.
- prior's step: ``update_prior``.
- metrics and logging: ``log``, ``log_dict`` and ``compute_and_log_metrics``.

The backward pass is one call. Autograd numbers its nodes as they are made and goes through them by
falling numbers, so that it comes back through the phases one after the other, the last one first; a
hook on the highest node of each tells the clock. To find these nodes takes time of its own, which
is counted apart and left out.

Models take turns, and so do epochs with phases and without. Phases are those of the epoch whose sum
is the median, in seconds a step.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from statistics import median, median_low
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench import atlas
from bench.measurement import Run
from bench.records import Row
from bench.timing import quantiles, threads

if TYPE_CHECKING:
    from anndata import AnnData

MODE = "scVI training epoch by phase"
STOCK, BEFORE, VMM, NORMAL = "SCVI", "VMM, before", "VMM", "same network, N(0, I)"

READING, REST = "reading, making dense", "rest of Lightning"
LIKELIHOOD, LIKELIHOOD_BACKWARD = "likelihood, forward", "likelihood, backward"
KL, KL_BACKWARD = "KL divergence, forward", "KL divergence, backward"
ENCODER, DECODER, NETWORK_BACKWARD = "encoder, forward", "decoder, forward", "network, backward"
OPTIMIZER, PRIOR, LOGGING = "optimizer", "prior's step", "metrics and logging"
PHASES = {  # with their colours: forward and backward of a part share a hue
    READING: "0.45",
    ENCODER: "#9ecae1",
    DECODER: "#4292c6",
    LIKELIHOOD: "#fdae6b",
    LIKELIHOOD_BACKWARD: "#e6550d",
    KL: "#a1d99b",
    KL_BACKWARD: "#31a354",
    NETWORK_BACKWARD: "#084594",
    OPTIMIZER: "#9e9ac8",
    PRIOR: "#54278f",
    LOGGING: "#e7ba52",
    REST: "0.8",
}
_BACK = {LIKELIHOOD: LIKELIHOOD_BACKWARD, KL: KL_BACKWARD}
_MEASURING = "finding nodes"


class Clock:
    """CPU seconds of each phase; those of one that is entered within another are its alone."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((*PHASES, _MEASURING), 0.0)
        self._entered = [REST]
        self._last = time.process_time()
        self._starts: list[tuple[int, str]] = []  # number of the next node, and whose it is

    def stop(self) -> None:
        """Count until now for the phase that was entered last."""
        now = time.process_time()
        self.seconds[self._entered[-1]] += now - self._last
        self._last = now

    def _mark(self) -> None:
        self._starts.append((torch._C._autograd._get_sequence_nr(), self._entered[-1]))

    def within(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call that counts for a phase."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.stop()
            self._entered.append(phase)
            self._mark()
            try:
                return call(*args, **kwargs)
            finally:
                self.stop()
                self._entered.pop()
                self._mark()

        return timed

    def step(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the optimizer's step, whose closure does not count for it."""
        timed = self.within(OPTIMIZER, call)
        return lambda closure: timed(self.within(REST, closure))

    def backward(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the backward pass, which counts for the phases that it comes through."""

        def in_phases(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            hooks = [
                node.register_prehook(lambda _, phase=phase: self._go_over_to(phase))
                for node, phase in self._last_nodes(loss)
            ]
            self._go_over_to(LIKELIHOOD_BACKWARD)  # ``loss`` ends with it
            try:
                call(loss, *args, **kwargs)
            finally:
                self._go_over_to(_MEASURING)
                for hook in hooks:
                    hook.remove()
                self._starts.clear()

        return self.within(_MEASURING, in_phases)

    def _go_over_to(self, phase: str) -> None:
        self.stop()
        self._entered[-1] = phase

    def _last_nodes(self, loss: Tensor) -> list[tuple[Any, str]]:
        """Return the node of each phase that the backward pass comes to first."""
        starts = [number for number, _ in self._starts]
        last: dict[int, tuple[int, Any]] = {}
        nodes, seen = [loss.grad_fn], {loss.grad_fn}
        while nodes:
            node = nodes.pop()
            number = node._sequence_nr()
            at = bisect_right(starts, number) - 1
            if number > last.get(at, (-1, None))[0]:
                last[at] = number, node
            for following, _ in node.next_functions:
                # Where a gradient is accumulated, right after the node that has it, is no phase.
                inner = following is not None and following.next_functions
                if inner and following not in seen:
                    seen.add(following)
                    nodes.append(following)
        return [
            (node, _BACK.get(self._starts[at][1], NETWORK_BACKWARD))
            for at, (_, node) in last.items()
        ]


def epoch(model: Any, batch_size: int, *, phases: bool) -> dict[str, float]:
    """Train an epoch; return CPU seconds a step of each phase, or of all as Lightning's rest."""
    from lightning.pytorch.callbacks import Callback
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    learns_prior = hasattr(model.module, "prior")
    patches = ExitStack()

    class Phases(Callback):
        def on_train_start(self, trainer: Any, plan: Any) -> None:
            self.steps = trainer.num_training_batches
            clock = self.clock = Clock()
            if not phases:
                return
            module, (optimizer,) = plan.module, trainer.optimizers
            for of, name, phase in (
                (_BaseDataLoaderIter, "__next__", READING),
                (module, "inference", ENCODER),
                (module, "generative", DECODER),
                (module, "loss", LIKELIHOOD),
                (torch.distributions, "kl_divergence", KL),
                (optimizer, "zero_grad", OPTIMIZER),
                *([(module, "update_prior", PRIOR)] if learns_prior else []),
                (plan, "log", LOGGING),
                (plan, "log_dict", LOGGING),
                (plan, "compute_and_log_metrics", LOGGING),
            ):
                self._replace(of, name, clock.within(phase, getattr(of, name)))
            self._replace(optimizer, "step", clock.step(optimizer.step))
            self._replace(plan, "backward", clock.backward(plan.backward))

        def _replace(self, of: Any, name: str, call: Callable[..., Any]) -> None:
            patches.enter_context(patch.object(of, name, call))

        def on_train_end(self, *_: Any) -> None:
            self.clock.stop()
            patches.close()

    found = Phases()
    model.train(
        1,
        batch_size=batch_size,
        plan_kwargs={"prior_warmup": 0} if learns_prior else {},
        callbacks=[found],
        **SILENT,
    )
    return {name: found.clock.seconds[name] / found.steps for name in PHASES}


# Options of ``train`` for a CPU and no output.
SILENT: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}


def make_model(name: str, adata: AnnData, **options: Any) -> Any:
    """Return a model of the cells: stock SCVI, VMMSCVI, or this as it was before."""
    import scvi
    from scvi.model import SCVI
    from scvi.train import TrainingPlan

    from vmm_fast.cells.quiet import quiet
    from vmm_fast.scvi import VMMSCVI
    from vmm_fast.scvi.training import EmpiricalBayesTrainingPlan

    class PlanBefore(EmpiricalBayesTrainingPlan):
        get_optimizer_creator = TrainingPlan.get_optimizer_creator
        log = TrainingPlan.log

    kind = SCVI if name == STOCK else VMMSCVI
    if name == BEFORE:
        options["fused_likelihood"] = False
    elif name == NORMAL:
        options["prior"] = "normal"
    with quiet():
        kind.setup_anndata(adata, batch_key="batch")
        scvi.settings.seed = 0
        model = kind(adata, **options)
    if name == BEFORE:
        model._training_plan_cls = PlanBefore
    return model


def epochs(models: dict[str, Any], batch_size: int, repeats: int, *modes: bool) -> dict[str, list]:
    """Return the epochs of every model, which take turns, each with phases or without, or both."""
    from vmm_fast.cells.quiet import quiet

    found: dict[str, list] = {name: [] for name in models}
    with threads(1), quiet():
        for turn in range(1 + repeats):
            for name, model in models.items():
                taken = [epoch(model, batch_size, phases=phases) for phases in modes]
                found[name] += [taken] if turn else []  # the first one warms up
    return found


def rows(run: Run) -> Iterator[Row]:
    """Yield a row for each batch size and model."""
    cells, genes = run.choose((10_000, 2000), (200, 40))
    adata = atlas.Atlas(genes=genes).in_memory(cells)
    models = {name: make_model(name, adata) for name in (STOCK, BEFORE, VMM, NORMAL)}
    for size in run.choose((128, 512), (32,)):
        taken = epochs(models, size, run.choose(5, 1), False, True)
        stock = median(plain[REST] for plain, _ in taken[STOCK])
        for name, pairs in taken.items():
            seconds = [plain[REST] for plain, _ in pairs]
            sums = [sum(phases.values()) for _, phases in pairs]
            phases = pairs[sums.index(median_low(sums))][1]
            yield {
                "threads": 1,
                "mode": MODE,
                "provider": name,
                "B": size,
                "genes": genes,
                "cells": cells,
                "phases": phases,
                "phases, over whole": round(sum(phases.values()) / median(seconds), 3),
                "times stock": round(median(seconds) / stock, 3),
                **quantiles(seconds),
            }
