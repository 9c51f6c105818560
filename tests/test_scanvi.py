"""Labels of some cells, which a model with the mixture prior learns and predicts."""

import numpy as np
import pytest
import torch
from support import scvi_model, separated_cells

pytest.importorskip("scvi", reason="scvi-tools is not installed")

import scvi
from scipy.sparse import csr_matrix
from test_scvi_models import LABELS, learnt, logs, some_labels, train  # noqa: F401  logs: a fixture

from vmm_fast.scvi import VMMSCANVI, VMMSCVI, CellDataModule, MemoryCells

pytestmark = pytest.mark.filterwarnings("ignore")


def test_labels_of_some_cells_predict_the_others_and_guide_components():
    model = learnt("SCANVI", epochs=30)
    cluster = model.adata.obs["cluster"].to_numpy()
    assert (model.predict()[::2] == cluster[::2]).mean() > 0.9
    components = model.get_components()
    purity = sum(
        np.unique(cluster[components == c], return_counts=True)[1].max() for c in {*components}
    )
    assert purity / len(cluster) > 0.9


@pytest.mark.parametrize("batch_representation", ["one-hot", "embedding"])
def test_labels_after_integration(batch_representation):
    options = {"n_components": 12, "batch_representation": batch_representation}
    first = train(scvi_model(VMMSCVI, some_labels(), **options), 2)
    second = VMMSCANVI.from_scvi_model(first, "Unknown", labels_key="label")
    centers = first.module.components().centers
    np.testing.assert_array_equal(second.module.components().centers, centers)
    train(second)
    assert set(second.predict()) <= {"0", "1", "2", "3"}
    # The classifier sees the latents that users get.
    means = torch.from_numpy(second.get_latent_representation())
    logits = second.module.classifier(means).detach()
    soft = second.predict(soft=True)
    np.testing.assert_allclose(soft, logits.softmax(-1), rtol=1e-4, atol=1e-6)


def test_labels_after_stock_scvi():
    stock = train(scvi_model(scvi.model.SCVI, some_labels()))
    model = VMMSCANVI.from_scvi_model(stock, "Unknown", labels_key="label", n_components=12)
    stock.module.eval(), model.module.eval()
    model.is_trained = True
    latents = stock.get_latent_representation(stock.adata)
    np.testing.assert_array_equal(model.get_latent_representation(), latents)
    train(model)
    assert model.get_clusters().max() < 12


def test_query_cells_of_a_new_batch_without_labels(tmp_path):
    adata = some_labels(separated_cells(300, batches=3))
    new = adata.obs["batch"] == "batch 2"
    query, reference = adata[new].copy(), adata[~new].copy()
    model = train(scvi_model(VMMSCANVI, reference, LABELS, n_components=12), 2)
    model.save(tmp_path / "model")
    query.obs["label"] = "Unknown"
    mapped = VMMSCANVI.load_query_data(query, str(tmp_path / "model"), accelerator="cpu")
    train(mapped, plan_kwargs={"weight_decay": 0.0})
    assert len(mapped.predict()) == len(mapped.get_clusters()) == query.n_obs
    centers = [each.module.components().centers for each in (mapped, model)]
    torch.testing.assert_close(*centers, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("Unknown", "but holds none; 0 of 240 cells have one, .*unknown .'Unknown'"),
        ("T", "but holds 'T' alone; 120 of 240 cells have one"),
    ],
)
def test_fewer_than_two_labels_are_refused(label, message):
    adata = separated_cells()
    adata.obs["label"] = np.where(np.arange(240) % 2, label, "Unknown")
    with pytest.raises(
        ValueError, match=r"obs\['label'\] must hold two labels or more, " + message
    ):
        scvi_model(VMMSCANVI, adata, LABELS, n_components=12)


def test_a_data_module_must_label_some_cells_unless_they_are_query_cells():
    model = learnt("SCANVI", epochs=20)
    obs = model.adata.obs.assign(label="Unknown")
    cells = CellDataModule(MemoryCells(csr_matrix(model.adata.X)), **model.encode_obs(obs))
    with pytest.raises(ValueError, match="some cells in 'label', but labels none of 240 cells"):
        model.train(1, datamodule=cells)
    query = model.adata.copy()
    query.obs["label"] = "Unknown"
    mapped = VMMSCANVI.load_query_data(query, model, accelerator="cpu")
    mapped.train(1, datamodule=cells, accelerator="cpu", enable_progress_bar=False, logger=False)
    assert mapped.get_clusters().shape == (240,)
