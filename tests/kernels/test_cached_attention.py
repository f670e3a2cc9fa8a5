"""Attention over a cache: every form on every instruction set, any mask, caches in place and copied, bad input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from tests.kernels.attentions import (
    CONSTANTS,
    FORMS,
    Attention,
    naive,
    onnx_model,
    random_attention,
    run,
    run_in_place,
)
from tests.kernels.linears import needs_library, session
from tests.kernels.sanitizers import check_watched, examples, skip_when_watched
from tokopt.errors import InputError
from tokopt.kernels import cpu

forms = pytest.mark.parametrize("form", FORMS)
libraries = pytest.mark.parametrize("isa", cpu.isas() if cpu.library() else [])
FAILURES = (Fail, InvalidArgument, RuntimeException)


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    return float(((got - want) ** 2).sum() / max((want**2).sum(), 1e-30))


def agree(found: tuple[np.ndarray, ...], wanted: tuple[np.ndarray, ...]) -> None:
    """Results are close; floats in the cache differ by one rounding at most, codes not at all."""
    assert [each.shape for each in found] == [each.shape for each in wanted]
    assert found[0].dtype == np.float32
    assert nmse(found[0], wanted[0]) < 1e-11
    for got, want in zip(found[1:], wanted[1:], strict=True):
        assert got.dtype == want.dtype
        if got.dtype == np.int8:
            np.testing.assert_array_equal(got, want)
        else:
            np.testing.assert_allclose(got, want, atol=1e-6)


@forms
@examples(80)
@given(st.data())
def test_form_equals_naive(form: str, data: st.DataObject) -> None:
    """Any sizes, masks, rotations and caches; rows at different lengths; new slots written, all others kept."""
    slots = data.draw(st.sampled_from([1, 2, 17, 63, 64, 65, 130, 300]), "slots")
    tokens = min(data.draw(st.sampled_from([0, 1, 2, 3, 5, 9, 33, 70]), "tokens"), slots)
    key_heads, group = data.draw(st.integers(1, 3), "key heads"), data.draw(st.integers(1, 4), "group")
    channels = data.draw(st.sampled_from([2, 8, 16, 24, 50, 64, 128]), "channels")
    attention = random_attention(
        data.draw(st.integers(0, 99), "seed"),
        data.draw(st.integers(1, 3), "batch"),
        tokens,
        slots,
        key_heads=key_heads,
        group=group,
        channels=channels,
        codes=data.draw(st.booleans(), "codes"),
        packed=data.draw(st.booleans(), "packed"),
        pairs=data.draw(st.sampled_from([0, channels // 2, channels // 4]), "pairs"),
        interleaved=data.draw(st.booleans(), "interleaved"),
        softcap=data.draw(st.sampled_from([0.0, 1.5]), "softcap"),
        alike=data.draw(st.booleans(), "alike"),
        masks=(
            data.draw(st.booleans(), "by row"),
            data.draw(st.sampled_from([1, key_heads, key_heads * group]), "by head"),
            data.draw(st.booleans(), "by token"),
        ),
        density=data.draw(st.sampled_from([0.0, 0.05, 0.7, 1.0]), "density"),
    )
    threads, in_place = data.draw(st.sampled_from([1, 2]), "threads"), data.draw(st.booleans(), "in place")
    agree(FORMS[form](attention, threads, in_place), naive(attention))


@libraries
@examples(40)
@given(st.data())
def test_alike_a_token_has_the_same_bits_beside_any_others(isa: str, data: st.DataObject) -> None:
    """A path of a tree of proposed tokens, in the slots of the tree, and token by token in slots of its own."""
    length = data.draw(st.sampled_from([1, 3, 60, 62, 64, 127, 200, 1000]), "length")
    nodes = data.draw(st.integers(1, 20), "nodes")
    path = sorted(data.draw(st.sets(st.integers(0, nodes - 1), min_size=1), "path"))
    key_heads, group = data.draw(st.integers(1, 2), "key heads"), data.draw(st.integers(1, 4), "group")
    channels = data.draw(st.sampled_from([8, 24, 64]), "channels")
    softcap, codes = data.draw(st.sampled_from([0.0, 1.5]), "softcap"), data.draw(st.booleans(), "codes")
    tree = random_attention(
        data.draw(st.integers(0, 99), "seed"),
        1,
        nodes,
        length + nodes + 3,
        key_heads=key_heads,
        group=group,
        channels=channels,
        codes=codes,
        softcap=softcap,
    )
    mask = np.zeros((1, 1, nodes, length + nodes + 3), bool)
    mask[..., :length] = True
    for place, node in enumerate(path):
        mask[..., node, length + np.array(path[: place + 1])] = True
    tree = replace(tree.but(mask=mask, length=np.array([length])), alike=True)
    threads = data.draw(st.sampled_from([1, 2]), "threads")
    together = FORMS[f"library-{isa}"](tree, threads, False)[0][0, path]
    caches = {name: tree.inputs[name] for name in ("past_key", "past_value")}
    for place, node in enumerate(path):
        own = np.arange(mask.shape[-1]) <= length + place
        alone = tree.but(
            **{name: tree.inputs[name][:, node : node + 1] for name in ("query", "key", "value")},
            **caches,
            mask=own[None, None, None],
            length=np.array([length + place]),
        )
        result, *written = FORMS[f"library-{isa}"](alone, threads, False)
        caches = dict(zip(caches, written, strict=True))
        np.testing.assert_array_equal(result[0, 0], together[place])


@forms
@pytest.mark.parametrize("codes", [False, True])
def test_many_slots_and_many_tokens_are_shared_out(form: str, codes: bool) -> None:
    """More slots than one part has, and more tokens than one block has."""
    for tokens, slots in ((1, 2000), (3, 2000), (150, 400)):
        attention = random_attention(0, 2, tokens, slots, codes=codes, channels=32, pairs=16)
        agree(FORMS[form](attention, 2, True), naive(attention))


@forms
def test_a_token_that_sees_nothing_gets_zeros(form: str) -> None:
    attention = random_attention(0, 2, 3, 20, density=1.0)
    mask = attention.inputs["mask"].copy()
    mask[1, :, 2] = False
    mask[0] = False
    found = FORMS[form](attention.but(mask=mask), 1, False)
    assert not found[0][0].any() and not found[0][1, 2].any() and found[0][1, :2].all()


@forms
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_nobody_sees_does_not_matter(form: str, wrong: float) -> None:
    """A slot that is hidden from all tokens is not read."""
    attention = random_attention(0, 1, 3, 200)
    mask = attention.inputs["mask"].copy()
    mask[..., 5:40] = False
    attention = attention.but(mask=mask, length=np.array([100]))
    wanted = FORMS[form](attention, 1, False)[0]
    spoiled = {name: attention.inputs[name].copy() for name in ("past_key", "past_value")}
    for array in spoiled.values():
        array[:, :, 5:40] = wrong
    found = FORMS[form](attention.but(**spoiled), 1, False)[0]
    if form == "reference":  # which multiplies by 0
        return
    np.testing.assert_array_equal(found, wanted)


@forms
def test_a_token_that_is_not_a_number_spoils_its_own_rows(form: str) -> None:
    attention = random_attention(0, 1, 4, 30)
    query = attention.inputs["query"].copy()
    wanted = FORMS[form](attention, 1, False)[0]
    query[0, 2, :16] = np.nan
    found = FORMS[form](attention.but(query=query), 1, False)[0]
    assert np.isnan(found[0, 2, :16]).all()
    np.testing.assert_array_equal(np.delete(found[0], 2, 0), np.delete(wanted[0], 2, 0))


@forms
@pytest.mark.parametrize("size", [1e-30, 30.0, 3000.0])
def test_small_and_large_scores(form: str, size: float) -> None:
    """Exponentials neither overflow nor lose those that count."""
    attention = replace(random_attention(0, 1, 2, 100, density=1.0), scale=size)
    wanted = naive(attention)[0]
    found = FORMS[form](attention, 1, False)[0]
    np.testing.assert_allclose(found, wanted, rtol=2e-3 if size > 100 else 1e-4, atol=1e-5)


@forms
def test_codes_saturate_and_ties_go_to_even(form: str) -> None:
    attention = random_attention(0, 1, 1, 4, key_heads=1, group=1, channels=8, codes=True)
    values = np.array([[[0.5, 1.5, 2.5, -0.5, -1.5, 126.6, 127.6, -1000]]], np.float32)
    ones = np.ones((1, 1, 8), np.float32)
    attention = attention.but(value=values, value_scale=ones, length=np.array([1]))
    found = FORMS[form](attention, 1, False)[2]
    assert found[0, 0, 1].tolist() == [0, 2, 2, 0, -2, 127, 127, -128]


@needs_library
def test_results_do_not_depend_on_threads() -> None:
    attention = random_attention(3, 2, 2, 1500, channels=64, pairs=32)
    model = onnx_model(attention)
    one, two = (run(session(model, "", threads), attention, True)[0] for threads in (1, 2))
    np.testing.assert_array_equal(one, two)


@needs_library
def test_outputs_have_the_axes_of_the_inputs() -> None:
    attention = random_attention(0, 1, 2, 20, codes=True)
    model = onnx_model(attention)
    for value in model.graph.input:
        sizes = value.type.tensor_type.shape.dim
        names = {"query": ("batch", "tokens", 64), "past_key": ("batch", 2, "slots", 16)}.get(value.name, ())
        for axis, name in zip(sizes, names, strict=False):
            if isinstance(name, str):
                axis.dim_param = name
            else:
                axis.dim_value = name
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    found = {output.name: output.shape for output in session(model).get_outputs()}
    assert found["result"][:2] == ["batch", "tokens"]
    assert found["present_key"] == ["batch", 2, "slots", 16]


GOOD = random_attention(0, 2, 3, 20, channels=16, pairs=8, codes=True)


def cut(name: str, axis: int, by: int = 1) -> Callable[[], Attention]:
    array = GOOD.inputs[name]
    return lambda: GOOD.but(**{name: np.delete(array, slice(by), axis)})


BAD: dict[str, tuple[Callable[[], Attention], str]] = {
    "heads": (lambda: replace(GOOD, heads=3), "heads=3 must be a multiple of key_heads=2"),
    "no heads": (lambda: replace(GOOD, heads=0), "heads=0 must be a multiple of key_heads=2"),
    "query": (cut("query", 2), r"query must be \[2, (3|tokens), 64\], got \[2, 3, 63\]"),
    "rank of query": (lambda: GOOD.but(query=GOOD.inputs["query"][..., None]), "query must be"),
    "key": (cut("key", 1), "key must be"),
    "past key": (cut("past_key", 2), "past_"),
    "past value": (cut("past_value", 3, 2), "past_value must be"),
    "batch": (cut("length", 0), r"length must be \[2\], got \[1\]"),
    "mask": (cut("mask", 3), "mask must be"),
    "rank of mask": (lambda: GOOD.but(mask=GOOD.inputs["mask"][0]), "mask must be"),
    "tokens of mask": (cut("mask", 2), "mask must be"),
    "tables": (cut("cos", 2), "(sin|cos) must be"),
    "tokens of tables": (cut("cos", 1), "(sin|cos) must be"),
    "negative length": (
        lambda: GOOD.but(length=np.array([0, -1])),
        "row 1 has length -1, and 3 new tokens do not fit into 20 slots",
    ),
    "length": (
        lambda: GOOD.but(length=np.array([18, 0])),
        "row 0 has length 18, and 3 new tokens do not fit into 20 slots",
    ),
    "huge length": (lambda: GOOD.but(length=np.array([0, 2**63 - 1])), "do not fit into 20 slots"),
    "scale": (cut("key_scale", 2), "key_scale"),
    "no scale": (lambda: GOOD.but(key_scale=None), "key_scale"),
}


@forms
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(form: str, name: str) -> None:
    """In one sentence that names the node."""
    make, words = BAD[name]
    if form == "reference" and name in ("key", "tables", "tokens of tables"):
        pytest.skip("torch itself refuses these")
    with pytest.raises((InputError, *FAILURES), match=words) as caught:
        FORMS[form](make(), 1, False)
    if form != "reference":
        assert "tokopt.cpu::CachedAttention 'attend': " in str(caught.value)


@needs_library
def test_nothing_is_written_when_a_call_is_refused() -> None:
    own = session(onnx_model(GOOD))
    given = {name: array for name, array in GOOD.inputs.items() if name not in CONSTANTS}
    given["length"] = np.array([0, 18])
    before = {name: array.copy() for name, array in given.items()}
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in given.items()}
    with pytest.raises((RuntimeError, *FAILURES), match="row 1 has length 18"):
        run_in_place(own, values)
    for name in ("past_key", "past_value"):
        np.testing.assert_array_equal(values[name].numpy(), before[name])
    values["length"] = onnxruntime.OrtValue.ortvalue_from_numpy(np.array([0, 17]))
    run_in_place(own, values)
    assert (values["past_key"].numpy() != before["past_key"]).any()


@needs_library
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: (GOOD.but(value=None), {}), "key and value must be given together"),
        (lambda: (GOOD.but(sin=None), {}), "cos and sin must be given together"),
        (lambda: (GOOD, {"heads": 4, "key_heads": 2}), "attribute scale is missing"),
    ],
    ids=["value", "sin", "scale"],
)
def test_what_belongs_together_is_asked_for(
    change: Callable[[], tuple[Attention, dict[str, Any]]], words: str
) -> None:
    attention, attributes = change()
    with pytest.raises(FAILURES, match=words):
        session(onnx_model(attention, **attributes))


@needs_library
@pytest.mark.parametrize("name", ["key_scale", "value_scale"])
def test_scales_that_are_computed_are_refused(name: str) -> None:
    with pytest.raises(FAILURES, match=f"'attend': {name} must be a constant"):
        session(onnx_model(GOOD, computed=name))


@needs_library
@skip_when_watched
def test_sanitizers_find_nothing() -> None:
    check_watched(__file__)
