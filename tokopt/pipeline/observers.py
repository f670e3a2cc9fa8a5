"""Looking inside a pipeline: IR dumps and numeric comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tokopt.ir.bundle import Bundle
from tokopt.pipeline.base import Observer, PassRecord
from tokopt.runtime.numerics import cosines, nmse


@dataclass(frozen=True)
class Difference:
    """How far one output of a program moved: normalised mean squared error and cosine similarity."""

    output: str
    nmse: float
    cosine: float


def differences(before: Bundle, after: Bundle) -> tuple[Difference, ...]:
    """Compare what two bundles give for the first one's example inputs, of language models for its tokens."""
    program, generates = before.main, before.schedule.generates
    chosen = [not generates or spec.role == "tokens" for spec in program.inputs]
    inputs = [tensor for tensor, wanted in zip(program.example, chosen, strict=True) if wanted]
    names = [spec.name for spec in program.outputs if not generates or spec.role == "logits"]
    wanted, got = before(*inputs), after(*inputs)
    return tuple(_difference(n, w, g) for n, w, g in zip(names, wanted, got, strict=True))


def _difference(name: str, wanted: torch.Tensor, got: torch.Tensor) -> Difference:
    a, b = wanted.double().numpy(force=True), got.double().numpy(force=True)
    same = a.shape == b.shape
    return Difference(name, nmse(a, b), float(cosines(a.reshape(-1), b.reshape(-1))) if same else 0.0)


def dump_to(folder: str | Path) -> Observer:
    """An observer that writes every program's readable code after each pass: ``01-tome.forward.py``, ..."""
    folder = Path(folder)
    count = 0

    def observe(record: PassRecord, before: Bundle, after: Bundle) -> None:
        nonlocal count
        count += 1
        folder.mkdir(parents=True, exist_ok=True)
        for name, program in after.programs.items():
            path = folder / f"{count:02d}-{record.text.split('{')[0]}.{name}.py"
            code = program.module.print_readable(print_output=False)
            path.write_text(f"# after {record.text}: {record.matches} sites changed\n{code}\n")

    return observe
