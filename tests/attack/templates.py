"""Chat templates of random fragments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

from tests.attack.case import Kind
from tests.attack.damage import damage_bytes
from tests.attack.victims import MESSAGES, TEMPLATE, attacked, behaviour, victims
from tokopt.runtime import load
from tokopt.runtime.format.manifest import MANIFEST, read_manifest

VALUES = (
    *(
        "messages",
        "messages[0]",
        "messages[9]",
        "messages[0].content",
        "bos_token",
        "eos_token",
        "nothing",
        "nothing.more",
    ),
    *(
        "1",
        "0",
        "-1",
        "2**70",
        "1/0",
        "'a' * 10**9",
        "[0] * 10**9",
        "range(10**9)",
        "'%s' % 1",
        "'%d' % 'a'",
        "none",
    ),
    *(
        "messages.__class__",
        "''.__class__.__mro__",
        "cycler",
        "lipsum(9)",
        "namespace(a=1)",
        "dict(a=1)",
        "raise_exception",
    ),
    *(
        "raise_exception('no')",
        "raise_exception()",
        "strftime_now('%Y')",
        "self",
        "joiner()",
        "(messages, 1)",
        "{}",
        "[]",
    ),
)
FILTERS = (
    *(
        "upper",
        "tojson",
        "tojson(indent=4)",
        "length",
        "first",
        "last",
        "sort",
        "int",
        "float",
        "list",
        "join(1)",
        "trim",
    ),
    *(
        "center(10**9)",
        "indent(10**9)",
        "batch(0)",
        "slice(0)",
        "round(-1)",
        "map('x')",
        "selectattr('role')",
        "format(1)",
    ),
    *(
        "unknown",
        "attr('__class__')",
        "replace('', 'x')",
        "wordwrap(0)",
        "truncate(-1)",
        "sum",
        "min",
        "urlize",
        "items",
    ),
)
BLOCKS = (
    "{{% for x in {v} %}}{b}{{% endfor %}}",
    "{{% if {v} %}}{b}{{% else %}}{b}{{% endif %}}",
    "{{% set x = {v} %}}{b}",
    "{{% macro f(x) %}}{b}{{% endmacro %}}{{{{ f({v}) }}}}",
    "{{% macro f(x) %}}{{{{ f(x) }}}}{{% endmacro %}}{{{{ f({v}) }}}}",
    "{{% generation %}}{b}{{% endgeneration %}}",
    "{{% for x in {v} %}}{{% break %}}{{% endfor %}}",
    "{{% include {v} %}}",
    "{{% import {v} as x %}}",
    "{{% extends {v} %}}",
    "{{% filter upper %}}{b}{{% endfilter %}}",
    "{{% do {v} %}}",
    "{{# {v} #}}{b}",
    "{{% raw %}}{b}{{% endraw %}}",
)


def template(rng: Random, depth: int = 3) -> str:
    """Fragments within each other."""
    value = rng.choice(VALUES)
    for _ in range(rng.randrange(3)):
        value = (
            f"{value} | {rng.choice(FILTERS)}"
            if rng.random() < 0.7
            else f"({value}) {rng.choice('+-*/~%')} 1"
        )
    if not depth or rng.random() < 0.4:
        return rng.choice([TEMPLATE, f"{{{{ {value} }}}}"])
    return rng.choice(BLOCKS).format(v=value, b=template(rng, depth - 1)) + template(rng, depth - 1)


def prepare(folder: Path) -> Callable[[Random, Path], bool]:
    victim = next(path for path in victims(folder) if (path / "tokenizer.json").exists())
    known = behaviour(victim)

    def run(rng: Random, scratch: Path) -> bool:
        path = attacked(victim, scratch)
        text = template(rng)
        if rng.random() < 0.3:
            text = damage_bytes(rng, text.encode()).decode(errors="replace")
        manifest = read_manifest(path)
        assert manifest.generation is not None
        changed = replace(manifest, generation=replace(manifest.generation, chat_template=text))
        (path / MANIFEST).write_text(changed.to_json())
        load(path, threads=1).chat_prompt(MESSAGES)
        return behaviour(path) == known

    return run


KIND = Kind("templates", prepare, other=True)
