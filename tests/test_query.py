"""Query mapping (scArches): new batches get weights, and what the model knows stays."""

import numpy as np
import pytest
import torch
from support import TRAIN, scvi_model, separated_cells

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")

from scvi.nn import FCLayers  # noqa: E402

from vmm_fast.scvi import VMMSCVI  # noqa: E402
from vmm_fast.scvi.query import order_category_weights  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def model(adata, setup=None, **options):
    return scvi_model(VMMSCVI, adata, setup, **{"n_components": 12, **options})


def train(model, epochs=1, **options):
    model.train(epochs, **{**TRAIN, **options})
    return model


SAME = {"atol": 1e-3, "rtol": 0}  # but for a share of e^-10 in the new batch


def test_query_cells_of_a_new_batch_leave_the_clusters_alone(tmp_path):
    adata = separated_cells(400, batches=3)
    query = adata[adata.obs["batch"] == "batch 2"].copy()
    found = train(model(adata[adata.obs["batch"] != "batch 2"].copy()), 3)
    found.save(tmp_path / "model")
    mapped = VMMSCVI.load_query_data(query, str(tmp_path / "model"), accelerator="cpu")
    before = found.module.components()
    torch.testing.assert_close(mapped.module.components().centers, before.centers, **SAME)
    train(mapped, 2, plan_kwargs={"weight_decay": 0.0})
    assert mapped.get_clusters().shape == (query.n_obs,)
    for name in ("confusion_sums", "cluster_of_component"):
        assert torch.equal(getattr(mapped.module, name), getattr(found.module, name))
    # Another cut is that of the cells that were trained on, not of these few.
    cut = {"n_clusters": len(found.get_cluster_tree().leaves)}
    few = query[:3].copy()
    np.testing.assert_allclose(
        mapped.get_cluster_probabilities(few, **cut),
        found.module.other_clusters(**cut).probabilities(mapped._latents(few, None, None)),
        atol=1e-3,
    )
    torch.testing.assert_close(mapped.module.components().centers, before.centers, **SAME)
    for name in ("logits", "raw_precision"):
        assert torch.equal(getattr(mapped.module.prior, name), getattr(found.module.prior, name))


@pytest.mark.parametrize("representation", ["one-hot", "embedding"])
def test_new_batches_and_categories_leave_weights_with_their_own(representation):
    adata = separated_cells(400, batches=4)
    adata.obs["donor"] = np.where(adata.obs["batch"] == "batch 3", "donor 3", adata.obs["donor"])
    adata.obs["site"] = "the only one"
    new = adata.obs["batch"].isin(["batch 2", "batch 3"])
    reference, query = adata[~new].copy(), adata[new].copy()
    setup = {"categorical_covariate_keys": ["donor", "site", "cluster"]}
    found = train(model(reference, setup, batch_representation=representation))
    mapped = VMMSCVI.load_query_data(query, found, accelerator="cpu")
    before, after = found.module.components(), mapped.module.components()
    torch.testing.assert_close(after.centers, before.centers, **SAME)
    mapped.is_trained_ = True
    for give in ("get_latent_representation", "get_normalized_expression"):
        given = []
        for each in (mapped, found):
            scvi.settings.seed = 0
            given.append(getattr(each, give)(reference))
        np.testing.assert_allclose(*given, rtol=1e-3, atol=1e-5)


def test_weights_of_new_categories_start_at_the_mean_of_those_of_their_covariate():
    layers = FCLayers(2, 3, n_cat_list=[4, 1, 4, 3])
    (layer,) = layers.fc_layers
    # scvi-tools has appended two to the first covariate's two, then one to the third's three.
    with torch.no_grad():
        layer[0].weight.copy_(torch.arange(13.0).expand(3, 13))
    order_category_weights(layers, [2, 0, 3, 3], [4, 0, 4, 3])
    expected = [0, 1, *(2, 3, 2.5, 2.5), *(4, 5, 6, 5), *(7, 8, 9)]
    assert layer[0].weight[0].tolist() == expected
    order_category_weights(layers, [0, 0, 4, 3], [4, 0, 4, 3])  # of one batch, without weights
    assert layer[0].weight[0].tolist() == [0, 1, *[0] * 4, *expected[2:9]]


@pytest.mark.parametrize("batches", [2, 1])
def test_a_new_batch_begins_as_one_of_which_nothing_is_known(batches):
    adata = separated_cells(400, batches=3)
    known = adata.obs["batch"] < f"batch {batches}"
    query = adata[adata.obs["batch"] == "batch 2"].copy()
    found = train(model(adata[known].copy()))
    mapped = VMMSCVI.load_query_data(query, found, accelerator="cpu")
    log_counts = torch.from_numpy(query.X.toarray()).log1p()
    with torch.no_grad():
        q, _ = found.module.z_encoder(log_counts, torch.full((query.n_obs, batches), 1 / batches))
    mapped.is_trained_ = True
    np.testing.assert_allclose(mapped.get_latent_representation(), q.loc, atol=1e-5)
    before, after = found.module.components(), mapped.module.components()
    torch.testing.assert_close(after.centers, before.centers, **SAME)
