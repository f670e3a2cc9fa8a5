"""The ONNX form of tokopt::dequantize_weight."""

from tokopt.kernels.opset import FLOAT, TOKOPT, UINT8, node, op, script


@script(TOKOPT, default_opset=op)
def dequantize_weight(codes: UINT8, scale: FLOAT, zero: UINT8, group: int) -> FLOAT:
    """See :func:`tokopt.kernels.dequantize_weight.reference.dequantize_weight`."""
    return op.DequantizeLinear(codes, scale, zero, axis=1, block_size=group)


FUNCTIONS = (dequantize_weight,)
translation = node(dequantize_weight)
