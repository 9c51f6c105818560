"""Batches, labels and covariates from a data module: what scvi-tools' own loaders give, checked."""

import numpy as np
import pandas as pd
import pytest
import torch
from support import COVARIATES, TRAIN, scvi_model, separated_cells

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")

from vmm_fast.cells import CellStore  # noqa: E402
from vmm_fast.scvi import (  # noqa: E402
    VMMPEAKVI,
    VMMSCANVI,
    VMMSCVI,
    CellDataModule,
    MemoryCells,
    loading,
)

pytestmark = pytest.mark.filterwarnings("ignore")
LABELS = {**COVARIATES, "unlabeled_category": "Unknown"}


def some_labelled(number=240):
    """Return cells of which half have a label."""
    adata = separated_cells(number)
    adata.obs["cluster"] = adata.obs["cluster"].where(np.arange(number) % 2 == 0, "Unknown")
    return adata


def model_of(kind, adata, **options):
    setup = LABELS if kind is VMMSCANVI else COVARIATES
    kind.setup_anndata(adata, batch_key="batch", **setup)
    scvi.settings.seed = 0
    return kind(adata, n_latent=4, n_hidden=16, **{"n_components": 6, **options})


def module_of(model, adata, **options):
    return CellDataModule(MemoryCells(adata.X), **model.encode_obs(adata.obs), **options)


def trained(model, cells, epochs=3, rate=1e-3):
    options = {name: value for name, value in TRAIN.items() if name != "batch_size"}
    model.train(epochs, datamodule=cells, plan_kwargs={"lr": rate}, **options)
    return model


@pytest.mark.parametrize("kind", [VMMSCVI, VMMSCANVI])
def test_mini_batches_are_those_of_scvi_tools(kind):
    adata = some_labelled()
    model = model_of(kind, adata)
    own = iter(module_of(model, adata, batch_size=128).all_cells())
    for expected in model._make_data_loader(adata, batch_size=128):
        found = next(own)
        assert set(found) == set(expected)
        for key, values in expected.items():
            assert found[key].dtype == values.dtype, key
            torch.testing.assert_close(found[key], values, rtol=0, atol=0)


@pytest.mark.parametrize("prior", ["vmm", "normal"])
@pytest.mark.parametrize("kind", [VMMSCVI, VMMSCANVI, VMMPEAKVI])
@pytest.mark.parametrize("once", [True, False])
def test_models_train_from_disk_as_from_memory(tmp_path, kind, prior, once, monkeypatch):
    if not once:  # several windows, with the order of cells in memory
        monkeypatch.setattr(loading, "WINDOW", 128)
        monkeypatch.setattr(CellStore, "run", 1)
    adata = some_labelled()
    adata.obs["age"] = adata.obs["age"].astype(np.float32)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    keys = ["batch", "cluster", "donor", "age"]
    states = []
    with CellStore(tmp_path / "cells.h5ad") as store:
        for cells, obs in ((MemoryCells(adata.X), adata.obs), (store, store.columns(keys))):
            model = model_of(kind, adata.copy(), prior=prior)
            trained(model, CellDataModule(cells, **model.encode_obs(obs), batch_size=64))
            states.append(model.module.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_labels_from_a_data_module_are_learnt():
    adata = some_labelled()
    truth = separated_cells().obs["cluster"]
    model = model_of(VMMSCANVI, adata)
    trained(model, module_of(model, adata, batch_size=32), 15, rate=0.01)
    assert (model.predict() == truth).mean() > 0.9


def test_a_model_made_with_labelled_cells_alone_does_not_learn_the_unlabelled_category():
    adata = some_labelled()
    some = adata[adata.obs["cluster"].isin(["0", "1"])].copy()
    some.obs["cluster"] = pd.Categorical(some.obs["cluster"], [*"0123", "Unknown"])
    model = model_of(VMMSCANVI, some)
    assert model.n_labels == 4
    assert model.encode_obs(adata.obs)["labels"].max() == 4


def test_columns_that_do_not_fit_the_model():
    adata = some_labelled()
    model = model_of(VMMSCANVI, adata)
    whole = model.encode_obs(adata.obs)

    def refused(message, **columns):
        cells = CellDataModule(MemoryCells(adata.X), **{**whole, **columns})
        with pytest.raises(ValueError, match=message):
            model.train(1, datamodule=cells)

    refused("must have the categorical covariates .*, donor, but has 0 columns", categorical=None)
    refused("must have the continuous covariates .*, age, but has 0 columns", continuous=None)
    wrong = np.where(np.arange(240) > 6, np.nan, whole["continuous"][:, 0])[:, None]
    refused("'age'. must hold a finite number .*233 have none, .* cell 7$", continuous=wrong)
    refused("must have the labels .*'cluster', but has none", labels=None)
    refused("indices from 0 to 2 for 'donor', .* 1 to 3", categorical=whole["categorical"] + 1)
    refused("must have the batches .*, 2, but has 1", batches=0 * whole["batches"])
    for column, values, message in (
        ("donor", "new", r"obs\['donor'\] must hold categories .* also holds new"),
        ("donor", None, r"obs\['donor'\] must hold a category for every cell, but 240 have none"),
        ("age", np.nan, r"obs\['age'\] must hold a finite number .* 240 have none"),
        ("age", "old", r"obs\['age'\] must hold numbers"),
    ):
        obs = adata.obs.copy()
        obs[column] = values
        with pytest.raises(ValueError, match=message):
            model.encode_obs(obs)
    with pytest.raises(ValueError, match="obs must have the column 'age' of the model"):
        model.encode_obs(adata.obs.drop(columns="age"))
    obs = adata.obs.assign(cluster=adata.obs["cluster"].where(adata.obs["cluster"] != "Unknown"))
    np.testing.assert_array_equal(model.encode_obs(obs)["labels"], whole["labels"])


def test_continuous_covariates_must_be_there_and_finite():
    setup = {"continuous_covariate_keys": ["age"]}
    adata = separated_cells()
    holes = adata.copy()
    holes.obs.loc[["7", "9"], "age"] = np.nan
    message = r"obs\['age'\] must hold a finite number .* but 2 have none, .* is cell 7$"
    with pytest.raises(ValueError, match=message):
        scvi_model(VMMSCVI, holes.copy(), setup, n_components=12).train(1)
    model = scvi_model(VMMSCVI, adata, setup, n_components=12)
    model.train(1, **TRAIN)
    without = adata.copy()
    del without.obs["age"]
    for ask in (model.get_clusters, model.get_latent_representation):
        with pytest.raises(ValueError, match=message):
            ask(holes.copy())
        with pytest.raises(ValueError, match="obs must have the column 'age' of the model"):
            ask(without.copy())
    with pytest.raises(ValueError, match="obs must have the column 'age' of the model"):
        VMMSCVI.load_query_data(without, model)


def test_a_column_that_cells_lack_is_named(tmp_path):
    model = scvi_model(VMMSCVI, separated_cells(), COVARIATES, n_components=12)
    model.train(1, **TRAIN)
    model.save(tmp_path / "model")
    for column in ("batch", "donor", "age"):
        without = separated_cells()
        del without.obs[column]
        message = f"obs must have the column '{column}' of the model, but lacks it"
        for give in (
            model.get_clusters,
            lambda cells: VMMSCVI.load(tmp_path / "model", cells),
            lambda cells: VMMSCVI.load_query_data(cells, str(tmp_path / "model")),
        ):
            with pytest.raises(ValueError, match=message):
                give(without.copy())
    assert VMMSCVI.load(tmp_path / "model", separated_cells()).get_clusters().shape == (240,)
