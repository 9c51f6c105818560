"""Files of several modalities (.h5mu, and zarr of MuData): each reads as it does by itself."""

import h5py
import numpy as np
import pytest

pytest.importorskip("scvi", reason="scvi-tools is not installed")

from anndata import AnnData, read_h5ad
from mudata import MuData
from scipy.sparse import csc_matrix, csr_matrix
from support import separated_cells

from vmm_fast import cli
from vmm_fast._errors import InputError
from vmm_fast.cells import CellStore
from vmm_fast.cells.reading import read_cells
from vmm_fast.cells.store import CannotStream

pytestmark = pytest.mark.filterwarnings("ignore")


def make_proteins(cells, matrix=csr_matrix):
    counts = np.random.default_rng(1).poisson(2.0, (len(cells), 6)).astype(np.float32)
    proteins = AnnData(matrix(counts))
    proteins.obs_names = cells
    proteins.var_names = [f"CD{i}" for i in range(6)]
    return proteins


def write(path, rna, proteins):
    several = MuData({"rna": rna, "prot": proteins})
    several.write_zarr(path) if path.suffix == ".zarr" else several.write(path)
    return path


@pytest.fixture(params=[".h5mu", ".zarr"])
def both(request, tmp_path):
    """Return the path of a file of two modalities, and these."""
    rna = separated_cells()
    rna.layers["twice"] = 2 * rna.X
    proteins = make_proteins(rna.obs_names)
    return write(tmp_path / f"cells{request.param}", rna, proteins), rna, proteins


def dense(counts):
    return counts.toarray() if hasattr(counts, "toarray") else np.asarray(counts)


def test_a_modality_reads_as_a_file_of_its_own(both):
    path, rna, proteins = both
    with CellStore(path, modality="rna") as store:
        assert (store.n_obs, store.n_vars, list(store.var_names)) == (
            *rna.shape,
            list(rna.var_names),
        )
        np.testing.assert_array_equal(store.read(3, 90).toarray(), dense(rna.X[3:90]))
        assert list(store.column("batch")) == list(rna.obs["batch"])
        assert "mod/prot" in store.others and "mod/rna" not in store.others
    with CellStore(path, "twice", modality="rna") as store:
        np.testing.assert_array_equal(store.read(0, 9).toarray(), 2 * dense(rna.X[:9]))
    read = read_cells(str(path), modality="prot").adata
    np.testing.assert_array_equal(dense(read.X), dense(proteins.X))


def test_rows_of_the_other_modality_are_those_of_its_counts_in_any_order(both):
    path, _, proteins = both
    rows = np.random.default_rng(0).permutation(240)[:150]
    with CellStore(path, modality="rna") as store:
        other = store.other_modality("prot")
        assert other.shape == (240, 6) and len(other) == 240
        assert list(other.names) == list(proteins.var_names)
        np.testing.assert_array_equal(other[rows], dense(proteins.X)[rows])
        np.testing.assert_array_equal(other[np.array([5, 5])], dense(proteins.X)[[5, 5]])
        assert other[rows].dtype == np.float32 and other[rows[:0]].shape == (0, 6)
        for wrong in (rows > 3, rows.astype(float), [1, 2]):
            with pytest.raises(TypeError, match="rows must be an array of int"):
                other[wrong]
        inner = other._counts
    assert not inner._open  # closed with the store


@pytest.mark.parametrize("cells", [slice(None, None, -1), slice(200), np.r_[1, 0, 2:240]])
def test_modalities_of_other_cells_are_refused(tmp_path, cells):
    rna = separated_cells()
    path = write(tmp_path / "cells.h5mu", rna, make_proteins(rna.obs_names[cells]))
    message = "modalities must have the same cells in the same order, but have not"
    with CellStore(path, modality="rna") as store, pytest.raises(InputError, match=message):
        store.other_modality("prot")


def test_what_names_no_modality_is_refused(both, tmp_path):
    path, rna, _ = both
    for read in (CellStore, read_cells):
        with pytest.raises(InputError, match=r"must hold one modality, but holds .*rna.*prepare"):
            read(str(path))
        message = "--modality atac: must be one of the modalities, which are .*rna"
        with pytest.raises(InputError, match=message):
            read(str(path), modality="atac")
    rna.write_h5ad(alone := tmp_path / "alone.h5ad")
    for read in (CellStore, read_cells):
        with pytest.raises(InputError, match="one of the modalities, but there are none"):
            read(str(alone), modality="rna")


def test_a_modality_by_genes_is_not_streamed_but_prepared(tmp_path, capsys):
    rna = separated_cells()
    rna.X = csc_matrix(rna.X)
    path = write(tmp_path / "cells.h5mu", rna, make_proteins(rna.obs_names))
    message = "vmm-fast prepare --modality rna makes a file that can"
    with pytest.raises(CannotStream, match=message):
        CellStore(path, modality="rna")
    out = tmp_path / "rna.h5ad"
    assert cli.main(["prepare", str(path), "--modality", "rna", "--out", str(out)]) == 0
    prepared = read_h5ad(out)
    np.testing.assert_array_equal(dense(prepared.X), dense(rna.X))
    assert list(prepared.obs["batch"]) == list(rna.obs["batch"])


@pytest.mark.parametrize("matrix", [csr_matrix, csc_matrix])
def test_prepare_names_what_all_modalities_share(tmp_path, capsys, matrix):
    rna = separated_cells()
    rna.X = matrix(rna.X)
    several = MuData({"rna": rna, "prot": make_proteins(rna.obs_names)})
    several.obs["cell_type"] = "T"
    several.obsm["X_wnn"] = np.ones((240, 2))
    several.uns["made"] = "by hand"
    several.write(path := tmp_path / "cells.h5mu")
    out = tmp_path / "rna.h5ad"
    assert cli.main(["prepare", str(path), "--modality", "rna", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    for name in ("mod/prot", "/obs/cell_type", "/obsm/X_wnn", "/uns"):
        assert name in said
    assert "/obsm/prot" not in said and "mod/rna" not in said


def test_prepare_says_what_it_leaves_out(both, tmp_path, capsys):
    path, _, proteins = both
    out = tmp_path / "prot.h5ad"
    assert cli.main(["prepare", str(path), "--modality", "prot", "--out", str(out)]) == 0
    assert "alone are kept, not mod/rna" in capsys.readouterr().out
    np.testing.assert_array_equal(dense(read_h5ad(out).X), dense(proteins.X))


@pytest.mark.parametrize("command", ["integrate", "prepare", "sweep"])
def test_commands_say_how_to_go_on(both, command, tmp_path, monkeypatch, capsys):
    path, *_ = both
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, str(path)]) == 2
    error = capsys.readouterr().err
    assert "holds prot, rna" in error or "holds rna, prot" in error
    assert "vmm-fast prepare --modality" in error and error.count("\n") == 1


def test_a_file_that_is_damaged_is_told(tmp_path):
    rna = separated_cells()
    path = write(tmp_path / "cells.h5mu", rna, make_proteins(rna.obs_names))
    with h5py.File(path, "r+") as file:
        del file["mod/rna/obs"]
    with pytest.raises(InputError, match=r"cells\.h5mu"):
        CellStore(path, modality="rna")
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(InputError, match=r"is damaged or no \.h5mu file"):
        CellStore(path, modality="rna")
