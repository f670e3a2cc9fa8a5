"""Speculation inside the program: one call proposes a tree of tokens, verifies it and keeps the path that is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from tokopt.errors import PassError, PassRefused
from tokopt.ir.bundle import Bundle, Semantics, fresh
from tokopt.ir.export import placeholders
from tokopt.ir.format import BATCH, DRAWING, Entry, State
from tokopt.ir.graph import is_call, operand_at
from tokopt.ir.graph import results as graph_results
from tokopt.ir.program import AxisRange, Program, TensorSpec
from tokopt.ir.shapes import with_shapes
from tokopt.kernels import ops
from tokopt.passes.sample.sample import SampleTokens
from tokopt.passes.speculate.committed import (
    check_write,
    longer,
    path_positions,
    refuse_links,
    require_logits,
)
from tokopt.passes.speculate.drafters import Drafter, Verified, learns_by_reading, load_drafter
from tokopt.passes.speculate.lossy import Lantern, LossyRule, Typical
from tokopt.passes.speculate.neighbours import embeddings, looked_up, nearest_to
from tokopt.passes.speculate.observed import Observation, observe_path
from tokopt.passes.speculate.tree import (
    Tree,
    accepted,
    accepted_in_chain,
    best_first,
    chain,
    is_chain,
    path_to,
    tree,
)
from tokopt.pipeline.base import Context, Pass, PassResult, Refusal, options
from tokopt.rewrite.cache import ProgramEdit, language_program
from tokopt.rewrite.edit import call, close_graph, inline_nodes, new_graph, open_graph

NODES = "nodes"
"""The axis of the proposed tokens, the root included."""

CONFIDENCE = "confidence"

MOST = 64
"""Nodes of a tree at most."""

NEAREST = 1024
"""Neighbours of a token at most."""

OPTIONS = {"lantern": ("delta", "neighbours"), "typical": ("epsilon", "alpha")}
"""Rule -> the options that say how it accepts."""


@dataclass(frozen=True)
class Speculate(Pass):
    """Let a call of the program that decodes commit several tokens.

    The program proposes a tree of up to ``nodes`` tokens by what a ``drafter`` remembers, runs the model on all of them
    at once, each seeing its ancestors, draws the model's own token after every node, and commits the longest path on
    which proposals and draws agree, and one token more. Entries of the cache that belong to the path are moved to where
    they would be without speculation; the others are free again.

    A token is drawn with the random number of its place in the text, whatever was proposed. So the text is that of
    ``sample`` for the same seed, greedy or not, up to what the rounding of calls with several tokens changes.

    With another rule to ``accept`` by, the text is not that of the model: ``typical`` takes proposals above a threshold
    (Medusa, arXiv 2401.10774: ``epsilon``, ``alpha``), ``lantern`` lets a token stand for its ``neighbours`` as far as
    ``delta`` goes (arXiv 2410.03355). At temperature 0 both write the greedy text. Above, it depends on what is
    proposed: on how many nodes calls get, and with ``token_recycling`` and ``hybrid`` on the other rows of a batch.

    ``drafter``: ``prompt_lookup``, ``token_recycling`` (arXiv 2408.08696), ``hybrid``, which is lookup where the text
    repeats itself and recycling elsewhere, or ``logitspec`` (arXiv 2507.01449). ``depth`` bounds the tree's levels.

    Rules. One program reads and decodes, and every token has a slot of its own. What a policy that evicts remembers of
    attention, it remembers of committed tokens alone. The pass comes last.
    """

    drafter: Literal["prompt_lookup", "token_recycling", "hybrid", "logitspec"] = "prompt_lookup"
    nodes: int = 8
    depth: int = 8
    accept: Literal["same_text", "typical", "lantern"] = "same_text"
    delta: float = 0.1
    neighbours: int = 16
    epsilon: float = 0.09
    alpha: float = 0.3

    name: ClassVar[str] = "speculate"
    semantics: ClassVar[Semantics] = "lossless"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, most in (("nodes", MOST), ("depth", 8), ("neighbours", NEAREST)):
            value = getattr(self, option)
            if not 1 <= value <= most:
                raise PassError(f"{self.name}: {option}={value} must be 1 to {most}")
        for option in ("delta", "epsilon", "alpha"):
            value = getattr(self, option)
            if not 0 < value <= 1:
                raise PassError(f"{self.name}: {option}={value:g} must be above 0 and at most 1")
        if self.nodes == 1 and self.accept != "same_text":
            raise PassError(
                f"{self.name}: nodes=1 proposes nothing that accept={self.accept} could accept; give at least 2 nodes"
            )
        for rule, own in OPTIONS.items():
            given = [
                o.name for o in options(type(self)) if o.name in own and getattr(self, o.name) != o.default
            ]
            if given and rule != self.accept:
                raise PassError(
                    f"{self.name}: {given[0]} is for accept={rule}; leave it out, or accept by that rule"
                )

    @property
    def promise(self) -> Semantics:
        """Of a rule that changes the text, that of no text."""
        return "lossless" if self.accept == "same_text" else "approximate"

    def rule(self, nodes: int) -> LossyRule | None:
        """What accepts tokens of a tree of so many nodes; None for the tokens that the model draws itself."""
        if self.accept == "same_text":
            return None
        lantern = Lantern(nodes, self.delta, self.neighbours)
        return lantern if self.accept == "lantern" else Typical(self.epsilon, self.alpha)

    def requires(self, bundle: Bundle) -> None:
        """Language models whose one program gives logits."""
        require_logits(self.name, bundle)

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Add the program that speculates; the one there was reads prompts, and decodes where nothing is proposed."""
        name, drafter = language_program(self.name, bundle), load_drafter(self.drafter)
        assert bundle.generation is not None
        step = bundle.programs[name]
        parents = best_first(drafter.rates, drafter.fade, self.nodes, self.depth, drafter.below)
        rule = self.rule(len(parents))
        try:
            refuse_links(step)
            drawing = SampleTokens().run(bundle, context).bundle
            memory = tuple(_named(drafter.states(bundle.generation), drawing))
            made = _Speculation(
                step, drawing.programs[name], drawing, memory, drafter, rule, chain=is_chain(parents)
            )
            speculating = made.program()
        except PassRefused as reason:
            return PassResult(bundle, 0, (), (Refusal(name, str(reason)),))
        added = fresh("speculate", bundle.programs)
        lossy = "" if rule is None else rule.lossy
        # What is drawn alone is drawn by the program that reads; another rule decides of every token.
        kept = [e for e in bundle.schedule.entries if e.role != "decode" or rule is None or rule.draws]
        entries = (*kept, Entry(added, "decode", NODES, parents, lossy=lossy))
        made = replace(
            drawing,
            programs={**drawing.programs, name: _reading(drawing, name, memory, drafter), added: speculating},
            states=(*drawing.states, *memory),
            schedule=replace(bundle.schedule, entries=entries),
        )
        return PassResult(made, 1, (lossy,) if lossy else ())


def _named(states: Iterable[State], bundle: Bundle) -> Iterator[State]:
    taken = [state.name for state in bundle.states]
    for state in states:
        yield replace(state, name=fresh(state.name, taken))


def _blank(state: State, batch: int) -> Tensor:
    """A drafter's state at the start of a request."""
    shape = [batch if axis == BATCH else axis for axis in state.axes]
    return torch.full(shape, int(state.initial), dtype=getattr(torch, state.dtype))  # type: ignore[arg-type]


def _filled(state: State, text: Tensor) -> Tensor:
    """A drafter's state that holds the tokens of ``text`` [batch, tokens], over and over."""
    blank = _blank(state, text.shape[0])
    return text.flatten()[torch.arange(blank.numel()) % text.numel()].reshape(blank.shape).to(blank.dtype)


def _reading(bundle: Bundle, name: str, memory: Sequence[State], drafter: Drafter) -> Program:
    """The program that reads a prompt and draws what follows it, and of which the drafter takes note."""
    edit = ProgramEdit(bundle, name, open_graph(bundle.programs[name]))
    drawn = {spec.role: node for spec, node in zip(edit.outputs, edit.results, strict=True)}
    draw = next(node for node in edit.module.graph.nodes if is_call(node, ops.draw_tokens))
    logits = operand_at(draw, 0)
    given = [edit.of_role("tokens"), edit.of_role("positions"), drawn["tokens"], drawn["count"], logits]
    held = [edit.take(state, _blank(state, edit.example[0].shape[0])) for state in memory]
    graph = edit.module.graph
    with graph.inserting_before(graph.output_node()):
        sure, *noted = call(graph, partial(_read, drafter, memory), *given, *held, like=edit.results[0])
    edit.outputs.append(_confidence(edit.free(CONFIDENCE)))
    edit.results.append(sure)
    for state, node in zip(_noting(memory), noted, strict=True):
        edit.give(state, node)
    return edit.finish()


def _confidence(name: str) -> TensorSpec:
    return TensorSpec(name, "int64", (BATCH,), CONFIDENCE)


def _noting(memory: Sequence[State]) -> list[State]:
    """The states that learn of what is read."""
    return [state for state in memory if learns_by_reading(state)]


@dataclass
class _Outputs:
    """What a program gives, and the inputs that it writes into."""

    specs: list[TensorSpec] = field(default_factory=list[TensorSpec])
    nodes: list[Node] = field(default_factory=list[Node])
    aliases: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, spec: TensorSpec, node: Node, written: str | None = None) -> None:
        """One more, which is the input ``written`` with new entries where it is given."""
        self.specs.append(spec)
        self.nodes.append(node)
        if written is not None:
            self.aliases[spec.name] = written

    def give(self, state: State, node: Node, written: str | None = None) -> None:
        """The next value of a state."""
        self.add(
            TensorSpec(f"next_{state.name}", state.dtype, state.axes, "state", state.name), node, written
        )


class _Speculation:
    """The program that speculates, made of ``step``, which gives logits.

    ``drawn`` is the same after ``sample``: of it are the inputs that say how tokens are drawn, and the counter. In a
    ``chain``, where every node follows the one before it, the entries of the path are where they belong from the start.
    """

    def __init__(
        self,
        step: Program,
        drawn: Program,
        bundle: Bundle,
        memory: Sequence[State],
        drafter: Drafter,
        rule: LossyRule | None,
        *,
        chain: bool,
    ) -> None:
        """``bundle`` has the states of ``drawn``, and ``memory`` are those of the drafter."""
        self.step, self.drawn, self.memory, self.drafter, self.chain = step, drawn, memory, drafter, chain
        self.rule = rule
        self.states = {state.name: state for state in (*bundle.states, *memory)}
        assert bundle.generation is not None
        self.context = None if bundle.schedule.endless else bundle.generation.context
        self.model = with_shapes(step)
        self.observation = Observation(step, self.model, self.states)
        given = dict(self._given())
        self.inputs, self.example = tuple(given), tuple(given.values())
        axes = {axis for spec in self.inputs for axis in spec.axes}
        self.ranges = {axis: bounds for axis, bounds in drawn.ranges.items() if axis in axes}
        self.ranges[NODES] = AxisRange(1, MOST)
        self.module = new_graph(self.inputs, self.ranges, self.example)
        named = list(zip(self.inputs, placeholders(self.module), strict=True))
        self.by_role = {spec.role: node for spec, node in named}
        self.by_state = {spec.state: node for spec, node in named if spec.state is not None}

    def program(self) -> Program:
        """Raises PassRefused where what rejected tokens left behind could not be taken back."""
        made = _Outputs()
        memory = [self.by_state[state.name] for state in self.memory]
        proposed, read, limit, *told = self._insert(
            partial(_propose, self.drafter, chain if self.chain else tree, self.context),
            *self._of_roles("tokens", "positions", "parent", "limit"),
            *memory,
        )
        known = self._run_model(read, *told)
        results = {
            spec.name: known[node]
            for spec, node in zip(self.step.outputs, graph_results(self.model.graph), strict=True)
        }
        logits = next(results[spec.name] for spec in self.step.outputs if spec.role == "logits")
        (counter,) = {spec.state for spec in self.drawn.inputs} - {spec.state for spec in self.step.inputs}
        assert counter is not None
        place, drawing = self._of_roles("positions", "parent"), self._of_roles(*DRAWING)
        given = (logits, proposed, self.by_state[counter], *place, limit, *drawing)
        tokens, count, logprobs, number, path, there = self._insert(*self._committing(read), *given)
        made.add(TensorSpec("next_tokens", "int64", (BATCH, NODES), "tokens"), tokens)
        made.add(TensorSpec("count", "int64", (BATCH,), "count"), count)
        made.add(TensorSpec("logprobs", "float32", (BATCH, NODES), "logprobs"), logprobs)
        for spec in self.step.outputs:
            if spec.state is not None and spec.state not in self.observation.memory:
                self._next_state(made, spec, results[spec.name], path, count)
        self._observe_path(made, known, path, count)
        made.give(self.states[counter], number)
        sure, *noted = self._insert(
            partial(_observe, self.drafter), read, logits, tokens, count, there, path, *memory
        )
        made.add(_confidence(CONFIDENCE), sure)
        for state, node in zip(self.memory, noted, strict=True):
            made.give(state, node)
        self.module.graph.output(tuple(made.nodes))
        blank = Program(self.module, self.inputs, tuple(made.specs), self.ranges, self.example)
        return close_graph(blank, self.module, aliases=made.aliases)

    def _given(self) -> Iterator[tuple[TensorSpec, Tensor]]:
        """Every input and its example: a small tree below a token that follows what the example's states hold.

        The drafter remembers the example's tokens, so that what it proposes is not one token again and again.
        """
        known = dict(zip(self.drawn.inputs, self.drawn.example, strict=True))
        text = next(x for spec, x in known.items() if spec.role == "tokens")
        batch = text.shape[0]
        held = next(x for spec, x in known.items() if spec.state and self.states[spec.state].kind == "length")
        yield TensorSpec("tokens", "int64", (BATCH, 1), "tokens"), text[:, :1].clone()
        yield (
            TensorSpec("positions", "int64", (BATCH, 1), "positions"),
            held.reshape(batch, -1)[:, :1].clone(),
        )
        yield (
            TensorSpec("parent", "int64", (NODES,), "parent"),
            torch.tensor([-1, 0, 1, 2, 3] if self.chain else [-1, 0, 0, 1, 3]),
        )
        for spec, value in known.items():
            if spec.role not in ("tokens", "positions", "mask"):
                yield spec, torch.full_like(value, 3) if spec.role == "limit" else value
        for state in self.memory:
            yield TensorSpec(state.name, state.dtype, state.axes, "state", state.name), _filled(state, text)

    def _insert(self, function: Callable[..., Any], *operands: Node) -> Any:
        return call(self.module.graph, function, *operands, like=self.by_role["tokens"])

    def _of_roles(self, *roles: str) -> list[Node]:
        return [self.by_role[role] for role in roles]

    def _run_model(self, tokens: Node, positions: Node, mask: Node, rows: Node) -> dict[Node, Node]:
        """Insert the model on the whole tree; what became of every node of its graph."""
        fed = {"tokens": tokens, "positions": positions, "mask": mask, "rows": rows}
        operands = [
            fed[spec.role] if spec.state is None else self.by_state[spec.state] for spec in self.step.inputs
        ]
        known = dict(zip(placeholders(self.model), operands, strict=True))
        inline_nodes(
            self.module.graph, self.model, self.model.graph.nodes, known, like=self.by_role["tokens"]
        )
        return known

    def _committing(self, read: Node) -> tuple[Any, ...]:
        """What decides which tokens are committed, and what it is given first."""
        if self.rule is None:
            return (_commit_chain if self.chain else _commit,)
        function = partial(_commit_by_rule, self.rule, chain if self.chain else tree)
        if not self.rule.neighbours:
            return function, read
        named = zip(self.step.inputs, placeholders(self.model), strict=True)
        table = embeddings(self.model, next(node for spec, node in named if spec.role == "tokens"))
        near = nearest_to(self.module, read, table, self.rule.neighbours)
        return function, self._insert(looked_up, near, read)

    def _observe_path(self, made: _Outputs, known: Mapping[Node, Node], path: Node, count: Node) -> None:
        """What the model remembers after the committed tokens alone."""
        observation = self.observation
        if not observation.memory:
            return
        given = {node: known[node] for node in (*observation.queries, *observation.inputs)}
        kept = {spec.state: node for spec, node in zip(made.specs, made.nodes, strict=True)}
        given |= {node: kept[state] for state, node in observation.caches.items()}
        (root,) = self._of_roles("positions")
        place = (path, count, root)
        after = observe_path(self.module.graph, observation, given, place, gather=not self.chain)
        for state, node in after.items():
            made.give(self.states[state], node)

    def _next_state(self, made: _Outputs, spec: TensorSpec, node: Node, path: Node, count: Node) -> None:
        """What a state is after the committed tokens alone."""
        assert spec.state is not None
        state = self.states[spec.state]
        if spec.name in self.step.aliases:
            assert state.occupancy is not None
            check_write(state, node, self.by_state[state.occupancy.state])
            buffer, start = self.by_state[state.name].name, operand_at(node, 2)
            if self.chain and state.kind != "position":
                made.give(state, node, buffer)
                return
            made.add(TensorSpec(f"proposed_{state.name}", spec.dtype, spec.axes, "written"), node, buffer)
            if state.kind == "position":
                made.give(state, self._insert(path_positions, node, path, count, start), buffer)
            else:
                made.give(state, self._insert(ops.move_entries, node, path, start), buffer)
        elif state.kind == "length":
            made.give(state, self._insert(longer, self.by_state[state.name], count))
        else:
            made.give(state, node)


# --- what is traced ---------------------------------------------------------------------------------------


def _propose(
    drafter: Drafter,
    shaped: Callable[[Tensor], Tree],
    context: int | None,
    tokens: Tensor,
    positions: Tensor,
    parent: Tensor,
    limit: Tensor,
    *memory: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens [batch, nodes] of the tree, -1 for none; what the model reads of them, and is told beside.

    Between them how many may be committed [batch]. It is told the nodes' positions, who sees whom, and the rows whose
    logits are wanted: all. Nodes deeper than a row may commit have no position: it might lie beyond the ``context``,
    where a model with learned positions has none.
    """
    shape = shaped(parent)
    proposed = drafter.propose(tokens[:, 0], positions[:, 0], shape, *memory)
    if context is not None:
        limit = torch.minimum(limit, (context - positions[:, 0]).clamp_min(1))
    there = (positions >= 0) & ((shape.depth[None] < limit[:, None]) | (shape.depth == 0))
    places = torch.where(there, positions + shape.depth, -1)
    mask = shape.sees[None].expand(tokens.shape[0], -1, -1)
    return proposed, proposed.clamp_min(0), limit, places, mask, shape.index


def _commit(
    logits: Tensor,
    proposed: Tensor,
    counter: Tensor,
    positions: Tensor,
    parent: Tensor,
    limit: Tensor,
    *drawing: Tensor,
) -> tuple[Tensor, ...]:
    """What the model chooses after every node, and the path of it that was proposed; ``drawing`` as :data:`DRAWING`.

    Returns tokens [batch, nodes] of which ``count`` [batch] are committed, their log-probabilities, the next counter;
    then the path [batch, nodes] and the positions of the tokens, -1 behind the end.
    """
    *how, seed, stream = drawing
    shape = tree(parent)
    uniform = ops.uniforms(seed, stream, counter, proposed.shape[1])[:, shape.depth]
    chosen, given = ops.draw_tokens(logits.float(), uniform, *how)
    path, count = accepted(shape, proposed, chosen, limit)
    inside, there = _places(shape.index, positions, count)
    tokens, logprobs = torch.where(inside, chosen.gather(1, path), 0), given.gather(1, path)
    return tokens, count, logprobs, counter + count, path, there


def _commit_chain(
    logits: Tensor,
    proposed: Tensor,
    counter: Tensor,
    positions: Tensor,
    parent: Tensor,
    limit: Tensor,
    *drawing: Tensor,
) -> tuple[Tensor, ...]:
    """What :func:`_commit` returns for a chain, whose nodes are the path."""
    *how, seed, stream = drawing
    uniform = ops.uniforms(seed, stream, counter, proposed.shape[1])
    chosen, given = ops.draw_tokens(logits.float(), uniform, *how)
    count = accepted_in_chain(proposed, chosen, limit)
    index = torch.arange(proposed.shape[1])
    inside, there = _places(index, positions, count)
    tokens, logprobs = torch.where(inside, chosen, 0), torch.where(inside, given, 0.0)
    return tokens, count, logprobs, counter + count, index[None].expand(proposed.shape[0], -1), there


def _commit_by_rule(
    rule: LossyRule,
    shaped: Callable[[Tensor], Tree],
    near: Tensor,
    logits: Tensor,
    proposed: Tensor,
    counter: Tensor,
    positions: Tensor,
    parent: Tensor,
    limit: Tensor,
    *drawing: Tensor,
) -> tuple[Tensor, ...]:
    """What :func:`_commit` returns where a rule decides; ``near`` [batch, nodes, neighbours] as it asks for them."""
    *how, seed, stream = drawing
    shape, wide = shaped(parent), logits.float()
    uniform = ops.uniforms(seed, stream, counter, proposed.shape[1])
    p = ops.truncated_softmax(wide, *how)
    node, token, used = rule.decide(shape, proposed, near, p, uniform, limit)
    count = torch.where(limit > 0, shape.depth[node] + 1, 0)
    path = path_to(shape, node)
    inside, there = _places(shape.index, positions, count)
    following = proposed.gather(1, torch.cat([path[:, 1:], path[:, :1]], 1))
    chosen = torch.where(shape.index[None] == count[:, None] - 1, token[:, None], following)
    tokens = torch.where(inside, chosen, 0)
    known = ops.gather_tokens(wide.log_softmax(-1), path, 1)
    logprobs = known.gather(2, tokens.clamp_min(0)[:, :, None])[:, :, 0]
    return tokens, count, logprobs, counter + torch.where(limit > 0, used, 0), path, there


def _places(index: Tensor, positions: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Which places of the path are committed [batch, nodes], and the positions of their tokens, -1 behind them."""
    inside = index[None] < count[:, None]
    return inside, torch.where(inside, positions + 1 + index, -1)


def _read(
    drafter: Drafter,
    states: Sequence[State],
    tokens: Tensor,
    positions: Tensor,
    drawn: Tensor,
    count: Tensor,
    logits: Tensor,
    *memory: Tensor,
) -> tuple[Tensor, ...]:
    """The confidence after what was read and the token ``drawn`` [batch, 1] where ``count`` is 1; the next memory.

    It was drawn from ``logits`` [batch, 1, vocabulary].
    """
    place = torch.where(count[:, None] > 0, positions[:, -1:] + 1, -1)
    noted = drafter.read(torch.cat([tokens, drawn], 1), torch.cat([positions, place], 1), logits, *memory)
    new = iter(noted)
    after = [
        next(new) if learns_by_reading(state) else old for state, old in zip(states, memory, strict=True)
    ]
    return drafter.confidence(drawn[:, 0], *after), *noted


def _observe(
    drafter: Drafter,
    tokens: Tensor,
    logits: Tensor,
    committed: Tensor,
    count: Tensor,
    places: Tensor,
    path: Tensor,
    *memory: Tensor,
) -> tuple[Tensor, ...]:
    """The confidence after what was committed, and the memory."""
    newest = (count - 1).clamp_min(0)[:, None]
    verified = Verified(tokens, logits, committed, places, path.gather(1, newest)[:, 0])
    noted = drafter.observe(verified, *memory)
    root = committed.gather(1, newest)[:, 0]
    return drafter.confidence(root, *noted), *noted
