"""The 8-bit cache: what KIVI's formulas say, alone and after every eviction, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import tokopt
from tests.matrix.language import artifact, bundle, prompt
from tests.matrix.test_eviction import Driver, evicting, spelled
from tests.zoo.decoders import DECODERS
from tokopt.errors import TokoptError
from tokopt.ir.export import placeholders
from tokopt.ir.graph import aten, is_call, operand_at
from tokopt.passes.kv.kivi import dequantize_values, quantize_values
from tokopt.rewrite.edit import close_graph, open_graph

GROUP, RESIDUAL, EVERY = 4, 6, 4
TEXT = f"kivi{{group={GROUP} residual={RESIDUAL} every={EVERY}}}"
EVICTION = f"budget=18 sinks=2 recent=4 every={EVERY}"


def rounded(values: np.ndarray) -> np.ndarray:
    """One group in 8 bits and back, in float64."""
    values = values.astype(np.float64)
    low, step = values.min(), (values.max() - values.min()) / 255
    return np.rint((values - low) / (step or 1)) * step + low


def quantize(driver: Driver) -> None:
    """Every whole group of the old tokens of a float cache, rounded in place, by KIVI's formulas."""
    for name, cache in driver.state.items():
        kind = name.split("_")[0]
        if kind not in ("key", "value"):
            continue
        for row, head in np.ndindex(cache.shape[:2]):
            packed = max(int(driver.state["length"][row]) - RESIDUAL, 0) // GROUP * GROUP
            old = cache[row, head, :packed].numpy()
            tokens = old.reshape(-1, GROUP, old.shape[1]) if kind == "key" else old.reshape(packed, -1, GROUP)
            for place in np.ndindex(tokens.shape[0], tokens.shape[2 if kind == "key" else 1]):
                index = (place[0], slice(None), place[1]) if kind == "key" else (*place, slice(None))
                tokens[index] = rounded(tokens[index])
            cache[row, head, :packed] = torch.from_numpy(old)


class Naive(Driver):
    """A float cache whose old part is rounded after every ``compact``."""

    def run(self, program: str, **feed: Tensor) -> dict[str, Tensor]:
        got = super().run(program, **feed)
        if program == "compact":
            quantize(self)
        return got


def check(pipeline: str, base: str, name: str) -> None:
    """Logits of two rows of unequal length, through several evictions, against the naive cache."""
    prompts, texts = [prompt(17), prompt(30, seed=2)], [prompt(9, seed=1), prompt(9, seed=3)]
    got = Driver(evicting(name, pipeline), 2).follow(prompts, texts, EVERY)
    wanted = Naive(evicting(name, base), 2).follow(prompts, texts, EVERY)
    torch.testing.assert_close(got, wanted, atol=5e-4, rtol=1e-3)


ALL = f"streaming{{budget={2**40} every={EVERY}}}"
"""Evicts nothing but padding."""


@pytest.mark.parametrize("name", DECODERS)
def test_alone_it_is_the_formula(name: str) -> None:
    check(TEXT, ALL, name)


COMPOSED = [(method, "llama") for method in ("h2o", "streaming rerotate=true", "expected_attention")]
COMPOSED += [("h2o", "gemma3"), ("tova", "mistral"), ("snapkv", "gpt2")]


@pytest.mark.parametrize(
    ("method", "name"),
    COMPOSED,
)
def test_after_an_eviction_it_is_the_formula(method: str, name: str) -> None:
    """With layers of sliding windows and heads of their own too."""
    check(f"{spelled(method, EVICTION)},{TEXT}", spelled(method, EVICTION), name)


def test_a_residual_that_holds_all_changes_nothing() -> None:
    ids, text = prompt(20), prompt(8, seed=1)
    roomy = Driver(evicting("llama", f"kivi{{group={GROUP} residual=99 every={EVERY}}}"), 1)
    full = Driver(bundle("llama"), 1)
    wanted = [full.read([ids])] + [full.step([[t]], [[20 + i]]) for i, t in enumerate(text)]
    torch.testing.assert_close(roomy.follow([ids], [text], EVERY), torch.stack(wanted), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("pipeline", [TEXT, f"{spelled('h2o', EVICTION)},{TEXT}"])
def test_artifact_generates_what_the_bundle_generates(pipeline: str) -> None:
    """From ONNX Runtime, token for token, with buffers that grow and shrink; the cache is as small as it says."""
    ids = prompt(50)
    model = artifact("llama", pipeline)
    got = model.generate(ids, max_tokens=40)
    driver = Driver(evicting("llama", pipeline), 1, capacity=128)
    logits = driver.follow([ids], [list(got.tokens)], EVERY)
    assert logits[:-1, 0].argmax(-1).tolist() == list(got.tokens)
    slots = got.statistics.cache_slots
    per_slot = 2 * 2 * 2 * (16 + 2 * 4 * 16 // GROUP)  # layers, kinds, heads: codes, and scales and zeros
    extra = 8 + (2 * 2 * 4 if "h2o" in pipeline else 0)  # positions, and the masses of two layers
    recent = 2 * 2 * 2 * 16 * 4 * (RESIDUAL + GROUP + EVERY)
    assert got.statistics.cache_bytes <= slots * (per_slot + extra) + recent + 3 * 8


def test_what_was_quantized_is_reproduced() -> None:
    """A cache that does not move does not drift: codes are the same after many rounds."""
    driver = Driver(evicting("llama", TEXT), 1)
    driver.read([prompt(30)])
    driver.run("compact")
    before = driver.state["key_0_codes"].clone(), driver.state["value_0_codes"].clone()
    packed = int(driver.state["length"] - driver.state["recent_length"])
    for _ in range(5):
        driver.run("compact")
    assert packed == 24
    assert torch.equal(driver.state["key_0_codes"][:, :, :packed], before[0][:, :, :packed])
    assert torch.equal(driver.state["value_0_codes"][:, :, :packed], before[1][:, :, :packed])


def test_sizes_may_be_read_off_the_cache_it_takes_away() -> None:
    """Deep models do; codes have the same sizes."""
    given = evicting("llama", ALL)
    step = given.programs["step"]
    module = open_graph(step)
    cache = placeholders(module)[[spec.name for spec in step.inputs].index("key_0")]
    reads = [node for node in module.graph.nodes if is_call(node, aten.sym_size) and node.args[1] == 0]
    assert reads
    for node in reads:  # of the batch
        node.replace_input_with(operand_at(node, 0), cache)
    given = given.with_program("step", close_graph(step, module))
    ids, texts = prompt(30), [prompt(9, seed=1)]
    got = Driver(tokopt.optimize(given, TEXT, strict=True), 1).follow([ids], texts, EVERY)
    wanted = Driver(evicting("llama", TEXT), 1).follow([ids], texts, EVERY)
    torch.testing.assert_close(got, wanted)


def test_values_round_to_half_a_scale() -> None:
    x = torch.randn(2, 3, 5, 8)
    codes, scale, zero = quantize_values(x, 4)
    assert codes.dtype == torch.uint8 and scale.shape == (2, 3, 5, 2)
    error = (dequantize_values(codes, scale, zero) - x).abs().unflatten(-1, (-1, 4))
    assert (error <= scale[..., None] / 2 * 1.001).all()
    same = torch.ones(1, 1, 1, 4)
    assert torch.equal(dequantize_values(*quantize_values(same, 4)), same)


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    {
        "kivi{group=5}": "have 16 channels of torch.float32; KIVI needs float32 and a multiple of group=5",
        "kivi{every=8}": "every=8 at least the group",
        "kivi{group=4 residual=-1}": "residual=-1 not negative",
        f"knorm{{budget=[20,13] recent=4}},{TEXT}": "give all one budget",
        "knorm{budget=50 every=0},kivi{group=4}": "comes every 0 tokens; give it every=4",
        f"{TEXT},h2o{{budget=50}}": "evicted already",
        f"{TEXT},{TEXT}": "does not read keys and values directly",
        "tome{r=1}": "tome works on encoders",
    }.items(),
)
def test_what_cannot_be_is_refused(pipeline: str, reason: str) -> None:
    with pytest.raises(TokoptError, match=reason):
        tokopt.optimize(bundle("llama"), pipeline, strict=True)
