"""The ONNX form of tokopt::attention_mass."""

from tokopt.kernels.opset import (
    BOOL,
    FLOAT,
    INFINITY,
    INT64,
    TOKOPT,
    Given,
    TensorType,
    maker,
    node,
    op,
    script,
)


@script(TOKOPT, default_opset=op)
def grouped_heads(x: TensorType, key: TensorType) -> TensorType:
    """[B, all heads, ...] as [B, key heads, heads of each, ...]; one head is a group of its own."""
    count = op.Min(op.Shape(x, start=1, end=2), op.Shape(key, start=1, end=2))
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
    """Group the heads that share keys, which a function of its own does for each type."""
    return _mass(_group(query, key), key, _group(mask, key), positions, scale)


def arguments(given: Given) -> Given:
    """Heads were grouped by functions of their own."""
    return {name: maker(given[name]).inputs[0] for name in ("query", "mask")}
