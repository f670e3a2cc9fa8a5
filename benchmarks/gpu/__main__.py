"""The CUDA kernels and merged models on one GPU: ``python -m benchmarks.gpu``, under ten minutes.

Runs ``tests/gpu`` first and stops where a kernel is wrong. Then times with device events, medians over repetitions:
match and merge as one op against the same op in plain PyTorch and under ``torch.compile``, beside what copying the
bytes that have to be moved would take; the attention tap against scaled_dot_product_attention alone; and ViT-L/16 and
DINOv2 ViT-S/14 with merging against the unmerged models, in float16. Writes ``gpu.json`` and ``gpu.md`` in
``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import models, ops
from examples.data import write_atomically

RESULTS = Path(__file__).parent.parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", choices=("tests", "ops", "models"), help="one part of the work")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: no CUDA device; nothing was measured")
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    if options.only in (None, "tests"):
        subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/gpu"], check=True)
    if options.only in (None, "ops"):
        report |= ops.measure()
    if options.only in (None, "models"):
        report |= models.measure()
    write(report)


def write(report: dict[str, Any]) -> None:
    content = {"gpu.json": json.dumps(report, indent=1) + "\n", "gpu.md": markdown(report)}
    for name, text in content.items():
        write_atomically(RESULTS / name, _writer(text))
    print(markdown(report))


def _writer(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def markdown(report: dict[str, Any]) -> str:
    """Tables of whatever was measured; lists of rows with equal keys."""
    lines = [f"# Measured on {report['device']}, torch {report['torch']}", ""]
    for title, rows in report.items():
        if not isinstance(rows, list) or not rows:
            continue
        lines += [f"## {title}", "", "| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
        for row in rows:
            cells = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values())
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
