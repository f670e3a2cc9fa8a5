"""The pass manager: pipelines and how they run.

A pass is a frozen dataclass whose fields are its options. Its text is ``name{option=value option=value}``;
a pipeline is passes joined by commas. The same text is the Python repr, the command line, the log line and
the artifact's manifest::

    tome{r=16},evit{keep=0.7 layers=[3,6,9]}

Between passes the manager verifies the bundle, times the pass, counts what it changed, and calls every
observer of the :class:`Context`: printing, IR dumps and numeric comparison are observers.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokopt.analysis.cost import bundle_cost
from tokopt.analysis.samples import Sample
from tokopt.arguments import check_items, check_kind, check_text
from tokopt.errors import InputError, PassError, PassRefused, TokoptError
from tokopt.ir.bundle import AppliedPass, Bundle, check_bundle
from tokopt.ir.memory import reclaim
from tokopt.ir.verifier import verify_bundle
from tokopt.pipeline.base import Context, Pass, PassRecord, Refusal
from tokopt.pipeline.build import build
from tokopt.pipeline.reproducer import write_reproducer
from tokopt.pipeline.text import Reader

LARGE = 2**26
"""Parameters of a model whose former versions may not fit into memory beside it."""

LISTED = 2
"""Reasons of refusals that an error spells out."""


@dataclass(frozen=True)
class Report:
    """One record per pass, in order."""

    records: tuple[PassRecord, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """A JSON-ready form."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, repr=False)
class Pipeline:
    """Passes run in order. ``str(pipeline)`` and :func:`parse` are inverse."""

    passes: tuple[Pass, ...] = ()

    def __post_init__(self) -> None:
        """Raise InputError for what is no pass."""
        for step in check_items("passes", self.passes, "a tuple of passes"):
            check_kind("an item of passes", step, Pass, "a pass, as in [ToMe(r=4)]")

    def __repr__(self) -> str:
        return ",".join(map(str, self.passes))

    def run(self, bundle: Bundle, context: Context | None = None) -> tuple[Bundle, Report]:
        """Run every pass on ``bundle``, which stays untouched.

        Raises PassError when a pass fails or returns a bundle that does not verify, naming the passes that ran
        before it; raises PassRefused in strict mode when a pass refused a site or changed nothing.
        """
        check_bundle("bundle", bundle)
        context = check_context(context) or Context()
        verify_bundle(bundle)
        records: list[PassRecord] = []
        for index, step in enumerate(self.passes):
            try:
                after, record = _run_one(step, bundle, context)
            except TokoptError as error:
                raise self._located(error, index, bundle, context) from error
            except Exception as error:
                raise self._located(
                    PassError(f"{type(error).__name__}: {error}"), index, bundle, context
                ) from error
            for observer in context.observers:
                observer(record, bundle, after)
            records.append(record)
            bundle = after
        return bundle, Report(tuple(records))

    def _located(self, error: TokoptError, index: int, bundle: Bundle, context: Context) -> TokoptError:
        """The same kind of error, saying which pass failed, after which others, and where the reproducer is."""
        before = ", after " + ",".join(map(str, self.passes[:index])) if index else ""
        message = f"pass {self.passes[index]}{before}: {error}"
        if context.reproducers is not None and not isinstance(error, PassRefused):
            message += f" ({_reproducer(bundle, self.passes[index:], context.reproducers)})"
        kind = type(error) if isinstance(error, PassError) else PassError
        return kind(message)


def _reproducer(bundle: Bundle, passes: Sequence[Pass], folder: Path) -> str:
    """Where the reproducer is, or why there is none: the failure of the pass is what matters."""
    try:
        return f"reproducer: {write_reproducer(bundle, passes, folder)}"
    except TokoptError as error:
        return f"no reproducer: {error}"


def _listed(refusals: Sequence[Refusal]) -> str:
    """The first refusal for each of the first reasons, and how many more there are: a model may have one a block."""
    reasons: dict[str, Refusal] = {}
    for refusal in refusals:
        reasons.setdefault(refusal.reason, refusal)
    first = list(reasons.values())[:LISTED]
    more = len(refusals) - len(first)
    said = "; ".join(map(str, first))
    return said + (f"; and {more} more, which a run that is not strict notes" if more > 0 else "")


def _run_one(step: Pass, bundle: Bundle, context: Context) -> tuple[Bundle, PassRecord]:
    before, start = bundle_cost(bundle), time.perf_counter()
    if before.parameters >= LARGE:
        reclaim()
    step.requires(bundle)
    result = step.run(bundle, context)
    if context.strict and (result.refusals or not result.matches):
        reasons = _listed(result.refusals) or "; ".join(result.notes) or "nothing matched"
        raise PassRefused(f"refused in strict mode: {reasons}")
    after = _remembering(step, bundle, result.bundle)
    verify_bundle(after)
    applied = AppliedPass(
        str(step), result.matches, step.promise, result.notes + tuple(map(str, result.refusals))
    )
    after = replace(after, history=bundle.history + (applied,))
    seconds = time.perf_counter() - start
    cost = bundle_cost(after)
    record = PassRecord(str(step), result.matches, seconds, before, cost, result.notes, result.refusals)
    return after, record


def _remembering(step: Pass, before: Bundle, after: Bundle) -> Bundle:
    """Let programs whose tokens were reduced remember a pass that would have done the same to them before that."""
    for name, program in before.programs.items():
        changed, done = after.programs.get(name), program.reductions
        if changed is None:  # it was cut into others
            continue
        if step.data_free and done is not None and changed is not program and changed.reductions is None:
            done = replace(done, later=(*done.later, step))
            after = after.with_program(name, replace(changed, reductions=done))
    return after


def optimize(
    bundle: Bundle,
    passes: str | Pipeline | Sequence[Pass],
    *,
    strict: bool = False,
    calibration: Iterable[Sample] | Path | None = None,
    context: Context | None = None,
) -> Bundle:
    """Run a pipeline on a bundle and return the new bundle; the input stays untouched.

    ``passes`` is the text of a pipeline (``"tome{r=16}"``), a :class:`Pipeline`, or a list of passes. The
    result's ``history`` says what each pass changed and what it refused. ``strict`` and ``calibration`` are short
    for those fields of a :class:`Context`: real inputs, for the passes that measure.

    Raises PassError as :meth:`Pipeline.run` does, PipelineSyntaxError for a text that cannot be read, and InputError
    for arguments of another type.
    """
    check_bundle("bundle", bundle)
    short = Context(strict=strict, calibration=calibration)
    if check_context(context) is not None and (strict or calibration is not None):
        raise InputError("strict and calibration were given beside a context; set them in the context alone")
    return as_pipeline(passes).run(bundle, context or short)[0]


def check_context(context: object) -> Context | None:
    """An argument that is a context, or None; raises InputError."""
    return None if context is None else check_kind("context", context, Context, "a Context, or None")


def as_pipeline(passes: str | Pipeline | Sequence[Pass]) -> Pipeline:
    """A :class:`Pipeline` from its text, from a list of passes, or from itself."""
    if isinstance(passes, Pipeline):
        return passes
    if isinstance(passes, str):
        return parse(passes)
    return Pipeline(check_items("passes", passes, "the text of a pipeline, a Pipeline, or a list of passes"))


def parse(text: str) -> Pipeline:
    """Read the text of a pipeline. Unknown passes and options are named with the nearest known spelling.

    >>> str(parse("tome{r=16, schedule=decreasing}"))
    'tome{r=16 schedule=decreasing}'
    """
    return Pipeline(tuple(map(build, Reader(check_text("text", text)).calls())))
