"""Runs over batch sizes and prior learning ratios, which trade fine clusters for mixed batches.

There is one run of :func:`vmm_fast.cells.integration.integrate` for every pair of a batch size and
a ratio: the prior's learning rate over the network's. The results of finished runs are kept, so
that a sweep goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from vmm_fast._errors import InputError
from vmm_fast._files import as_csv, read_json, write_atomically, write_json
from vmm_fast._schema import Rule, check, list_of, number, table, whole
from vmm_fast.cells.integration import Integration, integrate
from vmm_fast.cells.settings import SweepSettings

FINISHED = "sweep.json"
RESULTS = {"sweep.csv": "a line a run", "sweep.png": "the same as a picture"}
COLUMNS = {
    "batch_size": "batch size",
    "ratio": "prior learning ratio",
    "clusters": "clusters",
    "held_out_elbo": "held-out ELBO",
    "entropy": "mean entropy",
    "batch_mixing": "batch mixing",
    "nmi_batch": "NMI with batch",
    "ari": "ARI",
    "nmi": "NMI",
}
SHARE = number("of at least 0", lambda x: x >= 0)
# Measurements of every run; of runs with several batches; of runs with labels.
OF_ALL = {"clusters": whole(), "held_out_elbo": number(), "entropy": SHARE, "seconds": SHARE}
OF_BATCHES = {"batch_mixing": SHARE, "nmi_batch": SHARE}
OF_LABELS = {"ari": number(), "nmi": SHARE}
FILE = table({"runs": list_of(table({"settings": table({})}))})
NEIGHBOURS = 30
MOST_CELLS = 10_000  # most cells whose neighbours are found
ACTIVE = 0.002  # share of the cells that a cluster must have to be counted


def sweep(
    cells: AnnData,
    labels: np.ndarray | None,
    settings: SweepSettings,
    folder: Path,
    *,
    accelerator: str = "auto",
    progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield a row of results for every run, but train only those not yet finished in ``folder``.

    Labels [cells] are for scores alone; NaN for cells without one. :data:`FINISHED` and
    :data:`RESULTS` are written after every run.

    Raises InputError if the results of finished runs in the folder cannot be read, and what
    :func:`vmm_fast.cells.integration.integrate` raises.
    """
    path = folder / FINISHED
    measured = _measured(cells, labels, settings)
    kept = _read_kept(path, settings, measured) if path.exists() else []
    rows = []
    for one, ratio in settings.of_runs():
        kept_row = next((row for row in kept if row["settings"] == asdict(one)), None)
        if kept_row is None:
            found = integrate(cells, one, accelerator=accelerator, progress=progress)
            assert found is not None  # the command is refused in several processes
            kept_row = {**_measure(found, cells, labels, measured), "settings": asdict(one)}
            kept.append(kept_row)
            write_json(path, {"runs": kept})
        row = {"batch_size": one.batch_size, "ratio": ratio}
        row |= {name: kept_row[name] for name in measured}
        rows.append(row)
        # Written after every run, so that a run that diverges spoils no other.
        _write_table(rows, folder / "sweep.csv")
        _plot(rows, folder / "sweep.png")
        yield row


def _read_kept(
    path: Path, settings: SweepSettings, measured: dict[str, Rule]
) -> list[dict[str, Any]]:
    """Return the rows of all finished runs, including those of other settings."""
    wanted = [asdict(one) for one, _ in settings.of_runs()]
    what = f"{path.name} of {path.parent}"
    try:
        content = read_json(path)
        check(what, content, FILE)
        taken = [row for row in content["runs"] if row["settings"] in wanted]
        check(what, {"runs": taken}, table({"runs": list_of(table(measured))}))
    except ValueError as error:
        raise InputError(f"{error}; start the sweep again with --overwrite") from None
    runs: list[dict[str, Any]] = content["runs"]
    return runs


def _measured(
    cells: AnnData, labels: np.ndarray | None, settings: SweepSettings
) -> dict[str, Rule]:
    """Return the names of the measurements in every run, and the rules of their values."""
    key = settings.batch_key
    found = dict(OF_ALL)
    if key is not None and cells.obs[key].astype(str).nunique() > 1:
        found |= OF_BATCHES
    if labels is not None and not pd.isna(labels).all():
        found |= OF_LABELS
    return found


def _measure(
    found: Integration, cells: AnnData, labels: np.ndarray | None, measured: dict[str, Rule]
) -> dict[str, Any]:
    z, clusters = found.z, found.clusters["vmm_cluster"].cat.codes.to_numpy()
    entropy = found.clusters["vmm_cluster_entropy"]
    sizes = np.bincount(clusters)
    row: dict[str, Any] = {
        "clusters": int((sizes > ACTIVE * len(clusters)).sum()),
        "held_out_elbo": -found.history["elbo_validation"][-1],
        "entropy": float(entropy.mean()),
        "seconds": found.seconds,
    }
    if OF_BATCHES.keys() <= measured.keys():
        batches = cells.obs[found.settings.batch_key].astype(str).to_numpy()
        row["batch_mixing"] = batch_mixing(z, batches)
        row["nmi_batch"] = found.scores(batches)["nmi"]
    if OF_LABELS.keys() <= measured.keys():
        row |= found.scores(labels)
    return row


def batch_mixing(z: np.ndarray, batches: np.ndarray) -> float:
    """Return how well batches [cells] mix in z: the share of other batches around, over chance.

    This is the mean over cells of the share of the 30 nearest others that are of another batch,
    divided by that share among all cells: 0 for batches apart, 1 for batches that lie at random.
    Types that only some batches have keep it below 1. There must be at least two batches.
    """
    from sklearn.neighbors import NearestNeighbors

    if len(z) > MOST_CELLS:
        chosen = np.random.default_rng(0).choice(len(z), MOST_CELLS, replace=False)
        z, batches = z[chosen], batches[chosen]
    _, codes, counts = np.unique(batches, return_inverse=True, return_counts=True)
    by_chance = 1 - ((counts / len(z)) ** 2).sum()
    near = NearestNeighbors(n_neighbors=min(NEIGHBOURS + 1, len(z))).fit(z)
    others = near.kneighbors(z, return_distance=False)[:, 1:]
    return float((codes[others] != codes[:, None]).mean() / by_chance)


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return [name for name in COLUMNS if name in rows[0]]


def _write_table(rows: list[dict[str, Any]], path: Path) -> None:
    columns = _columns(rows)
    values = ([row[name] for name in columns] for row in rows)
    write_atomically(path, as_csv(columns, values), text=True)


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw a heat map of each measurement, batch size against ratio."""
    from matplotlib.figure import Figure

    sizes, ratios = (sorted({row[name] for row in rows}) for name in ("batch_size", "ratio"))
    shown = [name for name in _columns(rows) if name not in ("batch_size", "ratio", "entropy")]
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    size = ((1.0 + 0.75 * len(ratios)) * across, (1.2 + 0.45 * len(sizes)) * down)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, name in zip(axes.flat, shown, strict=False):
        ax.axis("on")
        values = np.full((len(sizes), len(ratios)), np.nan)
        for row in rows:
            values[sizes.index(row["batch_size"]), ratios.index(row["ratio"])] = row[name]
        ax.imshow(values, cmap="Blues", aspect="auto", alpha=0.6)
        digits = {"clusters": 0, "held_out_elbo": 1}.get(name, 2)
        for (i, j), value in np.ndenumerate(values):
            ax.text(j, i, f"{value:.{digits}f}", ha="center", va="center", fontsize=9)
        ax.set_title(COLUMNS[name], fontsize=10)
        ax.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
        ax.set_yticks(range(len(sizes)), sizes)
        ax.tick_params(length=0, labelsize=9)
        ax.spines[:].set_visible(False)
    figure.supxlabel("prior learning ratio", fontsize=10)
    figure.supylabel("batch size", fontsize=10)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
