"""What ops declare of themselves is true of their references."""

from importlib import import_module

import pytest
import torch
from torch import Tensor

from tests.kernels.forms import CASES, Case, world
from tokopt.kernels import OPS, declared, ops


def declaring(field: str) -> pytest.MarkDecorator:
    """The cases of the ops that declare a field."""
    return pytest.mark.parametrize("case", [c for c in CASES if getattr(OPS[c.op], field)], ids=str)


def given(case: Case, r: int = 4) -> dict:
    return world(case, batch=2, tokens=14, r=r, seed=3)


def run(case: Case, arguments: dict) -> tuple[Tensor, ...]:
    outputs = getattr(ops, case.op)(*arguments.values())
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def test_a_call_finds_its_declaration() -> None:
    for name, op in OPS.items():
        assert declared(getattr(ops, name).default) is declared(getattr(ops, name)) is op
    assert declared(torch.ops.aten.add.Tensor) is declared("size") is None


@declaring("choice")
def test_what_a_choice_keeps_begins_with_its_prefix(case: Case) -> None:
    choice = OPS[case.op].choice
    assert choice is not None
    if choice.prefix is None:
        return
    arguments = given(case)
    assert case.arguments[choice.prefix] == "prefix"
    keep, drop = run(case, arguments)[:2]
    assert torch.equal(keep[:, : case.prefix], torch.arange(case.prefix).expand(2, -1))
    assert keep.shape[1] + drop.shape[1] == 14


@declaring("takes")
def test_what_takes_tokens_takes_those_that_are_kept(case: Case) -> None:
    takes = OPS[case.op].takes
    assert takes is not None
    values = list(given(case, r=0).values())  # nothing is left to merge
    axis = 1 if takes.axis is None else values[takes.axis]
    x, keep = values[0], values[takes.keep]
    shape = [*(max(size, 2) if place == 0 else size for place, size in enumerate(x.shape))]
    rows = x.expand(shape)
    index = keep.view(2, *[1] * (axis - 1), -1, *[1] * (x.ndim - axis - 1)).expand(shape)
    torch.testing.assert_close(run(case, given(case, r=0))[0], rows.gather(axis, index))


@declaring("elementwise")
def test_an_elementwise_op_looks_at_one_number_only(case: Case) -> None:
    first, *others = given(case).values()
    op = getattr(ops, case.op)
    whole = op(first, *others)
    alone = torch.stack([op(number[None], *others)[0] for number in first.flatten()])
    assert torch.equal(whole, alone.view(first.shape))


@declaring("positive")
def test_outputs_are_positive_where_the_operand_is(case: Case) -> None:
    for output, operand in OPS[case.op].positive:
        arguments = given(case)
        name = case.arguments[operand]
        numbers = arguments[name]
        arguments[name] = torch.ones_like(numbers) if numbers.dtype == torch.bool else numbers.abs() + 1
        assert bool((run(case, arguments)[output] > 0).all())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_and_work(case: Case) -> None:
    """Ops say whether they have unsigned bytes, and what they cost follows from the shapes of a call."""
    arguments, op = given(case), OPS[case.op]
    tensors = [x for x in (*arguments.values(), *run(case, arguments)) if isinstance(x, Tensor)]
    assert any(x.dtype == torch.uint8 for x in tensors) == op.unsigned_bytes
    work = op.work(*(tuple(x.shape) if isinstance(x, Tensor) else x for x in arguments.values()))
    assert work.flops >= 0 and work.bytes > 0 and work.launches > 0


def test_forms_without_padding_are_there() -> None:
    for name, op in OPS.items():
        functions = {function.name for function in import_module(f"tokopt.kernels.{name}.onnx").FUNCTIONS}
        assert not op.real_form or {op.real_form, name} <= functions
