"""The block-quantized linear: every form on every instruction set, sharing of weights, bad input, sanitizers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.linears import (
    ACTIVATIONS,
    FAILURES,
    FORMS,
    Linear,
    naive,
    needs_library,
    nmse,
    on_linux,
    onnx_model,
    packed_bytes,
    random_linear,
    random_rows,
    session,
    sessions_of_a_file,
    unaligned,
)
from tests.kernels.sanitizers import check_watched, examples, skip_when_watched
from tokopt.errors import InputError
from tokopt.kernels import cpu

forms = pytest.mark.parametrize("form", FORMS)


@forms
@examples(60)
@given(st.data())
def test_form_equals_naive(form: str, data: st.DataObject) -> None:
    """Any number of rows and outputs, groups, offsets and types, at any address."""
    rows = data.draw(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17, 65, 70]), "rows")
    gate = data.draw(st.sampled_from(["", *ACTIVATIONS]), "gate")
    linear = random_linear(
        data.draw(st.integers(0, 99), "seed"),
        data.draw(st.integers(1, 40), "outputs") * (2 if gate else 1),
        data.draw(st.integers(1, 5), "groups"),
        bits=data.draw(st.sampled_from([4, 8]), "bits"),
        group=data.draw(st.sampled_from([32, 64, 128]), "group"),
        offset=data.draw(st.sampled_from(["symmetric", "zero", "minimum"]), "offset"),
        half=data.draw(st.booleans(), "half"),
        bias=data.draw(st.booleans(), "bias"),
        gate=gate,
    )
    x = random_rows(data.draw(st.integers(0, 99), "seed of x"), rows, linear)
    if form != "reference" and data.draw(st.booleans(), "unaligned"):
        x = unaligned(x)
    got = FORMS[form](linear, x, data.draw(st.sampled_from([1, 2]), "threads"))
    want = naive(linear, x)
    assert got.shape == want.shape and got.dtype == np.float32
    before = naive(replace(linear, gate=""), x)  # what gates cancels: its error is one of what it is given
    scale = (want**2).sum() + (before**2).sum() if gate else (want**2).sum()
    assert ((got - want) ** 2).sum() <= 1e-11 * max(scale, 1e-30)


@forms
@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (2, 3, 64), (2, 0, 64)])
def test_leading_axes_stay(form: str, shape: tuple[int, ...]) -> None:
    linear = random_linear(0, 5, 2)
    x = random_rows(1, 6, linear)[: int(np.prod(shape[:-1]))].reshape(shape)
    got = FORMS[form](linear, x, 1)
    assert got.shape == (*shape[:-1], 5)
    assert nmse(got, naive(linear, x)) < 1e-11


@forms
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("signs", [1, -1, (1, -1)], ids=str)
def test_the_largest_sums_are_exact(form: str, bits: int, signs: int | tuple[int, int]) -> None:
    """No integer sum saturates or wraps: every code is the largest and every number is 127."""
    codes = np.full((17, 128 * bits // 8), 255, np.uint8)
    constants = {
        "codes": codes,
        "scale": np.ones((17, 1), np.float32),
        "zero": np.zeros((17, 1), np.uint8),
    }
    x = np.full((9, 128), 127, np.float32) * np.resize(signs, 128).astype(np.float32)
    got = FORMS[form](Linear(constants, bits, 128), x, 1)
    np.testing.assert_array_equal(got, np.full((9, 17), x[0].sum() * (2**bits - 1)))


@forms
@pytest.mark.parametrize("offset", ["symmetric", "zero", "minimum"])
def test_rows_of_nothing_give_the_bias(form: str, offset: str) -> None:
    """Zeros, and numbers too small to be divided by, count as nothing."""
    linear = random_linear(0, 18, 2, offset=offset, bias=True)
    x = np.zeros((3, 64), np.float32)
    x[1], x[2] = 1e-37, -1e-45
    np.testing.assert_array_equal(
        FORMS[form](linear, x, 1), np.broadcast_to(linear.constants["bias"], (3, 18))
    )


@forms
@pytest.mark.parametrize("offset", ["symmetric", "zero", "minimum"])
@pytest.mark.parametrize("wrong", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_own_row(form: str, offset: str, wrong: float) -> None:
    linear = random_linear(0, 18, 2, bits=8, offset=offset)
    x = random_rows(1, 9, linear)
    want = naive(linear, x)
    x[4, 40] = wrong
    got = FORMS[form](linear, x, 1)
    assert np.isnan(got[4]).all()
    others = np.arange(9) != 4
    assert nmse(got[others], want[others]) < 1e-11


@forms
@pytest.mark.parametrize("peak", [1e-30, 1e38])
def test_small_and_large_numbers_round_alike(form: str, peak: float) -> None:
    linear = random_linear(0, 18, 2).but(scale=np.full((18, 2), 1e-3, np.float32))
    x = random_rows(1, 3, linear)
    x *= peak / np.abs(x).max()
    assert nmse(FORMS[form](linear, x, 1) / peak, naive(linear, x) / peak) < 1e-11


@needs_library
@pytest.mark.parametrize("isa", cpu.isas() if cpu.library() else [])
def test_half_precision_numbers_of_every_kind(isa: str) -> None:
    """Every finite float16 is a scale once: subnormal, largest, both zeros."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    constants = {"codes": np.full((len(every), 16), 0x99, np.uint8), "scale": every[:, None]}
    x = np.zeros((1, 32), np.float32)
    x[0, 0] = 127
    (y,) = session(onnx_model(Linear(constants, 4, 32)), isa).run(None, {"x": x})
    np.testing.assert_array_equal(np.asarray(y)[0], 127 * every.astype(np.float32))


@needs_library
def test_the_output_has_the_axes_of_the_input() -> None:
    model = onnx_model(random_linear(0, 5, 2))
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    for name in ("batch", "tokens"):
        sizes.add().dim_param = name
    sizes.add().dim_value = 64
    assert session(model).get_outputs()[0].shape == ["batch", "tokens", 5]


@needs_library
@pytest.mark.parametrize("gate", ACTIVATIONS)
@pytest.mark.parametrize("isa", cpu.isas() if cpu.library() else [])
def test_gates_of_every_size(isa: str, gate: str) -> None:
    """From one end of what float32's exponential takes to the other, in both signs; NaN stays NaN."""
    values = np.linspace(-100, 100, 4001, dtype=np.float32)
    values[0] = np.nan
    constants = {
        "codes": np.full((2 * len(values), 16), 0x88, np.uint8),
        "scale": np.ones((2 * len(values), 1), np.float32),
        "bias": np.concatenate([values, np.ones_like(values)]),
    }
    (y,) = session(onnx_model(Linear(constants, 4, 32, gate)), isa).run(
        None, {"x": np.zeros((1, 32), np.float32)}
    )
    want = ACTIVATIONS[gate](values.astype(np.float64))
    np.testing.assert_allclose(np.asarray(y)[0], want, rtol=2e-6, atol=1e-6)


@needs_library
def test_the_output_of_a_gate_has_half_as_many() -> None:
    model = onnx_model(random_linear(0, 6, 2, gate="silu"))
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    sizes.add().dim_param = "tokens"
    sizes.add().dim_value = 64
    assert session(model).get_outputs()[0].shape == ["tokens", 3]


@needs_library
def test_sessions_share_packed_weights() -> None:
    """Whatever the number of sessions and instruction sets, a weight is packed once, and freed with the last."""
    gc.collect()
    before = packed_bytes()
    model = onnx_model(random_linear(0, 64, 4, offset="minimum"))
    sessions = [session(model, isa) for isa in cpu.isas()]
    once = packed_bytes()
    assert once - before >= 64 * 128 // 2
    sessions.append(session(model))
    assert packed_bytes() == once
    other = session(onnx_model(random_linear(1, 64, 4, offset="minimum")))
    assert packed_bytes() - once == once - before
    del other, sessions
    gc.collect()
    assert packed_bytes() == before


@needs_library
@on_linux
def test_pages_of_the_file_are_given_back(tmp_path: Path) -> None:
    """Once weights are packed, the process holds them once; their file is read again where another session needs it."""
    linear = random_linear(0, 4096, 64, offset="minimum")
    sessions, resident = sessions_of_a_file(onnx_model(linear), tmp_path)
    assert resident < 0.05
    x = random_rows(1, 3, linear)
    for own in sessions:
        assert nmse(np.asarray(own.run(None, {"x": x})[0]), naive(linear, x)) < 1e-11


@needs_library
@pytest.mark.parametrize("name", ["codes", "scale", "zero", "bias"])
def test_weights_that_differ_in_one_number_are_not_shared(name: str) -> None:
    linear = random_linear(0, 20, 2, offset="zero", bias=True)
    changed = linear.constants[name].copy()
    changed.reshape(-1)[-1] += 1
    x = random_rows(1, 3, linear)
    sessions = [(each, session(onnx_model(each))) for each in (linear, linear.but(**{name: changed}))]
    for each, own in sessions:
        assert nmse(np.asarray(own.run(None, {"x": x})[0]), naive(each, x)) < 1e-11


GOOD = random_linear(0, 6, 4, offset="zero", bias=True)
SHORT = GOOD.constants["zero"][:, :3]

BAD: dict[str, tuple[Callable[[], Linear], str]] = {
    "bits": (lambda: Linear(GOOD.constants, 5, 32), "bits=5 must be 4 or 8"),
    "group": (lambda: Linear(GOOD.constants, 4, 16), "group=16 must be 32, 64 or 128"),
    "group that is no divisor": (
        lambda: GOOD.but(codes=GOOD.constants["codes"][:, :40]),
        "whole groups of 32",
    ),
    "scale": (lambda: GOOD.but(scale=GOOD.constants["scale"][:5]), "scale must be"),
    "zero": (lambda: GOOD.but(zero=SHORT), "zero must be"),
    "minimum": (
        lambda: GOOD.but(zero=None, minimum=SHORT.astype(np.float16)),
        "minimum must be",
    ),
    "both offsets": (
        lambda: GOOD.but(minimum=GOOD.constants["scale"]),
        "zero and minimum exclude each other",
    ),
    "bias": (lambda: GOOD.but(bias=np.zeros(7, np.float32)), "bias must be"),
    "gate": (lambda: replace(GOOD, gate="relu"), "gate=relu must be silu, gelu or gelu_tanh"),
    "gate of an odd number": (
        lambda: random_linear(0, 5, 4, gate="silu"),
        "half",
    ),
    "rank": (lambda: GOOD.but(codes=GOOD.constants["codes"][None]), "codes must be"),
}


@forms
@pytest.mark.parametrize("name", BAD)
def test_bad_constants_are_refused(form: str, name: str) -> None:
    """When the session is created, in one sentence that names the op."""
    make, words = BAD[name]
    with pytest.raises((InputError, *FAILURES), match=words) as caught:
        FORMS[form](make(), np.zeros((1, 128), np.float32), 1)
    if form != "reference":
        assert "tokopt.cpu::QuantizedLinear 'proj': " in str(caught.value)


@needs_library
@pytest.mark.parametrize("name", ["codes", "scale", "zero", "bias"])
def test_weights_that_are_computed_are_refused(name: str) -> None:
    with pytest.raises(FAILURES, match=f"'proj': {name} must be a constant"):
        session(onnx_model(GOOD, computed=name))


@needs_library
@pytest.mark.parametrize(
    ("linear", "words"),
    [
        (GOOD.but(scale=GOOD.constants["scale"].astype(np.float64)), "float32 or float16"),
        (
            GOOD.but(zero=None, minimum=GOOD.constants["scale"].astype(np.float32)),
            "minimum must have the type of scale",
        ),
    ],
    ids=["scale", "minimum"],
)
def test_other_types_are_refused(linear: Linear, words: str) -> None:
    with pytest.raises(FAILURES, match=words):
        session(onnx_model(linear))


@needs_library
def test_a_missing_attribute_is_refused() -> None:
    with pytest.raises(FAILURES, match="attribute group is missing"):
        session(onnx_model(GOOD, bits=4))


@forms
def test_x_of_another_width_is_refused(form: str) -> None:
    with pytest.raises((InputError, *FAILURES), match="128"):
        FORMS[form](GOOD, np.zeros((3, 96), np.float32), 1)


@needs_library
@skip_when_watched
def test_sanitizers_find_nothing() -> None:
    check_watched(__file__)
