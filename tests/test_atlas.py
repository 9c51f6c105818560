"""Atlases to measure with are the same again, as sparse as asked, and alike at every size.

What is measured with them, at a tiny size: every step has its rows, page and targets.
"""

import functools
import importlib
import itertools
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scvi", reason="scvi-tools is not installed")
import anndata
import torch
from scipy.sparse import csr_matrix

from bench import alone, atlas, embedding, out_of_core, report
from bench.records import environment, select, write_rows
from bench.targets import checks
from vmm_fast._folder import RUN

GENES = 800  # more than scanpy's cells have


@pytest.fixture(autouse=True, scope="module")
def blocks_of_50_cells_of_scanpy(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atlas, "DATA", tmp_path_factory.mktemp("no-data"))
        patch.setattr(atlas, "real_cells", functools.cache(atlas.real_cells))
        patch.setattr(atlas, "BLOCK", 50)
        patch.setattr(atlas, "WRITTEN", 3)
        yield


@pytest.fixture(scope="module")
def drawn_from(blocks_of_50_cells_of_scanpy):
    return atlas.Atlas(0, GENES)


def by_batch(blocks):
    found = {}
    for block in blocks:
        found.setdefault(block.batch, []).append(block.counts.toarray())
    return {batch: np.concatenate(parts) for batch, parts in found.items()}


def test_same_seed_same_atlas(drawn_from):
    for block, again in zip(drawn_from.blocks(400), atlas.Atlas(0, GENES).blocks(400), strict=True):
        np.testing.assert_array_equal(block.counts.toarray(), again.counts.toarray())
        np.testing.assert_array_equal(block.types, again.types)
    first, other = (next(iter(of.blocks(400))) for of in (drawn_from, atlas.Atlas(1, GENES)))
    assert (first.counts != other.counts[: first.counts.shape[0]]).nnz > 0


def test_batches_of_a_larger_atlas_begin_with_the_cells_of_a_smaller_one(drawn_from):
    small, large = (by_batch(drawn_from.blocks(cells)) for cells in (300, 2000))
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
    adata = drawn_from.in_memory(3000)
    counts = adata.X.toarray()
    shares = counts / counts.sum(1, keepdims=True)

    def spread(groups):
        """Share of the variance that lies between groups, over genes."""
        means = np.stack([shares[groups == group].mean(0) for group in np.unique(groups)])
        return (means[np.unique(groups, return_inverse=True)[1]].var(0) / shares.var(0)).mean()

    types, batches = (adata.obs[name].cat.codes.to_numpy() for name in ("cell_type", "batch"))
    chance = spread(np.random.default_rng(0).permutation(types))
    assert min(spread(types), spread(batches)) > 3 * chance


def test_h5ad_and_zarr_hold_the_cells_that_were_drawn(drawn_from, tmp_path):
    paths = [tmp_path / name for name in ("a.h5ad", "a.zarr")]
    for path in paths:
        atlas.write(path, 400, genes=GENES)
    one, other = anndata.read_h5ad(paths[0]), anndata.read_zarr(paths[1])
    drawn = np.concatenate([block.counts.toarray() for block in drawn_from.blocks(400)])
    np.testing.assert_array_equal(one.X.toarray(), drawn)
    assert (one.X != other.X).nnz == 0
    assert one.obs.equals(other.obs)
    assert one.var_names.equals(other.var_names)
    assert one.var_names.is_unique
    assert one.obs_names.is_unique
    assert list(one.obs["batch"]) == sorted(one.obs["batch"])
    assert one.obs["batch"].value_counts().sort_index().tolist() == drawn_from.sizes(400).tolist()
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


def test_cells_beyond_an_atlas_are_of_its_batches_but_not_in_it(drawn_from):
    inside, larger = drawn_from.in_memory(600), drawn_from.in_memory(8000)
    beyond = drawn_from.in_memory(200, beyond=600)
    assert beyond.obs["batch"].cat.categories.equals(inside.obs["batch"].cat.categories)
    known, in_larger = ({cell.tobytes() for cell in of.X.toarray()} for of in (inside, larger))
    cells = [cell.tobytes() for cell in beyond.X.toarray()]
    assert known.isdisjoint(cells)
    assert in_larger.issuperset(cells[:5])


# --- what is measured with them ---


@pytest.fixture
def small_module(tmp_path, monkeypatch):
    (tmp_path / "small_module.py").write_text(
        "def hold(megabytes):\n"
        "    return {'held': len(b'1' * (megabytes * 2**20))}\n"
        "def fail():\n"
        "    raise ValueError('no such luck')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "small_module", raising=False)
    return importlib.import_module("small_module")


def test_a_function_alone_has_its_own_peak_memory(small_module):
    ours = np.ones(2**25)  # which is not the other's
    small, large = (alone.run(small_module.hold, threads=1, megabytes=size) for size in (1, 101))
    assert large["held"] == 101 * 2**20
    assert 0.95 < (large["peak_bytes"] - small["peak_bytes"]) / (100 * 2**20) < 1.05
    assert small["peak_bytes"] < ours.nbytes
    with pytest.raises(RuntimeError, match=r"small_module.fail failed: (?s:.*)no such luck"):
        alone.run(small_module.fail, threads=1)


class FakeRun:
    """A run that ends in the third life."""

    lives = 0
    returncode = None

    def __init__(self, command):
        self.args = command
        FakeRun.lives += 1
        (Path(command[1]) / RUN).touch()

    def poll(self):
        (Path(self.args[1]) / RUN).touch()  # later than the wait for it began

    def communicate(self, timeout=None):
        if timeout is not None and FakeRun.lives < 3:
            raise subprocess.TimeoutExpired(self.args, timeout)
        if self.returncode is None:
            self.returncode = 0
        return "", ""

    def kill(self):
        self.returncode = -9


@pytest.mark.parametrize(("lives", "kills"), [(1, 1), (2, 2), (5, 2)])
def test_a_run_is_killed_and_goes_on_until_it_ends(tmp_path, monkeypatch, lives, kills):
    started = []

    def start(command, **options):
        started.append(command)
        return FakeRun(command)

    monkeypatch.setattr(FakeRun, "lives", 0)
    monkeypatch.setattr(subprocess, "Popen", start)
    command = ["run", str(tmp_path)]
    assert out_of_core.kill_and_resume(command, [60.0] * lives) == kills
    assert started == [command, *[[*command, "--resume"]] * kills]


def test_refusals_name_the_cause(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no space')", str(tmp_path)]
    with pytest.raises(RuntimeError, match="no space"):
        out_of_core.kill_and_resume(command, [60])
    anndata.AnnData(csr_matrix(np.ones((5, 3), np.float32))).write_h5ad(tmp_path / "5.h5ad")
    with pytest.raises(RuntimeError, match=r"5\.h5ad: is drawn from other cells"):
        out_of_core.make(tmp_path, 5)


def test_difference_of_parameters(tmp_path):
    def write(name, **state):
        (tmp_path / name / "model").mkdir(parents=True)
        torch.save({"model_state_dict": state}, tmp_path / name / "model" / "model.pt")
        return str(tmp_path / name)

    one = write("one", a=torch.ones(3), b=torch.tensor([1.0, 1.0]))
    other = write("other", a=torch.ones(3), b=torch.tensor([1.0, 1.25]))
    assert out_of_core.difference(one, other) == {"difference": 0.25}
    assert out_of_core.difference(one, one) == {"difference": 0.0}
    with pytest.raises(RuntimeError, match="hold different parameters"):
        out_of_core.difference(one, write("third", a=torch.ones(3)))


def in_this_process(patch):
    """Run steps here, where scanpy's cells and small blocks are; pictures without UMAP."""
    from vmm_fast import cli
    from vmm_fast.scvi import report as pictures

    def run(function, *, threads, **arguments):
        found = function(**json.loads(json.dumps(arguments)))
        return json.loads(json.dumps({**found, "peak_bytes": 2**30}))

    def finish(command):
        assert cli.main(command[3:]) == 0

    def kill_and_resume(command, lives):
        finish(command)
        return len(lives)

    patch.setattr(alone, "run", run)
    patch.setattr(out_of_core, "_finish", finish)
    patch.setattr(out_of_core, "kill_and_resume", kill_and_resume)
    patch.setattr(pictures, "_plane", lambda z, seed: (z[:, :2].astype(float), "Plot"))


def by_hand(patch):
    """Let every step find what is written here, at once, each with seconds of its own."""
    seconds = itertools.count(1)
    epochs = {out_of_core.STOCK: 4.0, out_of_core.VMM: 3.0, out_of_core.NORMAL: 2.0}

    def run(function, *, threads, path="300", cells=None, out=None, **_):
        if function is out_of_core.epochs:
            return {"32": {name: {"p50": value} for name, value in epochs.items()}}
        if out:
            Path(out).touch()
        count, now = int(Path(cells or path).name[:3]), float(next(seconds))
        return {
            **{"seconds": now, "cpu_seconds": now / 2, "training_seconds": now - 0.5},
            **{"loaded": count, "J": max(10, count // 20), "D": 10, "objective": [-3.0, -2.0]},
            **{"measured": 200, "times as fast": 1.5, "difference": 0.0, "loss": now},
            "peak_bytes": 2**30,
        }

    def make(folder, cells):
        (folder / f"{cells}.h5ad").touch()
        return folder / f"{cells}.h5ad"

    patch.setattr(alone, "run", run)
    patch.setattr(out_of_core, "make", make)
    patch.setattr(embedding, "save", lambda results: None)
    patch.setattr(out_of_core, "_finish", lambda command: None)
    patch.setattr(out_of_core, "kill_and_resume", lambda command, lives: len(lives))


@pytest.mark.filterwarnings("ignore")  # scvi-tools' and Lightning's own
@pytest.mark.parametrize(
    "steps",
    [
        by_hand,
        pytest.param(
            in_this_process, marks=pytest.mark.slow("eleven runs, most of which train a model")
        ),
    ],
)
def test_every_step_has_its_rows_and_its_place_on_the_page(steps, tmp_path, monkeypatch):
    steps(monkeypatch)
    monkeypatch.setattr(atlas, "GENES", GENES)
    quick = out_of_core.QUICK._replace(epoch_cells=200, resume_cells=200, shuffle_cells=300)
    monkeypatch.setattr(out_of_core, "QUICK", quick)
    monkeypatch.setitem(sys.modules, "scdataset", None)  # as if it were not installed
    options = Namespace(quick=True, cells=[300, 150], atlases=tmp_path / "atlases", threads=1)
    rows = list(out_of_core.measure(options))
    for mode in out_of_core.GROWING:
        line = select(rows, mode=mode, provider=out_of_core.VMM)
        assert [row["cells"] for row in line] == [150, 300]
        for row in line:
            assert row["cells/s"] == pytest.approx(row["cells"] / row["seconds"])
    for row in select(rows, mode=out_of_core.LOADER, provider=out_of_core.VMM):
        assert row["cells"] - quick.batch_size < row["loaded"] <= row["cells"]
    for row in select(rows, mode=out_of_core.EM, provider=out_of_core.VMM):
        assert (row["J"], row["D"]) == (max(10, row["cells"] // 20), 10)
        assert len(row["objective"]) == quick.iterations
        assert out_of_core.least_gain(row) > 0
    (theirs,) = select(rows, mode=out_of_core.EM, provider=out_of_core.SCIKIT_LEARN)
    assert (theirs["cells"], theirs["measured"]) == (300, quick.peer_points)
    epochs = {row["provider"]: row for row in select(rows, mode=out_of_core.EPOCH)}
    stock = epochs[out_of_core.STOCK]["p50"]
    for row in epochs.values():
        assert row["times stock"] == pytest.approx(row["p50"] / stock, abs=1e-3)
    assert [row["difference"] for row in select(rows, mode=out_of_core.RESUME)] == [0]
    losses = {row["provider"]: row["losses"] for row in select(rows, mode=out_of_core.SHUFFLING)}
    assert losses[out_of_core.IN_MEMORY] != losses[out_of_core.ON_DISK]
    assert all(np.isfinite(loss).all() for loss in losses.values())

    common = {"command": "python -m bench atlas", **environment()}
    write_rows(tmp_path / "atlas.jsonl", [{**common, **row} for row in rows])
    report.write(tmp_path)
    page = (tmp_path / "speed.md").read_text()
    assert "10,000,000 cells would take: prepare" in page
    assert "| in memory |" in page
    assert "| not installed |" in page
    assert "over 300 points" in page
    assert "measured at 200 points" in page
    assert (tmp_path / "atlas.png").read_bytes().startswith(b"\x89PNG")
    found = {check.target: check for check in checks(rows)}
    assert found["memory of vmm-fast integrate from disk"].measured == "1 GiB"
    assert found["parameters of a run that was killed, against one left alone"].met
    assert not list((tmp_path / "atlases").glob("tmp*"))


def test_scdataset_loads_every_cell(tmp_path, monkeypatch):
    pytest.importorskip("scdataset", reason="scDataset is not installed")
    from vmm_fast.scvi import loading

    monkeypatch.setattr(loading, "WINDOW", 150)
    path = tmp_path / "a.h5ad"
    atlas.write(path, 400, genes=GENES)
    assert out_of_core.load_scdataset(str(path), 64)["loaded"] == 400


def test_targets_of_an_atlas():
    def row(mode, cells, **more):
        return out_of_core._row(mode, out_of_core.VMM, cells, 2, **more)

    rows = [
        row(out_of_core.INTEGRATE, 100_000, peak_bytes=2**30),
        row(out_of_core.INTEGRATE, 1_000_000, peak_bytes=2**30 * 5 // 4),
        row(out_of_core.LOADER, 1_000_000, **{"cells/s": 30.0}),
        row(out_of_core.TRAINING, 1_000_000, **{"cells/s": 20.0}),
        row(out_of_core.EPOCH, 20_000, B=128, **{"times stock": 0.7}),
        row(out_of_core.EPOCH, 20_000, B=512, **{"times stock": 0.5}),
    ]
    found = [(check.value, check.verdict) for check in checks(rows)]
    verdicts = ["met", "MISSED", "met", "MISSED", "MISSED"]
    assert found == list(zip([0.7, 0.5, 1.25, 1.25, 1.5], verdicts, strict=True))


def test_exponents_ten_million_and_a_falling_objective():
    assert out_of_core.least_gain({"objective": [-3.0, -1.0, -1.25, -1.0]}) == -0.25
    rows = [{"cells": n, "seconds": 2e-5 * n**1.1} for n in (1e4, 1e5, 1e6)]
    assert out_of_core.exponent(rows) == pytest.approx(1.1)
    peaks = [{**row, "peak_bytes": 2**30 + 100 * row["cells"]} for row in rows]
    steps = {mode: rows for mode in out_of_core.GROWING} | {out_of_core.INTEGRATE: peaks}
    text = report._ten_million(steps)
    assert "prepare n^1.10" in text
    assert "by 100 bytes a cell" in text
    assert f"integrate {2e-5 * 1e7**1.1:.0f} s, " in text
    assert f"; and integrate {1 + 1e9 / 2**30:.2f} GiB" in text
