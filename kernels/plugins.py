"""TensorRT plugins of the token ops: one per kernel, derived from how ``launch.py`` launches it.

TensorRT's quickly deployable plugins (``tensorrt.plugin``) embed PTX in the engine and launch one kernel each, with a
grid and scalars that are expressions of the sizes of the plugin's inputs. So an op becomes a chain of plugins: the
scratch of one kernel is put out for the next. :func:`trace` runs ``launch`` once on tensors of symbolic sizes, and so
learns which kernels there are and how their grids, scalars and outputs follow from the sizes. The plugin
``tokopt::<op>_<kernel>`` reads that from its attribute ``launch`` (:meth:`Launch.to_json`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, reduce
from importlib import import_module
from inspect import Parameter, Signature
from itertools import count
from typing import Any, cast

import sympy
import torch
from torch import SymInt, Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.functions import Max as SymMax

from tokopt.errors import TokoptError
from tokopt.kernels.catalogue import CUDA_OPS, OPS
from tokopt.kernels.cuda import compiled
from tokopt.kernels.launch import BLOCK, Run, signatures

PLUGIN_OPS = tuple(op for op in CUDA_OPS if not OPS[op].unsigned_bytes)
"""The ops whose kernels are plugins: TensorRT has unsigned bytes in inputs and outputs of a network alone."""

DTYPES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16"}
DTYPES |= {torch.int64: "INT64", torch.int32: "INT32", torch.bool: "BOOL"}
"""What a plugin takes and puts out, by TensorRT's names."""

Expression = int | str | list["Expression"]
"""A size: a number, ``"0.1"`` (axis 1 of input 0), or ``[operator, left, right]`` with ``+ - * // max``."""


class NotAPlugin(TokoptError):
    """An op cannot be a chain of plugins; the message says why. Its portable form is used in its place."""


@dataclass(frozen=True)
class Described:
    """A tensor of which dtype and sizes are known; a size that is a name may be any number."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Output:
    """What a kernel writes."""

    name: str
    dtype: str
    shape: tuple[Expression, ...]


@dataclass(frozen=True)
class Launch:
    """One kernel of an op: how it is launched, and what it reads: arguments of the op, or outputs of kernels before."""

    kernel: str
    scalar: str
    inputs: tuple[str, ...]
    grid: tuple[Expression, Expression]
    scalars: tuple[Expression, ...]
    outputs: tuple[Output, ...]

    def to_json(self) -> str:
        """The attribute ``launch`` of the plugin."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Launch:
        """The opposite of :meth:`to_json`."""
        values = json.loads(text)
        values["outputs"] = tuple(
            Output(**{**output, "shape": tuple(output["shape"])}) for output in values["outputs"]
        )
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def trace(op: str, arguments: Mapping[str, Described | int | float | str]) -> tuple[list[Launch], list[str]]:
    """The launches of ``op`` for its ``arguments``, in order, and the names of its results among their outputs.

    Raises NotAPlugin when a size does not follow from the inputs of the kernel that needs it, or a dtype is none that
    kernels are built for.
    """
    tensors = [value for value in arguments.values() if isinstance(value, Described)]
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise NotAPlugin(f"its kernels are not built for {tensor.dtype}")
    values = _symbolic(arguments)
    recorder = _Recorder({id(values[name]): name for name in values if isinstance(values[name], Tensor)})
    outputs = import_module(f"tokopt.kernels.{op}.reference").fake(*values.values())
    import_module(f"tokopt.kernels.{op}.launch").launch(recorder.build, outputs, *values.values())
    results = outputs if isinstance(outputs, tuple) else (outputs,)
    return recorder.launches, [recorder.names[id(result)] for result in results]


def _symbolic(arguments: Mapping[str, Described | int | float | str]) -> dict[str, Any]:
    """The arguments with tensors that have sizes and no values; equal names are equal sizes."""
    # Tensors of equal example sizes get one symbol: so every name has a size of its own.
    sizes: dict[str, int] = {}
    fresh = count(1009)
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def make(name: str, tensor: Described) -> Tensor:
        shape = [
            size if isinstance(size, int) else sizes.setdefault(size, next(fresh)) for size in tensor.shape
        ]
        dynamic = [DimDynamic.DUCK if isinstance(size, str) else DimDynamic.STATIC for size in tensor.shape]
        return mode.from_tensor(
            torch.empty(shape, dtype=tensor.dtype, device="meta"),
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic),
            source=ConstantSource(name),
        )

    return {n: make(n, v) if isinstance(v, Described) else v for n, v in arguments.items()}


class _Recorder:
    """Stands for what compiles and launches kernels, and writes down what is launched."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names, self.launches = names, list[Launch]()
        self._kept: list[Tensor] = []  # an id belongs to a tensor as long as that lives

    def build(self, scalar: str) -> Run:
        def run(
            kernel: str,
            grid: tuple[int, int],
            inputs: tuple[Tensor, ...],
            scalars: tuple[int | float, ...],
            outputs: tuple[Tensor, ...],
        ) -> None:
            sizes = _Sizes(inputs)
            made = [
                Output(f"{kernel}_{i}", DTYPES[tensor.dtype], tuple(map(sizes.express, tensor.shape)))
                for i, tensor in enumerate(outputs)
            ]
            self.names |= {id(tensor): output.name for tensor, output in zip(outputs, made, strict=True)}
            self._kept += outputs
            read = tuple(self.names[id(tensor)] for tensor in inputs)
            columns, rows = map(sizes.express, grid)
            if 0 in (columns, rows):
                raise NotAPlugin("there is nothing to launch")
            numbers = tuple(
                _bits(value) if isinstance(value, float) else sizes.express(value) for value in scalars
            )
            self.launches.append(Launch(kernel, scalar, read, (columns, rows), numbers, tuple(made)))

        return run


def _bits(value: float) -> int:
    """The integer of the same 32 bits: TensorRT hands integers on, and a kernel finds the float in their place."""
    return struct.unpack("i", struct.pack("f", value))[0]


class _Sizes:
    """Sizes as expressions of the sizes of a kernel's inputs."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.known: dict[sympy.Expr, Expression] = {}
        axes = [
            (_expr(size), f"{i}.{axis}")
            for i, tensor in enumerate(inputs)
            for axis, size in enumerate(tensor.shape)
        ]
        for size, name in axes:
            self.known.setdefault(size, name)
        for size, name in axes:  # of n + 3 follows n
            difference = (
                size - symbol if (symbol := next(iter(size.free_symbols), None)) is not None else None
            )
            if difference is not None and difference.is_Integer and symbol not in self.known:
                self.known[symbol] = (
                    ["-", name, int(difference)] if difference > 0 else ["+", name, -int(difference)]
                )

    def express(self, size: int | SymInt) -> Expression:
        """Raise NotAPlugin where a size does not follow from those of the inputs."""
        return self._written(_expr(size))

    def _written(self, size: sympy.Expr) -> Expression:
        if size.is_Integer:
            return int(size)
        if size in self.known:
            return self.known[size]
        if isinstance(size, sympy.Add):
            negative = [part for part in size.args if part.as_coeff_Mul()[0] < 0]
            positive = [part for part in size.args if part not in negative]
            total = self._folded("+", positive) if positive else 0
            return reduce(lambda left, part: ["-", left, self._written(-part)], negative, total)
        for kind, operator in ((sympy.Mul, "*"), (FloorDiv, "//"), (SymMax, "max"), (sympy.Max, "max")):
            if isinstance(size, kind):
                return self._folded(operator, size.args)
        raise NotAPlugin(f"the size {size} does not follow from the inputs of one of its kernels")

    def _folded(self, operator: str, parts: Iterable[Any]) -> Expression:
        # Numbers last, so that an operator always finds an expression on its left.
        written = sorted(
            map(self._written, parts), key=lambda part: isinstance(part, int) and operator != "//"
        )
        return reduce(lambda left, right: [operator, left, right], written)


def _expr(size: int | SymInt) -> Any:
    return size.node.expr if isinstance(size, SymInt) else sympy.Integer(size)


def evaluate(
    expression: Expression, size: Callable[[int, int], Any], largest: Callable[[Any, Any], Any]
) -> Any:
    """The value of an expression, given the size of an axis of an input, and what ``max`` is."""
    if isinstance(expression, int):
        return expression
    if isinstance(expression, str):
        place, axis = map(int, expression.split("."))
        return size(place, axis)
    operator, left, right = expression
    a, b = evaluate(left, size, largest), evaluate(right, size, largest)
    operations = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "//": lambda: a // b}
    return largest(a, b) if operator == "max" else operations[cast(str, operator)]()


# --- TensorRT's side ----------------------------------------------------------------------------------------------


def plugin_code(op: str, scalar: str, arch: str) -> bytes:
    """The PTX that an engine embeds for a compute capability; raises MissingDependencyError without NVRTC."""
    return compiled(op, scalar, arch.replace("sm", "compute"))


@cache
def register_plugins(arch: str) -> None:
    """Make the plugins known to TensorRT, for a compute capability such as ``"sm_90"``; once per process."""
    plugin = import_module("tensorrt.plugin")
    for op in PLUGIN_OPS:
        for kernel, counts in signatures(op).items():
            _register(plugin, op, kernel, counts, arch)


def _sign(function: Any, parameters: Sequence[Parameter], returned: Any) -> None:
    """Give a function the signature that TensorRT reads."""
    function.__signature__ = Signature(parameters, return_annotation=returned)


def _register(plugin: Any, op: str, kernel: str, counts: tuple[int, int, int], arch: str) -> None:
    trt = import_module("tensorrt")
    name, (inputs, _, outputs) = f"tokopt::{op}_{kernel}", counts

    def parameters(*more: str) -> list[Parameter]:
        kinds = {f"input_{i}": plugin.TensorDesc for i in range(inputs)} | {"launch": str}
        made = [Parameter(n, Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for n, kind in kinds.items()]
        return [*made, *(Parameter(n, Parameter.POSITIONAL_OR_KEYWORD) for n in more)]

    def expression(value: Expression, given: Sequence[Any]) -> Any:
        made = evaluate(value, lambda i, axis: given[i].shape_expr[axis], plugin.max)
        return plugin.ShapeExpr(made) if isinstance(made, int) else made

    def describe(*given: Any, launch: str) -> Any:
        made = tuple(
            plugin.from_shape_expr(
                tuple(expression(size, given) for size in output.shape), getattr(trt.DataType, output.dtype)
            )
            for output in Launch.from_json(launch).outputs
        )
        return made if outputs > 1 else made[0]

    def implement(*given: Any) -> Any:
        launch = Launch.from_json(given[inputs])
        columns, rows = (expression(size, given) for size in launch.grid)
        settings = plugin.KernelLaunchParams(grid_x=columns, grid_y=rows, block_x=BLOCK)
        numbers = plugin.SymIntExprs(len(launch.scalars))
        for place, value in enumerate(launch.scalars):
            numbers[place] = plugin.SymInt32(expression(value, given))
        return kernel, plugin_code(op, launch.scalar, arch), settings, numbers

    described = (plugin.TensorDesc,) * outputs
    _sign(describe, parameters(), tuple[described])
    returned = tuple[str, bytes, plugin.KernelLaunchParams, plugin.SymIntExprs]
    _sign(implement, parameters("outputs", "tactic"), returned)
    plugin.register(name)(describe)
    plugin.aot_impl(name)(implement)
