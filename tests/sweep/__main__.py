"""``python -m tests.sweep``: exit 1 where a class ends as it must not.

``--only BertModel``, ``--family language`` choose classes, ``--json FILE`` the file of the outcomes, which an
interrupted sweep reads to go on (``--again`` begins anew), ``--jobs`` the processes at a time, ``--plain`` leaves the
passes out. A whole sweep writes ``docs/models.md``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from tests.sweep.classes import FAMILIES, classes
from tests.sweep.outcome import EQUAL, Outcome, read_outcomes, write_outcomes
from tests.sweep.table import OUTCOMES, write_table
from tests.sweep.trial import run_all


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep")
    parser.add_argument("--only", metavar="CLASS", nargs="+", help="these classes, whatever is known of them")
    parser.add_argument("--family", choices=FAMILIES)
    parser.add_argument("--ending", metavar="OUTCOME", help="again those that ended so")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"of the outcomes (default: {OUTCOMES})")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--again", action="store_true", help="also those that the file knows")
    parser.add_argument("--plain", action="store_true", help="without passes")
    args = parser.parse_args()
    path: Path = args.json or OUTCOMES
    found = read_outcomes(path)
    chosen = _chosen(args, found)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for done, (outcome, seconds) in enumerate(
        run_all({name: classes()[name] for name in chosen}, args.jobs, not args.plain), 1
    ):
        found[outcome.name] = outcome
        write_outcomes(path, found)
        print(f"{done}/{len(chosen)} {_line(outcome)} ({seconds:.0f} s)", flush=True)
    found = {name: outcome for name, outcome in found.items() if name in classes()}
    write_outcomes(path, found)
    if path == OUTCOMES:
        write_table()
    for family in sorted({outcome.family for outcome in found.values()}):
        counted = Counter(one.plain.outcome for one in found.values() if one.family == family)
        print(family, dict(counted.most_common()))
    return int(any(outcome.faults for outcome in found.values()))


def _chosen(args: argparse.Namespace, found: dict[str, Outcome]) -> list[str]:
    names = [name for name, family in classes().items() if args.family in (None, family)]
    if args.only:
        missing = sorted(set(args.only) - set(classes()))
        if missing:
            sys.exit(f"no such class in the sweep: {', '.join(missing)}")
        return [name for name in classes() if name in args.only]
    if args.ending:
        return [
            name
            for name in names
            if name in found
            and args.ending in (found[name].plain.outcome, *(e.outcome for e in found[name].passes.values()))
        ]
    return [name for name in names if args.again or name not in found or _unfinished(found[name], args.plain)]


def _unfinished(outcome: Outcome, plain: bool) -> bool:
    """Whether passes were left out, and are wanted now."""
    return not plain and outcome.plain.outcome == EQUAL and not outcome.passes


def _line(outcome: Outcome) -> str:
    ends = [outcome.plain, *outcome.passes.values()]
    told = "; ".join(f"{end.outcome}{': ' * bool(end.detail)}{end.detail}" for end in ends)
    return f"{outcome.name}: {told}"


if __name__ == "__main__":
    sys.exit(main())
