"""Artifacts that older versions of tokopt wrote are read as before: self-test and greedy tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tokopt.runtime import LanguageModel, Model, load
from tokopt.runtime.format.manifest import FORMAT_VERSION, parse_manifest, read_manifest

DATA = Path(__file__).parent.parent / "data" / "artifacts"
FOLDERS = sorted(path.parent for path in DATA.glob("*/*/manifest.json"))
LANGUAGE = [folder for folder in FOLDERS if folder.name != "encoder"]


def spell(folder: Path) -> str:
    return f"{folder.parent.name}-{folder.name}"


def prompts() -> list[list[int]]:
    """A text of 40 tokens, and one of 25."""
    generator = np.random.default_rng(0)
    texts = [generator.integers(2, 97, 64).tolist() for _ in range(4)]
    return [texts[0][:40], texts[1][:25]]


def test_there_are_artifacts_of_both_formats() -> None:
    versions = {json.loads((folder / "manifest.json").read_text())["format_version"] for folder in FOLDERS}
    assert versions == {1, 2} and len(FOLDERS) == 8


@pytest.mark.parametrize("folder", FOLDERS, ids=spell)
def test_the_manifest_becomes_one_of_this_format(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.format_version == FORMAT_VERSION
    assert parse_manifest(manifest.to_json().encode()) == manifest
    for state in manifest.states:
        assert (state.layer is not None) == any(letter.isdigit() for letter in state.name)
        assert state.kind != "memory"


@pytest.mark.parametrize("folder", FOLDERS, ids=spell)
def test_the_selftest_passes(folder: Path) -> None:
    model = load(folder, threads=1)
    found = model.selftest()
    checks = [check for part in found.values() for check in part] if isinstance(found, dict) else found
    assert checks and all(check.ok for check in checks)
    assert isinstance(model, Model if folder.name == "encoder" else LanguageModel)


@pytest.mark.parametrize("folder", LANGUAGE, ids=spell)
def test_greedy_tokens_are_those_of_the_version_that_wrote_it(folder: Path) -> None:
    expected = json.loads((folder.parent / "expected.json").read_text())[folder.name]
    model, texts = load(folder, threads=1), prompts()
    assert list(model.generate(texts[0], max_tokens=30).tokens) == expected["one"]
    together = model.generate(texts, max_tokens=30)
    assert [list(row.tokens) for row in together] == expected["two"]
