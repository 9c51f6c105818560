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

    They start at the mean of the known ones, 0 if there are none: a new category begins as one of
    which nothing is known, and leaves others as they were. ``before`` and ``now`` are the numbers
    of categories in the reference model and in this one.
    """
    for layers in (m for m in module.modules() if isinstance(m, FCLayers)):
        # With batch embeddings, batches have no columns here.
        skipped = next((k for k in (0, 1) if layers.n_cat_list == now[k:]), None)
        if skipped is None:
            continue
        number = sum(now[skipped:])
        for i, layer in enumerate(layers.fc_layers):
            if not number or not layers.inject_into_layer(i):
                continue
            weight = layer[0].weight
            known = weight[:, weight.shape[1] - number :].clone()
            parts = []
            for old, new in zip(before[skipped:], now[skipped:], strict=True):
                own, known = known[:, :old], known[:, old:]
                start = own.mean(1, keepdim=True) if old else known.new_zeros(len(known), 1)
                parts += [own, start.expand(-1, new - old)]
            weight[:, weight.shape[1] - number :] = torch.cat(parts, 1)
