"""`python -m zfabric.testing.soak --seconds 60 --seed 1`; ends with 1 when anything was wrong."""

from __future__ import annotations

import argparse
import json
import sys

from zfabric.testing.soak.run import FAULTS, soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m zfabric.testing.soak")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the accounts as JSON")
    parser.add_argument(
        "--fault", action="append", choices=FAULTS, help="only this one, and others"
    )
    options = parser.parse_args()
    report = soak(options.seconds, options.seed, faults=options.fault or FAULTS)
    if options.json:
        print(json.dumps(report, indent=2))
        return 1 if report["failures"] else 0
    print(f"{'fault':<24} {'injected':>8} {'longest recovery':>17}")
    for fault, row in report["faults"].items():
        longest = "-" if row["longest_s"] is None else f"{row['longest_s']:.2f} s"
        print(f"{fault:<24} {row['injected']:>8} {longest:>17}")
    counts = ", ".join(f"{n} {kind}" for kind, n in report["counts"].items())
    print(f"{report['results']} results: {counts}; {report['ran_again']} runs again")
    for failure in report["failures"]:
        print(failure)
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
