"""The ONNX form of tokopt::attention_mass."""

from tokopt.kernels.opset import BOOL, FLOAT, INFINITY, INT64, TOKOPT, TensorType, node, op, script


@script(TOKOPT, default_opset=op)
def grouped_heads(x: TensorType, heads: int) -> TensorType:
    """[B, all heads, ...] as [B, heads, heads of each, ...]."""
    count = op.Reshape(op.Constant(value_int=heads), [1])
    shape = op.Concat(op.Shape(x, start=0, end=1), count, [-1], op.Shape(x, start=2), axis=0)
    return op.Reshape(x, shape)


@script(TOKOPT, default_opset=op)
def attention_mass(query: TensorType, key: TensorType, mask: BOOL, positions: INT64, scale: float) -> FLOAT:
    """See :func:`tokopt.kernels.attention_mass.reference.attention_mass`; query and mask have grouped heads."""
    factor = op.Constant(value_float=scale)
    keys = op.Unsqueeze(op.Transpose(op.Cast(key, to=FLOAT.dtype), perm=[0, 1, 3, 2]), [2])
    logits = op.MatMul(op.Cast(query, to=FLOAT.dtype), keys) * factor
    weights = op.Softmax(op.Where(mask, logits, -INFINITY), axis=-1)
    real = op.Unsqueeze(op.GreaterOrEqual(positions, 0), [1, 2, 4])
    return op.Unsqueeze(op.ReduceSum(op.Where(real, weights, 0.0), [2, 3], keepdims=0), [3])


FUNCTIONS = (grouped_heads, attention_mass)
_group, _mass = node(grouped_heads), node(attention_mass)


def translation(query, key, mask, positions, scale: float):
    """Group the heads that share keys; a mask of one head is a group of its own."""
    heads = key.shape[1]
    grouped = _group(mask, 1 if mask.shape[1] == 1 else heads)
    return _mass(_group(query, heads), key, grouped, positions, scale)
