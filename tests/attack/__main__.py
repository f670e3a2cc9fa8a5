"""``python -m tests.attack --cases 5000 --kills 100 --seed 0``: exit 1 for any case that ends as it must not."""

from __future__ import annotations

import argparse
import sys
import time

from tests.attack.report import add_to_report
from tests.attack.rounds import KILLS, ROUNDS, counts, run_round


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attack")
    parser.add_argument(
        "--cases", type=int, default=500, help="of all kinds together, kills apart (default: 500)"
    )
    parser.add_argument("--kills", type=int, default=0, help="processes to kill (default: 0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case of every kind")
    parser.add_argument("--only", metavar="KIND", choices=[*ROUNDS, KILLS], help="one kind alone")
    parser.add_argument(
        "--report", action="store_true", help="write the counts to benchmarks/results/attack.md"
    )
    args = parser.parse_args()
    faults = 0
    for name, count in counts(args.cases, args.kills, args.only).items():
        start = time.monotonic()
        found = run_round(name, args.seed, range(args.first, args.first + count))
        seconds = time.monotonic() - start
        print(found.line(), f"{seconds:.0f} s", flush=True)
        for fault in found.faults:
            print(f"  {fault.number}: {fault.outcome}: {fault.detail[:300]!a}", flush=True)
        if args.report:
            add_to_report(name, found, seconds, args.seed, args.first)
        faults += len(found.faults)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
