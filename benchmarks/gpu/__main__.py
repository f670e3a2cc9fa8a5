"""The CUDA kernels and merged models on one GPU, in eight minutes: ``make gpu``.

Runs ``tests/gpu`` first. Then times with device events, medians over repetitions: match and merge as one op against
the same op in plain PyTorch and under ``torch.compile``, beside what copying the bytes that have to be moved would
take; the attention tap against scaled_dot_product_attention alone; and ViT-L/16 and DINOv2 ViT-S/14 with merging
against the unmerged models, in float16.

Every part is a process of its own, since an error of a kernel stays with its process; what fails is noted, and the next
is measured. Writes ``gpu.json`` and ``gpu.md`` in ``benchmarks/results`` after every part, and prints one table last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import models, ops
from examples.data import write_atomically

RESULTS = Path(__file__).parent.parent / "results"

MINUTES = 7.5
"""When no further part is begun, and a running one ends; what is left of eight is for the machine."""

TESTING = 0.4
"""The share of the time that the tests may take."""

PARTS: Mapping[str, Callable[[], Iterator[ops.Row]]] = {
    "match and merge": ops.matches,
    "attention tap": ops.taps,
    **{name: partial(models.rows, name) for name in models.MODELS},
}

Report = dict[str, Any]

TIMES = "times the baseline, or what happened"
"""The last column of the table."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--part", choices=PARTS, help="measure this part alone, in this process")
    parser.add_argument("--output", type=Path, help="the file that a part writes")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="when to stop")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: no CUDA device; nothing was measured")
    if options.part is not None:
        measure(options.part, options.output or RESULTS / "gpu-part.json")
        return
    end = time.monotonic() + 60 * options.minutes
    report: Report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "failures": []}
    report["tests"] = run_tests(60 * options.minutes * TESTING)
    write(report)
    for part in PARTS:
        rows, failures = run_part(part, end - time.monotonic())
        report[part] = rows
        report["failures"] += failures
        write(report)
    print(summary(report))


def run_tests(seconds: float) -> list[dict[str, str]]:
    """The last line of every file of ``tests/gpu``; none of them stops the others."""
    found = []
    files = sorted(Path("tests/gpu").glob("test_*.py"))
    for file in files:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
        found.append({"file": file.name, "outcome": _last_line(command, seconds / len(files))})
    return found


def run_part(part: str, seconds: float) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """What a part measures in a process of its own, and what failed."""
    if seconds <= 0:
        return [], [{"part": part, "what": "all", "error": "no time was left"}]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "part.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--output", str(output)]
        line = _last_line(command, seconds)
        if not output.exists():
            return [], [{"part": part, "what": "all", "error": line}]
        written = json.loads(output.read_text())
    if not written["done"]:
        written["failures"].append({"part": part, "what": "the rest", "error": line})
    return written["rows"], written["failures"]


def measure(part: str, output: Path) -> None:
    """Measure a part row by row; ``output`` holds what there is after every row, so that nothing is lost."""
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []

    def keep(*, done: bool) -> None:
        text = json.dumps({"rows": rows, "failures": failures, "done": done})
        write_atomically(output, lambda path: path.write_text(text))

    keep(done=False)
    for name, run in PARTS[part]():
        try:
            rows.append(run())
        except Exception as error:  # the next may work; where the device is lost, all of them say so
            failures.append({"part": part, "what": name, "error": f"{type(error).__name__}: {error}"[:200]})
        keep(done=False)
    keep(done=True)


def _last_line(command: Sequence[str], seconds: float) -> str:
    """The last line that a command prints, to either stream; it is shown as it goes, and ended in time."""
    with tempfile.TemporaryFile("w+") as printed:
        try:
            subprocess.run(command, stdout=printed, stderr=subprocess.STDOUT, timeout=seconds, check=False)
            ended = ""
        except subprocess.TimeoutExpired:
            ended = f" (ended after {seconds:.0f} s)"
        printed.seek(0)
        lines = [line for line in printed.read().splitlines() if line.strip()]
    print("\n".join(lines[-15:]), flush=True)
    return (lines[-1] if lines else "nothing was printed") + ended


def write(report: Report) -> None:
    content = {"gpu.json": json.dumps(report, indent=1) + "\n", "gpu.md": markdown(report)}
    for name, text in content.items():
        write_atomically(RESULTS / name, partial(_write, text))


def _write(text: str, path: Path) -> None:
    path.write_text(text)


def markdown(report: Report) -> str:
    """Tables of whatever was measured; lists of rows with equal keys."""
    lines = [f"# Measured on {report['device']}, torch {report['torch']}", ""]
    for title, rows in report.items():
        if not isinstance(rows, list) or not rows:
            continue
        lines += [f"## {title}", "", *_table(rows), ""]
    return "\n".join(lines)


def summary(report: Report) -> str:
    """One table: what was measured, its time and how many times as fast as its baseline; what failed, and why."""
    rows: list[dict[str, Any]] = []
    for part in PARTS:
        for row in report.get(part, []):
            sizes = " ".join(str(value) for key, value in row.items() if not isinstance(value, float))
            timed = next((key for key in ("kernels, ms", "tap, ms", "tome, ms") if key in row), "")
            times = next((key for key in row if key.startswith("times ")), "with the tap")
            rows.append({"part": part, "case": sizes, "ms": row.get(timed, ""), TIMES: row.get(times, "")})
    rows += [
        {"part": "tests", "case": test["file"], "ms": "", TIMES: test["outcome"]} for test in report["tests"]
    ]
    rows += [
        {"part": f["part"], "case": f["what"], "ms": "failed", TIMES: f["error"]} for f in report["failures"]
    ]
    return "\n".join([f"{report['device']}, torch {report['torch']}", "", *_table(rows)])


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        cells = (
            f"{cell:.4g}" if isinstance(cell, float) else str(cell).replace("|", "/") for cell in row.values()
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
