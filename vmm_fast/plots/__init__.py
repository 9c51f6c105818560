"""Pictures of a trained model: latent space, samples, the tree of components, training curves.

Each function draws on a ``matplotlib.figure.Figure`` of its own, so that no display, no pyplot
state and no backend setting is involved, and writes the file whole or not at all. The ending of
`path` chooses the format (png, pdf, svg). ValueError is raised for shapes that do not fit and for
values that are not finite, ImportError without matplotlib.
"""

from vmm_fast.plots.components import plot_cluster_samples, plot_component_weights, plot_tree
from vmm_fast.plots.latent import plot_latent
from vmm_fast.plots.training import plot_training_curves

__all__ = [
    "plot_cluster_samples",
    "plot_component_weights",
    "plot_latent",
    "plot_training_curves",
    "plot_tree",
]
