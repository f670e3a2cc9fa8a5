"""The cache in 8 bits with constant scales: what the formula says, on every decoder, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import tokopt
from tests.matrix.language import bundle, model, prompt
from tests.matrix.test_eviction import EVERY, Driver, spelled
from tests.zoo import ZOO
from tests.zoo.decoders import CONTEXT, DECODERS
from tokopt.errors import TokoptError
from tokopt.frontend.hugging_face import HuggingFace
from tokopt.frontend.sight import Sight
from tokopt.ir.bundle import Bundle
from tokopt.lower.parity.selections import expose_selections, run_with_selections
from tokopt.runtime import LanguageModel, load
from tokopt.runtime.buffers import run_in_place
from tokopt.runtime.engines.onnxruntime import ONE_ROW, OWN, PORTABLE
from tokopt.runtime.numerics import nmse

TEXTS = [prompt(24, seed) for seed in (3, 4)]
"""What is calibrated with."""


def pairs(rotated: int) -> Callable[[int], int]:
    """The partner of a channel where the first ``rotated`` ones are turned by halves, itself elsewhere."""
    return lambda c: (c + rotated // 2) % rotated if c < rotated else c


PARTNERS: dict[str, Callable[[int], int]] = {
    "llama": pairs(16),
    "gemma3": pairs(16),
    "phi": pairs(8),  # half of the channels
    "hand_rotary": lambda c: c ^ 1,
    "gpt2": lambda c: c,
}


@cache
def quantized(name: str, passes: str = "int8_kv") -> Bundle:
    return tokopt.optimize(bundle(name), passes, calibration=TEXTS, strict=True)


@cache
def artifact(name: str, passes: str, folder: Path) -> LanguageModel:
    return load(tokopt.export(quantized(name, passes), folder / f"{name}.tokopt"), threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("int8_kv")


# --- a naive decoder --------------------------------------------------------------------------------------


class Recording:
    """A cache that holds nothing but the largest size of every pair of channels, by layer and kind."""

    def __init__(self, partner: Callable[[int], int]) -> None:
        self.partner = partner
        self.largest: dict[tuple[int, str], np.ndarray] = {}

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        for kind, tensor in (("keys", keys), ("values", values)):
            x = tensor[0].double().numpy()
            known = self.largest.setdefault((layer, kind), np.zeros((x.shape[0], x.shape[2])))
            for head, token, c in np.ndindex(x.shape):
                partner = self.partner(c) if kind == "keys" else c
                other = x[head, token, partner] if partner != c else 0.0
                known[head, c] = max(known[head, c], np.hypot(x[head, token, c], other))
        return keys, values


class Rounding:
    """A cache of one text, rounded to 8 bits."""

    def __init__(self, largest: dict[tuple[int, str], np.ndarray]) -> None:
        self.largest = largest

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        def rounded(kind: str, x: Tensor) -> Tensor:
            scale = torch.from_numpy(self.largest[layer, kind] / 127)[:, None].float()
            return (x / scale).round().clamp(-128, 127) * scale

        return rounded("keys", keys), rounded("values", values)


def eager_logits(name: str, ids: list[int], held: object) -> np.ndarray:
    """The model's own logits [tokens, vocabulary] of a text, its keys and values through ``held``."""
    decoder = model(name) if hasattr(model(name), "greedy") else HuggingFace(model(name))
    places = torch.arange(len(ids))
    apart = places[:, None] - places

    def mask(sight: Sight) -> Tensor:
        return ((apart >= 0) & (apart < (sight.window or len(ids))))[None, None]

    masks = {sight: mask(sight) for sight in getattr(decoder, "sights", (Sight(),))}
    with torch.no_grad():
        given = masks if isinstance(decoder, HuggingFace) else masks[Sight()]
        return decoder(torch.tensor([ids]), places[None], given, held, places)[0].numpy()


def step_logits(made: Bundle, ids: list[int], capacity: int = 64) -> np.ndarray:
    """The same out of ``step``: a prompt, then one token at a time."""
    driver, start = Driver(made, 1, capacity), len(ids) // 2
    found = [driver.step([ids[:start]], [list(range(start))])]
    found += [driver.step([[ids[i]]], [[i]]) for i in range(start, len(ids))]
    return torch.cat(found).numpy()


@pytest.mark.parametrize("name", PARTNERS)
def test_it_is_the_formula(name: str) -> None:
    recorded = Recording(PARTNERS[name])
    for text in TEXTS:
        eager_logits(name, text, recorded)
    ids = prompt(30, seed=9)
    wanted = eager_logits(name, ids, Rounding(recorded.largest))[len(ids) // 2 - 1 :]
    assert nmse(wanted, step_logits(quantized(name), ids)) < 1e-8
    plain = step_logits(bundle(name), ids)
    assert nmse(plain, wanted) > 1e-6  # so that the comparison means something


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_keeps_bytes(name: str) -> None:
    made = quantized(name)
    assert {state.dtype for state in made.states if state.kind in ("key", "value")} == {"int8"}
    ids = prompt(30, seed=9)
    # Weights four times as large as usual make attention sharp: what 8 bits lose is multiplied.
    assert nmse(step_logits(bundle(name), ids), step_logits(made, ids)) < 0.1


def test_no_position_is_out_of_range() -> None:
    """Keys of the calibration text far behind it are turned, not larger: none is clamped."""
    text, far = TEXTS[0], CONTEXT - 30
    states = []
    for made in (bundle("llama"), quantized("llama")):
        driver = Driver(made, 1)
        driver.step([text], [list(range(far, far + len(text)))])
        states.append(driver.state["key_0"][0, :, : len(text)])
    codes = states[1].float()
    scale = (states[0] * codes).sum(1) / (codes * codes).sum(1)  # nearly: as the codes tell it
    error = (states[0] - codes * scale[:, None]).abs() / scale[:, None]
    assert codes.abs().max() <= 127 and error.max() < 0.75


# --- artifacts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ("llama", "gpt2"),
)
def test_artifact_generates_what_the_bundle_generates(name: str, folder: Path) -> None:
    """Alone and in a batch, by attentions that keep bytes themselves."""
    made = artifact(name, "int8_kv", folder)
    files = made.manifest.programs["step"].files
    graph = onnx.load(made.path / files[ONE_ROW], load_external_data=False).graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("GroupQueryAttention") == 2
    assert not {"quantize_int8", "dequantize_int8"} & set(operators)
    own = onnx.load(made.path / files[OWN], load_external_data=False).graph
    operators = [node.op_type for node in own.node]
    assert operators.count("CachedAttention") == 2
    assert not {"quantize_int8", "dequantize_int8"} & set(operators)
    portable = onnx.load(made.path / files[PORTABLE], load_external_data=False).graph
    assert [node.op_type for node in portable.node].count("dequantize_int8") == 4
    prompts = [prompt(20), prompt(26, seed=2)]
    together = made.generate(prompts, max_tokens=12)
    for ids, text in zip(prompts, together, strict=True):
        generated = made.generate(ids, max_tokens=12)
        alone = generated.tokens
        assert list(alone) == list(text.tokens)
        driver = Driver(quantized(name), 1)
        logits = [driver.read([ids])]
        logits += [driver.step([[token]], [[len(ids) + i]]) for i, token in enumerate(alone[:-1])]
        assert torch.cat(logits).argmax(-1).tolist() == list(alone)
    slots, heads, channels = generated.statistics.cache_slots, *_sizes(quantized(name))
    assert generated.statistics.cache_bytes == slots * (4 * heads * channels + 8) + 8


def _sizes(made: Bundle) -> tuple[int, int]:
    _, heads, _, channels = next(state.axes for state in made.states if state.name == "key_0")
    assert isinstance(heads, int) and isinstance(channels, int)
    return heads, channels


def test_codes_of_the_fused_attention_can_be_given(folder: Path) -> None:
    """What parity needs where rounding falls the other way: the new tokens' codes, in the program's order."""
    made = artifact("llama", "int8_kv", folder)
    program = quantized("llama").programs["step"]
    for form in (PORTABLE, ONE_ROW, OWN):
        copy, names = expose_selections(made.path / made.manifest.programs["step"].files[form])
        session = onnxruntime.InferenceSession(copy, providers=["CPUExecutionProvider"])
        row = tuple(
            tensor[:1] if "batch" in spec.axes else tensor
            for spec, tensor in zip(program.inputs, program.example, strict=True)
        )
        outputs = [output.name for output in session.get_outputs()]
        feed = {spec.name: tensor.numpy() for spec, tensor in zip(program.inputs, row, strict=True)}
        found = dict(zip(outputs, run_in_place(session, outputs, feed, program.aliases), strict=True))
        copy.unlink()
        given = [[found[name] for name in group] for group in names]
        assert [group[0].dtype for group in given] == [np.dtype("int8")] * 4
        _, same = run_with_selections(program, row, given)
        assert [choice.different for choice in same] == [0] * 4
        given[0][0] = given[0][0].copy()
        given[0][0].flat[0] += 1 if given[0][0].flat[0] < 100 else -1
        _, near = run_with_selections(program, row, given)
        assert near[0].different == 1 and near[0].ok
        given[0][0].flat[0] += 5 if given[0][0].flat[0] < 100 else -5
        _, wrong = run_with_selections(program, row, given)
        assert not wrong[0].ok


# --- eviction, and other passes ---------------------------------------------------------------------------

EVICTIONS = ("h2o", "snapkv", "expected_attention")


@pytest.mark.parametrize("method", EVICTIONS)
def test_an_eviction_moves_codes_as_they_are(method: str) -> None:
    driver = Driver(quantized("llama", f"{spelled(method)},int8_kv"), 1)
    driver.read([prompt(30)])
    before = {name: driver.state[name].clone() for name in ("key_0", "value_1")}
    driver.run("compact")
    length = int(driver.state["length"])
    for name, old in before.items():
        for head in range(old.shape[1]):
            kept = driver.state[name][0, head, :length]
            same = (kept[:, None] == old[0, head, None, :30]).all(-1)
            assert same.any(1).all()


def test_artifact_with_an_eviction_generates_what_the_bundle_generates(tmp_path: Path) -> None:
    passes = f"{spelled('h2o')},int8_kv"
    made = load(tokopt.export(quantized("llama", passes), tmp_path / "llama.tokopt"), threads=1)
    ids = prompt(40)
    got = made.generate(ids, max_tokens=20).tokens
    logits = Driver(quantized("llama", passes), 1).follow([ids], [list(got)], EVERY)
    assert logits[:-1, 0].argmax(-1).tolist() == list(got)


def test_weights_may_be_quantized_before_or_after() -> None:
    ids = prompt(30, seed=9)
    first, last = (
        step_logits(quantized("llama", passes), ids)
        for passes in ("rtn{group=16},int8_kv", "int8_kv,rtn{group=16}")
    )
    assert nmse(first, last) < 0.1  # scales were measured with other weights


@pytest.mark.parametrize(
    ("passes", "reason"),
    {
        "int8_kv,int8_kv": "does not read keys and values directly from a cache; put int8_kv last",
        f"int8_kv,{spelled('h2o')}": "does not read keys and values directly from a cache; put int8_kv last",
        "kivi{group=4 every=4},int8_kv": "does not read keys and values directly",
        f"{spelled('streaming rerotate=true')},int8_kv": "re-rotates keys, which would be rounded anew every time",
    }.items(),
)
def test_what_cannot_be_is_refused(passes: str, reason: str) -> None:
    with pytest.raises(TokoptError, match=reason):
        tokopt.optimize(bundle("llama"), passes, calibration=TEXTS, strict=True)


def test_it_needs_texts() -> None:
    with pytest.raises(TokoptError, match="int8_kv needs inputs to calibrate with"):
        tokopt.optimize(bundle("llama"), "int8_kv")
    with pytest.raises(TokoptError, match="the calibration data is empty"):
        tokopt.optimize(bundle("llama"), "int8_kv", calibration=[])


def test_encoders_have_no_cache() -> None:
    entry = ZOO["vit"]
    made = tokopt.capture(entry.build(), (), entry.inputs(), dynamic=entry.dynamic)
    with pytest.raises(TokoptError, match="int8_kv works on language models"):
        tokopt.optimize(made, "int8_kv", calibration=TEXTS)
