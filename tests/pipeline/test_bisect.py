"""Bisection names the first pass that moves the outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tests.matrix import language
from tests.matrix.test_matrix import captured
from tokopt.ir.bundle import Bundle
from tokopt.ir.graph import argument, aten, is_call
from tokopt.pipeline.base import Context, Pass, PassResult
from tokopt.pipeline.bisect import bisect
from tokopt.pipeline.manager import Pipeline
from tokopt.rewrite.edit import close_graph, open_graph


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies the epsilon of every layer norm: a small, controllable change."""

    by: float = 1.0
    name: ClassVar[str] = "scale"

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        module = open_graph(bundle.main)
        norms = [n for n in module.graph.nodes if is_call(n, aten.layer_norm)]
        for norm in norms:
            norm.update_arg(4, float(argument(norm, 4, "eps")) * self.by)
        return PassResult(bundle.with_program("forward", close_graph(bundle.main, module)), len(norms))


def test_bisect_names_the_first_pass_that_moves_an_output() -> None:
    vit = captured("vit")
    found = bisect(vit, Pipeline((Scale(1.0), Scale(1e11), Scale(2.0))), tolerance=1e-6)
    assert found.culprit is found.steps[1]
    assert [step.worst == 0 for step in found.steps] == [True, False, False]
    assert bisect(vit, "tome{r=0}").culprit is None


def test_bisect_compares_the_logits_of_language_models() -> None:
    """Passes that add state are compared too: what a full cache gives is what the model gives."""
    found = bisect(language.bundle("llama"), "h2o{budget=20 recent=3},rtn{bits=2 group=16}", tolerance=1e-2)
    assert [[d.output for d in step.differences] for step in found.steps] == [["logits"], ["logits"]]
    assert found.steps[0].worst < 1e-10
    assert found.culprit is found.steps[1]
