"""Texts that fit a grammar: a JSON schema, a regular expression, or a grammar of rules.

The package llguidance (extra ``grammar``) says which tokens may follow; no token that could not be part of a fitting
text is chosen, whoever proposes it.
"""

# llguidance types what it takes and gives, but for its tokenizer's options.
# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np

from tokopt.arguments import check_choice, check_text
from tokopt.errors import InputError, MissingDependencyError
from tokopt.runtime.sampling import History, Logits

KINDS = ("json_schema", "regex", "lark")

LONGEST_TOKEN = 32
"""Bytes of the longest token with which a special token's name is spelled."""


@dataclass(frozen=True)
class Grammar:
    """What a generated text has to be, made by one of the class methods.

    >>> Grammar.regex("[0-9]{4}-[0-9]{2}")
    Grammar(kind='regex', text='[0-9]{4}-[0-9]{2}')
    """

    kind: str
    text: str
    name: str = field(default="the grammar", compare=False, repr=False)
    """What errors call it: the name of its file, for example."""

    def __post_init__(self) -> None:
        """Raise InputError for another kind, and for what is no text."""
        check_choice("kind", self.kind, KINDS)
        try:
            check_text(f"the {self.kind}", self.text).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the {self.kind} is no text of Unicode characters: {error}") from error

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """A JSON value that a JSON schema describes; ``{}`` describes any. Raises InputError for what is no JSON."""
        try:
            parsed: object = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(parsed, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the schema is no JSON ({error}); give a dictionary or its text") from error
        if not isinstance(parsed, Mapping):
            raise InputError(f"the schema is {text[:60]}; give an object, as in {{'type': 'object'}}")
        return cls("json_schema", text)

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """A text that a regular expression describes as a whole, in the syntax of the Rust crate regex."""
        return cls("regex", check_text("pattern", pattern))

    @classmethod
    def lark(cls, rules: str) -> Grammar:
        """A text of the rule ``start`` of a grammar in the syntax of Lark."""
        return cls("lark", check_text("rules", rules))


class Constraints:
    """What the grammars of a model need: its tokenizer, read once."""

    def __init__(self, tokenizer: str, vocabulary: int, eos: Sequence[int]) -> None:
        """``tokenizer`` is the text of a ``tokenizer.json``.

        Raises MissingDependencyError without llguidance, InputError for a model without an end token or a tokenizer
        that llguidance cannot read.
        """
        try:
            import llguidance
        except ImportError as error:
            raise MissingDependencyError(
                "a grammar needs the package llguidance; run: pip install 'tokopt[grammar]'"
            ) from error
        if not eos:
            raise InputError("a text that fits a grammar ends with an end token, and the model has none")
        self._library = llguidance
        try:
            self._tokenizer = llguidance.LLTokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(eos))
        except Exception as error:  # whatever the library raises
            line = " ".join(str(error).split())[:200]
            raise InputError(f"grammars cannot be used with the model's tokenizer: {line}") from error

    def processor(self, grammar: Grammar, prompts: Sequence[int]) -> Constrained:
        """A processor for texts whose prompts have so many tokens; raises InputError for what is no grammar."""
        matcher = self._library.LLMatcher
        make = {
            "json_schema": matcher.grammar_from_json_schema,
            "regex": matcher.grammar_from_regex,
            "lark": matcher.grammar_from_lark,
        }
        text = make[grammar.kind](grammar.text)
        if fault := matcher.validate_grammar(text, self._tokenizer):
            line = " ".join(fault.split())[:300]
            raise InputError(f"{grammar.name} ({grammar.kind}) cannot be used: {line}")
        return Constrained(
            [_Row(matcher(self._tokenizer, text, log_level=0), self._tokenizer, most) for most in prompts]
        )


class Constrained:
    """Gives the tokens that no fitting text goes on with the logit ``-inf``; a row's text may branch and go back."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows = rows

    def __call__(self, history: History, logits: Logits) -> Logits:
        """Raises InputError where the grammar becomes too complex to follow."""
        made = np.array(logits)
        for row, ids, out in zip(self._rows, history, made, strict=True):
            allowed = row.allowed(ids)
            if allowed is not None:
                out[~allowed[: len(out)]] = -np.inf
        return made


class _Row:
    """The grammar's place in one text."""

    def __init__(self, matcher: Any, tokenizer: Any, prompt: int) -> None:
        self._matcher, self._tokenizer, self._prompt = matcher, tokenizer, prompt
        self._read: list[int] = []

    def allowed(self, ids: Sequence[int]) -> np.ndarray | None:
        """Which tokens may follow [vocabulary or more] bool; None after a token that may not, which nobody chooses."""
        new = list(ids[self._prompt :])
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._read, new, strict=False)))
        if len(self._read) > same:
            self._matcher.rollback(len(self._read) - same)
            del self._read[same:]
        # A token that may not follow would leave the matcher in error for good; this does not consume it.
        self._read += new[same : same + self._matcher.try_consume_tokens(new[same:])]
        bits = self._matcher.compute_bitmask() if len(self._read) == len(new) else b""
        if self._matcher.is_error():
            line = " ".join(self._matcher.get_error().split())[:200]
            raise InputError(f"the grammar cannot be followed any further: {line}")
        if not bits:
            return None
        made = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").astype(bool)
        return self._spelled(made) if made.sum() == 1 and not self._matcher.is_accepting() else made

    def _spelled(self, made: np.ndarray) -> np.ndarray:
        """The tokens that a text with one way to go on may go on with.

        The library gives the first token of that text as the tokenizer reads it, which for the name of a special token
        is that token, and then does not take it for its name: such a text is spelled.
        """
        if self._follows(int(made.argmax())):
            return made
        text, found = self._matcher.compute_ff_bytes(), np.zeros_like(made)
        for size in range(1, min(len(text), LONGEST_TOKEN) + 1):
            ids = self._tokenizer.tokenize_bytes(text[:size])
            if len(ids) == 1 and self._follows(ids[0]):
                found[ids[0]] = True
        return found if found.any() else made  # an end token that the rules themselves name

    def _follows(self, token: int) -> bool:
        taken = self._matcher.try_consume_tokens([token])
        if taken:
            self._matcher.rollback(taken)
        return bool(taken)
