"""Memory that is free inside the process, given back to the system.

glibc keeps what is freed for allocations to come. A small array that stays is cut out of the place of a large one that
was freed, and the next large one finds no place. So a model that is rewritten weight by weight would hold its own size
once more.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from functools import cache


def reclaim() -> None:
    """Free what nobody uses any more, and return its memory to the system; takes half a second.

    The nodes of a graph hold each other, and it holds its weights: when a bundle is dropped, Python frees it only when
    it next looks for such circles, and it knows nothing of their size.
    """
    gc.collect()
    trim()


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
