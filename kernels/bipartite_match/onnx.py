"""The ONNX form of tokopt::bipartite_match."""

from tokopt.kernels.opset import BOOL, FLOAT, INFINITY, INT64, LAST, TOKOPT, TensorType, node, op, script
from tokopt.kernels.shared import MISMATCH, TINY


@script(TOKOPT, default_opset=op)
def first_tokens(prefix: int) -> tuple[INT64, INT64]:
    """Where the two sets begin, [1] each: even and odd tokens behind the prefix."""
    start = op.Reshape(op.Constant(value_int=prefix), [1])
    odd = op.Mod(start, [2])
    first_a = start + odd
    first_b = start + 1 - odd
    return first_a, first_b


@script(TOKOPT, default_opset=op)
def cosines(metric: TensorType, prefix: int) -> FLOAT:
    """Of every token of the first set with every one of the second."""
    first_a, first_b = first_tokens(prefix=prefix)
    x = op.Cast(metric, to=FLOAT.dtype)
    unit = x / op.Max(op.ReduceL2(x, [-1], keepdims=1), TINY)
    a = op.Slice(unit, first_a, LAST, [1], [2])
    b = op.Slice(unit, first_b, LAST, [1], [2])
    return op.MatMul(a, op.Transpose(b, perm=[0, 2, 1]))


@script(TOKOPT, default_opset=op)
def merge_best(
    score: FLOAT, best: FLOAT, partner: INT64, r: INT64, prefix: int
) -> tuple[INT64, INT64, INT64]:
    """The ``r`` tokens of the first set whose ``best`` score is the highest join their partners."""
    first_a, first_b = first_tokens(prefix=prefix)
    start = op.Reshape(op.Constant(value_int=prefix), [1])
    count = op.Shape(best, start=1, end=2)
    cut = op.Reshape(r, [1])
    _, order = op.TopK(best, count, axis=-1, largest=1, sorted=1)
    merged = op.Slice(order, [0], cut, [1])
    others = op.Slice(order, cut, LAST, [1])
    rest, _ = op.TopK(others, op.Shape(others, start=1, end=2), axis=-1, largest=0, sorted=1)
    batch = op.Shape(score, start=0, end=1)
    count_b = op.Shape(score, start=2, end=3)
    slots_b = op.Range(0, op.Squeeze(count_b), 1)
    keep = op.Concat(
        op.Expand(op.Range(0, prefix, 1), op.Concat(batch, start, axis=0)),
        rest * 2 + first_a,
        op.Expand(slots_b * 2 + first_b, op.Concat(batch, count_b, axis=0)),
        axis=1,
    )
    dest = op.GatherElements(partner, merged, axis=1) + (start + count - cut)
    drop = merged * 2 + first_a
    return keep, drop, dest


@script(TOKOPT, default_opset=op)
def bipartite_match(metric: TensorType, size: FLOAT, r: INT64, prefix: int) -> tuple[INT64, INT64, INT64]:
    """See :func:`tokopt.kernels.bipartite_match.reference.bipartite_match`."""
    first_a, first_b = first_tokens(prefix=prefix)
    padding = op.Cast(op.Equal(size, 0.0), to=FLOAT.dtype)
    padding_a = op.Cast(op.Slice(padding, first_a, LAST, [1], [2]), to=BOOL.dtype)
    padding_b = op.Slice(padding, first_b, LAST, [1], [2])
    score = cosines(metric, prefix=prefix) - op.Unsqueeze(padding_b, [1]) * MISMATCH
    best = op.Where(padding_a, INFINITY, op.ReduceMax(score, [-1], keepdims=0))
    partner = op.Where(
        padding_a, op.ArgMax(padding_b, axis=-1, keepdims=1), op.ArgMax(score, axis=-1, keepdims=0)
    )
    keep, drop, dest = merge_best(score, best, partner, r, prefix=prefix)
    return keep, drop, dest


@script(TOKOPT, default_opset=op)
def bipartite_match_real(
    metric: TensorType, size: FLOAT, r: INT64, prefix: int
) -> tuple[INT64, INT64, INT64]:
    """The same where no token is padding, in half as many nodes."""
    score = cosines(metric, prefix=prefix)
    best = op.ReduceMax(score, [-1], keepdims=0)
    partner = op.ArgMax(score, axis=-1, keepdims=0)
    keep, drop, dest = merge_best(score, best, partner, r, prefix=prefix)
    return keep, drop, dest


FUNCTIONS = (first_tokens, cosines, merge_best, bipartite_match, bipartite_match_real)
translation = node(bipartite_match)
