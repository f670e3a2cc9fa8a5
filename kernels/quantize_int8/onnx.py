"""The ONNX form of tokopt::quantize_int8: ``QuantizeLinear`` knows scales along one axis only."""

from tokopt.kernels.opset import FLOAT, INT8, TOKOPT, node, op, script


@script(TOKOPT, default_opset=op)
def quantize_int8(x: FLOAT, scale: FLOAT) -> INT8:
    """See :func:`tokopt.kernels.quantize_int8.reference.quantize_int8`."""
    return op.Cast(op.Clip(op.Round(x / scale), -128.0, 127.0), to=INT8.dtype)


FUNCTIONS = (quantize_int8,)
translation = node(quantize_int8)
