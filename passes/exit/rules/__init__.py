"""When a row leaves, one rule per file: plain PyTorch, traced into every stage but the last."""

from __future__ import annotations

from importlib import import_module
from typing import Literal, get_args

from tokopt.passes.exit.rules.base import Rule

RuleName = Literal["entropy", "margin", "uncertainty", "patience", "convergence"]
"""The names of the rules, which are those of their files."""

RULES: tuple[RuleName, ...] = get_args(RuleName)


def load_rule(name: RuleName) -> Rule:
    """The rule of a name."""
    return import_module(f"{__name__}.{name}").RULE
