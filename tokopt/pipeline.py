"""The pass manager: Pass, PassResult, Pipeline, and the one text spelling of a pipeline.

A pass is a frozen dataclass whose fields are its options. Its text is ``name{option=value option=value}``;
a pipeline is passes joined by commas. The same text is the Python repr, the command line, the log line and
the artifact's manifest::

    tome{r=16},evit{keep=0.7 layers=[3,6,9]}

Between passes the manager verifies the bundle, times the pass, counts what it changed, and calls every
observer of the :class:`Context`: printing, IR dumps and numeric comparison are observers.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints

from tokopt.analysis.calibration import Sample
from tokopt.analysis.cost import Cost, bundle_cost
from tokopt.analysis.verifier import verify_bundle
from tokopt.bundle import AppliedPass, Bundle, Semantics
from tokopt.errors import PassError, PassRefused, PipelineSyntaxError, TokoptError

Observer = Callable[["PassRecord", Bundle, Bundle], None]
"""Called after each pass with its record, the bundle before and the bundle after."""


@dataclass(frozen=True)
class Refusal:
    """A site where a pass could not prove itself legal: where, and the reason in one sentence."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Context:
    """What a pass may know about the run it is part of.

    ``strict`` turns a pass that changed nothing, or that refused a site, into a :class:`PassRefused`.
    ``observers`` see every pass. ``reproducers`` is the folder that receives the input bundle and the
    pipeline text of a pass that failed; None writes nothing. ``calibration`` holds real inputs for the passes that
    measure (see :data:`tokopt.analysis.calibration.Sample`), which iterate over it once each.
    """

    strict: bool = False
    observers: tuple[Observer, ...] = ()
    reproducers: Path | None = None
    calibration: Iterable[Sample] | None = None

    def __post_init__(self) -> None:
        """Keep what can be iterated only once."""
        if isinstance(self.calibration, Iterator):
            object.__setattr__(self, "calibration", list(self.calibration))

    def samples(self, name: str) -> Iterable[Sample]:
        """The calibration inputs, for the pass of this name, which cannot do without; raises PassError."""
        if self.calibration is None:
            raise PassError(
                f"{name} needs inputs to calibrate with: pass calibration=[...] to optimize, or --calibrate on the "
                "command line"
            )
        return self.calibration


@dataclass(frozen=True)
class PassResult:
    """The new bundle, how many sites changed, what the user should know, and the sites refused."""

    bundle: Bundle
    matches: int
    notes: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Pass:
    """Base of all passes: a frozen dataclass whose fields are the options.

    A subclass sets ``name`` (its text spelling) and ``semantics`` and implements :meth:`run`, which must not
    mutate its input. ``requires`` raises :class:`PassError` when the bundle is not one the pass can read.
    """

    name: ClassVar[str] = ""
    semantics: ClassVar[Semantics] = "approximate"

    def __post_init__(self) -> None:
        """Raise :class:`PassError` for an option whose value is not of its annotated type."""
        hints = get_type_hints(type(self))
        for option in dataclasses.fields(self):
            value, hint = getattr(self, option.name), hints[option.name]
            if not _fits(value, hint):
                raise PassError(
                    f"{self.name}: {option.name}={format_value(value)} is of the wrong type; it takes {option.type}"
                )

    def requires(self, bundle: Bundle) -> None:
        """Raise :class:`PassError` when ``bundle`` does not meet this pass's preconditions."""

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Return the transformed bundle; leave ``bundle`` untouched."""
        raise NotImplementedError

    def __str__(self) -> str:
        options = [
            f"{f.name}={format_value(value)}"
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != f.default
        ]
        return self.name + (f"{{{' '.join(options)}}}" if options else "")


def _fits(value: object, hint: object) -> bool:
    """Whether an option's value is of its annotated type; an int is a float, a bool is neither."""
    inner = get_args(hint)
    if get_origin(hint) is UnionType:
        return any(_fits(value, part) for part in inner)
    if get_origin(hint) is Literal:
        return value in inner
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(item, inner[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)  # type: ignore[arg-type]
    return isinstance(value, hint)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: its text, sites changed, time, and cost before and after."""

    text: str
    matches: int
    seconds: float
    before: Cost
    after: Cost
    notes: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Report:
    """One record per pass, in order."""

    records: tuple[PassRecord, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """A JSON-ready form."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Pipeline:
    """Passes run in order. ``str(pipeline)`` and :func:`parse` are inverse."""

    passes: tuple[Pass, ...] = ()

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def run(self, bundle: Bundle, context: Context | None = None) -> tuple[Bundle, Report]:
        """Run every pass on ``bundle``, which stays untouched.

        Raises PassError when a pass fails or returns a bundle that does not verify, naming the passes that ran
        before it; raises PassRefused in strict mode when a pass refused a site or changed nothing.
        """
        context = context or Context()
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
            message += f" (reproducer: {_write_reproducer(bundle, self, index, context.reproducers)})"
        kind = type(error) if isinstance(error, PassError) else PassError
        return kind(message)


def _run_one(step: Pass, bundle: Bundle, context: Context) -> tuple[Bundle, PassRecord]:
    before, start = bundle_cost(bundle), time.perf_counter()
    step.requires(bundle)
    result = step.run(bundle, context)
    if context.strict and (result.refusals or not result.matches):
        reasons = "; ".join(map(str, result.refusals)) or "; ".join(result.notes) or "nothing matched"
        raise PassRefused(f"refused in strict mode: {reasons}")
    after = result.bundle
    verify_bundle(after)
    applied = AppliedPass(
        str(step), result.matches, step.semantics, result.notes + tuple(map(str, result.refusals))
    )
    after = replace(after, history=bundle.history + (applied,))
    seconds = time.perf_counter() - start
    cost = bundle_cost(after)
    record = PassRecord(str(step), result.matches, seconds, before, cost, result.notes, result.refusals)
    return after, record


def _write_reproducer(bundle: Bundle, pipeline: Pipeline, index: int, folder: Path) -> Path:
    """Save the bundle that entered the failing pass and the rest of the pipeline, ready to be run again."""
    from tokopt.artifact import export

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"reproducer-{pipeline.passes[index].name}-{time.time_ns():x}"
    export(bundle, path, target="torch")
    rest = ",".join(map(str, pipeline.passes[index:]))
    (path / "pipeline.txt").write_text(rest + "\n")
    return path


def optimize(
    bundle: Bundle,
    passes: str | Pipeline | Sequence[Pass],
    *,
    strict: bool = False,
    calibration: Iterable[Sample] | None = None,
    context: Context | None = None,
) -> Bundle:
    """Run a pipeline on a bundle and return the new bundle; the input stays untouched.

    ``passes`` is the text of a pipeline (``"tome{r=16}"``), a :class:`Pipeline`, or a list of passes. The
    result's ``history`` says what each pass changed and what it refused. ``strict`` and ``calibration`` are short
    for those fields of a :class:`Context`: real inputs, for the passes that measure.
    """
    context = context or Context(strict=strict, calibration=calibration)
    return as_pipeline(passes).run(bundle, context)[0]


def as_pipeline(passes: str | Pipeline | Sequence[Pass]) -> Pipeline:
    """A :class:`Pipeline` from its text, from a list of passes, or from itself."""
    if isinstance(passes, Pipeline):
        return passes
    return parse(passes) if isinstance(passes, str) else Pipeline(tuple(passes))


# --- text -----------------------------------------------------------------------------------------------

_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_WORDS = {"true": True, "false": False, "none": None}
_DEEPEST_LIST = 8

Value = None | bool | int | float | str | tuple


def format_value(value: object) -> str:
    """The text of an option's value: ``true``, ``none``, ``0.5``, ``[1,2]``, ``word``, ``"any text"``."""
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(format_value, value)) + "]"
    for word, meaning in _WORDS.items():
        if value is meaning:
            return word
    if isinstance(value, str) and (not _NAME.fullmatch(value) or value in _WORDS):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)


@dataclass
class _Reader:
    """A cursor over the text of a pipeline."""

    text: str
    at: int = field(default=0)

    def fail(self, expected: str) -> PipelineSyntaxError:
        found = repr(self.text[self.at]) if self.at < len(self.text) else "the end"
        return PipelineSyntaxError(
            f"pipeline {self.text!r}, column {self.at + 1}: expected {expected}, found {found}; "
            "write name{option=value option=value},name"
        )

    def space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def take(self, symbol: str) -> bool:
        self.space()
        if self.at < len(self.text) and self.text[self.at] == symbol:
            self.at += 1
            return True
        return False

    def match(self, pattern: re.Pattern[str]) -> str | None:
        self.space()
        if found := pattern.match(self.text, self.at):
            self.at = found.end()
            return found.group()
        return None

    def name(self, what: str) -> str:
        if (name := self.match(_NAME)) is None:
            raise self.fail(what)
        return name

    def value(self, depth: int = 0) -> Value:
        if self.take("["):
            if depth == _DEEPEST_LIST:
                raise self.fail(f"at most {_DEEPEST_LIST} nested lists")
            items: list[Value] = []
            while not self.take("]"):
                if items and not self.take(","):
                    raise self.fail("',' or ']'")
                items.append(self.value(depth + 1))
            return tuple(items)
        if self.take('"'):
            return self.quoted()
        if number := self.match(_NUMBER):
            value = float(number)
            if not math.isfinite(value):
                raise self.fail("a number of ordinary size")
            return value if re.search(r"[.eE]", number) else int(number)
        word = self.name("a value")
        return _WORDS.get(word, word)

    def quoted(self) -> str:
        out = []
        while self.at < len(self.text):
            char = self.text[self.at]
            self.at += 1
            if char == '"':
                return "".join(out)
            if char == "\\" and self.at < len(self.text):
                char = self.text[self.at]
                self.at += 1
            out.append(char)
        raise self.fail("a closing quote")

    def options(self) -> dict[str, Value]:
        options: dict[str, Value] = {}
        while not self.take("}"):
            self.take(",")
            name = self.name("an option's name or '}'")
            if name in options:
                raise PipelineSyntaxError(f"pipeline {self.text!r}: option {name!r} is given twice; keep one")
            if not self.take("="):
                raise self.fail("'='")
            options[name] = self.value()
        return options


def parse(text: str) -> Pipeline:
    """Read the text of a pipeline. Unknown passes and options are named with the nearest known spelling.

    >>> str(parse("tome{r=16, schedule=decreasing}"))
    'tome{r=16 schedule=decreasing}'
    """
    reader = _Reader(text)
    passes: list[Pass] = []
    reader.space()
    while reader.at < len(text):
        if passes and not reader.take(","):
            raise reader.fail("',' or the end")
        name = reader.name("a pass's name")
        passes.append(build_pass(name, reader.options() if reader.take("{") else {}))
        reader.space()
    return Pipeline(tuple(passes))


def build_pass(name: str, options: dict[str, Value]) -> Pass:
    """Make a pass from its name and options.

    Raises PipelineSyntaxError for an unknown name or option, or an option whose value the pass rejects.
    """
    from tokopt.passes import PASSES, load_pass

    if name not in PASSES:
        raise PipelineSyntaxError(
            f"unknown pass {name!r}{_nearest(name, PASSES)}; known: {', '.join(PASSES)}"
        )
    cls = load_pass(name)
    known = [f.name for f in dataclasses.fields(cls)]
    for option in options:
        if option not in known:
            raise PipelineSyntaxError(
                f"pass {name} has no option {option!r}{_nearest(option, known)}; its options: {', '.join(known)}"
            )
    try:
        return cls(**options)
    except PassError as error:
        raise PipelineSyntaxError(str(error)) from error


def _nearest(name: str, known: Sequence[str] | dict[str, str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
