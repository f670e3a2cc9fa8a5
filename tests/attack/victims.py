"""The artifacts that are attacked, and what they give when nothing is wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.runtime import toys
from tests.runtime.artifacts import rehash
from tokopt.runtime import LanguageModel, load
from tokopt.runtime.format.manifest import MANIFEST, describe_file, read_manifest

DATA = Path(__file__).parent.parent / "data" / "artifacts" / "format2"
TEXT = "the cat sat on the mat"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}cat"
MESSAGES = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]


def victims(folder: Path) -> list[Path]:
    """An encoder, language models with and without text, and several programs with links, in the newest format."""
    made = [_newest(DATA / name, folder / name) for name in ("encoder", "h2o-int8", "llama")]
    _give_text(made[-1])
    made.append(toys.save(folder / "toy", toys.toy()))
    return made


def _newest(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    (target / MANIFEST).write_text(read_manifest(source).to_json())
    return target


def _give_text(path: Path) -> None:
    """A tokenizer of words, and a chat template."""
    manifest = read_manifest(path)
    assert manifest.generation is not None
    words = dict.fromkeys(["<unk>", "<s>", "</s>", "user", "assistant", ":", *TEXT.split()])
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(words)},
            "unk_token": "<unk>",
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    files = {**manifest.files, "tokenizer.json": describe_file(path / "tokenizer.json")}
    generation = replace(manifest.generation, chat_template=TEMPLATE, bos=1, eos=(2,))
    changed = replace(manifest, files=files, tokenizer="tokenizer.json", generation=generation)
    (path / MANIFEST).write_text(changed.to_json())


def behaviour(path: Path) -> str:
    """A digest of what an artifact computes and says."""
    model, digest = load(path, threads=1), hashlib.sha256()
    feed = _feed(model.signature if not isinstance(model, LanguageModel) else model.interface)
    if not isinstance(model, LanguageModel):
        for name, array in model.run(**feed).items():
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
        return digest.hexdigest()
    prompts = [[3, 4, 5, 6, 7, 3], [4, 5, 3]]
    rows = model.generate(prompts, max_tokens=6, inputs={k: v[:2] for k, v in feed.items()})
    one = model.generate(prompts[0], max_tokens=24, inputs={k: v[:1] for k, v in feed.items()})
    digest.update(repr([(row.tokens, row.text, row.finish) for row in [*rows, one]]).encode())
    if model.manifest.tokenizer is not None:
        digest.update(repr((model.chat_prompt(MESSAGES), model.generate(TEXT, max_tokens=4))).encode())
    return digest.hexdigest()


def _feed(interface) -> dict[str, np.ndarray]:
    """Fixed inputs for two rows."""
    made = {}
    for tensor in interface.inputs:
        shape = [axis if isinstance(axis, int) else 2 for axis in tensor.axes]
        if np.prod([float(size) for size in shape]) > 1e6:
            shape = [min(size, 2) for size in shape]
        made[tensor.name] = (np.arange(np.prod(shape, dtype=int)) % 5 / 4).reshape(shape).astype(tensor.dtype)
    return made


def attacked(victim: Path, folder: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(victim, folder / victim.name))


__all__ = ["attacked", "behaviour", "rehash", "victims"]
