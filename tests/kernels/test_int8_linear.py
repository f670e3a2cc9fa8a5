"""The linear of bytes: every form on every instruction set, sharing of weights, bad input, sanitizers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.int8_linears import (
    FORMS,
    Int8Linear,
    naive,
    onnx_model,
    random_int8_linear,
    random_rows,
)
from tests.kernels.linears import (
    FAILURES,
    needs_library,
    nmse,
    on_linux,
    packed_bytes,
    session,
    sessions_of_a_file,
    unaligned,
)
from tests.kernels.sanitizers import check_watched, examples, skip_when_watched
from tokopt.errors import InputError
from tokopt.kernels import cpu

forms = pytest.mark.parametrize("form", FORMS)
grids = pytest.mark.parametrize("grid", [{}, {"step": 0.02, "zero": 140}], ids=["rows", "grid"])


@forms
@examples(60)
@given(st.data())
def test_form_equals_naive(form: str, data: st.DataObject) -> None:
    """Any number of rows, inputs and outputs, with a grid or a step of every row, at any address."""
    rows = data.draw(
        st.sampled_from([0, 1, 2, 3, 5, 6, 7, 8, 9, 12, 13, 16, 17, 31, 32, 33, 97, 130]), "rows"
    )
    attributes: dict[str, Any] = {}
    if data.draw(st.booleans(), "grid"):
        attributes = {"step": 0.02, "zero": data.draw(st.sampled_from([0, 1, 115, 128, 255]), "zero")}
    if activation := data.draw(st.sampled_from(["", "gelu", "gelu_tanh"]), "activation"):
        attributes["activation"] = activation
    linear = random_int8_linear(
        data.draw(st.integers(0, 99), "seed"),
        data.draw(st.integers(1, 200), "inputs"),
        data.draw(st.integers(1, 70), "outputs"),
        bias=data.draw(st.booleans(), "bias"),
        **attributes,
    )
    x = random_rows(data.draw(st.integers(0, 99), "seed of x"), rows, linear)
    if form != "reference" and data.draw(st.booleans(), "unaligned"):
        x = unaligned(x)
    got = FORMS[form](linear, x, data.draw(st.sampled_from([1, 2]), "threads"))
    want = naive(linear, x)
    assert got.shape == want.shape and got.dtype == np.float32
    before = naive(linear.saying(activation=""), x)  # GELU cancels: its error is one of what it is given
    assert ((got - want) ** 2).sum() <= 1e-11 * max((before**2).sum(), 1e-30)


@forms
@grids
def test_parts_of_many_rows_and_outputs_meet(form: str, grid: dict[str, Any]) -> None:
    """Several threads, parts of the rows and strips of the weight, and rows that are rounded in parallel."""
    linear = random_int8_linear(0, 1090, 150, **grid)
    x = random_rows(1, 203, linear)
    assert nmse(FORMS[form](linear, x, 2), naive(linear, x)) < 1e-11


@forms
@grids
@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (2, 3, 64), (2, 0, 64)])
def test_leading_axes_stay(form: str, grid: dict[str, Any], shape: tuple[int, ...]) -> None:
    linear = random_int8_linear(0, 64, 5, **grid)
    x = random_rows(1, 6, linear)[: int(np.prod(shape[:-1]))].reshape(shape)
    got = FORMS[form](linear, x, 1)
    assert got.shape == (*shape[:-1], 5)
    assert nmse(got, naive(linear, x)) < 1e-11


@forms
@pytest.mark.parametrize("zero", [0, 128, 255])
@pytest.mark.parametrize("code", [0, 1, 255])
@pytest.mark.parametrize("rows", [1, 40])
def test_the_largest_sums_are_exact(form: str, zero: int, code: int, rows: int) -> None:
    """No sum saturates or wraps, of 2 products or of 4 or of all: the largest codes of one sign, and of both."""
    codes = np.full((128, 33), code, np.uint8)
    codes[:, 1], codes[::2, 2] = 255 - code, 255 - code
    linear = Int8Linear({"codes": codes, "scale": np.ones(33, np.float32)}, {"step": 1.0, "zero": zero})
    x = np.full((rows, 128), 1000, np.float32)
    x[-1], x[0, ::2] = -1000, -1000
    rounded = np.clip(x + zero, 0, 255).astype(np.int64) - zero
    np.testing.assert_array_equal(FORMS[form](linear, x, 1), rounded @ (codes.astype(np.int64) - 128))


@forms
def test_sums_of_as_many_inputs_as_are_allowed_are_exact(form: str) -> None:
    codes = np.zeros((65536, 1), np.uint8)
    linear = Int8Linear({"codes": codes, "scale": np.full(1, 2.0**-20, np.float32)}, {"step": 1.0, "zero": 0})
    x = np.full((1, 65536), 255, np.float32)
    np.testing.assert_array_equal(FORMS[form](linear, x, 1), [[-(2.0**-20) * 255 * 128 * 65536]])


@forms
def test_ties_go_to_even_codes_and_others_to_the_nearest(form: str) -> None:
    """As QuantizeLinear rounds: after a division by a step whose inverse is no float."""
    step = np.float32(0.3)
    linear = Int8Linear(
        {"codes": np.full((1, 1), 129, np.uint8), "scale": np.ones(1, np.float32)},
        {"step": float(step), "zero": 100},
    )
    halves = (np.arange(-110, 170, dtype=np.float32) + np.float32(0.5)) * step
    x = np.concatenate(
        [halves, np.nextafter(halves, np.float32(9e9)), np.nextafter(halves, np.float32(-9e9))]
    )
    codes = np.clip(np.rint(x / step) + 100, 0, 255)
    got = FORMS[form](linear, x[:, None], 1)[:, 0]
    np.testing.assert_array_equal(np.rint(got / step) + 100, codes)


@forms
def test_a_row_of_zeros_gives_the_bias(form: str) -> None:
    linear = random_int8_linear(0, 64, 18)
    x = np.zeros((3, 64), np.float32)
    x[1], x[2] = 1e-37, -1e-45
    np.testing.assert_allclose(FORMS[form](linear, x, 1), [linear.constants["bias"]] * 3, rtol=1e-6)


@forms
@grids
@pytest.mark.parametrize("wrong", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [9, 40])
def test_what_is_not_finite_spoils_its_own_row(
    form: str, grid: dict[str, Any], wrong: float, rows: int
) -> None:
    """An infinity is beyond the last code of a grid, and leaves no step to a row."""
    linear = random_int8_linear(0, 70, 18, **grid)
    x = random_rows(1, rows, linear)
    want = naive(linear, x)
    x[4, 40] = wrong
    got = FORMS[form](linear, x, 1)
    if grid and np.isinf(wrong):
        x[4, 40] = np.sign(wrong) * 1e6
        want[4] = naive(linear, x[4])
        assert nmse(got[4], want[4]) < 1e-11
    else:
        assert np.isnan(got[4]).all()
    others = np.arange(rows) != 4
    assert nmse(got[others], want[others]) < 1e-11


@forms
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations_are_right_everywhere(form: str, activation: str) -> None:
    """Near zero, where they bend, and far out, to 3e-7 of the larger of input and 1."""
    values = np.concatenate(
        [np.linspace(-12, 12, 4001), np.geomspace(12, 1e30, 40), -np.geomspace(12, 1e30, 40)]
    )
    linear = Int8Linear(
        {
            "codes": np.full((1, len(values)), 128, np.uint8),
            "scale": np.ones(len(values), np.float32),
            "bias": values.astype(np.float32),
        },
        {"activation": activation},
    )
    with np.errstate(over="ignore"):
        want = naive(linear, np.ones((1, 1)))
    got = FORMS[form](linear, np.ones((1, 1), np.float32), 1)
    assert (np.abs(got - want) <= 3e-7 * np.maximum(1, np.abs(values))).all()


@needs_library
def test_the_output_has_the_axes_of_the_input() -> None:
    model = onnx_model(random_int8_linear(0, 64, 5))
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    for name in ("batch", "tokens"):
        sizes.add().dim_param = name
    sizes.add().dim_value = 64
    assert session(model).get_outputs()[0].shape == ["batch", "tokens", 5]


@needs_library
def test_sessions_share_packed_weights() -> None:
    """Whatever the instruction sets, grids and activations, a weight is packed once, and freed with the last."""
    gc.collect()
    before = packed_bytes()
    linear = random_int8_linear(0, 64, 96)
    sessions = [session(onnx_model(linear), isa) for isa in cpu.isas()]
    once = packed_bytes()
    assert once - before >= 64 * 96
    sessions.append(session(onnx_model(linear.saying(step=0.1, zero=3, activation="gelu"))))
    assert packed_bytes() == once
    other = session(onnx_model(random_int8_linear(1, 64, 96)))
    assert packed_bytes() - once == once - before
    del other, sessions
    gc.collect()
    assert packed_bytes() == before


@needs_library
@on_linux
def test_pages_of_the_file_are_given_back(tmp_path: Path) -> None:
    """Once weights are packed, the process holds them once; their file is read again where another session needs it."""
    linear = random_int8_linear(0, 1024, 4096)
    sessions, resident = sessions_of_a_file(onnx_model(linear), tmp_path)
    assert resident < 0.05
    x = random_rows(1, 3, linear)
    for own in sessions:
        assert nmse(np.asarray(own.run(None, {"x": x})[0]), naive(linear, x)) < 1e-11


@needs_library
@pytest.mark.parametrize("name", ["codes", "scale", "bias"])
def test_weights_that_differ_in_one_number_are_not_shared(name: str) -> None:
    linear = random_int8_linear(0, 70, 40)
    changed = linear.constants[name].copy()
    changed.reshape(-1)[-1] += 1
    x = random_rows(1, 3, linear)
    sessions = [(each, session(onnx_model(each))) for each in (linear, linear.but(**{name: changed}))]
    for each, own in sessions:
        assert nmse(np.asarray(own.run(None, {"x": x})[0]), naive(each, x)) < 1e-11


GOOD = random_int8_linear(0, 12, 6)

BAD: dict[str, tuple[Callable[[], Int8Linear], str]] = {
    "rank": (lambda: GOOD.but(codes=GOOD.constants["codes"][0]), "codes must be"),
    "empty": (
        lambda: Int8Linear({"codes": np.zeros((12, 0), np.uint8), "scale": np.zeros(0, np.float32)}),
        "are empty",
    ),
    "inputs": (
        lambda: GOOD.but(codes=np.zeros((65537, 6), np.uint8)),
        "65537 inputs are more than 65536",
    ),
    "scale": (lambda: GOOD.but(scale=GOOD.constants["scale"][:5]), "scale must be"),
    "bias": (lambda: GOOD.but(bias=np.zeros(7, np.float32)), "bias must be"),
    "step of 0": (lambda: GOOD.saying(step=0.0, zero=1), "step=0.* must be a positive number"),
    "step of NaN": (lambda: GOOD.saying(step=float("nan"), zero=1), "step=.*nan must be a positive number"),
    "step": (lambda: GOOD.saying(step=-0.5, zero=1), "step=-0.5.* must be a positive number"),
    "zero": (lambda: GOOD.saying(step=0.5, zero=256), "zero=256 must be 0 to 255"),
    "activation": (lambda: GOOD.saying(activation="relu"), "activation 'relu' must be gelu, gelu_tanh or "),
}


@forms
@pytest.mark.parametrize("name", BAD)
def test_bad_constants_are_refused(form: str, name: str) -> None:
    """When the session is created, in one sentence that names the op."""
    make, words = BAD[name]
    linear = make()
    with pytest.raises((InputError, *FAILURES), match=words) as caught:
        FORMS[form](linear, np.zeros((1, linear.inputs), np.float32), 1)
    if form != "reference":
        assert "tokopt.cpu::Int8Linear 'proj': " in str(caught.value)


@needs_library
@pytest.mark.parametrize("name", ["codes", "scale", "bias"])
def test_weights_that_are_computed_are_refused(name: str) -> None:
    with pytest.raises(FAILURES, match=f"'proj': {name} must be a constant"):
        session(onnx_model(GOOD, computed=name))


@needs_library
def test_a_step_without_a_zero_point_is_refused() -> None:
    with pytest.raises(FAILURES, match="attribute zero is missing"):
        session(onnx_model(GOOD.saying(step=0.5)))


@forms
def test_x_of_another_width_is_refused(form: str) -> None:
    with pytest.raises((InputError, *FAILURES), match="12"):
        FORMS[form](GOOD, np.zeros((3, 96), np.float32), 1)


@needs_library
@skip_when_watched
def test_sanitizers_find_nothing() -> None:
    check_watched(__file__)
