"""The ONNX form of tokopt::attention_mass."""

from tokopt.kernels.opset import BOOL, FLOAT, INFINITY, INT64, TOKOPT, TensorType, node, op, script


@script(TOKOPT, default_opset=op)
def attention_mass(query: TensorType, key: TensorType, mask: BOOL, positions: INT64, scale: float) -> FLOAT:
    """See :func:`tokopt.kernels.attention_mass.reference.attention_mass`.

    ``query`` [B, key heads, heads of each, tokens, channels], and ``mask`` with the same axes, 1 where it is shared.
    """
    factor = op.Constant(value_float=scale)
    keys = op.Unsqueeze(op.Transpose(op.Cast(key, to=FLOAT.dtype), perm=[0, 1, 3, 2]), [2])
    logits = op.MatMul(op.Cast(query, to=FLOAT.dtype), keys) * factor
    weights = op.Softmax(op.Where(mask, logits, -INFINITY), axis=-1)
    real = op.Unsqueeze(op.GreaterOrEqual(positions, 0), [1, 2, 4])
    return op.Unsqueeze(op.ReduceSum(op.Where(real, weights, 0.0), [2, 3], keepdims=0), [3])


FUNCTIONS = (attention_mass,)
_mass = node(attention_mass)


def translation(query, key, mask, positions, scale: float):
    """Group the heads that share keys."""
    groups = [key.shape[1], query.shape[1] // key.shape[1]]
    sees = op.Unsqueeze(mask, [2]) if mask.shape[1] == 1 else _grouped(mask, groups)
    return _mass(_grouped(query, groups), key, sees, positions, scale)


def _grouped(x, groups: list[int]):
    """[B, heads, ...] as [B, key heads, heads of each, ...]."""
    return op.Reshape(x, op.Concat(op.Shape(x, start=0, end=1), groups, op.Shape(x, start=2), axis=0))
