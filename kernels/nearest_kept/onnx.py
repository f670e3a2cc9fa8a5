"""The ONNX form of tokopt::nearest_kept."""

from tokopt.kernels.opset import FLOAT, INT64, LAST, TOKOPT, TensorType, node, op, script
from tokopt.kernels.shared import TINY


@script(TOKOPT, default_opset=op)
def nearest_kept(metric: TensorType, keep: INT64, drop: INT64, prefix: int) -> INT64:
    """See :func:`tokopt.kernels.nearest_kept.reference.nearest_kept`."""
    x = op.Cast(metric, to=FLOAT.dtype)
    unit = x / op.Max(op.ReduceL2(x, [-1], keepdims=1), TINY)
    start = op.Reshape(op.Constant(value_int=prefix), [1])
    free = op.Slice(keep, start, LAST, [1])
    kept = op.GatherND(unit, op.Unsqueeze(free, [2]), batch_dims=1)
    dropped = op.GatherND(unit, op.Unsqueeze(drop, [2]), batch_dims=1)
    score = op.MatMul(dropped, op.Transpose(kept, perm=[0, 2, 1]))
    return op.ArgMax(score, axis=-1, keepdims=0) + start


FUNCTIONS = (nearest_kept,)
translation = node(nearest_kept)
