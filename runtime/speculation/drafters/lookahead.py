"""Lookahead decoding: n-grams from guesses that are refined in parallel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokopt.arguments import check_integer
from tokopt.runtime.speculation.decisions import Decisions
from tokopt.runtime.speculation.draft import Draft, Drawn
from tokopt.runtime.speculation.drafters.base import Verified, fixed, read_prompt
from tokopt.runtime.speculation.tree import Branches, Tree


@dataclass(frozen=True)
class Lookahead:
    """A window of guesses for ``window`` coming positions, kept for the last ``level`` - 1 calls (arXiv 2402.02057).

    The guesses are nodes of the tree: those of the oldest call are a chain below the root, and below each of them hangs
    the chain of what later calls guessed for the positions after it. What the model finds likeliest behind such a
    chain makes an n-gram of ``level`` tokens, and is the newest guess for its position. The text's own n-grams count
    too. Up to ``guesses`` n-grams that begin with the root are proposed, those seen last first.
    """

    window: int = 7
    level: int = 5
    guesses: int = 7

    name = "lookahead"
    drawn = Drawn.DETERMINISTIC
    fills = False
    tops = 1

    def __post_init__(self) -> None:
        for field, least in (("window", 1), ("level", 2), ("guesses", 1)):
            check_integer(field, getattr(self, field), least)

    def open(self, prompt: Sequence[int]) -> LookaheadText:
        """Start with a text."""
        return LookaheadText(self, read_prompt(prompt))


class Pool:
    """The last ``most`` n-grams by their first token; one that is seen again counts as new."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._grams: dict[int, list[tuple[int, ...]]] = {}

    def add(self, gram: Sequence[int]) -> None:
        """Remember an n-gram."""
        rest = tuple(gram[1:])
        known = [other for other in self._grams.get(gram[0], []) if other != rest]
        self._grams[gram[0]] = [*known, rest][-self.most :]

    def follow(self, token: int) -> list[tuple[int, ...]]:
        """What followed a token, seen last first."""
        return self._grams.get(token, [])[::-1]


class LookaheadText:
    """One text's window [level - 1, window], the oldest call's guesses first, and its pool of n-grams.

    Guess ``[l][j]`` is for the position l + j + 1 after the root. Guesses that were never computed are tokens of the
    prompt, in turn.
    """

    def __init__(self, method: Lookahead, prompt: list[int]) -> None:
        self.method, self.prompt, self._given = method, prompt, 0
        self.pool, self._last = Pool(method.guesses), list[int]()
        self._append(prompt)
        self.window = [[self._fill() for _ in range(method.window)] for _ in range(method.level - 1)]
        self._columns: list[int] = []  # the last node of each column that is in the tree

    def propose(self, plan: Tree, decisions: Decisions) -> Draft:
        """N-grams of the pool on up to half of the plan's nodes, then the window's columns while they fit."""
        branches = Branches(self._last[-1])
        share = 1 + (plan.nodes - 1) // 2
        for gram in self.pool.follow(self._last[-1]):
            branches.extend(gram, share)
        self._columns, top = [], 0
        for column in range(self.method.window):
            whole = branches.extend((row[column] for row in self.window), plan.nodes, top)
            if len(whole) < len(self.window):
                break
            top = whole[0]
            self._columns.append(whole[-1])
        return fixed(branches)

    def observe(self, verified: Verified) -> None:
        """Take the n-grams of the columns and move the window behind the new root."""
        newest: list[int] = []
        for column, node in enumerate(self._columns):
            newest.append(verified.top_of(node, 1)[0])
            self.pool.add([*(row[column] for row in self.window), newest[-1]])
        moved = len(verified.accepted.tokens)
        if newest:
            self.window = [*self.window[1:], newest]
            moved -= 1  # the rows went up by one: each is now for one position further
        self.window = [self._resize(row[moved:]) for row in self.window]
        self._append(verified.accepted.tokens.tolist())
        self._columns = []

    def _append(self, tokens: Sequence[int]) -> None:
        """Take the n-grams that tokens of the text complete."""
        for token in tokens:
            self._last = [*self._last, token][-self.method.level :]
            if len(self._last) == self.method.level:
                self.pool.add(self._last)

    def _resize(self, row: list[int]) -> list[int]:
        return [*row, *(self._fill() for _ in range(self.method.window - len(row)))]

    def _fill(self) -> int:
        self._given += 1
        return self.prompt[(self._given - 1) % len(self.prompt)]
