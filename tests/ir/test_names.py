"""Names carry no meaning: passes do to a captured model whose names are others what they do to it as it is."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import tokopt
from tests import node
from tests.lower.encoders import text, vision
from tests.matrix import language
from tests.runtime.renaming import random_words, renamed_bundle, shuffled
from tokopt.errors import TokoptError
from tokopt.ir.bundle import Bundle
from tokopt.runtime import load

OPTIONS = "sinks=2 recent=4 every=4"
KIVI = "kivi{group=4 residual=6 every=4}"

CASES = (
    ("hand_rotary", f"h2o{{budget=12 {OPTIONS}}},rtn{{group=16}},int8_kv"),
    ("hand_rotary", f"knorm{{budget=12 {OPTIONS} heads=false}},{KIVI}"),
    ("hand_rotary", "smoothquant,int8{activations=static},expected_attention{budget=0.5 recent=4}"),
    ("hand_rotary", f"streaming{{budget=12 {OPTIONS} rerotate=true}}"),
    ("hand_rotary", f"tova{{budget=12 {OPTIONS} schedule=pyramid}}"),
    ("hand_rotary", f"keyformer{{budget=12 {OPTIONS}}}"),
    ("gemma3", f"snapkv{{budget=[20,13] window=3 {OPTIONS}}},int8_kv"),
    ("vision", "tome{r=4},rtn{group=16},tome{r=2}"),
    ("vision", "divprune{r=3},int8"),
    ("text", "pitome{keep=0.7},cast"),
)
"""One model with global attention, one with a sliding window too, one on images and one on padded texts."""

STATES = (CASES[0], CASES[6])
"""The cases that give a program most states."""

ENCODERS = {"vision": vision, "text": text}


def captured_bundle(name: str) -> Bundle:
    return ENCODERS[name]() if name in ENCODERS else language.bundle(name)


def samples(name: str) -> list[Any]:
    """Calibration inputs."""
    return [ENCODERS[name]().main.example] if name in ENCODERS else [language.prompt(24, seed=3)]


@cache
def optimized(name: str, passes: str) -> Bundle:
    return tokopt.optimize(captured_bundle(name), passes, calibration=samples(name))


@cache
def under_other_names(name: str) -> Bundle:
    return renamed_bundle(captured_bundle(name), random_words(4))


def assert_same(got: Bundle, wanted: Bundle) -> None:
    """Every program computes the same from the same example, and the same passes did as much."""
    assert [step.matches for step in got.history] == [step.matches for step in wanted.history]
    assert all(step.matches for step in got.history)
    for one, other in zip(got.programs.values(), wanted.programs.values(), strict=True):
        for ours, theirs in zip(one.example, other.example, strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(one(*one.example), other(*other.example), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    drives = [[(e.role, e.slots == 0) for e in bundle.schedule.entries] for bundle in (got, wanted)]
    assert drives[0] == drives[1]
    triggers = [[(t.after, t.every, t.prompt) for t in bundle.schedule.triggers] for bundle in (got, wanted)]
    assert triggers[0] == triggers[1] and got.schedule.endless == wanted.schedule.endless
    kinds = [[(s.kind, s.layer, s.dtype, s.initial) for s in bundle.states] for bundle in (got, wanted)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize(("name", "passes"), CASES)
def test_passes_do_the_same(name: str, passes: str) -> None:
    got = tokopt.optimize(under_other_names(name), passes, calibration=samples(name))
    assert_same(got, optimized(name, passes))


@pytest.mark.parametrize(("name", "passes"), STATES)
def test_names_of_other_things_mislead_no_pass(name: str, passes: str) -> None:
    """Everything is called what something else was called."""
    bundle = renamed_bundle(captured_bundle(name), shuffled(5))
    assert_same(tokopt.optimize(bundle, passes, calibration=samples(name)), optimized(name, passes))


@pytest.mark.parametrize(
    "passes", ["tome{r=1}", "int8_kv,h2o{budget=50}", "knorm{budget=[9,9,9] recent=1 sinks=1}"]
)
def test_refusals_are_the_same(passes: str) -> None:
    """An error names what the user wrote and the place in the model, which other names do not change."""
    errors = []
    given = captured_bundle("hand_rotary")
    for bundle in (given, renamed_bundle(given, random_words(6))):
        with pytest.raises(TokoptError) as caught:
            tokopt.optimize(bundle, passes, calibration=samples("hand_rotary"), strict=True)
        errors.append(str(caught.value))
    assert len({_without_programs(error) for error in errors}) == 1, errors


def _without_programs(error: str) -> str:
    """A refusal begins with the place, which is a program's name where a whole program is refused."""
    head, _, reason = error.partition("refused in strict mode: ")
    return head + (reason.partition(": ")[2] or reason)


def test_hosts_say_the_same(tmp_path: Path) -> None:
    """Tokens of the artifact, from Python and from Node.js, through several evictions of two kinds of layers."""
    name, passes = STATES[1]
    bundle = renamed_bundle(captured_bundle(name), random_words(7))
    path = tokopt.export(tokopt.optimize(bundle, passes, calibration=samples(name)), tmp_path / "renamed")
    assert tokopt.verify(path).ok
    plain = tokopt.export(optimized(name, passes), tmp_path / "plain")
    ids = language.prompt(20)
    wanted = list(load(plain, threads=1).generate(ids, max_tokens=16).tokens)
    assert list(load(path, threads=1).generate(ids, max_tokens=16).tokens) == wanted
    if shutil.which("npm"):
        assert node.generate(path, ids, 16) == wanted


def test_an_encoder_runs_under_other_names(tmp_path: Path) -> None:
    made = tokopt.optimize(renamed_bundle(vision(), random_words(8)), "tome{r=4}")
    path = tokopt.export(made, tmp_path / "vision")
    assert tokopt.verify(path).ok
    patches = vision().main.example[0][:2].flip(0)
    got = load(path, threads=1)(patches.numpy())
    for one, other in zip(got.values(), optimized("vision", "tome{r=4}")(patches), strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other, atol=1e-4, rtol=1e-4)
