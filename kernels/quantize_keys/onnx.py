"""The ONNX form of tokopt::quantize_keys."""

from tokopt.kernels.opset import FLOAT, TOKOPT, UINT8, node, op, script


@script(TOKOPT, default_opset=op)
def quantize_keys(x: FLOAT, group: int) -> tuple[UINT8, FLOAT, FLOAT]:
    """See :func:`tokopt.kernels.quantize_keys.reference.quantize_keys`."""
    size = op.Reshape(op.Constant(value_int=group), [1])
    outer = op.Shape(x, start=0, end=2)
    slots = op.Shape(x, start=2, end=3)
    channels = op.Shape(x, start=3)
    groups = slots / size
    whole = groups * size
    inner = op.Slice(x, [0], whole, [2])
    grouped = op.Reshape(inner, op.Concat(outer, groups, size, channels, axis=0), allowzero=1)
    zero = op.ReduceMin(grouped, [3])
    scale = (op.ReduceMax(grouped, [3]) - zero) / 255.0
    divisor = op.Where(op.Greater(scale, 0.0), scale, 1.0)
    codes = op.Clip(op.Round((grouped - zero) / divisor), 0.0, 255.0)
    row = op.Concat(outer, whole, channels, axis=0)
    packed = op.Reshape(op.Cast(codes, to=UINT8.dtype), row, allowzero=1)
    rest = op.Concat(outer, slots - whole, channels, axis=0)
    narrow = channels / size
    thin = op.Concat(outer, whole, narrow, axis=0)
    blank = op.Expand(0.0, op.Concat(outer, slots - whole, narrow, axis=0))
    all_codes = op.Concat(packed, op.Expand(op.Cast(0.0, to=UINT8.dtype), rest), axis=2)
    all_scales = op.Concat(op.Reshape(scale, thin, allowzero=1), blank, axis=2)
    all_zeros = op.Concat(op.Reshape(zero, thin, allowzero=1), blank, axis=2)
    return all_codes, all_scales, all_zeros


FUNCTIONS = (quantize_keys,)
translation = node(quantize_keys)
