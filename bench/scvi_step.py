"""What a training step of scVI costs under each prior, next to stock SCVI.

A step is that of Lightning without Lightning: loss, backward pass, the network's Adam, then the
prior's empirical-Bayes step. Counts are drawn at random, as sparse as real ones: nothing depends on
their values. Priors take turns at every batch size; the warm-up under N(0, I) is over.

Where the time of a step within Lightning goes is told by :mod:`bench.scvi_epoch`.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch

from bench import scvi_epoch
from bench.records import Row
from bench.timing import sampler, take_turns, threads

MODE = "scVI training step"
STOCK = "SCVI"
PRIORS = {
    "VMM": {"prior": "vmm"},
    "VMM, scvi-tools' likelihood": {"prior": "vmm", "fused_likelihood": False},
    "VMM, 50 components": {"prior": "vmm", "n_components": 50},
    "GMM": {"prior": "gmm"},
    "VampPrior": {"prior": "vamp"},
    "same network, N(0, I)": {"prior": "normal"},
}


class Plan(NamedTuple):
    """The cells, the batch sizes, and how long the priors take turns."""

    genes: int
    batches: tuple[int, ...]
    repeats: int
    seconds: float


FULL = Plan(2000, (128, 512), 10, 60.0)
QUICK = Plan(40, (16,), 3, 0.0)


def make_step(name: str, plan: Plan, batch_size: int) -> Callable[[], None]:
    """Give the call that trains one step on the next batch."""
    from anndata import AnnData
    from scvi.model import SCVI

    from vmm_fast.scvi import VMMSCVI

    generator = np.random.default_rng(0)
    counts = generator.poisson(0.3 * generator.gamma(0.3, 1, plan.genes), (2048, plan.genes))
    adata = AnnData(counts.astype(np.float32))
    adata.obs["batch"] = generator.integers(3, size=len(counts)).astype(str)
    torch.manual_seed(0)
    kind = SCVI if name == STOCK else VMMSCVI
    kind.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata) if name == STOCK else VMMSCVI(adata, **PRIORS[name])
    if name != STOCK:
        model._start_pseudo_cells()
    module = model.module.train()
    optimizer = model._training_plan_cls(module).configure_optimizers()["optimizer"]
    batches = list(model._make_data_loader(adata, batch_size=batch_size, shuffle=False))[:4]
    steps = 0

    def step() -> None:
        nonlocal steps
        with nullcontext() if name == STOCK else module.decoding_for_loss():
            loss = module(batches[steps % len(batches)], loss_kwargs={"kl_weight": 1.0})[2].loss
        steps += 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if name != STOCK and module.prior is not None:
            module.update_prior()

    return step


def rows(plan: Plan, thread_count: int) -> Iterator[Row]:
    """A row for each prior and batch size."""
    with threads(thread_count):
        for size in plan.batches:
            samplers = {name: sampler(make_step(name, plan, size)) for name in (STOCK, *PRIORS)}
            timings = take_turns(samplers, repeats=plan.repeats, seconds=plan.seconds)
            for name, timing in timings.items():
                yield {
                    "part": "scvi-step",
                    "dtype": "float32",
                    "threads": thread_count,
                    "mode": MODE,
                    "provider": name,
                    "B": size,
                    "genes": plan.genes,
                    "times stock": round(timing["p50"] / timings[STOCK]["p50"], 3),
                    **timing,
                }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options that no other part has: none."""


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Rows for the command line's options; none where scvi-tools is not installed."""
    try:
        import scvi
    except ImportError:
        print('scvi-step is left out: pip install "vmm-fast[scvi]"')
        return
    warnings.filterwarnings("ignore")
    scvi.settings.verbosity = logging.ERROR
    yield from rows(QUICK if args.quick else FULL, args.threads)
    yield from scvi_epoch.rows(scvi_epoch.QUICK if args.quick else scvi_epoch.FULL)
