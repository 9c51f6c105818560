"""The command vmm-fast integrate on cells that stay on disk: the same results, bad input told."""

import re

import numpy as np
import pandas as pd
import pytest
from support import assigned, cells_of, complaint, integrated, make_cells, written

pytest.importorskip("scvi", reason="scvi-tools is not installed")

import anndata
from scipy.sparse import csc_matrix
from test_integrate import FILES, resume, same_results, stop, table

from vmm_fast.cells import CellStore, integration, selection, writing
from vmm_fast.cells.settings import Settings
from vmm_fast.scvi import VMMSCVI, loading

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("no_report")]


@pytest.fixture
def shards(tmp_path):
    """Return a folder of three files with the same cells; one has its genes in another order."""
    whole = make_cells(batches=3)
    (tmp_path / "shards").mkdir()
    for i, rows in enumerate(np.array_split(np.arange(60), 3)):
        part = whole[rows][:, np.arange(20)[::-1]] if i == 1 else whole[rows]
        part.copy().write_h5ad(tmp_path / "shards" / f"part{i}.h5ad")
    return tmp_path / "shards"


def test_cells_on_disk(tmp_path, shards, capsys, monkeypatch):
    monkeypatch.setattr(CellStore, "run", 5)
    monkeypatch.setattr(loading, "WINDOW", 32)
    monkeypatch.setattr(selection, "SAMPLE", 30)
    for path in shards.iterdir():
        part = anndata.read_h5ad(path)
        part.layers["counts"], part.X = part.X.copy(), np.log1p(part.X.toarray())
        part.write_h5ad(path)
    adata, out, again = make_cells(batches=3), tmp_path / "out", tmp_path / "again.h5ad"
    options = ["--batch-key", "batch", "--labels-key", "type", "--genes", 15, "--memory", 0]
    assert integrated(shards, out, *options, "--components", 6, "--layer", "counts") == 0
    shown = capsys.readouterr().out
    assert "60 cells x 20 genes, 3 batches, trained on the 15 genes" in shown
    assert "note: counts stay on disk" in shown
    assert {path.name for path in out.iterdir()} == FILES

    found = cells_of(out)
    assert found.X is None and list(found.obs_names) == list(adata.obs_names)
    for key in ("batch", "type"):
        assert list(found.obs[key]) == list(adata.obs[key])
    record = found.uns["vmm"]
    assert record["cells"] == 60 and record["on_disk"] and set(record["scores"]) == {"ari", "nmi"}

    # The model is the one that the columns are of, and assign finds the same again.
    adata.layers["counts"] = adata.X
    cells = adata[:, found.var_names[found.var["vmm_gene"]]].copy()
    model = VMMSCVI.load(out / "model", cells, accelerator="cpu")
    z = model.get_latent_representation()
    np.testing.assert_allclose(found.obsm["X_vmm"], z, atol=1e-5)
    clusters = found.obs["vmm_cluster"].astype(int).to_numpy()
    np.testing.assert_array_equal(clusters, model.get_clusters())
    assert (np.diff(np.bincount(clusters, minlength=6)) <= 0).all()
    assert record["clusters_used"] == len(np.unique(clusters))
    assert table(out) == (list(adata.obs_names), list(found.obs["vmm_cluster"]))
    assert assigned(out, written(tmp_path, adata, "all.h5ad"), again) == 0
    assert list(anndata.read_h5ad(again).obs["vmm_cluster"]) == list(found.obs["vmm_cluster"])


def test_batches_that_the_sample_or_no_cell_has(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "SAMPLE", 20)
    adata = make_cells(256)
    names = np.array(["b", "unused", "a", "rare"])
    codes = np.where(np.arange(256) < 120, 0, 2)
    codes[150:153] = 3
    adata.obs["batch"] = pd.Categorical.from_codes(codes, names)
    path = written(tmp_path, adata)
    settings = Settings.for_cells(adata, batch_key="batch", genes=15, on_disk=True)
    with CellStore(path) as store:
        some, on_disk, _ = selection.training_cells_on_disk(store, settings)
    assert some.n_obs == 64 and some.n_vars == 15
    assert len(set(some.obs["batch"])) < 3  # one was not drawn
    VMMSCVI.setup_anndata(some, batch_key="batch")
    field = VMMSCVI(some).registry["field_registries"]["batch"]["state_registry"]
    np.testing.assert_array_equal(
        field["categorical_mapping"][on_disk.obs["batch"].cat.codes], names[codes]
    )
    assert integrated(path, tmp_path / "out", "--memory", 0, "--batch-key", "batch") == 0


def test_a_run_on_disk_is_resumed_on_disk(h5ad, tmp_path, capsys, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ["--batch-size", 16, "--memory", 0]
    assert integrated(h5ad, whole, *options) == 0
    with monkeypatch.context() as patch:
        patch.setattr(integration.Progress, "on_train_epoch_end", stop)
        error = complaint(capsys, integrated(h5ad, broken, *options, "--checkpoint-steps", 3), 130)
    assert f"go on with: vmm-fast integrate {h5ad} --out {broken} --resume" in error
    assert (broken / "checkpoint.ckpt").exists()
    assert resume(h5ad, broken) == 0
    same_results(whole, broken)


def test_what_is_kept_on_disk(tmp_path, capsys):
    adata = make_cells()
    adata.var["chromosome"] = "1"
    adata.obsm["X_pca"] = np.ones((adata.n_obs, 2))
    adata.obs_names = ["same"] * 3 + list(adata.obs_names[3:])
    assert integrated(written(tmp_path, adata), tmp_path / "a", "--memory", 1e-9) == 0
    printed = capsys.readouterr().out
    assert "note: counts stay on disk" in printed
    assert "note: obs and var alone are kept, not counts, obsm/X_pca" in printed
    assert "note: 2 cells have a name that another has, too" in printed
    found = cells_of(tmp_path / "a")
    assert list(found.var) == [*adata.var, "vmm_gene"] and set(found.obsm) == {"X_vmm"}
    adata.X = csc_matrix(adata.X)  # of which no cells can be read: taken into memory
    path = written(tmp_path, adata)
    assert integrated(path, tmp_path / "b", "--memory", 0) == 0
    assert cells_of(tmp_path / "b").X is not None
    note = f"note: all counts are read into memory: {path}: X is stored by genes (CSC)"
    assert note in capsys.readouterr().out


def test_cells_on_disk_that_cannot_be_used(shards, tmp_path, capsys, monkeypatch):
    def refused(message, *options):
        error = complaint(capsys, integrated(shards, tmp_path / "out", *options))
        assert re.search(message, error), error
        assert not (tmp_path / "out").exists()

    refused("--batch-key plate: must be a column of obs", "--batch-key", "plate")
    refused("--labels-key plate: must be a column of obs", "--labels-key", "plate")
    refused("--components must be at most 60", "--components", 61)
    part = anndata.read_h5ad(shards / "part1.h5ad")
    broken = part.copy()
    broken.X = broken.X * np.float32(0.5)
    broken.write_h5ad(shards / "part1.h5ad")
    refused("^vmm-fast: [^ ]*part1.h5ad: X must hold counts")
    other = part.copy()
    other.var_names = [f"other {i}" for i in range(20)]
    other.write_h5ad(shards / "part1.h5ad")
    refused("part1.h5ad: .*genes")
    part.obs["batch"] = part.obs["batch"].where(part.obs_names == "cell 0")
    part.write_h5ad(shards / "part1.h5ad")
    refused("every cell must have a batch, 20 of 60 have none", "--batch-key", "batch")


def test_a_file_that_vanishes_while_training(h5ad, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "WINDOW", 16)
    real = integration.Progress.on_train_batch_end

    def vanish(self, *args):
        real(self, *args)
        h5ad.unlink(missing_ok=True)

    monkeypatch.setattr(integration.Progress, "on_train_batch_end", vanish)
    error = complaint(capsys, integrated(h5ad, tmp_path / "out", "--memory", 0, "--batch-size", 8))
    assert f"{h5ad}: " in error and not (tmp_path / "out" / "cells.h5ad").exists()


def test_the_report_of_cells_on_disk_has_the_numbers_of_all(
    h5ad, tmp_path, capsys, monkeypatch, with_report
):
    monkeypatch.setattr(CellStore, "run", 5)
    monkeypatch.setattr(selection, "SAMPLE", 10)
    # Three runs of five cells are drawn: none of two clusters or more.
    clusters = np.repeat([0, 1, 2, 4, 5], [5, 5, 10, 15, 25])
    probability = np.linspace(0.2, 1, 60, dtype=np.float32)
    found = writing.cluster_columns(clusters, probability, 1 - probability, clusters)
    monkeypatch.setattr(integration, "_find_clusters", lambda model, z, settings: found)
    options = ["--batch-key", "batch", "--labels-key", "type", "--components", 6, "--memory", 0]
    assert integrated(h5ad, tmp_path / "out", *options) == 0
    shown = capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text().replace("</td>\n", "</td>")
    page = page.replace("</th>\n", "</th>")
    assert "60 cells, 20 genes, 2 batches, 5 clusters of 5 non-empty components" in page
    assert "15 cells drawn from 60" in page

    table = pd.read_csv(tmp_path / "out" / "clusters.csv")
    groups = table.groupby("cluster")["probability"]
    rows = re.findall(r"</i>(\d+)</th><td>(\d+)</td><td>([\d.]+) %</td><td>([\d.]+)</td>", page)
    assert [int(row[0]) for row in rows] == [5, 4, 2, 0, 1]  # the largest first
    for cluster, number, share, mean in rows:
        of_one = groups.get_group(int(cluster))
        assert int(number) == len(of_one)
        assert (share, mean) == (f"{100 * len(of_one) / 60:.1f}", f"{of_one.mean():.2f}")
    assert f"<td>60</td><td>100 %</td><td>{table['probability'].mean():.2f}</td>" in page
    assert "of 60 labelled cells" in page
    scores = cells_of(tmp_path / "out").uns["vmm"]["scores"]
    for name, value in scores.items():
        assert f'<th scope="row">{name.upper()}</th><td>{value:.3f}</td>' in page
        assert re.search(f"{name.upper()}, by type +{value:.3f}", shown)
