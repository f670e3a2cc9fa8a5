"""The ONNX form of tokopt::draw."""

from tokopt.kernels.opset import FLOAT, INT64, LAST, TOKOPT, node, op, script

DOUBLE = 11
"""The element type of float64."""


@script(TOKOPT, default_opset=op)
def draw(probabilities: FLOAT, uniform: FLOAT) -> INT64:
    """See :func:`tokopt.kernels.draw.reference.draw`."""
    cumulative = op.CumSum(op.Cast(probabilities, to=DOUBLE), 2)
    total = op.Slice(cumulative, [-1], LAST, [2])
    reached = op.Unsqueeze(op.Cast(uniform, to=DOUBLE), [2]) * total
    below = op.Cast(op.LessOrEqual(cumulative, reached), to=INT64.dtype)
    token = op.ReduceSum(below, [2], keepdims=0)
    return op.Where(op.Greater(op.Squeeze(total, [2]), op.Cast(0.0, to=DOUBLE)), token, -1)


FUNCTIONS = (draw,)
translation = node(draw)
