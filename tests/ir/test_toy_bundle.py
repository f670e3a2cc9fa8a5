"""Passes on bundles of several programs: each changes what it can, and leaves links and other programs as they are."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import tokopt
from tests import node
from tests.ir.toys import HIDDEN, SIZE, TOYS
from tests.matrix.language import prompt
from tests.matrix.test_eviction import Driver
from tokopt.errors import PassError
from tokopt.ir.bundle import Bundle
from tokopt.ir.verifier import verify_bundle
from tokopt.passes import PASSES, load_pass
from tokopt.passes.kv.base import KVEviction
from tokopt.passes.quantize.base import Quantization, WeightQuantization
from tokopt.passes.reduce.base import TokenReduction
from tokopt.pipeline.base import Pass
from tokopt.runtime import LanguageModel, load

EVICTION = "budget=12 sinks=2 recent=4 every=4"
OPTIONS = {
    "snapkv": f"{EVICTION} window=3",
    "kivi": "group=4 residual=6 every=4",
    "evit": "r=2 prefix=1",
    "adakv": f"press=knorm{{{EVICTION}}}",
    "chunk": f"press=knorm{{{EVICTION}}} length=8",
}
"""Options of passes that differ from those of their family."""

TWO_PROGRAMS = "works where one program reads prompts and decodes; here they are two$"
LINKED = "tokens alone do not run a program that reads '(context|summary)' from another one"
NO_GRID = "its weights lie on no grid"
READ = "everything is read"


def options(cls: type[Pass]) -> str:
    if cls.name in OPTIONS:
        return OPTIONS[cls.name]
    families = {KVEviction: EVICTION, WeightQuantization: "group=16", TokenReduction: "r=2"}
    return next((text for family, text in families.items() if issubclass(cls, family)), "")


def spelled(name: str) -> str:
    given = options(load_pass(name))
    return f"{name}{{{given}}}" if given else name


def refusal(toy: str, name: str) -> str | None:
    """The sentence with which a pass refuses a toy."""
    cls = load_pass(name)
    if name == "drop_unread":
        return READ
    if (
        toy == "split"
        and not issubclass(cls, (Quantization, TokenReduction))
        and name not in ("cast", "smoothquant")
    ):
        return TWO_PROGRAMS
    if name in ("awq", "gptq", "nupes", "smoothquant", "int8_kv"):
        return LINKED
    return NO_GRID if name == "keep_grid" else None


def touched(toy: str, name: str) -> set[str]:
    """The programs that a pass changes."""
    cls = load_pass(name)
    if issubclass(cls, TokenReduction):
        return {"see", "hear"} & set(TOYS[toy]().programs)
    if issubclass(cls, Quantization) or name == "cast":
        return set(TOYS[toy]().programs)
    return {"step"}


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("name", PASSES)
def test_every_pass_changes_what_it_can_and_nothing_else(toy: str, name: str) -> None:
    bundle = TOYS[toy]()
    if (reason := refusal(toy, name)) is not None:
        with pytest.raises(PassError, match=reason) as caught:
            tokopt.optimize(bundle, spelled(name), calibration=[prompt(12)], strict=True)
        assert "\n" not in str(caught.value)
        return
    made = tokopt.optimize(bundle, spelled(name))
    verify_bundle(made)
    assert made.history[-1].matches
    kept = [n for n in bundle.programs if made.programs[n] is bundle.programs[n]]
    assert set(kept) == set(bundle.programs) - touched(toy, name)
    assert made.links == bundle.links and made.schedule.entries == bundle.schedule.entries
    for program in made.programs.values():
        for spec, value in zip(program.outputs, program(*program.example), strict=True):
            assert len(value.shape) == len(spec.axes)
            assert not value.is_floating_point() or value.isfinite().all()


# --- hosts ------------------------------------------------------------------------------------------------


class Talk(Driver):
    """One text of a toy, greedily."""

    def next(self, program: str, tokens: list[int], start: int, **links: Tensor) -> int:
        count = len(tokens)
        got = self.run(
            program,
            tokens=torch.tensor([tokens]),
            positions=start + torch.arange(count)[None],
            mask=torch.ones(1, count, count, dtype=torch.bool).tril(),
            rows=torch.tensor([-1]),
            **links,
        )
        return int(got["logits"].argmax())


def inputs() -> dict[str, Tensor]:
    """What the toys take beside a prompt."""
    generator = torch.Generator().manual_seed(11)
    return {
        "images": torch.randn(1, 3, SIZE, SIZE, generator=generator),
        "sounds": torch.randn(1, HIDDEN, generator=generator),
    }


def said(bundle: Bundle, ids: list[int], count: int) -> list[int]:
    """The tokens that follow a prompt, link by link, as the schedule of the toys says."""
    given, programs = inputs(), bundle.programs
    features, summary = programs["see"](given["images"])
    if "hear" in programs:
        (context,) = programs["hear"](features, given["sounds"])
        (read, first), (go, later) = [("step", {"context": context})] * 2
    else:
        (read, first), (go, later) = ("read", {"features": features}), ("go", {"summary": summary})
    every = max((trigger.every for trigger in bundle.schedule.triggers), default=0)
    talk = Talk(bundle, 1)
    made = [talk.next(read, ids, 0, **first)]
    if every:
        talk.run("compact")
    while len(made) < count:
        made.append(talk.next(go, made[-1:], len(ids) + len(made) - 1, **later))
        if every and (len(made) - 1) % every == 0:
            talk.run("compact")
    return made


PIPELINES = {"chained": f"tome{{r=2}},h2o{{{EVICTION}}}", "split": "divprune{r=2}"}


@cache
def optimized(toy: str) -> Bundle:
    return tokopt.optimize(TOYS[toy](), PIPELINES[toy])


@pytest.mark.parametrize("toy", TOYS)
def test_both_hosts_say_what_the_programs_say(toy: str, tmp_path: Path) -> None:
    """Reduced images, evicted tokens: the artifact says what the bundle's programs say one by one."""
    made, ids = optimized(toy), prompt(20)
    path = tokopt.export(made, tmp_path / "toy")
    assert tokopt.verify(path).ok
    model = load(path, threads=1)
    assert isinstance(model, LanguageModel)
    given = {tensor.name: inputs()[tensor.name].numpy() for tensor in model.interface.inputs}
    wanted = said(made, ids, 16)
    assert list(model.generate(ids, max_tokens=16, inputs=given).tokens) == wanted
    other = {name: np.flip(array).copy() for name, array in given.items()}
    assert list(model.generate(ids, max_tokens=16, inputs=other).tokens) != wanted  # so that the links matter
    if shutil.which("npm"):
        assert node.generate(path, ids, 16, given) == wanted


def test_a_saved_bundle_is_the_same(tmp_path: Path) -> None:
    made = optimized("chained")
    opened = tokopt.open_bundle(tokopt.export(made, tmp_path / "toy", target="torch"))
    assert (opened.links, opened.schedule, opened.states) == (made.links, made.schedule, made.states)
    for name, program in made.programs.items():
        assert opened.programs[name].aliases == program.aliases
        for got, wanted in zip(
            opened.programs[name](*program.example), program(*program.example), strict=True
        ):
            torch.testing.assert_close(got, wanted)
