"""Passes on bundles of several programs: each changes what it can, and leaves links and other programs as they are."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tokopt
from tests import node
from tests.ir.toys import HIDDEN, SIZE, TOYS, chained
from tests.matrix.language import prompt
from tests.matrix.test_eviction import Driver
from tests.zoo.decoders import VOCABULARY
from tokopt.analysis.calibration import Site, collect
from tokopt.analysis.linears import find_linears
from tokopt.errors import InputError, PassError
from tokopt.ir.bundle import Bundle
from tokopt.ir.format import Link, Port
from tokopt.ir.verifier import verify_bundle
from tokopt.measure.fidelity import NextTokens, fidelity
from tokopt.measure.judge import judge
from tokopt.passes import PASSES, load_pass
from tokopt.passes.kv.base import KVEviction
from tokopt.passes.quantize.base import Quantization, WeightQuantization
from tokopt.passes.reduce.base import TokenReduction
from tokopt.pipeline.base import Pass
from tokopt.pipeline.bisect import bisect
from tokopt.rewrite.edit import open_graph
from tokopt.runtime import LanguageModel, load

EVICTION = "budget=12 sinks=2 recent=4 every=4"
OPTIONS = {
    "snapkv": f"{EVICTION} window=3",
    "kivi": "group=4 residual=6 every=4",
    "evit": "r=2 prefix=1",
    "adakv": f"press=knorm{{{EVICTION}}}",
    "chunk": f"press=knorm{{{EVICTION}}} length=8",
    "drop_blocks": "count=1",
    "exit": "after=[1] threshold=0.5",
    "skipdecode": "min=1",
    "split": "at=1",
}
"""Options of passes that differ from those of their family."""

RESCHEDULED = ("split", "skipdecode")
"""Passes that let other programs run, with links of their own."""

TWO_PROGRAMS = "works where one program reads prompts and decodes; here they are two: put it before speculate"
NO_GRID = "its weights lie on no grid"
READ = "everything is read"
ENCODERS = "exit is for encoders"
NO_FACTOR = "no linear has a factor per channel"


@cache
def adapter_file() -> Path:
    """An adapter of rank 2 for the toys."""
    path = Path(mkdtemp()) / "adapter.safetensors"
    save_file({"down.weight": torch.ones(2, HIDDEN), "up.weight": torch.ones(HIDDEN, 2)}, path)
    return path


def options(cls: type[Pass]) -> str:
    if cls.name == "adapter":
        return f'at=1 file="{adapter_file()}"'
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
    if name == "fold_scales":
        return NO_FACTOR
    if name == "exit":
        return ENCODERS
    if toy == "chained" and name in ("speculate", "verify"):
        return "it takes from other programs"
    if (
        toy == "split"
        and not issubclass(cls, (Quantization, TokenReduction))
        and name not in ("cast", "smoothquant", "split")
    ):
        return TWO_PROGRAMS
    return NO_GRID if name == "keep_grid" else None


def touched(toy: str, name: str) -> set[str]:
    """The programs that a pass changes."""
    cls = load_pass(name)
    if issubclass(cls, TokenReduction):
        return {"see", "hear"} & set(TOYS[toy]().programs)
    if issubclass(cls, Quantization) or name in ("cast", "smoothquant"):
        return set(TOYS[toy]().programs)
    if name == "skipdecode":
        return set()  # it adds programs
    return {TOYS[toy]().main_name}


def sample(toy: str) -> dict[str, Tensor]:
    """What a caller gives of a toy, for calibration."""
    given = {"tokens": torch.tensor([prompt(12)]), **inputs()}
    return {name: given[name] for name in TOYS[toy]().inputs}


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("name", PASSES)
def test_every_pass_changes_what_it_can_and_nothing_else(toy: str, name: str) -> None:
    bundle = TOYS[toy]()
    if (reason := refusal(toy, name)) is not None:
        with pytest.raises(PassError, match=reason) as caught:
            tokopt.optimize(bundle, spelled(name), calibration=[sample(toy)], strict=True)
        assert "\n" not in str(caught.value)
        return
    made = tokopt.optimize(bundle, spelled(name), calibration=[sample(toy)])
    verify_bundle(made)
    assert made.history[-1].matches
    kept = [n for n in bundle.programs if made.programs.get(n) is bundle.programs[n]]
    assert set(kept) == set(bundle.programs) - touched(toy, name)
    if name not in RESCHEDULED:
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


@cache
def exported(toy: str) -> Path:
    return tokopt.export(optimized(toy), Path(mkdtemp()) / "toy")


@pytest.mark.parametrize("toy", TOYS)
def test_both_hosts_say_what_the_programs_say(toy: str) -> None:
    """Reduced images, evicted tokens: the artifact says what the bundle's programs say one by one."""
    path, ids = exported(toy), prompt(20)
    assert tokopt.verify(path).ok
    model = load(path, threads=1)
    assert isinstance(model, LanguageModel)
    given = {tensor.name: inputs()[tensor.name].numpy() for tensor in model.interface.inputs}
    wanted = said(optimized(toy), ids, 16)
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


# --- calls ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", TOYS)
def test_a_bundle_is_called_with_what_a_caller_gives(toy: str) -> None:
    """Tokens first; the last token's logits choose what the programs choose one by one after a prompt read at once."""
    bundle, ids = TOYS[toy](), prompt(12)
    (logits,) = bundle(*sample(toy).values())
    assert logits.shape == (1, 12, VOCABULARY)
    decoder = Talk(bundle, 1)
    given = inputs()
    features, summary = bundle.programs["see"](given["images"])
    if toy == "chained":
        (summary,) = bundle.programs["hear"](features, given["sounds"])
    link = {"chained": "context", "split": "summary"}[toy]
    assert int(logits[0, -1].argmax()) == decoder.next(bundle.main_name, ids, 0, **{link: summary})
    with pytest.raises(InputError, match=r"1 tensors were given, the model takes [23]: tokens, images"):
        bundle(torch.tensor([ids]))


@pytest.mark.parametrize("toy", TOYS)
def test_bisect_and_fidelity_read_links(toy: str) -> None:
    found = bisect(TOYS[toy](), "rtn{group=16},tome{r=2}", tolerance=1e-12)
    assert [step.differences[0].output for step in found.steps] == ["logits", "logits"]
    assert found.culprit is found.steps[0]
    assert found.steps[1].worst != found.steps[0].worst  # the images are merged, which only links can show
    same = fidelity(TOYS[toy](), TOYS[toy](), [sample(toy)])
    assert isinstance(same, NextTokens) and same.kl == 0
    assert fidelity(TOYS[toy](), tokopt.optimize(TOYS[toy](), "rtn{bits=2 group=16}"), [sample(toy)]) != same


def test_every_program_is_calibrated_with_what_it_reads() -> None:
    """Moments of a program behind links are those of its own inputs."""
    bundle = chained()
    given = sample("chained")
    features, _ = bundle.programs["see"](given["images"])
    module = open_graph(bundle.programs["hear"])
    linears = find_linears(module.graph)
    of_sounds = next(linear for linear in linears if linear.path == "embed")
    moments = collect(Site(bundle, "hear", module), [of_sounds.input], [given])[of_sounds.input]
    torch.testing.assert_close(moments.mean, given["sounds"].abs().mean(0))
    last = find_linears(module.graph)[-1]
    seen = collect(Site(bundle, "hear", module), [last.input], [given])[last.input]
    assert seen.rows == features.shape[1]


def test_a_link_from_a_later_call_is_refused_in_one_sentence() -> None:
    bundle = chained()
    backwards = Link(Port("step", "logits"), Port("hear", "features"), "once")
    with pytest.raises(InputError, match="'hear' reads 'features' of an earlier call of 'step'"):
        replace(bundle, links=(backwards, bundle.links[1])).outputs(sample("chained"))


def test_tuning_judges_a_model_that_reads_links(tmp_path: Path) -> None:
    plain = tokopt.export(chained(), tmp_path / "plain")
    given = [{name: tensor.numpy() for name, tensor in sample("chained").items()}]
    assert judge(plain, plain, given, 1)["KL"] == 0
    assert judge(plain, exported("chained"), given, 1)["KL"] > 0
