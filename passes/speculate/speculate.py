"""Speculation inside the program: one call proposes a tree of tokens, verifies it and keeps the path that is right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from tokopt.errors import PassError, PassRefused
from tokopt.ir.bundle import Bundle, Semantics, fresh
from tokopt.ir.export import placeholders
from tokopt.ir.format import BATCH, Entry, State, emits_tokens
from tokopt.ir.graph import is_call, results
from tokopt.ir.program import AxisRange, Program, TensorSpec
from tokopt.kernels import ops
from tokopt.passes.sample.sample import SampleTokens
from tokopt.passes.speculate.drafters import DRAFTERS, Drafter, load_drafter
from tokopt.passes.speculate.tree import Tree, accepted, best_first, tree
from tokopt.pipeline.base import Context, Pass, PassResult, Refusal
from tokopt.rewrite.cache import ProgramEdit, language_program
from tokopt.rewrite.edit import call, close_graph, inline, new_graph, open_graph

NODES = "nodes"
"""The axis of the proposed tokens, the root included."""

MOST = 64
"""Nodes of a tree at most."""

_KEPT = ("key", "value", "scale", "zero", "position")
"""Kinds of states in which every slot belongs to a token."""


@dataclass(frozen=True)
class Speculate(Pass):
    """Let a call of the program that decodes commit several tokens.

    The program proposes a tree of up to ``nodes`` tokens by what a ``drafter`` remembers, runs the model on all of them
    at once, each seeing its ancestors, draws the model's own token after every node, and commits the longest path on
    which proposals and draws agree, and one token more. Entries of the cache that belong to the path are moved to where
    they would be without speculation; the others are free again.

    A token is drawn with the random number of its place in the text, whatever was proposed. So the text is that of
    ``sample`` for the same seed, greedy or not, up to what the rounding of calls with several tokens changes.

    ``drafter``: ``token_recycling`` (arXiv 2408.08696), ``prompt_lookup``, or ``hybrid``, which is lookup where the text
    repeats itself and recycling elsewhere. ``depth`` bounds the levels of the tree.

    Rules. One program reads and decodes, and every token has a slot of its own, so a policy that evicts by scores of
    its own, and ``kivi``, are refused. The pass comes last.
    """

    drafter: Literal["token_recycling", "prompt_lookup", "hybrid"] = "hybrid"
    nodes: int = 8
    depth: int = 6

    name: ClassVar[str] = "speculate"
    semantics: ClassVar[Semantics] = "lossless"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, most in (("nodes", MOST), ("depth", 8)):
            value = getattr(self, option)
            if not 1 <= value <= most:
                raise PassError(f"{self.name}: {option}={value} must be 1 to {most}")

    def requires(self, bundle: Bundle) -> None:
        """Language models whose one program gives logits."""
        name = language_program(self.name, bundle)
        if emits_tokens(bundle.programs[name]):
            raise PassError(f"{self.name}: program {name!r} draws its tokens already; leave sample out")

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Add the program that speculates; the one there was reads prompts and draws the first token."""
        name, drafter = language_program(self.name, bundle), load_drafter(self.drafter)
        assert bundle.generation is not None
        drawing = SampleTokens().run(bundle, context).bundle
        memory = tuple(_named(drafter.states(bundle.generation), drawing))
        try:
            speculating = _Speculation(bundle.programs[name], drawing, memory, drafter, name).program()
        except PassRefused as reason:
            return PassResult(bundle, 0, (), (Refusal(name, str(reason)),))
        added = fresh("speculate", bundle.programs)
        parents = best_first(drafter.rates, drafter.fade, self.nodes, self.depth)
        entries = [
            replace(entry, program=added, slots=NODES, tree=parents) if entry.role == "decode" else entry
            for entry in bundle.schedule.entries
        ]
        made = replace(
            drawing,
            programs={**drawing.programs, name: _reading(drawing, name, memory, drafter), added: speculating},
            states=(*drawing.states, *memory),
            schedule=replace(bundle.schedule, entries=tuple(entries)),
        )
        return PassResult(made, 1)


def _named(states: Any, bundle: Bundle) -> Iterator[State]:
    taken = [state.name for state in bundle.states]
    for state in states:
        yield replace(state, name=fresh(state.name, taken))


def _blank(state: State, batch: int) -> Tensor:
    shape = [batch if axis == BATCH else axis for axis in state.axes]
    return torch.full(shape, int(state.initial), dtype=getattr(torch, state.dtype))  # type: ignore[arg-type]


def _reading(bundle: Bundle, name: str, memory: tuple[State, ...], drafter: Drafter) -> Program:
    """The program that reads a prompt and draws what follows it, and of which the drafter takes note."""
    edit = ProgramEdit(bundle, name, open_graph(bundle.programs[name]))
    tokens, positions = edit.of_role("tokens"), edit.of_role("positions")
    batch = edit.example[0].shape[0]
    held = [edit.take(state, _blank(state, batch)) for state in memory]
    graph = edit.module.graph
    with graph.inserting_before(graph.output_node()):
        noted = call(graph, partial(_read, drafter), tokens, positions, *held, like=edit.results[0])
    for state, node in zip(memory, noted, strict=True):
        edit.give(state, node)
    return edit.finish()


def _read(drafter: Drafter, tokens: Tensor, positions: Tensor, *memory: Tensor) -> tuple[Tensor, ...]:
    return tuple(drafter.read(tokens, positions, *memory))


@dataclass
class _Speculation:
    """The program that speculates, made of ``step``, which gives logits; ``drawing`` has the states of ``sample``."""

    step: Program
    drawing: Bundle
    memory: tuple[State, ...]
    drafter: Drafter
    name: str

    def program(self) -> Program:
        """Raises PassRefused where entries of rejected tokens could not be taken back."""
        drawn = self.drawing.programs[self.name]
        states = [spec for spec in drawn.inputs if spec.role == "state"]
        given = [spec for spec in drawn.inputs if spec.role not in ("tokens", "positions", "mask", "state")]
        known = dict(zip((spec.name for spec in drawn.inputs), drawn.example, strict=True))
        batch = drawn.example[0].shape[0]
        pair = [TensorSpec(role, "int64", (BATCH, 1), role) for role in ("tokens", "positions")]
        parent = TensorSpec("parent", "int64", (NODES,), "parent")
        mine = [TensorSpec(s.name, s.dtype, s.axes, "state", s.name) for s in self.memory]
        inputs = (*pair, parent, *given, *states, *mine)
        lengths = next(state for state in self.drawing.states if state.kind == "length")
        after = known[next(spec.name for spec in states if spec.state == lengths.name)].reshape(batch, -1)[:, :1]
        example = (
            *(torch.arange(batch)[:, None] + 3, after.clone(), torch.tensor(best_first([0.6, 0.3], 1.0, 5, 3))),
            *(torch.full_like(known[spec.name], 3) if spec.role == "limit" else known[spec.name] for spec in given),
            *(known[spec.name] for spec in states),
            *(_blank(state, batch) for state in self.memory),
        )
        axes = {axis for spec in inputs for axis in spec.axes}
        ranges = {axis: bounds for axis, bounds in drawn.ranges.items() if axis in axes}
        ranges[NODES] = AxisRange(1, MOST)
        module = new_graph(inputs, ranges, example)
        nodes = dict(zip((spec.name for spec in inputs), placeholders(module), strict=True))
        outputs, made, aliases = self._body(module.graph, nodes, {spec.state: spec.name for spec in inputs if spec.state})
        module.graph.output(tuple(made))
        blank = Program(module, inputs, tuple(outputs), ranges, example)
        return close_graph(blank, module, aliases=aliases)

    def _body(
        self, graph: Any, nodes: dict[str, Node], states: dict[str, str]
    ) -> tuple[list[TensorSpec], list[Node], dict[str, str]]:
        """What comes out, in nodes, and which inputs it is written into."""
        tokens, positions = nodes["tokens"], nodes["positions"]
        insert = partial(call, graph, like=tokens)
        by_role = {spec.role: nodes[spec.name] for spec in self.drawing.programs[self.name].inputs if spec.name in nodes}
        memory = [nodes[states[state.name]] for state in self.memory]
        proposal = insert(partial(_propose, self.drafter), tokens, positions, nodes["parent"], *memory)
        proposed, places, mask, rows = proposal
        fed = {"tokens": proposed, "positions": places, "mask": mask, "rows": rows}
        operands = [
            nodes[states[spec.state]] if spec.state is not None else fed[spec.role] for spec in self.step.inputs
        ]
        results_ = dict(
            zip((spec.name for spec in self.step.outputs), inline(graph, self.step, operands, like=tokens), strict=True)
        )
        logits = next(results_[spec.name] for spec in self.step.outputs if spec.role == "logits")
        (counter,) = {s.name for s in self.drawing.states} - {spec.state for spec in self.step.inputs}
        roles = ("limit", "temperature", "top_k", "top_p", "min_p", "seed", "stream")
        chosen = insert(
            _commit, logits, proposed, nodes["positions"], nodes["parent"], nodes[states[counter]],
            *(by_role[role] for role in roles),
        )
        emitted, count, logprobs, drawn, path, committed, noted = chosen
        outputs = [
            TensorSpec("next_tokens", "int64", (BATCH, NODES), "tokens"),
            TensorSpec("count", "int64", (BATCH,), "count"),
            TensorSpec("logprobs", "float32", (BATCH, NODES), "logprobs"),
        ]
        made, aliases = [emitted, count, logprobs], dict[str, str]()

        def give(state: str, node: Node) -> str:
            spec = next(s for s in self.drawing.states + self.memory if s.name == state)
            outputs.append(TensorSpec(f"next_{state}", spec.dtype, spec.axes, "state", state))
            made.append(node)
            return outputs[-1].name

        for spec in self.step.outputs:
            if spec.state is None:
                continue
            state = next(s for s in self.drawing.states if s.name == spec.state)
            node = results_[spec.name]
            if spec.name in self.step.aliases:
                self._check_write(state, node, nodes[states[self._length(state)]])
                outputs.append(TensorSpec(f"proposed_{state.name}", spec.dtype, spec.axes, "written"))
                made.append(node)
                aliases[outputs[-1].name] = states[state.name]
                over = (committed,) if state.kind == "position" else (path,)
                function = _places_over if state.kind == "position" else _entries_over
                aliases[give(state.name, insert(function, node, *over, node.args[2]))] = states[state.name]
            elif state.kind == "length":
                give(state.name, insert(_longer, nodes[states[state.name]], count))
            elif state.kind == "shift":
                give(state.name, node)
            else:
                raise PassRefused(f"state {state.name!r} would take note of tokens that are rejected")
        give(counter, drawn)
        observed = insert(partial(_observe, self.drafter), proposed, logits, emitted, noted, *memory)
        for state, node in zip(self.memory, observed, strict=True):
            give(state.name, node)
        return outputs, made, aliases

    def _length(self, state: State) -> str:
        assert state.occupancy is not None
        return state.occupancy.state

    def _check_write(self, state: State, node: Node, length: Node) -> None:
        """What a state holds of a token lies in the token's slot, so that it can be moved."""
        start = node.args[2] if is_call(node, ops.cache_write) else None
        counted = start is length or (isinstance(start, Node) and length in start.all_input_nodes)
        if state.kind not in _KEPT or not counted:
            raise PassRefused(f"state {state.name!r} holds more than an entry for every token")


# --- what is traced ---------------------------------------------------------------------------------------


def _propose(
    drafter: Drafter, tokens: Tensor, positions: Tensor, parent: Tensor, *memory: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens and positions [batch, nodes] of the tree, who sees whom, and the rows whose logits are wanted: all."""
    shape = tree(parent)
    proposed = drafter.propose(tokens[:, 0], positions[:, 0], shape, *memory)
    places = torch.where(positions >= 0, positions + shape.depth, positions)
    mask = shape.sees[None].expand(tokens.shape[0], -1, -1)
    return proposed, places.expand(tokens.shape[0], -1), mask, shape.index


def _commit(
    logits: Tensor,
    proposed: Tensor,
    positions: Tensor,
    parent: Tensor,
    counter: Tensor,
    limit: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    stream: Tensor,
) -> tuple[Tensor, ...]:
    """What the model chooses after every node, and the path of it that was proposed.

    Returns tokens [batch, nodes] of which ``count`` [batch] are committed, their log-probabilities, the next counter;
    then the path [batch, nodes], the positions of its nodes and those of the tokens, -1 behind the end.
    """
    shape: Tree = tree(parent)
    uniform = ops.uniforms(seed, stream, counter, proposed.shape[1])[:, shape.depth]
    probabilities = ops.truncated_softmax(logits, temperature, top_k, top_p, min_p)
    chosen = ops.draw(probabilities, uniform)
    path, count = accepted(shape, proposed, chosen, limit)
    inside = shape.index[None] < count[:, None]
    wide = logits.float()
    given = wide.gather(-1, chosen.clamp_min(0)[:, :, None])[:, :, 0] - wide.logsumexp(-1)
    tokens, logprobs = chosen.gather(1, path), given.gather(1, path)
    here = torch.where(inside, positions + shape.index, -1)
    there = torch.where(inside, positions + 1 + shape.index, -1)
    return torch.where(inside, tokens, 0), count, logprobs, counter + count, path, here, there


def _entries_over(cache: Tensor, path: Tensor, length: Tensor) -> Tensor:
    """The cache with the entries of the path's nodes where those of the first tokens would be."""
    batch, nodes = path.shape
    index = (length[:, None] + path).reshape(batch, *[1] * (cache.ndim - 3), nodes, 1)
    shape = (*cache.shape[:-2], nodes, cache.shape[-1])
    return ops.cache_write(cache, cache.gather(-2, index.expand(shape)), length)


def _places_over(slots: Tensor, positions: Tensor, length: Tensor) -> Tensor:
    """The positions of the slots, of which those behind the committed path are free."""
    batch, nodes = positions.shape
    new = positions.reshape(batch, *[1] * (slots.ndim - 3), nodes, 1)
    return ops.cache_write(slots, new.expand(*slots.shape[:-2], nodes, 1).contiguous(), length)


def _longer(length: Tensor, count: Tensor) -> Tensor:
    """Lengths [batch] or [batch, columns] after ``count`` [batch] tokens more."""
    return length + count.reshape(-1, *[1] * (length.ndim - 1))


def _observe(
    drafter: Drafter, tokens: Tensor, logits: Tensor, committed: Tensor, places: Tensor, *memory: Tensor
) -> tuple[Tensor, ...]:
    return tuple(drafter.observe(tokens, logits, committed, places, *memory))
