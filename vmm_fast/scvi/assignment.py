"""New cells in the clusters of a trained model, without training.

Genes are matched by name. A cell of a batch that the model knows is encoded as of that batch; one
of a new batch as of all known batches in equal shares: what has been learnt of batches says nothing
of a new one, so that none is preferred.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix, hstack
from scvi import REGISTRY_KEYS

from vmm_fast.data import InputError
from vmm_fast.scvi.integration import in_place_of, quiet, set_clusters
from vmm_fast.scvi.model import VMMSCVI
from vmm_fast.scvi.pseudo_cells import Cells
from vmm_fast.scvi.reading import batches_of, counts_of

__all__ = ["SavedModel", "assign", "find_model"]

HOW = ", whose cells are encoded as of all known batches in equal shares"
MOST_MISSING = 0.05  # share of the model's genes that may be taken as 0


class SavedModel(NamedTuple):
    """What assigning needs to know of a model on disk."""

    folder: Path
    registry: dict[str, Any]
    genes: pd.Index


def find_model(path: str) -> SavedModel:
    """Find the model in a folder that ``vmm-fast integrate`` or ``VMMSCVI.save`` wrote.

    Raises
    ------
    InputError
        If there is none.
    """
    folders = [Path(path), Path(path) / "model"]
    found = [folder for folder in folders if (folder / "model.pt").is_file()]
    if not found:
        raise InputError(f"{path}: must be a folder that integrate wrote, holds no model.pt")
    try:
        with quiet():
            registry = VMMSCVI.load_registry(str(found[0]))
            genes = VMMSCVI.prepare_query_anndata(None, str(found[0]), True)
        name = registry["model_name"]
    except Exception:  # pickle raises of all kinds
        raise InputError(f"{path}: model.pt in it is damaged or of no scvi-tools model") from None
    if name != VMMSCVI.__name__:
        raise InputError(f"{path}: must be a model of VMMSCVI, is of {name}")
    setup = registry["setup_args"]
    needed = [key for key, value in setup.items() if key not in ("layer", "batch_key") and value]
    if needed:
        raise InputError(
            f"{path}: must be a model without covariates, labels and size factors, has "
            f"{', '.join(needed)}; use VMMSCVI.load_query_data"
        )
    return SavedModel(found[0], registry, genes)


def assign(adata: AnnData, saved: SavedModel, layer: str | None) -> list[str]:
    """Add the embedding and clusters of a saved model to cells; give notes on how.

    Parameters
    ----------
    adata : AnnData
    saved : SavedModel
    layer : str or None
        With the counts; None for the model's layer where the cells have it, else X.

    Raises
    ------
    InputError
        If the cells do not fit the model.
    """
    setup = saved.registry["setup_args"]
    if layer is None and setup["layer"] in adata.layers:
        layer = setup["layer"]
    counts, notes = _matched(counts_of(adata, layer), adata.var_names, saved.genes)
    batches, known, more = _batches(adata, saved.registry)
    query = in_place_of(counts, adata.obs.copy(), saved.genes, setup["layer"])
    new = ~batches.isin(known).to_numpy()
    if setup["batch_key"] is not None:
        query.obs[setup["batch_key"]] = batches.where(~new, known[0])
    with quiet():
        model = VMMSCVI.load(str(saved.folder), query)
        if model.module.prior is None:
            raise InputError(f"{saved.folder}: must be a model with clusters, is of N(0, I)")
        z, _ = model.get_latent_representation(return_dist=True)
        if new.any() and model.module.encode_covariates:
            z[new] = _of_all_batches(model, np.flatnonzero(new), len(known))
        set_clusters(adata, z, model.module.components().to("cpu").assign(torch.from_numpy(z)))
    adata.uns["vmm"] = {"model": str(saved.folder.resolve())}
    return notes + more


@torch.inference_mode()
def _of_all_batches(model: VMMSCVI, cells: np.ndarray, batches: int) -> np.ndarray:
    """Posterior means [n, D] of cells that are of all batches in equal shares."""
    means = []
    for tensors in model._make_data_loader(model.adata, indices=cells):
        log_counts = tensors[REGISTRY_KEYS.X_KEY].to(model.device).log1p()
        shares = torch.full_like(log_counts[:, :1], 1 / batches).expand(-1, batches)
        cell = Cells(log_counts, (shares,), log_counts[:, :0])
        means.append(model.module.encode(cell).loc.cpu())
    return torch.cat(means).numpy()


def _matched(counts: Any, have: pd.Index, genes: pd.Index) -> tuple[Any, list[str]]:
    """Give the counts [cells, model's genes], 0 where a few genes are missing, and notes."""
    at = have.get_indexer(genes)
    missing = genes[at < 0]
    if not len(missing):
        return csr_matrix(counts[:, at], dtype=np.float32), []
    first = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
    are = "is" if len(missing) == 1 else "are"
    number = f"{len(missing):,} of the model's {len(genes):,} genes {are}"
    if len(missing) > MOST_MISSING * len(genes):
        raise InputError(
            f"must have the model's genes, {number} missing, more than {MOST_MISSING:.0%}: {first}"
        )
    # One empty column behind the others stands for all that are missing.
    padded = hstack(
        [csr_matrix(counts), csr_matrix((counts.shape[0], 1), dtype=np.float32)], format="csc"
    )
    return csr_matrix(padded[:, at], dtype=np.float32), [f"{number} missing, taken as 0: {first}"]


def _batches(adata: AnnData, registry: Any) -> tuple[pd.Series, list[Any], list[str]]:
    """Give each cell's batch, the batches that the model knows, and notes."""
    key = registry["setup_args"]["batch_key"]
    field = registry["field_registries"][REGISTRY_KEYS.BATCH_KEY]
    known = list(field["state_registry"]["categorical_mapping"])
    if key is None:
        return pd.Series(known[0], adata.obs_names), known, []
    if key not in adata.obs:
        batches = pd.Series(np.nan, adata.obs_names, dtype=object)
        note = f"obs has no {key!r}, the model's batches: all cells are taken as of a new batch"
        return batches, known, [note + HOW]
    batches = batches_of(adata, key).astype(object)
    new = [str(b) for b in batches.unique() if b not in known]
    if not new:
        return batches, known, []
    names = ", ".join(new[:5]) + (", ..." if len(new) > 5 else "")
    one = (
        "a batch that the model does not know"
        if len(new) == 1
        else (f"{len(new)} batches that the model does not know")
    )
    return batches, known, [f"{one}: {names}{HOW}"]
