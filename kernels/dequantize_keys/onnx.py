"""The ONNX form of tokopt::dequantize_keys."""

from tokopt.kernels.opset import FLOAT, TOKOPT, UINT8, node, op, script


@script(TOKOPT, default_opset=op)
def dequantize_keys(codes: UINT8, scale: FLOAT, zero: FLOAT) -> FLOAT:
    """See :func:`tokopt.kernels.dequantize_keys.reference.dequantize_keys`."""
    outer = op.Shape(codes, start=0, end=2)
    slots = op.Shape(codes, start=2, end=3)
    channels = op.Shape(codes, start=3)
    size = channels / op.Shape(scale, start=3)
    groups = slots / size
    whole = groups * size
    inner = op.Cast(op.Slice(codes, [0], whole, [2]), to=FLOAT.dtype)
    grouped = op.Reshape(inner, op.Concat(outer, groups, size, channels, axis=0), allowzero=1)
    row = op.Concat(outer, groups, [1], channels, axis=0)
    scales = op.Reshape(op.Slice(scale, [0], whole, [2]), row, allowzero=1)
    zeros = op.Reshape(op.Slice(zero, [0], whole, [2]), row, allowzero=1)
    flat = op.Reshape(grouped * scales + zeros, op.Concat(outer, whole, channels, axis=0), allowzero=1)
    rest = op.Expand(0.0, op.Concat(outer, slots - whole, channels, axis=0))
    return op.Concat(flat, rest, axis=2)


FUNCTIONS = (dequantize_keys,)
translation = node(dequantize_keys)
