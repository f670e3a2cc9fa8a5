"""Keys and values in 8 bits, with a scale per channel that calibration found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from tokopt.analysis.cache import CachedAttention, fused_attentions
from tokopt.analysis.calibration import Site, observe
from tokopt.analysis.rotary import find_rotaries
from tokopt.analysis.rotation import Rotary
from tokopt.errors import PassRefused
from tokopt.ir.bundle import Bundle
from tokopt.ir.format import State
from tokopt.ir.graph import sizes
from tokopt.ir.program import Program
from tokopt.ir.shapes import Shapes
from tokopt.kernels import ops
from tokopt.kernels.quantize_int8.reference import HIGH
from tokopt.pipeline.base import Context, Pass, PassResult, Refusal
from tokopt.rewrite.cache import ProgramEdit, compactor, language_program, state_program
from tokopt.rewrite.edit import after, call, open_graph, put_parameter, redirect

TINY = 1e-8
"""The smallest scale: a channel of zeros stays one."""


@dataclass(frozen=True)
class Int8KV(Pass):
    """8-bit cache: ``x ~ code * scale``, a scale per head and channel from the largest value in calibration texts.

    Channels of keys differ by orders of magnitude and keep their size from text to text (Hooper et al., KVQuant,
    arXiv 2401.18079), so a constant scale per channel does for all tokens and costs nothing at run time. Rotary
    embeddings turn pairs of channels into each other: what is measured of keys is the length of each pair, which no
    position changes, so texts may become longer than those of calibration. What is larger than anything seen there
    is clamped. A cache of float32 takes a quarter of its bytes, and so does what attention reads.

    Rules. It composes with an eviction before it, which moves the codes as they are; one that re-rotates keys would
    round them anew every time and is refused, and so are keys that are not float32.
    """

    name: ClassVar[str] = "int8_kv"

    def requires(self, bundle: Bundle) -> None:
        """Language models."""
        language_program(self.name, bundle)

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Turn every layer's cache into codes, in ``step`` and in ``compact``."""
        samples = context.samples(self.name)
        program = language_program(self.name, bundle)
        step = bundle.programs[program]
        module = open_graph(step)
        try:
            layers = fused_attentions(step, module, bundle.states)
            self._check(bundle, layers)
        except PassRefused as reason:
            return PassResult(bundle, 0, (), (Refusal(program, str(reason)),))
        peaks: dict[str, _Peak] = {}
        for layer, rotary in zip(layers, find_rotaries(step, module, layers), strict=True):
            peaks[layer.key_state] = _Peak.of(layer.keys, rotary)
            peaks[layer.value_state] = _Peak.of(layer.values, None)
        observe(Site(bundle, program, module), {peak.node: peak.add for peak in peaks.values()}, samples)
        scales = {name: peak.scale for name, peak in peaks.items()}
        edit = _IntegerCache(bundle, program, module, layers, scales)
        programs = {**bundle.programs, program: edit.run()}
        if (compact := compactor(bundle)) is not None:
            programs[compact] = _integer_compact(programs[compact], scales, edit.states)
        after = replace(bundle, programs=programs, states=tuple(edit.states.values()))
        return PassResult(after, len(layers), (_note(scales),))

    def _check(self, bundle: Bundle, layers: list[CachedAttention]) -> None:
        if any(state.kind == "shift" for state in bundle.states):
            raise PassRefused(
                "the eviction before it re-rotates keys, which would be rounded anew every time; leave out rerotate"
            )
        for layer in layers:
            for write in (layer.keys, layer.values):
                if (dtype := write.meta["val"].dtype) != torch.float32:
                    raise PassRefused(f"layer {layer.layer} keeps {dtype}; {self.name} takes float32")


def _note(scales: dict[str, Tensor]) -> str:
    numbers = sum(scale.numel() for scale in scales.values())
    return f"a token takes {numbers} bytes of keys and values, before {4 * numbers}"


@dataclass
class _Peak:
    """The largest that new keys or values [batch, heads, tokens, channels] become, per head and channel."""

    node: Node
    partners: list[int] | None
    largest: Tensor

    @classmethod
    def of(cls, write: Node, rotary: Rotary | PassRefused | None) -> _Peak:
        """Nothing seen yet of what a ``cache_write`` writes."""
        node = write.args[1]
        assert isinstance(node, Node)
        _, heads, _, channels = sizes(node)
        partners = list(rotary.partners) if isinstance(rotary, Rotary) else None
        return cls(node, partners, torch.zeros(heads, 1, channels))

    def add(self, x: Tensor) -> None:
        """Count further tokens."""
        size = x.abs()
        if self.partners is not None:
            alone = torch.tensor(self.partners) == torch.arange(x.shape[-1])
            size = torch.hypot(size, size[..., self.partners].masked_fill(alone, 0.0))
        self.largest = torch.maximum(self.largest, size.amax((0, 2))[:, None])

    @property
    def scale(self) -> Tensor:
        """The step between two codes [heads, 1, channels]."""
        return (self.largest / HIGH).clamp(min=TINY)


@dataclass
class _IntegerCache(ProgramEdit):
    """``step`` writes codes, and its attentions read them multiplied by their scales."""

    layers: list[CachedAttention]
    scales: dict[str, Tensor]

    def run(self) -> Program:
        for layer in self.layers:
            for name, write in ((layer.key_state, layer.keys), (layer.value_state, layer.values)):
                self._convert(name, layer, write)
        return self.finish()

    def _convert(self, name: str, layer: CachedAttention, write: Node) -> None:
        graph = self.module.graph
        codes = ops.quantize_int8(self.sample(name), self.scales[name])
        self.respell(name, codes, dtype="int8")
        scale = put_parameter(self.module, write, None, self.scales[name])
        with graph.inserting_before(write):
            codes = call(graph, ops.quantize_int8, write.args[1], scale, like=layer.node)
        write.update_arg(1, codes)
        Shapes.attached(self.module).renew(self.module, write)
        readers = [user for user in write.users if user.op != "output"]
        with after(write):
            whole = call(graph, ops.dequantize_int8, write, scale, like=layer.node)
        redirect(readers, write, whole)


def _integer_compact(compact: Program, scales: dict[str, Tensor], states: dict[str, State]) -> Program:
    """The program that compacts, over codes; what it only moves has the codes that it had."""

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        of_inputs = [scales.get(spec.state or "") for spec in compact.inputs]
        of_outputs = [scales.get(spec.state or "") for spec in compact.outputs]
        given = [
            tensor if scale is None else ops.dequantize_int8(tensor, scale)
            for tensor, scale in zip(tensors, of_inputs, strict=True)
        ]
        return tuple(
            result if scale is None else ops.quantize_int8(result, scale)
            for result, scale in zip(compact.module(*given), of_outputs, strict=True)
        )

    example = tuple(
        ops.quantize_int8(tensor, scales[spec.state]) if spec.state in scales else tensor
        for spec, tensor in zip(compact.inputs, compact.example, strict=True)
    )

    def insert(*nodes: Node) -> tuple[Node, ...]:
        return call(nodes[0].graph, run, *nodes, like=nodes[0])

    held = tuple(states[spec.state] for spec in compact.inputs if spec.state is not None)
    return state_program(insert, held, example, compact.ranges)
