"""DINOv2 ViT-S/14 at 224 px on every engine: class features, and seconds per batch.

A peer gets the model as its users would give it: torch the module, ONNX Runtime and OpenVINO the plain export of
``torch.onnx.export``, int8 by each engine's own tool (``quantize_dynamic``; nncf calibrated on the photographs of even
places). tokopt's artifacts run on ONNX Runtime and on OpenVINO. Fidelity is the cosine to torch's float32 features on
the photographs of odd places.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import has_bfloat16
from benchmarks.timing import Engine
from examples.data import class_feature, dinov2_small, photograph_views, write_atomically
from tokopt.runtime.numerics import cosines

Images = NDArray[np.float32]
SIZE = 224
BATCHES = (1, 8)

PEERS: Mapping[str, tuple[str, str]] = {
    "torch": ("torch", ""),
    "torch, bfloat16": ("torch-bf16", ""),
    "torch.compile": ("torch-compile", ""),
    "ONNX Runtime": ("onnxruntime", "plain.onnx"),
    "ONNX Runtime, int8 dynamic": ("onnxruntime", "dynamic.onnx"),
    "OpenVINO": ("openvino-f32", "plain.onnx"),
    "OpenVINO, bfloat16": ("openvino-bf16", "plain.onnx"),
    "OpenVINO, int8 (nncf)": ("openvino-f32", "nncf.xml"),
    "OpenVINO, int8 (nncf), bfloat16": ("openvino-bf16", "nncf.xml"),
}
"""Name in the tables -> kind of engine, and the file it reads."""

_STATIC = "smoothquant,int8{activations=static}"
PIPELINES = (
    "",
    _STATIC,
    *(f"tome{{r={r}}},{_STATIC}" for r in (8, 12, 16)),
    "tome{r=16},int8",
)
ENGINES: Mapping[str, str] = {
    "ONNX Runtime": "tokopt",
    "ONNX Runtime, kernels held to AVX2": "tokopt-avx2",
    "OpenVINO": "tokopt-openvino",
    "OpenVINO, bfloat16": "tokopt-openvino-bf16",
}
"""What executes tokopt's artifacts."""


def engines(folder: Path, batch: int, threads: int) -> dict[str, Engine]:
    """Every engine by its name; the first is what the others are compared with."""
    made = {
        name: Engine(name, kind, folder / file, batch, SIZE, threads) for name, (kind, file) in PEERS.items()
    }
    for pipeline in PIPELINES:
        for engine, kind in ENGINES.items():
            name = f"tokopt `{pipeline}`, {engine}" if pipeline else f"tokopt, {engine}"
            path = folder / f"{pipeline or 'float32'}.tokopt"
            made[name] = Engine(name, kind, path, batch, SIZE, threads)
    return made


def prepare(folder: Path) -> None:
    """Every file that an engine reads, once."""
    import torch

    import tokopt

    folder.mkdir(parents=True, exist_ok=True)
    views = photograph_views(SIZE)
    model = class_feature(dinov2_small(SIZE))
    example = torch.from_numpy(views[:2])
    _once(folder / "plain.onnx", lambda path: _export_plain(model, example, path))
    _once(folder / "dynamic.onnx", lambda path: _quantize_dynamic(folder / "plain.onnx", path))
    with contextlib.suppress(ImportError):
        _once(folder / "nncf.xml", lambda path: _quantize_nncf(folder / "plain.onnx", views[::2], path))
    missing = [p for p in PIPELINES if not (folder / f"{p or 'float32'}.tokopt").exists()]
    if missing:
        bundle = tokopt.capture(model, (example,))
        for pipeline in missing:
            made = tokopt.optimize(bundle, pipeline, calibration=[view[None] for view in views[::2]])
            tokopt.export(made, folder / f"{pipeline or 'float32'}.tokopt")


def _once(path: Path, make: Callable[[Path], object]) -> None:
    if not path.exists():
        make(path)


def _export_plain(model: Any, example: Any, path: Path) -> None:
    import torch

    program = torch.onnx.export(
        model,
        (example,),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        opset_version=20,
        verbose=False,
    )
    assert program is not None
    program.save(path)


def _quantize_dynamic(plain: Path, path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(plain, path, op_types_to_quantize=["MatMul", "Gemm"])


def _quantize_nncf(plain: Path, images: Images, path: Path) -> None:
    import openvino

    nncf: Any = importlib.import_module("nncf")

    model = openvino.Core().read_model(plain)
    quantized = nncf.quantize(
        model, nncf.Dataset([image[None] for image in images]), model_type=nncf.ModelType.TRANSFORMER
    )
    openvino.save_model(quantized, path, compress_to_fp16=False)


# --- engines ----------------------------------------------------------------------------------------------


def call(engine: Engine) -> Callable[[], object]:
    """What is timed: one batch of photographs."""
    views = photograph_views(SIZE)
    run, images = runner(engine), np.ascontiguousarray(views[np.arange(engine.batch) % len(views)])
    return lambda: run(images)


def runner(engine: Engine) -> Callable[[Images], Images]:
    """Images [batch, 3, side, side] to features [batch, channels]."""
    makers: dict[str, Callable[[Engine], Callable[[Images], Images]]] = {
        "torch": lambda e: _torch(e),
        "torch-bf16": lambda e: _torch(e, "bfloat16"),
        "torch-compile": lambda e: _torch(e, compiled=True),
        "onnxruntime": _onnxruntime,
        "openvino-f32": lambda e: _openvino(e, "f32"),
        "openvino-bf16": lambda e: _openvino(e, "bf16"),
        "tokopt": lambda e: _tokopt(e, "onnxruntime"),
        "tokopt-avx2": _held_to_avx2,
        "tokopt-openvino": lambda e: _tokopt(e, "openvino"),
        "tokopt-openvino-bf16": lambda e: _tokopt(e, ("openvino", {"INFERENCE_PRECISION_HINT": "bf16"})),
    }
    return makers[engine.kind](engine)


def _torch(engine: Engine, dtype: str = "float32", compiled: bool = False) -> Callable[[Images], Images]:
    import torch

    _check_precision(dtype)
    torch.set_num_threads(engine.threads)
    model: Any = class_feature(dinov2_small(SIZE)).to(getattr(torch, dtype))
    model = torch.compile(model) if compiled else model

    @torch.no_grad()
    def run(images: Images) -> Images:
        return model(torch.from_numpy(images).to(getattr(torch, dtype))).float().numpy()

    return run


def _onnxruntime(engine: Engine) -> Callable[[Images], Images]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = engine.threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(engine.artifact, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: np.asarray(session.run(None, {name: images})[0])


def _openvino(engine: Engine, precision: str) -> Callable[[Images], Images]:
    import openvino

    _check_precision(precision)
    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": engine.threads,
    }
    request = core.compile_model(core.read_model(engine.artifact), "CPU", settings).create_infer_request()
    return lambda images: request.infer({0: images}, share_inputs=True)[0].copy()


def _check_precision(precision: str) -> None:
    """Raise for bfloat16 where the processor has none."""
    if precision in ("bf16", "bfloat16") and not has_bfloat16():
        raise RuntimeError("this processor has no bfloat16")


def _tokopt(engine: Engine, backend: Any) -> Callable[[Images], Images]:
    from tokopt.runtime import load

    _check_precision("f32" if isinstance(backend, str) else backend[1]["INFERENCE_PRECISION_HINT"])
    return load(engine.artifact, backend=backend, threads=engine.threads)


def _held_to_avx2(engine: Engine) -> Callable[[Images], Images]:
    """tokopt's own kernels as on an older processor; ONNX Runtime's use what there is, as peers do."""
    with patch.dict(os.environ, {"TOKOPT_ISA": "avx2"}):
        return _tokopt(engine, "onnxruntime")


# --- fidelity ---------------------------------------------------------------------------------------------


def reference(folder: Path) -> Images:
    """Features of the photographs that are judged, by torch in float32, kept."""
    path = folder / "features.npy"
    if not path.exists():
        features = _features(Engine("torch", "torch", folder, 1, SIZE, 2))
        write_atomically(path, lambda temporary: np.save(temporary.with_suffix(".npy"), features))
    return np.load(path)


def fidelity(engine: Engine, wanted: Images) -> dict[str, float]:
    """Mean and smallest cosine to the wanted features."""
    got = _features(engine)
    similar = cosines(wanted, got)
    return {"cosine": float(similar.mean()), "smallest": float(similar.min())}


def _features(engine: Engine) -> Images:
    run = runner(engine)
    return np.concatenate([run(np.ascontiguousarray(view[None])) for view in photograph_views(SIZE)[1::2]])
