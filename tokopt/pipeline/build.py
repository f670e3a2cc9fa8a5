"""Passes from their text: names are looked up, and the values of options become what the options take."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection
from typing import get_args, get_origin, get_type_hints

from tokopt.errors import PassError
from tokopt.pipeline.base import Pass, fits, kinds, options, takes_pass, wanted_text
from tokopt.pipeline.text import Call, Place, Value


def build(call: Call) -> Pass:
    """Make the pass that is written.

    Raises PipelineSyntaxError for an unknown name or option, an option that is missing, or one whose value the pass
    rejects.
    """
    cls = _find(call)
    known = {field.name: field for field in options(cls)}
    for name, option in call.options.items():
        if name not in known:
            raise option.name_place.error(
                f"pass {call.name} has no option {name!r}{_nearest(name, known)}; its options: {', '.join(known)}"
            )
    hints = get_type_hints(cls)
    for name, field in known.items():
        if name not in call.options and field.default is dataclasses.MISSING:
            raise call.place.error(
                f"pass {call.name} needs the option {name!r}, which takes {wanted_text(hints[name])}"
            )
    values = {
        name: _meant(option.value, hints[name], option.value_place) for name, option in call.options.items()
    }
    try:
        return cls(**values)
    except PassError as error:
        raise call.place.error(str(error)) from error


def _find(call: Call) -> type[Pass]:
    from tokopt.passes import PASSES, load_pass

    if call.name not in PASSES:
        raise call.place.error(
            f"unknown pass {call.name!r}{_nearest(call.name, PASSES)}; known: {', '.join(PASSES)}"
        )
    return load_pass(call.name)


def _meant(value: Value, hint: object, place: Place) -> object:
    """What a written value means to an option of type ``hint``: a word where a pass is taken names that pass."""
    if isinstance(value, Call):
        return build(value)
    if isinstance(value, tuple):
        items = next((get_args(kind)[0] for kind in kinds(hint) if get_origin(kind) is tuple), object)
        return tuple(_meant(item, items, place) for item in value)
    if isinstance(value, str) and takes_pass(hint) and not fits(value, hint):
        return build(Call(value, {}, place))
    return value


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
