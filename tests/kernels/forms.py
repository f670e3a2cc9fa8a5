"""The table of op cases, random inputs for them, and every form of each op behind one call.

A new op joins the shared tests by one line in :data:`CASES` and one function in ``naive.py``.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from tests.kernels import naive
from tests.kernels.host import host_form
from tokopt.kernels import attach_functions, ops
from tokopt.lower.onnx.translate import translate

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)  # compared and cached by identity
class Case:
    """One op with its static arguments.

    ``most`` is the largest r, given the number of unprotected tokens; ``inputs`` replaces random inputs.
    """

    op: str
    static: Mapping[str, object] = field(default_factory=dict)
    most: Callable[[int], int] = lambda free: free // 2
    inputs: Mapping[str, Callable[[dict], Tensor]] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.op, *(f"{name}={value}" for name, value in self.static.items())])

    @property
    def arguments(self) -> list[str]:
        """The op's argument names in order, from its schema."""
        return [argument.name for argument in getattr(ops, self.op).default._schema.arguments]

    @property
    def prefix(self) -> int:
        prefix = self.static.get("prefix", 1)
        assert isinstance(prefix, int)
        return prefix


def side(*shape: str | int, dtype: torch.dtype = torch.float32) -> dict[str, Callable[[dict], Tensor]]:
    """A per-token side tensor whose shape is given by axis names, as the ``x`` of gather_tokens."""

    def make(world: dict) -> Tensor:
        named: dict[str, int] = {"batch": world["size"].shape[0], "tokens": world["size"].shape[1]}
        sizes = [named[axis] if isinstance(axis, str) else axis for axis in shape]
        return (100 * torch.rand(*sizes, generator=world["generator"])).to(dtype)

    return {"x": make}


def cache_world(heads: int) -> dict[str, Callable[[dict], Tensor]]:
    """A cache of as many slots as there are tokens, and r + 1 new tokens; slots are kept for ``heads``."""

    def sizes(world: dict) -> tuple[int, int, int]:
        return *world["size"].shape, world["r"] + 1

    def floats(world: dict, count: int) -> Tensor:
        return torch.randn(sizes(world)[0], 3, count, 4, generator=world["generator"])

    def integers(world: dict, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=world["generator"])

    def held(world: dict) -> Tensor:
        batch, capacity, _ = sizes(world)
        return integers(world, -1, 9, batch, heads, capacity, 1)

    return {
        "cache": lambda world: floats(world, sizes(world)[1]),
        "new": lambda world: floats(world, sizes(world)[2]),
        "length": lambda world: integers(world, 0, sizes(world)[1] - world["r"], sizes(world)[0]),
        "path": lambda world: integers(world, 0, sizes(world)[2], sizes(world)[0], sizes(world)[2]),
        "slots": held,
        "positions": lambda world: integers(world, -1, 12, sizes(world)[0], sizes(world)[2]),
        "own": lambda world: integers(world, 0, 2, sizes(world)[0], sizes(world)[2], sizes(world)[2]).bool(),
        "score": lambda world: integers(world, -3, 4, sizes(world)[0], heads, sizes(world)[1]).float(),
        "used": lambda world: integers(world, 0, 4, *sizes(world)[:2]) > 0,
        "budget": lambda world: integers(world, 0, sizes(world)[1] + 2, sizes(world)[0]),
    }


def attention_world(mask_heads: int) -> dict[str, Callable[[dict], Tensor]]:
    """r + 1 queries of four heads, and as many slots as there are tokens of two; every query sees one at least."""

    def floats(heads: int, own: bool) -> Callable[[dict], Tensor]:
        def make(world: dict) -> Tensor:
            batch, slots = world["size"].shape
            shape = (batch, heads, world["r"] + 1 if own else slots, world["metric"].shape[2])
            return torch.randn(shape, generator=world["generator"])

        return make

    def mask(world: dict) -> Tensor:
        batch, slots = world["size"].shape
        shape = (batch, mask_heads, world["r"] + 1, slots)
        return (torch.rand(shape, generator=world["generator"]) < 0.5) | torch.eye(
            *shape[2:], dtype=torch.bool
        )

    def positions(world: dict) -> Tensor:
        shape = (world["size"].shape[0], world["r"] + 1)
        return torch.randint(-1, 3, shape, generator=world["generator"])

    return {"query": floats(4, True), "key": floats(2, False), "mask": mask, "positions": positions}


def packed_world(group: int) -> dict[str, Callable[[dict], Tensor]]:
    """Keys of as many slots as there are tokens, and codes with the scales of groups of ``group`` slots."""

    def floats(channels: int) -> Callable[[dict], Tensor]:
        def make(world: dict) -> Tensor:
            batch, slots = world["size"].shape
            return torch.randn(batch, 2, slots, channels, generator=world["generator"])

        return make

    def codes(world: dict) -> Tensor:
        return (floats(6)(world) * 50 + 128).clamp(0, 255).to(torch.uint8)

    return {"x": floats(6), "codes": codes, "scale": floats(6 // group), "zero": floats(6 // group)}


def int8_world() -> dict[str, Callable[[dict], Tensor]]:
    """Keys of as many slots as there are tokens, codes of them, and a scale per head and channel."""

    def floats(world: dict, *shape: int) -> Tensor:
        return torch.randn(shape, generator=world["generator"])

    def shape(world: dict) -> tuple[int, ...]:
        batch, slots = world["size"].shape
        return batch, 2, slots, 6

    return {
        "x": lambda world: floats(world, *shape(world)),
        "codes": lambda world: (floats(world, *shape(world)) * 50).clamp(-128, 127).to(torch.int8),
        "scale": lambda world: floats(world, 2, 1, 6).abs() / 100 + 1e-3,  # some are small enough to clamp
    }


def weight_world(group: int) -> dict[str, Callable[[dict], Tensor]]:
    """Codes of a weight with as many inputs as tokens fit into groups, and their scales and zero points."""

    def sizes(world: dict) -> tuple[int, int]:
        return world["size"].shape[0] + 1, world["size"].shape[1]

    def codes(world: dict) -> Tensor:
        outputs, groups = sizes(world)
        return torch.randint(0, 256, (outputs, groups * group), generator=world["generator"]).byte()

    return {
        "codes": codes,
        "scale": lambda world: torch.randn(sizes(world), generator=world["generator"]),
        "zero": lambda world: torch.randint(0, 256, sizes(world), generator=world["generator"]).byte(),
    }


def float8_world() -> dict[str, Callable[[dict], Tensor]]:
    """Bytes of a weight in 8-bit floats, none of them NaN, and a scale per output."""

    def codes(world: dict) -> Tensor:
        numbers = torch.randint(0, 127, tuple(world["size"].shape), generator=world["generator"])
        return (numbers + 128 * torch.randint_like(numbers, 2)).byte()

    return {
        "codes": codes,
        "scale": lambda world: torch.randn(world["size"].shape[0], 1, generator=world["generator"]),
    }


def text_world() -> dict[str, Callable[[dict], Tensor]]:
    """Texts of three tokens, which repeat themselves, as long as there are tokens; a row may have none."""

    def text(world: dict) -> Tensor:
        return torch.randint(3, tuple(world["size"].shape), generator=world["generator"]).int()

    def end(world: dict) -> Tensor:
        batch, tokens = world["size"].shape
        return torch.randint(-1, tokens, (batch,), generator=world["generator"])

    return {"text": text, "end": end}


def sampling_world() -> dict[str, Callable[[dict], Tensor]]:
    """Two rows of logits over as many tokens as the world has, options of every kind, and random numbers."""

    def batch(world: dict) -> int:
        return world["size"].shape[0]

    def chosen(world: dict, *values: float) -> Tensor:
        index = torch.randint(len(values), (batch(world),), generator=world["generator"])
        return torch.tensor(values)[index]

    def rows(world: dict) -> Tensor:
        return torch.randn(batch(world), 2, world["size"].shape[1], generator=world["generator"])

    def words(world: dict, most: int) -> Tensor:
        return torch.randint(most, (batch(world),), generator=world["generator"])

    return {
        "logits": lambda world: 3 * rows(world),
        "temperature": lambda world: chosen(world, 0.0, 0.7, 1.0),
        "top_k": lambda world: words(world, 4),
        "top_p": lambda world: chosen(world, 0.3, 0.9, 1.0),
        "min_p": lambda world: chosen(world, 0.0, 0.2, 1.0),
        "probabilities": lambda world: rows(world).clamp_min(0),
        "uniform": lambda world: torch.rand(batch(world), 2, generator=world["generator"]),
        "seed": lambda world: words(world, 2**40),
        "stream": lambda world: words(world, 2**32),
        "counter": lambda world: words(world, 2**33),
    }


def expert_world(experts: int, *, shared: bool) -> dict[str, Callable[[dict], Tensor]]:
    """As many tokens as the world has choose as many experts as it has rows, some of which are none."""

    def floats(world: dict, *shape: int) -> Tensor:
        return torch.randn(shape, generator=world["generator"])

    def chosen(world: dict) -> Tensor:
        k, tokens = world["size"].shape
        return torch.randint(-1, experts + 1, (tokens, k), generator=world["generator"])

    def x(world: dict) -> Tensor:
        k, tokens = world["size"].shape
        return floats(world, tokens, 1 if shared else k, 5)

    return {"x": x, "chosen": chosen, "weight": lambda world: floats(world, experts, 4, 5)}


CASES = (
    Case("attention_mass", {"scale": 0.5}, inputs=attention_world(1), most=lambda free: free - 1),
    Case("attention_mass", {"scale": 2.0}, inputs=attention_world(4), most=lambda free: free - 1),
    Case("bipartite_match", {"prefix": 0}),
    Case("bipartite_match", {"prefix": 1}),
    Case("bipartite_match", {"prefix": 5}),
    Case("energy_bipartite_match", {"prefix": 0, "margin": -0.25}),
    Case("energy_bipartite_match", {"prefix": 1, "margin": 0.5}),
    Case("energy_match", {"prefix": 0, "margin": 0.5}),
    Case("energy_match", {"prefix": 1, "margin": -0.25}),
    Case("farthest_point", {"prefix": 0, "method": "divprune"}, most=lambda free: free - 1),
    Case("farthest_point", {"prefix": 1, "method": "kcenter"}, most=lambda free: free - 1),
    Case("top_tokens", {"prefix": 0}, most=lambda free: free),
    Case("top_tokens", {"prefix": 1}, most=lambda free: free),
    Case("nearest_kept", {"prefix": 1}),
    Case("merge_tokens"),
    Case("source_map"),
    Case("log_size"),
    Case("cache_write", inputs=cache_world(1), most=lambda free: free - 1),
    Case("move_entries", inputs=cache_world(1), most=lambda free: free - 1),
    Case("cache_mask", {"window": 0}, inputs=cache_world(1), most=lambda free: free - 1),
    Case("cache_mask", {"window": 4}, inputs=cache_world(1), most=lambda free: free - 1),
    Case("cache_mask", {"window": 4}, inputs=cache_world(2), most=lambda free: free - 1),
    Case("keep_slots", {"sinks": 0, "recent": 0}, inputs=cache_world(2)),
    Case("keep_slots", {"sinks": 2, "recent": 3}, inputs=cache_world(2)),
    Case("quantize_keys", {"group": 2}, inputs=packed_world(2)),
    Case("quantize_keys", {"group": 6}, inputs=packed_world(6)),
    Case("dequantize_keys", inputs=packed_world(2)),
    Case("dequantize_keys", inputs=packed_world(6)),
    Case("quantize_int8", inputs=int8_world()),
    Case("dequantize_int8", inputs=int8_world()),
    Case("dequantize_weight", {"group": 4}, inputs=weight_world(4)),
    Case("dequantize_weight", {"group": 1}, inputs=weight_world(1)),
    Case("expert_linear", inputs=expert_world(3, shared=False)),
    Case("expert_linear", inputs=expert_world(64, shared=True)),
    Case("fake_quantize", {"scale": 0.25, "zero": 0}),
    Case("fake_quantize", {"scale": 0.0078125, "zero": -128}),
    Case("fake_float8", {"scale": 0.25}),
    Case("fake_float8", {"scale": 0.0009765625}),
    Case("dequantize_float8", inputs=float8_world()),
    Case("draw", inputs=sampling_world()),
    Case("draw_tokens", inputs=sampling_world()),
    Case("likeliest", {"count": 1}, inputs=sampling_world()),
    Case("likeliest", {"count": 3}, inputs=sampling_world()),
    Case("truncated_softmax", inputs=sampling_world()),
    Case("latest_repeat", inputs=text_world()),
    Case("uniforms", {"count": 5}, inputs=sampling_world()),
    Case("gather_tokens", {"dim": 1}),
    Case("gather_tokens", {"dim": 1}, inputs=side(1, "tokens", 4)),
    Case("gather_tokens", {"dim": 2}, inputs=side(1, 3, "tokens", 4, dtype=torch.int64)),
    Case("gather_tokens", {"dim": 3}, inputs=side("batch", 2, 3, "tokens", dtype=torch.bool)),
)


def world(
    case: Case, batch: int, tokens: int, r: int, seed: int, padding: int = 0, channels: int = 8
) -> dict:
    """Random arguments for ``case``, with ``padding`` tokens of size 0 at random places of each row."""
    generator = torch.Generator().manual_seed(seed)

    def shuffled(count: int) -> Tensor:
        return torch.stack([torch.randperm(count, generator=generator) for _ in range(batch)])

    prefix = case.prefix
    size = torch.randint(1, 5, (batch, tokens), generator=generator).float()
    size[:, prefix:].scatter_(1, shuffled(tokens - prefix)[:, :padding], 0.0)
    order = torch.cat([torch.arange(prefix).expand(batch, prefix), prefix + shuffled(tokens - prefix)], dim=1)
    result = {
        "generator": generator,
        "metric": torch.randn(batch, tokens, channels, generator=generator) + 0.5,
        "size": size,
        "score": torch.randn(batch, tokens, generator=generator),
        "x": torch.randn(batch, tokens, max(1, channels - 2), generator=generator),
        "r": r,
        "keep": order[:, : tokens - r].contiguous(),
        "drop": order[:, tokens - r :].contiguous(),
        "dest": torch.randint(prefix, max(tokens - r, prefix + 1), (batch, r), generator=generator),
        "index": order[:, : tokens - r].contiguous(),
        **case.static,
    }
    result |= {name: make(result) for name, make in case.inputs.items()}
    return {name: result[name] for name in case.arguments}


def arrays(outputs: Tensor | tuple[Tensor, ...]) -> Arrays:
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return tuple((o.float() if o.dtype == torch.bfloat16 else o).numpy() for o in outputs)


def expected(case: Case, arguments: dict) -> Arrays:
    """The naive float64 result."""
    function = getattr(naive, case.op)
    assert list(inspect.signature(function).parameters) == case.arguments
    wide = {
        n: a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for n, a in arguments.items()
    }
    result = function(*(a.numpy() if isinstance(a, Tensor) else a for a in wide.values()))
    return result if isinstance(result, tuple) else (result,)


class Call(torch.nn.Module):
    """The op on tensors only: r is the length of the last input, so that it is dynamic."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        left = list(tensors)
        given = {**self.case.static}
        for name in self.case.arguments:
            if name not in given:
                given[name] = left[-1].shape[0] if name == "r" else left.pop(0)
        outputs = getattr(ops, self.case.op)(*(given[name] for name in self.case.arguments))
        return outputs if isinstance(outputs, tuple) else (outputs,)


def tensors(arguments: dict) -> tuple[Tensor, ...]:
    """The inputs of :class:`Call`."""
    blank = [torch.zeros(arguments["r"])] if "r" in arguments else []
    return (*(a for a in arguments.values() if isinstance(a, Tensor)), *blank)


@cache
def exported(case: Case) -> torch.export.ExportedProgram:
    """The case as a program in which batch, tokens and r are dynamic."""
    auto = torch.export.Dim.AUTO
    inputs = tensors(world(case, batch=3, tokens=14, r=4, seed=0))
    shapes = tuple(dict.fromkeys(range(tensor.ndim), auto) for tensor in inputs)
    return torch.export.export(Call(case), inputs, dynamic_shapes=(shapes,), strict=False)


@cache
def program_form(case: Case) -> torch.nn.Module:
    return exported(case).module(check_guards=False)


@cache
def onnx_form(case: Case) -> onnx.ModelProto:
    return to_onnx(exported(case))


def to_onnx(program: torch.export.ExportedProgram) -> onnx.ModelProto:
    return ir.to_proto(translated(program))


def translated(program: torch.export.ExportedProgram) -> ir.Model:
    """The program in ONNX, with the functions of the token ops."""
    with torch.no_grad():
        model = translate(program, 23)
    attach_functions(model)
    return model


@cache
def session(case: Case) -> onnxruntime.InferenceSession:
    return bare_session(onnx_form(case))


def bare_session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run_session(bare: onnxruntime.InferenceSession, inputs: tuple[Tensor, ...]) -> Arrays:
    names = [given.name for given in bare.get_inputs()]
    outputs = bare.run(None, dict(zip(names, (t.numpy() for t in inputs), strict=True)))
    return tuple(np.asarray(output) for output in outputs)


Form = Callable[[Case, dict], Arrays]

FORMS: dict[str, Form] = {
    "reference": lambda case, arguments: arrays(getattr(ops, case.op)(*arguments.values())),
    "program": lambda case, arguments: arrays(program_form(case)(*tensors(arguments))),
    "onnx": lambda case, arguments: run_session(session(case), tensors(arguments)),
}

KERNELS: dict[str, Form] = {
    "in order": lambda case, arguments: arrays(host_form(case.op)(*arguments.values())),
    "in reverse": lambda case, arguments: arrays(host_form(case.op, reverse=True)(*arguments.values())),
}
"""The CUDA source on the CPU, with the threads of a block one after another."""
