"""Exported programs without tensors that change: who reads a node may rely on what made it.

``torch.export`` leaves operators that write in place as they are. A write into a view changes a tensor that no edge of
the graph leads to, so that every analysis would take it for what it was before.
"""

# torch.export leaves parts of its classes untyped.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from tokopt.errors import CaptureError
from tokopt.ir.graph import aten, is_call, operand_at
from tokopt.ir.program import TensorSpec


def without_mutation(
    exported: torch.export.ExportedProgram, inputs: Sequence[TensorSpec]
) -> torch.export.ExportedProgram:
    """The program with new values in place of tensors that change.

    Raises CaptureError for a model that changes its inputs, or a buffer that the next call reads.
    """
    if not any(map(_mutates, exported.graph.nodes)):
        return exported
    exported = exported.run_decompositions({})
    signature = exported.graph_signature
    places = map(list(signature.user_inputs).index, signature.user_inputs_to_mutate.values())
    read = {signature.inputs_to_buffers[node.name] for node in _read_buffers(exported)}
    buffers = [name.removeprefix("model.") for name in signature.buffers_to_mutate.values() if name in read]
    if changed := [*buffers, *(inputs[place].name for place in places)]:
        raise CaptureError(
            f"the model writes into {', '.join(map(repr, changed))}, which outlives the call; let it make a new "
            "tensor instead"
        )
    return exported


def drop_write_backs(module: GraphModule) -> None:
    """Delete what writes into buffers that every call overwrites before it reads them."""
    for node in list(module.graph.nodes):
        if is_call(node, aten.copy_):
            module.graph.erase_node(node)
        elif is_call(node, aten.copy) and _same_kind(node, operand_at(node, 1)):
            node.replace_all_uses_with(operand_at(node, 1))


def _mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _read_buffers(exported: torch.export.ExportedProgram) -> list[Node]:
    """The buffers whose values are used: not those that are only copied over."""
    return [
        node
        for node in exported.graph.nodes
        if node.name in exported.graph_signature.inputs_to_buffers
        and any(not is_call(user, aten.copy) or user.args[0] is not node for user in node.users)
    ]


def _same_kind(a: Node, b: Node) -> bool:
    one, other = a.meta["val"], b.meta["val"]
    return str(one.shape) == str(other.shape) and one.dtype == other.dtype
