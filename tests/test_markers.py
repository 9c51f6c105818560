"""Marker genes of clusters: planted ones are found, others are not, batches play no part."""

import numpy as np
import pandas as pd
import pytest
import torch
from support import TRAIN, integrated, scvi_model, written

pytest.importorskip("scvi", reason="scvi-tools is not installed")

from anndata import AnnData
from scipy.sparse import csr_matrix

from vmm_fast.scvi import VMMSCVI, markers

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("no_report")]


def planted(number=600, genes=40):
    """Return cells of three types: genes c and 3 + c are eight times as high in type c.

    The last ten genes are eight times as high in batch "b", which has more cells of type 0.
    """
    random = np.random.default_rng(0)
    kind = np.arange(number) % 3
    batch = random.random(number) < np.where(kind == 0, 0.8, 0.3)
    rates = np.full((number, genes), 2.0)
    for c in range(3):
        rates[kind == c, c] = rates[kind == c, 3 + c] = 16.0
    rates[batch, -10:] = 16.0
    adata = AnnData(csr_matrix(random.poisson(rates).astype(np.float32)))
    adata.obs["batch"] = np.where(batch, "b", "a")
    adata.obs["type"] = pd.Categorical([f"t{c}" for c in kind])
    return adata


@pytest.fixture(scope="module")
def model():
    model = scvi_model(VMMSCVI, planted(), {"batch_key": "batch"}, n_components=12)
    model.train(25, **{**TRAIN, "plan_kwargs": {"lr": 0.01}})
    return model


def test_planted_genes_are_found_and_no_others(model):
    """And they are measured as by scvi-tools' own method, which takes all batches in turn."""
    adata = model.adata
    table = model.get_marker_genes(adata.obs["type"])
    options = {"mode": "change", "batch_correction": True, "pseudocounts": 0.1 / adata.n_vars}
    theirs = model.differential_expression(groupby="type", silent=True, **options)
    for c in range(3):
        found = table[table["cluster"] == f"t{c}"]
        assert set(found["gene"]) == {adata.var_names[c], adata.var_names[3 + c]}
        same = theirs[theirs["group1"] == f"t{c}"].loc[found["gene"]]
        for ours, other, error in (
            ("log2_fold_change", "lfc_mean", 0.3),
            ("probability", "proba_de", 0.06),
            ("share", "non_zeros_proportion1", 0.06),
            ("share_of_others", "non_zeros_proportion2", 0.06),
        ):
            np.testing.assert_allclose(found[ours], same[other], atol=error, rtol=0)


def test_the_same_cells_are_drawn_again_and_small_clusters_left_out(model):
    table = model.get_marker_genes(model.adata.obs["type"])
    before = torch.get_rng_state()
    pd.testing.assert_frame_equal(table, model.get_marker_genes(model.adata.obs["type"]))
    model.get_marker_genes()
    assert torch.equal(torch.get_rng_state(), before)
    for _, genes in table.groupby("cluster"):
        rank = 100 * genes["probability"].round(1) + genes["log2_fold_change"]
        assert rank.is_monotonic_decreasing
    few = np.where(np.arange(600) < markers.LEAST_CELLS - 1, "few", "many")
    empty = model.get_marker_genes(few)
    assert list(empty) == list(table) and not len(empty)
    of_some = model.adata.obs["type"].astype(object).where(np.arange(600) < 60)
    assert set(model.get_marker_genes(of_some)["cluster"]) == {"t0", "t1", "t2"}
    with pytest.raises(ValueError, match="must be of the model's 600 cells, but are of 9"):
        model.get_marker_genes(few[:9])


@pytest.mark.slow("trains to the end")
def test_integrate_writes_the_table(tmp_path):
    path = written(tmp_path, planted(300))
    options = ["--batch-key", "batch", "--epochs", 60, "--learning-rate", 0.01, "--memory", 0]
    options += ["--components", 12, "--clusters", 3, "--batch-size", 32]
    assert integrated(path, tmp_path / "out", *options) == 0
    table = pd.read_csv(tmp_path / "out" / "markers.csv", dtype={"cluster": str, "gene": str})
    assert list(table) == ["cluster", "gene", *markers.MEASURES]
    first = table.groupby("cluster")["gene"].first().astype(int)
    assert set(first.index) == {"0", "1", "2"} and {g % 3 for g in first} == {0, 1, 2}
    assert first.max() < 6
