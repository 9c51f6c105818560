"""The command line of the benchmarks: ``python -m bench MEASUREMENT``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import report, runner
from bench.measurement import OPTIONS
from bench.registry import ALL, MEASUREMENTS


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of vmm_fast.")
    parts = parser.add_subparsers(dest="part", required=True)

    def add(name: str, text: str, options: Mapping[str, dict[str, Any]]) -> None:
        part = parts.add_parser(name, help=text, description=text)
        for flag, arguments in options.items():
            part.add_argument(flag, **arguments)

    for name, measurement in MEASUREMENTS.items():
        add(name, measurement.text, measurement.options)
    options = {k: v for name in ALL for k, v in MEASUREMENTS[name].options.items()}
    add("all", f"{', '.join(ALL)}, one after the other", options)
    add("report", "pages and pictures from the results that are there", {"--out": OPTIONS["--out"]})
    return parser


def main() -> int:
    """Parse the command line and run what it names; return the exit status."""
    args = parser().parse_args()
    if args.part == "report":
        written = report.write(Path(args.out))
        if not written:
            print(f"no results in {args.out}: run python -m bench throughput first")
            return 1
        print(*written, sep="\n")
        return 0
    names = ALL if args.part == "all" else (args.part,)
    return max(runner.run(MEASUREMENTS[name], args) for name in names)


if __name__ == "__main__":
    sys.exit(main())
