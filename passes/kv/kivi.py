"""KIVI: keys and values in 8 bits, the newest in full precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from tokopt.analysis.cache import CachedAttention, fused_attentions
from tokopt.errors import PassError, PassRefused
from tokopt.ir.bundle import Bundle, fresh
from tokopt.ir.format import BATCH, Occupancy, State, slot_axis
from tokopt.ir.program import AxisRange, Program, TensorSpec
from tokopt.kernels import ops
from tokopt.kernels.quantize_keys.reference import LEVELS
from tokopt.passes.kv.streaming import Streaming
from tokopt.pipeline.base import Context, Pass, PassResult, Refusal
from tokopt.rewrite.cache import ProgramEdit, compactor, language_program, state_program
from tokopt.rewrite.edit import call, inline, open_graph

ALL = 2**40
"""A budget that holds everything: what is left of an eviction is that padding is dropped."""

KINDS = ("key", "value")

RECENT = "newest"


@dataclass(frozen=True)
class KIVI(Pass):
    """8-bit cache (arXiv 2402.02750): ``x ~ code * scale + zero``, where zero is the smallest of a group.

    Keys have one scale per channel and ``group`` tokens, since channels differ; values have one per token and
    ``group`` channels. The newest ``residual`` tokens and those since the last ``compact`` stay as they are.
    ``compact`` quantizes what became old, in whole groups of tokens, after the prompt and then every so many tokens:
    as often as the eviction pass before it says, or every ``every`` tokens without one. A cache of 4-byte numbers
    takes ``1/4 + 2/group`` of its bytes. In ``step`` a layer's cache is expanded for as long as its attention runs.

    Rules. It composes with an eviction before it, which chooses among and moves the expanded keys; they are then
    grouped and quantized anew. What did not move is reproduced as it was. A ``residual`` that holds the text
    changes nothing. Layers with budgets of their own are refused.
    """

    group: int = 32
    residual: int = 128
    every: int = 64

    name: ClassVar[str] = "kivi"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 1 or self.residual < 0 or self.every < self.group:
            raise PassError(
                f"{self.name}: group={self.group} must be positive, residual={self.residual} not negative, and "
                f"every={self.every} at least the group"
            )

    def requires(self, bundle: Bundle) -> None:
        """Language models whose layers hold the same number of slots, and an eviction that comes again."""
        language_program(self.name, bundle)
        if (program := compactor(bundle)) is None:
            return
        every = max(trigger.every for trigger in bundle.schedule.triggers if trigger.program == program)
        if every < self.group:
            raise PassError(
                f"{self.name}: the eviction before it comes every {every} tokens; give it every={self.group} or more"
            )

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Split the cache of every layer into codes and a recent part."""
        given = bundle
        if compactor(bundle) is None:
            bundle = Streaming(budget=ALL, every=self.every).run(bundle, context).bundle
        name, compact = language_program(self.name, bundle), compactor(bundle)
        try:
            if compact is None:  # the eviction was refused for a reason that is found again here
                fused_attentions(bundle.main, open_graph(bundle.main), bundle.states)
            assert compact is not None
            step = _longer_program(bundle, name, self.group)
            bundle = bundle.with_program(name, step)
            module = open_graph(step)
            layers = fused_attentions(step, module, bundle.states)
            if len({bundle.state(layer.key_state).occupancy for layer in layers}) > 1:
                raise PassRefused("layers have budgets of their own; give all one budget")
            self._check(layers)
        except PassRefused as reason:
            return PassResult(given, 0, (), (Refusal(name, str(reason)),))
        edit = _SplitCache(bundle, name, module, layers, self.group)
        edited = edit.run()
        states = tuple(edit.states.values())
        packed = _Packed(self, edit, bundle.programs[compact], states).program(bundle, edited.ranges)
        programs = {**bundle.programs, name: edited, compact: packed}
        return PassResult(replace(bundle, programs=programs, states=states), len(layers))

    def _check(self, layers: list[CachedAttention]) -> None:
        for layer in layers:
            for kind, node in zip(KINDS, (layer.keys, layer.values), strict=True):
                value = node.meta["val"]
                if value.dtype != torch.float32 or value.shape[-1] % self.group:
                    raise PassRefused(
                        f"the {kind} of layer {layer.layer} have {value.shape[-1]} channels of {value.dtype}; KIVI "
                        f"needs float32 and a multiple of group={self.group}"
                    )


# --- tensors ----------------------------------------------------------------------------------------------


def quantize_values(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [..., channels] uint8, and scale and zero [..., channels / group] of groups of channels."""
    grouped = x.unflatten(-1, (-1, group))
    zero = grouped.amin(-1, keepdim=True)
    scale = (grouped.amax(-1, keepdim=True) - zero) / LEVELS
    codes = ((grouped - zero) / torch.where(scale > 0, scale, 1.0)).round().clamp(0, LEVELS)
    return codes.flatten(-2).to(torch.uint8), scale[..., 0], zero[..., 0]


def dequantize_values(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """``codes * scale + zero``."""
    grouped = codes.float().unflatten(-1, (scale.shape[-1], -1))
    return (grouped * scale[..., None] + zero[..., None]).flatten(-2)


def _split(kind: str, cache: Tensor, group: int, recent: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scale, zero and the recent part of a cache."""
    return *(ops.quantize_keys if kind == "key" else quantize_values)(cache, group), recent


def expanded(
    kind: str, codes: Tensor, scale: Tensor, zero: Tensor, recent: Tensor, length: Tensor, fresh: Tensor
) -> Tensor:
    """The whole cache [batch, heads, slots, channels]: codes first, then the ``fresh`` [batch] newest as they are."""
    old = (ops.dequantize_keys if kind == "key" else dequantize_values)(codes, scale, zero)
    slots = torch.arange(codes.shape[2], device=codes.device)
    place = slots - (length - fresh)[:, None]
    newest = ops.gather_tokens(recent, place.clamp(min=0).clamp(max=recent.shape[2] - 1), 2)
    return torch.where((place < 0)[:, None, :, None], old, newest)


# --- step -------------------------------------------------------------------------------------------------


@dataclass
class _SplitCache(ProgramEdit):
    """The program reads codes and the recent part, and writes new tokens to the recent part.

    ``parts`` are the states that each state of the cache was split into, and ``fresh`` counts the recent tokens, once
    the edit has run.
    """

    layers: list[CachedAttention]
    group: int
    parts: dict[str, tuple[State, ...]] = field(init=False, default_factory=dict)

    def run(self) -> Program:
        occupancy = self.states[self.layers[0].key_state].occupancy
        assert occupancy is not None
        self.length, self.tokens = occupancy.state, self.of_role("tokens")
        held = self.sample(self.length) - self.group
        room = int(held.max()) + self.program.example[_role_place(self.program, "tokens")].shape[1] + 3
        self.recent = State(self.free("recent_length"), "length", "int64", (BATCH,))
        self.axis = fresh(RECENT, self.ranges)
        self.take(self.recent, held)
        for layer in self.layers:
            for kind, name, write in (
                ("key", layer.key_state, layer.keys),
                ("value", layer.value_state, layer.values),
            ):
                self._split(kind, name, layer, write, room)
        self._count()
        return self.finish()

    def _split(self, kind: str, name: str, layer: CachedAttention, write: Node, room: int) -> None:
        """Replace one state by codes, scale, zero and the recent part."""
        cache = self.sample(name)
        states = self.parts[name] = self._parts(kind, self.states[name])
        values = _split(kind, cache, self.group, cache[:, :, :1].repeat(1, 1, room, 1))
        taken = [self.take(state, value) for state, value in zip(states, values, strict=True)]
        graph, lengths = self.module.graph, (self.nodes[self.length], self.nodes[self.recent.name])
        with graph.inserting_before(write):
            # The expansion reads what was written, so that the recent part may be written in place.
            written = call(graph, ops.cache_write, taken[-1], write.args[1], lengths[1], like=layer.node)
            operands = (*taken[:-1], written, *lengths, self.tokens)
            whole = call(graph, _expanded_by, kind, *operands, like=layer.node)
        write.replace_all_uses_with(whole)
        # What else reads the cache reads its sizes, and codes have the same.
        self.nodes[name].replace_all_uses_with(taken[0], delete_user_cb=lambda user: user is not write)
        self.remove(name)
        self.give(states[-1], written, written=True)

    def _parts(self, kind: str, state: State) -> tuple[State, ...]:
        """Codes, scale, zero and the recent part of a cache state."""
        batch, heads, slots, channels = state.axes
        assert isinstance(channels, int)
        few = (batch, heads, slots, channels // self.group)
        return (
            replace(state, name=self.free(f"{state.name}_codes"), dtype="uint8"),
            replace(state, name=self.free(f"{state.name}_scale"), kind="scale", axes=few),
            replace(state, name=self.free(f"{state.name}_zero"), kind="zero", axes=few),
            replace(
                state,
                name=self.free(f"{state.name}_{RECENT}"),
                axes=(batch, heads, self.axis, channels),
                occupancy=Occupancy(self.recent.name),
            ),
        )

    def _count(self) -> None:
        graph = self.module.graph
        with graph.inserting_before(graph.output_node()):
            count = call(graph, _more, self.nodes[self.recent.name], self.tokens, like=self.layers[0].node)
        self.give(self.recent, count)


def _role_place(program: Program, role: str) -> int:
    return [spec.role for spec in program.inputs].index(role)


def _expanded_by(kind: str, *tensors: Tensor) -> Tensor:
    """The whole cache with the new tokens; ``tensors`` end with both lengths before them, and with them."""
    *parts, length, fresh, tokens = tensors
    return expanded(kind, *parts, length + tokens.shape[1], fresh + tokens.shape[1])


def _more(length: Tensor, tokens: Tensor) -> Tensor:
    return length + tokens.shape[1]


def _longer_program(bundle: Bundle, name: str, by: int) -> Program:
    """A program with an example whose cache holds ``by`` more tokens."""
    program = bundle.programs[name]
    return replace(program, example=_longer(program, bundle, by))


def _longer(program: Program, bundle: Bundle, by: int) -> tuple[Tensor, ...]:
    """The program's example with ``by`` more tokens in front of those that its cache holds."""

    def longer(spec: TensorSpec, tensor: Tensor) -> Tensor:
        if spec.role == "positions":
            return torch.where(tensor >= 0, tensor + by, tensor)
        if spec.state is None:
            return tensor
        state = bundle.state(spec.state)
        if state.kind == "length":
            return tensor + by
        axis = slot_axis(state.axes)
        if axis is None:
            return tensor
        place = state.axes.index(axis)
        if state.kind == "position":
            first = torch.arange(by)[:, None].expand(*tensor.shape[:2], by, 1)
            tensor = torch.where(tensor >= 0, tensor + by, tensor)
        else:
            first = tensor.index_select(place, torch.arange(by) % tensor.shape[place])
        return torch.cat([first, tensor], dim=place)

    return tuple(map(longer, program.inputs, program.example))


# --- compact ----------------------------------------------------------------------------------------------


class _Packed:
    """The program that compacts, on the expanded cache, whose old part is then quantized."""

    def __init__(self, method: KIVI, edit: _SplitCache, compact: Program, states: Sequence[State]) -> None:
        self.method, self.edit, self.compact, self.states = method, edit, compact, states

    def __call__(self, due: Node, *nodes: Node) -> list[Node]:
        insert = partial(call, due.graph, like=due)
        old = dict(zip((state.name for state in self.states), nodes, strict=True))
        recent, group = self.edit.recent.name, self.method.group
        lengths = old[self.edit.length], old[recent]
        given = [self._given(spec, insert, due, old) for spec in self.compact.inputs]
        results = inline(due.graph, self.compact, given, like=due)
        new = {spec.state: x for spec, x in zip(self.compact.outputs, results, strict=True) if spec.state}
        length = new[self.edit.length]
        packed, new[recent] = insert(_lengths, due, length, lengths[1], self.method.residual, group)
        for name, parts in self.edit.parts.items():
            values = insert(_packed, parts[0].kind, new[name], packed, old[parts[-1].name], group)
            new.update(zip((part.name for part in parts), values, strict=True))
        return [insert(torch.clone, new[state.name]) for state in self.states]

    def program(self, bundle: Bundle, ranges: Mapping[str, AxisRange]) -> Program:
        """The program that compacts the split cache."""
        specs = [spec.state for spec in self.compact.inputs]
        example = _longer(self.compact, bundle, self.method.group)
        known = {name: x for name, x in zip(specs, example, strict=True) if name is not None}
        held = known[self.edit.recent.name] = known[self.edit.length] - self.method.group
        room = int(held.max()) + 4
        for name, parts in self.edit.parts.items():
            cache = known[name]
            values = _split(parts[0].kind, cache, self.method.group, cache[:, :, :1].repeat(1, 1, room, 1))
            known |= {part.name: value for part, value in zip(parts, values, strict=True)}
        due = example[_role_place(self.compact, "due")]
        return state_program(self, self.states, (due, *(known[s.name] for s in self.states)), ranges)

    def _given(self, spec: TensorSpec, insert: Callable[..., Any], due: Node, old: dict[str, Node]) -> Node:
        if spec.state is None:
            return due
        parts = self.edit.parts.get(spec.state)
        if parts is None:
            return old[spec.state]
        lengths = old[self.edit.length], old[self.edit.recent.name]
        return insert(expanded, parts[0].kind, *(old[part.name] for part in parts), *lengths)


def _lengths(due: Tensor, length: Tensor, fresh: Tensor, residual: int, group: int) -> tuple[Tensor, Tensor]:
    """How many tokens [batch] are in codes now, and how many are not."""
    packed = (length - residual).clamp(min=0) // group * group
    # A row that is not due keeps what is packed of it, and what is not.
    packed = torch.where(due, packed, length - fresh)
    return packed, length - packed


def _packed(kind: str, cache: Tensor, packed: Tensor, recent: Tensor, group: int) -> tuple[Tensor, ...]:
    """The parts of a cache of which ``packed`` [batch] tokens are in codes; ``recent`` has room for the others."""
    place = packed[:, None] + torch.arange(recent.shape[2], device=cache.device)
    newest = ops.gather_tokens(cache, place.clamp(max=cache.shape[2] - 1), 2)
    return _split(kind, cache, group, newest)
