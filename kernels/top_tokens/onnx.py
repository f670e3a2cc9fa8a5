"""The ONNX form of tokopt::top_tokens."""

from tokopt.kernels.opset import FLOAT, INT64, LAST, TOKOPT, TensorType, node, op, script


@script(TOKOPT, default_opset=op)
def top_tokens(score: TensorType, r: INT64, prefix: int) -> tuple[INT64, INT64]:
    """See :func:`tokopt.kernels.top_tokens.reference.top_tokens`."""
    start = op.Reshape(op.Constant(value_int=prefix), [1])
    free = op.Cast(op.Slice(score, start, LAST, [1]), to=FLOAT.dtype)
    count = op.Shape(free, start=1, end=2)
    _, order = op.TopK(free, count, axis=-1, largest=1, sorted=1)
    order = order + start
    cut = count - op.Reshape(r, [1])
    protected = op.Expand(op.Range(0, prefix, 1), op.Concat(op.Shape(score, start=0, end=1), start, axis=0))
    keep = op.Concat(protected, op.Slice(order, [0], cut, [1]), axis=1)
    drop = op.Slice(order, cut, LAST, [1])
    return keep, drop


FUNCTIONS = (top_tokens,)
translation = node(top_tokens)
