"""The CPU kernels by themselves: ``python -m benchmarks.cpu_kernels`` writes ``benchmarks/results/cpu-kernels.md``.

All linears of SmolLM2-135M as sessions of ``QuantizedLinear``, one for each format and instruction set, for 1 to 16
rows, beside the time that reading the same bytes takes; and prompts of 256 rows beside float32 products. The attentions
of its layers as sessions of ``CachedAttention``, beside ONNX Runtime's ``GroupQueryAttention``. Rounds go through all
of them in turn, and the least time of each counts. On one thread it is the thread's own time, which other processes on
the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from benchmarks.cpu_attention import attending, encoders_attending
from benchmarks.machine import describe
from examples.data import write_atomically
from tokopt.kernels import cpu

RESULT = Path(__file__).parent / "results" / "cpu-kernels.md"
LAYERS = 30
LINEARS = ((576, 960), (576, 576), (576, 3072), (1536, 576))
"""Inputs and outputs of a layer's products: query, key and value; output; gate and up; down."""
HEAD = (576, 49152)
ROWS = (1, 2, 4, 8, 16)
PROMPT = 256
ORT, MKL = "float32 | ONNX Runtime", "float32 | MKL with AVX2"
ENCODER = ((384, 1152), (384, 384), (384, 1536), (1536, 384))
"""Inputs and outputs of the products of a layer of DINOv2-S, of which the third has a GELU."""
TOKENS = (197, 1576)
"""Rows of one image and of eight."""


@dataclass(frozen=True)
class Format:
    """How weights are stored: float32 without bits; groups of ``group`` inputs."""

    name: str
    bits: int = 0
    group: int = 32
    minimum: bool = False


FORMATS = (
    Format("4 bits, minimum, group 32", 4, 32, True),
    Format("4 bits, symmetric, group 64", 4, 64),
    Format("8 bits, symmetric, group 32", 8, 32),
)
FLOAT32 = Format("float32")


class Graph:
    """Products of one format that stand side by side, each with an output of its own."""

    def __init__(self, form: Format, shapes: Sequence[tuple[int, int]]) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.bytes = 0
        for inputs, outputs in shapes:
            if form.bits:
                self._quantized(form, inputs, outputs)
            else:
                self._node(
                    "MatMul", inputs, [self._held(self.random.random((inputs, outputs), np.float32))], ""
                )
        self.inputs = sorted({inputs for inputs, _ in shapes})

    def _held(self, array: np.ndarray) -> str:
        name = f"w{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(array, name))
        self.bytes += array.nbytes
        return name

    def _node(self, op: str, inputs: int, constants: list[str], domain: str, **attributes: Any) -> None:
        output = f"y{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op, [f"x{inputs}", *constants], [output], domain=domain, **attributes)
        )

    def _quantized(self, form: Format, inputs: int, outputs: int) -> None:
        codes = self.random.integers(0, 256, (outputs, inputs * form.bits // 8), dtype=np.uint8)
        scale = self.random.random((outputs, inputs // form.group)).astype(np.float16)
        constants = [self._held(codes), self._held(scale)]
        if form.minimum:
            constants += ["", self._held(-scale)]
        self._node("QuantizedLinear", inputs, constants, cpu.DOMAIN, bits=form.bits, group=form.group)

    def model(self) -> ModelProto:
        given = [helper.make_tensor_value_info(f"x{n}", TensorProto.FLOAT, ["rows", n]) for n in self.inputs]
        made = [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None) for node in self.nodes]
        graph = helper.make_graph(self.nodes, "linears", given, made, self.initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(cpu.DOMAIN, cpu.VERSION)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def opened(model: ModelProto, isa: str, threads: int) -> onnxruntime.InferenceSession:
    """A session whose kernels use an instruction set."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with patch.dict(os.environ, {"TOKOPT_ISA": isa}):
        options.register_custom_ops_library(str(cpu.library()))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def caller(graph: Graph, isa: str, threads: int) -> Callable[[int], Callable[[], object]]:
    """``rows -> call`` of one session."""
    session = opened(graph.model(), isa, threads)

    def call(rows: int) -> Callable[[], object]:
        feed = {f"x{n}": np.random.default_rng(1).random((rows, n), np.float32) for n in graph.inputs}
        return lambda: session.run(None, feed)

    return call


def least(calls: dict[str, Callable[[], object]], rounds: int, threads: int) -> dict[str, float]:
    """Milliseconds of each call: the least of ``rounds`` rounds through all of them, three calls each."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(3):
                start = clock()
                call()
                times[name].append(clock() - start)
    return {name: 1000 * min(own) for name, own in times.items()}


def decoding(rounds: int, threads: int) -> Iterator[str]:
    """The table of few rows: milliseconds, and the ratio to the same kernel's single row."""
    yield "| weights | kernel | reading the bytes | " + " | ".join(f"rows: {rows}" for rows in ROWS) + " |"
    yield "|---" * (len(ROWS) + 3) + "|"
    for form in FORMATS:
        graph = Graph(form, [*LINEARS * LAYERS, HEAD])
        buffer = torch.zeros(graph.bytes // 4)
        calls: dict[str, Callable[[], object]] = {"read": buffer.sum}
        isas = [isa for isa in cpu.isas() if isa != "plain"]
        for isa in isas:
            call = caller(graph, isa, threads)
            calls |= {f"{isa} {rows}": call(rows) for rows in ROWS}
        found = least(calls, rounds, threads)
        for isa in isas:
            times = [found[f"{isa} {rows}"] for rows in ROWS]
            cells = [f"{own:.1f} ({own / times[0]:.2f})" for own in times]
            size = f"{form.name}: {graph.bytes / 1e6:.0f} MB"
            yield f"| {size} | `{isa}` | {found['read']:.1f} | " + " | ".join(cells) + " |"


def reading(rounds: int, threads: int) -> Iterator[str]:
    """The table of prompts: one layer, against float32 products."""
    calls = {ORT: caller(Graph(FLOAT32, LINEARS), "plain", threads)(PROMPT), MKL: float_products}
    for form in FORMATS:
        for isa in cpu.isas():
            if isa != "plain":
                calls[f"{form.name} | `{isa}`"] = caller(Graph(form, LINEARS), isa, threads)(PROMPT)
    found = least(calls, rounds, threads)
    yield f"| weights | kernel | {PROMPT} rows of one layer, ms | float32 / this | float32 with AVX2 / this |"
    yield "|---|---|---|---|---|"
    for name, own in found.items():
        ratios = " | ".join(f"{found[other] / own:.2f}" for other in (ORT, MKL))
        yield f"| {name} | {own:.2f} | {ratios} |"


def float_products() -> object:
    """One layer's products of a prompt by torch, in float32."""
    for inputs, outputs in LINEARS:
        torch.mm(_operand(PROMPT, inputs), _operand(inputs, outputs))
    return None


@cache
def _operand(rows: int, columns: int) -> torch.Tensor:
    return torch.rand(rows, columns)


def encoder_model(kind: str) -> ModelProto:
    """The products of a layer: in ``float32``, as ``QuantizeLinear`` and its like (``onnxruntime``), or as our op."""
    random, step = np.random.default_rng(0), 0.02
    nodes: list[NodeProto] = []
    held: dict[str, np.ndarray] = {}
    if kind == "onnxruntime":
        held |= {"step": np.array(step, np.float32), "zero": np.array(-8, np.int8)}
    for place, (inputs, outputs) in enumerate(ENCODER):
        w, s, b, y = (f"{name}{place}" for name in "wsby")
        x, gelu = f"x{inputs}", outputs == 1536
        held[b] = random.random(outputs, np.float32)
        if kind == "float32":
            held[w] = random.random((inputs, outputs), np.float32)
        else:
            held[w] = random.integers(0, 256, (inputs, outputs), dtype=np.uint8)
            held[s] = random.random(outputs, np.float32) / 1000
        if kind == "own":
            more = {"activation": "gelu"} if gelu else {}
            node = helper.make_node(
                "Int8Linear", [x, w, s, b], [y], domain=cpu.DOMAIN, step=step, zero=120, **more
            )
            nodes.append(node)
            continue
        factors = [x, w]
        if kind == "onnxruntime":
            held[f"m{place}"] = np.full(outputs, 128, np.uint8)
            nodes += [
                helper.make_node("QuantizeLinear", [x, "step", "zero"], [f"q{place}"]),
                helper.make_node("DequantizeLinear", [f"q{place}", "step", "zero"], [f"r{place}"]),
                helper.make_node("DequantizeLinear", [w, s, f"m{place}"], [f"v{place}"], axis=1),
            ]
            factors = [f"r{place}", f"v{place}"]
        nodes.append(helper.make_node("MatMul", factors, [f"p{place}"]))
        nodes.append(helper.make_node("Add", [f"p{place}", b], [f"a{place}" if gelu else y]))
        if gelu:
            nodes.append(helper.make_node("Gelu", [f"a{place}"], [y]))
    given = [helper.make_tensor_value_info(f"x{n}", TensorProto.FLOAT, ["rows", n]) for n in (384, 1536)]
    made = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(len(ENCODER))]
    constants = [numpy_helper.from_array(array, name) for name, array in held.items()]
    graph = helper.make_graph(nodes, "encoder", given, made, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(cpu.DOMAIN, cpu.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def encoding(rounds: int, threads: int) -> Iterator[str]:
    """The table of encoders: the products of one layer of DINOv2-S, by kernel."""
    kinds = {
        "float32 | ONNX Runtime": ("float32", "plain"),
        "8 bits | ONNX Runtime": ("onnxruntime", "plain"),
    }
    kinds |= {f"8 bits | `{isa}`": ("own", isa) for isa in cpu.isas() if isa != "plain"}
    calls: dict[str, Callable[[], object]] = {}
    for name, (kind, isa) in kinds.items():
        session = opened(encoder_model(kind), isa, threads)
        for rows in TOKENS:
            feed = {f"x{n}": np.random.default_rng(1).random((rows, n), np.float32) for n in (384, 1536)}
            calls[f"{name} {rows}"] = lambda session=session, feed=feed: session.run(None, feed)
    found = least(calls, rounds, threads)
    yield "| products | kernel |" + "".join(f" {rows} rows, ms | float32 / this |" for rows in TOKENS)
    yield "|---" * (2 + 2 * len(TOKENS)) + "|"
    for name in kinds:
        times = [(found[f"{name} {rows}"], found[f"float32 | ONNX Runtime {rows}"]) for rows in TOKENS]
        yield f"| {name} |" + "".join(f" {own:.2f} | {wide / own:.2f} |" for own, wide in times)


def main() -> None:
    os.environ["MKL_ENABLE_INSTRUCTIONS"] = "AVX2"  # MKL reads it at its first product
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = "the thread's own time" if options.threads == 1 else "wall time"
    lines = [
        "# `QuantizedLinear`: all linears of SmolLM2-135M",
        "",
        f"Milliseconds (ratio to one row), {clock}, threads: {options.threads}. "
        "Made by `python -m benchmarks.cpu_kernels`.",
        "",
        *decoding(options.rounds, options.threads),
        "",
        "`amx_int8` is `avx512_vnni` up to eight rows. Float32 products use whatever the processor has; kernels "
        "of older instruction sets compete with it at a disadvantage that processors without newer ones do not have: "
        "the second line is float32 in MKL that is held to AVX2.",
        "",
        *reading(options.rounds, options.threads),
        "",
        "# `CachedAttention`: one layer of SmolLM2-135M, of as many layers in turn as it has",
        "",
        *attending(partial(least, rounds=options.rounds, threads=options.threads), options.threads),
        "",
        "# Attention of an encoder: one layer, by ONNX Runtime and by `CachedAttention` over an empty cache",
        "",
        *encoders_attending(partial(least, rounds=options.rounds, threads=options.threads), options.threads),
        "",
        "# `Int8Linear`: the products of a layer of DINOv2-S",
        "",
        *encoding(options.rounds, options.threads),
        "",
        "```json",
        json.dumps(describe(options.threads), indent=1),
        "```",
        "",
    ]
    write_atomically(RESULT, lambda path: path.write_text("\n".join(lines)))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
