"""How many nodes of a tree a call gets: by the seconds that calls took and the tokens that they committed so far."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tokopt.arguments import check_integer

TRY = 4
"""Calls of a size that are made in a row before another one is chosen."""

SHARE = 1 / 64
"""The part of the time that may be lost on trying sizes which are not the best as far as is known."""

MEMORY = 128
"""Calls after which what was committed counts e times less, so that a text may change."""

TIMES = 15
"""Calls of a size over which the median of the seconds is taken."""


@dataclass(frozen=True)
class Size:
    """What is known of calls with so many nodes.

    ``seconds`` are those of the last such calls. ``calls`` and ``tokens`` are sums over all of them, in which older
    ones count less. ``credit`` are the seconds that may be lost on trying this size.
    """

    nodes: int
    seconds: tuple[float, ...] = ()
    calls: float = 0.0
    tokens: float = 0.0
    credit: float = 0.0

    @property
    def cost(self) -> float:
        """Seconds of a call: the lower median, which no single slow call changes."""
        return sorted(self.seconds)[(len(self.seconds) - 1) // 2]

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.calls / self.cost

    def loss(self, speed: float) -> float:
        """Seconds that calls of this size lose against a speed, when it is tried."""
        return TRY * max(self.cost - self.tokens / self.calls / speed, 0.0)

    def after(self, seconds: float, tokens: float, *, timed: bool) -> Size:
        """What is known after one more call of this size."""
        times = (*self.seconds, max(seconds, 1e-9))[-TIMES:] if timed else self.seconds
        return replace(self, seconds=times, calls=self.calls + 1, tokens=self.tokens + tokens)

    def later(self, credit: float) -> Size:
        """What is known one call later, of whatever size."""
        fade = 1 - 1 / MEMORY
        return replace(self, calls=self.calls * fade, tokens=self.tokens * fade, credit=self.credit + credit)


@dataclass(frozen=True)
class MeasuredNodes:
    """The number of ``nodes`` for the next call of one model and batch, of which ``left`` calls follow one another.

    Of the ``sizes`` the fastest is chosen. Each other one earns a part of the time that passes, and is tried when that
    pays for what the trial is expected to lose: a size that is nearly as fast is tried often, one that is far slower
    rarely. The first call after one of another size (``last``) is not timed, since memory is laid out anew for it.
    """

    sizes: tuple[Size, ...]
    nodes: int
    left: int = TRY
    last: int = 0

    @classmethod
    def of(cls, most: int) -> MeasuredNodes:
        """Nothing was seen yet of a tree of ``most`` nodes: the whole, one node, and powers of 2 between are tried."""
        most = check_integer("most", most, 1)
        between = [2**k for k in range(most.bit_length(), 0, -1) if 2**k < most]
        order = [most, *([1] if most > 1 else []), *between]
        return cls(tuple(map(Size, order)), most)

    def observe(self, nodes: int, seconds: float, tokens: float) -> MeasuredNodes:
        """What follows from a call with ``nodes`` nodes that committed ``tokens``, of several rows their mean."""
        credit = SHARE * seconds / max(len(self.sizes) - 1, 1)
        sizes = [size.later(credit) for size in self.sizes]
        sizes = [
            size.after(seconds, tokens, timed=nodes == self.last) if size.nodes == nodes else size
            for size in sizes
        ]
        made = replace(self, sizes=tuple(sizes), last=nodes, left=self.left - 1)
        return made if made.left > 0 else made._choose()

    def _choose(self) -> MeasuredNodes:
        for size in self.sizes:
            if not size.seconds:
                return replace(self, nodes=size.nodes, left=TRY)
        best = max(self.sizes, key=lambda size: size.speed)
        # No more credit than for one trial: whoever was the best has none when it no longer is.
        sizes = [replace(size, credit=min(size.credit, size.loss(best.speed))) for size in self.sizes]
        due = [size for size in sizes if size.nodes != best.nodes and size.credit >= size.loss(best.speed)]
        if not due:
            return replace(self, sizes=tuple(sizes), nodes=best.nodes, left=1)
        tried = min(due, key=lambda size: size.calls)
        paid = [replace(size, credit=0.0) if size.nodes == tried.nodes else size for size in sizes]
        return replace(self, sizes=tuple(paid), nodes=tried.nodes, left=TRY)
