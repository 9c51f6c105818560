"""The command line of the benchmarks: ``python -m bench PART``."""

import argparse

from bench import digits, quality

parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of vmm_fast.")
parts = parser.add_subparsers(dest="part", required=True)
part = parts.add_parser("quality", help="scores on real images against epochs, one prior a run")
quality.add_arguments(part)
part.set_defaults(run=quality.main)
part = parts.add_parser("digits", help="scores and seconds on scikit-learn's digits")
digits.add_arguments(part)
part.set_defaults(run=digits.main)
args = parser.parse_args()
args.run(args)
