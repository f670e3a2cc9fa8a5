"""The ONNX form of tokopt::fake_float8: the pair that engines turn into products of 8-bit floats."""

from tokopt.kernels.opset import FLOAT, FLOAT8, TOKOPT, node, op, script


@script(TOKOPT, default_opset=op)
def fake_float8(x: FLOAT, scale: float) -> FLOAT:
    """See :func:`tokopt.kernels.fake_float8.reference.fake_float8`."""
    step = op.Constant(value_float=scale)
    return op.DequantizeLinear(op.QuantizeLinear(x, step, output_dtype=FLOAT8.dtype, saturate=1), step)


FUNCTIONS = (fake_float8,)
translation = node(fake_float8)
