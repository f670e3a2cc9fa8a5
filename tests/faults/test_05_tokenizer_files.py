"""A tokenizer.json saved with truncation cut prompts, and a folder with vocab.json and merges.txt lost its tokenizer.

The law: the token ids of a prompt are those of transformers for the same folder, of the whole prompt and of nothing
else; a tokenizer that cannot be read is named and not left out without a word.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tokopt.errors import ArtifactError, CaptureError
from tokopt.frontend.texts import read_texts, without_padding
from tokopt.runtime.text import Tokenizer

PROMPT = "hello  hell world, é🙂 <|end|> hello"


def byte_library() -> Library:
    """One token per byte and two pairs, with a token in front of every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate(["<s>", *letters, "he", "ll"])}
    library: Any = Library(models.BPE(vocabulary, [("h", "e"), ("l", "l")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    library.add_special_tokens(["<s>"])
    return library


def truncated(library: Any) -> None:
    library.enable_truncation(max_length=4)


def strided(library: Any) -> None:
    library.enable_truncation(max_length=8, stride=5, direction="left")


def padded(library: Any) -> None:
    library.enable_padding(length=50, pad_id=1)


def rounded(library: Any) -> None:
    library.enable_padding(pad_to_multiple_of=64, direction="left")


def padded_beyond_memory(library: Any) -> None:
    library.enable_padding(length=10**9)


SETTINGS = [truncated, strided, padded, rounded, padded_beyond_memory]


@pytest.mark.parametrize("change", SETTINGS)
@pytest.mark.parametrize("described", [False, True])
def test_prompts_are_read_whole(tmp_path: Path, change: Callable[[Any], None], described: bool) -> None:
    library = byte_library()
    wanted = library.encode(PROMPT).ids
    change(library)
    assert Tokenizer(library.to_str(), 300).encode(PROMPT) == wanted  # in an artifact that is there already
    if described:
        PreTrainedTokenizerFast(tokenizer_object=library).save_pretrained(tmp_path)
    else:
        library.save(str(tmp_path / "tokenizer.json"))
    text = read_texts(tmp_path).tokenizer
    assert text is not None
    found: Any = Library.from_str(text)  # what hosts in other languages read
    assert found.truncation is None and found.padding is None
    assert found.encode(PROMPT).ids == wanted


def test_a_tokenizer_without_them_stays_as_it_is() -> None:
    text = byte_library().to_str()
    assert without_padding(text) == text
    assert without_padding("{") == "{" and without_padding("[" * 100_000) == "[" * 100_000


def as_pairs(folder: Path) -> None:
    byte_library().model.save(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))


def as_pairs_of_a_named_class(folder: Path) -> None:
    as_pairs(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", "unk_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def as_words(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "he", "##ll", "world", ","]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))


def with_added_tokens(folder: Path) -> None:
    """Tokens that only the settings name are tokens too."""
    byte_library().save(str(folder / "tokenizer.json"))
    added = {"content": "<|end|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {"300": added}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def of_a_class_that_is_unknown(folder: Path) -> None:
    byte_library().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    settings = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


FOLDERS = [as_pairs, as_pairs_of_a_named_class, as_words, with_added_tokens]


@pytest.mark.parametrize("make", FOLDERS)
def test_token_ids_are_those_of_transformers(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    found = read_texts(tmp_path)
    assert found.tokenizer is not None and found.special_tokens == loaded.special_tokens_map
    tokenizer = Tokenizer(found.tokenizer, 1000)
    assert tokenizer.encode(PROMPT) == loaded(PROMPT)["input_ids"]
    assert tokenizer.encode_parts(PROMPT) == loaded(PROMPT, add_special_tokens=False)["input_ids"]


def test_a_class_that_needs_code_of_strangers_leaves_the_whole_tokenizer(tmp_path: Path) -> None:
    of_a_class_that_is_unknown(tmp_path)
    found = read_texts(tmp_path)
    assert found.tokenizer is not None and found.special_tokens == {"bos_token": "<s>"}
    assert Tokenizer(found.tokenizer, 300).encode(PROMPT) == byte_library().encode(PROMPT).ids


def test_without_files_there_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert read_texts(tmp_path).tokenizer is None


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.model", b"no sentencepiece"),
        ("tokenizer.json", b"\xff\xfe"),
        ("vocab.json", b"{"),
        ("vocab.json", b'{"a": 1000000000}'),
        ("tokenizer_config.json tokenizer.json", b"{}"),
        ("special_tokens_map.json tokenizer.json", b"[]"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    if name == "vocab.json":
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    for file in name.split():
        (tmp_path / file).write_bytes(data)
    with pytest.raises(CaptureError, match=r"tokenizer"):
        read_texts(tmp_path)
    if "tokenizer.json" not in name:
        given = byte_library().to_str()
        assert read_texts(tmp_path, given).tokenizer == given


def test_a_tokenizer_that_makes_texts_longer_without_bound_is_refused() -> None:
    library: Any = byte_library()
    library.normalizer = normalizers.Sequence([normalizers.Replace("a", "aa")] * 40)
    with pytest.raises(ArtifactError, match=r"may make a text [0-9]+ times as long"):
        Tokenizer(library.to_str(), 300)
