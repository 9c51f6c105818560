"""Weights of new categories, where a reference model is extended to query cells (scArches)."""

from __future__ import annotations

from typing import Any

import torch
from scvi import REGISTRY_KEYS
from scvi.nn import FCLayers

__all__ = ["numbers_of_categories", "order_category_weights"]


def numbers_of_categories(registry: dict[str, Any]) -> list[int]:
    """Return the number of batches, and of the categories of every categorical covariate.

    A single batch or category has no weights, and counts as 0.
    """
    fields = registry["field_registries"]
    numbers = [fields[REGISTRY_KEYS.BATCH_KEY]["summary_stats"]["n_batch"]]
    covariates = fields.get(REGISTRY_KEYS.CAT_COVS_KEY, {}).get("state_registry", {})
    numbers += covariates.get("n_cats_per_key", [])
    return [number if number > 1 else 0 for number in numbers]


@torch.no_grad()
def order_category_weights(module: torch.nn.Module, before: list[int], now: list[int]) -> None:
    """Move the weights of new categories next to those of their covariate, in every layer.

    ``before`` and ``now`` are the numbers of categories in the reference model and in this one.
    """
    for layers in (m for m in module.modules() if isinstance(m, FCLayers)):
        # With batch embeddings, batches have no columns here.
        skipped = next((k for k in (0, 1) if layers.n_cat_list == now[k:]), None)
        if skipped is None:
            continue
        known, added = sum(before[skipped:]), 0
        order, at = [], 0
        for old, new in zip(before[skipped:], now[skipped:], strict=True):
            order += [*range(at, at + old)]
            order += [*range(known + added, known + added + new - old)]
            at, added = at + old, added + new - old
        for i, layer in enumerate(layers.fc_layers):
            if order and layers.inject_into_layer(i):
                weight = layer[0].weight
                weight[:, -len(order) :] = weight[:, -len(order) :][:, order]
