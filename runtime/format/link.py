"""The output of one program as an input of another."""

from __future__ import annotations

from dataclasses import dataclass

WHEN = ("once", "call")


@dataclass(frozen=True)
class Port:
    """An input or output: its program, and its name there."""

    program: str
    name: str


@dataclass(frozen=True)
class Link:
    """The value of ``source`` (an output) is the value of ``target`` (an input of role ``"link"``).

    ``when`` is ``"once"``: the target program runs once per request, so that a prefill reads the whole prompt in one
    call; or ``"call"``: it may run more often, and gets in every call what the source gave last.
    """

    source: Port
    target: Port
    when: str = "once"
