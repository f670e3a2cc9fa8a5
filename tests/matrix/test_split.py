"""A model cut in two: the programs in a row give what the one gave, on every architecture and in both hosts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tokopt
from tests import node
from tests.matrix import language
from tests.matrix.language import artifact, prompt, reference
from tests.matrix.test_matrix import captured
from tests.zoo import ZOO
from tests.zoo.decoders import DECODERS
from tokopt.analysis.blocks import blocks_of
from tokopt.errors import PassError, PassRefused, PipelineSyntaxError
from tokopt.ir.bundle import Bundle
from tokopt.runtime import load


def depth(bundle: Bundle) -> int:
    return len(blocks_of(bundle.main.module.graph))


@pytest.mark.parametrize("name", ZOO)
def test_every_encoder_is_the_same_in_two_programs(name: str) -> None:
    """At another batch than the example's; the outputs keep their names and order.

    ``tests/rewrite/test_cut.py`` cuts at every block.
    """
    whole = captured(name)
    inputs = tuple(ZOO[name].inputs(batch=2, seed=7).values())
    made = tokopt.optimize(whole, "split{at=1}", strict=True)
    assert len(made.encoders) == 2 and made.semantics == "exact"
    outputs = made.outputs(dict(zip(made.inputs, inputs, strict=True)))
    assert list(outputs) == [spec.name for spec in whole.main.outputs]
    assert all(map(torch.equal, outputs.values(), whole(*inputs)))


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_is_the_same_in_two_programs(name: str) -> None:
    whole = language.bundle(name)
    tokens = torch.tensor([prompt(17, seed) for seed in (1, 2)])
    made = tokopt.optimize(whole, f"split{{at={depth(whole)}}}", strict=True)
    (decode,) = made.schedule.of_role("decode")
    assert len(decode.programs) == 2 and made.states == whole.states
    assert torch.equal(made(tokens)[0], whole(tokens)[0])


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "gpt_neox"])
def test_a_text_of_two_programs_is_the_model_s(name: str) -> None:
    """Alone, in a padded batch, and in the host in Node.js."""
    model = artifact(name, "split{at=1}")
    ids = prompt(9, seed=3)
    wanted = reference(name, ids, 30)
    assert list(model.generate(ids, max_tokens=30).tokens) == wanted
    rows = model.generate([ids, prompt(20, seed=4)], max_tokens=30)
    assert list(rows[0].tokens) == wanted
    assert list(rows[1].tokens) == reference(name, prompt(20, seed=4), 30)
    if name == "llama":
        assert node.generate(model.path, ids, 30) == wanted


COMPOSED = (
    "adakv{press=h2o{budget=24 sinks=2 recent=4 every=8}},split{at=1}",
    "streaming{budget=16 sinks=2 every=8},split{at=1}",
    "sample,split{at=1}",
    "rtn{bits=8 group=16},split{at=1}",
    "speculate{nodes=4},split{at=1}",
)
"""Pipelines that end with ``split``, which changes nothing of what they do."""


@pytest.mark.parametrize("pipeline", COMPOSED)
def test_what_other_passes_made_stays_what_it_is(pipeline: str) -> None:
    before, _, _ = pipeline.rpartition(",split")
    ids = [prompt(40, seed=5), prompt(31, seed=6)]
    whole, made = (artifact("llama", text).generate(ids, max_tokens=40) for text in (before, pipeline))
    assert whole == made
    assert len(artifact("llama", pipeline).manifest.schedule.entries[0].programs) == 2


def test_weights_are_quantized_in_both_programs_after_the_cut() -> None:
    ids = prompt(12)
    text = "rtn{bits=8 group=16}"
    after, before = (artifact("llama", p) for p in (f"split{{at=1}},{text}", f"{text},split{{at=1}}"))
    assert after.generate(ids, max_tokens=20) == before.generate(ids, max_tokens=20)


def test_an_artifact_of_two_programs_gives_what_that_of_one_gives(tmp_path) -> None:
    """Up to the rounding of kernels that ONNX Runtime fuses within one graph alone."""
    whole = captured("vit")
    tokopt.export(whole, tmp_path / "whole.tokopt")
    tokopt.export(tokopt.optimize(whole, "split{at=2}"), tmp_path / "cut.tokopt")
    images = ZOO["vit"].inputs(batch=3)["pixel_values"].numpy()
    one, two = (load(tmp_path / f"{name}.tokopt")(images) for name in ("whole", "cut"))
    for name in one:
        np.testing.assert_allclose(two[name], one[name], atol=1e-4)
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / f"{name}.tokopt").iterdir()) for name in ("whole", "cut")
    ]
    assert sizes[1] < 1.5 * sizes[0]


def test_a_model_is_cut_again() -> None:
    whole = captured("siglip")
    made = tokopt.optimize(whole, "split{at=1},split{at=2}", strict=True)
    assert [len(blocks_of(made.programs[name].module.graph)) for name in made.encoders] == [1, 1, 1]
    images = ZOO["siglip"].inputs(batch=2)["pixel_values"]
    assert all(map(torch.equal, made(images), whole(images)))
    text = tokopt.optimize(language.bundle("llama"), "split{at=1},split{at=2}", strict=True)
    assert len(text.schedule.entries[0].programs) == 3
    tokens = torch.tensor([prompt(9)])
    assert torch.equal(text(tokens)[0], language.bundle("llama")(tokens)[0])


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(PassError, match="at=4, but the model has 3 blocks"):
        tokopt.optimize(captured("vit"), "split{at=4}")
    with pytest.raises(PipelineSyntaxError, match="at=0 leaves nothing before the cut"):
        tokopt.optimize(captured("vit"), "split{at=0}")
    with pytest.raises(PassError, match="no blocks of self-attention"):
        tokopt.optimize(tokopt.capture(torch.nn.Linear(3, 4).eval(), (torch.ones(2, 3),)), "split{at=1}")
    with pytest.raises(PassRefused, match="cut at block 1 already"):
        tokopt.optimize(captured("vit"), "split{at=1},split{at=1}", strict=True)
    with pytest.raises(PassError, match="put it before split"):
        tokopt.optimize(language.bundle("llama"), "split{at=1},h2o{budget=64}")
