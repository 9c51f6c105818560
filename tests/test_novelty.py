"""Novelty is uniform for cells such as those of training, and near 1 for another type."""

from functools import cache

import numpy as np
import pytest
import torch
from support import TRAIN, batch_of, scvi_model, separated_cells

pytest.importorskip("scvi", reason="scvi-tools is not installed")

from scipy.sparse import csr_matrix

from vmm_fast.scvi import VMMSCVI, CellDataModule
from vmm_fast.scvi.columns import UNKNOWN
from vmm_fast.scvi.loading import MemoryCells
from vmm_fast.scvi.novelty import novelty_of

pytestmark = pytest.mark.filterwarnings("ignore")


def test_novelty_is_the_share_of_held_out_cells_that_fit_better():
    held_out = torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.0, 5.0, 2.0, 0.0]])
    # Products of their tails: 1 x 3/4, 3/4 x 1/4, 1/2 x 1/2, 1/4 x 1.
    cells = torch.tensor([[-1.0, 2.0, 3.0, 9.0], [-1.0, 0.0, 1.0, 9.0]])
    # Each counted among five: 1 x 1, 3/5 x 1, 2/5 x 4/5, 1/5 x 1/5.
    assert novelty_of(cells, held_out).tolist() == pytest.approx([0, 1 / 5, 1 / 5, 4 / 5])


def test_novelty_without_a_misfit_is_uniform_too():
    random = torch.Generator().manual_seed(0)
    cells, held_out = torch.randn(2, 3, 2000, generator=random)
    cells[2, ::2] = torch.nan
    found = novelty_of(cells, held_out)
    assert found[::2].mean() == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(found[::2], novelty_of(cells[:2, ::2], held_out[:2]))
    torch.testing.assert_close(found[1::2], novelty_of(cells[:, 1::2], held_out))
    held_out[2, 500:] = torch.nan
    torch.testing.assert_close(novelty_of(cells, held_out)[::2], found[::2])
    expected = novelty_of(cells[:, 1::2], held_out[:, :500])
    torch.testing.assert_close(novelty_of(cells, held_out)[1::2], expected)
    held_out[2] = torch.nan
    torch.testing.assert_close(novelty_of(cells, held_out), novelty_of(cells[:2], held_out[:2]))


def test_cells_of_an_unknown_category_have_no_misfit():
    model = scvi_model(VMMSCVI, setup={"categorical_covariate_keys": ["donor"]}, n_components=12)
    tensors, module = batch_of(model), model.module.eval()
    z = torch.zeros(50, 4)
    known = module.misfit(tensors, z)
    tensors["extra_categorical_covs"][::2] = UNKNOWN
    found = module.misfit(tensors, z)
    assert found[::2].isnan().all() and torch.equal(found[1::2], known[1::2])
    assert known.isfinite().all()


@cache
def trained():
    """Return a model trained without one of four types, other cells, and who of these is new."""
    adata = separated_cells(1200)
    left_out = (adata.obs["cluster"] == "3").to_numpy()
    query = left_out | (np.arange(1200) % 3 == 0)
    model = scvi_model(VMMSCVI, adata[~query].copy(), n_components=12)
    model.train(20, train_size=0.7, **TRAIN)
    return model, adata[query].copy(), left_out[query]


def test_a_type_that_was_left_out_is_new():
    model, query, left_out = trained()
    novelty = model.get_novelty(query)
    known = np.sort(novelty[~left_out])
    assert np.abs(known - np.linspace(0, 1, len(known))).max() < 0.15
    assert novelty[left_out].mean() > 0.95
    assert novelty.min() >= 0 and novelty.max() < 1


def test_held_out_cells_are_those_that_novelty_is_compared_with():
    model, _, _ = trained()
    held_out = np.sort(model.validation_indices)
    found = np.sort(model.get_novelty(indices=held_out))
    # Uniform, but for cells that tie: eight of 177 at most.
    np.testing.assert_allclose(found, np.arange(len(found)) / (len(found) + 1), atol=0.05)
    cells = MemoryCells(csr_matrix(model.adata.X))
    codes = model.adata.obs["batch"].factorize(sort=True)[0]
    loading = CellDataModule(cells, codes, held_out=0.3)
    model = scvi_model(VMMSCVI, model.adata, n_components=12)
    model.train(1, datamodule=loading, **{k: v for k, v in TRAIN.items() if k != "batch_size"})
    kept = model.module.novelty_cells.clone()
    assert kept[0].isfinite().sum() == loading.n_val
    model.calibrate_novelty(indices=loading._held_out)
    torch.testing.assert_close(model.module.novelty_cells, kept)


def test_indices_of_no_cells_are_refused_and_masks_taken():
    model, _, _ = trained()
    kept = model.module.novelty_cells.clone()
    for method in (model.get_novelty, model.calibrate_novelty, model.get_clusters):
        for none in ([], np.zeros(model.adata.n_obs, bool)):
            with pytest.raises(ValueError, match="indices must name a cell or more, but are empty"):
                method(indices=none)
    mask = np.isin(np.arange(model.adata.n_obs), model.validation_indices)
    model.calibrate_novelty(indices=mask)
    order = [x[:, x[0].argsort()] for x in (model.module.novelty_cells, kept)]
    torch.testing.assert_close(*order)
    model.module.novelty_cells.copy_(kept)


def test_a_loaded_model_has_the_same_novelty(tmp_path):
    model, query, _ = trained()
    model.save(tmp_path / "model", save_anndata=True)
    loaded = VMMSCVI.load(tmp_path / "model", accelerator="cpu")
    np.testing.assert_array_equal(loaded.get_novelty(query), model.get_novelty(query))
    saved = torch.load(tmp_path / "model" / "model.pt", weights_only=False)
    del saved["model_state_dict"]["novelty_cells"]
    torch.save(saved, tmp_path / "model" / "model.pt")
    loaded = VMMSCVI.load(tmp_path / "model", accelerator="cpu")
    with pytest.raises(ValueError, match=r"call calibrate_novelty\(\)"):
        loaded.get_novelty(query)
    loaded.calibrate_novelty(indices=model.validation_indices)
    np.testing.assert_array_equal(loaded.get_novelty(query), model.get_novelty(query))
