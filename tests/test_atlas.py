"""Atlases to measure with are as asked and alike at every size; every step on them runs, tiny."""

import importlib
import json
import sys

import numpy as np
import pytest

pytest.importorskip("scvi", reason="scvi-tools is not installed")
import anndata

from bench import __main__, alone, atlas, out_of_core
from bench.measurement import exponent
from bench.records import read_rows, select

GENES = 800  # more than scanpy's cells have


@pytest.fixture(autouse=True, scope="module")
def blocks_of_50_cells_of_scanpy(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atlas, "DATA", tmp_path_factory.mktemp("no-data"))
        patch.setattr(atlas, "real_cells", atlas.real_cells().copy)
        patch.setattr(atlas, "BLOCK", 50)
        patch.setattr(atlas, "WRITTEN", 3)
        yield


def test_batches_of_a_larger_atlas_begin_with_the_cells_of_a_smaller_one():
    drawn = []
    for cells in (300, 2000):
        batches = [[] for _ in range(atlas.BATCHES)]
        for block in atlas.Atlas(0, GENES).blocks(cells):
            assert block.counts.shape[0] <= atlas.BLOCK
            batches[block.batch].append(block.counts.toarray())
        drawn.append([np.concatenate(counts) for counts in batches])
    for small, large in zip(*drawn, strict=True):
        np.testing.assert_array_equal(small, large[: len(small)])
    sizes = [len(counts) for counts in drawn[1]]
    assert sum(sizes) == 2000 and max(sizes) > 3 * min(sizes)
    assert np.mean(np.concatenate(drawn[1]) > 0) == pytest.approx(atlas.DENSITY, abs=0.03)


def test_cells_beyond_an_atlas_are_of_its_batches_but_not_in_it():
    drawn = atlas.Atlas(0, GENES)
    inside, larger, beyond = (
        [cell.tobytes() for cell in drawn.in_memory(number, beyond=cells).X.toarray()]
        for number, cells in ((600, 0), (8000, 0), (200, 600))
    )
    assert set(inside).isdisjoint(beyond)
    assert set(larger).issuperset(beyond[:5])


def test_files_hold_the_cells_that_were_drawn_and_are_whole_or_as_before(tmp_path):
    path = tmp_path / "400.h5ad"
    atlas.write(path, 400, genes=100)
    drawn, found = atlas.Atlas(0, genes=100).in_memory(400), anndata.read_h5ad(path)
    assert (found.X != drawn.X).nnz == 0
    assert found.obs.equals(drawn.obs)
    assert found.var_names.equals(drawn.var_names)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="need at least one array"):
        atlas.write(path, 0)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    # It has fewer genes than an atlas of now would have.
    with pytest.raises(RuntimeError, match=r"400\.h5ad: is drawn from other cells"):
        out_of_core.make(tmp_path, 400)


def test_a_function_alone_has_its_own_peak_memory(tmp_path, monkeypatch):
    (tmp_path / "small_module.py").write_text("def hold(size): return {'held': len(b'1' * size)}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    hold = importlib.import_module("small_module").hold
    ours = np.ones(2**25)  # which is not the other's
    small, large = (alone.run(hold, threads=1, size=size)["peak_bytes"] for size in (1, 10**8))
    assert large - small == pytest.approx(10**8, rel=0.05)
    assert small < ours.nbytes
    with pytest.raises(RuntimeError, match=r"small_module.hold failed: (?s:.*)unexpected keyword"):
        alone.run(hold, threads=1, cells=1)


def in_this_process(patch):
    """Run steps here, where scanpy's cells and small blocks are; pictures without UMAP."""
    from vmm_fast.cells import report as pictures

    def run(function, *, threads, **arguments):
        found = function(**json.loads(json.dumps(arguments)))
        return {**json.loads(json.dumps(found)), "peak_bytes": 2**30}

    patch.setattr(alone, "run", run)
    patch.setattr(pictures, "_plane", lambda z, seed: (z[:, :2].astype(float), "Plot"))


@pytest.mark.filterwarnings("ignore")  # scvi-tools' and Lightning's own
@pytest.mark.slow("eleven runs, most of which train a model")
def test_every_step_has_its_rows_and_targets(tmp_path, monkeypatch):
    in_this_process(monkeypatch)
    options = f"--quick --cells 300 150 --threads 1 --atlases {tmp_path / 'a'} --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["bench", "atlas", *options.split()])
    assert __main__.main() == 0
    rows = read_rows(tmp_path / "atlas.jsonl")
    ours = select(rows, provider="VMM")
    for mode in out_of_core.GROWING:
        line = select(ours, mode=mode)
        assert [row["cells"] for row in line] == [150, 300]
        for row in line:
            assert row["cells/s"] == pytest.approx(row["cells"] / row["seconds"])
    for row in select(rows, mode="loader"):
        if "absent" not in row:  # as scDataset may be
            assert row["cells"] - row["B"] < row["loaded"] <= row["cells"]
    assert all(out_of_core.least_gain(row) > 0 for row in select(ours, mode="EM iteration"))
    stock, *others = select(rows, mode="training epoch")
    for row in others:
        assert row["times stock"] == pytest.approx(row["p50"] / stock["p50"], abs=1e-3)
    losses = [row["losses"] for row in select(rows, mode="shuffling")]
    # In memory and from disk: so few cells fit into one window.
    assert np.isfinite(losses).all() and losses[0] == losses[1]
    memory, *loader = (check.value for check in out_of_core.checks(rows))
    assert memory == 1.0 and len(loader) == 2 and min(loader) > 0


def test_exponents_and_gains_by_hand():
    rows = [{"cells": n, "seconds": 2e-5 * n**1.1} for n in (1e4, 1e5, 1e6)]
    assert exponent(rows, "cells", "seconds") == pytest.approx(1.1)
    assert out_of_core.least_gain({"objective": [-3.0, -1.0, -1.25, -1.0]}) == -0.25
