"""Quantization: every architecture computes with the weights that the formulas say, and the artifact does too."""

from __future__ import annotations

import collections
import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import tokopt
from tests.matrix import language
from tests.matrix.test_matrix import assert_close, captured
from tests.zoo import ZOO
from tests.zoo.decoders import DECODERS, HandWritten
from tokopt.analysis.calibration import Site, collect
from tokopt.analysis.constants import parameter
from tokopt.analysis.linears import find_linears
from tokopt.errors import TokoptError
from tokopt.ir.bundle import Bundle
from tokopt.passes.quantize.awq import AWQ
from tokopt.passes.quantize.base import QuantizedWeight, fit_grid, output_error
from tokopt.passes.quantize.fp8 import float8_weight
from tokopt.passes.quantize.fp8 import rounded_tokens as float8_tokens
from tokopt.passes.quantize.gptq import GPTQ
from tokopt.passes.quantize.int8 import rounded_tokens
from tokopt.passes.quantize.keep_grid import find_grid
from tokopt.passes.quantize.nupes import NUPES
from tokopt.passes.quantize.products import scaled_product
from tokopt.passes.quantize.rtn import RTN
from tokopt.pipeline.observers import differences
from tokopt.runtime.numerics import nmse

GROUP = 16
METHODS = {
    "rtn": f"rtn{{group={GROUP}}}",
    "rtn_symmetric": f"rtn{{group={GROUP} symmetric=true}}",
    "rtn_8": f"rtn{{bits=8 group={GROUP}}}",
    "gptq": f"gptq{{group={GROUP}}}",
    "awq": f"awq{{group={GROUP}}}",
    "nupes": f"nupes{{group={GROUP}}}",
    "int8": "int8",
    "int8_static": "smoothquant,int8{activations=static}",
    "fp8": "fp8",
    "fp8_static": "fp8{activations=static}",
    "cast": "cast",
}
"""Name -> pipeline. A new method joins here."""

FEW = ("vit", "bert", "llama", "gpt2")
"""One architecture of every kind: every method runs on these."""

PRODUCTS = {"vit": 13, "bert": 13, "llama": 9, "gpt2": 9}
"""Products of each with weights: queries, keys and values are one, gate and up are one."""


def bundle(name: str) -> Bundle:
    return captured(name) if name in ZOO else language.bundle(name)


def samples(name: str) -> list[Any]:
    """Calibration inputs."""
    if name in ZOO:
        return [tuple(ZOO[name].inputs(seed=seed).values()) for seed in (3, 4)]
    return [language.prompt(24, seed) for seed in (3, 4)]


@cache
def quantized(name: str, pipeline: str) -> Bundle:
    return tokopt.optimize(bundle(name), pipeline, calibration=samples(name))


# --- round to nearest, on everything ----------------------------------------------------------------------


def naive_rtn(weight: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Asymmetric rounding of [out, in], one number after another."""
    result = np.zeros(weight.shape, np.float32)
    for out in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            values = weight[out, start : start + group]
            high, low = max(values.max(), np.float32(0)), min(values.min(), np.float32(0))
            scale = np.float32(high - low) / np.float32(2**bits - 1)
            zero = np.rint(-low / scale)
            codes = np.clip(np.rint(values / scale) + zero, 0, 2**bits - 1)
            result[out, start : start + group] = (codes - zero) * scale
    return result


def round_weights(model: nn.Module) -> nn.Module:
    """A copy of an eager model with every linear's weight rounded in place; a tied output is untied."""
    model = copy.deepcopy(model)
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for module in model.modules():
        names = {"Linear": "weight", "Conv1D": "weight", "MultiheadAttention": "in_proj_weight"}
        name = names.get(type(module).__name__.replace("NonDynamicallyQuantizableLinear", "Linear"))
        weight = getattr(module, name) if name else None
        if weight is None:
            continue
        matrix = weight.T if type(module).__name__ == "Conv1D" else weight
        if matrix.shape[1] % GROUP == 0:
            rounded = torch.from_numpy(naive_rtn(matrix.numpy(), 4, GROUP))
            weight.data.copy_(rounded.T if type(module).__name__ == "Conv1D" else rounded)
    return model


@pytest.mark.parametrize("name", ZOO)
def test_every_encoder_computes_with_rounded_weights(name: str) -> None:
    entry = ZOO[name]
    made = quantized(name, METHODS["rtn"])
    inputs = entry.inputs()
    with torch.no_grad():
        wanted = tree_leaves(round_weights(entry.build())(**inputs))
    assert made.history[-1].matches > 0
    for got, expected in zip(made(*inputs.values()), wanted, strict=True):
        assert_close(entry, inputs, got, expected)


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_computes_with_rounded_weights(name: str) -> None:
    model, made = round_weights(language.model(name)), quantized(name, METHODS["rtn"])
    tokens = torch.tensor([language.prompt(17, seed) for seed in (1, 2)])
    with torch.no_grad():
        hand = isinstance(model, HandWritten)
        wanted = model.whole(tokens) if hand else model(tokens, use_cache=False).logits
    assert nmse(wanted.numpy(), made(tokens)[0].numpy()) < 1e-9


# --- every method, on an architecture of every kind -------------------------------------------------------


EVERYWHERE = ("rtn", "int8")
"""One method of either kind of product: 4 bits in blocks, and 8 bits with rounded activations."""

LOWERED = [(method, name) for method in EVERYWHERE for name in FEW]
LOWERED += [
    (method, name)
    for number, method in enumerate(m for m in METHODS if m not in EVERYWHERE)
    for name in (("vit", "gpt2"), ("bert", "llama"))[number % 2]
]
"""Every other method on an encoder and a decoder, in turn: what is lowered is the method's op and the model's graph."""


@pytest.mark.parametrize(("method", "name"), LOWERED)
def test_artifact_computes_what_the_bundle_computes(method: str, name: str, tmp_path: Path) -> None:
    """Export compares ONNX Runtime with the bundle; the graph is standard, and its products are fused."""
    made = quantized(name, METHODS[method])
    path = tokopt.export(made, tmp_path / "model.tokopt")
    assert tokopt.verify(path).ok
    file = path / f"{'forward' if name in ZOO else 'step'}.onnx"
    domains = {node.domain for node in onnx.load(file, load_external_data=False).graph.node}
    assert domains <= {"", "tokopt"}
    if method.startswith("fp8"):
        assert float8_weights(file) == PRODUCTS[name]
    elif method != "cast":
        kernels = fused_kernels(file, tmp_path)
        kernel = "MatMulIntegerToFloat" if method.startswith("int8") else "MatMulNBits"
        if method != "nupes":  # its powers are expanded when they load
            # With a bias, a product of two axes (a pooler's) becomes a Gemm, which has no such kernel.
            rest = method == "int8_static" and name in ZOO
            assert kernels[kernel] == PRODUCTS[name] - rest and not kernels["MatMul"] + kernels["Gemm"]


def float8_weights(file: Path) -> int:
    """How many products have ``DequantizeLinear`` of 8-bit floats directly before them."""
    graph = onnx.load(file, load_external_data=False).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    floats = onnx.TensorProto.FLOAT8E4M3FN
    weights = {
        node.output[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and kinds.get(node.input[0]) == floats
    }
    return sum(node.op_type == "MatMul" and node.input[1] in weights for node in graph.node)


def fused_kernels(file: Path, folder: Path) -> collections.Counter[str]:
    """What ONNX Runtime makes of a graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "fused.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(folder / "fused.onnx", load_external_data=False).graph
    return collections.Counter(node.op_type for node in graph.node)


CLOSENESS = {"rtn_8": 5e-4, "int8": 2e-3, "fp8": 1.5e-2, "fp8_static": 1.5e-2, "cast": 1e-5}


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("method", METHODS)
def test_outputs_stay_close(method: str, name: str) -> None:
    """Random weights are the hardest case; 4 bits of them still point the same way."""
    given, made = bundle(name), quantized(name, METHODS[method])
    assert max(d.nmse for d in differences(given, made)) < CLOSENESS.get(method, 0.1)


@pytest.mark.parametrize("name", FEW)
def test_smoothquant_changes_nothing(name: str) -> None:
    """And leaves alone what reads a residual stream that others read too (post-norm)."""
    made = quantized(name, "smoothquant")
    assert (made.history[-1].matches > 0) == (name != "bert") and made.semantics == "exact"
    assert max(d.nmse for d in differences(bundle(name), made)) < 1e-10


COMPOSED = [("vit", method, "tome{r=4}") for method in ("rtn", "int8", "fp8", "cast")]
COMPOSED += [("modernbert", "int8", "tome{r=4}"), ("llama", "rtn", "h2o{budget=18 recent=4 every=4}")]


@pytest.mark.parametrize(("name", "method", "other"), COMPOSED)
def test_composes_with_tokens_and_caches(name: str, method: str, other: str) -> None:
    """In either order the same program."""
    one, two = (
        quantized(name, text) for text in (f"{METHODS[method]},{other}", f"{other},{METHODS[method]}")
    )
    assert all(step.matches for step in (*one.history, *two.history))
    assert max(d.nmse for d in differences(one, two)) < 1e-9


# --- laws of the methods ----------------------------------------------------------------------------------


def layers(name: str) -> list[tuple[Tensor, Any]]:
    """Weight and moments of every linear."""
    given = bundle(name)
    module = given.main.module
    linears = find_linears(module.graph)
    known = collect(Site(given, given.main_name, module), [linear.input for linear in linears], samples(name))
    found = [(linear.matrix(module), known[linear.input]) for linear in linears]
    return [(weight, moments) for weight, moments in found if weight.shape[1] % GROUP == 0]


@settings(max_examples=30)
@given(st.integers(0, 99), st.integers(2, 8), st.booleans(), st.sampled_from([0.0, 1.0, 1e4]))
def test_rounding_is_to_the_nearest_point(seed: int, bits: int, symmetric: bool, shift: float) -> None:
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)) + shift
    grid = fit_grid(weight, bits, GROUP, symmetric=symmetric)
    got = grid.packed(grid.codes(weight)).dequantized()
    points = torch.arange(2**bits) - grid.zero[..., None]
    points = (points * grid.scale[..., None])[:, :, None, :]
    nearest = (weight.unflatten(1, (-1, GROUP))[..., None] - points).abs().amin(-1)
    error = (got - weight).abs().unflatten(1, (-1, GROUP))
    torch.testing.assert_close(error, nearest, atol=1e-5 * float(weight.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("name", ("vit", "llama"))
def test_gptq_loses_less_than_rounding_in_every_layer(name: str) -> None:
    for weight, moments in layers(name):
        plain = RTN(group=GROUP).quantize(weight, 4, None).dequantized()
        for order in (False, True):
            better = GPTQ(group=GROUP, order=order).quantize(weight, 4, moments).dequantized()
            assert output_error(weight, better, moments) <= output_error(weight, plain, moments)


def test_gptq_of_uncorrelated_inputs_is_rounding() -> None:
    (weight, moments), *_ = layers("vit")
    moments.gram = torch.eye(weight.shape[1])
    for order in (False, True):
        got = GPTQ(group=GROUP, order=order).quantize(weight, 4, moments)
        wanted = RTN(group=GROUP).quantize(weight, 4, None)
        assert (got.codes != wanted.codes).float().mean() < 1e-3  # ties by a last bit of 1 / U


def test_gptq_is_optimal_among_single_corrections() -> None:
    """The last column's code is the nearest to what the columns before left over: checked against brute force."""
    (weight, moments), *_ = layers("vit")
    weight = weight[:4]
    got = GPTQ(group=GROUP, damp=1e-6).quantize(weight, 4, moments)
    base = output_error(weight, got.dequantized(), moments)
    for row in range(4):
        for code in range(16):
            codes = got.codes.clone()
            codes[row, -1] = code
            changed = QuantizedWeight(codes, got.scale, got.zero, GROUP).dequantized()
            assert output_error(weight, changed, moments) >= base - 1e-7


def test_dead_inputs_get_no_weight() -> None:
    (weight, moments), *_ = layers("vit")
    moments.gram[3] = moments.gram[:, 3] = 0
    got = GPTQ(group=GROUP).quantize(weight, 4, moments).dequantized()
    assert not got[:, 3].any()


@pytest.mark.parametrize("name", ("vit", "llama"))
def test_awq_clipping_never_loses(name: str) -> None:
    """By the error that every group's own inputs cause; over all groups together it may only nearly hold."""
    for weight, moments in layers(name):
        found = {}
        for clip in (False, True):
            made = AWQ(group=GROUP, clip=clip).quantize(weight, 4, moments)
            wrong = (made.dequantized() - weight).unflatten(1, (-1, GROUP))
            starts = range(0, weight.shape[1], GROUP)
            blocks = torch.stack([moments.gram[i : i + GROUP, i : i + GROUP] for i in starts])
            found[clip] = (torch.einsum("ogi,gij->ogj", wrong, blocks) * wrong).sum(-1)
        assert (found[True] <= found[False] * (1 + 1e-5) + 1e-9).all()


@pytest.mark.parametrize("name", FEW)
def test_awq_scales_change_nothing_by_themselves(name: str) -> None:
    """With 8 bits the outputs stay where they are, though weights were rescaled."""
    made = quantized(name, f"awq{{bits=8 group={GROUP} clip=false}}")
    assert max(d.nmse for d in differences(bundle(name), made)) < 5e-4


def test_nupes_with_exponent_1_is_rounding_and_a_search_never_loses() -> None:
    for weight, moments in layers("vit"):
        plain = RTN(group=GROUP, symmetric=True).quantize(weight, 4, None)
        one = NUPES(group=GROUP, exponent=1.0).quantize(weight, 4, None)
        assert torch.equal(one.codes, plain.codes) and torch.equal(one.dequantized(), plain.dequantized())
        best = NUPES(group=GROUP).quantize(weight, 4, moments)
        errors = [output_error(weight, made.dequantized(), moments) for made in (best, plain)]
        assert errors[0] <= errors[1]


def test_nupes_codes_are_those_of_the_power() -> None:
    weight = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    made = NUPES(group=GROUP, exponent=0.5).quantize(weight, 4, None)
    roots = np.sign(weight.numpy()) * np.sqrt(np.abs(weight.numpy()))
    codes = (made.codes.int() - 8).numpy()
    points = codes.reshape(2, 2, 16) * made.scale.numpy()[..., None]
    np.testing.assert_allclose(
        np.abs(points.reshape(2, 32) - roots).max(1) <= np.abs(made.scale.numpy()).max(1), True
    )
    squares = np.sign(points) * points**2
    np.testing.assert_allclose(made.dequantized().numpy(), squares.reshape(2, 32), rtol=1e-5)


def test_an_average_is_kept_and_spent_where_it_helps() -> None:
    few, some = (quantized("llama", f"rtn{{group={GROUP}{more}}}") for more in ("", " average=5"))
    bits = {}
    for made in (few, some):
        module = made.main.module
        weights = [node for node in module.graph.nodes if "dequantize_weight" in str(node.target)]
        codes = [parameter(module, node.args[0]) for node in weights]
        bits[made.pipeline] = [(int(c.max()) > 15, c.numel()) for c in codes]
    wide = bits[some.pipeline]
    average = sum((8 if eight else 4) * count for eight, count in wide) / sum(count for _, count in wide)
    assert 4.5 < average <= 5 and not any(eight for eight, _ in bits[few.pipeline])
    assert differences(bundle("llama"), some)[0].nmse < differences(bundle("llama"), few)[0].nmse * 1.2


def test_it_is_deterministic() -> None:
    for method in ("gptq", "awq"):
        made = [
            tokopt.optimize(bundle("llama"), METHODS[method], calibration=samples("llama")) for _ in range(2)
        ]
        assert all(d.nmse == 0 for d in differences(*made))


def test_a_generator_serves_several_passes() -> None:
    made = tokopt.optimize(
        bundle("llama"), f"smoothquant,{METHODS['gptq']}", calibration=iter(samples("llama")), strict=False
    )
    assert all(step.matches for step in made.history)


def test_dynamic_scales_are_per_token() -> None:
    """A token is rounded as if it were alone, however large the others are."""
    made = quantized("llama", "int8")
    assert made.history[-1].matches == len(find_linears(bundle("llama").main.module.graph))
    x = torch.randn(2, 5, 32)
    weight = torch.randn(8, 32)

    def product(x: Tensor) -> Tensor:
        return scaled_product(*rounded_tokens(x), weight, None, False)

    together = product(x * torch.tensor([1.0, 1e3, 1e-3, 0.0, 7.0])[:, None])
    alone = product(x[:, 2:3] * 1e-3)
    torch.testing.assert_close(together[:, 2:3], alone)
    assert not together[:, 3].any()


SMALLEST = 2.0**-6
"""The smallest number of E4M3 with all its 3 bits of mantissa; below, numbers are 2^-9 apart."""


@given(st.integers(0, 99), st.floats(-30, 30))
def test_fp8_is_off_by_a_sixteenth_at_most(seed: int, power: float) -> None:
    """Of itself, for any scale; near 0 of the smallest number. The largest of an output is exact."""
    spread = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed + 100)) * 10**spread * 2**power
    made = float8_weight(weight)
    error = (made.dequantized() - weight).abs()
    assert bool((error <= torch.maximum(weight.abs(), SMALLEST * made.scale) / 16 * (1 + 1e-5)).all())
    torch.testing.assert_close(made.dequantized().abs().amax(1), weight.abs().amax(1))
    assert made.nbytes == 3 * 32 + 4 * 3


def test_fp8_of_zeros_is_zeros() -> None:
    """Weights and tokens, and their scale is still one to divide by."""
    made, (x, scale) = float8_weight(torch.zeros(2, 16)), float8_tokens(torch.zeros(3, 16))
    assert not made.dequantized().any() and not x.any()
    assert bool((made.scale > 0).all()) and bool((scale > 0).all())


def test_fp8_products_lose_what_three_bits_lose() -> None:
    """Weight and input each lose 0.07 %: (2^-3)^2 / 12 over the mean square of a mantissa."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, 256, generator=generator) for size in (64, 128))
    made = scaled_product(*float8_tokens(x), float8_weight(weight).dequantized(), None, False)
    assert 1.2e-3 < nmse((x @ weight.T).numpy(), made.numpy()) < 1.6e-3


def test_fp8_with_static_scales_ends_at_what_calibration_saw() -> None:
    """Larger inputs become the largest that was seen, and neither infinite nor NaN."""
    model = nn.Linear(16, 8, bias=False).requires_grad_(False)
    given, seen = tokopt.capture(model, (torch.ones(4, 16),)), 3 * torch.ones(4, 16)
    made = tokopt.optimize(given, "fp8{activations=static}", calibration=[seen])
    torch.testing.assert_close(made(100 * seen)[0], made(seen)[0])
    torch.testing.assert_close(made(-1e30 * seen)[0], -made(seen)[0])


# --- grids that are there already -------------------------------------------------------------------------


def on_grid(kind: str, outputs: int, inputs: int, seed: int) -> Tensor:
    """Weights as GGUF files expand them."""
    generator = torch.Generator().manual_seed(seed)
    group = 16 if kind == "Q6_K" else 32
    scale = torch.rand(outputs, inputs // group, 1, generator=generator).half().float() * 0.1 + 0.001
    scale = scale.half().float()
    if kind == "Q4_1":
        low = -torch.rand(scale.shape, generator=generator).half().float()
        codes = torch.randint(0, 16, (outputs, inputs // group, group), generator=generator)
        return (scale * codes + low).flatten(1)
    low, high = {"Q4_0": (-8, 8), "Q8_0": (-127, 128), "Q6_K": (-32, 32)}[kind]
    codes = torch.randint(low, high, (outputs, inputs // group, group), generator=generator)
    codes[..., 0] = low
    return (scale * codes).flatten(1)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q6_K", "Q8_0"])
@pytest.mark.parametrize("seed", range(3))
def test_a_grid_is_found_and_kept(kind: str, seed: int) -> None:
    weight = on_grid(kind, 20, 96, seed)
    grid = find_grid(weight)
    assert grid is not None and grid.weight.group == (16 if kind == "Q6_K" else 32)
    assert (grid.offset is None) == (kind != "Q4_1")
    torch.testing.assert_close(grid.dequantized(), weight, atol=1e-6, rtol=1e-6)
    assert find_grid(weight + 1e-3 * torch.randn_like(weight)) is None


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_kept_grids_compute_the_same(kind: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).requires_grad_(False)
    for i in (0, 2):
        weight: Any = model[i].weight
        weight.data = on_grid(kind, weight.shape[0], weight.shape[1], seed=i)
    given = tokopt.capture(model, (torch.randn(3, 64),))
    made = tokopt.optimize(given, "keep_grid", strict=True)
    assert made.history[-1].matches == 2
    assert differences(given, made)[0].nmse < 1e-11
    worst = re.search(r"largest relative output error: \S+ (\S+?),", " ".join(made.history[-1].notes))
    assert worst and float(worst[1]) < 1e-11  # of codes and offsets together
    path = tokopt.export(made, tmp_path / "model.tokopt")
    assert tokopt.verify(path).ok
    assert fused_kernels(path / "forward.onnx", tmp_path)["MatMulNBits"] == 2


# --- what cannot be ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    {
        "gptq{group=16}": "needs inputs to calibrate with",
        "awq{group=16}": "needs inputs to calibrate with",
        "int8{activations=static}": "needs inputs to calibrate with",
        "smoothquant": "needs inputs to calibrate with",
        "rtn{bits=9}": "bits=9 must be 2 to 8",
        "rtn{group=24}": "group=24 must be a power of two",
        "rtn{average=3}": "average=3 must be 4 to 8",
        "rtn{group=32}": "its 48 inputs are no multiple of group=32",
        'rtn{group=16 only=["nowhere*"]}': "there is no linear to quantize",
        "rtn{group=16},rtn{group=16}": "there is no linear to quantize",
        "gptq{damp=0}": "damp=0 must be positive",
        "nupes{symmetric=false}": "its grid is symmetric",
        "nupes{exponent=2}": "exponent=2 must be 0.1 to 1",
        "smoothquant{alpha=2}": "alpha=2 must be 0 to 1",
        "int8{activations=sometimes}": "wrong type",
        "fp8{activations=static}": "needs inputs to calibrate with",
        "fp8{activations=sometimes}": "wrong type",
        "fp8,fp8": "there is no linear to quantize",
        "keep_grid": "its weights lie on no grid",
    }.items(),
)
def test_what_cannot_be_is_refused(pipeline: str, reason: str) -> None:
    with pytest.raises(TokoptError, match=reason):
        tokopt.optimize(captured("vit"), pipeline, strict=True)


@pytest.mark.parametrize(
    ("name", "calibration", "reason"),
    [
        ("vit", [], "the calibration data is empty"),
        ("vit", iter(()), "the calibration data is empty"),
        ("vit", [torch.zeros(2, 3, 9, 9)], r"has shape \[2, 3, 9, 9\] for 'pixel_values'"),
        ("vit", [(torch.zeros(2, 3, 24, 24),) * 2], "looks like them, and the model takes pixel_values"),
        ("llama", [[]], "is no text"),
        ("llama", [[0, 97]], "give token ids below 97"),
    ],
)
def test_bad_samples_are_refused(name: str, calibration: Any, reason: str) -> None:
    with pytest.raises(TokoptError, match=reason):
        tokopt.optimize(bundle(name), METHODS["gptq"], calibration=calibration)


def test_patterns_choose_layers() -> None:
    made = tokopt.optimize(
        captured("vit"), 'rtn{group=16 only=["layers.0*"] skip=["*attention*"]}', strict=True
    )
    module = made.main.module
    assert made.history[-1].matches == 2
    assert len([n for n in module.graph.nodes if "dequantize_weight" in str(n.target)]) == 2
