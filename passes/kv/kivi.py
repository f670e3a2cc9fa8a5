"""KIVI: keys and values in 8 bits, the newest in full precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from tokopt.analysis.cache import CachedAttention, cached_attentions
from tokopt.errors import PassError, PassRefused
from tokopt.ir.bundle import Bundle, State
from tokopt.ir.program import AxisRange, Program, TensorSpec
from tokopt.kernels import ops
from tokopt.kernels.quantize_keys.reference import LEVELS
from tokopt.passes.kv.streaming import Streaming
from tokopt.pipeline.base import Context, Pass, PassResult, Refusal
from tokopt.rewrite.cache import ProgramEdit, require_language_model, state_program
from tokopt.rewrite.edit import call, open_graph

ALL = 2**40
"""A budget that holds everything: what is left of an eviction is that padding is dropped."""

KINDS = ("keys", "values")
PARTS = ("codes", "scale", "zero", "recent")
"""What a state of the cache is split into."""


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
        require_language_model(self.name, bundle)
        assert bundle.generation is not None
        if "compact" in bundle.programs and bundle.generation.compact_every < self.group:
            raise PassError(
                f"{self.name}: the eviction before it comes every {bundle.generation.compact_every} tokens; give it "
                f"every={self.group} or more"
            )

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Split the cache of every layer into codes and a recent part."""
        given, step = bundle, bundle.programs["step"]
        if "compact" not in bundle.programs:
            bundle = Streaming(budget=ALL, every=self.every).run(bundle, context).bundle
            step = bundle.programs["step"]
        step = replace(step, example=_longer(step, self.group))
        module = open_graph(step)
        try:
            if len(next(spec for spec in step.inputs if spec.name == "length").axes) > 1:
                raise PassRefused("layers have budgets of their own; give all one budget")
            layers = cached_attentions(step, module.graph)
            self._check(layers)
        except PassRefused as reason:
            return PassResult(given, 0, (), (Refusal("step", str(reason)),))
        bundle = replace(bundle, programs={**bundle.programs, "step": step})
        edit = _SplitCache(bundle, module, layers, self.group)
        edited = edit.run()
        states = tuple(edit.states.values())
        compact = _export_compact(self, bundle.programs["compact"], states, edited.ranges)
        programs = {"step": edited, "compact": compact}
        return PassResult(replace(bundle, programs=programs, states=states), len(layers))

    def _check(self, layers: list[CachedAttention]) -> None:
        for layer in layers:
            for kind, node in zip(KINDS, (layer.keys, layer.values), strict=True):
                value = node.meta["val"]
                if value.dtype != torch.float32 or value.shape[-1] % self.group:
                    raise PassRefused(
                        f"the {kind} of layer {layer.index} have {value.shape[-1]} channels of {value.dtype}; KIVI "
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
    """The :data:`PARTS` of a cache."""
    return *(ops.quantize_keys if kind == "keys" else quantize_values)(cache, group), recent


def _names(name: str) -> list[str]:
    return [f"{name}_{part}" for part in PARTS]


def expanded(
    kind: str, codes: Tensor, scale: Tensor, zero: Tensor, recent: Tensor, length: Tensor, fresh: Tensor
) -> Tensor:
    """The whole cache [batch, heads, slots, channels]: codes first, then the ``fresh`` [batch] newest as they are."""
    old = (ops.dequantize_keys if kind == "keys" else dequantize_values)(codes, scale, zero)
    slots = torch.arange(codes.shape[2], device=codes.device)
    place = slots - (length - fresh)[:, None]
    newest = ops.gather_tokens(recent, place.clamp(min=0).clamp(max=recent.shape[2] - 1), 2)
    return torch.where((place < 0)[:, None, :, None], old, newest)


# --- step -------------------------------------------------------------------------------------------------


@dataclass
class _SplitCache(ProgramEdit):
    """``step`` reads codes and the recent part, and writes new tokens to the recent part."""

    layers: list[CachedAttention]
    group: int

    def run(self) -> Program:
        length, tokens = self._example("length"), self._example("tokens")
        held = length - self.group
        room = int(held.max()) + tokens.shape[1] + 3
        fresh = State("recent_length", "int64", ("batch",), "next_recent_length")
        self.take(fresh, held)
        for layer in self.layers:
            for kind, write in zip(KINDS, (layer.keys, layer.values), strict=True):
                self._split(kind, layer, write, room)
        self._count(fresh)
        self.ranges["recent"] = AxisRange()
        return self.finish()

    def _example(self, name: str) -> Tensor:
        return self.example[[spec.name for spec in self.inputs].index(name)]

    def _split(self, kind: str, layer: CachedAttention, write: Node, room: int) -> None:
        """Replace one state by codes, scale, zero and the recent part."""
        name = f"{kind}_{layer.index}"
        cache = self._example(name)
        states = split_states(self.states[name], self.group)
        values = _split(kind, cache, self.group, cache[:, :, :1].repeat(1, 1, room, 1))
        taken = [self.take(state, value) for state, value in zip(states, values, strict=True)]
        graph, lengths = self.module.graph, (self.nodes["length"], self.nodes["recent_length"])
        with graph.inserting_before(write):
            # The expansion reads what was written, so that the recent part may be written in place.
            written = call(graph, ops.cache_write, taken[-1], write.args[1], lengths[1], like=layer.node)
            operands = (*taken[:-1], written, *lengths, self.nodes["tokens"])
            whole = call(graph, _expansion(kind), *operands, like=layer.node)
        write.replace_all_uses_with(whole)
        # What else reads the cache reads its sizes, and codes have the same.
        self.nodes[name].replace_all_uses_with(taken[0], delete_user_cb=lambda user: user is not write)
        self.remove(name)
        self.give(states[-1], written)

    def _count(self, fresh: State) -> None:
        graph = self.module.graph
        with graph.inserting_before(graph.output_node()):
            count = call(
                graph, _more, self.nodes["recent_length"], self.nodes["tokens"], like=self.layers[0].node
            )
        self.give(fresh, count)


def split_states(state: State, group: int) -> tuple[State, ...]:
    """Codes, scale, zero and the recent part of a cache state."""
    batch, heads, slots, channels = state.axes
    assert isinstance(channels, int)

    def part(name: str, dtype: str, *axes: str | int, in_place: bool = False) -> State:
        full = f"{state.name}_{name}"
        return State(full, dtype, (batch, heads, *axes), f"next_{full}", in_place=in_place)

    return (
        part("codes", "uint8", slots, channels),
        part("scale", "float32", slots, channels // group),
        part("zero", "float32", slots, channels // group),
        part("recent", "float32", "recent", channels, in_place=True),
    )


def _expansion(kind: str) -> Any:
    def expand(*tensors: Tensor) -> Tensor:
        *parts, length, fresh, tokens = tensors
        return expanded(kind, *parts, length + tokens.shape[1], fresh + tokens.shape[1])

    return expand


def _more(length: Tensor, tokens: Tensor) -> Tensor:
    return length + tokens.shape[1]


def _longer(program: Program, by: int) -> tuple[Tensor, ...]:
    """The program's example with ``by`` more tokens in front of those that its cache holds."""

    def longer(spec: TensorSpec, tensor: Tensor) -> Tensor:
        if spec.name == "length":
            return tensor + by
        if spec.name == "positions":
            return torch.where(tensor >= 0, tensor + by, tensor)
        if "slots" not in spec.axes:
            return tensor
        place = spec.axes.index("slots")
        if spec.name.startswith("slots"):
            first = torch.arange(by)[:, None].expand(*tensor.shape[:2], by, 1)
            tensor = torch.where(tensor >= 0, tensor + by, tensor)
        else:
            first = tensor.index_select(place, torch.arange(by) % tensor.shape[place])
        return torch.cat([first, tensor], dim=place)

    return tuple(map(longer, program.inputs, program.example))


# --- compact ----------------------------------------------------------------------------------------------


class _Packed(torch.nn.Module):
    """``compact`` on the expanded cache, whose old part is then quantized."""

    def __init__(self, method: KIVI, compact: Program, states: Sequence[State]) -> None:
        super().__init__()
        self.method, self.compact, self.states = method, compact, states

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        old = dict(zip((state.name for state in self.states), tensors, strict=True))
        lengths = old["length"], old["recent_length"]
        given = [self._given(spec.name, old, lengths) for spec in self.compact.inputs]
        results = self.compact.module(*given)
        new = dict(zip((spec.name for spec in self.compact.inputs), results, strict=True))
        length = new["length"]
        packed = (length - self.method.residual).clamp(min=0) // self.method.group * self.method.group
        new["recent_length"] = length - packed
        for name in [name for name in new if name.startswith(KINDS)]:
            new |= self._pack(name, new[name], packed, old[f"{name}_recent"].shape[2])
        return tuple(new[state.name].clone() for state in self.states)

    def _given(self, name: str, old: dict[str, Tensor], lengths: tuple[Tensor, Tensor]) -> Tensor:
        if not name.startswith(KINDS):
            return old[name]
        return expanded(name.split("_")[0], *(old[part] for part in _names(name)), *lengths)

    def _pack(self, name: str, cache: Tensor, packed: Tensor, room: int) -> dict[str, Tensor]:
        place = packed[:, None] + torch.arange(room, device=cache.device)
        recent = ops.gather_tokens(cache, place.clamp(max=cache.shape[2] - 1), 2)
        return dict(
            zip(_names(name), _split(name.split("_")[0], cache, self.method.group, recent), strict=True)
        )


def _export_compact(method: KIVI, compact: Program, states: tuple[State, ...], ranges: Any) -> Program:
    """The program ``compact`` over the split cache."""
    known = dict(zip((spec.name for spec in compact.inputs), _longer(compact, method.group), strict=True))
    known["recent_length"] = known["length"] - method.group
    room = int(known["recent_length"].max()) + 4
    for name in [name for name in known if name.startswith(KINDS)]:
        recent = known[name][:, :, :1].repeat(1, 1, room, 1)
        parts = _split(name.split("_")[0], known[name], method.group, recent)
        known |= dict(zip(_names(name), parts, strict=True))
    example = tuple(known[state.name] for state in states)
    return state_program(_Packed(method, compact, states), states, example, ranges)
