"""Files of rows and pictures: what `vmm-fast cluster` and `vmm-fast demo` do."""

from vmm_fast.arrays.clustering import Clusterer

__all__ = ["Clusterer"]
