"""Lead the residual stream past blocks: what read a block's output reads its input.

What the block made beside its output, keys and values for its cache mostly, is made as before, of the stream that
reaches the block now: with blocks before it led past as well, that is the stream which entered the first of them.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from tokopt.analysis.blocks import Block
from tokopt.ir.export import placeholders
from tokopt.ir.graph import ancestors, aten, is_call, reaches, results
from tokopt.ir.program import Program
from tokopt.rewrite.cut import axis_of_size
from tokopt.rewrite.edit import redirect


class Bypass:
    """A program's open graph, whose stream is led past one block after another."""

    def __init__(self, program: Program, module: GraphModule) -> None:
        self.program, self.module = program, module
        self.inputs = dict(zip(placeholders(module), program.inputs, strict=True))
        self._stands: dict[Node, Node] = {}

    def standing(self, stream: Node) -> Node:
        """What is read now where a stream was."""
        while stream in self._stands:
            stream = self._stands[stream]
        return stream

    def made(self) -> list[tuple[Node, str | None]]:
        """The node of every output, and the state that it is the next value of."""
        states = (spec.state for spec in self.program.outputs)
        return list(zip(results(self.module.graph), states, strict=True))

    def own(self, block: Block) -> set[Node]:
        """What a block computes of the stream, its output left out, and what is made of that alone: next states."""
        inside = reaches(self.standing(block.stream)) & ancestors(block.end)
        return inside.union(*map(reaches, inside)) - {block.end} - reaches(block.end)

    def lead(self, block: Block) -> str | None:
        """Lead the stream past a block; the reason why that cannot be, and nothing is changed, or None.

        Sizes that were taken of the block are taken of the stream or of an input.
        """
        stream, own = self.standing(block.stream), self.own(block)
        sizes = self._sizes(block, stream, own)
        if isinstance(sizes, str):
            return sizes
        for node, measured in sizes.items():
            node.args = measured
        redirect(list(block.end.users), block.end, stream)
        self._stands[block.end] = stream
        return None

    def _sizes(self, block: Block, stream: Node, own: set[Node]) -> dict[Node, tuple[Node, int]] | str:
        """What the sizes that are taken of a block are to be taken of, or why it cannot be passed."""
        one, other = stream.meta["val"], block.end.meta["val"]
        if str(one.shape) != str(other.shape) or one.dtype != other.dtype:
            return "its output has other sizes than its input"
        if any(node in own and state is None for node, state in self.made()):
            return "an output of the model is computed inside it"
        given = [stream, *(node for node, spec in self.inputs.items() if spec.state is None)]
        sizes: dict[Node, tuple[Node, int]] = {}
        for user in {user for node in own for user in node.users}:
            if is_call(user, aten.sym_size) and not own.issuperset(user.users):
                found = axis_of_size(user.meta["val"], given)
                if found is None:
                    return "a size is taken of what it computes"
                sizes[user] = found
            elif (
                user not in own
                and user is not block.end
                and user.op != "output"
                and not is_call(user, aten.sym_size)
            ):
                return "what it computes is read after it"
        return sizes
