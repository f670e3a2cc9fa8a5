"""What the machine can do, how far a decoding step is from it, and where the step's time goes."""

from __future__ import annotations

import collections
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 0.5
"""How long each rate is measured for."""


def rates(threads: int) -> dict[str, float]:
    """Bytes per second read from memory, and multiplications per second in float32 and int8."""
    import torch

    torch.set_num_threads(threads)
    large = torch.ones(2**27)  # 512 MiB: no cache holds it
    x = torch.randn(1536, 1536)
    return {
        "read, GB/s": 4 * large.numel() / _fastest(lambda: large.sum()) / 1e9,
        "float32 products, G/s": x.shape[0] ** 3 / _fastest(lambda: x @ x) / 1e9,
        "int8 products, G/s": 1536**3 / _fastest(_int8_product(1536, threads)) / 1e9,
    }


def _int8_product(size: int, threads: int) -> Callable[[], object]:
    import onnx
    import onnxruntime

    node = onnx.helper.make_node("MatMulInteger", ["a", "b"], ["c"])
    weight = onnx.numpy_helper.from_array(np.ones((size, size), np.int8), "b")
    make = onnx.helper.make_tensor_value_info
    a = make("a", onnx.TensorProto.UINT8, [size, size])
    c = make("c", onnx.TensorProto.INT32, [size, size])
    graph = onnx.helper.make_graph([node], "product", [a], [c], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    feed = {"a": np.ones((size, size), np.uint8)}
    return lambda: session.run(None, feed)


def _fastest(call: Callable[[], object]) -> float:
    call()
    times, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def step_bytes(artifact: Path, prompt: int) -> int:
    """Bytes that a step after so many tokens has to read: the weights without the embedding table, and the cache."""
    from tokopt.runtime.format.manifest import read_manifest

    manifest = read_manifest(artifact)
    weights = (artifact / "weights.data").stat().st_size - embedding_bytes(artifact)
    cache = 0
    for state in manifest.states:
        if state.kind in ("key", "value"):
            sizes = [1 if a == "batch" else prompt if isinstance(a, str) else a for a in state.axes]
            cache += int(np.prod(sizes)) * np.dtype(state.dtype).itemsize
    return weights + cache


def embedding_bytes(artifact: Path) -> int:
    """Bytes of the table that Gather alone reads; a tied one is read whole, by the last product."""
    import onnx

    graph = onnx.load(artifact / "step.onnx", load_external_data=False).graph
    readers = collections.defaultdict(set)
    for node in graph.node:
        for name in node.input:
            readers[name].add(node.op_type)
    tables = [t for t in graph.initializer if readers[t.name] == {"Gather"} and len(t.dims) == 2]
    return sum(int(np.prod(table.dims)) * 4 for table in tables)


def step_profile(artifact: Path, prompt: int, threads: int) -> dict[str, float]:
    """Milliseconds of a step by operator, the longest first, as ONNX Runtime's profiler counts them."""
    import onnxruntime

    from tokopt.runtime.buffers import Bound, Buffers
    from tokopt.runtime.engines.onnxruntime import ACTIVATIONS
    from tokopt.runtime.format.manifest import read_manifest

    manifest, steps = read_manifest(artifact), 30
    entry = manifest.programs["step"]
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.add_session_config_entry(*ACTIVATIONS)
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        file = artifact / entry.files.get("onnxruntime", entry.files["onnx"])
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        program = Bound(session, entry, Buffers(manifest.states, 1, prompt + steps))
        _advance(program, np.zeros((1, prompt), np.int64), 0)
        for i in range(steps):
            _advance(program, np.zeros((1, 1), np.int64), prompt + i)
        events = json.loads(Path(session.end_profiling()).read_text())
    return _by_operator(events, steps)


def _advance(program: Any, tokens: np.ndarray, start: int) -> None:
    count = tokens.shape[1]
    program.run(
        {
            "tokens": tokens,
            "positions": start + np.arange(count)[None],
            "mask": np.tril(np.ones((1, count, count), bool)),
            "rows": np.array([-1]),
        }
    )


def _by_operator(events: list[dict[str, Any]], steps: int) -> dict[str, float]:
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("kernel_time")]
    per_step = len(kernels) // (steps + 1)
    last = kernels[-per_step * (steps // 2) :]
    spent: collections.Counter[str] = collections.Counter()
    for event in last:
        spent[event["args"]["op_name"]] += event["dur"] / 1e3 / (steps // 2)
    return dict(spent.most_common(8))
