"""The ONNX form of tokopt::fake_quantize: the pair that engines turn into 8-bit products."""

from tokopt.kernels.opset import FLOAT, INT8, TOKOPT, node, op, script


@script(TOKOPT, default_opset=op)
def fake_quantize(x: FLOAT, scale: float, zero: int) -> FLOAT:
    """See :func:`tokopt.kernels.fake_quantize.reference.fake_quantize`."""
    step = op.Constant(value_float=scale)
    middle = op.Cast(op.Constant(value_int=zero), to=INT8.dtype)
    return op.DequantizeLinear(op.QuantizeLinear(x, step, middle), step, middle)


FUNCTIONS = (fake_quantize,)
translation = node(fake_quantize)
