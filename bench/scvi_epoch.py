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
from functools import partial
from statistics import median, median_low
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from bench import atlas
from bench.records import Row
from bench.timing import quantiles, threads

MODE = "scVI training epoch by phase"
STOCK, BEFORE, VMM, NORMAL = "SCVI", "VMM, before", "VMM", "same network, N(0, I)"

READING = "reading, making dense"
ENCODER, DECODER = "encoder, forward", "decoder, forward"
LIKELIHOOD, LIKELIHOOD_BACKWARD = "likelihood, forward", "likelihood, backward"
KL, KL_BACKWARD = "KL divergence, forward", "KL divergence, backward"
NETWORK_BACKWARD = "network, backward"
OPTIMIZER, PRIOR = "optimizer", "prior's step"
LOGGING, REST = "metrics and logging", "rest of Lightning"
PHASES = (
    *(READING, ENCODER, DECODER, LIKELIHOOD, LIKELIHOOD_BACKWARD, KL, KL_BACKWARD),
    *(NETWORK_BACKWARD, OPTIMIZER, PRIOR, LOGGING, REST),
)
_BACK = {LIKELIHOOD: LIKELIHOOD_BACKWARD, KL: KL_BACKWARD}
_MEASURING = "finding nodes"


class Plan(NamedTuple):
    """The cells, the batch sizes, and how often the models take turns."""

    cells: int
    genes: int
    batches: tuple[int, ...]
    repeats: int


FULL = Plan(10_000, 2000, (128, 512), 5)
QUICK = Plan(200, 40, (32,), 1)


class Clock:
    """CPU seconds of each phase; those of one that is entered within another are its alone."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((*PHASES, _MEASURING), 0.0)
        self._entered = [REST]
        self._last = time.process_time()
        self._starts: list[tuple[int, str]] = []  # number of the next node, and whose it is

    def _tick(self) -> None:
        now = time.process_time()
        self.seconds[self._entered[-1]] += now - self._last
        self._last = now

    def enter(self, phase: str) -> None:
        """Count for a phase from now on."""
        self._tick()
        self._entered.append(phase)
        self._starts.append((torch._C._autograd._get_sequence_nr(), phase))

    def leave(self) -> None:
        """Count again for the phase that was left for this one."""
        self._tick()
        self._entered.pop()
        self._starts.append((torch._C._autograd._get_sequence_nr(), self._entered[-1]))

    def stop(self) -> dict[str, float]:
        """Give the seconds of every phase until now."""
        self._tick()
        return self.seconds

    def within(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Give the call that counts for a phase."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(phase)
            try:
                return call(*args, **kwargs)
            finally:
                self.leave()

        return timed

    def step(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Give the optimizer's step, whose closure does not count for it."""
        timed = self.within(OPTIMIZER, call)
        return lambda closure: timed(self.within(REST, closure))

    def backward(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Give the backward pass, which counts for the phases that it comes through."""

        def timed(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            self.enter(_MEASURING)
            hooks = [
                node.register_prehook(lambda _, phase=phase: self._go_over_to(phase))
                for node, phase in self._last_nodes(loss)
            ]
            self._go_over_to(_BACK[LIKELIHOOD])  # ``loss`` ends with it
            try:
                call(loss, *args, **kwargs)
            finally:
                self._go_over_to(_MEASURING)
                for hook in hooks:
                    hook.remove()
                self.leave()
                self._starts.clear()

        return timed

    def _go_over_to(self, phase: str) -> None:
        self._tick()
        self._entered[-1] = phase

    def _last_nodes(self, loss: Tensor) -> list[tuple[Any, str]]:
        """Give the node of each phase that the backward pass comes to first."""
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
    """Train an epoch; CPU seconds a step of every phase, or of all as the rest of Lightning."""
    from lightning.pytorch.callbacks import Callback
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    class Phases(Callback):
        def on_train_start(self, trainer: Any, plan: Any) -> None:
            self.steps, self.patches = trainer.num_training_batches, ExitStack()
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
            self.patches.enter_context(patch.object(of, name, call))

        def on_train_end(self, *_: Any) -> None:
            self.seconds = self.clock.stop()
            self.patches.close()

    found = Phases()
    learns_prior = hasattr(model.module, "prior")
    model.train(
        1,
        batch_size=batch_size,
        accelerator="cpu",
        plan_kwargs={"prior_warmup": 0} if learns_prior else {},
        callbacks=[found],
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    return {name: found.seconds[name] / found.steps for name in PHASES}


def models(plan: Plan) -> dict[str, Any]:
    """Give the four models of the same cells."""
    import scvi
    from scvi.model import SCVI
    from scvi.train import TrainingPlan

    from vmm_fast.scvi import VMMSCVI
    from vmm_fast.scvi.training import EmpiricalBayesTrainingPlan

    class PlanBefore(EmpiricalBayesTrainingPlan):
        get_optimizer_creator = TrainingPlan.get_optimizer_creator
        log = TrainingPlan.log

    adata = atlas.Atlas(genes=plan.genes).in_memory(plan.cells)
    found = {}
    for name, make in {
        STOCK: SCVI,
        BEFORE: partial(VMMSCVI, fused_likelihood=False),
        VMM: VMMSCVI,
        NORMAL: partial(VMMSCVI, prior="normal"),
    }.items():
        (SCVI if name == STOCK else VMMSCVI).setup_anndata(adata, batch_key="batch")
        scvi.settings.seed = 0
        found[name] = make(adata)
    found[BEFORE]._training_plan_cls = PlanBefore
    return found


def rows(plan: Plan) -> Iterator[Row]:
    """A row for each batch size and model."""
    from vmm_fast.scvi.integration import quiet

    with quiet():
        every = models(plan)
    for size in plan.batches:
        whole: dict[str, list[float]] = {name: [] for name in every}
        parts: dict[str, list[dict[str, float]]] = {name: [] for name in every}
        with threads(1), quiet():
            for turn in range(1 + plan.repeats):
                for name, model in every.items():
                    steps = [epoch(model, size, phases=phases) for phases in (False, True)]
                    if turn:  # the first one warms up
                        whole[name].append(steps[0][REST])
                        parts[name].append(steps[1])
        for name, seconds in whole.items():
            sums = [sum(phases.values()) for phases in parts[name]]
            phases = parts[name][sums.index(median_low(sums))]
            yield {
                "part": "scvi-step",
                "dtype": "float32",
                "threads": 1,
                "mode": MODE,
                "provider": name,
                "B": size,
                "genes": plan.genes,
                "cells": plan.cells,
                "phases": phases,
                "phases, over whole": round(sum(phases.values()) / median(seconds), 3),
                "times stock": round(median(seconds) / median(whole[STOCK]), 3),
                **quantiles(seconds),
            }
