"""The ONNX form of tokopt::log_size."""

from tokopt.kernels.opset import FLOAT, TOKOPT, node, op, script
from tokopt.kernels.shared import TINY


@script(TOKOPT, default_opset=op)
def log_size(size: FLOAT) -> FLOAT:
    """See :func:`tokopt.kernels.log_size.reference.log_size`."""
    return op.Unsqueeze(op.Log(op.Max(op.Cast(size, to=FLOAT.dtype), TINY)), [1, 2])


FUNCTIONS = (log_size,)
translation = node(log_size)
