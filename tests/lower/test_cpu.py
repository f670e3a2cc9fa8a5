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
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import tokopt
from tests.matrix import language
from tests.matrix.test_quantize import on_grid
from tests.zoo.decoders import DECODERS
from tokopt.errors import LoweringError
from tokopt.kernels import cpu
from tokopt.kernels.quantized_linear.reference import quantized_linear
from tokopt.lower.cpu import quantized_linear as lowering
from tokopt.lower.cpu.cached_attention import CachedAttention
from tokopt.lower.onnx.storage import Offset
from tokopt.lower.onnx.weights import put_initializer
from tokopt.runtime import LanguageModel, Model, load
from tokopt.runtime.buffers import Bound
from tokopt.runtime.engines.onnxruntime import Sessions
from tokopt.runtime.format.manifest import ONE_ROW, OWN, PORTABLE
from tokopt.runtime.numerics import divergences, nmse

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
    assert str(model.kernels).startswith(
        "none: the artifact has no attention, draw or product that they compute"
    )


def test_a_program_in_float_has_no_other_form(tmp_path: Path) -> None:
    lines: list[str] = []
    path = tokopt.export(bundle(""), tmp_path / "model.tokopt", progress=lines.append)
    assert set(load(path).manifest.programs["forward"].files) == {PORTABLE}
    assert not any("CPU kernels" in line for line in lines)


decoders = pytest.mark.parametrize("name", DECODERS)


def operators(model: LanguageModel, form: str) -> collections.Counter[str]:
    file = model.path / model.manifest.programs["step"].files[form]
    return collections.Counter(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)


@decoders
def test_every_attention_over_a_cache_is_one_op(name: str) -> None:
    """It writes the cache too: what is written beside it are the positions of the slots."""
    model = language.artifact(name)
    portable, own = (operators(model, form) for form in (PORTABLE, OWN))
    assert own["CachedAttention"] == portable["Attention"] > 0
    assert (own["Attention"], own["cache_write"]) == (0, 1)
    some = name in ("gpt_neox", "phi")  # which rotate some of their channels
    assert own["RotaryEmbedding"] == (portable["RotaryEmbedding"] if some else 0)


@decoders
@pytest.mark.parametrize("mask", ["causal", "open", "rows"])
def test_its_bodies_compute_attention(name: str, mask: str) -> None:
    """In float32, without a library, in place: rows that begin at other slots, and a mask that shows later tokens."""
    model = language.artifact(name)
    entry = model.manifest.programs["step"]
    batch = 3 if mask == "rows" else 1
    request = model.open(batch, 16)
    before = dict(request.buffers.values)
    feed = {name: np.array(value.numpy()) for name, value in before.items()}
    roles = {spec.role: spec.name for spec in entry.inputs}
    feed[roles["tokens"]] = np.array([language.prompt(4)] * batch)
    feed[roles["positions"]] = np.tile(np.arange(4), (batch, 1))
    feed[roles["mask"]] = np.tril(np.ones((batch, 4, 4), bool)) | (mask == "open")
    feed[roles["rows"]] = np.arange(4)
    feed["length"] = np.arange(batch)
    in_float = model.sessions.in_float()
    assert in_float is not None
    found = [in_float.run("step", feed, form) for form in (PORTABLE, OWN)]
    for name, wanted in found[0].items():
        assert nmse(wanted, found[1][name]) < 1e-10, name


@built
@decoders
def test_the_kernels_compute_what_the_portable_form_does(name: str) -> None:
    """A prompt in two parts, then one token at a time, alone and in a batch with padding."""
    path = language.artifact(name).path
    own, plain = (load(path, threads=1, kernels=wanted) for wanted in (True, False))
    texts = [language.prompt(13), language.prompt(9, seed=1)]
    assert own.sessions.forms("step") == (PORTABLE, ONE_ROW, OWN)
    assert own.generate(texts, max_tokens=12) == plain.generate(texts, max_tokens=12)
    assert own.generate(texts[0], max_tokens=12) == plain.generate(texts[0], max_tokens=12)


@built
@pytest.mark.parametrize(
    "passes", ["streaming{budget=8}", "h2o{budget=8}", "h2o{budget=8 heads=false},int8_kv", "int8_kv", "kivi"]
)
def test_passes_before_it_compose(passes: str) -> None:
    """Kernels and portable form generate the same from what a pass left."""
    samples = [language.prompt(20, seed=i) for i in range(3)]
    made = tokopt.optimize(language.bundle("llama"), passes, calibration=samples)
    path = tokopt.export(made, Path(mkdtemp()) / "model.tokopt", target="onnx")
    own, plain = (load(path, threads=1, kernels=wanted) for wanted in (True, False))
    assert "CachedAttention" in operators(own, OWN) or passes == "kivi"
    ids = [language.prompt(20), language.prompt(26, seed=2)]
    assert own.generate(ids, max_tokens=12) == plain.generate(ids, max_tokens=12)


@built
def test_a_language_model_takes_its_own_kernels_for_any_rows_and_mask() -> None:
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
        assert isinstance(request.program, Bound) and request.program.session is sessions.get("step", OWN)
        found[name] = made[0].copy()
    np.testing.assert_allclose(found["rows"], found["causal"], atol=1e-4)  # the same rounding
    plain = load(model.path, threads=1, kernels=False).open(1, 4).step(ids, positions, rows).logits
    assert divergences(plain[0], found["causal"]).max() < 1e-3


def test_a_wrong_mask_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Were the masks dropped, export would say so."""
    node = CachedAttention.node

    def open_node(self: CachedAttention, graph: Any, site: Any, parts: Any, rotation: Any) -> Any:
        made = node(self, graph, site, parts, rotation)
        every = ir.node("Or", [site.mask, site.mask])
        every.outputs[0].name = f"open_{site.keys.write.outputs[0].name}"
        hidden = ir.node("Not", [site.mask])
        hidden.outputs[0].name = f"hidden_{site.keys.write.outputs[0].name}"
        every.replace_input_with(1, hidden.outputs[0])
        graph.insert_before(site.place, [hidden, every])
        made.replace_input_with(6, every.outputs[0])
        return made

    monkeypatch.setattr(CachedAttention, "node", open_node)
    with pytest.raises(LoweringError, match="differs between ONNX Runtime and the exported program"):
        tokopt.export(language.bundle("llama"), tmp_path / "model.tokopt")


def test_a_wrong_operand_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Were the minima forgotten, export would say so."""

    def zeros(graph: Any, offset: Offset) -> Any:
        nothing = np.zeros(offset.blocks.scales().shape, np.float16)
        return put_initializer(graph, f"{offset.table.name}_none", nothing)

    monkeypatch.setattr(lowering, "_minimum", zeros)
    with pytest.raises(LoweringError, match="differs between ONNX Runtime and the exported program"):
        tokopt.export(bundle("keep_grid"), tmp_path / "model.tokopt")
