"""Attention over a cache that is written in place, as one ``tokopt.cpu::CachedAttention``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from tokopt.ir.program import Program
from tokopt.kernels.cpu import DOMAIN
from tokopt.lower.onnx.cached import HEADS_INNER, CachedAttentions, Rotation, Site, packed, static
from tokopt.lower.onnx.expand import Body
from tokopt.lower.onnx.nodes import input_at
from tokopt.lower.onnx.rule import Unfit

OP = "CachedAttention"

INPUTS = (
    "query",
    "key",
    "value",
    "past_key",
    "past_value",
    "length",
    "mask",
    "cos",
    "sin",
    "key_scale",
    "value_scale",
)

ATTRIBUTES = {
    "heads": ir.AttributeType.INT,
    "key_heads": ir.AttributeType.INT,
    "scale": ir.AttributeType.FLOAT,
    "softcap": ir.AttributeType.FLOAT,
    "interleaved": ir.AttributeType.INT,
    "alike": ir.AttributeType.INT,
}

LOW, HIGH = -128, 127
"""The smallest and the largest code of a cache in 8 bits."""


class CachedAttention(CachedAttentions):
    """``Attention`` and the writes of the cache that it reads.

    Programs of a model that proposes tokens compute them ``alike``: what a token follows decides its bits, not how many
    others were proposed. So its text is the one that is written token by token.
    """

    name: ClassVar[str] = "attention and its cache as one op of tokopt's CPU kernels"

    def __init__(self, model: ir.Model, program: Program, *, alike: bool) -> None:
        super().__init__(program.aliases)
        self.model, self.alike = model, alike

    def check(self, site: Site) -> None:
        """The kernel takes a mask over slots, of all heads or of each."""
        if site.mask.shape is None or len(site.mask.shape) != 4:
            raise Unfit("its mask is not [batch, heads, tokens, slots]")
        if static(site.mask, 1) not in (1, site.key_heads, site.heads) or static(site.mask, 3) == 1:
            raise Unfit("its mask is not one of all heads, or of each")

    def node(
        self, graph: ir.Graph, site: Site, parts: Sequence[ir.Value], rotation: Rotation | None
    ) -> ir.Node:
        """The op, after its body is in the model."""
        given: dict[str, ir.Value | None] = dict(zip(INPUTS[:3], packed(parts), strict=True))
        for name, cache in (("key", site.keys), ("value", site.values)):
            given |= {f"past_{name}": input_at(cache.write, 0), f"{name}_scale": cache.scale}
        given |= {"length": site.length, "mask": site.mask}
        if rotation is not None:
            given |= {"cos": rotation.cos, "sin": rotation.sin}
        present = [name for name in INPUTS if given.get(name) is not None]
        body = cached_attention(present, self.model.opset_imports[""])
        self.model.functions.setdefault(body.identifier(), body)
        return ir.node(
            OP,
            [given.get(name) for name in INPUTS],
            attributes={
                "heads": site.heads,
                "key_heads": site.key_heads,
                "scale": site.scale,
                "softcap": site.softcap,
                "interleaved": rotation.interleaved if rotation is not None else 0,
                "alike": int(self.alike),
            },
            domain=DOMAIN,
            overload=body.overload,
            num_outputs=3,
        )


def cached_attention(given: Sequence[str], opset: int) -> ir.Function:
    """The body of the op with the inputs ``given``, in standard ops."""
    body = _Attention(given)
    outputs = body.run()
    kinds = {"packed": "key" not in given, "rotated": "cos" in given, "codes": "key_scale" in given}
    named = [name for name, found in kinds.items() if found]
    attributes = [ir.Attr(name, kind, None) for name, kind in ATTRIBUTES.items()]
    return ir.Function(DOMAIN, OP, "_".join(named), graph=body.graph(outputs, opset), attributes=attributes)


class _Attention(Body):
    """The nodes of the op."""

    def __init__(self, given: Sequence[str]) -> None:
        super().__init__(INPUTS)
        self.given = given
        self.channels = self.op("Shape", [self.inputs["past_key"]], start=3, end=4)
        self.heads, self.key_heads = (self._count(name) for name in ("heads", "key_heads"))

    def run(self) -> list[ir.Value]:
        """The result and both caches."""
        query, key, value = self._parts()
        query, key = (
            self._rotated(self._split(x, n)) for x, n in ((query, self.heads), (key, self.key_heads))
        )
        value = self._split(value, self.key_heads)
        caches = [self._written(name, new) for name, new in (("key", key), ("value", value))]
        held = [self._numbers(name, cache) for name, cache in zip(("key", "value"), caches, strict=True)]
        made = self.op(
            "Attention",
            [query, *held, self.inputs["mask"]],
            scale=ir.RefAttr("scale", "scale", ir.AttributeType.FLOAT),
            softcap=ir.RefAttr("softcap", "softcap", ir.AttributeType.FLOAT),
        )
        outer = self.op("Transpose", [made], perm=HEADS_INNER)
        width = self.op("Mul", [self.heads, self.channels])
        shape = self.op("Concat", [self.constant((0, 0), np.int64), width], axis=0)
        return [self.op("Reshape", [outer, shape]), *caches]

    def _count(self, name: str) -> ir.Value:
        """An attribute as int64 [1]."""
        number = self.op("Constant", [], value_int=ir.RefAttr("value_int", name, ir.AttributeType.INT))
        return self.op("Reshape", [number, self.constant((1,), np.int64)])

    def _parts(self) -> list[ir.Value]:
        if "key" in self.given:
            return [self.inputs[name] for name in INPUTS[:3]]
        widths = [self.op("Mul", [count, self.channels]) for count in (self.heads, self.key_heads)]
        sizes = self.op("Concat", [widths[0], widths[1], widths[1]], axis=0)
        return self.several("Split", [self.inputs["query"], sizes], 3, axis=-1)

    def _split(self, x: ir.Value, heads: ir.Value) -> ir.Value:
        """[batch, heads, tokens, channels]"""
        shape = self.op("Concat", [self.constant((0, 0), np.int64), heads, self.channels], axis=0)
        return self.op("Transpose", [self.op("Reshape", [x, shape])], perm=HEADS_INNER)

    def _rotated(self, x: ir.Value) -> ir.Value:
        if "cos" not in self.given:
            return x
        interleaved = ir.RefAttr("interleaved", "interleaved", ir.AttributeType.INT)
        return self.op(
            "RotaryEmbedding",
            [x, self.inputs["cos"], self.inputs["sin"]],
            interleaved=interleaved,
        )

    def _written(self, name: str, new: ir.Value) -> ir.Value:
        if f"{name}_scale" in self.given:
            rounded = self.op("Round", [self.op("Div", [new, self.inputs[f"{name}_scale"]])])
            ends = [self.constant(end, np.float32) for end in (LOW, HIGH)]
            new = self.op("Cast", [self.op("Clip", [rounded, *ends])], to=ir.DataType.INT8)
        return self.op("TensorScatter", [self.inputs[f"past_{name}"], new, self.inputs["length"]], axis=-2)

    def _numbers(self, name: str, cache: ir.Value) -> ir.Value:
        if f"{name}_scale" not in self.given:
            return cache
        wide = self.op("Cast", [cache], to=ir.DataType.FLOAT)
        return self.op("Mul", [wide, self.inputs[f"{name}_scale"]])
