"""tokopt::move_entries, and ``tokopt.cpu::MoveEntries``."""

from __future__ import annotations

from tokopt.kernels.declaration import Op, Shape, Work


def work(cache: Shape, path: Shape, length: Shape) -> Work:
    """In place: what is moved is read and written, the rest of the cache stays where it is."""
    batch, heads, _, channels = cache
    return Work(0, 8.0 * batch * heads * path[1] * channels)


OP = Op(work=work)
