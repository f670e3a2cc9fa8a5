"""What every way of generating a text is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from tokopt.arguments import check_callable, check_integer, check_items, check_kind
from tokopt.errors import InputError
from tokopt.runtime.grammar import Grammar
from tokopt.runtime.sampling import LogitsProcessor, Sampling
from tokopt.runtime.speculation.drafters.base import Drafter
from tokopt.runtime.speculation.rules.base import Rule

_SAMPLING = frozenset(field.name for field in fields(Sampling))
"""What says how a token is chosen, which other libraries take beside ``max_tokens``."""


class ChoiceOptions(TypedDict, total=False):
    """Options of every text: how many tokens it has, and how they are chosen.

    ``max_tokens`` and ``min_tokens`` are the most and the fewest new tokens; before the fewest no end token is chosen.
    ``sampling`` says how a token is chosen, by default greedily; ``processors`` change the logits before.
    ``grammar`` is what the text has to fit. With ``logprobs`` each token's log-probability is reported, and as many of
    the likeliest tokens in its place.

    ``nodes`` is how many of a speculating model's tree every call gets, 1 to propose nothing; by default as many as
    write fastest, by what calls took so far. With a ``drafter``, for a model that verifies what a host proposes (pass
    ``verify``), every call checks a tree of its tokens: one of the names
    :data:`tokopt.runtime.speculation.named.DRAFTERS`, or a
    :class:`tokopt.runtime.speculation.drafters.base.Drafter`. ``accept`` is the rule by which tokens are accepted, one
    of the names :data:`tokopt.runtime.speculation.named.RULES` or an instance. By default the text is that of plain
    decoding, token for token. Processors then get the text down to every node that is looked at.
    """

    max_tokens: int
    min_tokens: int
    sampling: Sampling | None
    processors: Iterable[LogitsProcessor] | None
    grammar: Grammar | None
    logprobs: int | None
    nodes: int | None
    drafter: str | Drafter | None
    accept: str | Rule | None


class TokenOptions(ChoiceOptions, total=False):
    """Options of ``LanguageModel.tokens``.

    ``inputs`` are the arrays that a model takes beside its prompts (images, for example) by name, with a row for every
    prompt.
    """

    inputs: Mapping[str, Any] | None


class TextOptions(ChoiceOptions, total=False):
    """Options of a text of characters, ``Chat.say`` and ``Chat.stream``: ``stop`` is a string before which it ends, or
    several."""

    stop: str | Iterable[str] | None


class PromptOptions(TokenOptions, TextOptions, total=False):
    """Options of ``LanguageModel.generate`` and ``LanguageModel.stream``."""


@dataclass(frozen=True)
class Options:
    """What the methods that generate are told, all of it: see :class:`PromptOptions`."""

    max_tokens: int
    min_tokens: int = 0
    sampling: Sampling | None = None
    processors: Iterable[LogitsProcessor] | None = ()
    grammar: Grammar | None = None
    logprobs: int | None = None
    nodes: int | None = None
    drafter: str | Drafter | None = None
    accept: str | Rule | None = None
    stop: str | Iterable[str] | None = ()
    inputs: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], known: type[ChoiceOptions], max_tokens: int) -> Options:
        """The options that a caller gave, of those that are known; raises TypeError for others."""
        names = known.__optional_keys__
        for name in given:
            if name == "samples":
                raise TypeError(
                    "samples is an option of generate alone; here one text is written, so leave it out"
                )
            if name in _SAMPLING:
                raise TypeError(
                    f"{name} is an option of Sampling; write sampling=Sampling({name}={given[name]!r})"
                )
            if name not in names:
                raise TypeError(f"there is no option {name!r}; the options are {', '.join(sorted(names))}")
        options: dict[str, Any] = {"max_tokens": max_tokens, **given}
        return cls(**options)

    def checked(self, vocabulary: int) -> Checked:
        """The options that say which token is chosen; raises InputError for what they cannot be."""
        most = check_integer("max_tokens", self.max_tokens, least=0)
        least = check_integer("min_tokens", self.min_tokens, least=0)
        if least > most:
            raise InputError(f"min_tokens is {least} and max_tokens {most}; give at most as many")
        if self.logprobs is not None:
            check_integer("logprobs", self.logprobs, 0, vocabulary)
        if self.grammar is not None:
            check_kind(
                "grammar", self.grammar, Grammar, "a Grammar, as in Grammar.json_schema({...}), or None"
            )
        sampling = Sampling() if self.sampling is None else self.sampling
        check_kind("sampling", sampling, Sampling, "a Sampling, as in Sampling(temperature=0.8), or None")
        sampling.check_vocabulary(vocabulary)
        takes = "a list of functions of (history, logits)"
        processors = () if self.processors is None else check_items("processors", self.processors, takes)
        for process in processors:
            check_callable("a processor", process, takes)
        return Checked(most, least, sampling, tuple(processors))


@dataclass(frozen=True)
class Checked:
    """The most and the fewest new tokens, how they are chosen, and the caller's own processors."""

    most: int
    least: int
    sampling: Sampling
    processors: Sequence[LogitsProcessor]
