"""Backends agree: what a reduced program computes, its artifact computes, on every architecture and engine.

``tokopt.export`` itself compares ONNX Runtime with the program on the example, at the smallest size of every named
axis and one below the example's; here the artifact is loaded as a user would and run on other inputs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tokopt
from tests.matrix.test_matrix import PASSES, assert_close, captured, refusal, text_for
from tests.zoo import ZOO
from tokopt import Bundle, EngineOptions
from tokopt.errors import ArtifactError, LoweringError
from tokopt.lower.tensorrt.engine import EngineBuilder
from tokopt.runtime import load

import torch  # isort: skip


EXECUTED = ("onnxruntime", "openvino")
"""The backends that need no GPU; for the third, the engine is built and not executed."""

LOOPS = ("divprune", "kcenter")
"""Choosing one token after another is a Loop, in whose body OpenVINO does not know the rank of what it carries, and on
which TensorRT's builder crashes."""


BUILT = ("vit", "clip", "mae", "swin", "roberta", "minilm", "modernbert", "deit")
"""Models of which TensorRT builds an engine, which takes it a second: together they have every operator of the zoo's
graphs, and each but the last has one that no other of these has. A builder sees no more of an architecture."""


def openvino_refuses(method: str, inputs: dict[str, torch.Tensor]) -> str | None:
    """The reason, or None when it must compute the same."""
    if not all(value.is_floating_point() for value in inputs.values()):
        return "OpenVINO orders equal scores arbitrarily"
    return "OpenVINO .* cannot read" if method in LOOPS else None


def check_engine(method: str, bundle: Bundle, path: Path) -> None:
    """TensorRT builds an engine of the artifact's ONNX file, or refuses it."""
    builder = EngineBuilder(bundle, EngineOptions("sm_86"))
    if method in LOOPS:
        with pytest.raises(LoweringError, match=r"farthest_point.* is a Loop"):
            builder.build(path / "forward.onnx", "forward", check=False, tolerance=None)
        return
    engine, _ = builder.build(path / "forward.onnx", "forward", check=False, tolerance=None)
    assert engine.stat().st_size > 100_000


def check(method: str, name: str, folder: Path) -> None:
    entry = ZOO[name]
    bundle = tokopt.optimize(captured(name), text_for(method, entry))
    path = tokopt.export(bundle, folder / f"{name}.tokopt")
    if name in BUILT:
        check_engine(method, bundle, path)
    inputs = entry.inputs(batch=4)
    wanted = bundle(*inputs.values())
    for backend in EXECUTED:
        reason = openvino_refuses(method, inputs) if backend == "openvino" else None
        if reason is not None:
            with pytest.raises(ArtifactError, match=reason + ".*; run it with the default backend"):
                load(path, backend=backend)
            continue
        got = load(path, backend=backend).run(**{key: value.numpy() for key, value in inputs.items()})
        for spec, expected in zip(bundle.main.outputs, wanted, strict=True):
            assert_close(entry, inputs, torch.from_numpy(np.asarray(got[spec.name])), expected)


@pytest.mark.parametrize("name", list(ZOO))
def test_merged_artifact_equals_program(name: str, tmp_path: Path) -> None:
    check("tome", name, tmp_path)


@pytest.mark.parametrize("name", ["deit", "roberta"])
@pytest.mark.parametrize("method", [m for m in PASSES if m != "tome"])
def test_every_pass_has_an_onnx_form(method: str, name: str, tmp_path: Path) -> None:
    if refusal(ZOO[name], method, ZOO[name].prefix) is None:
        check(method, name, tmp_path)
