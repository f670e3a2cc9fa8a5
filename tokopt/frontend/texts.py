"""What a Hugging Face folder or a GGUF file says of text: tokenizer, chat templates, the spelling of special tokens."""

# transformers and tokenizers leave most of what they return untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from tokopt.errors import CaptureError
from tokopt.extras import missing
from tokopt.runtime.text import is_library_fault

_TOKENIZER, _SETTINGS = "tokenizer.json", "tokenizer_config.json"

_OTHER_TOKENIZERS = ("vocab.json", "vocab.txt", "merges.txt", "*.model", "tekken.json", "*.tiktoken")
"""Files of which transformers makes a tokenizer."""

_LARGEST_ID = 2**24
"""Tokenizers are serialized with a place for every id up to the largest, which a damaged file may set to billions."""


_EXTRA_SETTINGS = ("special_tokens_map.json", "added_tokens.json")
"""What older versions of transformers wrote beside a tokenizer.json."""


@dataclass(frozen=True)
class Texts:
    """The text of a ``tokenizer.json``, templates by name (``default`` is the usual one), special tokens by name.

    ``special_tokens`` is None when nothing in the folder names them.
    """

    tokenizer: str | None = None
    chat_templates: Mapping[str, str] = field(default_factory=dict[str, str])
    special_tokens: Mapping[str, str] | None = None


def read_texts(folder: Path, tokenizer: str | None = None) -> Texts:
    """Read everything about text as transformers does; nothing of it need be there.

    A ``tokenizer.json`` that stands alone is taken as it is: nothing says that it is of the class that models of this
    kind usually have. ``tokenizer`` is one to take in place of the folder's. Raises CaptureError for a damaged file,
    and when there are files of a tokenizer and none can be made of them.
    """
    templates, file = _chat_templates(folder), folder / _TOKENIZER
    described = any((folder / name).is_file() for name in (_SETTINGS, *_EXTRA_SETTINGS))
    if file.is_file() and not described:
        return Texts(tokenizer or without_padding(_read(file)), templates)
    if not file.is_file() and not any(any(folder.glob(name)) for name in _OTHER_TOKENIZERS):
        return Texts(tokenizer, templates)
    try:
        loaded = _load(folder)
    except CaptureError:
        if tokenizer is None:
            raise
        return Texts(tokenizer, templates)
    special = {str(name): str(token) for name, token in loaded.special_tokens_map.items()}
    return Texts(tokenizer or without_padding(_serialized(folder, loaded)), templates, special)


def read_gguf_texts(file: Path, tokenizer: str | None = None) -> Texts:
    """Tokenizer, chat templates and special tokens that a GGUF file holds beside its weights.

    ``tokenizer`` is one to take in place of the file's. Raises CaptureError when transformers can make none of it.
    """
    load = _transformers().AutoTokenizer.from_pretrained
    loaded = _first_loaded(file, [partial(load, file.parent, gguf_file=file.name)])
    special = {str(name): str(token) for name, token in loaded.special_tokens_map.items()}
    return Texts(
        tokenizer or without_padding(_serialized(file, loaded)), _named(loaded.chat_template), special
    )


def without_padding(tokenizer: str) -> str:
    """A ``tokenizer.json`` without the truncation and padding that it was saved with: prompts are read whole."""
    try:
        parts: Any = json.loads(tokenizer)
    except (ValueError, RecursionError):
        return tokenizer  # what reads it next says what is wrong
    if not isinstance(parts, dict) or not (parts.get("truncation") or parts.get("padding")):
        return tokenizer
    return json.dumps(
        {**cast(dict[str, Any], parts), "truncation": None, "padding": None}, ensure_ascii=False
    )


def _load(folder: Path) -> Any:
    """The tokenizer that transformers makes of a folder."""
    tokenizers = _transformers()
    whole = (folder / _TOKENIZER).is_file()
    kinds: list[Any] = [tokenizers.AutoTokenizer] if (folder / _SETTINGS).is_file() or not whole else []
    if whole:  # its class may need code of strangers, or a package that is not installed
        kinds.append(tokenizers.PreTrainedTokenizerFast)
    return _first_loaded(folder, [partial(kind.from_pretrained, folder) for kind in kinds])


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise missing("transformers") from error


def _first_loaded(path: Path, attempts: Sequence[Callable[..., Any]]) -> Any:
    """The first tokenizer of the package tokenizers that an attempt gives."""
    fault: BaseException | None = None
    for load in attempts:
        try:
            loaded = load(local_files_only=True)
            if getattr(loaded, "backend_tokenizer", None) is not None:
                return loaded
        except BaseException as error:
            if not is_library_fault(error):
                raise
            fault = error
    line = " ".join(str(fault or "it is no tokenizer of the package tokenizers").split())[:300]
    raise CaptureError(
        f"transformers cannot load the tokenizer in {path} ({line}); save it as {_TOKENIZER}, or capture the loaded "
        "model in its place, without a tokenizer"
    ) from fault


def _serialized(path: Path, loaded: Any) -> str:
    backend = loaded.backend_tokenizer
    if max(backend.get_vocab().values(), default=0) > _LARGEST_ID:
        raise CaptureError(f"the tokenizer in {path} has token ids above {_LARGEST_ID}; replace its files")
    return backend.to_str()


def _chat_templates(folder: Path) -> Mapping[str, str]:
    """Chat templates by name: those in files of their own, or else those in the settings of the tokenizer."""
    usual, others = folder / "chat_template.jinja", (folder / "additional_chat_templates").glob("*.jinja")
    files = {file.stem: _read(file) for file in sorted(others)}
    if usual.is_file():
        files["default"] = _read(usual)
    if files:
        return files
    for name in (_SETTINGS, "chat_template.json"):  # the second is that of processors
        if (folder / name).is_file() and (found := _named(_read_object(folder / name).get("chat_template"))):
            return found
    return {}


def _named(found: Any) -> Mapping[str, str]:
    """One template, a list of ``{"name": ..., "template": ...}`` or an object, by name."""
    match found:
        case str(template):
            return {"default": template}
        case [{"name": str(), "template": str()}, *_]:
            items = cast(list[dict[str, str]], found)
            return {item["name"]: item["template"] for item in items}
        case dict():
            return cast(dict[str, str], found)
        case _:
            return {}


def _read_object(file: Path) -> Mapping[str, Any]:
    try:
        found: Any = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise CaptureError(f"{file} is no JSON ({error}); replace it") from error
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CaptureError(f"{file} is no readable text ({error}); replace it") from error
