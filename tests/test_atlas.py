"""Atlases to measure with are the same again, as sparse as asked, and alike at every size."""

import numpy as np
import pytest

pytest.importorskip("anndata")
import anndata

from bench import atlas

GENES = 800  # more than scanpy's cells have


@pytest.fixture(autouse=True)
def blocks_of_50_cells_of_scanpy(monkeypatch, tmp_path):
    monkeypatch.setattr(atlas, "DATA", tmp_path)
    monkeypatch.setattr(atlas, "BLOCK", 50)
    monkeypatch.setattr(atlas, "WRITTEN", 3)


@pytest.fixture
def drawn_from():
    return atlas.Atlas(0, GENES)


def counts_of(blocks):
    return [block.counts.toarray() for block in blocks]


def test_same_seed_same_atlas(drawn_from):
    for block, again in zip(drawn_from.blocks(400), atlas.Atlas(0, GENES).blocks(400), strict=True):
        np.testing.assert_array_equal(block.counts.toarray(), again.counts.toarray())
        np.testing.assert_array_equal(block.types, again.types)
    first, other = (next(iter(of.blocks(400))) for of in (drawn_from, atlas.Atlas(1, GENES)))
    assert (first.counts != other.counts[: first.counts.shape[0]]).nnz > 0


def test_batches_of_a_larger_atlas_begin_with_the_cells_of_a_smaller_one(drawn_from):
    def batches(cells):
        found = {}
        for block in drawn_from.blocks(cells):
            found.setdefault(block.batch, []).append(block.counts.toarray())
        return {batch: np.concatenate(parts) for batch, parts in found.items()}

    small, large = batches(300), batches(2000)
    assert len(small) == len(large) == atlas.BATCHES
    for batch, cells in small.items():
        np.testing.assert_array_equal(cells, large[batch][: len(cells)])
    sizes = drawn_from.sizes(2000)
    assert sizes.sum() == 2000
    assert sizes.max() > 3 * sizes.min()


def test_blocks_are_bounded_and_as_sparse_as_asked(drawn_from):
    blocks = list(drawn_from.blocks(2000))
    assert max(block.counts.shape[0] for block in blocks) == atlas.BLOCK
    values = sum(block.counts.nnz for block in blocks)
    assert values / (2000 * GENES) == pytest.approx(atlas.DENSITY, abs=0.03)
    for block in blocks:
        assert block.counts.has_canonical_format
        assert (block.counts.data >= 1).all()
        assert (block.counts.data == np.rint(block.counts.data)).all()


def test_counts_are_negative_binomial():
    mean = np.repeat(np.float32([[0.05, 1, 7, 300]]), 20_000, axis=0)
    counts = atlas._draw(mean, np.random.default_rng(0)).toarray().astype(np.float64)
    variance = mean[0] + mean[0] ** 2 / atlas.DISPERSION
    error = np.sqrt(variance / len(counts))
    assert (np.abs(counts.mean(0) - mean[0]) < 4 * error).all()
    np.testing.assert_allclose(counts.var(0), variance, rtol=0.1)
    zeros = (1 + mean[0] / atlas.DISPERSION) ** -float(atlas.DISPERSION)
    np.testing.assert_allclose((counts == 0).mean(0), zeros, atol=0.015)


def test_cells_resemble_their_type_and_their_batch(drawn_from):
    batches, types, shares = [], [], []
    for block in drawn_from.blocks(3000):
        counts = block.counts.toarray()
        shares.append(counts / counts.sum(1, keepdims=True))
        batches += [block.batch] * len(counts)
        types.append(block.types)
    batches, types, shares = np.array(batches), np.concatenate(types), np.concatenate(shares)

    def spread(groups):
        """Share of the variance that lies between groups, over genes."""
        means = np.stack([shares[groups == group].mean(0) for group in np.unique(groups)])
        return means[np.unique(groups, return_inverse=True)[1]].var(0) / shares.var(0)

    shuffled = np.random.default_rng(0).permutation(types)
    chance = spread(shuffled).mean()
    assert spread(types).mean() > 3 * chance
    assert spread(batches).mean() > 3 * spread(shuffled).mean()


def test_h5ad_and_zarr_hold_the_cells_that_were_drawn(drawn_from, tmp_path):
    paths = [tmp_path / name for name in ("a.h5ad", "a.zarr")]
    for path in paths:
        atlas.write(path, 700, genes=GENES)
    one, other = anndata.read_h5ad(paths[0]), anndata.read_zarr(paths[1])
    np.testing.assert_array_equal(
        one.X.toarray(), np.concatenate(counts_of(drawn_from.blocks(700)))
    )
    assert (one.X != other.X).nnz == 0
    assert one.obs.equals(other.obs)
    assert one.var_names.equals(other.var_names)
    assert one.var_names.is_unique
    assert one.obs_names.is_unique
    assert list(one.obs["batch"]) == sorted(one.obs["batch"])
    assert one.obs["batch"].value_counts().sort_index().tolist() == drawn_from.sizes(700).tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad", "a.zarr"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.h5ad"
    path.write_text("old")

    def fail(self, cells):
        raise OSError("no space left")
        yield

    monkeypatch.setattr(atlas.Atlas, "blocks", fail)
    with pytest.raises(OSError, match="no space"):
        atlas.write(path, 100, genes=GENES)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5ad"]
