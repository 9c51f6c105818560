"""What a training step of scVI costs under each prior, next to stock SCVI.

A step is that of Lightning without Lightning: loss, backward pass, the network's Adam, then the
prior's empirical-Bayes step. Counts are drawn at random, as sparse as real ones: nothing depends on
their values. Priors take turns at every batch size; the warm-up under N(0, I) is over.

Where the time of a step within Lightning goes is told by :mod:`bench.scvi_epoch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from bench import figures, scvi_epoch
from bench.measurement import SCVI, Check, Measurement, Run
from bench.records import Row, select
from bench.scvi_epoch import NORMAL, STOCK, VMM
from bench.tables import duration, pivot, table

if TYPE_CHECKING:
    from anndata import AnnData

MODE = "scVI training step"
PRIORS: dict[str, dict[str, Any]] = {
    VMM: {"prior": "vmm"},
    "VMM, scvi-tools' likelihood": {"prior": "vmm", "fused_likelihood": False},
    "VMM, 50 components": {"prior": "vmm", "n_components": 50},
    "GMM": {"prior": "gmm"},
    "VampPrior": {"prior": "vamp"},
    NORMAL: {"prior": "normal"},
}
BATCHES, QUICK = (128, 512), (16,)
LIMITS = {128: 0.75, 512: 0.45}  # over the time of SCVI
REASON = """\
What the prior adds is mostly two encodings of the pseudo-cells a step, which do not grow with the \
batch. Next: fewer pseudo-cells a step."""


def random_cells(cells: int, genes: int) -> AnnData:
    """Return counts of cells in three batches, as sparse as real ones."""
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    generator = np.random.default_rng(0)
    rates = 0.3 * generator.gamma(0.3, 1, genes)
    adata = AnnData(csr_matrix(generator.poisson(rates, (cells, genes)).astype(np.float32)))
    adata.obs["batch"] = generator.integers(3, size=cells).astype(str)
    return adata


def make_step(name: str, adata: AnnData, batch_size: int) -> Callable[[], None]:
    """Return the call that trains one step on the next batch."""
    model = scvi_epoch.make_model(name, adata, **PRIORS.get(name, {}))
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


def rows(run: Run) -> Iterator[Row]:
    """Yield a row for each prior and batch size, then those of epochs by phase."""
    genes = run.choose(2000, 40)
    adata = random_cells(2048, genes)
    adata.X = adata.X.toarray()
    for size in run.choose(BATCHES, QUICK):
        calls = {name: make_step(name, adata, size) for name in (STOCK, *PRIORS)}
        found = list(run.compare(MODE, calls, {}, repeats=10, seconds=60.0, B=size, genes=genes))
        for row in found:
            yield {**row, "times stock": round(row["p50"] / found[0]["p50"], 3)}
    yield from scvi_epoch.rows(run)


def checks(rows: Sequence[Row]) -> Iterator[Check]:
    """Yield the time of a step over that of SCVI."""
    for row in select(rows, mode=MODE, provider=VMM):
        if row["B"] in LIMITS:
            target, limit = f"scVI training step, VMM, against {STOCK}", LIMITS[row["B"]]
            case = f"B = {row['B']}"
            yield Check(target, case, row["times stock"], limit, False, reason=REASON)


def tables(rows: Sequence[Row]) -> str:
    """Return the median of a step, over SCVI's in brackets; of an epoch's, every phase."""

    def cell(row: Row) -> str:
        return f"{duration(row['p50'])} ({row['times stock']:.2f}x)"

    text = pivot(select(rows, mode=MODE), ["B"], lambda row: (str(row["B"]),), cell)
    found = select(rows, mode=scvi_epoch.MODE)
    for size in dict.fromkeys(row["B"] for row in found):
        here = select(found, B=size)
        lines = [
            (phase, *(_milliseconds(row["phases"][phase]) for row in here))
            for phase in scvi_epoch.PHASES
        ]
        sums = (_milliseconds(sum(row["phases"].values())) for row in here)
        lines.append(("**sum**", *(f"**{text}**" for text in sums)))
        plain = (f"{_milliseconds(row['p50'])} ({row['times stock']:.2f}x)" for row in here)
        lines.append(("the same epoch without phases", *plain))
        text += f"\nB = {size}, an epoch through Lightning, CPU time in ms a step on 1 thread:\n\n"
        text += table(("phase", *(row["provider"] for row in here)), lines)
    return text


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds else "-"


def plot(figure: Figure, rows: Sequence[Row]) -> None:
    """Draw the time of a step next to stock SCVI's, and of a step in an epoch, by phase."""
    sizes = list(dict.fromkeys(row["B"] for row in select(rows, mode=scvi_epoch.MODE)))
    figure.set_size_inches(7 + 4 * len(sizes), 4.6)
    steps, *axes = figure.subplots(1, 1 + len(sizes), width_ratios=[1.6] + [1] * len(sizes))
    found = [row for row in select(rows, mode=MODE) if row["provider"] != STOCK]
    figures.bars(steps, found, lambda row: row["times stock"], lambda row: f"B = {row['B']}")
    figures.limit(steps, 1)
    figures.bare(steps, f"Training step, time / that of {STOCK}")
    for ax, size in zip(axes, sizes, strict=True):
        here = select(rows, mode=scvi_epoch.MODE, B=size)
        names = [row["provider"].replace(", ", ",\n", 1) for row in here]
        bottom = np.zeros(len(here))
        for phase, color in scvi_epoch.PHASES.items():
            height = np.array([1e3 * row["phases"][phase] for row in here])
            ax.bar(names, height, 0.7, bottom, color=color, label=phase)
            bottom += height
        figures.bare(ax, f"Step in an epoch, B = {size}", y="ms of CPU time")
    handles, labels = axes[-1].get_legend_handles_labels()
    place = {"frameon": False, "loc": "outside right center"}
    figure.legend(handles[::-1], labels[::-1], fontsize=8, **place)


MEASUREMENT = Measurement(
    "scvi-step",
    "training steps of scVI under each prior, next to stock SCVI",
    rows,
    needs=SCVI,
    checks=checks,
    heading="scVI step",
    introduction="First, steps without Lightning on random counts of 2,000 genes; in brackets the "
    "time over that of SCVI. Then epochs with everything that `train` does, on cells of "
    "`bench/atlas.py`: what the phases are and how they are told apart is said at the top of "
    "`bench/scvi_epoch.py`. *VMM, before* has scvi-tools' likelihood and "
    "logging, and Adam as it comes.",
    tables=tables,
    plot=plot,
)
