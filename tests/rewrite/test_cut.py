"""Cutting a program: the two halves in a row give what the whole gives, bit for bit, on every architecture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tokopt
from tests.matrix import language
from tests.matrix.test_matrix import captured
from tests.zoo import ZOO
from tests.zoo.decoders import DECODERS
from tokopt.analysis.blocks import Block, blocks_of
from tokopt.errors import PassRefused
from tokopt.ir.bundle import Bundle
from tokopt.ir.graph import attention_nodes
from tokopt.ir.program import Program
from tokopt.rewrite.cut import Halves, cut
from tokopt.rewrite.edit import open_graph

MODELS = (*ZOO, *DECODERS)


def bundle(name: str) -> Bundle:
    return captured(name) if name in ZOO else language.bundle(name)


def blocks(program: Program) -> list[Block]:
    return blocks_of(program.module.graph)


def cut_at(program: Program, block: int) -> Halves:
    """Cut before a block; after the last one at their number."""
    module = open_graph(program)
    found = blocks_of(module.graph)
    return cut(program, module, found[block].stream if block < len(found) else found[-1].end)


def in_a_row(halves: Halves, whole: Program, given: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What both halves give, by the names of the whole's outputs."""
    known = {spec.name: value for spec, value in zip(whole.inputs, given, strict=True)}
    made: dict[str, Tensor] = {}
    for half in (halves.first, halves.second):
        results = half(*(known[spec.name] for spec in half.inputs))
        made |= dict(zip((spec.name for spec in half.outputs), results, strict=True))
        known |= {name: made[name] for name in halves.links}
    return made


def assert_same(halves: Halves, whole: Program, given: tuple[Tensor, ...]) -> None:
    got = in_a_row(halves, whole, tuple(x.clone() for x in given))
    wanted = whole(*given)
    for spec, value in zip(whole.outputs, wanted, strict=True):
        assert got[spec.name].equal(value), spec.name


@pytest.mark.parametrize("name", MODELS)
def test_the_halves_of_every_model_are_the_whole(name: str) -> None:
    """Cut before every block and after the last one."""
    whole = bundle(name).main
    count = len(blocks(whole))
    for block in range(1, count + 1):
        halves = cut_at(whole, block)
        assert_same(halves, whole, whole.example)
        attentions = [len(attention_nodes(half.module.graph)) for half in (halves.first, halves.second)]
        assert attentions[0] == block and sum(attentions) == len(attention_nodes(whole.module.graph))
        assert set(halves.links) == {spec.name for spec in halves.first.outputs if spec.role == "link"}
        assert len(halves.links) == 1, "masks, rotary tables and sizes are computed again"


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_state_is_written_by_one_half_and_stays_with_its_layer(name: str) -> None:
    whole = bundle(name)
    halves = cut_at(whole.main, 1)
    written = [{spec.state for spec in half.outputs} - {None} for half in (halves.first, halves.second)]
    assert written == [{"key_0", "value_0"}, {"key_1", "value_1", "length", "slots"}]
    assert set(halves.first.aliases) | set(halves.second.aliases) == set(whole.main.aliases)
    layers = [{s.layer for s in whole.states if s.name in names and s.layer is not None} for names in written]
    assert layers == [{0}, {1}]


@pytest.mark.parametrize("name", ["vit", "bert", "modernbert"])
def test_a_half_can_be_cut_again(name: str) -> None:
    """Three programs in a row, at a batch that is not the example's."""
    whole = bundle(name).main
    halves = cut_at(whole, 1)
    again = cut_at(halves.second, 1)
    inputs = tuple(ZOO[name].inputs(batch=3, seed=5).values())
    known = dict(zip((spec.name for spec in whole.inputs), inputs, strict=True))
    for half in (halves.first, again.first, again.second):
        results = half(*(known[spec.name] for spec in half.inputs))
        known |= dict(zip((spec.name for spec in half.outputs), results, strict=True))
    for spec, value in zip(whole.outputs, whole(*inputs), strict=True):
        assert known[spec.name].equal(value)


@pytest.mark.parametrize("text", ["tome{r=[4,0,3]}", "int8", "rtn{group=16}", "cast"])
def test_what_a_pass_made_can_be_cut(text: str) -> None:
    made = tokopt.optimize(captured("vit"), text)
    assert_same(cut_at(made.main, 1), made.main, made.main.example)


class TwoTowers(nn.Module):
    """Blocks on one input, a sum with what is made of another."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(8, 16)
        self.first, self.second = (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        side = self.other(y)
        x = self.first(x)
        return self.second(x + side), side, x


def towers(**options: object) -> Bundle:
    torch.manual_seed(0)
    given = (torch.randn(3, 5, 16), torch.randn(3, 5, 8))
    return tokopt.capture(TwoTowers().eval(), given, **options)  # type: ignore[arg-type]


def test_what_else_is_needed_is_handed_on() -> None:
    """What was made of another input by a product is not computed twice; the outputs stay those of the second half."""
    whole = towers().main
    module = open_graph(whole)
    halves = cut(whole, module, blocks_of(module.graph)[0].end)
    assert len(halves.links) == 2
    assert [spec.name for spec in halves.second.outputs] == [spec.name for spec in whole.outputs]
    assert_same(halves, whole, whole.example)


def test_a_cut_that_links_cannot_carry_is_refused() -> None:
    fixed = towers(dynamic={"x": (None, None, None), "y": (None, None, None)}).main
    with pytest.raises(PassRefused, match="no axis of the batch"):
        cut_at(fixed, 1)
    reduced = tokopt.optimize(captured("bert"), "tome{r=[4,0,3]}", strict=True).main
    with pytest.raises(PassRefused, match=r"tokens - 4.*plain axes"):
        cut_at(reduced, 1)
    with pytest.raises(PassRefused, match="nothing is computed before"):
        cut_at(cut_at(captured("vit").main, 1).second, 0)
