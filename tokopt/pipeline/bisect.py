"""Which pass of a pipeline moved the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokopt.arguments import check_number
from tokopt.ir.bundle import Bundle, check_bundle
from tokopt.pipeline.base import Context, Pass, PassRecord
from tokopt.pipeline.manager import Pipeline, as_pipeline, check_context
from tokopt.pipeline.observers import Difference, differences


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
    example inputs; NaN counts as a difference. Raises what :func:`tokopt.optimize` raises.
    """
    check_bundle("bundle", bundle)
    tolerance = check_number("tolerance", tolerance, lambda x: x >= 0, "of at least 0")
    steps: list[Step] = []

    def observe(record: PassRecord, before: Bundle, after: Bundle) -> None:
        steps.append(Step(record.text, differences(bundle, after)))

    context = check_context(context) or Context()
    observed = replace(context, observers=(*context.observers, observe))
    as_pipeline(passes).run(bundle, observed)
    return Bisection(tolerance, tuple(steps))
