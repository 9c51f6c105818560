"""Genes and proteins from disk: rows of obsm or of another modality; the model of memory."""

import numpy as np
import pandas as pd
import pytest
import torch
from support import TRAIN, scvi_model, separated_cells

pytest.importorskip("scvi", reason="scvi-tools is not installed")

import scvi
from anndata import AnnData
from mudata import MuData
from scipy.sparse import csr_matrix

from vmm_fast._errors import InputError
from vmm_fast.cells import CellStore
from vmm_fast.scvi import VMMTOTALVI, CellDataModule, MemoryCells, loading

pytestmark = pytest.mark.filterwarnings("ignore")


def with_proteins():
    adata = separated_cells()
    adata.obsm["protein"] = np.random.default_rng(1).poisson(9.0, (240, 6)).astype(np.int32)
    return adata


@pytest.fixture
def shards(tmp_path):
    """Return the cells, and a store of them in two files."""
    adata = with_proteins()
    for number, part in enumerate((adata[:100], adata[100:])):
        part.copy().write_h5ad(tmp_path / f"{number}.h5ad")
    with CellStore(tmp_path) as store:
        yield adata, store


def test_rows_are_those_of_the_array_in_any_order(shards):
    adata, store = shards
    stored, rows = store.obsm("protein"), np.random.default_rng(0).permutation(240)[:150]
    assert stored.shape == (240, 6) and len(stored) == 240
    np.testing.assert_array_equal(stored[rows], adata.obsm["protein"][rows])
    assert stored[rows].dtype == np.float32 and stored[rows[:0]].shape == (0, 6)
    some = store.sample(60, seed=3, obsm=["protein"])
    np.testing.assert_array_equal(some.obsm["protein"], adata.obsm["protein"][some.uns["rows"]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: None,
            "0.h5ad: obsm\\['protein'\\] must be an element of obsm, but there are none",
        ),
        (lambda x: csr_matrix(x), "must be a dense array of counts .* but is a csr_matrix"),
        (lambda x: pd.DataFrame(x), "but is a dataframe; a table's .to_numpy\\(\\) is one"),
        (lambda x: x + 0.5, "must hold counts, has [0-9.]+5"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, change, message):
    adata = with_proteins()
    if (changed := change(adata.obsm.pop("protein"))) is not None:
        if isinstance(changed, pd.DataFrame):
            changed = changed.set_axis(adata.obs_names).rename(columns=str)
        adata.obsm["protein"] = changed
    adata.write_h5ad(tmp_path / "0.h5ad")
    with CellStore(tmp_path / "0.h5ad") as store, pytest.raises(InputError, match=message):
        store.obsm("protein")[np.arange(9)]


def test_files_must_have_the_same_proteins(tmp_path):
    adata = with_proteins()
    adata[:100].copy().write_h5ad(tmp_path / "0.h5ad")
    adata.obsm["protein"] = adata.obsm["protein"][:, :4]
    adata[100:].copy().write_h5ad(tmp_path / "1.h5ad")
    with CellStore(tmp_path) as store:
        message = "1.h5ad: obsm.* must have 6 columns as in the first file, but has 4"
        with pytest.raises(InputError, match=message):
            store.obsm("protein")


def trained(cells, some, columns, proteins):
    setup = {"protein_expression_obsm_key": "protein"}
    model = scvi_model(VMMTOTALVI, some, setup, n_components=12)
    loading = CellDataModule(cells, **columns, proteins=proteins, batch_size=64)
    options = {name: value for name, value in TRAIN.items() if name != "batch_size"}
    plan = {"n_steps_kl_warmup": 1}
    # TOTALVI watches its learning rate, for which Lightning wants a logger.
    model.train(2, datamodule=loading, **{**options, "logger": True}, **plan)
    return model


@pytest.fixture(params=["obsm", ".h5mu"])
def stored(request, shards, tmp_path):
    """Return the cells, a store of them, and their proteins on disk."""
    adata, store = shards
    if request.param == "obsm":
        yield adata, store, store.obsm("protein")
        return
    proteins = AnnData(csr_matrix(adata.obsm["protein"]), obs=adata.obs[[]])
    MuData({"rna": adata, "prot": proteins}).write(tmp_path / "cells.h5mu")
    with CellStore(tmp_path / "cells.h5mu", modality="rna") as store:
        yield adata, store, store.other_modality("prot")


@pytest.mark.parametrize("once", [True, False])
def test_the_model_is_the_one_of_memory(stored, once, monkeypatch, tmp_path):
    monkeypatch.setattr(scvi.settings, "logging_dir", tmp_path / "logs")
    if not once:  # several windows, with the order of cells in memory
        monkeypatch.setattr(loading, "WINDOW", 100)
        monkeypatch.setattr(CellStore, "run", 1)
    adata, store, proteins = stored
    some = store.sample(240, ["batch"])
    some.obsm["protein"] = proteins[some.uns["rows"]]
    batches = {"batches": store.column("batch").codes}
    memory = trained(MemoryCells(csr_matrix(adata.X)), some.copy(), batches, adata.obsm["protein"])
    disk = trained(store, some, batches, proteins)
    states = (model.module.state_dict() for model in (disk, memory))
    torch.testing.assert_close(*states, rtol=0, atol=0)
    np.testing.assert_array_equal(disk.get_clusters(), memory.get_clusters())
    assert disk.module.prior_learnt
    for wrong in (None, np.ones((240, 5))):
        number = 0 if wrong is None else 5
        message = f"counts of the 6 proteins that the model was set up with, .* those of {number}"
        with pytest.raises(ValueError, match=message):
            disk.train(1, datamodule=CellDataModule(store, **batches, proteins=wrong))


def of_one_cell(value):
    return lambda x: np.where(np.arange(240)[:, None] == 7, value, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_one_cell(np.nan), "must hold counts, but has nan in cell 7$"),
        (of_one_cell(-1), "must hold counts, but has -1 in cell 7$"),
        (of_one_cell(0.5), "must hold counts, but has 0.5 in cell 7$"),
        (lambda x: x > 3, "must hold counts, but holds bool"),
        (lambda x: x[:, 0], r"a dense array .* is a ndarray of 1 dimensions; "),
        (pd.DataFrame, r"a dense array .* is a DataFrame; \.to_numpy\(\)"),
        (csr_matrix, r"a dense array .* is a csr_matrix; .* \.toarray\(\)"),
    ],
)
def test_proteins_in_memory_must_be_counts(change, message):
    adata = with_proteins()
    cells, batches = MemoryCells(csr_matrix(adata.X)), np.zeros(240, int)
    CellDataModule(cells, batches, proteins=adata.obsm["protein"])
    with pytest.raises(ValueError, match="proteins " + ".*" + message):
        CellDataModule(cells, batches, proteins=change(adata.obsm["protein"]))
