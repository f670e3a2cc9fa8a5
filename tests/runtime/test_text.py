"""Streamed text: whole characters only, nothing lost, stop strings never shown."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from tokopt.errors import ArtifactError
from tokopt.runtime.text import TextStream, Tokenizer


def byte_tokenizer() -> Tokenizer:
    """One token per byte, as the rarest characters of every byte-level BPE are spelled; 256 ends a text."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    library: Any = Library(models.BPE({letter: i for i, letter in enumerate(sorted(letters))}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<end>"])
    return Tokenizer(library.to_str(), 257)


TOKENIZER = byte_tokenizer()
texts = st.text(st.sampled_from("ab é✓🙂\n"), max_size=20)


def merging_tokenizer(place: Any, normalizer: Any = None, **end: bool) -> Tokenizer:
    """Pairs of letters are tokens, too; ``place`` is what a tokenizer of words does to the beginning of a text."""
    letters = [*"ab", "\u2581", "\u0120"]
    pairs = [(first, second) for first in letters for second in letters]
    words = [*letters, *(first + second for first, second in pairs)]
    library: Any = Library(models.BPE({word: i for i, word in enumerate(words)}, pairs))
    library.normalizer, library.pre_tokenizer = normalizer, place
    library.add_tokens([AddedToken("<end>", special=True, **end)])
    return Tokenizer(library.to_str(), 99)


SPACES = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])


@pytest.mark.parametrize(
    "tokenizer",
    [
        *(
            merging_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=first, use_regex=words))
            for first in (False, True)
            for words in (False, True)
        ),
        *(
            merging_tokenizer(pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split))
            for scheme in ("first", "always", "never")
            for split in (False, True)
        ),
        merging_tokenizer(None, SPACES),
        merging_tokenizer(None, SPACES, lstrip=True, rstrip=True),
    ],
)
@given(before=st.text("ab ", max_size=6), after=st.text("ab ", max_size=6))
def test_what_follows_a_special_token_is_spelled_alike_whatever_is_before_it(
    tokenizer: Tokenizer, before: str, after: str
) -> None:
    text, rest = f"{before}<end>{after}", tokenizer.encode_parts(f"<end>{after}")
    assert tokenizer.parts_at(text, len(before)) and not tokenizer.parts_at(text, len(before) + 1)
    assert tokenizer.encode_parts(text)[-len(rest) :] == rest


@pytest.mark.parametrize("how", [{"normalized": True}, {"single_word": True}])
def test_a_special_token_that_is_not_found_everywhere_parts_nothing(how: dict[str, bool]) -> None:
    tokenizer = merging_tokenizer(None, normalizers.Lowercase(), **how)
    assert not tokenizer.parts_at("a<end>b", 1)


@given(texts)
def test_pieces_add_up_to_the_text(text: str) -> None:
    stream = TextStream(TOKENIZER)
    pieces = [stream.add(token) for token in TOKENIZER.encode(text)] + [stream.finish()]
    assert "".join(pieces) == text == stream.text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


@given(texts, st.lists(st.text(st.sampled_from("abé "), min_size=1, max_size=3), max_size=2))
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    stream = TextStream(TOKENIZER, stop)
    shown = ""
    for token in TOKENIZER.encode(text):
        shown += stream.add(token)
        assert not any(s in shown for s in stop)
        if stream.stopped:
            break
    shown += stream.finish()
    ends = [at for s in stop if (at := text.find(s)) >= 0]
    assert stream.stopped == bool(ends)
    assert text.startswith(shown) and not any(s in shown for s in stop)
    if not ends:
        assert shown == text


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    stream = TextStream(TOKENIZER)
    first = TOKENIZER.encode("🙂")[0]
    assert stream.add(first) == "" and stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_not_text() -> None:
    stream = TextStream(TOKENIZER)
    assert [stream.add(t) for t in (*TOKENIZER.encode("a"), 256)] == ["a", ""]


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(ArtifactError, match="256 tokens and the model 100; export it with its own"):
        Tokenizer(TOKENIZER.tokenizer.to_str(), 100)


def test_a_damaged_tokenizer_is_refused() -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        Tokenizer("{}", 100)
