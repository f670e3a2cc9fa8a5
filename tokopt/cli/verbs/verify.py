"""``tokopt verify``: check hashes and the self-test; exit 1 when anything is wrong."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from tokopt.cli.options import add_artifact
from tokopt.cli.screen import Cell, Screen
from tokopt.cli.verb import FAILED, OK, Verb

if TYPE_CHECKING:
    from tokopt.artifact import VerifyReport
    from tokopt.runtime.selftest import TaskCheck


def run(args: Namespace, screen: Screen) -> int:
    """Check hashes and the self-test; exit 1 when anything is wrong."""
    import tokopt

    with screen.step(f"Verifying {args.artifact}"):
        report = tokopt.verify(args.artifact)
    for fault in report.faults:
        screen.line(f"fault: {fault}")
    screen.table(("program", "output", "measure", "value", "at most"), _differing(report))
    if report.ok and not report.outputs:
        screen.line("The files alone were checked: a .pt2 file is not opened unless you ask for it.")
    screen.line(f"{report.path}: {report.files} files, {_verdict(report)}")
    screen.finish(report.as_dict())
    return OK if report.ok else FAILED


def _differing(report: VerifyReport) -> list[tuple[Cell, ...]]:
    """A row per check that failed."""
    rows: list[tuple[Cell, ...]] = [
        (program, check.name, "NMSE in float32", check.nmse, check.limit)
        for program, checks in report.outputs.items()
        for check in checks
        if not check.ok
    ]
    return rows + [
        (program, check.name, check.measure, check.value, check.limit)
        for program, checks in report.tasks.items()
        for check in checks
        if not check.ok
    ]


def _verdict(report: VerifyReport) -> str:
    """In words, with the worst of every measure where this machine rounds."""
    if report.faults or not all(check.ok for found in report.outputs.values() for check in found):
        return "NOT as it was written"
    worst: dict[str, TaskCheck] = {}
    for check in (check for found in report.tasks.values() for check in found):
        if check.measure not in worst or not check.value <= worst[check.measure].value:
            worst[check.measure] = check
    if not report.ok:
        return "as it was written, but ONNX Runtime computes something else on this machine"
    costs = [
        f"{check.measure} {max(check.value, 0):.2g}"
        + ("" if check.agreement is None else f" with {check.agreement:.0%} of the likeliest tokens the same")
        for check in worst.values()
    ]
    return "verified" + (f"; rounding activations to 8 bits costs a {', a '.join(costs)}" if costs else "")


VERB = Verb(
    "check an artifact's hashes and run its self-test",
    "tokopt verify vit.tokopt",
    add_artifact,
    run,
)
