"""The command line of the benchmarks: ``python -m bench PART``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import (
    compare,
    gpu,
    integration,
    kills,
    likelihood,
    out_of_core,
    peers,
    processes,
    quality,
    report,
    roofline,
    scaling,
    scvi_step,
    settings,
    step,
    throughput,
)
from bench.providers import make_tfp_environment
from bench.records import RESULTS, Row, command, environment, write_rows
from bench.targets import checks

MEASURED = {
    "throughput": (throughput, "densities, gradients and steps against everybody else's"),
    "roofline": (roofline, "kernels against the machine's own limits"),
    "scaling": (scaling, "exponents in B, J and D; memory"),
    "step": (step, "training steps of the image VAE under each prior"),
    "likelihood": (likelihood, "log-likelihoods of counts, next to scvi-tools'"),
    "scvi-step": (scvi_step, "training steps of scVI under each prior, next to stock SCVI"),
    "processes": (processes, "training of VMM-scVI in two processes against one"),
    "atlas": (out_of_core, "time and memory against the number of cells on disk, and stock SCVI"),
}
# An atlas takes an hour and gigabytes of disk, processes want cores that nothing else uses.
ALL = [name for name in MEASURED if name not in ("atlas", "processes")]


def add_measured_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of all parts that write JSON lines."""
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--threads", type=int, default=2, help="the most that is measured")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the results")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def measure(name: str, args: argparse.Namespace) -> None:
    """Run a part, write its rows and the page, and print its targets."""
    common: Row = {"command": command(sys.argv[1:]), **environment()}
    rows = []
    for row in MEASURED[name][0].measure(args):
        rows.append({**common, **row})
        keys = (
            "mode",
            "provider",
            "B",
            "J",
            "D",
            "threads",
            "call",
            "operators",
            "absent",
            "density",
            "times as fast",
            "times as fast, by CPU",
            "times stock",
            "cells",
            "cells/s",
            "difference",
            "losses",
        )
        shown = [f"{key} {_short(row[key])}" for key in keys if key in row]
        if "p50" in row:
            shown.append(report.duration(row["p50"]))
        elif "seconds" in row:
            shown.append(report.duration(row["seconds"]))
        print("  ".join(shown), flush=True)
    if not rows:
        return
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / f"{name}.jsonl", rows)
    if name in report.PARTS:
        report.write(folder)
    for check in checks(rows):
        print(
            f"{check.verdict:6}  {check.target}, {check.case}: {check.measured}, "
            f"asked {check.asked}"
        )


def main() -> int:
    """Parse the command line and run a part."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of vmm_fast.")
    parts = parser.add_subparsers(dest="part", required=True)
    for name, (module, text) in MEASURED.items():
        part = parts.add_parser(name, help=text, description=text)
        add_measured_arguments(part)
        module.add_arguments(part)
    part = parts.add_parser("all", help=f"{', '.join(ALL)}, one after the other")
    add_measured_arguments(part)
    throughput.add_arguments(part)
    part = parts.add_parser("report", help="tables and pictures from the results that are there")
    part.add_argument("--out", default=str(RESULTS), help="folder of the results")
    part = parts.add_parser("compare", help="what became slower between two runs, beyond noise")
    compare.add_arguments(part)
    part = parts.add_parser("quality", help="scores on real images against epochs, one prior a run")
    quality.add_arguments(part)
    part = parts.add_parser("integration", help="single cells: integration and clusters, all peers")
    integration.add_arguments(part)
    part = parts.add_parser("peers", help="clusters of images: every prior and peer")
    peers.add_arguments(part, peers.PEERS)
    part = parts.add_parser("settings", help="clusters of images: ours under other settings")
    peers.add_arguments(part, settings.SETTINGS)
    part = parts.add_parser("gpu", help="the kernels on a GPU: errors, speed, limits, memory")
    gpu.add_arguments(part)
    part = parts.add_parser("kills", help="commands killed at random: what is lost")
    kills.add_arguments(part)

    args = parser.parse_args()
    if args.part == "compare":
        return compare.main(args)
    if args.part == "gpu":
        return gpu.main(args, sys.argv[1:])
    if args.part == "kills":
        return kills.main(args)
    if args.part == "quality":
        quality.main(args)
    elif args.part == "integration":
        integration.main(args)
    elif args.part == "peers":
        peers.main(args, peers.PEERS)
    elif args.part == "settings":
        peers.main(args, settings.SETTINGS)
    elif args.part == "report":
        try:
            report.write(Path(args.out))
        except FileNotFoundError as error:
            print(error)
            return 1
    elif getattr(args, "make_tfp_environment", None):
        make_tfp_environment(args.make_tfp_environment)
    else:
        for name in ALL if args.part == "all" else [args.part]:
            measure(name, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
