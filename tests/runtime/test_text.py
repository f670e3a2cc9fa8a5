"""Streamed text: whole characters only, nothing lost, stop strings never shown."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

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
