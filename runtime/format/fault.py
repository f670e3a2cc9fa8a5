"""What is wrong with a model's description."""

from __future__ import annotations

from tokopt.errors import TokoptError


class FormatError(TokoptError):
    """Programs, states, links and schedule do not fit together; one sentence that says where."""


def require(holds: bool, fault: str) -> None:
    """Raise FormatError unless a law holds."""
    if not holds:
        raise FormatError(fault)
