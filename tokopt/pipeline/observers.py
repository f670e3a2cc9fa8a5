"""Looking inside a pipeline: IR dumps, numeric comparison after every pass, and bisection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tokopt.ir.bundle import Bundle
from tokopt.pipeline.base import Context, Observer, Pass, PassRecord
from tokopt.pipeline.manager import Pipeline, as_pipeline
from tokopt.runtime.numerics import cosines, nmse


@dataclass(frozen=True)
class Difference:
    """How far one output of a program moved: normalised mean squared error and cosine similarity."""

    output: str
    nmse: float
    cosine: float


def differences(before: Bundle, after: Bundle) -> tuple[Difference, ...]:
    """Compare the outputs of two bundles' ``forward`` on the first one's example inputs."""
    inputs = before.main.example
    wanted, got = before.main(*inputs), after.main(*inputs)
    names = [spec.name for spec in before.main.outputs]
    return tuple(_difference(n, w, g) for n, w, g in zip(names, wanted, got, strict=True))


def _difference(name: str, wanted: torch.Tensor, got: torch.Tensor) -> Difference:
    a, b = wanted.double().numpy(force=True), got.double().numpy(force=True)
    same = a.shape == b.shape
    return Difference(name, nmse(a, b), float(cosines(a.reshape(-1), b.reshape(-1))) if same else 0.0)


@dataclass(frozen=True)
class Step:
    """One pass of a bisection: its text, and the outputs compared with the untouched bundle."""

    text: str
    differences: tuple[Difference, ...]

    @property
    def worst(self) -> float:
        """The largest normalised mean squared error of any output."""
        return max(d.nmse for d in self.differences)


@dataclass(frozen=True)
class Bisection:
    """Every pass with its difference from the start; ``culprit`` is the first one above ``tolerance``."""

    tolerance: float
    steps: tuple[Step, ...]

    @property
    def culprit(self) -> Step | None:
        return next((step for step in self.steps if not step.worst <= self.tolerance), None)


def bisect(
    bundle: Bundle,
    passes: str | Pipeline | Sequence[Pass],
    tolerance: float = 1e-3,
    context: Context | None = None,
) -> Bisection:
    """Find the first pass after which an output differs from the original by an NMSE above ``tolerance``.

    Every pass is run (passes are cheap next to finding a fault) and compared with ``bundle`` itself on its
    example inputs; NaN counts as a difference.
    """
    steps: list[Step] = []

    def observe(record: PassRecord, before: Bundle, after: Bundle) -> None:
        steps.append(Step(record.text, differences(bundle, after)))

    context = context or Context()
    observed = replace(context, observers=(*context.observers, observe))
    as_pipeline(passes).run(bundle, observed)
    return Bisection(tolerance, tuple(steps))


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
