"""``tokopt passes``: list the passes and their options."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace

from tokopt.cli.screen import Screen
from tokopt.cli.verb import OK, Verb


def add_options(parser: ArgumentParser) -> None:
    """None beyond those of every verb."""


def run(args: Namespace, screen: Screen) -> int:
    """List the passes and their options."""
    from tokopt.passes import PASSES, load_pass
    from tokopt.pipeline.base import option_text, options
    from tokopt.pipeline.text import format_value

    listed = []
    for name in PASSES:
        cls = load_pass(name)
        fields = options(cls)
        given = {f.name: format_value(f.default) for f in fields if f.default is not dataclasses.MISSING}
        summary = (cls.__doc__ or "").strip().split("\n\n")[0]
        listed.append(
            {
                "name": name,
                "semantics": cls.semantics,
                "options": {f.name: given.get(f.name) for f in fields},
                "usage": " ".join(option_text(cls, f) for f in fields),
                "summary": " ".join(summary.split()),
            }
        )
    rows = [(p["name"], p["semantics"], p["usage"], p["summary"]) for p in listed]
    screen.table(("pass", "semantics", "options and their defaults", ""), rows)
    screen.finish(listed)
    return OK


VERB = Verb(
    "list the passes with their options",
    "tokopt passes",
    add_options,
    run,
)
