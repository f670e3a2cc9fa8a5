"""What a pass is: a frozen dataclass of options, the context it runs in, and the result it gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from tokopt.analysis.cost import Cost
from tokopt.analysis.samples import Sample
from tokopt.arguments import check_callable, check_flag, check_items, check_iterable, check_path
from tokopt.errors import PassError
from tokopt.ir.bundle import Bundle, Semantics
from tokopt.ir.graph import is_group
from tokopt.pipeline.text import format_value

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
    measure (see :data:`tokopt.analysis.samples.Sample`), which iterate over it once each.
    """

    strict: bool = False
    observers: tuple[Observer, ...] = ()
    reproducers: Path | None = None
    calibration: Iterable[Sample] | Path | None = None

    def __post_init__(self) -> None:
        """Keep what can be iterated only once, and what is one sample; refuse fields of another type."""
        check_flag("strict", self.strict)
        observers = check_items("observers", self.observers, "a tuple of functions")
        for observer in observers:
            check_callable("an observer", observer, "a function of (record, before, after)")
        object.__setattr__(self, "observers", observers)
        if self.reproducers is not None:
            object.__setattr__(self, "reproducers", check_path("reproducers", self.reproducers))
        given = self.calibration
        if isinstance(given, Mapping | str | Path):
            object.__setattr__(self, "calibration", [given])
        elif given is not None:
            check_iterable("calibration", given, "a list of inputs, or what gives them one by one")
            object.__setattr__(self, "calibration", list(given) if isinstance(given, Iterator) else given)

    def samples(self, name: str) -> Iterable[Sample]:
        """The calibration inputs, for the pass of this name, which cannot do without; raises PassError."""
        if self.calibration is None:
            raise PassError(
                f"{name} needs inputs to calibrate with: pass calibration=[...] to optimize, or --calibrate on the "
                "command line"
            )
        assert not isinstance(self.calibration, Path)  # it became a list of one
        return self.calibration


@dataclass(frozen=True)
class PassResult:
    """The new bundle, how many sites changed, what the user should know, and the sites refused."""

    bundle: Bundle
    matches: int
    notes: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()


def on_entries(bundle: Bundle, change: Callable[[Bundle, str], PassResult]) -> PassResult:
    """Change the programs that entries of the schedule run, one after another, and join what is said of each."""
    results = [PassResult(bundle, 0)]
    for name in bundle.entries:
        results.append(change(results[-1].bundle, name))
    return PassResult(
        results[-1].bundle,
        sum(result.matches for result in results),
        tuple(note for result in results for note in result.notes),
        tuple(refusal for result in results for refusal in result.refusals),
    )


@dataclass(frozen=True)
class Pass:
    """Base of all passes: a frozen dataclass whose fields are the options.

    A subclass sets ``name`` (its text spelling) and ``semantics`` and implements :meth:`run`, which must not
    mutate its input. ``requires`` raises :class:`PassError` when the bundle is not one the pass can read.

    An option may take a pass: its type is then that pass's class, or a base class of several. Such an option must not
    take arbitrary text as well, since in a pipeline's text both are words.
    """

    name: ClassVar[str] = ""
    semantics: ClassVar[Semantics] = "approximate"

    def __init_subclass__(cls) -> None:
        """Keep the text as the repr, in place of the one that ``dataclass`` would write."""
        cls.__repr__ = Pass.__repr__

    def __post_init__(self) -> None:
        """Raise :class:`PassError` for an option whose value is not of its annotated type."""
        hints = get_type_hints(type(self))
        for option in options(type(self)):
            value, hint = getattr(self, option.name), hints[option.name]
            if not fits(value, hint):
                raise PassError(
                    f"{self.name}: {option.name}={format_value(value)} is of the wrong type; "
                    f"it takes {wanted_text(hint)}"
                )

    @property
    def promise(self) -> Semantics:
        """The semantics with these options, where it depends on them."""
        return self.semantics

    @property
    def data_free(self) -> bool:
        """Whether the pass does to a program what it does to the one without reduced tokens: it reads weights alone."""
        return False

    def requires(self, bundle: Bundle) -> None:
        """Raise :class:`PassError` when ``bundle`` does not meet this pass's preconditions."""

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Return the transformed bundle; leave ``bundle`` untouched."""
        raise NotImplementedError

    def __repr__(self) -> str:
        given = [
            f"{f.name}={format_value(value)}"
            for f in options(type(self))
            if (value := getattr(self, f.name)) != f.default
        ]
        return self.name + (f"{{{' '.join(given)}}}" if given else "")


def options(cls: type[Pass]) -> list[dataclasses.Field[Any]]:
    """The options of a pass: the fields that its constructor takes."""
    return [field for field in dataclasses.fields(cls) if field.init]


def type_text(option: dataclasses.Field[Any]) -> str:
    """The type of an option, as the pass's author wrote it."""
    return option.type.__name__ if isinstance(option.type, type) else str(option.type)


def wanted_text(hint: object) -> str:
    """What an option of this type takes, in words for those who write a pipeline.

    >>> wanted_text(tuple[int, ...] | None), wanted_text(Literal["avg", "max"])
    ('a list such as [3,6] or none', 'avg or max')
    """
    if len(kinds(hint)) > 1:
        return " or ".join(map(wanted_text, kinds(hint)))
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return " or ".join(map(format_value, inner))
    if get_origin(hint) is tuple:
        return f"a list such as {_LISTS[inner[0]]}" if inner[0] in _LISTS else "a list in brackets"
    return _WORDS.get(hint) or getattr(hint, "__name__", str(hint))


_LISTS: Mapping[object, str] = {int: "[3,6]", float: "[0.5,0.25]", str: "[first,second]"}
_WORDS: Mapping[object, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    NoneType: "none",
}


def option_text(cls: type[Pass], option: dataclasses.Field[Any]) -> str:
    """An option with its default: ``r=4``; with its type if it takes a pass: ``press:KVEviction``."""
    typed = f":{type_text(option)}" if takes_pass(get_type_hints(cls)[option.name]) else ""
    default = "" if option.default is dataclasses.MISSING else f"={format_value(option.default)}"
    return option.name + typed + default


def kinds(hint: object) -> tuple[object, ...]:
    """The members of a union; of any other type, itself."""
    return get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)


def takes_pass(hint: object) -> bool:
    """Whether an option of this type takes a pass, or a list of passes."""
    if inner := get_args(hint):
        return any(map(takes_pass, inner))
    return isinstance(hint, type) and issubclass(hint, Pass)


def fits(value: object, hint: object) -> bool:
    """Whether an option's value is of its annotated type; an int is a float, a bool is neither."""
    inner = get_args(hint)
    if len(kinds(hint)) > 1:
        return any(fits(value, kind) for kind in kinds(hint))
    if get_origin(hint) is Literal:
        return value in inner
    if get_origin(hint) is tuple:
        return is_group(value) and isinstance(value, tuple) and all(fits(item, inner[0]) for item in value)
    if hint is int or hint is float:
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    assert isinstance(hint, type), f"an option's type is a class, a union, a tuple or a Literal, not {hint}"
    return isinstance(value, hint)


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
