"""The ONNX form of tokopt::likeliest: the best blocks of the vocabulary first, then the best of their tokens.

The ``count`` largest numbers lie in the ``count`` blocks whose largest numbers are largest. So the vocabulary is read
once, and what is sorted is small.
"""

from tokopt.kernels.opset import FLOAT, INFINITY, INT64, TOKOPT, TensorType, node, op, script

BLOCK = 128
"""Tokens of a block."""

NOTHING = -INFINITY


@script(TOKOPT, default_opset=op)
def likeliest(logits: TensorType, count: INT64) -> INT64:
    """See :func:`tokopt.kernels.likeliest.reference.likeliest`."""
    size = op.Shape(logits, start=2, end=3)
    wanted = op.Reshape(count, [1])
    blocks = op.Max(op.Div(size + (BLOCK - 1), BLOCK), wanted)
    lacking = op.Concat([0, 0, 0, 0, 0], blocks * BLOCK - size, axis=0)
    padded = op.Pad(op.Cast(logits, to=FLOAT.dtype), lacking, NOTHING)
    rows = op.Reshape(padded, op.Concat([0, 0], blocks, [128], axis=0))
    _, best = op.TopK(op.ReduceMax(rows, [-1], keepdims=0), wanted, axis=-1)
    index = op.Expand(op.Unsqueeze(best, [3]), [1, 1, 1, 128])
    held = op.GatherElements(rows, index, axis=2)
    _, place = op.TopK(op.Reshape(held, [0, 0, -1]), wanted, axis=-1)
    block = op.GatherElements(best, place / BLOCK, axis=2)
    return block * BLOCK + op.Mod(place, BLOCK)


FUNCTIONS = (likeliest,)
translation = node(likeliest)
