"""Training from scvi-tools' own route past memory, annbatch: the same embedding as in memory."""

import numpy as np
import pytest

pytest.importorskip("scvi", "1.5", reason="needs scvi-tools 1.5")
pytest.importorskip("annbatch", reason="annbatch is not installed")
pytest.importorskip("zarrs", reason="zarrs, which annbatch reads with, is not installed")

import anndata
from scipy.sparse import csr_matrix
from support import TRAIN

from vmm_fast.scvi import VMMSCVI

pytestmark = pytest.mark.filterwarnings("ignore")


def test_annbatch_gives_the_model_and_embedding_of_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where annbatch writes its collection
    rng = np.random.default_rng(0)
    parts, rates = [], np.exp(rng.normal(0.5, 1, (3, 40)))
    for part in range(2):
        counts = rng.poisson(rates[rng.integers(3, size=150)]).astype(np.float32)
        cells = anndata.AnnData(csr_matrix(counts), obs={"batch": 150 * [f"b{part}"]})
        cells.obs_names = [f"{part} {i}" for i in range(150)]
        cells.write_h5ad(f"{part}.h5ad")
        parts.append(cells)
    loading = {"batch_size": 64, "chunk_size": 32, "preload_nchunks": 4, "preload_to_gpu": False}
    cells = VMMSCVI.setup_annbatch(paths=["0.h5ad", "1.h5ad"], batch_key="batch", **loading)
    model = VMMSCVI(registry=cells.registry, n_components=10)
    model.train(max_epochs=2, datamodule=cells, **TRAIN)
    assert model.module.prior.data_size == 270  # nine tenths, those of the training
    z, labels = (
        model.get_latent_representation(dataloader=cells),
        model.get_clusters(dataloader=cells),
    )
    model.save("model", datamodule=cells)
    loaded = VMMSCVI.load("model", adata=False, datamodule=cells)
    np.testing.assert_array_equal(loaded.get_latent_representation(dataloader=cells), z)

    together = anndata.concat(parts)
    VMMSCVI.setup_anndata(together, batch_key="batch")
    memory = VMMSCVI(together, n_components=10)
    memory.module.load_state_dict(model.module.state_dict())
    memory.is_trained_ = True
    memory.module.eval()
    rows = {row.tobytes(): i for i, row in enumerate(together.X.toarray())}
    order = [rows[row.tobytes()] for batch in cells for row in batch["X"].numpy()]
    np.testing.assert_allclose(memory.get_latent_representation()[order], z, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(memory.get_clusters()[order], labels)
