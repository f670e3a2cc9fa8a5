"""Models without padding get forms of the token ops that do not look for it, and choose the same tokens."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import tokopt
from tests.kernels.forms import CASES, Case, bare_session, exported, run_session, tensors, translated, world
from tests.lower.encoders import text, vision
from tokopt.kernels import attach_functions, ops
from tokopt.lower.onnx.real_tokens import FORMS


def called(path: Path) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in onnx.load(path / "forward.onnx").graph.node)


def test_images_have_no_padding(tmp_path: Path) -> None:
    """Also after a merge, whose sizes are sums, and after tokens were dropped."""
    for pipeline in ("tome{r=2}", "evit{r=3 layers=[0]},tome{r=2 layers=[1]}"):
        path = tokopt.export(tokopt.optimize(vision(), pipeline), tmp_path / "m.tokopt", overwrite=True)
        kinds = called(path)
        assert (
            kinds["bipartite_match_real"] == pipeline.count("tome{r=2}") + 1 and not kinds["bipartite_match"]
        )
        assert tokopt.verify(path).ok


def test_padded_text_keeps_the_general_form(tmp_path: Path) -> None:
    path = tokopt.export(tokopt.optimize(text(), "tome{r=1}"), tmp_path / "m.tokopt")
    kinds = called(path)
    assert kinds["bipartite_match"] == 2 and not kinds["bipartite_match_real"]


@pytest.mark.parametrize("case", [case for case in CASES if case.op in FORMS], ids=str)
def test_forms_choose_the_same(case: Case) -> None:
    model = translated(exported(case))
    for node in model.graph:
        node.op_type = FORMS.get(node.op_type, node.op_type)
    attach_functions(model)
    session = bare_session(ir.to_proto(model))
    for seed, (batch, tokens, r) in enumerate([(3, 14, 4), (1, 31, 12), (2, 9, 1)]):
        arguments = world(case, batch=batch, tokens=tokens, r=r, seed=seed)
        arguments["size"] = arguments["size"].clamp(min=1)
        wanted = getattr(ops, case.op)(*arguments.values())
        for got, want in zip(run_session(session, tensors(arguments)), wanted, strict=True):
            np.testing.assert_array_equal(got, want.numpy())
