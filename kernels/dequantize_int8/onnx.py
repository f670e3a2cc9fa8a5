"""The ONNX form of tokopt::dequantize_int8: ``DequantizeLinear`` knows scales along one axis only."""

from tokopt.kernels.opset import FLOAT, INT8, TOKOPT, node, op, script


@script(TOKOPT, default_opset=op)
def dequantize_int8(codes: INT8, scale: FLOAT) -> FLOAT:
    """See :func:`tokopt.kernels.dequantize_int8.reference.dequantize_int8`."""
    return op.Cast(codes, to=FLOAT.dtype) * scale


FUNCTIONS = (dequantize_int8,)
translation = node(dequantize_int8)
