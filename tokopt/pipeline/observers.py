"""Looking inside a pipeline: IR dumps and numeric comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tokopt.arguments import check_path
from tokopt.ir.bundle import Bundle
from tokopt.pipeline.base import Observer, PassRecord
from tokopt.place import make_folder, writing
from tokopt.runtime.numerics import cosines, nmse


@dataclass(frozen=True)
class Difference:
    """How far one output of a program moved: normalised mean squared error and cosine similarity."""

    output: str
    nmse: float
    cosine: float


def differences(before: Bundle, after: Bundle) -> tuple[Difference, ...]:
    """Compare what two bundles give for the first one's example inputs."""
    wanted, got = before.outputs(before.example), after.outputs(before.example)
    return tuple(_difference(name, value, got[name]) for name, value in wanted.items())


def _difference(name: str, wanted: torch.Tensor, got: torch.Tensor) -> Difference:
    a, b = wanted.double().numpy(force=True), got.double().numpy(force=True)
    same = a.shape == b.shape
    return Difference(name, nmse(a, b), float(cosines(a.reshape(-1), b.reshape(-1))) if same else 0.0)


def dump_to(folder: str | Path) -> Observer:
    """An observer that writes every program's readable code after each pass: ``01-tome.forward.py``, ..."""
    folder = check_path("folder", folder)
    count = 0

    def observe(record: PassRecord, before: Bundle, after: Bundle) -> None:
        nonlocal count
        count += 1
        make_folder(folder)
        for name, program in after.programs.items():
            path = folder / f"{count:02d}-{record.text.split('{')[0]}.{name}.py"
            code = program.module.print_readable(print_output=False)
            with writing(path) as file:
                file.write_text(f"# after {record.text}: {record.matches} sites changed\n{code}\n")

    return observe
