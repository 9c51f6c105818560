"""Benchmarks of vmm_fast; run ``python -m bench --help``."""
