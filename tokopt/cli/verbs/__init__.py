"""The verbs of the ``tokopt`` command: each is one module of this package, which ends in ``VERB = Verb(...)``."""

from __future__ import annotations

from importlib import import_module

from tokopt.cli.verb import Verb

VERBS = (
    "capture",
    "optimize",
    "export",
    "inspect",
    "estimate",
    "run",
    "generate",
    "chat",
    "verify",
    "bench",
    "bisect",
    "compare",
    "tune",
    "passes",
)
"""The verbs in the order of ``tokopt --help``; a name is that of the verb's module."""


def load_verb(name: str) -> Verb:
    """The verb of the module ``name``."""
    return import_module(f"{__name__}.{name}").VERB
