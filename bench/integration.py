"""Scores of integration and clusters of real cells, for each prior and each peer, by scib-metrics.

An embedding is made for every data set, method and seed, kept, and scored.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bench import comparison
from bench.comparison import Comparison
from bench.measurement import Run
from bench.records import DATA, Row, environment, select
from bench.steps import SILENT
from bench.tables import spread
from bench.timing import threads
from vmm_fast._files import write_atomically

if TYPE_CHECKING:
    from anndata import AnnData

DATASETS = (
    "pbmc3k_kang_3batch",
    "kang_ifnb_pbmc",
    "sc_mixology_5batch",
    "pbmc3k",
    "paul15",
    "mouse_bladder",
    "worm_neuron",
)
ONE_BATCH = DATASETS[3:]  # of which SysVI takes none
MIXTURES = ("vmm", "gmm", "vamp")
EPOCHS = 100
SEEDS = 5
RIVALS = (("vmm", "normal"), ("vmm", "scvi"), ("vmm-own", "scvi"))  # above whom who must be
RARE = 0.02  # share of the cells below which a type is rare


class Embedding(NamedTuple):
    """An embedding [cells, D], and the method's own clusters [cells] where it has such."""

    z: np.ndarray
    clusters: np.ndarray | None = None


# --- methods ---

Method = Callable[["AnnData", int], Embedding]  # takes cells and the number of epochs


def trained(
    kind: str, own_epochs: bool = False, plan: dict[str, Any] | None = None, **options: Any
) -> Method:
    """Train VMMSCVI with one of its priors, or a model of scvi-tools, everything else alike.

    SysVI takes log-normalised counts. The models' own number of epochs is 400 of up to 20,000
    cells.
    """

    def embed(adata: AnnData, epochs: int) -> Embedding:
        import scvi.external

        import vmm_fast.scvi

        makers = {"VMMSCVI": vmm_fast.scvi, "SCVI": scvi.model, "SysVI": scvi.external}
        model_class = getattr(makers[kind], kind)
        cells = _normalised(adata) if kind == "SysVI" else adata
        model_class.setup_anndata(cells, batch_key="batch")
        model = model_class(cells, **options)
        model.train(None if own_epochs else epochs, plan_kwargs=plan or {}, **SILENT)
        z = model.get_latent_representation()
        return Embedding(z, model.get_clusters() if options.get("prior") in MIXTURES else None)

    return embed


def pca(adata: AnnData, epochs: int) -> Embedding:
    """Return principal components of log-normalised counts."""
    return Embedding(_principal_components(adata))


def harmony(adata: AnnData, epochs: int) -> Embedding:
    """Run Harmony on the principal components."""
    from harmonypy import run_harmony

    pcs = _principal_components(adata)
    z = np.asarray(run_harmony(pcs, adata.obs, "batch", verbose=False).Z_corr)
    return Embedding(np.ascontiguousarray(z if z.shape == pcs.shape else z.T))


def _normalised(adata: AnnData) -> AnnData:
    import scanpy

    copy = adata.copy()
    scanpy.pp.normalize_total(copy)
    scanpy.pp.log1p(copy)
    return copy


def _principal_components(adata: AnnData) -> np.ndarray:
    import scanpy

    copy = _normalised(adata)
    scanpy.pp.pca(copy, n_comps=min(30, *(n - 1 for n in copy.shape)))
    return copy.obsm["X_pca"]


METHODS: dict[str, tuple[str, Method]] = {
    "vmm": ("VMM", trained("VMMSCVI", prior="vmm")),
    "vmm-every": (
        "VMM, pseudo-inputs move in every call",
        trained("VMMSCVI", prior="vmm", prior_kwargs={"update_every": 1}),
    ),
    "vmm-own": ("VMM, own epochs", trained("VMMSCVI", own_epochs=True, prior="vmm")),
    "vmm-plain": (
        "VMM, encoder without batches",
        trained("VMMSCVI", prior="vmm", encode_covariates=False),
    ),
    "gmm": ("Gaussian mixture", trained("VMMSCVI", prior="gmm")),
    "vamp": ("VampPrior", trained("VMMSCVI", prior="vamp")),
    "normal": ("same network, N(0, I)", trained("VMMSCVI", prior="normal")),
    "normal-own": ("N(0, I), own epochs", trained("VMMSCVI", own_epochs=True, prior="normal")),
    "scvi": ("SCVI, own epochs", trained("SCVI", own_epochs=True)),
    # With the KL at its full weight from the start.
    "scvi-short": ("SCVI, same epochs", trained("SCVI", plan={"n_epochs_kl_warmup": None})),
    "sysvi": ("SysVI", trained("SysVI")),
    "harmony": ("Harmony", harmony),
    "pca": ("PCA", pca),
}


# --- scores ---


def score(adata: AnnData, found: Embedding, number: int | None) -> Row:
    """Return the scores of one embedding; of Leiden also at a number of clusters."""
    import scanpy
    from anndata import AnnData
    from scib_metrics.benchmark import BatchCorrection, Benchmarker, BioConservation
    from scib_metrics.utils import principal_component_regression
    from sklearn.metrics import normalized_mutual_info_score

    labels = adata.obs["cell_type"].astype(str).to_numpy()
    several = adata.obs["batch"].nunique() > 1
    embeddings = {"pre": _principal_components(adata), "z": found.z}
    scored = AnnData(adata.X, obs=adata.obs[["cell_type", "batch"]], obsm=embeddings)
    benchmark = Benchmarker(
        scored,
        batch_key="batch",
        label_key="cell_type",
        embedding_obsm_keys=["z"],
        pre_integrated_embedding_obsm_key="pre",
        bio_conservation_metrics=BioConservation(nmi_ari_cluster_labels_leiden=True),
        batch_correction_metrics=BatchCorrection() if several else None,
        progress_bar=False,
    )
    benchmark.benchmark()
    scib = benchmark.get_results(clean_names=False).loc["z"]
    row: Row = {"scib": {name: float(value) for name, value in scib.items()}}
    batches = adata.obs["batch"].astype(str).to_numpy()
    if several:
        row["pcr"] = {
            name: float(principal_component_regression(x, batches, categorical=True))
            for name, x in (("before", embeddings["pre"]), ("after", found.z))
        }
    scanpy.pp.neighbors(scored, use_rep="z")
    row["leiden"] = _clusters(labels, _leiden(scored, 1))
    if number is not None:
        row["matched"] = _clusters(labels, _leiden_of(scored, number))
    if found.clusters is not None:
        row["own"] = _clusters(labels, found.clusters)
        row["own"]["nmi_batch"] = float(normalized_mutual_info_score(batches, found.clusters))
    return row


def _leiden(scored: AnnData, resolution: float) -> np.ndarray:
    import scanpy

    scanpy.tl.leiden(scored, resolution, flavor="igraph", n_iterations=2, random_state=0)
    return scored.obs["leiden"].to_numpy()


def _leiden_of(scored: AnnData, number: int) -> np.ndarray:
    """Return Leiden's clusters at the resolution that gives the number, or the nearest to it."""
    low, high, best = 0.01, 10.0, np.zeros(scored.n_obs, int)
    for _ in range(14):
        middle = (low * high) ** 0.5
        found = _leiden(scored, middle)
        count = len(np.unique(found))
        if abs(count - number) < abs(len(np.unique(best)) - number):
            best = found
        if count == number:
            break
        low, high = (middle, high) if count < number else (low, middle)
    return best


def _clusters(labels: np.ndarray, clusters: np.ndarray) -> Row:
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    used, sizes = np.unique(clusters, return_counts=True)
    types, counts = np.unique(labels, return_counts=True)
    rare = types[counts < RARE * len(labels)]
    return {
        "ari": float(adjusted_rand_score(labels, clusters)),
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "used": len(used),
        "over_0.2_percent": int((sizes > 0.002 * len(clusters)).sum()),
        "rare_types": len(rare),
        "rare_types_kept": sum(int(_best_f1(labels == name, clusters) > 0.5) for name in rare),
    }


def _best_f1(is_type: np.ndarray, clusters: np.ndarray) -> float:
    """Return the F1 of the cluster that fits a type best: above .5 it has one of its own."""
    several = (clusters == cluster for cluster in np.unique(clusters[is_type]))
    return max(2 * (is_type & one).sum() / (is_type.sum() + one.sum()) for one in several)


# --- runs ---


def read(dataset: str, args: argparse.Namespace) -> AnnData:
    """Read a data set; one without batches is one batch."""
    import anndata

    adata = anndata.read_h5ad(Path(args.data) / f"{dataset}.h5ad")
    adata.obs["batch"] = adata.obs["batch"].astype(str) if "batch" in adata.obs else "one"
    adata.obs["batch"] = adata.obs["batch"].astype("category")
    return adata


def embed(dataset: str, method: str, seed: int, args: argparse.Namespace) -> None:
    """Make an embedding, unless it has been kept."""
    path = Path(args.kept) / f"{dataset}-{method}-{seed}.npz"
    if path.exists():
        return
    import scvi

    from vmm_fast.cells.quiet import quiet

    adata = read(dataset, args)
    scvi.settings.seed = seed
    start = time.perf_counter()
    with quiet(), threads(1):
        found = METHODS[method][1](adata, args.epochs)
    about = {"seconds": time.perf_counter() - start, "epochs": args.epochs, **environment()}
    arrays = {name: array for name, array in found._asdict().items() if array is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        path, lambda file: np.savez_compressed(file, about=json.dumps(about), **arrays)
    )
    print(f"{dataset}  {method}  {seed}  embedded in {about['seconds']:.0f} s", flush=True)


def scored(dataset: str, method: str, seed: int, args: argparse.Namespace) -> Row:
    """Return the scores of a kept embedding, with what it was made with."""
    path = Path(args.kept) / f"{dataset}-{method}-{seed}.npz"
    adata = read(dataset, args)
    with np.load(path) as arrays:
        about = json.loads(str(arrays["about"]))
        if about["epochs"] != args.epochs:
            raise ValueError(
                f"--epochs must be {about['epochs']}, as {path} was trained with, but is "
                f"{args.epochs}; choose another --kept"
            )
        found = Embedding(arrays["z"], arrays.get("clusters"))
    vmm = path.with_name(f"{dataset}-vmm-{seed}.npz")  # has clusters, where the method has none
    with np.load(path if found.clusters is not None or not vmm.exists() else vmm) as arrays:
        number = len(np.unique(arrays["clusters"])) if "clusters" in arrays else None
    return {
        "command": f"python -m bench integration --datasets {dataset} --methods {method} "
        f"--seeds {seed} --epochs {about['epochs']}",
        **about,
        "cells": adata.n_obs,
        "types": int(adata.obs["cell_type"].nunique()),
        "batches": int(adata.obs["batch"].nunique()),
        **score(adata, found, number),
    }


def rows(run: Run) -> Iterator[Row]:
    """Yield a row for each data set, seed and method, made unless it has been kept."""
    # Scores after all training: the compiled code that makes them slows down what comes after.
    for case in comparison.cases(run.args, COMPARISON):
        embed(*case, run.args)
    yield from comparison.rows(run, COMPARISON)


# --- page ---


def bio(row: Row) -> float:
    """Return scib-metrics' bio conservation of its default metrics, without Leiden."""
    scib = row["scib"]
    names = ("isolated_labels", "silhouette_label", "clisi_knn")
    kmeans = (f"nmi_ari_cluster_labels_kmeans_{name}" for name in ("nmi", "ari"))
    return mean(scib[name] for name in (*names, *kmeans))


def total(row: Row) -> float:
    """Return .6 bio + .4 batch, or bio where there is one batch."""
    batch = row["scib"].get("Batch correction")
    return bio(row) if batch is None else 0.6 * bio(row) + 0.4 * batch


def field(part: str, name: str) -> Callable[[Row], float | None]:
    """Return the function that takes a score of a part from a row, if it is there."""
    return lambda row: row.get(part, {}).get(name)


COLUMNS: dict[str, Callable[[Row], float | None]] = {
    "scib total": total,
    "bio": bio,
    "batch": field("scib", "Batch correction"),
    "k-means ARI": field("scib", "nmi_ari_cluster_labels_kmeans_ari"),
    "best Leiden ARI": field("scib", "nmi_ari_cluster_labels_leiden_ari"),
    "Leiden ARI": field("leiden", "ari"),
    "matched Leiden ARI": field("matched", "ari"),
    "own ARI": field("own", "ari"),
    "Leiden NMI": field("leiden", "nmi"),
    "own NMI": field("own", "nmi"),
    "Leiden clusters": field("leiden", "used"),
    "own clusters": field("own", "over_0.2_percent"),
    "rare kept, Leiden": field("leiden", "rare_types_kept"),
    "rare kept, matched": field("matched", "rare_types_kept"),
    "rare kept, own": field("own", "rare_types_kept"),
    "own NMI with batch": field("own", "nmi_batch"),
    "PCR before": field("pcr", "before"),
    "PCR after": field("pcr", "after"),
}
LEGEND = """\
Mean and standard deviation over the seeds. *scib total* is .6 bio + .4 batch of scib-metrics'
default metrics (bio alone where there is one batch). *k-means* knows the number of types, and *best
Leiden* is the one of ten resolutions that fits the labels best: neither is to be had without
labels. *Leiden* is at resolution 1, *matched* at the resolution that gives as many clusters as
*own* has (or VMM, where there are none), *own* are the model's clusters, of which those with over
0.2 % of the cells are counted. *Rare kept* counts types under 2 % of the cells that some cluster
fits with an F1 above .5. *PCR* is the share of the variance that batches explain; a lower one after
integration is no merit by itself: types differ between batches, so that over-integration lowers it,
too. SysVI takes several batches alone."""


def targets(rows: list[Row]) -> list[str]:
    """Return what VMM must reach and whether it does, a line each.

    Embeddings are compared on the two sets that it is made for, clusters on all, with those of
    Leiden on the same embedding.
    """
    lines = []
    for dataset, rivals in itertools.product(DATASETS[:2], RIVALS):
        found = [select(rows, dataset=dataset, method=method) for method in rivals]
        ours, theirs = ([total(row) for row in same] for same in found)
        if not ours or not theirs:
            continue
        verdict = "met" if mean(ours) > mean(theirs) else "MISSED"
        if min(len(ours), len(theirs)) < SEEDS:
            verdict = f"open ({len(ours)} and {len(theirs)} seeds of {SEEDS})"
        titles = [METHODS[method][0] for method in rivals]
        lines.append(
            f"{verdict}: {dataset}, scib total of {titles[0]} {spread(ours)} above that of "
            f"{titles[1]} {spread(theirs)}"
        )
    own = [row for row in select(rows, method="vmm") if "matched" in row]
    sets = [same for dataset in DATASETS if (same := select(own, dataset=dataset))]
    if not sets:
        return lines

    def means(part: str, name: str) -> list[float]:
        return [mean(row[part][name] for row in same) for same in sets]

    ours, rare = means("own", "ari"), sum(means("own", "rare_types_kept"))
    for key, title in (("leiden", "Leiden's at resolution 1"), ("matched", "matched Leiden's")):
        theirs, rare_theirs = means(key, "ari"), sum(means(key, "rare_types_kept"))
        above = sum(a > b for a, b in zip(ours, theirs, strict=True))
        verdict = "met" if mean(ours) > mean(theirs) and rare >= rare_theirs else "MISSED"
        lines.append(
            f"{verdict}: {len(sets)} sets, ARI of VMM's clusters {mean(ours):.3f}, above on "
            f"{above}, {title} {mean(theirs):.3f}; rare types kept {rare:.1f} and {rare_theirs:.1f}"
        )
    return lines


def about(rows: list[Row]) -> str:
    """Return a line about a data set."""
    row = rows[0]
    return (
        f"{row['cells']:,} cells, {row['types']} types ({row['leiden']['rare_types']} rare), "
        f"{row['batches']} batches; {row['epochs']} epochs"
    )


def _spread(value: Callable[[Row], float | None], rows: list[Row]) -> str:
    return spread([value(row) for row in rows])


COMPARISON = Comparison(
    part="integration",
    title="Integration of real cells",
    datasets={name: name for name in DATASETS},
    methods=METHODS,
    score=scored,
    columns={name: partial(_spread, value) for name, value in COLUMNS.items()},
    legend=LEGEND,
    versions=("scvi-tools", "scib-metrics", "scanpy"),
    about=about,
    verdicts=targets,
    impossible={("sysvi", name) for name in ONE_BATCH},
)
MEASUREMENT = comparison.measurement(
    COMPARISON,
    "single cells: integration and clusters, all peers",
    rows=rows,
    options={
        "--data": {"default": str(DATA), "help": "folder with the .h5ad files"},
        "--epochs": {"type": int, "default": EPOCHS},
        **comparison.options(COMPARISON, SEEDS, list(DATASETS)),
    },
    needs=("scvi", "scib_metrics"),
)
