"""Where the n-grams of a growing text were first followed by something."""

from __future__ import annotations

from collections.abc import Sequence


class NGrams:
    """A text, and for each n-gram of 1 to ``longest`` tokens the place behind its first occurrence."""

    def __init__(self, longest: int, tokens: Sequence[int]) -> None:
        self.longest, self.tokens = longest, list[int]()
        self._behind: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            end = len(self.tokens)
            for n in range(1, min(self.longest, end) + 1):
                self._behind.setdefault(tuple(self.tokens[end - n :]), end)
            self.tokens.append(token)

    def follow(self, ahead: Sequence[int], most: int) -> list[int]:
        """Up to ``most`` tokens that followed in the text where its end, with ``ahead`` behind it, occurred first.

        The longest n-gram that occurred counts; the tokens stop at the end of the text.
        """
        context = (*self.tokens[-self.longest :], *ahead)
        for n in range(min(self.longest, len(context)), 0, -1):
            place = self._behind.get(context[len(context) - n :])
            if place is not None:
                return self.tokens[place : place + most]
        return []
