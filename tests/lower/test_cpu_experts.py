"""Mixtures of experts in an artifact: what is fused, what it computes, and what it goes together with."""

from __future__ import annotations

import collections
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import tokopt
from tests.kernels.linears import CONSTANTS, chosen_model, random_linear, session
from tests.shared import once
from tokopt.kernels import cpu
from tokopt.kernels.expert_linear.onnx import FUNCTIONS
from tokopt.lower.cpu.bodies import Follows, expert_linear, float_expert_linear
from tokopt.lower.tensorrt.graph import rewrite_for_tensorrt
from tokopt.runtime import LanguageModel, load
from tokopt.runtime.format.manifest import OWN, PORTABLE
from tokopt.runtime.numerics import nmse
from tokopt.runtime.sampling import log_probabilities

EXPERTS, CHOSEN, VOCABULARY = 5, 2, 61
TOKOPT = onnx.helper.make_opsetid("tokopt", 1)
built = pytest.mark.skipif(cpu.library() is None, reason="the CPU kernels are not built")
PROMPTS = [np.random.default_rng(seed).integers(0, VOCABULARY, 19).tolist() for seed in range(2)]


@cache
def mixture(biased: bool) -> Any:
    """A mixture like Mixtral, or like gpt-oss: with biases, interleaved gates, and weights the other way round."""
    from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "max_position_embeddings": 128,
    }
    if biased:
        model = GptOssForCausalLM(GptOssConfig(**sizes, head_dim=16, rope_parameters=None))
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(weight)
    else:
        model = MixtralForCausalLM(MixtralConfig(**sizes))
    return model.eval()


@cache
def bundle(biased: bool) -> tokopt.Bundle:
    return tokopt.capture_lm(mixture(biased))


@cache
def optimized(passes: str, biased: bool = False) -> tokopt.Bundle:
    if not passes:
        return bundle(biased)
    return tokopt.optimize(bundle(biased), passes, strict=True, calibration=[torch.tensor(PROMPTS)])


def artifact(passes: str, biased: bool = False) -> Path:
    key = "".join(letter if letter.isalnum() else "-" for letter in passes)
    return once(f"experts-{biased}-{key}.tokopt", lambda path: tokopt.export(optimized(passes, biased), path))


def opened(passes: str, *, biased: bool = False, kernels: bool = True) -> LanguageModel:
    model = load(artifact(passes, biased), threads=1, kernels=kernels)
    assert isinstance(model, LanguageModel)
    return model


def graph(path: Path, form: str) -> onnx.GraphProto:
    file = load(path, threads=1).manifest.programs["step"].files[form]
    return onnx.load(path / file, load_external_data=False).graph


def kinds(path: Path, form: str) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in graph(path, form).node)


@pytest.mark.parametrize("passes", ["rtn{bits=4}", "rtn{bits=8 symmetric=true}"])
def test_products_of_experts_are_one_op_with_their_gate_and_their_sum(passes: str) -> None:
    portable, own = (kinds(artifact(passes), form) for form in (PORTABLE, OWN))
    assert portable["take_expert"] == 2 and portable["DequantizeLinear"] == 5  # all experts are one weight
    assert own["ExpertLinear"] == 2 and own["QuantizedLinear"] == 3
    assert not {"take_expert", "MatMul", "Sigmoid", "DequantizeLinear"} & set(own)


def test_products_in_float_are_one_op_with_their_gate_and_their_sum() -> None:
    portable, own = (kinds(artifact(""), form) for form in (PORTABLE, OWN))
    assert portable["expert_linear"] == 2 and portable["Sigmoid"] == 1
    assert own["FloatExpertLinear"] == 2 and not {"expert_linear", "Sigmoid"} & set(own)
    assert own["ReduceSum"] == portable["ReduceSum"] - 1


@pytest.mark.parametrize(("passes", "op"), [("rtn{bits=4}", "ExpertLinear"), ("", "FloatExpertLinear")])
def test_a_token_is_read_where_it_is_and_not_once_for_each_expert(passes: str, op: str) -> None:
    """The first product of an expert takes the rows of which the graph has a view, and the second the first's."""
    nodes = graph(artifact(passes), OWN).node
    makers = {name: node.op_type for node in nodes for name in node.output}
    read = [makers[node.input[0]] for node in nodes if node.op_type == op]
    assert len(read) == 2 and read[1] == op and read[0] not in ("Unsqueeze", "Expand")


@pytest.mark.parametrize(("passes", "op"), [("rtn{bits=4}", "ExpertLinear"), ("", "FloatExpertLinear")])
def test_biases_are_added_in_the_op_and_other_gates_stay_outside(passes: str, op: str) -> None:
    own = graph(artifact(passes, biased=True), OWN)
    found = collections.Counter(node.op_type for node in own.node)
    assert found[op] == 2 and found["Sigmoid"] == 1
    assert found["GatherND"] == 1  # of the rows of the logits: biases are not gathered
    given = [node.overload.split("_") for node in own.node if node.op_type == op]
    assert ["bias" in one for one in given] == [True, True] and "share" in given[1]


@pytest.mark.parametrize("biased", [False, True])
def test_many_tokens_and_single_ones_are_what_the_model_computes(biased: bool) -> None:
    """They take other ways through the experts."""
    ids, model = torch.tensor([PROMPTS[0]]), opened("", biased=biased)
    with torch.no_grad():
        logits = mixture(biased)(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    wanted = logits[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()
    np.testing.assert_allclose(model.score(PROMPTS[0]), wanted, atol=1e-4)
    request, one_by_one = model.open(1, 32), []
    for place, token in enumerate(PROMPTS[0][:-1]):
        made = request.step(np.array([[token]]), np.array([[place]])).logits
        assert made is not None
        one_by_one.append(log_probabilities(made[0], [PROMPTS[0][place + 1]])[0])
    np.testing.assert_allclose(one_by_one, wanted, atol=1e-4)


@built
def test_the_kernel_computes_what_the_portable_form_does() -> None:
    for biased in (False, True):
        forms = (opened("rtn{bits=4}", biased=biased, kernels=kernels) for kernels in (True, False))
        own, other = (form.score(PROMPTS[0]) for form in forms)
        assert nmse(other, own) < 1e-3


@built
@pytest.mark.parametrize("biased", [False, True])
def test_the_kernel_in_float_computes_what_its_body_and_the_portable_form_do(biased: bool) -> None:
    own, other = (opened("", biased=biased, kernels=kernels).score(PROMPTS[0]) for kernels in (True, False))
    assert nmse(other, own) < 1e-10


def in_blocks(follows: Follows) -> tuple[onnx.ModelProto, list[onnx.FunctionProto]]:
    """A model of the op with a weight in blocks [3 x 8, 64], and the functions of its body."""
    linear = random_linear(0, 3 * 8, 2, bias=follows.bias, gate=follows.gate)
    given = {**linear.attributes, "experts": 3}
    body = expert_linear(4, follows, 21, zero=False, flat=True)
    model = chosen_model(body.name, CONSTANTS, linear.constants, given, share=follows.share)
    return model, [ir.to_proto(body)]


def in_floats(follows: Follows) -> tuple[onnx.ModelProto, list[onnx.FunctionProto]]:
    """A model of the op with a weight in float32 [3, 64, 8], and the functions of its body."""
    random = np.random.default_rng(0)
    shapes = {"weight": (3, 64, 8), **({"bias": (3, 8)} if follows.bias else {})}
    constants = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    body = float_expert_linear(follows, 21, flat=True)
    given = {"gate": follows.gate} if follows.gate else {}
    model = chosen_model(body.name, ("weight", "bias"), constants, given, share=follows.share)
    functions = [function.to_function_proto() for function in FUNCTIONS]
    for function in functions:
        function.opset_import.append(TOKOPT)  # which the body of a loop calls
    return model, [ir.to_proto(body), *functions]


@built
@pytest.mark.parametrize(
    "follows", [Follows(bias=True, gate="gelu"), Follows(bias=True, share=True), Follows()]
)
@pytest.mark.parametrize("make", [in_blocks, in_floats])
def test_bodies_compute_what_the_kernels_do(make: Any, follows: Follows) -> None:
    """Also where numbers that are no expert are chosen. Rows are integers, which the kernels round to themselves."""
    model, functions = make(follows)
    random = np.random.default_rng(0)
    x = random.integers(-127, 128, (9, 64)).astype(np.float32)
    x[:, ::32] = 127
    given = {"x": x, "chosen": random.integers(-2, 5, (9, 2))}
    if follows.share:
        given["share"] = random.standard_normal((9, 2), np.float32)
    (want,) = session(model).run(None, given)
    model.functions.extend(functions)
    model.graph.node[0].overload = functions[0].overload
    model.opset_import.append(TOKOPT)
    (got,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, given)
    assert nmse(np.asarray(want), np.asarray(got)) < 1e-12


@built
def test_a_text_of_a_batch_is_what_it_is_alone() -> None:
    """Beside an eviction and a cache in 8 bits, too."""
    model = opened("rtn{bits=4},h2o{budget=16 every=4},int8_kv")
    together = model.generate(PROMPTS, max_tokens=12)
    assert [one.tokens for one in together] == [model.generate(p, max_tokens=12).tokens for p in PROMPTS]


@pytest.mark.parametrize("passes", ["", "rtn{bits=4}"])
def test_tensorrt_multiplies_with_all_experts(passes: str) -> None:
    """No size depends on what was chosen, and the result is the same."""
    model = ir.external_data.load_to_model(ir.load(artifact(passes) / "step.onnx"))
    rewrite_for_tensorrt(model, {})
    assert not {"Scan", "If", "NonZero"} & {node.op_type for node in model.graph.all_nodes()}
    program = optimized(passes).main
    fed = dict(zip([spec.name for spec in program.inputs], program.example, strict=True))
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    (logits,) = session.run(["logits"], {name: value.numpy() for name, value in fed.items()})
    with torch.no_grad():
        wanted = program.module(*program.example)[0]
    assert nmse(wanted.numpy(), np.asarray(logits)) < 1e-4
