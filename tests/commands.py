"""The commands of a page, executed as its reader would: one after another, in a folder with what they name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

import tokopt
from examples.data import dinov2_small, photograph, smollm2
from examples.tune import library_text
from tests.shared import once
from tokopt.cli import main

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")

VOCABULARY = 8192
"""Tokens of the language model: all 49,152 take three times the memory and twice the time of its two layers."""

FACTORY = """
from transformers import ViTConfig, ViTModel
import torch

def small_vit():
    config = ViTConfig(image_size=32, patch_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    return ViTModel(config).eval(), (torch.randn(2, 3, 32, 32),)
"""

FEWER = {"bench": ("--rounds", "1"), "generate": ("--max-tokens", "8"), "tune": ("--minutes", "0")}
"""The number with which a verb is executed here, in place of the one that the page or the verb says."""

FINDINGS = ("bisect", "tune")
"""Verbs whose exit code 1 says what was found, no failure: the one a culprit, the other no gain."""


# --- what the pages take for granted ------------------------------------------------------------------------


def furnish(folder: Path) -> None:
    """Put links to :func:`inputs` into a folder."""
    for item in inputs().iterdir():
        (folder / item.name).symlink_to(item)


def inputs() -> Path:
    """The models, photographs and texts that the pages name."""
    return once("inputs", _write_inputs)


def _write_inputs(folder: Path) -> None:
    (folder / "photos").mkdir(parents=True)
    for letter, name in zip("abcd", PHOTOGRAPHS, strict=True):
        picture = Image.fromarray(photograph(name))
        picture.save(folder / f"{letter}.jpg")
        picture.save(folder / "photos" / f"{name}.jpg")
    picture.save(folder / "photo.jpg")
    text = library_text()
    (folder / "text.txt").write_text(text[:3000], encoding="utf-8")
    (folder / "other.txt").write_text(text[3000:5000], encoding="utf-8")
    _write_models(folder)
    sides = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip: Any = CLIPModel(CLIPConfig(text_config=sides, vision_config=sides | {"patch_size": 32}))
    clip.save_pretrained(folder / "clip-vit-base")
    (folder / "my_package").mkdir()
    (folder / "my_package" / "models.py").write_text(FACTORY)


def _write_models(folder: Path) -> None:
    """The real weights of the first layers and tokens: the others are like them, and take minutes more."""
    short_dinov2(224).save_pretrained(folder / "dinov2-small")
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.resize_token_embeddings(VOCABULARY)
    model.save_pretrained(folder / "smollm2")
    AutoTokenizer.from_pretrained(smollm2()).save_pretrained(folder / "smollm2")
    _keep_first_tokens(folder / "smollm2" / "tokenizer.json")


def _keep_first_tokens(file: Path) -> None:
    """Of a byte-level tokenizer leave the special tokens, the bytes, and the merges into tokens that are left."""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < VOCABULARY}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")


def short_dinov2(image_size: int) -> Any:
    """``dinov2_small`` of four layers."""
    sizes: Any = {"hidden_size": 384, "num_attention_heads": 6, "image_size": image_size, "patch_size": 14}
    model: Any = Dinov2Model(Dinov2Config(num_hidden_layers=4, **sizes)).eval().requires_grad_(False)
    assert not model.load_state_dict(dinov2_small(image_size).state_dict(), strict=False).missing_keys
    return model


# --- their execution ----------------------------------------------------------------------------------------


def execute(command: str) -> None:
    """Execute a command in the current folder; what it writes is verified where it is an artifact.

    A command that another page has executed already, on the same files, is not executed again: the current folder gets
    a link to what it wrote.
    """
    if not command.startswith("tokopt "):
        _shell(command)
        return
    words = _words(command)
    named = [Path(word) for word in words if os.path.lexists(word)]
    if all(path.is_symlink() or path.parent.is_symlink() for path in named):
        _execute_once(words)
    else:  # it works on what this page alone has
        _run(words)


def _execute_once(words: list[str]) -> None:
    output = words.index("-o") + 1 if "-o" in words else None
    place = Path(words[output]) if output else None
    what = [str(Path(word).resolve()) if os.path.lexists(word) else word for word in words]

    def make(folder: Path) -> None:
        folder.mkdir()
        _run(
            [str(folder / Path(word).name) if number == output else word for number, word in enumerate(words)]
        )

    made = once(_key(what), make)
    if place and words[0] == "tune":
        shutil.copytree(made / place.name, place)  # the same command goes on there
    elif place:
        place.symlink_to(made / place.name)  # no second time, and only into a folder that is there


def verify_all(folder: Path) -> None:
    """Check the artifacts in ``folder`` and in its folders."""
    for manifest in [*folder.glob("*.tokopt/manifest.json"), *folder.glob("*/*.tokopt/manifest.json")]:
        if not manifest.parent.is_symlink():  # of those, which commands have written, it is known
            assert tokopt.verify(manifest.parent).ok, manifest.parent


def _words(command: str) -> list[str]:
    """What the shell makes of a command of tokopt: quotes, patterns of files, redirections."""
    return _shell(f"tokopt() {{ printf '%s\\0' \"$@\"; }}\n{command}").split("\0")[:-1]


def _shell(script: str) -> str:
    done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _key(words: list[str]) -> str:
    return f"{words[0]}-{hashlib.sha256(chr(0).join(words).encode()).hexdigest()[:12]}"


def _run(words: list[str]) -> None:
    verb = words[0]
    code = main([*words, *FEWER.get(verb, ())])
    assert code == 0 or (code == 1 and verb in FINDINGS), f"exit code {code}: tokopt {' '.join(words)}"
    if verb == "tune":
        tuned = Path(words[words.index("-o") + 1])
        if not (tuned / "best.tokopt").exists():  # whether anything gains is the machine's affair
            shutil.copytree(tuned / "original.tokopt", tuned / "best.tokopt")
    elif "-o" in words and (artifact := Path(words[words.index("-o") + 1]) / "manifest.json").exists():
        assert tokopt.verify(artifact.parent).ok, artifact.parent
