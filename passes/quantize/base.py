"""What every weight quantization shares: which linears, the codes, the edit, and which of them get more bits.

A quantized weight stays part of the graph: ``linear(x, dequantize_weight(codes, scale, zero))``. So every other
pass and every comparison sees the program that the artifact will compute; the lowering turns the pair into one
kernel. A method is a subclass with :meth:`WeightQuantization.quantize`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tokopt.analysis.calibration import Moments, Site, collect
from tokopt.analysis.linears import Experts, Linear, Table, find_tables, matches
from tokopt.analysis.weights import Weights
from tokopt.errors import PassError, PassRefused
from tokopt.ir.bundle import Bundle
from tokopt.ir.graph import aten, dtype_name
from tokopt.ir.memory import trim
from tokopt.kernels import ops
from tokopt.pipeline.base import Context, Pass, PassResult, Refusal, on_entries
from tokopt.rewrite.edit import call, close_graph, open_graph, put_parameter
from tokopt.rewrite.scales import by_input

Known = dict[Node, Moments]
"""Moments of the tensors that linears read."""

MORE_BITS = 8
"""What the most sensitive layers get where the average allows it."""


class StoredWeight(Protocol):
    """What a linear has in place of its weight."""

    @property
    def nbytes(self) -> int:
        """Bytes of an artifact."""
        ...

    def dequantized(self) -> Tensor:
        """The weight [out, in] that it stands for."""
        ...

    def rows(self, part: slice) -> StoredWeight:
        """Some of its outputs."""
        ...


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [out, in] as ``(codes - zero) * scale``; see :mod:`tokopt.kernels.dequantize_weight.reference`.

    With an ``exponent`` a the weight is that value's signed power of 1 / a.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group: int
    exponent: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of an artifact: codes of 4 bits where all fit, else of 8, and a float32 scale per group."""
        packed = 2 if int(self.codes.max()) < 16 else 1
        return self.codes.numel() // packed + 4 * self.scale.numel()

    def dequantized(self) -> Tensor:
        """The weight [out, in] that it stands for."""
        return expanded(self.codes, self.scale, self.zero, self.group, self.exponent)

    def rows(self, part: slice) -> QuantizedWeight:
        """Some of its outputs."""
        return replace(self, codes=self.codes[part], scale=self.scale[part], zero=self.zero[part])


@dataclass(frozen=True)
class Grid:
    """Scale and zero point [out, groups] of every group of ``group`` inputs, and the largest code."""

    scale: Tensor
    zero: Tensor
    largest: int
    group: int

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes [out, in] of a weight, in float."""
        return self.rounded(weight.unflatten(1, (-1, self.group)), self.scale, self.zero).flatten(1)

    def rounded(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes of ``weight`` [out, groups, inputs] with a scale and zero point [out, groups]."""
        codes = (weight / torch.where(scale != 0, scale, 1.0)[..., None]).round() + zero[..., None]
        return codes.clamp(0, self.largest)

    def packed(self, codes: Tensor) -> QuantizedWeight:
        """Codes with this grid."""
        return QuantizedWeight(codes.to(torch.uint8), self.scale, self.zero.to(torch.uint8), self.group)


def round_to_nearest(weight: Tensor, bits: int, group: int, *, symmetric: bool) -> QuantizedWeight:
    """The nearest codes of a weight [out, in] on the grid of :func:`fit_grid`, in parts that stay in the cache."""
    parts: list[QuantizedWeight] = []
    for rows in in_parts(weight):
        grid = fit_grid(rows, bits, group, symmetric=symmetric)
        parts.append(grid.packed(grid.codes(rows)))
    return joined(parts)


def joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The weight whose rows are those of the parts; these are of one group."""
    codes, scale, zero = (torch.cat([getattr(part, name) for part in parts]) for name in _PARTS)
    return QuantizedWeight(codes, scale, zero, parts[0].group)


_PARTS = ("codes", "scale", "zero")

PART = 1 << 18
"""Numbers of a weight that are worked on at a time, where rows are independent."""


def in_parts(weight: Tensor) -> tuple[Tensor, ...]:
    """Consecutive rows of a matrix, of about :data:`PART` numbers together."""
    return weight.split(max(1, PART // max(1, weight.shape[1])))


def expanded(codes: Tensor, scale: Tensor, zero: Tensor, group: int, exponent: float) -> Tensor:
    """The weight [out, in] that a :class:`QuantizedWeight` of these parts stands for."""
    return signed_power(ops.dequantize_weight(codes, scale, zero, group), 1 / exponent)


def signed_power(x: Tensor, exponent: float) -> Tensor:
    """``sign(x) |x|^exponent``."""
    return x if exponent == 1 else x.sign() * x.abs() ** exponent


def fit_grid(weight: Tensor, bits: int, group: int, *, symmetric: bool, shrink: Tensor | float = 1.0) -> Grid:
    """The grid of round-to-nearest for a weight [out, in]: the range of every group, times ``shrink``.

    Asymmetric: ``scale = (max - min) / (2^bits - 1)``, ``zero = round(-min / scale)``, with 0 in the range.
    Symmetric: the entry of largest magnitude becomes the code ``-2^(bits-1)``, the zero point is ``2^(bits-1)``.
    """
    grouped = weight.unflatten(1, (-1, group))
    largest = 2**bits - 1
    if symmetric:
        far = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))[..., 0]
        scale = -far * shrink / 2 ** (bits - 1)
        return Grid(scale, torch.full_like(scale, 2 ** (bits - 1)), largest, group)
    high = grouped.amax(2).clamp(min=0) * shrink
    low = grouped.amin(2).clamp(max=0) * shrink
    scale = (high - low) / largest
    zero = (-low / torch.where(scale > 0, scale, 1.0)).round().clamp(0, largest)
    return Grid(scale, zero, largest, group)


def output_error(weight: Tensor, quantized: Tensor, moments: Moments | None) -> float:
    """Mean squared error of the layer's output over that output's mean square; of the weight without moments."""
    return _error(weight, lambda part: quantized[part], moments)


def stored_error(weight: Tensor, stored: StoredWeight, moments: Moments | None) -> float:
    """:func:`output_error` of a stored weight, of which a few rows at a time are expanded."""
    return _error(weight, lambda part: stored.rows(part).dequantized(), moments)


def _error(weight: Tensor, rows: Callable[[slice], Tensor], moments: Moments | None) -> float:
    def energy(matrix: Tensor) -> float:
        return float(((matrix if moments is None else matrix @ moments.gram) * matrix).sum())

    wrong, whole, start = list[float](), list[float](), 0
    for wanted in in_parts(weight):
        wrong.append(energy(wanted - rows(slice(start, start + len(wanted)))))
        whole.append(energy(wanted))
        start += len(wanted)
    return math.fsum(wrong) / max(math.fsum(whole), 1e-30)


@dataclass(frozen=True)
class Quantization(Pass):
    """Linears in fewer bits; ``only`` and ``skip`` choose them by patterns of their module path.

    A tied output projection is untied and quantized; convolutions, routers, whose outputs choose experts by rank, and
    embeddings where the method does not take them stay, and a note says so. Weights of other products (recurrent
    layers, and experts where the method does not take them) are refused.
    """

    takes_experts: ClassVar[bool] = False
    """Whether weights of experts are quantized, as one matrix of all of them."""

    takes_tables: ClassVar[bool] = False
    """Whether tables of embeddings are quantized; those that are unfit stay, as with other methods."""

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def needs_moments(self) -> bool:
        """Whether there is nothing to do without calibration inputs."""
        return False

    def uses_moments(self) -> bool:
        """Whether calibration inputs are read where there are any."""
        return self.needs_moments()

    @property
    def data_free(self) -> bool:
        """Without calibration inputs, weights alone decide."""
        return not self.uses_moments()

    def fault(self, weight: Tensor) -> str | None:
        """Why a weight [out, in] cannot be quantized."""
        if weight.dtype == torch.float32:
            return None
        return f"its weight is {dtype_name(weight.dtype)}; capture the model in float32"

    def prepare(self, module: GraphModule, linears: list[Linear], known: Known) -> None:
        """Rewrite the float graph and its moments, in place, before anything is quantized."""

    def bits_of(self, module: GraphModule, linears: list[Linear], known: Known) -> dict[Node, int]:
        """Bits per linear."""
        return {linear.node: MORE_BITS for linear in linears}

    def apply(self, module: GraphModule, linear: Linear, bits: int, moments: Moments | None) -> StoredWeight:
        """Quantize one linear of the graph, in place; return its weight.

        Raises PassRefused for a weight that only the attempt shows to be unfit; the graph is then as it was.
        """
        raise NotImplementedError

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Quantize the linears of every program that an entry of the schedule runs."""
        result = on_entries(bundle, lambda before, name: self._quantize(before, name, context))
        if result.matches or result.refusals:
            return result
        return PassResult(bundle, 0, (), (Refusal("model", "there is no linear to quantize"),))

    def _quantize(self, bundle: Bundle, name: str, context: Context) -> PassResult:
        """Quantize the linears of one program."""
        program = bundle.programs[name]
        module = open_graph(program)
        weights = Weights.of(module.graph)
        linears, refusals = self._sites(module, weights)
        if not linears:
            return PassResult(bundle, 0, weights.note, tuple(refusals))
        known = self._moments(Site(bundle, name, module), linears, context)
        self.prepare(module, [one for one in linears if not isinstance(one, Experts)], known)
        bits = self.bits_of(module, linears, known)
        sizes = [0, 0]
        errors: list[tuple[float, str]] = []
        for linear in linears:
            path, weight, moments = linear.path, linear.matrix(module), known.get(linear.input)
            try:
                quantized = self.apply(module, linear, bits[linear.node], moments)
            except PassRefused as reason:
                if not isinstance(linear, Table):
                    refusals.append(Refusal(path, str(reason)))
                continue
            sizes[0] += 4 * weight.numel()
            sizes[1] += quantized.nbytes
            errors.append((stored_error(weight, quantized, moments), path))
            trim()
        if not errors:
            return PassResult(bundle, 0, weights.note, tuple(refusals))
        quantized_bundle = bundle.with_program(name, close_graph(program, module))
        notes = (*_notes(errors, *sizes), *Weights.of(module.graph).note)
        return PassResult(quantized_bundle, len(errors), notes, tuple(refusals))

    def _sites(self, module: GraphModule, weights: Weights) -> tuple[list[Linear], list[Refusal]]:
        linears: list[Linear] = []
        experts = weights.experts if self.takes_experts else ()
        taken = {one.node for one in experts}
        unknown = [one for one in weights.unknown(self.only, self.skip) if one.node not in taken]
        refusals = [Refusal(one.path, one.reason) for one in unknown]
        for linear in (*weights.linears, *experts):
            if not matches(linear.path, self.only, self.skip):
                continue
            if fault := self.fault(linear.matrix(module)):
                refusals.append(Refusal(linear.path, fault))
            else:
                linears.append(linear)
        if self.takes_tables:  # last: by then nothing multiplies with a tied one
            tables = find_tables(module.graph)
            linears += [one for one in tables if matches(one.path, self.only, self.skip)]
        return linears, refusals

    def _moments(self, site: Site, linears: list[Linear], context: Context) -> Known:
        wanted = self.needs_moments() or context.calibration is not None
        if not (wanted and self.uses_moments()):
            return {}
        return collect(site, [linear.input for linear in linears], context.samples(self.name))


@dataclass(frozen=True)
class WeightQuantization(Quantization):
    """Linears with weights of ``bits`` bits, a scale per ``group`` inputs of an output.

    ``average`` above ``bits`` gives the layers whose output suffers most 8 bits, until the average over all weights
    reaches it; how much they suffer is measured on the calibration inputs, or else on the weights.

    Rules. The weight is a float32 parameter and its inputs a multiple of the group; other linears are refused. Experts
    are quantized, too; what a method learns of inputs, it learns of those of all experts together.
    """

    takes_experts: ClassVar[bool] = True

    bits: int = 4
    group: int = 32
    symmetric: bool = False
    average: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.bits <= MORE_BITS:
            raise PassError(f"{self.name}: bits={self.bits} must be 2 to {MORE_BITS}")
        if self.group < 16 or self.group & (self.group - 1):
            raise PassError(f"{self.name}: group={self.group} must be a power of two and at least 16")
        if self.average and not self.bits <= self.average <= MORE_BITS:
            raise PassError(f"{self.name}: average={self.average} must be {self.bits} to {MORE_BITS}")

    def quantize(self, weight: Tensor, bits: int, moments: Moments | None) -> QuantizedWeight:
        """Codes for a weight [out, in] float32 whose inputs have these moments."""
        raise NotImplementedError

    def uses_moments(self) -> bool:
        """Sensitivity is better measured on data."""
        return self.needs_moments() or self.average > self.bits

    def fault(self, weight: Tensor) -> str | None:
        """Groups have to be whole."""
        if weight.shape[1] % self.group:
            return f"its {weight.shape[1]} inputs are no multiple of group={self.group}"
        return super().fault(weight)

    def apply(
        self, module: GraphModule, linear: Linear, bits: int, moments: Moments | None
    ) -> QuantizedWeight:
        """Put codes in the place of the weight."""
        quantized = self.quantize(linear.matrix(module), bits, moments)
        replace_weight(module, linear, quantized)
        return quantized

    def bits_of(self, module: GraphModule, linears: list[Linear], known: Known) -> dict[Node, int]:
        """Those whose outputs gain most per byte get more until the average is reached.

        Linears that read one tensor get the same: engines compute them as one product.
        """
        chosen = {linear.node: self.bits for linear in linears}
        if self.average <= self.bits:
            return chosen
        weights = {linear.node: linear.matrix(module) for linear in linears}
        room = (self.average - self.bits) * sum(weight.numel() for weight in weights.values())

        def gain(linear: Linear) -> float:
            weight, moments = weights[linear.node], known.get(linear.input)
            few, more = (
                output_error(weight, self.quantize(weight, bits, moments).dequantized(), moments)
                for bits in (self.bits, MORE_BITS)
            )
            return few - more

        def size(group: list[Linear]) -> int:
            return sum(weights[linear.node].numel() for linear in group)

        gains = [(sum(map(gain, group)) / size(group), group) for group in by_input(linears)]
        for _, group in sorted(gains, key=lambda pair: pair[0], reverse=True):
            cost = (MORE_BITS - self.bits) * size(group)
            if cost <= room:
                chosen.update((linear.node, MORE_BITS) for linear in group)
                room -= cost
        return chosen


def _notes(errors: list[tuple[float, str]], before: int, after: int) -> tuple[str, ...]:
    worst = ", ".join(f"{path} {error:.2g}" for error, path in sorted(errors, reverse=True)[:3])
    return (
        f"weights of {before / 1e6:.1f} MB became {after / 1e6:.1f} MB",
        f"largest relative output error: {worst}; skip=[...] leaves layers as they are",
    )


def replace_weight(module: GraphModule, linear: Linear, quantized: QuantizedWeight) -> None:
    """Let a linear read its weight from codes."""
    parts = (quantized.codes, quantized.scale, quantized.zero)
    put_weight(module, linear, expanded, parts, quantized.group, quantized.exponent)


def put_weight(
    module: GraphModule,
    linear: Linear,
    expand: Callable[..., Tensor],
    parts: Sequence[Tensor],
    *options: float,
) -> None:
    """Let the weight [out, in] of a linear be ``expand(*parts, *options)``."""
    graph = module.graph
    operands = [put_parameter(module, linear.node, None, part) for part in parts]
    with graph.inserting_before(linear.node):
        weight = call(graph, expand, *operands, *options, like=linear.node)
        if isinstance(linear, Experts):
            shape = [*linear.weight.meta["val"].shape]
            weight = call(graph, aten.view.default, weight, shape, like=linear.node)
        elif linear.transposed:
            weight = call(graph, aten.t.default, weight, like=linear.node)
    linear.node.update_arg(linear.place, weight)
