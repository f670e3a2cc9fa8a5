"""Products of bytes in the form for tokopt's CPU kernels: one op each, which computes what the portable form says."""

from __future__ import annotations

import collections
import itertools
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import tokopt
from tokopt.errors import LoweringError
from tokopt.kernels import cpu
from tokopt.kernels.int8_linear.reference import Grid, int8_linear
from tokopt.lower.cpu import int8_linear as lowering
from tokopt.lower.parity import check
from tokopt.runtime import load
from tokopt.runtime.engines.onnxruntime import Sessions
from tokopt.runtime.format.manifest import OWN, PORTABLE
from tokopt.runtime.numerics import OutputCheck, nmse

MODES = {"dynamic": "int8", "static": "smoothquant,int8{activations=static}"}

modes = pytest.mark.parametrize("mode", MODES)
built = pytest.mark.skipif(cpu.library() is None, reason="the CPU kernels are not built")


class Block(nn.Module):
    """x [batch, tokens, 64] through a norm, two linears beside each other, GELU of one kind, and a linear."""

    def __init__(self, approximate: str, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(64)
        self.up, self.gate = (nn.Linear(64, 128, bias=bias) for _ in range(2))
        self.down = nn.Linear(128, 48, bias=bias)
        self.gelu, self.last = nn.GELU(approximate), nn.Linear(48, 40, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.last(self.gelu(self.down(self.up(x) * self.gate(x).sigmoid())))


def example(seed: int = 0) -> Tensor:
    return torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(seed))


@cache
def artifact(mode: str, approximate: str = "none", bias: bool = True) -> tuple[tokopt.Bundle, Path]:
    captured = tokopt.capture(Block(approximate, bias), (example(),))
    made = tokopt.optimize(captured, MODES[mode], calibration=[example(seed) for seed in (1, 2)])
    return made, tokopt.export(made, Path(mkdtemp()) / "model.tokopt")


def file(path: Path, form: str) -> onnx.ModelProto:
    return onnx.load(path / load(path, threads=1).manifest.programs["forward"].files[form])


@modes
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_products_with_all_that_belongs_to_them_are_one_op(mode: str, approximate: str, bias: bool) -> None:
    """Rounding, the bias and GELU go into it; what is left is the norm, the gate and the split."""
    _, path = artifact(mode, approximate, bias)
    kinds = collections.Counter(node.op_type for node in file(path, OWN).graph.node)
    assert kinds == {"LayerNormalization": 1, "Int8Linear": 3, "Split": 1, "Sigmoid": 1, "Mul": 1}
    nodes = [node for node in file(path, OWN).graph.node if node.domain == cpu.DOMAIN]
    names = [{a.name: a.s.decode() if a.s else a.i or a.f for a in node.attribute} for node in nodes]
    assert [len(node.input) for node in nodes] == [4 if bias else 3] * 3
    assert [{"step", "zero"} <= set(given) for given in names] == [mode == "static"] * 3
    gelu = "gelu" if approximate == "none" else "gelu_tanh"
    assert [given.get("activation", "") for given in names] == ["", gelu, ""]


@modes
def test_codes_are_in_the_artifact_once(mode: str) -> None:
    _, path = artifact(mode)
    graphs = [
        onnx.load(path / load(path).manifest.programs["forward"].files[form], load_external_data=False).graph
        for form in (PORTABLE, OWN)
    ]
    portable, own = (
        {
            tuple(entry.value for entry in t.external_data if entry.key in ("offset", "length"))
            for t in graph.initializer
            if t.data_type == onnx.TensorProto.UINT8 and len(t.dims) == 2
        }
        for graph in graphs
    )
    assert own == portable and len(own) == 3


@modes
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_its_bodies_compute_the_program(mode: str, approximate: str) -> None:
    """Without a library: a batch that export did not see."""
    made, path = artifact(mode, approximate)
    x = torch.cat([example(3), example(4)[:1]])
    sessions = Sessions(path, load(path).manifest, threads=1).in_float()
    (got,) = sessions.run("forward", {made.main.inputs[0].name: x.numpy()}, OWN).values()
    assert nmse(made(x)[0].numpy(), got) < 1e-6  # a number between two codes may go to either


@built
@modes
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_kernel_computes_the_portable_form(mode: str, approximate: str) -> None:
    _, path = artifact(mode, approximate)
    x = example(3).numpy()
    want, got = (load(path, threads=1, kernels=kernels)(x) for kernels in (False, True))
    assert nmse(want, got) < 1e-6  # a number between two codes may go to either


@built
@modes
def test_the_kernel_gets_the_operands_of_the_reference(mode: str) -> None:
    """One product: the kernel gives what the reference says of the constants and attributes in the file."""
    linear = nn.Sequential(nn.Linear(64, 24))
    captured = tokopt.capture(linear, (example(),))
    made = tokopt.optimize(captured, MODES[mode], calibration=[example(1)])
    path = tokopt.export(made, Path(mkdtemp()) / "model.tokopt")
    graph = file(path, OWN).graph
    held = {t.name: torch.from_numpy(np.array(numpy_helper.to_array(t))) for t in graph.initializer}
    (node,) = (node for node in graph.node if node.domain == cpu.DOMAIN)
    given: dict[str, Any] = {
        name: held[value] for name, value in zip(("codes", "scale", "bias"), node.input[1:], strict=True)
    }
    said = {a.name: a for a in node.attribute}
    grid = Grid(said["step"].f, said["zero"].i) if said else None
    x = example(3)
    wanted = int8_linear(x.double(), **given, grid=grid)
    got = load(path, threads=1)(x.numpy())
    assert nmse(wanted.float().numpy(), got) < 1e-11
    assert nmse(wanted.float().numpy(), made(x)[0].numpy()) < 1e-11
    assert nmse(linear(x).detach().numpy(), got) > 1e-8  # the rounding is seen


def test_weights_alone_in_8_bits_are_left(tmp_path: Path) -> None:
    """A weight with one scale per output, and activations that nobody rounds."""
    lines: list[str] = []
    captured = tokopt.capture(nn.Sequential(nn.Linear(64, 24)), (example(),))
    made = tokopt.optimize(captured, "rtn{bits=8 group=64}")
    path = tokopt.export(made, tmp_path / "model.tokopt", progress=lines.append)
    name = f"forward: {lowering.Int8Linear.name}: 0 of 1; left 1: "
    assert any(line.startswith(name) for line in lines)
    assert load(path, threads=1).manifest.programs["forward"].kernels is None


def test_a_wrong_grid_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Were the zero point forgotten, export would say so."""
    made, _ = artifact("static")
    monkeypatch.setattr(lowering, "MIDDLE", 96)
    monkeypatch.setattr(lowering, "_check_weight", lambda product: None)
    with pytest.raises(LoweringError, match="fake_quantize chooses differently for 896 of 896"):
        tokopt.export(made, tmp_path / "model.tokopt")


class ClassFeature(nn.Module):
    """The first token alone, so that the last block narrows what it rounds to one token for queries."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).last_hidden_state[:, 0]


@built
def test_a_class_feature_with_merged_tokens_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Roundings of all tokens and of one, in whichever order products read them, are compared with the program's.

    A cleanup narrows the last block; before and after it the same tokens have to merge. The first comparison of every
    file is made to fail, as it does in large models, so that all are compared under equal selections.
    """
    compare, calls = check._faults, itertools.count()

    def fails_at_first(*given: Any) -> dict[str, OutputCheck]:
        other = {"other": OutputCheck("other", 1.0, 0.0)}
        return other if next(calls) % 2 == 0 else compare(*given)

    monkeypatch.setattr(check, "_faults", fails_at_first)
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=96,
        image_size=64,
        patch_size=8,
    )
    model = ClassFeature(ViTModel(config, add_pooling_layer=False).eval())
    images = [torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    bundle = tokopt.capture(model, (images[0],))
    made = tokopt.optimize(bundle, "tome{r=6}," + MODES["static"], calibration=images[1:])
    path = tokopt.export(made, tmp_path / "feature.tokopt")
    assert OWN in load(path, threads=1).manifest.programs["forward"].files
    assert tokopt.verify(path).ok
