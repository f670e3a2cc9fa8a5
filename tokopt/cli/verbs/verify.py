"""``tokopt verify``: check hashes and the self-test; exit 1 when anything is wrong."""

from __future__ import annotations

from argparse import Namespace

from tokopt.cli.options import add_artifact
from tokopt.cli.screen import Screen
from tokopt.cli.verb import FAILED, OK, Verb


def run(args: Namespace, screen: Screen) -> int:
    """Check hashes and the self-test; exit 1 when anything is wrong."""
    import tokopt

    with screen.step(f"Verifying {args.artifact}"):
        report = tokopt.verify(args.artifact)
    for fault in report.faults:
        screen.line(f"fault: {fault}")
    rows = [
        (program, check.name, check.nmse, check.limit, "ok" if check.ok else "differs")
        for program, checks in report.outputs.items()
        for check in checks
    ]
    screen.table(("program", "output", "NMSE", "at most", ""), rows)
    if report.ok and not rows:
        screen.line("The files alone were checked: a .pt2 file is not opened unless you ask for it.")
    screen.line(
        f"{report.path}: {report.files} files, " + ("verified" if report.ok else "NOT as it was written")
    )
    screen.finish(report.as_dict())
    return OK if report.ok else FAILED


VERB = Verb(
    "check an artifact's hashes and run its self-test",
    "tokopt verify vit.tokopt",
    add_artifact,
    run,
)
