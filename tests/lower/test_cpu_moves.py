"""Programs that speculate move the entries of a cache by one op of the CPU kernels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import tokopt
from tests.matrix import language
from tokopt.kernels import attach_functions, cpu, ops
from tokopt.lower.onnx.translate import translate
from tokopt.lower.tensorrt.graph import rewrite_for_tensorrt
from tokopt.runtime.format.manifest import OWN, read_manifest

TREE = "speculate{drafter=hybrid}"
"""Of a chain nothing has to be moved."""


@pytest.mark.parametrize(("passes", "dtype"), [(TREE, "float32"), (f"int8_kv,{TREE}", "int8")])
def test_every_cache_is_moved_by_one_op(passes: str, dtype: str, tmp_path: Path) -> None:
    """The file holds its body, and nothing else moves entries."""
    bundle = tokopt.optimize(language.bundle("llama"), passes, calibration=[language.prompt(24)])
    path = tokopt.export(bundle, tmp_path / "model.tokopt", target="onnx")
    manifest = read_manifest(path)
    caches = [state for state in manifest.states if state.kind in ("key", "value")]
    assert {state.dtype for state in caches} == {dtype}
    model = ir.load(path / manifest.programs["speculate"].files[OWN])
    kinds = Counter((node.domain, node.op_type) for node in model.graph)
    assert kinds[cpu.DOMAIN, "MoveEntries"] == len(caches)
    assert not kinds["tokopt", "move_entries"] and kinds["tokopt", "cache_write"] == 2  # of the positions
    bodies = {function.name for function in model.functions.values()}
    assert "MoveEntries" in bodies and "move_entries" not in bodies


def test_a_chain_moves_nothing(tmp_path: Path) -> None:
    """What is proposed one token after another lies where it belongs; of the positions alone two writes remain."""
    bundle = tokopt.optimize(language.bundle("llama"), "speculate")
    path = tokopt.export(bundle, tmp_path / "model.tokopt", target="onnx")
    program = read_manifest(path).programs["speculate"]
    kinds = {(node.domain, node.op_type) for node in ir.load(path / program.files[OWN]).graph}
    assert not {(cpu.DOMAIN, "MoveEntries"), ("tokopt", "move_entries")} & kinds
    assert [tensor.name for tensor in program.outputs if tensor.role == "written"] == ["proposed_slots"]


class Moving(torch.nn.Module):
    def forward(self, cache: torch.Tensor, path: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        return ops.move_entries(cache, path, length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_tensorrt_moves_by_index(dtype: torch.dtype) -> None:
    """It takes ``TensorScatter`` for an input alone, and for floats."""
    cache = torch.arange(96).reshape(2, 2, 6, 4).to(dtype)
    given = (cache, torch.tensor([[0, 2, 1], [0, 1, 3]]), torch.tensor([1, 2]))
    exported = torch.export.export(Moving(), given)
    model = translate(exported, 23)
    attach_functions(model)
    rewrite_for_tensorrt(model, {})
    kinds = {node.op_type for node in model.graph}
    assert "ScatterElements" in kinds and not {"TensorScatter", "move_entries"} & kinds
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    (got,) = session.run(None, dict(zip(names, (x.numpy() for x in given), strict=True)))
    np.testing.assert_array_equal(got, Moving()(*given).numpy())
