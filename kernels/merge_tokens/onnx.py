"""The ONNX form of tokopt::merge_tokens."""

from tokopt.kernels.opset import FLOAT, INT64, TOKOPT, TensorType, node, op, script
from tokopt.kernels.shared import TINY


@script(TOKOPT, default_opset=op)
def merge_tokens(
    x: TensorType, size: FLOAT, keep: INT64, drop: INT64, dest: INT64
) -> tuple[TensorType, FLOAT]:
    """See :func:`tokopt.kernels.merge_tokens.reference.merge_tokens`."""
    kept_size = op.GatherElements(size, keep, axis=1)
    drop_size = op.GatherElements(size, drop, axis=1)
    slot = op.Range(0, op.Squeeze(op.Shape(keep, start=1, end=2)), 1)
    joins = op.Equal(op.Unsqueeze(dest, [1]), op.Unsqueeze(slot, [1]))
    share = op.Cast(joins, to=FLOAT.dtype) * op.Unsqueeze(drop_size, [1])
    new_size = kept_size + op.ReduceSum(share, [-1], keepdims=0)
    scale = op.Reciprocal(op.Max(new_size, TINY))
    kept = op.Cast(op.GatherND(x, op.Unsqueeze(keep, [2]), batch_dims=1), to=FLOAT.dtype)
    dropped = op.Cast(op.GatherND(x, op.Unsqueeze(drop, [2]), batch_dims=1), to=FLOAT.dtype)
    own = op.Unsqueeze(kept_size * scale, [2]) * kept
    merged = own + op.MatMul(share * op.Unsqueeze(scale, [2]), dropped)
    return op.CastLike(merged, x), new_size


FUNCTIONS = (merge_tokens,)
translation = node(merge_tokens)
