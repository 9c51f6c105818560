"""What a training step of the image VAE costs under each prior, next to the same VAE with N(0, I).

A step is that of ``vmm_fast.models.fit``: the variational step with Adam on the network, then the
prior's empirical-Bayes step. Priors take turns at every batch size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bench.eager_prior import EagerVMM
from bench.records import Row
from bench.timing import sampler, take_turns, threads
from vmm_fast import GaussianMixturePrior, StandardNormalPrior, VampPrior, VMMPrior
from vmm_fast.models import VAE
from vmm_fast.priors import Prior

NORMAL = "N(0, I)"
GRADIENT = "VMM, gradient"
CLOSED_FORM = "VMM, closed form"
GMM = "GMM"
VAMP = "VampPrior"
EAGER = "VMM, eager torch"


class Plan(NamedTuple):
    """The network, its batches, and how long the priors take turns."""

    inputs: int
    hidden: tuple[int, ...]
    latent_dim: int
    components: int
    batches: tuple[int, ...]
    repeats: int
    seconds: float


FULL = Plan(784, (500, 500, 2000), 10, 100, (128, 256, 512, 1024), 10, 30.0)
QUICK = Plan(20, (16,), 3, 4, (16,), 3, 0.0)


def make_prior(name: str, plan: Plan, x: Tensor) -> Prior:
    """Build a prior; pseudo-inputs start at training images."""
    start, dim = x[: plan.components], plan.latent_dim
    if name == NORMAL:
        return StandardNormalPrior(dim)
    if name == VAMP:
        return VampPrior(start, dim)
    if name == GMM:
        return GaussianMixturePrior(plan.components, dim, data_size=len(x))
    if name == CLOSED_FORM:
        return VMMPrior(start, dim, data_size=len(x), inference="closed-form")
    prior = VMMPrior(start, dim, data_size=len(x))
    return EagerVMM(prior) if name == EAGER else prior


def make_step(name: str, plan: Plan, x: Tensor, batch_size: int) -> Callable[[], None]:
    """Give the call that trains one step on the next batch."""
    torch.manual_seed(0)
    model = VAE(plan.inputs, plan.latent_dim, make_prior(name, plan, x), hidden=plan.hidden)
    model.to(x.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, eps=1e-7, fused=True)
    batches = x.split(batch_size)
    steps = 0

    def step() -> None:
        nonlocal steps
        terms = model.elbo(batches[steps % len(batches)])
        steps += 1
        optimizer.zero_grad()
        (-terms.elbo.mean()).backward()
        optimizer.step()
        model.prior.update(terms.z.detach(), model.encode)

    return step


def rows(plan: Plan, thread_count: int) -> Iterator[Row]:
    """A row for each prior and batch size."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(4 * max(plan.batches), plan.inputs, generator=generator) - 1
    with threads(thread_count):
        for size in plan.batches:
            samplers = {
                name: sampler(make_step(name, plan, x, size))
                for name in (NORMAL, GRADIENT, CLOSED_FORM, GMM, VAMP, EAGER)
            }
            timings = take_turns(samplers, repeats=plan.repeats, seconds=plan.seconds)
            for name, timing in timings.items():
                yield {
                    "part": "step",
                    "dtype": "float32",
                    "threads": thread_count,
                    "mode": "training step",
                    "provider": name,
                    "B": size,
                    "J": plan.components,
                    "D": plan.latent_dim,
                    **timing,
                }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options that no other part has: none."""


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Rows for the command line's options."""
    return rows(QUICK if args.quick else FULL, args.threads)
