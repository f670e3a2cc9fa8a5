"""Language models as they lie on a disk: the folder that transformers writes, or one GGUF file."""

# transformers leaves most of what it returns untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tokopt.errors import CaptureError
from tokopt.extras import missing
from tokopt.frontend.gguf import expanded_one_by_one
from tokopt.frontend.stored import mapped_one_by_one
from tokopt.frontend.texts import Texts, read_gguf_texts, read_texts
from tokopt.ir.memory import trim
from tokopt.progress import without_bars


def load_pretrained(path: Path, tokenizer: str | None = None) -> tuple[Any, Texts]:
    """The model in float32, and what its files say of text.

    Numbers of fewer bits (bfloat16, float16, the blocks of a GGUF file) are expanded exactly. ``tokenizer`` is one to
    take in place of theirs. Raises CaptureError when transformers cannot load it, MissingDependencyError when what
    loads it is not installed.
    """
    if is_gguf(path):
        _require("transformers", "gguf", "accelerate")
        with expanded_one_by_one():
            return _load(path.parent, gguf_file=path.name), read_gguf_texts(path, tokenizer)
    if not (path / "config.json").is_file():
        raise CaptureError(
            f"{path} has no config.json and is no .gguf file; give the folder of a Hugging Face model, or a GGUF file"
        )
    _require("transformers")
    return _load(path), read_texts(path, tokenizer)


def is_gguf(path: Path) -> bool:
    """Whether this is a file whose name says GGUF."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def _require(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise missing(package)


def _load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with without_bars(), mapped_one_by_one():
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, **options
            )
    except Exception as error:  # transformers raises several unrelated classes
        line = " ".join(str(error).split())
        what = folder / options.get("gguf_file", "")
        raise CaptureError(f"transformers cannot load {what}: {type(error).__name__}: {line}") from error
    finally:
        trim()
