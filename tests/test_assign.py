"""The command vmm-fast assign: the clusters of new cells, in memory and on disk; bad input told."""

import errno
import os
import re
import signal
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from support import assigned, cells_of, complaint, integrated, make_cells, model_of, written

pytest.importorskip("scvi", reason="scvi-tools is not installed")

import anndata
from scipy.sparse import csc_matrix, csr_matrix

from vmm_fast import cli
from vmm_fast.cells import CellStore, assignment, integration, selection, writing
from vmm_fast.scvi import VMMSCVI, LatentPrior, loading

COLUMNS = list(writing.COLUMNS)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("no_report")]


def test_the_training_cells_get_their_clusters_again(trained, tmp_path, capsys):
    adata = cells_of(trained)
    expected, z = adata.obs[COLUMNS].copy(), adata.obsm.pop("X_vmm")
    adata.obs = adata.obs.drop(columns=COLUMNS)
    random = np.random.default_rng(0)
    cells = random.permutation(adata.n_obs)[:40]
    path = written(tmp_path, adata[cells, random.permutation(adata.n_vars)].copy())
    before = path.read_bytes()
    assert assigned(trained / "model", path, tmp_path / "out.h5ad") == 0
    assert capsys.readouterr().err == ""
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_allclose(found.obsm["X_vmm"], z[cells], atol=1e-5)
    assert list(found.obs["vmm_cluster"]) == list(expected["vmm_cluster"].iloc[cells])
    assert found.n_vars == 20
    assert path.read_bytes() == before


def test_a_file_to_write_that_is_a_folder_or_in_none(trained, h5ad, tmp_path, capsys, monkeypatch):
    def no_work(*arguments):
        raise AssertionError

    monkeypatch.setattr(assignment, "find_model", no_work)
    (tmp_path / "dir.h5ad").mkdir()
    for options in ([], ["--overwrite"]):
        error = complaint(capsys, assigned(trained, h5ad, tmp_path / "dir.h5ad", *options))
        assert f"--out {tmp_path / 'dir.h5ad'}: must be a file, but is a folder" in error

    def refused(*arguments, **keywords):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cli.cells.tempfile, "TemporaryFile", refused)
    error = complaint(capsys, assigned(trained, h5ad, tmp_path / "o.h5ad"))
    assert f"--out {tmp_path / 'o.h5ad'}: must lie in a folder that can be written to" in error
    assert "Read-only file system" in error


@pytest.mark.parametrize(
    ("batch", "note"),
    [
        (["b0", *["new"] * 29], "a batch that the model does not know: new, whose"),
        (pd.Categorical([1] * 30), "a batch that the model does not know: 1, whose"),
        (None, "obs has no 'batch', the model's batches: all cells"),
    ],
)
def test_cells_of_new_batches_are_encoded_as_of_all_known_ones(
    trained, tmp_path, capsys, in_small_parts, batch, note
):
    adata = make_cells(30, batches=3, seed=2)
    del adata.obs["batch"]
    if batch is not None:
        adata.obs["batch"] = batch
    path = written(tmp_path, adata)
    found, notes = same_as_in_memory(trained, path, path, tmp_path, capsys)
    assert len(notes) == 1 and note in notes[0]
    model = VMMSCVI.load(trained / "model", accelerator="cpu", adata=None)
    counts = torch.from_numpy(adata[:, model.get_var_names()].X.toarray())
    batches = torch.full((30, 3), 1 / 3)
    if isinstance(batch, list):
        batches[0] = torch.tensor([1.0, 0, 0])
    with torch.no_grad():
        q, _ = model.module.z_encoder(counts.log1p(), batches)
    np.testing.assert_allclose(found.obsm["X_vmm"], q.loc, atol=1e-5)


def test_clusters_of_another_cut_of_the_model_s_tree(trained, tmp_path, capsys):
    cells, out = trained / "cells.h5ad", tmp_path / "out.h5ad"

    def clusters(*options):
        assert assigned(trained, cells, out, "--overwrite", *options) == 0
        found = anndata.read_h5ad(out)
        return found.obs["vmm_cluster"].astype(int), found.uns.get("dendrogram_vmm_cluster")

    kept, tree = clusters()
    assert list(kept) == list(cells_of(trained).obs["vmm_cluster"].astype(int))
    expected = cells_of(trained).uns["dendrogram_vmm_cluster"]["linkage"]
    np.testing.assert_array_equal(tree["linkage"], expected)
    one, tree = clusters("--clusters", 1)
    assert set(one) == {0} and tree is None  # nor does that of the run stay
    finer, _ = clusters("--separation", 1e-6, "--resolution", 100)
    cut = model_of(trained).get_clusters(resolution=100, separation=1e-6)
    np.testing.assert_array_equal(finer, cut)
    for message, *options in (
        ("n_clusters must be from 1 to", "--clusters", 99),
        ("--clusters must be given without", "--clusters", 2, "--resolution", 2),
    ):
        code = assigned(trained, cells, out, "--overwrite", *options)
        assert message in complaint(capsys, code)


def trained_gene(trained):
    var = cells_of(trained).var
    return var.index[var["vmm_gene"]][3]


def test_bad_input_to_assign(trained, tmp_path, capsys):
    cells, out, bad = written(tmp_path), tmp_path / "out.h5ad", tmp_path / "bad"
    bad.mkdir()
    (bad / "model.pt").write_bytes(b"garbage")
    out.write_text("mine")

    def refused(message, model=trained, out=out, *options):
        assert message in complaint(capsys, assigned(model, cells, out, *options))

    refused(
        "must be a folder that integrate wrote, holds no model.pt", tmp_path, tmp_path / "a.h5ad"
    )
    refused("must be a whole file of torch.save, but is damaged", bad, tmp_path / "a.h5ad")
    refused("must end in .h5ad", out=tmp_path / "out.csv")
    refused("folder that can be written to", out=tmp_path / "nowhere" / "out.h5ad")
    refused("is the input", trained, cells, "--overwrite")
    refused("exists")
    assert out.read_text() == "mine"
    assert assigned(trained, cells, out, "--overwrite") == 0


def make_query(number=300):
    """Cells of two batches that the model knows and two that it does not, genes in disorder."""
    adata = make_cells(number, batches=3, seed=2)
    adata.obs["batch"] = np.repeat(["b0", "b2", "new", "other"], number // 4)
    return adata[:, np.random.default_rng(0).permutation(adata.n_vars)].copy()


@pytest.fixture
def in_small_parts(monkeypatch):
    """Read windows of one mini-batch; collect how many cells are read at a time."""
    read, sizes = CellStore.read, []

    def spied(self, starts, stops, *rest):
        sizes.append(int(np.sum(np.asarray(stops) - starts)))
        return read(self, starts, stops, *rest)

    monkeypatch.setattr(loading, "WINDOW", 128)
    monkeypatch.setattr(integration, "WINDOW", 50)
    monkeypatch.setattr(writing, "ROWS", 70)
    monkeypatch.setattr(CellStore, "read", spied)
    return sizes


def notes_of(capsys):
    """Return the notes but that on coarse novelty, and those about what is kept where."""
    shown = capsys.readouterr()
    assert shown.err == ""
    notes = [line for line in shown.out.splitlines() if line.startswith("note: ")]
    of_disk = [note for note in notes if "stay on disk" in note or "alone are kept" in note]
    notes = [note for note in notes if "is coarse" not in note]
    return [note for note in notes if note not in of_disk], of_disk


def same_as_in_memory(model, cells, whole, folder, capsys, *options):
    """Cells on disk, some of them in `cells`, are assigned as all of `whole` in memory."""
    on_disk, in_memory = folder / "on_disk.h5ad", folder / "in_memory.h5ad"
    assert assigned(model, cells, on_disk, "--overwrite", "--memory", 0, *options) == 0
    notes, of_disk = notes_of(capsys)
    assert "counts stay on disk" in of_disk[0]
    assert "obs and var alone are kept, not counts" in of_disk[1]
    assert assigned(model, whole, in_memory, "--overwrite", *options) == 0
    assert notes_of(capsys) == (notes, [])
    one, other = anndata.read_h5ad(on_disk), anndata.read_h5ad(in_memory)
    np.testing.assert_array_equal(one.obsm["X_vmm"], other.obsm["X_vmm"])
    pd.testing.assert_frame_equal(one.obs, other.obs)
    pd.testing.assert_frame_equal(one.var, other.var)
    np.testing.assert_equal(dict(one.uns), dict(other.uns))
    assert one.X is None and other.X is not None
    return one, notes


@pytest.mark.parametrize("kind", ["zarr", "shards"])
def test_cells_on_disk_are_assigned_as_in_memory(
    trained, tmp_path, kind, capsys, monkeypatch, in_small_parts
):
    monkeypatch.setattr(assignment, "MOST_MISSING", 0.1)
    gene = trained_gene(trained)
    adata = make_query()
    adata = adata[:, adata.var_names != gene].copy()
    adata.obs["vmm_cluster"] = "of an earlier run"
    adata.obs["depth"] = adata.X.sum(1).A1
    adata.obs["depth"] = adata.obs["depth"].astype(np.float32)
    adata.obs.index.name = "barcode"
    adata.var["symbol"] = [f"S{i}" for i in range(19)]
    if kind == "shards":  # with the model's layer
        adata.layers["counts"], adata.X = adata.X.copy(), np.log1p(adata.X.toarray())
    whole, cells = written(tmp_path, adata), tmp_path / f"cells.{kind}"
    if kind == "zarr":
        adata.write_zarr(cells)
    else:
        cells.mkdir()
        for i, rows in enumerate(np.array_split(np.arange(300), 3)):
            part = adata[rows][:, np.arange(19)[::-1]] if i else adata[rows]
            written(cells, part.copy(), f"{i}.h5ad")
    found, notes = same_as_in_memory(trained, cells, whole, tmp_path, capsys)
    assert f"1 of the model's 18 genes is missing, taken as 0: {gene}" in notes[0]
    assert "2 batches that the model does not know: new, other, whose" in notes[1]
    assert notes[2:] == [f"note: {selection.EARLIER}"]
    assert list(found.obs) == ["batch", "type", COLUMNS[0], "depth", *COLUMNS[1:], "vmm_novelty"]
    assert found.uns["vmm"] == {"model": str((trained / "model").resolve())}
    assert sum(in_small_parts) == 300 and max(in_small_parts) <= 128

    # As scvi-tools itself embeds cells of known batches.
    counts = make_query()[:150]
    counts.X[:, counts.var_names == gene] = 0
    counts.layers["counts"] = counts.X
    model = VMMSCVI.load(trained / "model", accelerator="cpu", adata=None)
    counts = counts[:, model.get_var_names()].copy()
    z = model.get_latent_representation(counts)
    np.testing.assert_allclose(found.obsm["X_vmm"][:150], z, atol=1e-5)
    novelty = found.obs["vmm_novelty"]
    np.testing.assert_allclose(novelty[:150], model.get_novelty(counts), atol=0.05)
    assert novelty.between(0, 1).all() and novelty.nunique() > 5


def test_neighbours_are_sought_once_a_call(trained, tmp_path, monkeypatch):
    calls, points = [], LatentPrior._points
    monkeypatch.setattr(LatentPrior, "_points", lambda self: calls.append(1) or points(self))
    path = written(tmp_path, make_cells(300))  # three mini-batches
    assert assigned(trained, path, tmp_path / "out.h5ad") == 0 and len(calls) == 1


def test_a_novelty_that_few_cells_calibrate_is_noted(trained, tmp_path, capsys, monkeypatch):
    note = "obs['vmm_novelty'] is coarse: it is compared with that of 6 held-out cells, in steps of"
    for few, expected in ((7, [f"note: {note} 0.14"]), (6, [])):
        monkeypatch.setattr(assignment, "FEW", few)
        out = tmp_path / "out.h5ad"
        assert assigned(trained, written(tmp_path, make_query(100)), out, "--overwrite") == 0
        shown = capsys.readouterr().out.splitlines()
        assert [line for line in shown if "coarse" in line] == expected
        found = anndata.read_h5ad(out).obs["vmm_novelty"]
        np.testing.assert_allclose(found * 7, np.rint(found * 7), atol=1e-9)


def test_a_model_that_was_saved_before_there_was_novelty(trained, tmp_path, capsys):
    saved = torch.load(trained / "model" / "model.pt", weights_only=False)
    del saved["model_state_dict"]["novelty_cells"]
    torch.save(saved, tmp_path / "model.pt")
    assert assigned(tmp_path, trained / "cells.h5ad", tmp_path / "out.h5ad") == 0
    assert f"note: {assignment.NOT_CALIBRATED}" in notes_of(capsys)[0]
    assert anndata.read_h5ad(tmp_path / "out.h5ad").obs["vmm_novelty"].isna().all()


def test_a_model_without_batches(h5ad, plain, tmp_path, capsys):
    expected = cells_of(plain)
    found, notes = same_as_in_memory(plain, h5ad, h5ad, tmp_path, capsys)
    assert notes == []
    np.testing.assert_array_equal(found.obsm["X_vmm"], expected.obsm["X_vmm"])
    assert found.obs[COLUMNS].equals(expected.obs[COLUMNS])


def test_where_cells_to_assign_are_kept(trained, tmp_path, capsys, monkeypatch):
    adata = make_query(100)
    (tmp_path / "parts").mkdir()
    adata.obsm["X_pca"] = np.zeros((100, 2))
    written(tmp_path / "parts", adata)
    assert assigned(trained, tmp_path / "parts", tmp_path / "a.h5ad") == 0
    assert notes_of(capsys)[1] == [
        "note: counts stay on disk, in several files",
        "note: obs and var alone are kept, not counts, obsm/X_pca",
    ]
    adata.obs_names = ["same"] * 3 + list(adata.obs_names[3:])
    adata.X = csc_matrix(adata.X)  # of which no cells can be read: taken into memory
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    by_genes = written(tmp_path, adata)
    assert assigned(trained, by_genes, tmp_path / "b.h5ad", "--memory", 0) == 0
    shown = capsys.readouterr()
    assert "note: 2 cells have a name that another has, too" in shown.out
    assert "stay on disk" not in shown.out and "cells 100/100 |" in shown.err
    one, other = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in "ab")
    np.testing.assert_array_equal(one.obsm["X_vmm"], other.obsm["X_vmm"])
    assert other.X is not None and "X_pca" in other.obsm


def test_cells_on_disk_that_cannot_be_assigned(trained, tmp_path, capsys):
    out = tmp_path / "out.h5ad"

    def refused(adata, message, *options):
        """In memory and on disk alike."""
        path = written(tmp_path, adata)
        errors = [
            complaint(capsys, assigned(trained, path, out, "--memory", memory, *options))
            for memory in (0, 1)
        ]
        assert errors[0] == errors[1]
        assert errors[0].startswith(f"vmm-fast: {path}: ") and errors[0].count(str(path)) == 1
        assert re.search(message, errors[0]), errors[0]
        assert not out.exists()

    adata = make_query(100)
    gene = trained_gene(trained)
    message = f"1 of the model's 18 genes is missing, more than 5%: {gene}"
    refused(adata[:, adata.var_names != gene].copy(), message)
    refused(adata, "--layer no: must be one of the layers, but there are none", "--layer", "no")
    adata.obs["batch"] = adata.obs["batch"].where(adata.obs["batch"] != "new")
    refused(adata, "'batch' of obs: every cell must have a batch, 25 of 100 have none")
    adata = make_query(100)
    adata.X = adata.X * np.float32(0.5)
    refused(adata, r"X must hold counts, whole numbers from 0, has \d*\.5 in cell 'cell 0', gene")


def test_assigning_that_fails_leaves_the_old_file(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(writing, "ROWS", 20)
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    cells, out = written(tmp_path / "in", make_query(100)), tmp_path / "out" / "out.h5ad"
    out.write_text("mine")
    inference = assignment.latent_means

    def meanwhile(happens):
        def embed(*arguments, **keywords):
            happens()
            return inference(*arguments, **keywords)

        monkeypatch.setattr(assignment, "latent_means", embed)

    def fails(message, code=2, memory=0):
        options = ("--memory", memory, "--overwrite")
        error = complaint(capsys, assigned(trained, cells, out, *options), code)
        assert re.search(message, error), error
        assert out.read_text() == "mine" and list(out.parent.iterdir()) == [out]

    meanwhile(cells.touch)
    fails(f"^vmm-fast: {cells}: has changed since it was opened")
    meanwhile(cells.unlink)
    fails(f"^vmm-fast: {cells}: was removed since it was opened")
    written(tmp_path / "in", make_query(100))
    meanwhile(lambda: None)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        for memory in (0, 1):
            message = f"^vmm-fast: {out}: cannot be written: No space left on device"
            fails(message, memory=memory)
        error = complaint(capsys, integrated(cells, tmp_path / "run"))
        assert "cells.h5ad: cannot be written: No space left on device" in error
        assert "cells.h5ad" not in os.listdir(tmp_path / "run")
    append = writing.H5adWriter.append

    def interrupted(self, obs, *rest, **keywords):
        append(self, obs, *rest, **keywords)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(writing.H5adWriter, "append", interrupted)
        fails("interrupted", 130)
    meanwhile(lambda: signal.raise_signal(signal.SIGINT))
    fails("interrupted", 130)


def test_cells_without_counts_are_assigned(trained, tmp_path):
    adata = make_query(100)
    adata.X = csr_matrix(adata.shape, dtype=np.float32)
    assert assigned(trained, written(tmp_path, adata), tmp_path / "out.h5ad") == 0
    assert len(set(anndata.read_h5ad(tmp_path / "out.h5ad").obs["vmm_cluster"])) <= 3


@pytest.mark.parametrize(
    "options",
    [
        {"use_observed_lib_size": False},  # cannot be loaded without cells
        {"encode_covariates": False, "log_variational": False},
        {"batch_representation": "embedding"},
        {"prior": "normal"},
    ],
)
def test_models_that_were_not_made_by_integrate(tmp_path, capsys, options):
    adata = make_cells(batches=3)
    VMMSCVI.setup_anndata(adata, batch_key="batch")
    model = VMMSCVI(adata, **{"n_components": 5, **options})
    model.train(1, accelerator="cpu", enable_progress_bar=False, logger=False)
    model.save(tmp_path / "model")
    code = assigned(tmp_path / "model", written(tmp_path, adata), tmp_path / "out.h5ad")
    if options == {"prior": "normal"}:
        error = complaint(capsys, code)
        assert f"{tmp_path / 'model'}: must be a model with clusters, but is of N(0, I)" in error
        return
    assert code == 0
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    z, _ = model.get_latent_representation(return_dist=True)
    np.testing.assert_allclose(found.obsm["X_vmm"], z, atol=1e-5)
