"""How Torch-TensorRT converts what :mod:`.program` leaves of tokopt's ops: to layers that quantize.

Imported for its effect, which is on the registry of ``torch_tensorrt``; so only where that is installed.
"""

# torch_tensorrt and TensorRT are untyped, and need not be installed.
# pyright: reportMissingImports=false

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch_tensorrt.dynamo._SourceIR import SourceIR
from torch_tensorrt.dynamo.conversion import ConverterPriority, dynamo_tensorrt_converter, impl
from torch_tensorrt.dynamo.conversion.converter_utils import cast_trt_tensor, get_trt_tensor
from torch_tensorrt.dynamo.utils import extract_var_range_info

from tokopt.kernels import ops
from tokopt.lower.torch_tensorrt.products import EXPAND_WEIGHT

trt: Any = import_module("tensorrt")
"""TensorRT or TensorRT-RTX: torch_tensorrt gives this name to the one that it uses."""


SORTED = 3840
"""The most numbers that TensorRT's TopK orders."""


@dynamo_tensorrt_converter(ops.fake_quantize.default, supports_dynamic_shapes=True)
def convert_fake_quantize(ctx: Any, target: Any, args: tuple, kwargs: dict, name: str) -> Any:
    """A quantizing and a dequantizing layer, of one step."""
    x, scale, zero = args
    assert zero == 0, "zero points were taken out"
    step = _step(ctx, scale, name)
    return _dequantized(ctx, _quantized(ctx, x, step, name), step, x.dtype, name)


@dynamo_tensorrt_converter(ops.fake_float8.default, supports_dynamic_shapes=True)
def convert_fake_float8(ctx: Any, target: Any, args: tuple, kwargs: dict, name: str) -> Any:
    """The same of 8-bit floats."""
    x, scale = args
    step = _step(ctx, scale, name)
    return _dequantized(ctx, _quantized(ctx, x, step, name, trt.fp8), step, x.dtype, name)


@dynamo_tensorrt_converter(ops.quantize_int8.default, supports_dynamic_shapes=True)
def convert_quantize_int8(ctx: Any, target: Any, args: tuple, kwargs: dict, name: str) -> Any:
    """The steps differ by head and channel, which no quantizing layer has: they are divided by before."""
    x, scale = args
    if not _is_one(scale):
        x = _elementwise(ctx, x, scale, trt.ElementWiseOperation.DIV, name)
    return _quantized(ctx, x, _step(ctx, 1.0, name), name)


@dynamo_tensorrt_converter(ops.dequantize_int8.default, supports_dynamic_shapes=True)
def convert_dequantize_int8(ctx: Any, target: Any, args: tuple, kwargs: dict, name: str) -> Any:
    """As :func:`convert_quantize_int8`, back."""
    codes, scale = args
    x = _dequantized(ctx, codes, _step(ctx, 1.0, name), trt.float32, name)
    return x if _is_one(scale) else _elementwise(ctx, x, scale, trt.ElementWiseOperation.PROD, name)


@dynamo_tensorrt_converter(EXPAND_WEIGHT, supports_dynamic_shapes=True)
def convert_expand_weight(ctx: Any, target: Any, args: tuple, kwargs: dict, name: str) -> Any:
    """A constant of 8 or 4 bits, or of 8-bit floats, and what dequantizes it.

    That has a step per output, or per block of inputs.
    """
    codes, step, bits = args
    codes = codes.detach().cpu().contiguous()
    if codes.dtype == torch.float8_e4m3fn:
        stored, kind = codes.view(torch.uint8), trt.fp8
    else:
        stored, kind = (codes, trt.int8) if bits == 8 else (_packed(codes), trt.int4)
    ctx.record_weight(f"{name}_codes", stored)  # until the engine is built
    weights = trt.Weights(kind, stored.data_ptr(), codes.numel())
    constant = ctx.net.add_constant(tuple(codes.shape), weights)
    constant.name = f"{name}_codes"
    blocked = step.shape[-2] > 1
    step = step.detach().cpu().float()
    steps = get_trt_tensor(ctx, step if blocked else step.flatten(), f"{name}_step")
    layer = ctx.net.add_dequantize(constant.get_output(0), steps, trt.float32)
    if not blocked:
        layer.axis = codes.ndim - 1
    layer.name = f"{name}_dequantize"
    return layer.get_output(0)


def _sorts(node: Any, settings: Any = None) -> bool:
    """Whether no more numbers are sorted than TensorRT can."""
    size = node.args[0].meta["val"].shape[node.args[1]]
    most = size if isinstance(size, int) else extract_var_range_info(size)["max"]
    return most is not None and most <= SORTED


@dynamo_tensorrt_converter(
    torch.ops.aten.sort.default,
    capability_validator=_sorts,
    priority=ConverterPriority.HIGH,
    supports_dynamic_shapes=True,
)
def convert_sort(ctx: Any, target: Any, args: tuple, kwargs: dict, name: str) -> Any:
    """``(x, dim, descending=False)`` by TopK, also along an axis whose size varies, which torch_tensorrt does not."""
    x, dim, *rest = args
    descending = bool(rest and rest[0])
    operation = trt.TopKOperation.MAX if descending else trt.TopKOperation.MIN
    layer = ctx.net.add_topk(x, operation, max(x.shape[dim], 1), 1 << dim)
    layer.name = f"{name}_topk"
    if x.shape[dim] < 0:
        size = ctx.net.add_slice(ctx.net.add_shape(x).get_output(0), (dim,), (1,), (1,))
        number = ctx.net.add_shuffle(size.get_output(0))
        number.reshape_dims = ()
        layer.set_input(1, ctx.net.add_cast(number.get_output(0), trt.int32).get_output(0))
    return layer.get_output(0), layer.get_output(1)


@dynamo_tensorrt_converter(
    torch.ops.aten.gather.default, priority=ConverterPriority.HIGH, supports_dynamic_shapes=True
)
def convert_gather(ctx: Any, target: Any, args: tuple, kwargs: dict, name: str) -> Any:
    """``(x, dim, index)``: torch_tensorrt's own, which it does not use for sizes that vary."""
    x, dim, index = args
    given = get_trt_tensor(ctx, x, f"{name}_given"), dim, get_trt_tensor(ctx, index, f"{name}_index")
    return impl.select.gather(ctx, target, SourceIR.ATEN, name, *given)


@dynamo_tensorrt_converter(
    torch.ops.aten.scatter.src, priority=ConverterPriority.HIGH, supports_dynamic_shapes=True
)
def convert_scatter(ctx: Any, target: Any, args: tuple, kwargs: dict, name: str) -> Any:
    """``(x, dim, index, src)``: torch_tensorrt's own, with ``src`` in the dtype of ``x``, as TensorRT wants it.

    torch_tensorrt makes indices of 32 bits where PyTorch has 64.
    """
    x, dim, index, src = args
    x, index, src = (get_trt_tensor(ctx, one, f"{name}_{i}") for i, one in enumerate((x, index, src)))
    src = cast_trt_tensor(ctx, src, x.dtype, f"{name}_cast")
    return impl.select.scatter(ctx, target, SourceIR.ATEN, name, x, dim, index, src)


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Two codes of 4 bits in a byte, the first in the lower half."""
    low, high = np.asarray(codes.flatten().numpy() & 15, np.uint8).reshape(-1, 2).T
    return torch.from_numpy(np.ascontiguousarray(low | high << 4))


def _quantized(ctx: Any, x: Any, step: Any, name: str, kind: Any = trt.int8) -> Any:
    layer = ctx.net.add_quantize(x, step, kind)
    layer.name = f"{name}_quantize"
    return layer.get_output(0)


def _dequantized(ctx: Any, codes: Any, step: Any, dtype: Any, name: str) -> Any:
    layer = ctx.net.add_dequantize(codes, step, dtype)
    layer.name = f"{name}_dequantize"
    return layer.get_output(0)


def _step(ctx: Any, scale: float, name: str) -> Any:
    return get_trt_tensor(ctx, torch.tensor([scale]), f"{name}_step")  # of a scalar the builder crashes


def _is_one(scale: Any) -> bool:
    return isinstance(scale, torch.Tensor) and bool((scale == 1).all())


def _elementwise(ctx: Any, x: Any, scale: Any, operation: Any, name: str) -> Any:
    operand = get_trt_tensor(ctx, scale[None].detach().cpu(), f"{name}_scale")
    layer = ctx.net.add_elementwise(x, operand, operation)
    layer.name = f"{name}_{operation.name.lower()}"
    return layer.get_output(0)
