"""Attention over a cache: random calls, what they compute in float64, and every form of the op behind one call.

Needs no torch outside of the reference, so that the sanitizers need not follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.kernels.linears import LIBRARY, session
from tokopt.kernels import cpu

INPUTS = (
    "query",
    "key",
    "value",
    "past_key",
    "past_value",
    "length",
    "mask",
    "cos",
    "sin",
    "key_scale",
    "value_scale",
)
OUTPUTS = ("result", "present_key", "present_value")
CONSTANTS = ("key_scale", "value_scale")


@dataclass(frozen=True)
class Attention:
    """The inputs of one call by name, and the attributes of the op; either may be wrong on purpose."""

    inputs: Mapping[str, np.ndarray]
    heads: int
    key_heads: int
    scale: float
    softcap: float = 0.0
    interleaved: bool = False
    alike: bool = False

    @property
    def attributes(self) -> dict[str, float]:
        return {
            "heads": self.heads,
            "key_heads": self.key_heads,
            "scale": self.scale,
            "softcap": self.softcap,
            "interleaved": int(self.interleaved),
            "alike": int(self.alike),
        }

    def but(self, **inputs: np.ndarray | None) -> Attention:
        """With other inputs; None removes one."""
        changed = {**self.inputs, **inputs}
        return replace(self, inputs={name: given for name, given in changed.items() if given is not None})


def random_attention(
    seed: int,
    batch: int,
    tokens: int,
    slots: int,
    *,
    key_heads: int = 2,
    group: int = 2,
    channels: int = 16,
    codes: bool = False,
    packed: bool = False,
    pairs: int = 0,
    interleaved: bool = False,
    softcap: float = 0.0,
    alike: bool = False,
    masks: tuple[bool, int, bool] = (True, 1, True),
    density: float = 0.7,
) -> Attention:
    """Everything at random; ``masks`` says whether rows, how many heads, and whether tokens have a mask each.

    ``density`` is the share of slots that are seen; a tenth of the slots nobody sees.
    """
    random = np.random.default_rng(seed)
    widths = {"query": (group + (2 if packed else 0)) * key_heads * channels}
    if not packed:
        widths |= {"key": key_heads * channels, "value": key_heads * channels}
    inputs: dict[str, np.ndarray] = {
        name: random.standard_normal((batch, tokens, width)).astype(np.float32)
        for name, width in widths.items()
    }
    cache = (batch, key_heads, slots, channels)
    for name in ("key", "value"):
        if codes:
            inputs[f"past_{name}"] = random.integers(-128, 128, cache, dtype=np.int8)
            inputs[f"{name}_scale"] = random.uniform(0.01, 0.03, (key_heads, 1, channels)).astype(np.float32)
        else:
            inputs[f"past_{name}"] = random.standard_normal(cache).astype(np.float32)
    inputs["length"] = random.integers(0, slots - tokens + 1, batch)
    by_row, heads, by_token = masks
    shape = (batch if by_row else 1, heads, tokens if by_token else 1, slots)
    unused = random.random((shape[0], heads, 1, slots)) < 0.1
    inputs["mask"] = (random.random(shape) < density) & ~unused
    if pairs:
        angles = random.uniform(-3, 3, (random.choice([1, batch]), tokens, pairs))
        inputs |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    return Attention(inputs, group * key_heads, key_heads, 0.7 / channels**0.5, softcap, interleaved, alike)


def naive(attention: Attention) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The op in float64, one token of one head at a time."""
    given = attention.inputs
    batch, key_heads, slots, channels = given["past_key"].shape
    heads, group = attention.heads, attention.heads // key_heads
    widths = [heads * channels, key_heads * channels, key_heads * channels]
    sides = (
        [given[name] for name in ("query", "key", "value")]
        if "key" in given
        else np.split(given["query"], np.cumsum(widths)[:2], -1)
    )
    tokens = sides[0].shape[1]
    q, k, v = (side.reshape(batch, tokens, side.shape[2] // channels, channels) for side in sides)
    if "cos" in given:
        q, k = (_rotated(x, given["cos"], given["sin"], attention.interleaved) for x in (q, k))
    caches = [given["past_key"].copy(), given["past_value"].copy()]
    for cache, new, scale in zip(caches, (k, v), ("key_scale", "value_scale"), strict=True):
        for row, first in enumerate(given["length"]):
            moved = new[row].transpose(1, 0, 2)
            if scale in given:
                moved = np.clip(np.rint(moved.astype(np.float32) / given[scale]), -128, 127)
            cache[row, :, first : first + tokens] = moved
    read = [
        cache.astype(np.float64) * given.get(scale, 1.0)
        for cache, scale in zip(caches, CONSTANTS, strict=True)
    ]
    mask = given["mask"]
    if mask.shape[1] == key_heads:
        mask = mask.repeat(group, 1)
    mask = np.broadcast_to(mask, (batch, heads, tokens, slots))
    result = np.zeros((batch, tokens, heads, channels))
    for row, token, head in np.ndindex(batch, tokens, heads):
        seen = mask[row, head, token]
        if not seen.any():
            continue
        keys, values = (cache[row, head // group][seen] for cache in read)
        scores = keys @ q[row, token, head].astype(np.float64) * np.float32(attention.scale)
        if attention.softcap:
            scores = attention.softcap * np.tanh(scores / attention.softcap)
        weights = np.exp(scores - scores.max())
        result[row, token, head] = weights @ values / weights.sum()
    return result.reshape(batch, tokens, heads * channels), caches[0], caches[1]


def _rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    """``x`` [batch, tokens, heads, channels], rounded as float32 is."""
    pairs = cos.shape[-1]
    places = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
        if interleaved
        else (slice(pairs), slice(pairs, 2 * pairs))
    )
    first, second = (x[..., place] for place in places)
    turned = x.copy()
    turned[..., places[0]] = cos[:, :, None] * first - sin[:, :, None] * second
    turned[..., places[1]] = sin[:, :, None] * first + cos[:, :, None] * second
    return turned


def onnx_model(attention: Attention, *, computed: str = "", **attributes: Any) -> ModelProto:
    """One node of the op; ``computed`` names a constant that becomes an input of the model."""
    given = attention.inputs
    given_attributes: dict[str, Any] = attributes or dict(attention.attributes)
    names = [name if name in given else "" for name in INPUTS]
    while not names[-1]:
        names.pop()
    node = helper.make_node(
        "CachedAttention",
        names,
        OUTPUTS,
        name="attend",
        domain=cpu.DOMAIN,
        **given_attributes,
    )
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in given.items()}
    constants = [name for name in CONSTANTS if name in given and name != computed]
    kinds |= {f"present_{name}": kinds[f"past_{name}"] for name in ("key", "value")}
    graph = helper.make_graph(
        [node],
        "attention",
        [
            helper.make_tensor_value_info(name, kinds[name], [None] * given[name].ndim)
            for name in given
            if name not in constants
        ],
        [
            helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), [None] * rank)
            for name, rank in zip(OUTPUTS, (3, 4, 4), strict=True)
        ],
        [numpy_helper.from_array(given[name], name) for name in constants],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(cpu.DOMAIN, cpu.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


Results = tuple[np.ndarray, np.ndarray, np.ndarray]
Form = Callable[[Attention, int, bool], Results]


def reference_form(attention: Attention, threads: int, in_place: bool) -> Results:
    import torch

    from tokopt.kernels.cached_attention.reference import cached_attention

    given: dict[str, Any] = {name: torch.from_numpy(array) for name, array in attention.inputs.items()}
    attributes = attention.attributes | {"interleaved": attention.interleaved, "alike": attention.alike}
    found = cached_attention(**{"key": None, "value": None} | given, **attributes)  # type: ignore[arg-type]
    return found[0].numpy(), found[1].numpy(), found[2].numpy()


def run(own: onnxruntime.InferenceSession, attention: Attention, in_place: bool) -> Results:
    """One call; ``in_place`` binds the next caches to the memory of those before."""
    feed = {name: array for name, array in attention.inputs.items() if name not in CONSTANTS}
    if not in_place:
        found = own.run(None, feed)
        return tuple(np.asarray(each) for each in found)  # type: ignore[return-value]
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        for name, array in feed.items()
    }
    (result,) = run_in_place(own, values)
    return result, values["past_key"].numpy(), values["past_value"].numpy()


def run_in_place(own: onnxruntime.InferenceSession, values: Mapping[str, Any]) -> list[np.ndarray]:
    """The result of a call whose caches are written where they are."""
    binding: Any = own.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("result")
    for name in ("key", "value"):
        binding.bind_ortvalue_output(f"present_{name}", values[f"past_{name}"])
    own.run_with_iobinding(binding)
    return [binding.get_outputs()[0].numpy()]


def library_form(isa: str) -> Form:
    def form(attention: Attention, threads: int, in_place: bool) -> Results:
        return run(session(onnx_model(attention), isa, threads), attention, in_place)

    return form


FORMS: dict[str, Form] = {
    "reference": reference_form,
    **({f"library-{isa}": library_form(isa) for isa in cpu.isas()} if LIBRARY else {}),
}
"""``(attention, threads, in place) -> the result and both caches``: the reference, and each instruction set."""
