"""What every way of generating a text is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tokopt.arguments import check_callable, check_integer, check_items, check_kind
from tokopt.runtime.sampling import LogitsProcessor, Sampling
from tokopt.runtime.speculation.drafters.base import Drafter
from tokopt.runtime.speculation.rules.base import Rule


@dataclass(frozen=True)
class Options:
    """What the methods that generate have in common."""

    max_tokens: int
    sampling: Sampling | None = None
    processors: Iterable[LogitsProcessor] | None = ()
    inputs: Mapping[str, Any] | None = None
    nodes: int | None = None
    drafter: str | Drafter | None = None
    accept: str | Rule | None = None

    def checked(self) -> tuple[int, Sampling, tuple[LogitsProcessor, ...]]:
        """The number of tokens, how they are chosen, and the caller's own processors; raises InputError."""
        most = check_integer("max_tokens", self.max_tokens, least=0)
        sampling = Sampling() if self.sampling is None else self.sampling
        check_kind("sampling", sampling, Sampling, "a Sampling, as in Sampling(temperature=0.8), or None")
        takes = "a list of functions of (history, logits)"
        processors = () if self.processors is None else check_items("processors", self.processors, takes)
        for process in processors:
            check_callable("a processor", process, takes)
        return most, sampling, processors
