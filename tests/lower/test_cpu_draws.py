"""Programs that draw their tokens do it in ops of the CPU kernels, and write the text that they write without."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from tests.kernels.draws import TYPES, draws, reference_form
from tests.lower.test_cpu import built
from tests.matrix.language import artifact, prompt
from tokopt.kernels import attach_functions, cpu
from tokopt.lower.cpu.draw_tokens import DrawTokens
from tokopt.lower.onnx.rule import Outcome, apply_rule
from tokopt.runtime import Sampling, load
from tokopt.runtime.format.manifest import OWN

PASSES = ("sample", "speculate")

passes = pytest.mark.parametrize("passes", PASSES)


@passes
def test_every_draw_is_one_op_of_the_numbers_of_another(passes: str) -> None:
    """The file holds their bodies, and nothing else draws."""
    made = artifact("llama", passes)
    for name, program in made.manifest.programs.items():
        model = ir.load(made.path / program.files[OWN])
        kinds = [(node.domain, node.op_type) for node in model.graph]
        for op in ("DrawTokens", "Uniforms"):
            assert kinds.count((cpu.DOMAIN, op)) == 1, name
        assert not {"draw_tokens", "draw", "truncated_softmax", "uniforms"} & {kind for _, kind in kinds}
        bodies = {function.name for function in model.functions.values()}
        assert {"DrawTokens", "draw", "truncated_softmax", "Uniforms", "threefry_round"} <= bodies
        assert not {"draw_tokens", "uniforms"} & bodies
        assert program.kernels == cpu.VERSION


@built
@passes
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=1.0, seed=3), Sampling(temperature=0.7, top_k=9, top_p=0.9, seed=1)],
    ids=["greedy", "drawn", "top_p"],
)
def test_the_text_is_that_of_the_portable_form(passes: str, sampling: Sampling) -> None:
    """Of one prompt and of several, with the log-probabilities."""
    own = artifact("llama", passes)
    plain = load(own.path, threads=1, kernels=False)
    assert str(own.kernels).startswith("tokopt.cpu ")
    for given in ([prompt(9)], [prompt(n, seed=n) for n in (3, 17, 8)]):
        pairs = zip(
            *(model.generate(given, max_tokens=50, sampling=sampling) for model in (own, plain)), strict=True
        )
        for got, want in pairs:
            assert got.tokens == want.tokens
            assert got.logprobs == pytest.approx(want.logprobs, abs=1e-5)


def drawing(logits: ir.DataType, *read: str) -> tuple[ir.Model, Outcome]:
    """A model of one draw that gives the outputs ``read`` of it, rewritten."""
    number = ir.TensorType(ir.DataType.FLOAT)
    kinds = {"logits": ir.TensorType(logits), "top_k": ir.TensorType(ir.DataType.INT64)}
    inputs = [ir.Value(name=name, type=kinds.get(name, number)) for name in TYPES]
    node = ir.node("draw_tokens", inputs, domain="tokopt", num_outputs=2)
    for output, name, kind in zip(node.outputs, ("token", "logprob"), (kinds["top_k"], number), strict=True):
        output.name, output.type = name, kind
    outputs = [output for output in node.outputs if output.name in read]
    graph = ir.Graph(inputs, outputs, nodes=[node], opset_imports={"": 23, "tokopt": 1}, name="draw")
    model = ir.Model(graph, ir_version=10)
    attach_functions(model)
    outcome = apply_rule(DrawTokens(model), graph)
    graph.opset_imports[cpu.DOMAIN] = cpu.VERSION
    RemoveUnusedNodesPass()(model)
    return model, outcome


@built
@pytest.mark.parametrize("read", [("token",), ("token", "logprob")])
@pytest.mark.parametrize("library", [True, False], ids=["kernel", "body"])
def test_log_probabilities_are_computed_where_they_are_read(read: tuple[str, ...], library: bool) -> None:
    """By the kernel, and by the body that stands for it where there is none."""
    model, outcome = drawing(ir.DataType.FLOAT, *read)
    assert outcome.fused == 1
    (node,) = model.graph
    assert len(node.outputs) == len(read)
    body = model.functions[node.op_identifier()]
    assert ("LogSoftmax" in [made.op_type for made in body]) == ("logprob" in read)
    given = draws(np.random.default_rng(0).standard_normal((2, 3, 70)), 0.4, temperature=0.8, top_p=0.9)
    settings = onnxruntime.SessionOptions()
    if library:
        settings.register_custom_ops_library(str(cpu.library()))
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    got = session.run(None, dict(given.inputs))
    for output, want in zip(got, reference_form(given, 1), strict=False):
        np.testing.assert_allclose(np.asarray(output), want, atol=1e-5)


def test_logits_of_another_dtype_are_left_with_the_reason() -> None:
    model, outcome = drawing(ir.DataType.FLOAT16, "token")
    assert (outcome.fused, [left.reason for left in outcome.left]) == (0, ["its logits are not float32"])
    assert [node.op_type for node in model.graph] == ["draw_tokens"]
