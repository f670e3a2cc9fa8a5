"""How many nodes of a tree a call gets: by the seconds that calls took and the tokens that they committed so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tokopt.errors import InputError

MEMORY = 128
"""Calls after which what was accepted counts e times less, so that a text may change."""

DOUBT = 3
"""Calls that count as much as what is believed without experience."""

TIMES = 15
"""Calls of a size over which the lower quartile of the seconds is taken: what disturbs a call makes it longer."""

ENOUGH = 3
"""Calls of a size without which its seconds are not known: the first ones allocate memory."""

STALE = 256
"""Calls, times what a size costs beside the cheapest, after which it is tried once more: the machine may change. After
far fewer where few of its calls are known: threads that still spin for another program disturb several in a row."""


@dataclass(frozen=True)
class Acceptance:
    """Of calls that proposed down to each depth with all above accepted, how many there were, and with it accepted.

    Older ones count less.
    """

    tried: tuple[float, ...]
    right: tuple[float, ...]

    @classmethod
    def unknown(cls, depth: int) -> Acceptance:
        """Nothing was seen yet."""
        return cls((0.0,) * depth, (0.0,) * depth)

    def share(self, place: int, before: float) -> float:
        """How many of the proposals of a depth are right; ``before`` is what to believe without experience."""
        return (self.right[place] + DOUBT * before) / (self.tried[place] + DOUBT)

    def after(self, depth: int, committed: Sequence[tuple[int, int]]) -> Acceptance:
        """What is known after a call down to a depth.

        ``committed`` has for every row its tokens, and the most that it might have had.
        """
        fade, share = 1 - 1 / MEMORY, 1 / len(committed)
        tried, right = [x * fade for x in self.tried], [x * fade for x in self.right]
        for count, limit in committed:
            for place in range(min(depth, limit - 1, count)):
                tried[place] += share
                right[place] += share * (count > place + 1)
        return Acceptance(tuple(tried), tuple(right))


@dataclass(frozen=True)
class MeasuredNodes:
    """The number of nodes for the calls of one model and batch.

    ``depths`` are those of a tree's nodes. Of the ``sizes``, which are one, powers of two and the whole tree, a call
    gets the one of the most tokens per second. Tokens follow from what was accepted so far where proposals were as
    sure, since text that was copied at length goes on otherwise than where one word occurred before. For what was never
    tried a good deal is hoped, and a little where it was long ago: so each size is tried, again and again, and the less
    it gave the more rarely.
    """

    depths: tuple[int, ...]
    sizes: tuple[int, ...]
    calls: int = 0
    last: Mapping[int, int] = field(default_factory=dict[int, int])
    seconds: Mapping[int, tuple[float, ...]] = field(default_factory=dict[int, tuple[float, ...]])
    accepted: Mapping[tuple[int, int], Acceptance] = field(default_factory=dict[tuple[int, int], Acceptance])

    @classmethod
    def of(cls, parents: Sequence[int]) -> MeasuredNodes:
        """Nothing was seen yet of a tree; ``parents`` says whom each of its nodes follows."""
        if not parents:
            raise InputError("a tree has no node; give the parent of each, -1 for the root")
        depths: list[int] = []
        for parent in parents:
            depths.append(depths[parent] + 1 if depths else 0)
        powers = (2**k for k in range(len(parents).bit_length()))
        return cls(tuple(depths), (*(size for size in powers if size < len(parents)), len(parents)))

    def choose(self, level: int, limit: int) -> int:
        """The nodes for a call of at most ``limit`` tokens, of which proposals are as sure as ``level`` says."""
        if level <= 0 or limit <= 1:
            return 1
        return max(self.sizes, key=lambda size: self._tokens(size, level, limit) / self._cost(size))

    def observe(
        self, nodes: int, seconds: float, committed: Sequence[tuple[int, int]], level: int
    ) -> MeasuredNodes:
        """What follows from a call.

        ``committed`` has for every row that goes on its tokens, and the most that it might have had.
        """
        calls = self.calls + 1
        times = (*self.seconds.get(nodes, ()), max(seconds, 1e-9))[-TIMES:]
        made = replace(
            self, calls=calls, seconds={**self.seconds, nodes: times}, last={**self.last, nodes: calls}
        )
        if level <= 0:
            return made
        own, depth = self._key(nodes, level), max(self.depths[:nodes])
        accepted = {own: Acceptance.unknown(max(self.depths)), **self.accepted}
        for key in accepted:
            if key[0] == level:
                accepted[key] = accepted[key].after(depth if key == own else 0, committed)
        return replace(made, accepted=accepted)

    def _key(self, size: int, level: int) -> tuple[int, int]:
        """Nodes of a chain tell what fewer of them would have given; of a tree they do not."""
        return level, 0 if self.depths[-1] == len(self.depths) - 1 else size

    def _tokens(self, size: int, level: int, limit: int) -> float:
        """What a call commits on average.

        Without experience the d-th proposal is right in ``sure / (sure + 1)`` of the calls in which those before it
        are, where ``sure`` is d - 1 more than the level; of more nodes of a tree so many as of fewer.
        """
        keys = dict.fromkeys(self._key(fewer, level) for fewer in self.sizes if fewer <= size)
        known = [self.accepted[key] for key in keys if key in self.accepted]
        reached, total = 1.0, 1.0
        for place in range(min(max(self.depths[:size]), limit - 1)):
            share = (level + place) / (level + place + 1)
            for acceptance in known:
                share = acceptance.share(place, share)
            reached *= share
            total += reached
        return total

    def _cost(self, size: int) -> float:
        """Seconds of a call; where they are not known, or not since long, those of fewer nodes: it cannot be less."""
        known = {
            nodes: sorted(times)[(len(times) - 1) // 4]
            for nodes, times in self.seconds.items()
            if len(times) >= ENOUGH
        }
        if not known:
            return 1.0
        if size in known:
            beside = min(known[size] / min(known.values()), size)  # nodes cost no more than calls
            if self.calls - self.last[size] < STALE * beside * (len(self.seconds[size]) / TIMES) ** 2:
                return known[size]
        fewer = [nodes for nodes in known if nodes < size]
        return known[max(fewer)] if fewer else known[min(known)] * size / min(known)
