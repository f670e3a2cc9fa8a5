"""Attention over a cache by tokopt's kernels and by ONNX Runtime's, for :mod:`benchmarks.cpu_kernels`."""

# ONNX Runtime is untyped.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest.mock import patch

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tokopt.kernels import cpu

HEADS, KEY_HEADS, CHANNELS, LAYERS = 9, 3, 64, 30
SHAPES = ((1, 64), (1, 1024), (2, 1024), (4, 1024), (8, 1024), (16, 1024), (256, 1024), (1024, 1024))
"""New tokens, and slots in use when they are written."""

CONTRIB = "com.microsoft"
ATTRIBUTES: Mapping[str, Any] = {"scale": 0.125, "softcap": 0.0, "interleaved": 0, "alike": 0}
Least = Callable[[dict[str, Callable[[], object]]], dict[str, float]]


def attending(least: Least, threads: int) -> Iterator[str]:
    """The table: milliseconds of a layer, by new tokens and slots in use; what one token reads in GB/s."""
    titles = [f"{tokens} of {slots}" for tokens, slots in SHAPES]
    yield "| kernel | cache | " + " | ".join(titles) + " | GB/s |"
    yield "|---" * (len(SHAPES) + 3) + "|"
    forms = [("", False), *((isa, codes) for codes in (False, True) for isa in vectors())]
    for isa, codes in forms:
        calls = {
            title: _caller(tokens, slots, isa, codes, threads)
            for title, (tokens, slots) in zip(titles, SHAPES, strict=True)
        }
        found = {title: own / LAYERS for title, own in least(calls).items()}
        held = 1024 * 2 * KEY_HEADS * CHANNELS * (1 if codes else 4)
        name = f"`{isa}`" if isa else "`GroupQueryAttention`"
        cells = [f"{own:.3f}" for own in found.values()]
        rate = held / found["1 of 1024"] / 1e6
        yield f"| {name} | {'8 bits' if codes else 'float32'} | " + " | ".join(cells) + f" | {rate:.1f} |"


ENCODERS = {"DINOv2-S": (1, 257, 6, 64), "DINOv2-S, 8 images": (8, 257, 6, 64), "MiniLM": (1, 128, 12, 32)}
"""Rows, tokens, heads and channels of a head: encoders whose attention a cache's kernel could compute."""


def encoders_attending(least: Least, threads: int) -> Iterator[str]:
    """The table: milliseconds of a layer's attention from queries, keys and values side by side, by kernel."""
    yield "| kernel | " + " | ".join(ENCODERS) + " |"
    yield "|---" * (1 + len(ENCODERS)) + "|"
    for isa in ("", *vectors()):
        calls = {name: _encoder_caller(sizes, isa, threads) for name, sizes in ENCODERS.items()}
        found = least(calls)
        name = f"`{isa}`" if isa else "`Split`, `Transpose` and `Attention`"
        yield f"| {name} | " + " | ".join(f"{found[title]:.3f}" for title in ENCODERS) + " |"


def _encoder_caller(sizes: tuple[int, int, int, int], isa: str, threads: int) -> Callable[[], object]:
    batch, tokens, heads, channels = sizes
    given = {
        "query": np.random.default_rng(0).standard_normal((batch, tokens, 3 * heads * channels), np.float32)
    }
    if not isa:
        session = _session(_split_attention(heads, channels, given), isa, threads)
        return lambda: session.run(None, given)
    cache = np.zeros((batch, heads, tokens, channels), np.float32)
    given |= {"past_key": cache, "past_value": cache, "length": np.zeros(batch, np.int64)}
    given["mask"] = np.ones((1, 1, 1, tokens), bool)
    names = ["query", "", "", "past_key", "past_value", "length", "mask"]
    attributes = {**ATTRIBUTES, "heads": heads, "key_heads": heads}
    model = _model("CachedAttention", cpu.DOMAIN, cpu.VERSION, names, given, {}, attributes)
    session = _session(model, isa, threads)
    binding = _bound(session, given)
    return lambda: session.run_with_iobinding(binding)


def _split_attention(heads: int, channels: int, given: Mapping[str, np.ndarray]) -> ModelProto:
    """What an encoder's artifact holds in standard ops."""
    nodes = [helper.make_node("Split", ["query"], ["q0", "k0", "v0"], axis=-1, num_outputs=3)]
    for name in "qkv":
        nodes.append(helper.make_node("Reshape", [f"{name}0", "split"], [f"{name}1"]))
        nodes.append(helper.make_node("Transpose", [f"{name}1"], [name], perm=[0, 2, 1, 3]))
    nodes.append(helper.make_node("Attention", ["q", "k", "v"], ["y0"], scale=0.125))
    nodes.append(helper.make_node("Transpose", ["y0"], ["y1"], perm=[0, 2, 1, 3]))
    nodes.append(helper.make_node("Reshape", ["y1", "joined"], ["result"]))
    shapes = {"split": [0, 0, heads, channels], "joined": [0, 0, heads * channels]}
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("query", TensorProto.FLOAT, given["query"].shape)],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(shape), name) for name, shape in shapes.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def vectors() -> list[str]:
    """One instruction set for each kind of vectors, the slowest of those that share one."""
    kinds = {isa.split("_")[0].replace("amx", "avx512"): isa for isa in cpu.isas() if isa != "avx_vnni"}
    return [isa for isa in kinds.values() if isa != "plain"]


def _caller(tokens: int, slots: int, isa: str, codes: bool, threads: int) -> Callable[[], object]:
    """A call of every layer's attention, each on a cache of its own."""
    model, given = _own(tokens, slots, codes) if isa else _onnxruntimes(tokens, slots)
    session = _session(model, isa, threads)
    bindings = [_bound(session, given) for _ in range(LAYERS)]
    return lambda: [session.run_with_iobinding(binding) for binding in bindings]


def _session(model: ModelProto, isa: str, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with patch.dict(os.environ, {"TOKOPT_ISA": isa}):
        options.register_custom_ops_library(str(cpu.library()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def _bound(session: Any, given: Mapping[str, np.ndarray]) -> Any:
    """A binding whose caches are its own, and written in place."""
    binding = session.io_binding()
    for name, array in given.items():
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array.copy())
        binding.bind_ortvalue_input(name, value)
        if name.startswith("past"):
            binding.bind_ortvalue_output(name.replace("past", "present"), value)
    binding.bind_output("result")
    return binding


def _common(tokens: int, slots: int, codes: bool) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    width, cache = (HEADS + 2 * KEY_HEADS) * CHANNELS, (1, KEY_HEADS, slots, CHANNELS)
    given: dict[str, np.ndarray] = {"query": random.standard_normal((1, tokens, width), np.float32)}
    for name in ("past_key", "past_value"):
        numbers = random.standard_normal(cache, np.float32)
        given[name] = (40 * numbers).astype(np.int8) if codes else numbers
    return given


def _sees(tokens: int, slots: int) -> np.ndarray:
    return np.tril(np.ones((1, 1, tokens, slots), bool), slots - tokens)


def _own(tokens: int, slots: int, codes: bool) -> tuple[ModelProto, dict[str, np.ndarray]]:
    given = _common(tokens, slots, codes) | {
        "length": np.array([slots - tokens]),
        "mask": _sees(tokens, slots),
        "cos": np.ones((1, tokens, CHANNELS // 2), np.float32),
        "sin": np.zeros((1, tokens, CHANNELS // 2), np.float32),
    }
    scale = np.full((KEY_HEADS, 1, CHANNELS), 1 / 40, np.float32)
    scales = {"key_scale": scale, "value_scale": scale} if codes else {}
    names = ["query", "", "", "past_key", "past_value", "length", "mask", "cos", "sin", *scales]
    attributes = {**ATTRIBUTES, "heads": HEADS, "key_heads": KEY_HEADS}
    return _model("CachedAttention", cpu.DOMAIN, cpu.VERSION, names, given, scales, attributes), given


def _onnxruntimes(tokens: int, slots: int) -> tuple[ModelProto, dict[str, np.ndarray]]:
    hidden = np.float32(np.finfo(np.float32).min)
    given = _common(tokens, slots, False) | {
        "last": np.array([slots - 1], np.int32),
        "slots": np.array(slots, np.int32),
        "cos": np.ones((slots, CHANNELS // 2), np.float32),
        "sin": np.zeros((slots, CHANNELS // 2), np.float32),
        "rows": np.arange(tokens)[None],
        "bias": np.where(_sees(tokens, slots), np.float32(0), hidden),
    }
    names = ["query", "", "", "past_key", "past_value", "last", "slots", "cos", "sin", "rows", "bias"]
    attributes = {"num_heads": HEADS, "kv_num_heads": KEY_HEADS, "scale": 0.125, "do_rotary": 1}
    return _model("GroupQueryAttention", CONTRIB, 1, names, given, {}, attributes), given


def _model(
    op: str,
    domain: str,
    version: int,
    names: list[str],
    given: Mapping[str, np.ndarray],
    constants: Mapping[str, np.ndarray],
    attributes: Mapping[str, Any],
) -> ModelProto:
    outputs = ["result", "present_key", "present_value"]
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in given.items()}
    graph = helper.make_graph(
        [helper.make_node(op, names, outputs, domain=domain, **attributes)],
        "attention",
        [helper.make_tensor_value_info(name, kinds[name], array.shape) for name, array in given.items()],
        [
            helper.make_tensor_value_info(
                name, kinds.get(name.replace("present", "past"), TensorProto.FLOAT), None
            )
            for name in outputs
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, version)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
