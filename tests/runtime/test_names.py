"""Names carry no meaning: with others of everything, both hosts say the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import tokopt
from tests import node
from tests.matrix.test_exit import split_rows
from tests.runtime.renaming import Choose, random_words, renamed, shuffled
from tests.runtime.test_old_formats import DATA, prompts
from tests.runtime.toys import save, taken_over, taking_over, text, toy
from tokopt.runtime import load

OLD = DATA / "format2"
MODELS = sorted(path.parent.name for path in OLD.glob("*/step.onnx"))
CHOICES = {"words": random_words(0), "shuffled": shuffled(1)}

models = pytest.mark.parametrize("name", MODELS)
choices = pytest.mark.parametrize("choose", CHOICES.values(), ids=list(CHOICES))
with_node = pytest.mark.skipif(not shutil.which("npm"), reason="examples/node needs Node.js and npm")


def expected(name: str) -> dict[str, list]:
    return json.loads((OLD / "expected.json").read_text())[name]


@choices
@models
def test_a_language_model_says_the_same(name: str, choose: Choose, tmp_path: Path) -> None:
    model = load(renamed(OLD / name, tmp_path / "renamed", choose), threads=1)
    assert list(model.generate(prompts()[0], max_tokens=30).tokens) == expected(name)["one"]
    together = model.generate(prompts(), max_tokens=30)
    assert [list(row.tokens) for row in together] == expected(name)["two"]
    assert all(check.ok for found in model.selftest().values() for check in found)


@choices
def test_an_encoder_gives_the_same(choose: Choose, tmp_path: Path) -> None:
    model = load(renamed(OLD / "encoder", tmp_path / "renamed", choose), threads=1)
    assert all(check.ok for check in model.selftest())
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
    np.testing.assert_array_equal(model(images), load(OLD / "encoder", threads=1)(images))


@choices
def test_a_toy_of_several_programs_says_the_same(choose: Choose, tmp_path: Path) -> None:
    path = renamed(save(tmp_path / "toy", toy()), tmp_path / "renamed", choose)
    model = load(path, threads=1)
    (images,) = model.interface.inputs
    got = model.generate([1, 2, 3], max_tokens=20, inputs={images.name: np.array([[1, 2]], np.float32)})
    assert list(got.tokens) == text([3], 3, 20)


@choices
def test_programs_of_one_call_and_those_that_take_over_say_the_same(choose: Choose, tmp_path: Path) -> None:
    path = renamed(save(tmp_path / "toy", taking_over()), tmp_path / "renamed", choose)
    assert list(load(path, threads=1).generate([1, 2, 3], max_tokens=20).tokens) == taken_over([1, 2, 3], 20)


@choices
def test_stages_leave_where_they_did(choose: Choose, tmp_path: Path) -> None:
    """Exits, links, and the program of all stages, which the manifest names."""
    staged, inputs = split_rows("vit", "convergence")
    path = tokopt.export(staged, tmp_path / "staged.tokopt")
    first, second = load(path, threads=1), load(renamed(path, tmp_path / "renamed", choose), threads=1)
    (images,) = (value.numpy() for value in inputs.values())
    want, got = first.run(images), second.run(images)
    np.testing.assert_array_equal(got.depths, want.depths)
    for a, b in zip(first.signature.outputs, second.signature.outputs, strict=True):
        np.testing.assert_array_equal(want[a.name], got[b.name])
    assert second.manifest.schedule.whole in second.manifest.programs
    assert tokopt.verify(second.path).ok


@with_node
@models
def test_node_says_the_same_of_a_language_model(name: str, tmp_path: Path) -> None:
    path = renamed(OLD / name, tmp_path / "renamed", random_words(2))
    assert node.generate(path, prompts()[0], 30) == expected(name)["one"]


@with_node
def test_node_says_the_same_of_a_toy_of_several_programs(tmp_path: Path) -> None:
    """Links, tokens that the model draws, and a trigger for the rows that are due."""
    path = renamed(save(tmp_path / "toy", toy()), tmp_path / "renamed", random_words(3))
    (images,) = load(path).interface.inputs
    inputs = {images.name: np.array([[1, 2]], np.float32)}
    assert node.generate(path, [1, 2, 3], 20, inputs) == text([3], 3, 20)


@with_node
def test_node_says_the_same_of_programs_that_take_over(tmp_path: Path) -> None:
    path = renamed(save(tmp_path / "toy", taking_over()), tmp_path / "renamed", random_words(4))
    assert node.generate(path, [1, 2, 3], 20) == taken_over([1, 2, 3], 20)
