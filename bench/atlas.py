"""Atlases of any size to measure with, resampled from real cells.

A cell is drawn around the smoothed profile p of a real one: counts are negative binomial with mean

    m_g = depth * p_g e_g / sum_h p_h e_h,    e_g = exp(0.3 a_bg + 0.2 c_btg),

and inverse dispersion 4, where a and c are standard normal, one for every batch b and gene g and
one for every cell type t besides, and the depth is log-normal about a median of its batch. Batches
differ in size and in the share of each type, and lie one after the other, as studies do in an
atlas. Every block of a batch has a seed of its own: a larger atlas begins each batch with the same
cells as a smaller one. Memory holds one block and a few bytes a cell.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.sparse import csr_matrix, vstack

from bench.records import DATA

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

REAL = "pbmc3k_kang_3batch.h5ad"
BATCHES = 16
GENES = 2000
DENSITY = 0.15  # share of counts above 0
NEIGHBOURS = 15  # over which profiles are smoothed
DISPERSION = 4  # inverse
EFFECT, EFFECT_BY_TYPE = 0.3, 0.2
DEPTH_SPREAD, DEPTH_SPREAD_OF_BATCHES = 0.4, 0.25
BLOCK = 1024  # cells drawn at a time
WRITTEN = 16  # blocks to a write
CHUNK = 32_768  # values compressed together


class Block(NamedTuple):
    """Cells of one batch."""

    counts: csr_matrix
    batch: int
    types: np.ndarray


def real_cells() -> AnnData:
    """Return blood cells of three batches, or scanpy's 700 if there is no such file."""
    from anndata import read_h5ad

    if (DATA / REAL).exists():
        return read_h5ad(DATA / REAL)
    from vmm_fast.cells.reading import example  # which takes seconds to import

    adata = example().adata
    adata.obs["cell_type"] = adata.obs["bulk_labels"]
    return adata


class Atlas:
    """What all cells of an atlas are drawn from.

    Parameters
    ----------
    seed : int
        The same gives the same atlas.
    genes : int
        The most detected ones; where there are fewer real genes each is taken again, as another
        gene with batch effects of its own.

    Attributes
    ----------
    profiles : array [real cells, genes] of float32
        Smoothed, each of sum 1.
    types : array [real cells] of integers
    type_names, gene_names : arrays of str
    """

    def __init__(self, seed: int = 0, genes: int = GENES) -> None:
        adata = real_cells()
        order = np.argsort(-adata.X.getnnz(axis=0), kind="stable")
        chosen, again = np.resize(order, genes), np.arange(genes) // len(order)
        names = zip(adata.var_names[chosen], again, strict=True)
        self.gene_names = np.array([f"{name}-{n}" if n else name for name, n in names])
        self.type_names, self.types = np.unique(
            adata.obs["cell_type"].astype(str), return_inverse=True
        )
        self.profiles = _smoothed(adata.X[:, chosen].toarray())
        self._seed = seed
        rng = np.random.default_rng(seed)
        kinds = len(self.type_names)
        # So few of some types that a batch may have next to none.
        self._shares = rng.dirichlet(10 * np.bincount(self.types) / len(self.types), BATCHES)
        self._sizes = rng.lognormal(0, 0.6, BATCHES)
        effect = EFFECT * rng.standard_normal((BATCHES, 1, genes), dtype=np.float32)
        by_type = rng.standard_normal((BATCHES, kinds, genes), dtype=np.float32)
        self._effects = np.exp(effect + EFFECT_BY_TYPE * by_type)
        self._depths = rng.lognormal(0, DEPTH_SPREAD_OF_BATCHES, BATCHES)
        self._depths *= self._depth_of_density(rng)

    def _depth_of_density(self, rng: np.random.Generator) -> float:
        """Return the median depth at which the share of counts above 0 is :data:`DENSITY`."""
        shares = self.profiles[rng.integers(len(self.profiles), size=300)]
        depths = rng.lognormal(0, DEPTH_SPREAD, (len(shares), 1))
        low, high = 1.0, 1e7
        while high / low > 1.001:
            depth = (low * high) ** 0.5
            zeros = (1 + depth * depths * shares / DISPERSION) ** -DISPERSION
            low, high = (depth, high) if 1 - zeros.mean() < DENSITY else (low, depth)
        return depth

    def sizes(self, cells: int) -> np.ndarray:
        """Return the number of cells in each batch [BATCHES]."""
        ends = np.rint(cells * self._sizes.cumsum() / self._sizes.sum()).astype(np.int64)
        return np.diff(ends, prepend=0)

    def blocks(self, cells: int, *, beyond: int = 0) -> Iterator[Block]:
        """Draw so many cells, in the order in which they are written.

        With `beyond`, cells of the same batches that an atlas of so many cells does not have.
        """
        within = self.sizes(beyond)
        for batch, size in enumerate(self.sizes(cells)):
            first = -(-within[batch] // BLOCK)
            for number, start in enumerate(range(0, size, BLOCK)):
                counts, types = self._block(batch, first + number)
                yield Block(counts[: size - start], batch, types[: size - start])

    def in_memory(self, cells: int, *, beyond: int = 0) -> AnnData:
        """Return what :meth:`blocks` draws, with batches and types in obs."""
        from anndata import AnnData

        blocks = list(self.blocks(cells, beyond=beyond))
        counts = vstack([block.counts for block in blocks], format="csr")
        return AnnData(counts, self.obs([block.types for block in blocks]), self.var())

    def var(self) -> pd.DataFrame:
        """Return the genes' names as an index."""
        import pandas as pd

        return pd.DataFrame(index=self.gene_names)

    def obs(self, types: list[np.ndarray]) -> pd.DataFrame:
        """Return names, batches and types of all cells, from the types of all blocks."""
        import pandas as pd

        every = np.concatenate(types)
        names = [f"batch-{number + 1:02d}" for number in range(BATCHES)]
        batches = np.repeat(np.arange(BATCHES, dtype=np.int8), self.sizes(len(every)))
        columns = {
            "batch": pd.Categorical.from_codes(batches, names),
            "cell_type": pd.Categorical.from_codes(every, self.type_names),
        }
        return pd.DataFrame(columns, index=[f"cell-{i}" for i in range(len(every))])

    def _block(self, batch: int, number: int) -> tuple[csr_matrix, np.ndarray]:
        """Draw counts and types of a whole block."""
        rng = np.random.default_rng([self._seed, batch, number])
        chances = (self._shares[batch] / np.bincount(self.types))[self.types]
        cells = rng.choice(len(self.types), BLOCK, p=chances)
        types = self.types[cells].astype(np.int8)
        mean = self.profiles[cells] * self._effects[batch, types]
        depths = self._depths[batch] * rng.lognormal(0, DEPTH_SPREAD, (BLOCK, 1))
        mean *= depths / mean.sum(1, keepdims=True)
        counts = rng.poisson(mean * rng.standard_gamma(DISPERSION, mean.shape) / DISPERSION)
        return csr_matrix(counts.astype(np.float32)), types


def _smoothed(counts: np.ndarray) -> np.ndarray:
    """Average the profiles of the nearest cells in 20 principal components."""
    from sklearn.decomposition import PCA
    from sklearn.neighbors import kneighbors_graph

    profiles = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    places = PCA(20, random_state=0).fit_transform(np.log1p(1e4 * profiles))
    found = kneighbors_graph(places, NEIGHBOURS, include_self=True) @ profiles
    return (found / found.sum(1, keepdims=True)).astype(np.float32)


# --- files ---


def write(path: Path, cells: int, *, seed: int = 0, genes: int = GENES) -> None:
    """Write an atlas as anndata writes one, as gzipped CSR in .h5ad, whole or not at all.

    Parameters
    ----------
    path : Path
        Its folder must exist.
    cells : int
    seed, genes : int
        See :class:`Atlas`.
    """
    import h5py
    from anndata import AnnData
    from anndata.io import sparse_dataset, write_elem

    atlas = Atlas(seed, genes)
    temporary = path.with_name(f".{path.name}.tmp")
    zipped = {"compression": "gzip"}
    try:
        with h5py.File(temporary, "w") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what anndata means to change
            none = csr_matrix((0, genes), dtype=np.float32)
            write_elem(file, "/", AnnData(var=atlas.var()))
            options = {"chunks": (CHUNK,), "indptr_dtype": "int64", **zipped}
            write_elem(file, "X", none, dataset_kwargs=options)
            stored, types = sparse_dataset(file["X"]), []
            blocks = atlas.blocks(cells)
            while several := list(islice(blocks, WRITTEN)):
                stored.append(vstack([block.counts for block in several], format="csr"))
                types += [block.types for block in several]
            write_elem(file, "obs", atlas.obs(types), dataset_kwargs=zipped)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
