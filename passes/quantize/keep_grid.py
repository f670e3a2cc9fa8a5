"""Weights that come from a quantized file keep the file's own grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import avg_pool1d
from torch.nn.functional import linear as linear_product

from tokopt.analysis.calibration import Moments
from tokopt.analysis.linears import Linear, Table
from tokopt.errors import PassRefused
from tokopt.ir.graph import aten, is_call
from tokopt.kernels import ops
from tokopt.passes.quantize.base import Quantization, QuantizedWeight, in_parts, joined, replace_weight
from tokopt.rewrite.edit import after, call, put_parameter, redirect

CLOSE = 1e-6
"""How far a grid may be from a weight, relative to the largest of its block: a few roundings of float32."""


@dataclass(frozen=True)
class BlockGrid:
    """``(codes - zero) * scale``, or with ``minimum`` [out, blocks] ``codes * scale + minimum``."""

    weight: QuantizedWeight
    minimum: Tensor | None

    @property
    def offset(self) -> Tensor | None:
        """What a product with ``(codes - zero) * scale`` leaves out [out, blocks]; None where that is nothing."""
        weight = self.weight
        return None if self.minimum is None else self.minimum + weight.zero * weight.scale

    @property
    def nbytes(self) -> int:
        """Bytes of an artifact: the codes, and a float32 minimum per block."""
        return self.weight.nbytes + (0 if self.minimum is None else 4 * self.minimum.numel())

    def dequantized(self) -> Tensor:
        """The weight [out, in]."""
        weight, minimum = self.weight, self.minimum
        if minimum is None:
            return weight.dequantized()
        steps = ops.dequantize_weight(weight.codes, weight.scale, torch.zeros_like(weight.zero), weight.group)
        steps.unflatten(1, (-1, weight.group)).add_(minimum[..., None])  # in place: it may be large
        return steps

    def rows(self, part: slice) -> BlockGrid:
        """Some of its outputs."""
        return BlockGrid(self.weight.rows(part), None if self.minimum is None else self.minimum[part])


@dataclass(frozen=True)
class KeepGrid(Quantization):
    """Carries over the grid that weights already lie on, those of models that were expanded from GGUF files.

    Q4_0, Q4_1, Q4_K, Q5_0, Q6_K and Q8_0 are known, and the file is not needed. In every block of 32 inputs (16 for
    Q6_K) the spacing is found from the weights themselves: the range over the number of steps in it, rounded to
    float16 where the file's scale was. Where a minimum comes with the scale, ``w = d q + m``, the product is that of
    ``d (q - 8)``, plus the sums of x over the blocks times ``m + 8 d``: exact, and engines keep their fast kernels,
    which know no fractional zero points.

    The program is the one before up to rounding. It counts as approximate since engines multiply such weights with
    activations of 8 bits.

    Embeddings whose table lies on a grid are read from its codes, too: rows are gathered and then expanded.

    Rules. A linear whose weight is not reproduced to 1e-6 of each block's largest entry is refused. Such a table of
    embeddings stays as it is, and so does one that something multiplies with in float.
    """

    takes_tables: ClassVar[bool] = True

    name: ClassVar[str] = "keep_grid"

    def apply(self, module: GraphModule, linear: Linear, bits: int, moments: Moments | None) -> BlockGrid:
        """Codes in the place of the weight, and the offset's product beside it."""
        if isinstance(linear, Table) and not all(
            is_call(user, aten.embedding) for user in linear.weight.users
        ):
            raise PassRefused("its table is multiplied in float, too")
        grid = find_grid(linear.matrix(module))
        if grid is None:
            raise PassRefused("its weights lie on no grid of 4 or 8 bits in blocks of 16 or 32")
        if isinstance(linear, Table):
            put_table(module, linear, grid)
            return grid
        replace_weight(module, linear, grid.weight)
        offset = grid.offset
        if offset is not None:
            node = linear.node
            group = grid.weight.group
            table = put_parameter(module, node, None, group * offset)
            users = list(node.users)
            with after(node):
                whole = call(module.graph, add_offset, node, linear.input, table, group, like=node)
            redirect(users, node, whole)
        return grid


def put_table(module: GraphModule, table: Table, grid: BlockGrid) -> None:
    """Let embeddings read the rows of their table from codes."""
    weight, before, readers = grid.weight, table.weight, list(table.weight.users)
    parts = [weight.codes, weight.scale, weight.zero]
    if grid.minimum is not None:
        parts[2:] = [torch.zeros_like(weight.zero), grid.minimum[..., None]]
    operands = [put_parameter(module, table.node, None, part) for part in parts]
    expand = ops.dequantize_weight if grid.minimum is None else above_minimum
    with module.graph.inserting_before(table.node):
        made = call(module.graph, expand, *operands, weight.group, like=table.node)
    redirect(readers, before, made)


def above_minimum(codes: Tensor, scale: Tensor, zero: Tensor, minimum: Tensor, group: int) -> Tensor:
    """The weight [out, in] of codes, of which 0 stands for ``minimum`` [out, blocks, 1]; ``zero`` is 0."""
    steps = ops.dequantize_weight(codes, scale, zero, group)
    return (steps.unflatten(1, (-1, group)) + minimum).flatten(1)


def add_offset(product: Tensor, x: Tensor, offset: Tensor, group: int) -> Tensor:
    """The product, plus the means of x over blocks of ``group`` inputs times ``offset`` [out, blocks].

    A mean is one pooling without a table to read; dividing by a power of two, it is as exact as the sum.
    """
    means = (
        avg_pool1d(x.flatten(0, -2), group).unflatten(0, x.shape[:-1]) if x.ndim > 3 else avg_pool1d(x, group)
    )
    return product + linear_product(means, offset)


def find_grid(weight: Tensor) -> BlockGrid | None:
    """The grid of a weight [out, in], of 4 bits if there is one, else of 8; None where there is none."""
    for read in (_four_bits, _eight_bits(32, 127), _eight_bits(16, 32)):
        if (grid := _grid_of(weight, read)) is not None:
            return grid
    return None


_Blocks = tuple[QuantizedWeight, Tensor]
"""Codes, and what the code 0 stands for [out, blocks]."""


def _grid_of(weight: Tensor, read: Callable[[Tensor], _Blocks | None]) -> BlockGrid | None:
    """What ``read`` finds in all rows of a weight."""
    found: list[_Blocks] = []
    for rows in in_parts(weight):
        if (blocks := read(rows)) is None:
            return None
        found.append(blocks)
    parts, minima = zip(*found, strict=True)
    grid = BlockGrid(joined(parts), torch.cat(minima))
    return grid if bool(cast(Tensor, grid.offset).any()) else BlockGrid(grid.weight, None)


def _four_bits(weight: Tensor) -> _Blocks | None:
    """Blocks of 32 with up to 16 equidistant values."""
    if weight.shape[1] % 32:
        return None
    blocks = weight.unflatten(1, (-1, 32))
    low = blocks.amin(2)
    found = _spacing(blocks, low, blocks.amax(2) - low, 15)
    if found is None:
        return None
    scale, codes = found
    zero = torch.full_like(codes[..., 0], 8).byte()
    return QuantizedWeight(codes.flatten(1).to(torch.uint8), scale, zero, 32), low


def _eight_bits(group: int, steps: int) -> Callable[[Tensor], _Blocks | None]:
    """Blocks of ``group`` with values at up to ``steps`` equal steps on either side of 0."""

    def read(weight: Tensor) -> _Blocks | None:
        if weight.shape[1] % group:
            return None
        blocks = weight.unflatten(1, (-1, group))
        found = _spacing(blocks, torch.zeros_like(blocks[..., 0]), blocks.abs().amax(2), steps)
        if found is None:
            return None
        scale, codes = found
        codes = (codes + 128).flatten(1).to(torch.uint8)
        packed = QuantizedWeight(codes, scale, torch.full_like(scale, 128).byte(), group)
        return packed, -128 * scale

    return read


def _spacing(blocks: Tensor, low: Tensor, span: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """The largest spacing for which ``low + k * spacing`` meets every entry, and k; ``span`` is at most ``most`` steps.

    ``blocks`` is [out, blocks, inputs], ``low`` and ``span`` [out, blocks].
    """
    allowed = CLOSE * blocks.abs().amax(2, keepdim=True)
    scale, codes = torch.zeros_like(span), torch.zeros_like(blocks)
    open_ = torch.ones_like(span, dtype=torch.bool)
    for steps in range(most, 0, -1):
        part = blocks[open_]
        spacing = _as_stored(span[open_] / steps)[:, None]
        start = low[open_][:, None]
        k = ((part - start) / torch.where(spacing > 0, spacing, 1.0)).round()
        fits = ((k * spacing + start - part).abs() <= allowed[open_]).all(1)
        places = open_.nonzero()[fits].unbind(1)
        scale[places], codes[places] = spacing[fits, 0], k[fits]
        open_[places] = False
        if not open_.any():
            return scale, codes
    return None


def _as_stored(scale: Tensor) -> Tensor:
    """A scale as the float16 that it was, where it is one."""
    half = scale.half().float()
    return torch.where((half - scale).abs() <= CLOSE * scale.abs(), half, scale)
