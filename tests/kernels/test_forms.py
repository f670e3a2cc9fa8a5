"""Every form of every op gives what a naive float64 version gives."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.kernels.forms import (
    CASES,
    FORMS,
    KERNELS,
    Call,
    Case,
    Form,
    bare_session,
    expected,
    onnx_form,
    run_session,
    to_onnx,
    world,
)
from tokopt.kernels import OPS, ops

cases = pytest.mark.parametrize("case", CASES, ids=str)
forms = pytest.mark.parametrize("form", FORMS)


def assert_equal(got: tuple[np.ndarray, ...], want: tuple[np.ndarray, ...]) -> None:
    """Indices, flags and shapes are equal, floats equal within float32 rounding."""
    assert [g.shape for g in got] == [w.shape for w in want]
    for g, w in zip(got, want, strict=True):
        if g.dtype == np.float32:
            np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(g, w)


def test_the_table_covers_every_op():
    assert {case.op for case in CASES} == set(OPS)


@forms
@cases
@settings(max_examples=20)
@given(st.data())
def test_form_equals_naive(case: Case, form: str, data: st.DataObject):
    batch = data.draw(st.integers(1, 3), "batch")
    free = data.draw(st.integers(2, 24), "free")
    r = data.draw(st.integers(0, case.most(free)), "r")
    padding = data.draw(st.sampled_from([0, 0, 1, 2, free // 2, free]), "padding")
    arguments = world(case, batch, case.prefix + free, r, data.draw(st.integers(0, 99), "seed"), padding)
    # Two tokens are equally near their mean and have one energy: rounding alone would decide.
    assume(free - padding != 2 or ("margin" not in case.static and case.static.get("method") != "kcenter"))
    assert_equal(FORMS[form](case, arguments), expected(case, arguments))


# The energies are sums of exponentials, never exactly tied: test_energy_ties makes them linear.
COMPARING = [
    case
    for case in CASES
    if {"metric", "score"} & {*case.arguments} and "margin" not in case.static and not case.inputs
]


every_form = pytest.mark.parametrize("form", {**FORMS, **KERNELS}.values(), ids=[*FORMS, *KERNELS])


@every_form
@pytest.mark.parametrize("case", COMPARING, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_ties_go_to_the_lowest_index(case: Case, form: Form, seed: int):
    """Signs in 16 dimensions and 16 tokens: all means, norms and cosines are exact, and most are tied."""
    arguments = world(case, 2, case.prefix + 16, 6, seed)
    generator = torch.Generator().manual_seed(seed)
    if "metric" in arguments:
        arguments["metric"] = torch.randint(0, 2, (2, case.prefix + 16, 16), generator=generator) * 2.0 - 1
    else:
        arguments["score"] = torch.randint(0, 3, (2, case.prefix + 16), generator=generator).float()
    assert_equal(form(case, arguments), expected(case, arguments))


LINEAR = [Case(op, {"prefix": 1, "margin": -1.0}) for op in ("energy_match", "energy_bipartite_match")]


@every_form
@pytest.mark.parametrize("case", LINEAR, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_energy_ties(case: Case, form: Form, seed: int):
    """With a margin of -1 the energy is a sum of exact numbers, and many are tied."""
    arguments = world(case, 2, 17, 6, seed)
    generator = torch.Generator().manual_seed(seed)
    arguments["metric"] = torch.randint(0, 2, (2, 17, 4), generator=generator) * 2.0 - 1
    assert_equal(form(case, arguments), expected(case, arguments))


@cases
def test_schema_fake_and_dynamic_shapes(case: Case):
    arguments = world(case, 2, case.prefix + 9, 2, seed=0)
    torch.library.opcheck(getattr(ops, case.op).default, tuple(arguments.values()))


@cases
def test_onnx_form_is_portable(case: Case):
    """Bodies are standard ops of the model's opset, or call others; no scatter meets an index twice."""
    model = onnx_form(case)
    onnx.checker.check_model(model, full_check=True)
    assert "tokopt" in {node.domain for node in model.graph.node}
    opset = {entry.domain: entry.version for entry in model.opset_import}[""]
    assert opset == (24 if case.op in ("cache_write", "move_entries") else 23)
    for function in model.functions:
        assert {entry.domain: entry.version for entry in function.opset_import}[""] == opset
        assert {node.domain for node in function.node} <= {"", "tokopt"}
        assert {node.op_type for node in function.node if node.domain} <= {f.name for f in model.functions}
        scatters = [node for node in function.node if node.op_type.startswith("Scatter")]
        assert not scatters or function.name in ("keep_slots", "multiplied", "source_map")
    loops = [node.op_type for function in model.functions for node in function.node].count("Loop")
    assert loops == (case.op in ("farthest_point", "truncated_softmax", "draw_tokens"))


def test_a_static_r_exports_too():
    """What a pass usually writes: r a Python int, only the batch dynamic."""

    class Merge(torch.nn.Module):
        def forward(self, x: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, ...]:
            keep, drop, dest = ops.bipartite_match(x, size, 4, 1)
            return ops.merge_tokens(x, size, keep, drop, dest)

    dynamic = torch.export.Dim("batch")
    x, size = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0)), torch.ones(3, 12)
    program = torch.export.export(Merge(), (x, size), dynamic_shapes=({0: dynamic}, {0: dynamic}))
    bare = bare_session(to_onnx(program))
    assert [output.shape[1:] for output in bare.get_outputs()] == [[8, 8], [8]]
    for batch in (1, 3):
        inputs = (x[:batch], size[:batch])
        assert_equal(run_session(bare, inputs), tuple(t.numpy() for t in Merge()(*inputs)))


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    return float(((got - want) ** 2).sum() / (want**2).sum())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-7), (torch.bfloat16, 1e-5)])
def test_merging_half_precision_rounds_once(dtype: torch.dtype, bound: float):
    """Sums run in float32: the error is that of rounding the result to the dtype, even for 500 to one."""
    case = Case("merge_tokens")
    arguments = world(case, 2, 600, 500, seed=0)
    arguments["x"] = (arguments["x"] + 3).to(dtype)
    arguments["dest"] = torch.ones_like(arguments["dest"])
    wide = {**arguments, "x": arguments["x"].double()}
    merged, _ = ops.merge_tokens(*arguments.values())
    assert merged.dtype == dtype
    assert nmse(merged.double().numpy(), expected(case, wide)[0]) < bound
    if dtype == torch.float16:
        program = torch.export.export(Call(case), (*arguments.values(),))
        got, _ = run_session(bare_session(to_onnx(program)), tuple(arguments.values()))
        assert got.dtype == np.float16
        assert nmse(got.astype(np.float64), expected(case, wide)[0]) < bound
