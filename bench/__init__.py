"""Benchmarks of vmm_fast; run ``python -m bench --help``.

Each measurement (:mod:`bench.measurement`) declares a generator of rows, and the targets, tables
and pictures that are made of them; :mod:`bench.registry` lists them all. :mod:`bench.runner` writes
the rows of one into ``results/NAME.jsonl``, and :mod:`bench.report` makes the pages.

- Speed next to others: throughput, steps, likelihood, out_of_core (atlases), gpu with gpu_bound.
- limits: kernels next to the machine's own peak, and how time grows with B, J and D.
- Clusters next to others: peers, settings and integration, which are comparisons, and quality.
- kills: what is lost when a command is killed.
"""
