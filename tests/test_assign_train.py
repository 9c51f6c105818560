"""The option --train of vmm-fast assign: new batches get weights, what the model knows stays."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from support import (
    TRAIN,
    assigned,
    complaint,
    make_cells,
    model_of,
    scvi_model,
    separated_cells,
    written,
)

pytest.importorskip("scvi", reason="scvi-tools is not installed")

import anndata

from vmm_fast.cells import assignment
from vmm_fast.cells.mapping import OfCells, map_cells
from vmm_fast.scvi import VMMSCANVI, VMMSCVI
from vmm_fast.scvi.loading import MemoryCells

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("no_report")]


def make_query(number=160):
    """Return cells of three known batches, and of a new one in which half of the genes are high."""
    adata = make_cells(number, batches=4, seed=2)
    factors = np.ones(adata.shape, np.float32)
    factors[np.ix_((adata.obs["batch"] == "b3").to_numpy(), np.arange(20) % 2 == 0)] = 4
    adata.X = adata.X.multiply(factors).tocsr()
    return adata


def test_a_new_batch_is_trained_and_known_cells_stay(trained, tmp_path, capsys, monkeypatch):
    mapped = []

    def kept(*arguments, **keywords):
        mapped.append(map_cells(*arguments, **keywords))
        return mapped[-1]

    monkeypatch.setattr(assignment, "map_cells", kept)
    query, model = make_query(), trained / "model" / "model.pt"
    cells, before = written(tmp_path, query), model.read_bytes()
    results = {}
    for name, options in (
        ("plain", ()),
        ("trained", ("--train", 30)),
        ("again", ("--train", 30)),
        ("on disk", ("--train", 30, "--memory", 0)),
    ):
        out = tmp_path / f"{name}.h5ad"
        assert assigned(trained, cells, out, *options) == 0
        results[name] = anndata.read_h5ad(out)
        shown = capsys.readouterr()
        how = "weights are trained" if options else "cells are encoded as of all known batches in"
        assert f"note: a batch that the model does not know: b3, whose {how}" in shown.out
        elbo = [
            float(x)
            for x in re.findall(r"^epoch .*ELBO ([-.0-9]+), 8 active comp", shown.err, re.M)
        ]
        assert len(elbo) == (10 if options else 0) and elbo[-1:] >= elbo[:1]
    plain, found = results["plain"], results["trained"]
    new = (query.obs["batch"] == "b3").to_numpy()
    assert model.read_bytes() == before
    assert found.uns["vmm"] == {**plain.uns["vmm"], "epochs": 30, "trained_cells": 40}
    for other in ("trained", "on disk"):
        np.testing.assert_array_equal(results[other].obsm["X_vmm"][~new], plain.obsm["X_vmm"][~new])
        for key in ("vmm_cluster", "vmm_component"):
            for of_one in (results[other], plain):
                of_one.obs[key] = of_one.obs[key].astype(int)
        pd.testing.assert_frame_equal(results[other].obs[~new], plain.obs[~new])
    np.testing.assert_array_equal(results["again"].obsm["X_vmm"], found.obsm["X_vmm"])
    clusters = model_of(trained).kept_clusters().assign(torch.from_numpy(found.obsm["X_vmm"]))
    np.testing.assert_array_equal(found.obs["vmm_cluster"], clusters.labels)
    # Of all numbers of the model, the weights of the new batch alone have changed.
    known = VMMSCVI.load(trained / "model", adata=False, accelerator="cpu").module.state_dict()
    for name, values in mapped[0].module.state_dict().items():
        was = known[name]
        if values.shape != was.shape:
            assert values.shape[1] == was.shape[1] + 1
            start = was[:, -3:].mean(1)
            moved = not torch.allclose(values[:, -1], start, atol=1e-4)
            # Pseudo-cells have next to no share in it, and nothing encodes library sizes.
            assert moved == name.startswith(("z_encoder.", "decoder.", "prior."))
            values = values[:, :-1]
        assert torch.equal(values, was), name


@pytest.mark.parametrize("kind", [VMMSCVI, VMMSCANVI])
@pytest.mark.parametrize("donors", ["text", "numbers"])
def test_a_new_category_of_a_covariate_is_trained(tmp_path, kind, donors):
    adata = separated_cells(300)
    if donors == "numbers":
        adata.obs["donor"] = adata.obs["donor"].str[-1].astype(int)
    last = np.unique(adata.obs["donor"])[-1]
    new = (adata.obs["donor"] == last).to_numpy()
    setup = {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]}
    if kind is VMMSCANVI:
        adata.obs["label"] = np.where(np.arange(300) % 2, adata.obs["cluster"], "Unknown")
        setup |= {"labels_key": "label", "unlabeled_category": "Unknown"}
    model = scvi_model(kind, adata[~new].copy(), setup, n_components=12)
    model.train(3, **TRAIN)
    model.save(tmp_path / "model")
    cells = written(tmp_path, adata)
    results = []
    for options in ((), ("--train", 5)):
        out = tmp_path / f"{len(options)}.h5ad"
        assert assigned(tmp_path / "model", cells, out, *options) == 0
        results.append(anndata.read_h5ad(out))
    plain, found = (each.obsm["X_vmm"] for each in results)
    np.testing.assert_array_equal(found[~new], plain[~new])
    moved = np.linalg.norm(found[new] - plain[new], axis=1)
    assert moved.min() > 0 and moved.max() < 1  # it begins where it would be without
    assert results[1].obs["vmm_novelty"].notna().all()
    assert ("vmm_label" in results[1].obs) == (kind is VMMSCANVI)


def test_training_that_cannot_be_is_refused(trained, tmp_path, capsys):
    query, out = make_query(), tmp_path / "out.h5ad"
    for number in (0, 9):
        left = np.flatnonzero(query.obs["batch"] != "b3")
        left = np.append(left, np.flatnonzero(query.obs["batch"] == "b3")[:number])
        cells = written(tmp_path, query[left].copy())
        error = complaint(capsys, assigned(trained, cells, out, "--train"))
        assert f"{cells}: must have at least 10 cells of batches or categories that" in error
        assert f"but has {number}; leave out --train" in error
    model = scvi_model(VMMSCVI, make_cells(), n_components=5, encode_covariates=False)
    model.train(1, **TRAIN)
    model.save(tmp_path / "model")
    error = complaint(capsys, assigned(tmp_path / "model", cells, out, "--train"))
    assert f"{tmp_path / 'model'}: must be a model with encode_covariates=True for" in error
    error = complaint(capsys, assigned(trained, cells, out, "--train", 0))
    assert "--train: must be a whole number" in error
    assert not out.exists()


def test_some_cells_are_read_as_all_are():
    counts = make_cells(50).X
    rows = np.array([0, 1, 2, 10, 11, 30, 49])
    some = OfCells(MemoryCells(counts), rows)
    assert (some.n_obs, some.n_vars, some.run) == (7, 20, 1)
    for starts, stops in (([0], [7]), ([5, 0, 2], [7, 2, 5]), ([6, 3], [7, 4])):
        found = some.read(np.array(starts), np.array(stops))
        at = np.concatenate([rows[i:j] for i, j in zip(starts, stops, strict=True)])
        np.testing.assert_array_equal(found.toarray(), counts[at].toarray())
