"""The ONNX form of tokopt::gather_tokens."""

from tokopt.kernels.opset import INT64, TOKOPT, TensorType, node, op, script


@script(TOKOPT, default_opset=op)
def gather_tokens(x: TensorType, index: INT64, dim: int) -> TensorType:
    """See :func:`tokopt.kernels.gather_tokens.reference.gather_tokens`.

    One Gather of whole rows: the axes up to ``dim`` are flattened, and row (b, ..., k) is found at
    ``(b, ..., 0) * tokens + index[b, k]``. A batch of 1 broadcasts in that sum.
    """
    # Without the casts around numbers in arithmetic, OpenVINO knows the ranks of what follows.
    zero, one = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    last = op.Constant(value_ints=[9223372036854775807])
    axis = op.Reshape(op.Constant(value_int=dim), one)
    shape = op.Shape(x)
    outer = op.Slice(shape, zero, axis)
    tokens = op.Slice(shape, axis, axis + one)
    table = op.Reshape(x, op.Concat([-1], op.Slice(shape, axis + one, last), axis=0))
    first = op.Range(0, op.ReduceProd(outer, keepdims=0), 1) * tokens
    ones = op.Expand(one, axis - one)
    spread = op.Concat(op.Shape(index, start=0, end=1), ones, op.Shape(index, start=1, end=2), axis=0)
    row = op.Reshape(first, op.Concat(outer, [1], axis=0)) + op.Reshape(index, spread)
    return op.Gather(table, row, axis=0)


FUNCTIONS = (gather_tokens,)
translation = node(gather_tokens)
