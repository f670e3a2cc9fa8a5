"""Scale the channels that linears read, exactly: ``W x = (W s) (x / s)``, with ``1 / s`` folded into what made x.

What SmoothQuant and AWQ share. The division goes into the weight of a norm, or into the rows of the linear before,
where every reader of x is one of the linears; otherwise one multiplication is inserted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.fx import GraphModule, Node

from tokopt.analysis.constants import parameter
from tokopt.analysis.linears import Linear
from tokopt.ir.graph import argument, aten, is_call, same_size, value_users
from tokopt.rewrite.edit import call, put_parameter


def by_input(linears: Sequence[Linear]) -> list[list[Linear]]:
    """Linears that read the same tensor, together."""
    groups: dict[Node, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(linear.input, []).append(linear)
    return list(groups.values())


def rescale(module: GraphModule, linears: Sequence[Linear], scale: Tensor) -> None:
    """Multiply the columns of linears that read one tensor by ``scale`` [in], and divide that tensor by it."""
    given = linears[0].input
    divide = division(module, linears)
    for linear in linears:
        weight = linear.matrix(module) * scale
        put_parameter(module, linear.node, linear.place, weight.T if linear.transposed else weight)
    if divide is not None:
        divide(scale)
        return
    first = min((linear.node for linear in linears), key=list(module.graph.nodes).index)
    inverse = put_parameter(module, first, None, 1 / scale)
    with module.graph.inserting_before(first):
        divided = call(module.graph, aten.mul.Tensor, given, inverse, like=first)
    for linear in linears:
        linear.node.replace_input_with(given, divided)


Divide = Callable[[Tensor], None]


def division(module: GraphModule, linears: Sequence[Linear]) -> Divide | None:
    """How the tensor that linears read is divided at no cost, or None where it cannot be."""
    given = _source(linears[0].input, {linear.node for linear in linears})
    if given is None:
        return None
    if is_call(given, aten.layer_norm):
        return _through_parameters(module, given, (2, 3))
    if is_call(given, aten.mul):
        for place, operand in enumerate(given.args[:2]):
            if isinstance(operand, Node) and _is_weight(operand) and operand.meta["val"].ndim == 1:
                return _through_parameters(module, given, (place,))
        return next(filter(None, (_through_linear(module, one, given) for one in given.args[:2])), None)
    return None


def _source(node: Node, readers: set[Node]) -> Node | None:
    """What computed the channels of ``node``, if nothing but ``readers`` reads them on the way."""
    while set(value_users(node)) == readers:
        if not keeps_channels(node):
            return node
        before = node.args[0]
        assert isinstance(before, Node)
        node, readers = before, {node}
    return None


def _through_parameters(module: GraphModule, node: Node, places: Sequence[int]) -> Divide | None:
    """Divide the parameters that scale and shift a node's value; the first one must be there."""
    given = [node.args[place] if place < len(node.args) else None for place in places]
    if given[0] is None or not all(value is None or _is_weight(value) for value in given):
        return None

    def divide(scale: Tensor) -> None:
        for place, value in zip(places, given, strict=True):
            if isinstance(value, Node):
                put_parameter(module, node, place, parameter(module, value) / scale)

    return divide


def _through_linear(module: GraphModule, node: object, reader: Node) -> Divide | None:
    """Divide the outputs of a linear that only ``reader`` reads."""
    if not isinstance(node, Node) or value_users(node) != [reader] or not is_call(node, aten.linear):
        return None
    if not all(_is_weight(value) for value in node.args[1:] if value is not None):
        return None

    def divide(scale: Tensor) -> None:
        for place, value in enumerate(node.args):
            if place and isinstance(value, Node):
                rows = scale[:, None] if place == 1 else scale
                put_parameter(module, node, place, parameter(module, value) / rows)

    return divide


def keeps_channels(node: Node) -> bool:
    """Whether a node chooses or regroups tokens and leaves the last axis as it is."""
    given = node.args[0] if node.args else None
    if not isinstance(given, Node):
        return False
    if is_call(node, aten.index):
        return len(argument(node, 1, "indices")) < given.meta["val"].ndim
    if is_call(node, aten.view, aten.reshape, aten.clone, aten.contiguous, aten.dropout):
        return same_size(node.meta["val"].shape[-1], given.meta["val"].shape[-1])
    return False


def _is_weight(node: object) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"
