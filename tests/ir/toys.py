"""Toy bundles of three captured programs and two links, as no front end makes them yet.

``see`` encodes an image into features [batch, tokens, hidden]. In :func:`chained`, ``hear`` mixes them with sounds into
a context [batch, hidden], which ``step`` reads in every call. In :func:`split`, ``read`` reads the prompt with the
features, and ``go`` decodes with the image's context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from tests.zoo.blocks import FunctionalAttention, PatchEmbedding, PreNormBlock
from tests.zoo.decoders import CONTEXT, VOCABULARY, HandRotary
from tests.zoo.entries import randomize
from tokopt.frontend.normalize import normalize
from tokopt.ir.bundle import Bundle
from tokopt.ir.export import export_flat, output_specs
from tokopt.ir.format import Entry, Generation, Link, Occupancy, Port, Schedule, State
from tokopt.ir.graph import dtype_name
from tokopt.ir.program import AxisRange, Program, TensorSpec
from tokopt.kernels import ops

HIDDEN, HEADS, INNER, SIZE, PATCH = 48, 3, 80, 16, 4
FEATURES = 1 + (SIZE // PATCH) ** 2
BATCH, TOKENS, ROWS, SLOTS, HELD = 2, 5, 3, 11, 4

SCHEDULE = Schedule((Entry("see", "encode"), Entry("hear", "encode")))


class See(nn.Module):
    """Features of an image and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = PatchEmbedding(SIZE, PATCH, HIDDEN)
        self.blocks = nn.ModuleList(_blocks(2))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(*tensors)
        for block in self.blocks:
            x = block(x)
        return x, x.mean(1)


class Hear(nn.Module):
    """What sounds [batch, hidden] say of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(HIDDEN, HIDDEN)
        self.blocks = nn.ModuleList(_blocks(1))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        features, sounds = tensors
        x = features + self.embed(sounds)[:, None]
        for block in self.blocks:
            x = block(x)
        return (x.mean(1),)


def _blocks(count: int) -> list[PreNormBlock]:
    return [PreNormBlock(HIDDEN, INNER, FunctionalAttention(HIDDEN, HEADS)) for _ in range(count)]


class _Cache:
    """A preallocated cache, the tensors of which are inputs."""

    def __init__(self, length: Tensor, tensors: Sequence[Tensor]) -> None:
        self.length, self.tensors = length, list(tensors)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        for at, new in ((2 * layer, keys), (2 * layer + 1, values)):
            self.tensors[at] = ops.cache_write(self.tensors[at], new, self.length)
        return self.tensors[2 * layer], self.tensors[2 * layer + 1]


class Step(nn.Module):
    """A rotary decoder whose embeddings carry a context [batch, hidden], or the mean of features."""

    def __init__(self, decoder: HandRotary) -> None:
        super().__init__()
        self.decoder, self.glance = decoder, nn.Linear(HIDDEN, HIDDEN)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        tokens, positions, mask, rows, context, length, slots, *tensors_of_cache = tensors
        cache, decoder = _Cache(length, tensors_of_cache), self.decoder
        held = ops.cache_write(slots, positions[:, None, :, None], length)
        seen = ops.cache_mask(held, positions, mask, length, 0)
        real = positions.clamp(min=0)
        context = context.mean(1) if context.ndim == 3 else context
        x = decoder.embed(tokens) + self.glance(context)[:, None]
        for layer, (qkv, out) in enumerate(zip(decoder.qkv, decoder.out, strict=True)):
            parts = qkv(decoder.norm[layer](x)).unflatten(-1, (3, decoder.heads, -1))
            q, k, v = parts.permute(2, 0, 3, 1, 4)
            q, k = decoder.turned(q, real), decoder.turned(k, real)
            y = nn.functional.scaled_dot_product_attention(q, *cache.update(layer, k, v), attn_mask=seen)
            x = x + out(y.transpose(1, 2).flatten(2))
        logits = decoder.head(decoder.norm[-1](x)[:, rows])
        return (logits, length + tokens.shape[1], held, *cache.tensors)


def _states() -> tuple[State, ...]:
    used, axes = Occupancy("length"), ("batch", HEADS, "slots", HIDDEN // HEADS)
    caches = [
        State(f"{kind}_{layer}", kind, "float32", axes, layer=layer, occupancy=used)
        for layer in range(2)
        for kind in ("key", "value")
    ]
    return (
        State("length", "length", "int64", ("batch",)),
        State("slots", "position", "int64", ("batch", 1, "slots", 1), initial=-1, occupancy=used),
        *caches,
    )


def program(
    module: nn.Module,
    inputs: Sequence[tuple[TensorSpec, Tensor]],
    outputs: Sequence[TensorSpec],
    aliases: dict[str, str] | None = None,
) -> Program:
    """The program of a module; axes of outputs are found."""
    specs, example = tuple(spec for spec, _ in inputs), tuple(tensor for _, tensor in inputs)
    ranges = {axis: AxisRange() for spec in specs for axis in spec.axes if isinstance(axis, str)}
    graph, found = export_flat(module, example, specs, ranges)
    made = Program(graph, specs, tuple(outputs), found, example, aliases or {})
    return normalize(replace(made, outputs=output_specs(made)))


def _given(name: str, tensor: Tensor, role: str, *axes: str | int) -> tuple[TensorSpec, Tensor]:
    return TensorSpec(name, dtype_name(tensor.dtype), axes, role), tensor


def _example(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _see(outputs: tuple[str, str]) -> Program:
    images = _given("images", _example(BATCH, 3, SIZE, SIZE), "input", "batch", 3, SIZE, SIZE)
    roles = zip(("features", "summary"), outputs, strict=True)
    return program(
        randomize(See(), 1), [images], [TensorSpec(name, "float32", (), role) for name, role in roles]
    )


def _hear() -> Program:
    features = _given("features", _example(BATCH, FEATURES, HIDDEN), "link", "batch", FEATURES, HIDDEN)
    sounds = _given("sounds", _example(BATCH, HIDDEN), "input", "batch", HIDDEN)
    return program(randomize(Hear(), 2), [features, sounds], [TensorSpec("context", "float32", (), "link")])


def _step(context: tuple[TensorSpec, Tensor]) -> Program:
    torch.manual_seed(3)
    step = Step(HandRotary(HIDDEN, HEADS)).eval().requires_grad_(False)
    slots = torch.full((BATCH, 1, SLOTS, 1), -1)
    slots[:, 0, :HELD, 0] = torch.arange(HELD)
    positions = (HELD + torch.arange(TOKENS)).repeat(BATCH, 1)
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().repeat(BATCH, 1, 1)
    values = {"length": torch.full((BATCH,), HELD), "slots": slots}
    cache = _example(BATCH, HEADS, SLOTS, HIDDEN // HEADS)
    states = [
        (TensorSpec(s.name, s.dtype, s.axes, "state", s.name), values.get(s.name, cache + i))
        for i, s in enumerate(_states())
    ]
    tokens = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS)
    inputs = [
        _given("tokens", tokens, "tokens", "batch", "tokens"),
        _given("positions", positions, "positions", "batch", "tokens"),
        _given("mask", causal, "mask", "batch", "tokens", "tokens"),
        _given("rows", torch.tensor([-1, 0, -1]), "rows", "rows"),
        context,
        *states,
    ]
    outputs = [TensorSpec("logits", "float32", (), "logits")]
    outputs += [TensorSpec(f"next_{s.name}", s.dtype, (), "state", s.name) for s in _states()]
    return program(step, inputs, outputs, {f"next_{s.name}": s.name for s in _states() if s.occupancy})


def _link(source: str, output: str, target: str, given: str, when: str) -> Link:
    return Link(Port(source, output), Port(target, given), when)


@cache
def chained() -> Bundle:
    """An encoder, an encoder of what it gives, and a program that reads prompts and decodes."""
    context = _given("context", _example(BATCH, HIDDEN), "link", "batch", HIDDEN)
    return Bundle(
        {"see": _see(("link", "output")), "hear": _hear(), "step": _step(context)},
        Schedule(
            (*SCHEDULE.entries, Entry("step", "prefill", "tokens"), Entry("step", "decode", "tokens")),
        ),
        _states(),
        (
            _link("see", "features", "hear", "features", "once"),
            _link("hear", "context", "step", "context", "call"),
        ),
        generation=Generation(CONTEXT, VOCABULARY),
    )


@cache
def split() -> Bundle:
    """An encoder, a program that reads prompts with all it gives, and one that decodes with their mean."""
    features = _given("features", _example(BATCH, FEATURES, HIDDEN), "link", "batch", FEATURES, HIDDEN)
    summary = _given("summary", _example(BATCH, HIDDEN), "link", "batch", HIDDEN)
    return Bundle(
        {"see": _see(("link", "link")), "read": _step(features), "go": _step(summary)},
        Schedule(
            (Entry("see", "encode"), Entry("read", "prefill", "tokens"), Entry("go", "decode", "tokens")),
        ),
        _states(),
        (
            _link("see", "features", "read", "features", "once"),
            _link("see", "summary", "go", "summary", "call"),
        ),
        generation=Generation(CONTEXT, VOCABULARY),
    )


TOYS: dict[str, Callable[[], Bundle]] = {"chained": chained, "split": split}
