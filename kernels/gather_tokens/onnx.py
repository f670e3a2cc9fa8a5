"""The ONNX form of tokopt::gather_tokens."""

from tokopt.kernels.opset import INT64, LAST, TOKOPT, TensorType, node, op, script


@script(TOKOPT, default_opset=op)
def gather_tokens(x: TensorType, index: INT64, dim: int) -> TensorType:
    """See :func:`tokopt.kernels.gather_tokens.reference.gather_tokens`.

    One Gather of whole rows: the axes up to ``dim`` are flattened, and row (b, ..., k) is found at
    ``(b, ..., 0) * tokens + index[b, k]``. A batch of 1 broadcasts in that sum.
    """
    axis = op.Reshape(op.Constant(value_int=dim), [1])
    shape = op.Shape(x)
    outer = op.Slice(shape, [0], axis)
    tokens = op.Slice(shape, axis, axis + 1)
    table = op.Reshape(x, op.Concat([-1], op.Slice(shape, axis + 1, LAST), axis=0))
    first = op.Range(0, op.ReduceProd(outer, keepdims=0), 1) * tokens
    ones = op.Expand([1], axis - 1)
    spread = op.Concat(op.Shape(index, start=0, end=1), ones, op.Shape(index, start=1, end=2), axis=0)
    row = op.Reshape(first, op.Concat(outer, [1], axis=0)) + op.Reshape(index, spread)
    return op.Gather(table, row, axis=0)


FUNCTIONS = (gather_tokens,)
translation = node(gather_tokens)
