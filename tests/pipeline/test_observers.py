"""Observers see every pass; a failure leaves a reproducer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

import tokopt
from tests.matrix.test_matrix import captured
from tokopt.errors import PassError
from tokopt.ir.bundle import Bundle
from tokopt.passes import PASSES
from tokopt.pipeline.base import Context, Pass, PassResult
from tokopt.pipeline.manager import Pipeline, parse
from tokopt.pipeline.observers import differences, dump_to
from tokopt.runtime.format.manifest import read_manifest


def vit() -> Bundle:
    return captured("vit")


@dataclass(frozen=True)
class Twice(Pass):
    """Runs another pass two times."""

    step: Pass
    name: ClassVar[str] = "twice"

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        first = self.step.run(bundle, context)
        second = self.step.run(first.bundle, context)
        return PassResult(second.bundle, first.matches + second.matches)


@dataclass(frozen=True)
class Broken(Pass):
    """Returns a bundle whose signature is a lie, or raises."""

    how: str = "raise"
    name: ClassVar[str] = "broken"

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        if self.how == "raise":
            raise RuntimeError("a bug")
        program = replace(bundle.main, outputs=bundle.main.outputs[:1])
        return PassResult(bundle.with_program("forward", program), 1)


def test_differences_are_zero_between_equals() -> None:
    assert all(d.nmse == 0 and d.cosine == pytest.approx(1) for d in differences(vit(), vit()))


def test_dumps_hold_the_code_after_every_pass(tmp_path: Path) -> None:
    parse("tome{r=2},random{r=1}").run(vit(), Context(observers=(dump_to(tmp_path),)))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["01-tome.forward.py", "02-random.forward.py"]
    assert "bipartite_match" in (tmp_path / names[0]).read_text()


def test_a_pass_inside_a_pass_has_one_spelling_in_report_history_and_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PASSES, "twice", f"{__name__}:Twice")
    text = "twice{step=random{r=1 seed=3}}"
    after, report = parse(text).run(vit())
    assert [record.text for record in report.records] == [step.text for step in after.history] == [text]
    saved = tokopt.export(after, tmp_path / "twice.tokopt", target="torch")
    assert read_manifest(saved).pipeline == text
    apart = tokopt.optimize(vit(), "random{r=1 seed=3},random{r=1 seed=3}")
    assert all(d.nmse == 0 for d in differences(apart, after))


def test_records_count_what_changed() -> None:
    _, report = parse("tome{r=4}").run(vit())
    (record,) = report.records
    assert record.matches == 3 and record.seconds > 0
    assert record.after.flops < record.before.flops
    assert record.after.parameters == record.before.parameters
    assert report.as_dict()["records"]


@pytest.mark.parametrize("how", ["raise", "lie"])
def test_a_failing_pass_is_named_with_those_before_it_and_leaves_a_reproducer(
    how: str, tmp_path: Path
) -> None:
    pipeline = Pipeline((parse("tome{r=2}").passes[0], Broken(how)))
    with pytest.raises(PassError, match=r"pass broken.*after tome\{r=2\}.*reproducer") as caught:
        pipeline.run(vit(), Context(reproducers=tmp_path))
    (folder,) = tmp_path.iterdir()
    assert str(folder) in str(caught.value)
    assert (folder / "pipeline.txt").read_text() == f"{Broken(how)}\n"
    again = tokopt.open_bundle(folder)
    assert [s.text for s in again.history] == ["tome{r=2}"]
    assert [t.shape for t in again(*again.main.example)] == [t.shape for t in vit()(*vit().main.example)]


def test_module_paths_and_source_lines_survive_a_pass() -> None:
    from tokopt.analysis.blocks import find_sites
    from tokopt.ir.graph import source_line

    reduced = tokopt.optimize(vit(), "tome{r=2}")
    before, after = (find_sites(b.main.module.graph) for b in (vit(), reduced))
    assert [s.path for s in before] == [s.path for s in after] != ["", "", ""]
    assert [source_line(s.node) for s in before] == [source_line(s.node) for s in after]
    assert all(".py:" in source_line(s.node) for s in after)
