"""Marker genes of clusters by the model's own differential expression, one against all others.

Cells a of the cluster and b of the others are drawn in pairs, each with a z from its posterior,
and both are decoded as of a's batch and covariates, to shares f_g of all expression. Then

    LFC_g = log2((f_g(z_a) + e) / (f_g(z_b) + e)),    e a tenth of the mean share, 0.1 / G

and P(LFC_g > 0.25) over the pairs is the probability that gene g is higher in the cluster (Boyeau
et al. 2019, bioRxiv 794289, as mode "change" of scvi-tools' ``differential_expression``, whose
delta this is). That method decodes all other cells once for each cluster and batch, and keeps all
samples in memory; here time grows with the number of clusters alone, and memory with none of these.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS
from scvi.utils import unsupported_if_adata_minified

__all__ = ["LEAST_CELLS", "MarkerGenes"]

PAIRS = 512  # of cells, for each cluster
BLOCK = 64  # pairs that are decoded together
DELTA = 0.25  # least log2 fold change that counts
LEAST_CELLS = 10  # clusters of fewer cells have no marker genes
LEAST_PROBABILITY = 0.7  # of a marker gene; that of a gene without effect is below 0.5
LEAST_SHARE = 0.1  # of the cluster's cells that express a marker gene
MOST = 100  # marker genes of a cluster
CONDITIONS = (REGISTRY_KEYS.BATCH_KEY, REGISTRY_KEYS.CAT_COVS_KEY, REGISTRY_KEYS.CONT_COVS_KEY)
MEASURES = ("log2_fold_change", "probability", "share", "share_of_others")


class MarkerGenes:
    """Mixin for models that decode to gene expression: marker genes of clusters."""

    adata: Any
    module: Any
    device: torch.device
    _check_if_trained: Any
    _make_data_loader: Any
    get_clusters: Any
    get_var_names: Any

    @unsupported_if_adata_minified
    def get_marker_genes(self, clusters: Any = None, seed: int = 0) -> pd.DataFrame:
        """Return the genes that are higher in each cluster than in the other cells.

        Pairs of cells are compared as if they were of one batch and had the same covariates
        (:mod:`vmm_fast.scvi.markers`). The cells that clusters were found in are those that genes
        are sought in, so that probabilities only rank genes.

        Parameters
        ----------
        clusters : array or Categorical [cells], optional
            Cluster of each cell that the model was made with, NaN for none; by default those of
            :meth:`get_clusters`.
        seed : int
            Determines which cells are drawn.

        Returns
        -------
        DataFrame
            At most 100 genes for each cluster of 10 cells or more, which have a probability of at
            least 0.7 and are expressed in a tenth of its cells; those of about 1 come first, then
            those of about 0.9, and so on, and among these the largest fold change. Columns
            ``cluster``, ``gene``, ``log2_fold_change`` (mean), ``probability``, and ``share`` and
            ``share_of_others``, of cells that express the gene.
        """
        self._check_if_trained(warn=False)
        # Loaders and modules draw from the global generators, whose state is the caller's.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            return self._marker_genes(self.get_clusters() if clusters is None else clusters, seed)

    def _marker_genes(self, clusters: Any, seed: int) -> pd.DataFrame:
        of_cell = pd.Categorical(clusters)
        if len(of_cell) != self.adata.n_obs:
            raise ValueError(
                f"clusters must be of the model's {self.adata.n_obs} cells, but are of "
                f"{len(of_cell)}"
            )
        random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        found = [pd.DataFrame(columns=["cluster", "gene", *MEASURES])]
        for number, cluster in enumerate(of_cell.categories):
            inside = of_cell.codes == number
            groups = [np.flatnonzero(x) for x in (inside, ~inside & (of_cell.codes >= 0))]
            if min(map(len, groups)) < LEAST_CELLS:
                continue
            drawn = np.stack([np.resize(random.permutation(cells), PAIRS) for cells in groups])
            measured = self._compare(drawn, generator)
            clear = measured["probability"] >= LEAST_PROBABILITY
            kept = measured[clear & (measured["share"] >= LEAST_SHARE)]
            # So many pairs tell hardly more than one digit of a probability.
            order = np.lexsort((kept["log2_fold_change"], kept["probability"].round(1)))[::-1]
            genes = kept.iloc[order].head(MOST).rename_axis("gene").reset_index()
            genes.insert(0, "cluster", cluster)
            found.append(genes)
        return pd.concat(found[1:] or found, ignore_index=True)

    @torch.inference_mode()
    def _compare(self, drawn: np.ndarray, generator: torch.Generator) -> pd.DataFrame:
        """Return what tells marker genes, for all genes, of pairs of cells [2, PAIRS]."""
        module, names = self.module, self.get_var_names()
        total: Any = 0.0
        higher: Any = 0.0
        expressed: Any = 0.0
        order = drawn.reshape(2, -1, BLOCK).swapaxes(0, 1).ravel()
        for tensors in self._make_data_loader(self.adata, indices=order, batch_size=2 * BLOCK):
            outputs = module.inference(**module._get_inference_input(tensors))
            q = outputs["qz"]
            z = q.loc + q.scale * torch.randn(q.loc.shape, generator=generator).to(q.loc)
            outputs["z"] = module.z_encoder.z_transformation(z)
            for key in CONDITIONS:
                if tensors.get(key) is not None:
                    tensors[key] = tensors[key][:BLOCK].repeat(2, 1)
            px = module.generative(**module._get_generative_input(tensors, outputs))["px"]
            log_shares = (px.get_normalized("scale") + 0.1 / len(names)).log2()
            change = torch.sub(*log_shares.chunk(2))
            total += change.sum(0).cpu()
            higher += (change > DELTA).sum(0).cpu()
            expressed += (tensors[REGISTRY_KEYS.X_KEY] > 0).view(2, BLOCK, -1).sum(1).cpu()
        values = torch.stack([total, higher, *expressed]) / drawn.shape[1]
        return pd.DataFrame(dict(zip(MEASURES, values.double().numpy(), strict=True)), names)
