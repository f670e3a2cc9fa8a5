"""The ONNX form of tokopt::dequantize_float8 for any bytes; a file holds those of a weight as FLOAT8E4M3FN."""

import ml_dtypes
import numpy as np

from tokopt.kernels.opset import FLOAT, INT64, TOKOPT, UINT8, node, op, script

NUMBERS = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32).tolist()
"""The number of every byte."""


@script(TOKOPT, default_opset=op)
def dequantize_float8(codes: UINT8, scale: FLOAT) -> FLOAT:
    """See :func:`tokopt.kernels.dequantize_float8.reference.dequantize_float8`."""
    return op.Gather(op.Constant(value_floats=NUMBERS), op.Cast(codes, to=INT64.dtype)) * scale


FUNCTIONS = (dequantize_float8,)
translation = node(dequantize_float8)
