"""Damaged tokenizers raised panics of Rust, hostile templates raised anything and took gigabytes.

The law: a tokenizer or a template of an artifact, whatever is in it, works or is refused with a typed error, and
neither takes more memory or time than a limit that grows with the conversation. The hashes of a manifest do not help,
since who damages a file can hash it again.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from tests.runtime.toys import save, toy, with_file
from tokopt.errors import ArtifactError, InputError, TokoptError
from tokopt.runtime import LanguageModel, load
from tokopt.runtime.chat import LONGEST, render_chat
from tokopt.runtime.text import TextStream, Tokenizer, is_library_fault

ROOT = Path(__file__).parents[2]
HOSTILE = (ROOT / "tests" / "data" / "chat" / "hostile.txt").read_text(encoding="utf-8").splitlines()

DEEP = {
    "parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "signs": "{{ " + "-" * 3000 + "1 }}",
    "attributes": "{{ x" + ".a" * 20000 + " }}",
    "sums": "{{ 1" + "+1" * 20000 + " }}",
    "filters": "{{ 'a' " + "| upper" * 9000 + " }}",
    "conditions": "{% if 1 %}" * 150 + "{% endif %}" * 150,
    "loops": "{% for i in [1] %}" * 25 + "{% endfor %}" * 25,
    "macros": "{% macro a() %}" * 900 + "{% endmacro %}" * 900,
    "concatenation": "{{ '' " + "~ 'a' * 1000000" * 40 + " }}",
    "list": "{{ [" + "'a' * 1000000," * 40 + "] | length }}",
    "digits": "{{ " + "1" * 60000 + " }}",
    "comment": "{#" + "-" * 60000,
    "length": "a" * (LONGEST + 1),
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process as Linux does")
def test_hostile_templates_are_refused_within_memory() -> None:
    command = [sys.executable, "-m", "tests.faults.hostile"]
    templates = [*HOSTILE, *DEEP.values()]
    asked = json.dumps(templates)
    done = subprocess.run(
        command, input=asked, capture_output=True, text=True, check=True, timeout=120, cwd=ROOT
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(templates)
    wrong = [line for line in found if not line[1].startswith("refused: the chat template")]
    assert not wrong
    assert not [line for line in found if "MemoryError" in line[1]]


def test_errors_are_one_short_line() -> None:
    with pytest.raises(InputError) as caught:
        render_chat("{{ raise_exception('line\n' * 100000) }}", [{"role": "user", "content": "Hi"}], {})
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


# --- tokenizers ---------------------------------------------------------------------------------------------


def byte_pairs() -> Library:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate([*letters, "he", "ll"])}
    library: Any = Library(models.BPE(vocabulary, [("h", "e"), ("l", "l")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<s>"])
    library.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 258)])
    return library


def word_pieces() -> Library:
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "he": 3, "##llo": 4, "h": 5, "##e": 6}
    library: Any = Library(models.WordPiece(vocabulary, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    library.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return library


def unigrams() -> Library:
    pieces = [("<unk>", 0.0), ("▁", -1.0), ("he", -2.0), ("l", -1.0), ("o", -1.5)]
    library: Any = Library(models.Unigram(pieces, 0, False))
    steps = [normalizers.Replace(Regex(" {2,}"), " "), normalizers.NFKC()]
    library.normalizer = normalizers.Sequence(steps)
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return library


def words() -> Library:
    library: Any = Library(models.WordLevel({"a": 0, "hello": 1, "?": 2}, "?"))
    library.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    library.decoder = decoders.Sequence([decoders.Replace("_", " "), decoders.Fuse()])
    library.enable_padding(length=8)
    library.enable_truncation(4)
    return library


GOOD = [json.loads(make().to_str()) for make in (byte_pairs, word_pieces, unigrams, words)]
VALUES = [
    None,
    True,
    0,
    -1,
    10**9,
    2**32 - 1,
    2**64,
    1e308,
    "",
    "a",
    "\0",
    [],
    {},
    [[]],
    "x" * 1000,
    "(a+)+$",
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything in a JSON value, but to three entries alone of a vocabulary."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(cast(Sequence[Any], value)))
    for key, item in items[:3] if path[-1:] == ("vocab",) else items:
        yield (*path, key)
        if isinstance(item, (dict, list)):
            yield from places(item, (*path, key))


def damaged(seed: int) -> str:
    """A good tokenizer in which one or two values are others or gone, or one letter is another."""
    choose = random.Random(seed)
    doc = json.loads(json.dumps(choose.choice(GOOD)))
    for _ in range(choose.choice([1, 1, 2])):
        *path, key = choose.choice(list(places(doc)))
        parent = doc
        for step in path:
            parent = parent[step]
        if choose.random() < 0.25:
            del parent[key]
        else:
            parent[key] = choose.choice(VALUES)
    text = json.dumps(doc)
    if choose.random() < 0.2:
        at = choose.randrange(len(text))
        text = text[:at] + chr(choose.randrange(32, 127)) + text[at + 1 :]
    return text


def outcome(text: str) -> str:
    """What a tokenizer does: "works", "refused", or "refused: a panic"."""
    try:
        tokenizer = Tokenizer(text, 100_000)
        ids = tokenizer.encode("<s>hello  hell world aab é🙂")
        tokenizer.encode_parts("hello</s>")
        tokenizer.decode([*ids, 0, 1, 257, 5000])
    except ArtifactError as error:
        return "refused" if isinstance(error.__cause__, (Exception, type(None))) else "refused: a panic"
    return "works"


def test_damaged_tokenizers_work_or_are_refused() -> None:
    found = {outcome(damaged(seed)) for seed in range(1500)}
    assert found == {"works", "refused", "refused: a panic"}


def test_a_special_token_that_is_missing_is_a_panic() -> None:
    """The reason that exceptions alone are not enough."""
    doc = json.loads(byte_pairs().to_str())
    doc["post_processor"]["special_tokens"] = {}
    library: Any = Library.from_str(json.dumps(doc))
    with pytest.raises(BaseException) as caught:
        library.encode("a")
    assert not isinstance(caught.value, Exception) and is_library_fault(caught.value)
    tokenizer = Tokenizer(json.dumps(doc), 300)
    with pytest.raises(ArtifactError, match=r"cannot encode this text \(no entry found for key"):
        tokenizer.encode("a")


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_no_fault_of_the_tokenizer(
    monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]
) -> None:
    class Interrupted:
        def decode(self, *args: Any, **kwargs: Any) -> str:
            raise interrupt

    tokenizer = Tokenizer(byte_pairs().to_str(), 300)
    monkeypatch.setattr(tokenizer, "tokenizer", Interrupted())
    with pytest.raises(interrupt):
        TextStream(tokenizer).add(1)


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(InputError, match="not valid Unicode"):
        Tokenizer(byte_pairs().to_str(), 300).encode("\ud800")


def artifact(folder: Path, tokenizer: bytes) -> LanguageModel:
    """A toy with a tokenizer, whose hash fits."""
    path = save(folder / "toy.tokopt", toy())
    with_file(path, "tokenizer", "tokenizer.json", tokenizer)
    return load(path, threads=1)


@pytest.mark.parametrize(
    "data", [b"\xff\xfe", b"", b"{", b"null", b"[" * 100_000, b'{"model": "\xed\xa0\x80"}']
)
def test_an_artifact_with_a_damaged_tokenizer_takes_token_ids(tmp_path: Path, data: bytes) -> None:
    model = artifact(tmp_path, data)
    for call in (lambda: model.generate("a"), lambda: model.chat_prompt([]), lambda: list(model.stream("a"))):
        with pytest.raises(TokoptError):
            call()
    with pytest.raises(ArtifactError):
        model.tokenizer  # noqa: B018
