"""Remove blocks that change the residual stream least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch.fx import Node

from tokopt.analysis.blocks import Block, blocks_of
from tokopt.analysis.calibration import Site
from tokopt.analysis.samples import Sample
from tokopt.errors import PassError
from tokopt.ir.bundle import Bundle
from tokopt.ir.graph import aten, drop_dead, is_call, value_users
from tokopt.passes.exit.heal import Healing, following_linears, is_shared
from tokopt.passes.exit.influence import influences
from tokopt.pipeline.base import Context, Pass, PassResult, Refusal
from tokopt.rewrite.bypass import Bypass
from tokopt.rewrite.cache import ProgramEdit, language_program
from tokopt.rewrite.cut import axis_of_size
from tokopt.rewrite.edit import open_graph


@dataclass(frozen=True)
class DropBlocks(Pass):
    """Remove blocks: the ``count`` of least influence, or those that ``blocks`` lists.

    The influence of a block is 1 less the mean cosine of its input and output over the tokens of the calibration inputs
    (ShortGPT, arXiv 2403.03853); of equal ones the first goes. ``again`` measures anew after every removal. Keys and
    values of a removed block leave the bundle, and what is left counts its layers from 0.

    ``heal`` refits the linears that read the stream right after a gap, in closed form: to what they gave on the
    calibration inputs before. W becomes W + W (X - S)^T S (S^T S + lambda I)^-1 of their inputs X before and S now,
    with lambda ``ridge`` times the mean of the diagonal of S^T S: 0 is least squares, and much more leaves W alone.

    Rules. At least one block stays. A block is refused from which more than the stream and its own cache is read, or
    whose output has other sizes than its input, such as one that tokens are removed in.
    """

    count: int | None = None
    blocks: tuple[int, ...] = ()
    again: bool = False
    heal: bool = False
    ridge: float = 0.01

    name: ClassVar[str] = "drop_blocks"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.count is None) == (not self.blocks):
            raise PassError(
                f"{self.name} needs one of count= and blocks=; for example {self.name}{{count=2}}"
            )
        if self.count is not None and self.count < 0:
            raise PassError(f"{self.name}: count={self.count} must not be negative")
        if len(set(self.blocks)) < len(self.blocks) or any(block < 0 for block in self.blocks):
            raise PassError(f"{self.name}: blocks={list(self.blocks)} must be numbers from 0, each once")
        if self.ridge < 0:
            raise PassError(f"{self.name}: ridge={self.ridge} must not be negative")
        if self.blocks and self.again:
            raise PassError(f"{self.name}: again= is for count=, where blocks are chosen")

    def requires(self, bundle: Bundle) -> None:
        """Models in one piece."""
        one_program(self.name, bundle)

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Measure, choose, remove and heal."""
        if self.count == 0:
            return PassResult(bundle, 0, ("a count of 0 removes nothing",))
        name = one_program(self.name, bundle)
        removal = _Removal(bundle, name)
        wanted = len(self.blocks) or self.count or 0
        if not removal.blocks:
            return PassResult(bundle, 0, (), (Refusal("the model", "it has no block of self-attention"),))
        if wanted >= len(removal.blocks):
            raise PassError(
                f"{self.name}: {wanted} blocks of {len(removal.blocks)} would go; leave at least one"
            )
        samples: list[Sample] = []
        if not self.blocks or self.heal or context.calibration is not None:
            samples = list(context.samples(self.name))
        if self.blocks:
            _remove_listed(self, removal, samples)
        else:
            _remove_least(self, removal, samples)
        if not removal.removed:
            return PassResult(bundle, 0, tuple(removal.notes), tuple(removal.refusals))
        if self.heal:
            removal.heal(self.ridge, samples)
        return PassResult(
            removal.finish(), len(removal.removed), tuple(removal.notes), tuple(removal.refusals)
        )


def one_program(name: str, bundle: Bundle) -> str:
    """The program that all blocks are in; raises PassError where they are in several."""
    if bundle.schedule.generates:
        return language_program(name, bundle)
    if len(bundle.encoders) > 1:
        raise PassError(f"{name} works on a model in one piece; put it before split or exit")
    return next(iter(bundle.encoders))


def _remove_listed(options: DropBlocks, removal: _Removal, samples: Sequence[Sample]) -> None:
    for number in options.blocks:
        if number >= len(removal.blocks):
            raise PassError(
                f"{options.name}: there is no block {number}; the model has {len(removal.blocks)}"
            )
    if samples:
        removal.measure(samples)
    for number in sorted(options.blocks):
        removal.remove(removal.blocks[number])


def _remove_least(options: DropBlocks, removal: _Removal, samples: Sequence[Sample]) -> None:
    assert options.count is not None
    removal.measure(samples)
    while len(removal.removed) < options.count:
        left = [block for block in removal.left if block not in removal.unfit]
        if not left or len(removal.left) == 1:
            return
        least = min(left, key=lambda block: (removal.influence[block.index], block.index))
        if removal.remove(least) and options.again and len(removal.removed) < options.count:
            removal.measure(samples)


class _Removal:
    """A program that blocks are being removed from: ``blocks`` are those that it had, ``influence`` theirs by number.

    ``unfit`` are blocks that cannot go.
    """

    def __init__(self, bundle: Bundle, name: str) -> None:
        self.bundle, self.name = bundle, name
        self.module = open_graph(bundle.programs[name])
        self.blocks = blocks_of(self.module.graph)
        self.left, self.removed = list(self.blocks), list[Block]()
        self.unfit = list[Block]()
        self.influence: dict[int, float] = {}
        self.refusals, self.notes = list[Refusal](), list[str]()
        self._bypass = Bypass(bundle.programs[name], self.module)
        self._states: list[str] = []

    def measure(self, samples: Sequence[Sample]) -> None:
        """The influence of every block that is left, on the stream that reaches it now."""
        now = [replace(block, stream=self.standing(block.stream)) for block in self.left]
        found = influences(Site(self.bundle, self.name, self.module), now, samples)
        first = not self.influence
        self.influence |= {block.index: value for block, value in zip(self.left, found, strict=True)}
        if first:
            listed = ", ".join(f"{number} {value:.3f}" for number, value in self.influence.items())
            self.notes.append(f"influence of the blocks: {listed}")

    def standing(self, stream: Node) -> Node:
        """What is read now where a stream was."""
        return self._bypass.standing(stream)

    def remove(self, block: Block) -> bool:
        """Take one block out, or note why not."""
        own = self._bypass.own(block)
        states = [state for node, state in self._bypass.made() if node in own and state is not None]
        if reason := self._held(own, states) or self._bypass.lead(block):
            self.unfit.append(block)
            self.refusals.append(Refusal(block.label, reason))
            return False
        self._states += states
        held = {spec.state: node for node, spec in self._bypass.inputs.items()}
        kept = (held[state] if state in states else node for node, state in self._bypass.made())
        self.module.graph.output_node().args = (tuple(kept),)
        drop_dead(self.module.graph)
        self.left.remove(block)
        self.removed.append(block)
        known = self.influence.get(block.index)
        self.notes.append(f"removed {block.label}" + ("" if known is None else f", influence {known:.3f}"))
        return True

    def _held(self, own: set[Node], states: Sequence[str]) -> str | None:
        """Why the states of a block cannot leave with it."""
        caches = [node for node, spec in self._bypass.inputs.items() if spec.state in states]
        if any(user not in own for node in caches for user in value_users(node)):
            return "its cache is read outside of it"
        for name, program in self.bundle.programs.items():
            if name != self.name and any(spec.state in states for spec in program.inputs):
                return f"program {name!r} moves its cache; put drop_blocks before the eviction"
        return None

    def heal(self, ridge: float, samples: Sequence[Sample]) -> None:
        """Refit what reads the stream after every gap, from the first gap to the last."""
        before = Site(self.bundle, self.name, open_graph(self.bundle.programs[self.name]))
        healing = Healing(before, Site(self.bundle, self.name, self.module), ridge)
        whole, gone = blocks_of(before.module.graph), {block.index for block in self.removed}
        for number in sorted(gone):
            if number + 1 in gone:
                continue
            linears = following_linears(self.module, self.standing(self.blocks[number].end))
            fitted = [linear for linear in linears if not is_shared(self.module, linear)]
            if fitted:
                healing.refit(fitted, whole[number], samples)
                self.notes.append(f"refitted {', '.join(linear.path for linear in fitted)}")
            self.notes += [
                f"{linear.path} is not refitted: its weight is another layer's too"
                for linear in linears
                if linear not in fitted
            ]
            if not linears:
                self.notes.append(f"after {self.blocks[number].label} there is no linear to refit")

    def finish(self) -> Bundle:
        """The bundle without the blocks and what it kept for them."""
        inputs = self._bypass.inputs.items()
        kept = [node for node, spec in inputs if spec.state not in self._states]
        for node in (node for node, spec in inputs if spec.state in self._states):
            for size in [user for user in node.users if is_call(user, aten.sym_size)]:
                found = axis_of_size(size.meta["val"], kept)
                assert found is not None, "the slots of a layer are those of its positions"
                size.args = found
        edit = ProgramEdit(self.bundle, self.name, self.module)
        for state in self._states:
            edit.remove(state)
        program = edit.finish()
        layers = sorted({state.layer for state in edit.states.values() if state.layer is not None})
        states = (
            state if state.layer is None else replace(state, layer=layers.index(state.layer))
            for state in edit.states.values()
        )
        return replace(self.bundle.with_program(self.name, program), states=tuple(states))
