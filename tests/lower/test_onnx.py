"""The ONNX form: portable, small, named as the signature says, and equal to the exported program."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import tokopt
from tests.lower.encoders import text, vision
from tokopt.errors import LoweringError
from tokopt.ir.graph import is_call, results
from tokopt.ir.program import Program
from tokopt.lower.onnx.export import OPSET, WeightFile, expand_masks, lower
from tokopt.lower.parity.check import check_parity, resized_examples
from tokopt.rewrite.edit import call, close_graph, open_graph


def run(path: Path, *arrays: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {value.name: array for value, array in zip(session.get_inputs(), arrays, strict=True)}
    return [np.asarray(value) for value in session.run(None, feed)]


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


@pytest.mark.parametrize("bundle", [vision, text])
def test_equals_the_program_at_other_sizes(bundle, tmp_path: Path) -> None:
    program: Program = bundle().main
    path = lower(program, tmp_path, "forward")
    sizes = [inputs for _, inputs in resized_examples(program)]
    assert len(sizes) == 1 + 2 * len(program.ranges)  # the example; per axis its smallest size and one less
    for inputs in sizes:
        got = run(path, *(t.numpy() for t in inputs))
        for want, have in zip(program(*inputs), got, strict=True):
            np.testing.assert_allclose(have, want.numpy(), rtol=1e-4, atol=1e-5)


def test_file_is_portable_and_named_as_the_signature(tmp_path: Path) -> None:
    program = text().main
    path = lower(program, tmp_path, "forward", metadata={"tokopt.pipeline": "tome{r=1}"})
    model = onnx.load(path, load_external_data=False)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == OPSET
    assert {node.domain for node in model.graph.node} <= {"", "tokopt"}
    assert (model.producer_name, model.producer_version) == ("tokopt", tokopt.__version__)
    assert {entry.key: entry.value for entry in model.metadata_props} == {"tokopt.pipeline": "tome{r=1}"}
    for values, specs in ((model.graph.input, program.inputs), (model.graph.output, program.outputs)):
        for value, spec in zip(values, specs, strict=True):
            dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            assert (value.name, tuple(dims)) == (spec.name, spec.axes)
    used = {dim.dim_param for value in model.graph.value_info for dim in value.type.tensor_type.shape.dim}
    assert "batch" in used and not any(name.startswith("s") and name[1:].isdigit() for name in used)


def test_file_tells_nothing_of_the_machine(tmp_path: Path) -> None:
    data = lower(vision().main, tmp_path, "forward").read_bytes()
    assert str(Path(__file__).parent).encode() not in data and b"site-packages" not in data
    assert b"blocks.1" in data  # but where in the model each node came from


def test_constants_are_folded(tmp_path: Path) -> None:
    program = vision().main
    path = lower(program, tmp_path, "forward")
    model = onnx.load(path, load_external_data=False)
    weights = {weight.name for weight in model.graph.initializer}
    transposed = [n for n in model.graph.node if n.op_type == "Transpose" and n.input[0] in weights]
    assert not transposed and "Constant" not in operators(path)


def attention(mask: tuple[int, ...], boolean: bool, static: bool) -> ir.Model:
    """One ``Attention`` node on graph inputs q, k, v and mask."""
    kind = TensorProto.BOOL if boolean else TensorProto.FLOAT
    shapes: dict[str, tuple] = {"q": (3, 2, 5, 4), "k": (3, 2, 7, 4), "v": (3, 2, 7, 4), "mask": mask}
    values = [
        helper.make_tensor_value_info(
            name,
            kind if name == "mask" else TensorProto.FLOAT,
            shape if static else [f"{name}{i}" for i in range(len(shape))],
        )
        for name, shape in shapes.items()
    ]
    node = helper.make_node("Attention", ["q", "k", "v", "mask"], ["y"], scale=0.5)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "attention", values, [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    return ir.from_proto(model)


@pytest.mark.parametrize("boolean", [False, True], ids=["bias", "bool"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((3, 1, 1, 7), False),
        ((3, 2, 1, 7), False),
        ((1, 1, 1, 7), False),
        ((1, 7), False),
        ((3, 1, 5, 7), True),
        ((1, 1, 5, 7), True),
        ((5, 7), True),
    ],
)
def test_masks_broadcast(
    shape: tuple[int, ...], fits: bool, boolean: bool, static: bool, tmp_path: Path
) -> None:
    model = attention(shape, boolean, static)
    expand_masks(model)
    expanded = any(node.op_type == "Expand" for node in model.graph)
    assert expanded == (not (fits and static))
    ir.save(model, tmp_path / "a.onnx")
    generator = np.random.default_rng(0)
    q, k, v = (generator.standard_normal((3, 2, n, 4), dtype=np.float32) for n in (5, 7, 7))
    mask = generator.standard_normal(shape, dtype=np.float32)
    bias = mask
    if boolean:
        mask = mask > -1
        mask[..., 0] = True  # every query sees something
        bias = np.where(mask, 0, -1e30)
    weight = np.exp(q @ k.swapaxes(-1, -2) * 0.5 + bias)
    want = weight / weight.sum(-1, keepdims=True) @ v
    (got,) = run(tmp_path / "a.onnx", q, k, v, mask)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_one_mask_is_expanded_once_for_all_layers(tmp_path: Path) -> None:
    found = operators(lower(text().main, tmp_path, "forward"))
    assert found.count("Attention") == 2 and found.count("Expand") == 1


class Tied(nn.Module):
    """The same weight twice; ``nn.Linear`` keeps it transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def test_equal_weights_are_stored_once_also_across_programs(tmp_path: Path) -> None:
    bundle = tokopt.capture(Tied(), (torch.randn(3, 40),))
    weights = WeightFile(tmp_path)
    for name in ("one", "two"):
        lower(bundle.main, tmp_path, name, weights=weights)
    assert (tmp_path / "weights.data").stat().st_size == 40 * 40 * 4
    assert {p.name for p in tmp_path.iterdir()} == {"one.onnx", "two.onnx", "weights.data"}


def test_weights_start_on_whole_pages(tmp_path: Path) -> None:
    model = onnx.load(lower(vision().main, tmp_path, "forward"), load_external_data=False)
    for weight in model.graph.initializer:
        place = {entry.key: entry.value for entry in weight.external_data}
        if place:
            size, offset = int(place["length"]), int(place["offset"])
            assert place["location"] == "weights.data" and size > 1024
            assert offset % (4096 if size >= 4096 else 64) == 0
        else:
            assert weight.ByteSize() < 1200


def half(x: Tensor) -> Tensor:
    return (x.half() @ x.half().transpose(-1, -2)).softmax(-1)


def whole(x: Tensor) -> Tensor:
    return x.argsort(dim=-1)


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("function", [half, whole])
def test_dtypes(function, tmp_path: Path) -> None:
    lower(tokopt.capture(Function(function), (torch.randn(3, 8),)).main, tmp_path, "forward")


def test_bfloat16_at_the_border_is_refused(tmp_path: Path) -> None:
    bundle = tokopt.capture(Function(lambda x: x.bfloat16()), (torch.randn(3, 8),))
    with pytest.raises(LoweringError, match="'output' of program 'forward' is bfloat16"):
        lower(bundle.main, tmp_path, "forward")


@torch.library.custom_op("tokopt_tests::alien", mutates_args=())
def alien(x: Tensor) -> Tensor:
    return x.clone()


alien.register_fake(torch.empty_like)


def test_operator_without_onnx_form_is_named(tmp_path: Path) -> None:
    bundle = tokopt.capture(Function(alien), (torch.randn(3, 8),))
    with pytest.raises(LoweringError, match=r"'forward' has no ONNX form: .*tokopt_tests.alien") as caught:
        lower(bundle.main, tmp_path, "forward")
    assert "\n" not in str(caught.value)


def test_disagreement_is_an_error_that_names_the_output(tmp_path: Path) -> None:
    model = Tied()
    program = tokopt.capture(model, (torch.randn(3, 40),)).main
    path = lower(program, tmp_path, "forward")
    with torch.no_grad():
        model.a.weight *= 1.01  # the program shares the model's weights, the file does not
    with pytest.raises(
        LoweringError, match=r"program 'forward' \(batch 3\): output 'output' differs.* NMSE"
    ) as caught:
        check_parity(program, path, "forward")
    assert "\n" not in str(caught.value)
    check_parity(program, path, "forward", tolerance=0.1)


class Shifted(nn.Module):
    """Two sums, of which the first depends on a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.01))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.shift, x + 1


def test_outputs_that_are_not_compared_may_differ(tmp_path: Path) -> None:
    model = Shifted()
    program = tokopt.capture(model, (torch.randn(3, 8),)).main
    path = lower(program, tmp_path, "forward")
    first, second = (spec.name for spec in program.outputs)
    with torch.no_grad():
        model.shift.add_(1)
    check_parity(program, path, "forward", names=[second])
    with pytest.raises(LoweringError, match=f"output '{first}' differs"):
        check_parity(program, path, "forward", names=[first])


@pytest.mark.parametrize(("moved", "alike"), [(1e-4, True), (1e-2, False)])
def test_log_probabilities_have_the_rounding_of_logits(moved: float, alike: bool, tmp_path: Path) -> None:
    """That of a token which is nearly certain is next to nothing, and its error is not."""
    model = Shifted()
    program = tokopt.capture(model, (torch.zeros(3, 8),)).main
    roles = (
        replace(spec, role=role) for spec, role in zip(program.outputs, ("logprobs", "output"), strict=True)
    )
    program = replace(program, outputs=tuple(roles))
    path = lower(program, tmp_path, "forward")
    with torch.no_grad():
        model.shift.add_(moved)
    with nullcontext() if alike else pytest.raises(LoweringError, match="differs"):
        check_parity(program, path, "forward")


def test_a_number_of_elements_is_a_product_of_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's exporter knows no number of elements; a program that asks for one is not traced as a whole for it."""
    program = tokopt.capture(Function(torch.neg), (torch.randn(3, 8),)).main
    module = open_graph(program)
    (negated,) = results(module.graph)
    with module.graph.inserting_before(module.graph.output_node()):
        shared = call(module.graph, lambda x: x / x.numel(), negated, like=negated)
    module.graph.output_node().args = ((shared,),)
    program = close_graph(program, module)
    assert any(is_call(node, torch.ops.aten.sym_numel) for node in program.module.graph.nodes)
    monkeypatch.delattr(torch.export.ExportedProgram, "run_decompositions")
    lower(program, tmp_path, "forward")


def test_file_that_onnx_runtime_cannot_load(tmp_path: Path) -> None:
    (tmp_path / "forward.onnx").write_bytes(b"\x00\x01")
    with pytest.raises(LoweringError, match="ONNX Runtime cannot load program 'forward'"):
        check_parity(vision().main, tmp_path / "forward.onnx", "forward")
