"""Cost of training under each prior: the image VAE next to N(0, I), scVI next to stock SCVI.

A step is that of training: the variational step with Adam on the network, then the prior's
empirical-Bayes step. Priors take turns at every batch size. A step of scVI is that of Lightning
without Lightning, on random counts as sparse as real ones: nothing depends on their values. Whole
epochs of scVI, with Lightning and the loader, are for ``python -m bench atlas``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.eager_prior import EagerVMM
from bench.measurement import SCVI, Check, Measurement, Run, relative
from bench.records import Row, select
from bench.tables import compared
from bench.timing import sampler, threads
from vmm_fast import GaussianMixturePrior, StandardNormalPrior, VampPrior, VMMPrior
from vmm_fast.models import VAE
from vmm_fast.priors import Prior
from vmm_fast.priors.options import MixtureOptions

if TYPE_CHECKING:
    from anndata import AnnData


class Cycle(NamedTuple):
    """A training step whose cost changes: what is timed are whole cycles of the prior's steps."""

    step: Callable[[], None]

    def sample(self, calls: int) -> float:
        """Return the seconds of so many steps of average cost."""
        steps = MixtureOptions.update_every
        return sampler(self.step)(steps * calls) / steps


# --- the image VAE ---

IMAGE_NORMAL, GRADIENT, CLOSED_FORM = "N(0, I)", "VMM, gradient", "VMM, closed form"
EVERY = "VMM, pseudo-inputs move in every call"


class Plan(NamedTuple):
    """The network and its batches."""

    inputs: int
    hidden: tuple[int, ...]
    latent_dim: int
    components: int
    batches: tuple[int, ...]


FULL = Plan(784, (500, 500, 2000), 10, 100, (128, 256, 512, 1024))
QUICK = Plan(20, (16,), 3, 4, (16,))


def image_priors(plan: Plan, x: Tensor) -> dict[str, Prior]:
    """Return all priors; pseudo-inputs start at training images."""
    start, dim = x[: plan.components], plan.latent_dim
    vmm = partial(VMMPrior, start, dim, data_size=len(x))
    return {
        IMAGE_NORMAL: StandardNormalPrior(dim),
        GRADIENT: vmm(),
        CLOSED_FORM: vmm(inference="closed-form"),
        "GMM": GaussianMixturePrior(plan.components, dim, data_size=len(x)),
        "VampPrior": VampPrior(start, dim),
        EVERY: vmm(update_every=1),
        "VMM, eager torch": EagerVMM(vmm(update_every=1)),
    }


def image_step(prior: Prior, plan: Plan, x: Tensor, batch_size: int) -> Callable[[], None]:
    """Return the call that trains one step on the next batch."""
    torch.manual_seed(0)
    model = VAE(plan.inputs, plan.latent_dim, prior, hidden=plan.hidden).to(x.device)
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


def image_rows(run: Run, device: str = "cpu") -> Iterator[Row]:
    """Yield a row for each prior and batch size."""
    plan = run.choose(FULL, QUICK)
    generator = torch.Generator().manual_seed(0)
    x = (2 * torch.rand(4 * max(plan.batches), plan.inputs, generator=generator) - 1).to(device)
    for size in plan.batches:
        priors = image_priors(plan, x).items()
        calls = {name: Cycle(image_step(prior, plan, x, size)) for name, prior in priors}
        case = {"B": size, "J": plan.components, "D": plan.latent_dim}
        yield from run.compare("training step", calls, repeats=5, seconds=30.0, **case)


# --- scVI ---

STOCK, VMM, NORMAL = "SCVI", "VMM", "same network, N(0, I)"
MODE = "scVI training step"
SCVI_PRIORS: dict[str, dict[str, Any]] = {
    VMM: {"prior": "vmm"},
    "VMM, scvi-tools' likelihood": {"prior": "vmm", "fused_likelihood": False},
    EVERY: {"prior": "vmm", "prior_kwargs": {"update_every": 1}},
    "VMM, 50 components": {"prior": "vmm", "n_components": 50},
    "GMM": {"prior": "gmm"},
    "VampPrior": {"prior": "vamp"},
    NORMAL: {"prior": "normal"},
}
# Options of ``train`` for a CPU and no output.
SILENT: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}


def scvi_model(name: str, adata: AnnData) -> Any:
    """Return a model of the cells: stock SCVI, or VMMSCVI with a prior."""
    import scvi
    from scvi.model import SCVI

    from vmm_fast.cells.quiet import quiet
    from vmm_fast.scvi import VMMSCVI

    kind = SCVI if name == STOCK else VMMSCVI
    with quiet():
        kind.setup_anndata(adata, batch_key="batch")
        scvi.settings.seed = 0
        return kind(adata, **SCVI_PRIORS.get(name, {}))


def scvi_step(name: str, adata: AnnData, batch_size: int) -> Callable[[], None]:
    """Return the call that trains one step on the next batch."""
    model = scvi_model(name, adata)
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


def random_cells(cells: int, genes: int) -> AnnData:
    """Return counts of cells in three batches, as sparse as real ones."""
    from anndata import AnnData

    generator = np.random.default_rng(0)
    rates = 0.3 * generator.gamma(0.3, 1, genes)
    adata = AnnData(generator.poisson(rates, (cells, genes)).astype(np.float32))
    adata.obs["batch"] = generator.integers(3, size=cells).astype(str)
    return adata


def scvi_rows(run: Run) -> Iterator[Row]:
    """Yield a row for each prior and batch size."""
    genes = run.choose(2000, 40)
    adata = random_cells(2048, genes)
    for size in run.choose((128, 512), (16,)):
        calls = {name: Cycle(scvi_step(name, adata, size)) for name in (STOCK, *SCVI_PRIORS)}
        yield from run.compare(MODE, calls, repeats=5, seconds=60.0, B=size, genes=genes)


def epochs(models: dict[str, Any], batch_size: int, repeats: int) -> dict[str, list[float]]:
    """Return CPU seconds of epochs of every model, which take turns, on one thread."""
    from lightning.pytorch.callbacks import Callback

    from vmm_fast.cells.quiet import quiet

    class Clock(Callback):
        def on_train_start(self, *_: Any) -> None:
            self.start = time.process_time()

        def on_train_end(self, *_: Any) -> None:
            self.seconds = time.process_time() - self.start

    found: dict[str, list[float]] = {name: [] for name in models}
    with threads(1), quiet():
        for turn in range(1 + repeats):
            for name, model in models.items():
                plan = {} if name == STOCK else {"prior_warmup": 0}
                clock = Clock()
                model.train(1, batch_size=batch_size, plan_kwargs=plan, callbacks=[clock], **SILENT)
                found[name] += [clock.seconds] if turn else []  # the first one warms up
    return found


# --- targets, tables ---

REASON = """\
The same network with N(0, I), in this table, takes most of that time: its own products, the \
log-likelihood and Adam, which the prior does not touch."""
PRIOR_REASON = """\
Twice in eight steps 100 pseudo-cells are encoded and differentiated, each time for a third of a \
step of 128 cells. In each of the others the mixture is built anew and weights and precisions take \
their step. Runs on a shared machine differ by a tenth."""
IMAGE_REASON = """\
Twice in eight steps the pseudo-inputs are encoded; the closed form sums over the points in each \
step besides, and builds the mixture anew. Rows of two runs differ by a tenth where the machine is \
shared. Next: a quiet machine, more repeats."""


def image_checks(rows: Sequence[Row]) -> Iterator[Check]:
    """Yield the time over that with N(0, I)."""
    for provider in (GRADIENT, CLOSED_FORM):
        for row in select(relative(rows, IMAGE_NORMAL), provider=provider):
            if row["B"] >= 256:
                target, case = f"training step, {provider}, against N(0, I)", f"B = {row['B']}"
                ratio = row["ratio"]
                yield Check(target, case, ratio, 1.10, False, reason=IMAGE_REASON, bound=1.0)


def scvi_checks(rows: Sequence[Row], work: str = "scVI training step") -> Iterator[Check]:
    """Yield the time over that of SCVI, and over that of the same network with N(0, I)."""
    for other, limits in ((STOCK, {128: 0.50, 512: 0.33}), (NORMAL, {128: 1.10, 512: 1.10})):
        compared_rows = relative(rows, other)
        bounds = {row["B"]: row["ratio"] for row in select(compared_rows, provider=NORMAL)}
        for row in compared_rows:
            if row["provider"] == VMM and row["B"] in limits:
                yield Check(
                    f"{work}, {row['provider']}, against {other}",
                    f"B = {row['B']}",
                    row["ratio"],
                    limits[row["B"]],
                    at_least=False,
                    reason=REASON if other == STOCK else PRIOR_REASON,
                    bound=bounds.get(row["B"]),
                )


def tables(rows: Sequence[Row], over: str) -> str:
    """Return the median of a step and, in brackets, how many times another's that is."""
    return compared(relative(rows, over), ["B"], lambda row: (str(row["B"]),))


IMAGES = Measurement(
    "step",
    "training steps of the image VAE under each prior",
    image_rows,
    checks=image_checks,
    introduction="784 inputs, hidden layers of 500, 500 and 2000, D = 10, 100 components; in "
    "brackets the time over that of N(0, I).",
    tables=partial(tables, over=IMAGE_NORMAL),
)
CELLS = Measurement(
    "scvi-step",
    "training steps of scVI under each prior, next to stock SCVI",
    scvi_rows,
    needs=SCVI,
    checks=scvi_checks,
    heading="scVI step",
    introduction="Steps without Lightning on random counts of 2,000 genes; in brackets the time "
    "over that of SCVI.",
    tables=partial(tables, over=STOCK),
)
