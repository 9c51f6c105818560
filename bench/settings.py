"""Clusters of images under other settings: those of the command, with one changed at a time."""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from torch import Tensor

from bench.peers import DATASETS, MakePrior, Method, compare, measurement, ours
from bench.records import Row, select
from vmm_fast import VMMPrior
from vmm_fast.priors import Prior

# For any number of components, clusters (a share of their mean) and NMI must stay within these.
CLUSTERS_WITHIN, NMI_WITHIN = 0.2, 0.03


def prior(**options: Any) -> MakePrior:
    """Return the prior as it is but for some options."""

    def make(start: Tensor, latent_dim: int, **usual: Any) -> Prior:
        if k := options.get("pseudo_inputs_per_component"):
            start = start[: len(start) // k * k]
        return VMMPrior(start, latent_dim, **{**usual, **options})

    return make


def badly_started(start: Tensor, latent_dim: int, **usual: Any) -> Prior:
    """Return the prior with all pseudo-inputs close to one image."""
    return VMMPrior(start[:1] + 0.01 * torch.randn_like(start), latent_dim, **usual)


def _varied(name: str, title: str, values: tuple[Any, ...]) -> dict[str, Method]:
    return {
        f"{name.replace('_', '-')}-{value}": Method(
            title.format(value), False, ours(**{name: value})
        )
        for value in values
    }


CHANGED_PRIORS: dict[str, tuple[str, MakePrior]] = {
    "bad-start": ("all pseudo-inputs start at one image", badly_started),
    "batch-weight": ("parameter priors divided by the batch size", prior(data_size=None)),
    "no-map": ("no priors of the parameters", prior(map_prior="none")),
    "sticks": ("stick-breaking weights", prior(weights="stick-breaking")),
    "k-2": ("2 pseudo-inputs per component", prior(pseudo_inputs_per_component=2)),
    "statistics-rate-0.001": ("statistics_rate 0.001", prior(statistics_rate=0.001)),
    "statistics-rate-0.01": ("statistics_rate 0.01", prior(statistics_rate=0.01)),
    "gradient": ("gradient instead of closed form", prior(inference="gradient")),
    "joint": ("one loss for network and prior", prior(inference="gradient", joint=True)),
    "true-em": (
        "gradient, not through the responsibilities",
        prior(inference="gradient", responsibility_gradient=False),
    ),
    "update-every-1": ("pseudo-inputs move in every call", prior(update_every=1)),
    "gradient-update-every-1": (
        "gradient, pseudo-inputs move in every call",
        prior(inference="gradient", update_every=1),
    ),
    "gradient-no-map": (
        "gradient, no priors of the parameters",
        prior(inference="gradient", map_prior="none"),
    ),
}
METHODS = {
    "usual": Method("as `vmm-fast cluster` has them", False, ours()),
    **_varied("components", "{} components", (10, 20, 50, 100, 200, 500)),
    **_varied("batch_size", "batches of {}", (64, 128, 256, 512, 1024)),
    **_varied("epochs", "{} epochs at most", (50, 100, 200, 400)),
    **{name: Method(title, False, ours(make)) for name, (title, make) in CHANGED_PRIORS.items()},
}


def verdicts(rows: list[Row]) -> list[str]:
    """Return how far apart means over the seeds are, from 50 components and for all batches."""
    found = []
    for dataset in DATASETS:
        for setting, least in (("components", 50), ("batch-size", 0)):
            groups = [
                group
                for name in METHODS
                if name.startswith(setting) and int(name.rpartition("-")[2]) >= least
                if (group := select(rows, dataset=dataset, method=name))
            ]
            if len(groups) > 1:
                found.append(f"{dataset}, {setting}: {verdict(groups)}")
    return found


def verdict(groups: list[list[Row]]) -> str:
    """Return whether means over each group's seeds are as near one another as is asked."""
    numbers, scores = (
        [mean(row[key] for row in group) for group in groups] for key in ("clusters", "nmi")
    )
    off = max(abs(n / mean(numbers) - 1) for n in numbers)
    met = off <= CLUSTERS_WITHIN and max(scores) - min(scores) <= NMI_WITHIN
    return (
        f"{'met' if met else 'MISSED'}, clusters within {off:.0%} of their mean "
        f"{mean(numbers):.1f} (asked {CLUSTERS_WITHIN:.0%}), NMI {min(scores):.3f} to "
        f"{max(scores):.3f} (asked {NMI_WITHIN} apart)"
    )


SETTINGS = compare(
    "settings", "Clusters of images under other settings", METHODS, verdicts=verdicts
)
MEASUREMENT = measurement(SETTINGS, "clusters of images: ours under other settings")
