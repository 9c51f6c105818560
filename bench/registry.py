"""All measurements, by name."""

from __future__ import annotations

from bench import (
    gpu,
    integration,
    kills,
    likelihood,
    out_of_core,
    peers,
    processes,
    quality,
    roofline,
    scaling,
    scvi_step,
    settings,
    step,
    throughput,
)

MEASUREMENTS = {
    module.MEASUREMENT.name: module.MEASUREMENT
    for module in (
        *(throughput, roofline, scaling, step, likelihood, scvi_step),
        *(out_of_core, processes, quality, integration, peers, settings, gpu, kills),
    )
}
# An atlas takes an hour and gigabytes of disk, processes want cores that nothing else uses.
ALL = ("throughput", "roofline", "scaling", "step", "likelihood", "scvi-step")
