"""Scikit-learn's 1,797 digits through the defaults of ``vmm-fast cluster``: scores and seconds."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from bench.records import RESULTS, environment
from vmm_fast._files import write_atomically
from vmm_fast.clustering import Settings, train
from vmm_fast.data import Scaling, make_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of ``python -m bench digits``."""
    parser.add_argument("--seeds", type=int, default=3, help="runs, with the seeds 0, 1, ..")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the result file")


def main(args: argparse.Namespace) -> None:
    """Run, print a line a seed, and write digits.json."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    data = make_data(digits.images, digits.target)
    runs = []
    for seed in range(args.seeds):
        start = time.perf_counter()
        clustering = train(data, Scaling.of(data), Settings.suited_to(data, seed=seed))
        scores = clustering.metrics()["scores"]
        runs.append({"seed": seed, "seconds": time.perf_counter() - start, **scores})
        print("  ".join(f"{name} {value:.4g}" for name, value in runs[-1].items()), flush=True)
    record = {"command": f"python -m bench digits --seeds {args.seeds}", **environment()}
    text = json.dumps({**record, "runs": runs}, indent=1)
    path = Path(args.out) / "digits.json"
    write_atomically(path, lambda file: file.write(text), text=True)
    print(path)
