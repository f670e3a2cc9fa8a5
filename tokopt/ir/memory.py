"""Memory that is free inside the process, given back to the system.

glibc keeps what is freed for allocations to come. A small array that stays is cut out of the place of a large one that
was freed, and the next large one finds no place. So a model that is rewritten weight by weight would hold its own size
once more.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


def trim() -> None:
    """Return free memory to the system, where the C library can; costs a few milliseconds."""
    _trimmer()(0)


@cache
def _trimmer() -> Callable[[int], object]:
    """``malloc_trim`` of glibc; what does nothing elsewhere."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # another C library, or Windows
        return lambda kept: None
