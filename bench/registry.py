"""All measurements, by name."""

from __future__ import annotations

from bench import (
    abundance,
    doublets,
    estimators,
    gpu,
    integration,
    kills,
    likelihood,
    limits,
    novelty,
    out_of_core,
    peers,
    quality,
    settings,
    steps,
    throughput,
)

MEASUREMENTS = {
    measurement.name: measurement
    for measurement in (
        throughput.MEASUREMENT,
        limits.MEASUREMENT,
        steps.IMAGES,
        likelihood.MEASUREMENT,
        steps.CELLS,
        out_of_core.MEASUREMENT,
        quality.MEASUREMENT,
        integration.MEASUREMENT,
        novelty.MEASUREMENT,
        doublets.MEASUREMENT,
        peers.MEASUREMENT,
        settings.MEASUREMENT,
        gpu.MEASUREMENT,
        kills.MEASUREMENT,
        estimators.MEASUREMENT,
        abundance.MEASUREMENT,
    )
}
# An atlas takes an hour and gigabytes of disk, scores of clusters hours or days, estimators an
# hour.
ALL = ("throughput", "limits", "step", "likelihood", "scvi-step")
