"""Densities of conditions, next to those of scvi-tools."""

from importlib.metadata import version

import pandas as pd
import pytest
from packaging.version import parse
from support import TRAIN, scvi_model, separated_cells

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")

from scvi.model.base import VAEMixin  # noqa: E402

from vmm_fast.scvi import VMMSCVI, abundance  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def test_densities_of_conditions_are_those_of_scvi_tools(monkeypatch):
    model = scvi_model(VMMSCVI, separated_cells(), {}, n_components=12)
    model.train(2, **TRAIN)

    def stock(self, adata, indices, batch_size, dof):
        q = VAEMixin.get_aggregated_posterior(self, adata, indices, batch_size, dof)
        if parse(version("scvi-tools")) < parse("1.5"):  # whose scales are the variances
            normal = q.component_distribution.base_dist
            normal.scale = normal.scale.sqrt()
        return q

    def densities():
        model.differential_abundance(sample_key="batch")
        return model.adata.obsm.pop("da_log_probs")

    monkeypatch.setattr(abundance, "CHUNK", 7)
    ours = densities()
    monkeypatch.setattr(VMMSCVI, "get_aggregated_posterior", stock)
    assert (ours["batch 0"] - ours["batch 1"]).std() > 0.01
    pd.testing.assert_frame_equal(ours, densities(), rtol=1e-5)
