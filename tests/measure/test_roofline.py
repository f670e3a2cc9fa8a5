"""Predictions follow from shapes, stored bytes and the machine's rates; the rates here are made up."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tokopt
from tests.lower.test_storage import Untied, full_grid
from tests.matrix.language import bundle as decoder
from tests.matrix.test_matrix import captured
from tokopt.analysis.cost import node_bytes
from tokopt.ir.bundle import Bundle
from tokopt.ir.format import Schedule
from tokopt.ir.graph import aten, is_call, sizes
from tokopt.kernels import ops
from tokopt.measure import machine as machines
from tokopt.measure.forecast import forecast, occupied
from tokopt.measure.machine import KINDS, ROWS, Machine
from tokopt.measure.roofline import Roofline, predict_seconds
from tokopt.runtime import load

FAST = Machine(1e15, {kind: (1e-15,) * len(ROWS) for kind in KINDS})
"""Nothing takes time but launches."""

NARROW = Machine(1e6, FAST.products)
"""Memory alone takes time."""


@cache
def quantized(name: str, pipeline: str) -> Bundle:
    return tokopt.optimize(captured(name) if name == "vit" else decoder(name), pipeline)


def test_products_between_and_beyond_what_was_measured() -> None:
    machine = Machine(1.0, dict.fromkeys(KINDS, (1.0, 2.0, 3.0, 10.0)))
    assert machine.product("float", 1, 5) == 5.0
    assert machine.product("float", 10, 1) == pytest.approx(2.5)
    assert machine.product("4 bits", 2 * ROWS[-1], 3) == pytest.approx(60.0)


@pytest.mark.parametrize("name", ["vit", "llama"])
@pytest.mark.parametrize("pipeline", ["rtn{group=16}", "rtn{bits=8 group=16}"])
def test_a_quantized_weight_is_read_packed_and_expanded_by_nobody(name: str, pipeline: str) -> None:
    """Where only memory counts quantized weights are faster, and where only launches count nothing is added."""
    before = captured(name) if name == "vit" else decoder(name)
    after = quantized(name, pipeline)
    one = {"batch": 1, "tokens": 1, "rows": 1, "slots": 16} if name == "llama" else {"batch": 1}
    assert Roofline(after.main).seconds(NARROW, one) < Roofline(before.main).seconds(NARROW, one)
    assert predict_seconds(after.main, FAST) == pytest.approx(predict_seconds(before.main, FAST), rel=1e-3)


def test_of_a_quantized_table_rows_alone_are_read() -> None:
    """A table of codes costs what one of float32 does: the rows, and nothing that grows with the table."""
    model = Untied(full_grid("Q4_1", 40, 64), full_grid("Q4_1", 40, 64, seed=1))
    before = tokopt.capture(model, (torch.arange(10).view(2, 5),))
    table = tokopt.optimize(before, "keep_grid{only=[embed]}")
    for machine in (FAST, NARROW):
        assert predict_seconds(table.main, machine) == pytest.approx(predict_seconds(before.main, machine))
    packed = 40 * 64 // 2 + 2 * 4 * 40 * 2 + 40 * 2  # codes, scales and minima, zero points
    assert Roofline(before.main).weight_bytes - Roofline(table.main).weight_bytes == 4 * 40 * 64 - packed


def test_the_rate_of_its_kind_decides() -> None:
    """A machine that multiplies blocks of 4 bits slowly makes them slower, and leaves those of 8 bits alone."""
    slow = Machine(FAST.bytes, {**FAST.products, "4 bits": (1e-6,) * len(ROWS)})
    four, eight = quantized("vit", "rtn{group=16}"), quantized("vit", "rtn{bits=8 group=16}")
    assert predict_seconds(four.main, slow) > 2 * predict_seconds(captured("vit").main, slow)
    assert predict_seconds(eight.main, slow) == predict_seconds(eight.main, FAST)


def test_integer_products_have_their_own_rate() -> None:
    slow = Machine(FAST.bytes, {**FAST.products, "bytes": (1e-6,) * len(ROWS)})
    made = quantized("vit", "int8")
    assert predict_seconds(made.main, slow) > 2 * predict_seconds(made.main, FAST)


def test_a_weight_that_no_engine_fuses_is_expanded_on_every_call() -> None:
    """nupes rounds on the scale of a power, which is computed in float."""
    assert Roofline(quantized("vit", "nupes{group=16}").main).seconds(NARROW) > predict_seconds(
        captured("vit").main, NARROW
    )


@pytest.mark.parametrize(
    "pipeline", ["", "rtn{group=16 symmetric=true}", "rtn{bits=8 group=16 symmetric=true}"]
)
def test_weights_take_what_the_artifact_takes(pipeline: str, tmp_path: Path) -> None:
    """Up to zero points, which are all equal here and not stored, and to the alignment of small tensors."""
    made = quantized("llama", pipeline) if pipeline else decoder("llama")
    stored = (tokopt.export(made, tmp_path / "a.tokopt", check=False) / "weights.data").stat().st_size
    assert Roofline(made.main).weight_bytes == pytest.approx(stored, rel=0.15)


class Chosen(nn.Module):
    """Tokens [tokens, 32] and the two experts that each chose."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, 48, 32))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return ops.expert_linear(x[:, None], chosen, self.weight)


@pytest.mark.parametrize("pipeline", ["", "rtn{group=16}"])
def test_of_experts_those_that_are_chosen_are_read(pipeline: str) -> None:
    few, many = (
        tokopt.optimize(made, pipeline) if pipeline else made
        for count in (4, 16)
        for made in [
            tokopt.capture(Chosen(count), (torch.randn(3, 32), torch.zeros(3, 2, dtype=torch.int64)))
        ]
    )
    one, several = ({str(few.main.inputs[0].axes[0]): count} for count in (1, 8))
    times = [Roofline(model.main).seconds(NARROW, sizes) for model in (few, many) for sizes in (one, several)]
    assert times[0] == pytest.approx(times[2], rel=1e-6)  # of a single token two, however many there are
    assert times[3] > 1.5 * times[1]


def test_of_an_embedding_only_the_rows_taken_are_read() -> None:
    (node,) = (n for n in decoder("llama").main.module.graph.nodes if is_call(n, aten.embedding))
    batch, tokens, channels = sizes(node)
    assert node_bytes(node) == batch * tokens * (2 * 4 * channels + 8)


@pytest.mark.parametrize(
    "pipeline", ["", "h2o{budget=16 sinks=2 recent=4 every=4}", "rtn,streaming{budget=0.5}"]
)
def test_the_cache_after_a_prompt_is_the_runtimes(pipeline: str, tmp_path: Path) -> None:
    made = tokopt.optimize(decoder("llama"), pipeline) if pipeline else decoder("llama")
    request = load(tokopt.export(made, tmp_path / "a.tokopt", check=False), threads=1).open(1, 40)
    request.prefill([list(range(40))])
    assert occupied(made, 40) == request.buffers.occupied()
    found = forecast(made, FAST, 40)
    request.buffers.resize(request.buffers.roomy(request.buffers.occupied()))
    assert 0.4 * request.buffers.nbytes < found.cache_bytes <= request.buffers.nbytes


def test_forecasts_grow_with_the_prompt_and_with_the_rows() -> None:
    machine = Machine(1e9, dict.fromkeys(KINDS, (1e-10, 2e-10, 4e-10, 2e-09)))
    short, long = (forecast(decoder("llama"), machine, prompt) for prompt in (16, 300))
    assert short.read < long.read and short.token < long.token and short.cache_bytes < long.cache_bytes
    costs = list(long.rows.values())
    assert list(long.rows) == [2, 4, 8, 16] and costs == sorted(costs) and costs[0] > 1 and costs[-1] < 16


def test_fewer_rows_take_no_longer_on_a_machine_that_was_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of one row that took longer than one of four made sixteen tokens cheaper than one."""
    monkeypatch.setattr(machines, "_shortest", lambda works: [1.0, *[4.0, 2.0, 3.0, 9.0] * len(KINDS)])
    measured = machines.measure_machine()
    for kind in KINDS:
        times = [measured.product(kind, rows, machines.INPUTS * machines.OUTPUTS) for rows in ROWS]
        assert times == pytest.approx([2.0, 2.0, 3.0, 9.0])


def test_later_tokens_count_as_their_program_takes_them() -> None:
    """The time of a token is the mean over the text, so a longer text that goes on with fewer blocks is faster."""
    machine = Machine(1e9, dict.fromkeys(KINDS, (1e-10, 2e-10, 4e-10, 2e-09)))
    fading = quantized("llama", "skipdecode{min=1 over=8}")
    whole, shallow = (replace(fading, schedule=_only(fading, place)) for place in (0, 1))
    one, two = (forecast(bundle, machine, 16).token for bundle in (whole, shallow))
    assert two < one == forecast(fading, machine, 16, tokens=8).token
    for tokens in (9, 32):
        mean = (8 * one + (tokens - 8) * two) / tokens
        assert forecast(fading, machine, 16, tokens).token == pytest.approx(mean)


def _only(bundle: Bundle, place: int) -> Schedule:
    """A schedule in which one of the entries that decode does all."""
    entries = [entry for entry in bundle.schedule.entries if entry.role != "decode"]
    kept = list(bundle.schedule.of_role("decode"))[place]
    return replace(bundle.schedule, entries=(*entries, replace(kept, since=0)))
