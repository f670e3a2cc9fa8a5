"""Inserting what a function does: it is traced once for operands that are alike, and for no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import tokopt
from tokopt.ir.export import placeholders
from tokopt.ir.program import Program
from tokopt.rewrite.edit import after, call, close_graph, open_graph

X, Y = torch.randn(3, 4), torch.randn(3, 4)


class Difference(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x - y


def program() -> Program:
    axes = {"x": ("batch", None), "y": ("batch", None)}
    return tokopt.capture(Difference(), (X, Y), dynamic=axes).main


def edited(function: Any, *more: Any) -> tuple[Tensor, list[Node]]:
    """The difference of what a function makes of both inputs, and the nodes inserted for them."""
    given = program()
    module = open_graph(given)
    inputs = placeholders(module)
    readers = [list(node.users) for node in inputs]
    made = []
    for node, users in zip(inputs, readers, strict=True):
        with after(inputs[-1] if not made else made[-1]):
            made.append(call(module.graph, function, node, *more, like=node))
        for user in users:
            user.replace_input_with(node, made[-1])
    return close_graph(given, module)(X, Y)[0], made


def test_equal_calls_are_traced_once_and_stay_two() -> None:
    """Both results share one value without data, and the operator that reads both still reads two."""
    traced = []

    def doubled(x: Tensor) -> Tensor:
        traced.append(x)
        return x * 2

    got, made = edited(doubled)
    assert len(traced) == 1 and made[0] is not made[1]
    torch.testing.assert_close(got, X * 2 - Y * 2)


def test_a_function_of_results_that_share_a_value_takes_them_apart() -> None:
    given = program()
    module = open_graph(given)
    x, y = placeholders(module)
    output = module.graph.output_node()
    with module.graph.inserting_before(output):
        one, two = (call(module.graph, torch.sin, node, like=node) for node in (x, y))
        assert one.meta["val"] is two.meta["val"]
        both = call(module.graph, lambda a, b: a - 3 * b, one, two, like=x)
    output.args = ((both,),)
    torch.testing.assert_close(close_graph(given, module)(X, Y)[0], X.sin() - 3 * Y.sin())


@pytest.mark.parametrize(("first", "second"), [(1, 1.0), (1, True), (2, 3)])
def test_constants_of_another_type_are_others(first: object, second: object) -> None:
    """``1 == 1.0 == True`` in Python, and what operators make of them differs in dtype."""
    given = program()
    module = open_graph(given)
    x, _ = placeholders(module)
    with module.graph.inserting_before(module.graph.output_node()):
        whole = call(module.graph, torch.Tensor.long, x, like=x)
        made = [call(module.graph, torch.mul, whole, number, like=x) for number in (first, second)]
    for node, number in zip(made, (first, second), strict=True):
        assert node.args[1] == number and type(node.args[1]) is type(number)
        assert node.meta["val"].dtype == torch.mul(torch.ones(1, dtype=torch.long), number).dtype  # type: ignore[call-overload]


def test_sizes_that_depend_on_data_are_not_shared() -> None:
    """How many numbers of x are not zero says nothing of y."""
    given = program()
    module = open_graph(given)
    nodes = placeholders(module)
    with module.graph.inserting_before(module.graph.output_node()):
        found = [call(module.graph, torch.nonzero, node, like=node) for node in nodes]
    one, two = (node.meta["val"].shape[0] for node in found)
    assert str(one) != str(two)
