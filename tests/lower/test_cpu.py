"""The form for tokopt's CPU kernels says what the portable one says, of the same bytes."""

from __future__ import annotations

import collections
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import tokopt
from tests.matrix import language
from tests.matrix.test_quantize import on_grid
from tokopt.errors import LoweringError
from tokopt.kernels import cpu
from tokopt.kernels.quantized_linear.reference import quantized_linear
from tokopt.lower.cpu import quantized_linear as lowering
from tokopt.lower.onnx.storage import Offset
from tokopt.lower.onnx.weights import put_initializer
from tokopt.runtime import Model, load
from tokopt.runtime.engines.onnxruntime import Sessions
from tokopt.runtime.format.manifest import ONE_ROW, PORTABLE, WITH_KERNELS
from tokopt.runtime.numerics import divergences, nmse

OWN = WITH_KERNELS[PORTABLE]

PIPELINES = {
    "rtn{group=32 symmetric=true}": set(),
    "rtn{group=32}": {"zero"},
    "rtn{group=32 bits=8}": {"zero"},
    "keep_grid": {"minimum"},
}
"""Pipeline -> the optional inputs of its products, the bias aside."""

every = pytest.mark.parametrize("pipeline", PIPELINES)
both = pytest.mark.parametrize("bias", [False, True])
built = pytest.mark.skipif(cpu.library() is None, reason="the CPU kernels are not built")


class Projections(nn.Module):
    """x [batch, tokens, 64] through two linears, and what follows through another; all weights lie on a Q4_1 grid."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.gate = (nn.Linear(64, out, bias=bias) for out in (128, 128))
        self.down = nn.Linear(128, 48, bias=bias)
        for seed, linear in enumerate((self.up, self.gate, self.down)):
            linear.weight.data = on_grid("Q4_1", *linear.weight.shape, seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.gate(x).sigmoid())


def bundle(pipeline: str, bias: bool = True) -> tokopt.Bundle:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64)
    return tokopt.optimize(tokopt.capture(Projections(bias), (x,)), pipeline, calibration=[x])


@cache
def artifact(pipeline: str, bias: bool = True) -> tuple[tokopt.Bundle, Path]:
    made = bundle(pipeline, bias)
    return made, tokopt.export(made, Path(mkdtemp()) / "model.tokopt")


def graph(path: Path, form: str) -> onnx.GraphProto:
    file = load(path, threads=1).manifest.programs["forward"].files[form]
    return onnx.load(path / file, load_external_data=False).graph


def places(found: onnx.GraphProto) -> dict[tuple[str, str], int]:
    """(offset, length) in the file of weights -> type, of the weights that are not written into the graph."""
    entries = {t.name: {e.key: e.value for e in t.external_data} for t in found.initializer}
    return {
        (entries[t.name]["offset"], entries[t.name]["length"]): t.data_type
        for t in found.initializer
        if entries[t.name]
    }


@every
@both
def test_products_with_all_that_belongs_to_them_are_one_op(pipeline: str, bias: bool) -> None:
    _, path = artifact(pipeline, bias)
    portable, own = (graph(path, form) for form in (PORTABLE, OWN))
    kinds = collections.Counter(node.op_type for node in own.node)
    assert kinds["QuantizedLinear"] == [node.op_type for node in portable.node].count("DequantizeLinear") == 2
    assert not {"MatMul", "AveragePool", "DequantizeLinear", "Transpose", "Add"} & set(kinds)
    for node in own.node:
        if node.domain == cpu.DOMAIN:
            names = dict(zip(("zero", "minimum", "bias"), node.input[3:], strict=False))
            assert {name for name, given in names.items() if given} == PIPELINES[pipeline] | (
                {"bias"} if bias else set()
            )


@every
def test_codes_are_in_the_artifact_once(pipeline: str) -> None:
    """What has 4 bits in the portable form are the op's bytes, at the same place."""
    _, path = artifact(pipeline)
    portable, own = (places(graph(path, form)) for form in (PORTABLE, OWN))
    codes = {place for place, kind in own.items() if kind == onnx.TensorProto.UINT8 and int(place[1]) > 2000}
    assert len(codes) == 2 and codes <= set(portable)
    four = "bits=8" not in pipeline
    assert {portable[place] for place in codes} == {
        onnx.TensorProto.UINT4 if four else onnx.TensorProto.UINT8
    }


@every
@both
def test_its_bodies_compute_the_program(pipeline: str, bias: bool) -> None:
    """In float32, without a library: a batch that export did not see."""
    made, path = artifact(pipeline, bias)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    sessions = Sessions(path, load(path).manifest, threads=1).in_float()
    (got,) = sessions.run("forward", {made.main.inputs[0].name: x.numpy()}, OWN).values()
    assert nmse(made(x)[0].numpy(), got) < 1e-11


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
}


class Gated(nn.Module):
    """x [batch, tokens, 64] through one linear, of whose halves one gates the other, as ``combine`` says."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.both, self.combine = nn.Linear(64, 128, bias=bias), combine
        self.both.weight.data = on_grid("Q4_1", 128, 64, seed=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(*self.both(x).chunk(2, dim=-1))


def exported(module: nn.Module, path: Path, pipeline: str = "keep_grid") -> tokopt.Bundle:
    x = torch.randn(2, 5, 64)
    made = tokopt.optimize(tokopt.capture(module, (x,)), pipeline, calibration=[x])
    tokopt.export(made, path)
    return made


@both
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gate_is_part_of_the_op(name: str, bias: bool, tmp_path: Path) -> None:
    """Its body computes the program; with the kernel, what differs is the rounding of activations."""
    made = exported(Gated(lambda gate, up: ACTIVATIONS[name](gate) * up, bias), tmp_path / "model.tokopt")
    path = tmp_path / "model.tokopt"
    (node,) = graph(path, OWN).node
    assert {a.name: a.s.decode() for a in node.attribute if a.s} == {"gate": name}
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    want, feed = made(x)[0].numpy(), {made.main.inputs[0].name: x.numpy()}
    sessions = Sessions(path, load(path).manifest, threads=1)
    (body,) = sessions.in_float().run("forward", feed, OWN).values()
    assert nmse(want, body) < 1e-11
    if cpu.library():
        (kernel,) = sessions.run("forward", feed, OWN).values()
        assert 1e-8 < nmse(want, kernel) < 1e-3


OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the second half gates": lambda gate, up: gate * nn.functional.silu(up),
    "another activation": lambda gate, up: gate.relu() * up,
    "the gate is read twice": lambda gate, up: nn.functional.silu(gate) * up + gate,
    "the other half is read twice": lambda gate, up: nn.functional.silu(gate) * up + up,
    "a sum": lambda gate, up: nn.functional.silu(gate) + up,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_gate_stays_beside_the_op(name: str, tmp_path: Path) -> None:
    made = exported(Gated(OTHERS[name]), tmp_path / "model.tokopt")
    path = tmp_path / "model.tokopt"
    found = graph(path, OWN)
    assert not any(a.name == "gate" for node in found.node for a in node.attribute)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    sessions = Sessions(path, load(path).manifest, threads=1).in_float()
    (body,) = sessions.run("forward", {made.main.inputs[0].name: x.numpy()}, OWN).values()
    assert nmse(made(x)[0].numpy(), body) < 1e-11


@built
@every
@both
def test_the_kernel_gets_the_operands_of_the_reference(pipeline: str, bias: bool) -> None:
    """One product: rounding of activations included, the kernel gives what the reference says of these constants."""
    torch.manual_seed(1)
    linear = nn.Sequential(nn.Linear(64, 24, bias=bias))
    linear[0].weight.data = on_grid("Q4_1", 24, 64, seed=3)
    x = torch.randn(2, 5, 64)
    made = tokopt.optimize(tokopt.capture(linear, (x,)), pipeline, calibration=[x])
    path = tokopt.export(made, Path(mkdtemp()) / "model.tokopt")
    model = load(path, threads=1)
    file = model.manifest.programs["forward"].files[OWN]
    found = onnx.load(path / file).graph
    held = {t.name: torch.from_numpy(np.array(numpy_helper.to_array(t))) for t in found.initializer}
    (node,) = (node for node in found.node if node.domain == cpu.DOMAIN)
    names = ("codes", "scale", "zero", "minimum", "bias")
    given: dict[str, Any] = {
        name: held[value] for name, value in zip(names, node.input[1:], strict=False) if value
    }
    given |= {a.name: a.i for a in node.attribute}
    wanted = quantized_linear(x.double(), **given)
    torch.testing.assert_close(torch.from_numpy(model(x.numpy())).double(), wanted, atol=1e-5, rtol=1e-5)
    assert nmse(wanted.numpy(), made(x)[0].double().numpy()) > 1e-8  # the rounding is seen


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [
        ("rtn{group=16}", "its weight has blocks of 16, not of 32, 64 or 128"),
    ],
)
def test_what_is_left_is_said_and_has_no_form(pipeline: str, reason: str, tmp_path: Path) -> None:
    lines: list[str] = []
    path = tokopt.export(bundle(pipeline), tmp_path / "model.tokopt", progress=lines.append)
    name = "forward: products with weights in blocks as one op of tokopt's CPU kernels: 0 of 2; left 2: "
    assert any(line.startswith(name + reason) for line in lines)
    model: Model = load(path, threads=1)
    assert model.manifest.programs["forward"].kernels is None
    assert str(model.kernels).startswith("none: the artifact has no products")


def test_a_program_in_float_has_no_other_form(tmp_path: Path) -> None:
    lines: list[str] = []
    path = tokopt.export(bundle(""), tmp_path / "model.tokopt", progress=lines.append)
    assert set(load(path).manifest.programs["forward"].files) == {PORTABLE}
    assert not any("CPU kernels" in line for line in lines)


@built
def test_a_language_model_takes_the_form_that_fits_its_rows_and_mask() -> None:
    model = language.artifact("llama", "rtn{group=32}")
    sessions, ids = model.sessions, np.array([language.prompt(4)])
    positions, rows = np.arange(4)[None], np.arange(4)
    both = ~np.eye(4, dtype=bool)[None] | np.eye(4, dtype=bool)
    found = {}
    for name, batch, mask in (("causal", 1, None), ("open", 1, both), ("rows", 2, None)):
        request = model.open(batch, 4)
        tokens, places = (array.repeat(batch, 0) for array in (ids, positions))
        made = request.step(tokens, places, rows, mask=mask).logits
        assert made is not None
        bound = getattr(request.program, "bound", request.program)
        form = WITH_KERNELS[ONE_ROW if name == "causal" else PORTABLE]
        assert bound.session is sessions.get("step", form)
        found[name] = made[0].copy()
    np.testing.assert_allclose(found["rows"], found["causal"], atol=1e-4)  # the same rounding, by either form
    plain = load(model.path, threads=1, kernels=False).open(1, 4).step(ids, positions, rows).logits
    assert divergences(plain[0], found["causal"]).max() < 1e-3


def test_a_wrong_operand_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Were the minima forgotten, export would say so."""

    def zeros(graph: Any, offset: Offset) -> Any:
        nothing = np.zeros(offset.blocks.scales().shape, np.float16)
        return put_initializer(graph, f"{offset.table.name}_none", nothing)

    monkeypatch.setattr(lowering, "_minimum", zeros)
    with pytest.raises(LoweringError, match="differs between ONNX Runtime and the exported program"):
        tokopt.export(bundle("keep_grid"), tmp_path / "model.tokopt")
