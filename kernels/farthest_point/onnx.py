"""The ONNX form of tokopt::farthest_point: one function per method's distances, and one for the selection."""

from tokopt.kernels.opset import (
    FLOAT,
    INFINITY,
    INT64,
    LAST,
    TOKOPT,
    Given,
    TensorType,
    maker,
    node,
    op,
    script,
)
from tokopt.kernels.shared import TINY

NOTHING = -INFINITY


@script(TOKOPT, default_opset=op)
def divprune_distance(metric: TensorType, size: FLOAT, prefix: int) -> tuple[FLOAT, INT64]:
    """1 - cos of the unprotected tokens [B, M, M], and the first one [B]: its nearest other is farthest."""
    start = op.Reshape(op.Constant(value_int=prefix), [1])
    real = op.Greater(op.Slice(size, start, LAST, [1]), 0.0)
    x = op.Cast(op.Slice(metric, start, LAST, [1]), to=FLOAT.dtype)
    unit = x / op.Max(op.ReduceL2(x, [-1], keepdims=1), TINY)
    distance = 1.0 - op.MatMul(unit, op.Transpose(unit, perm=[0, 2, 1]))
    index = op.Range(0, op.Squeeze(op.Shape(real, start=1, end=2)), 1)
    itself = op.Equal(op.Unsqueeze(index, [1]), op.Unsqueeze(index, [0]))
    others = op.And(op.Unsqueeze(real, [1]), op.Not(itself))
    apart = op.ReduceMin(op.Where(others, distance, INFINITY), [-1], keepdims=0)
    first = op.ArgMax(op.Where(real, apart, NOTHING), axis=-1, keepdims=0)
    return distance, first


@script(TOKOPT, default_opset=op)
def kcenter_distance(metric: TensorType, size: FLOAT, prefix: int) -> tuple[FLOAT, INT64]:
    """Squared distances of the unprotected tokens [B, M, M], and the first one [B]: nearest to their mean."""
    start = op.Reshape(op.Constant(value_int=prefix), [1])
    real = op.Greater(op.Slice(size, start, LAST, [1]), 0.0)
    x = op.Cast(op.Slice(metric, start, LAST, [1]), to=FLOAT.dtype)
    one = op.Cast(real, to=FLOAT.dtype)
    weight = one / op.Max(op.ReduceSum(one, [-1], keepdims=1), 1.0)
    centred = x - op.MatMul(op.Unsqueeze(weight, [1]), x)
    norm = op.ReduceSumSquare(centred, [-1], keepdims=0)
    gram = op.MatMul(centred, op.Transpose(centred, perm=[0, 2, 1]))
    distance = op.Unsqueeze(norm, [2]) + op.Unsqueeze(norm, [1]) - gram * 2.0
    first = op.ArgMax(op.Where(real, -norm, NOTHING), axis=-1, keepdims=0)
    return distance, first


@script(TOKOPT, default_opset=op)
def farthest_point(distance: FLOAT, first: INT64, size: FLOAT, r: INT64, prefix: int) -> tuple[INT64, INT64]:
    """See :func:`tokopt.kernels.farthest_point.reference.farthest_point`; one Loop whose step is O(M)."""
    start = op.Reshape(op.Constant(value_int=prefix), [1])
    real = op.Greater(op.Slice(size, start, LAST, [1]), 0.0)
    tokens = op.Shape(real, start=1, end=2)
    index = op.Range(0, op.Squeeze(tokens), 1)
    itself = op.Equal(op.Unsqueeze(index, [1]), op.Unsqueeze(index, [0]))
    # -inf on the diagonal takes a token out for good once chosen; -1 puts padding behind every real token.
    ordered = op.Where(op.Unsqueeze(real, [1]), op.Max(distance, 0.0), -1.0)
    table = op.Reshape(op.Where(itself, NOTHING, ordered), op.Concat([-1], tokens, axis=0))
    row = op.Range(0, op.Squeeze(op.Shape(real, start=0, end=1)), 1) * tokens
    nearest = op.Gather(table, row + first, axis=0)
    for _ in range(op.Squeeze(tokens) - r - 1):
        nearest = op.Min(nearest, op.Gather(table, row + op.ArgMax(nearest, axis=-1, keepdims=0), axis=0))
    # Distinct keys, chosen tokens first, so that the order rests on no tie rule.
    key = op.Cast(op.Where(op.Less(nearest, -1.5), index, index + tokens), to=FLOAT.dtype)
    _, order = op.TopK(key, tokens, axis=-1, largest=0, sorted=1)
    cut = tokens - op.Reshape(r, [1])
    protected = op.Expand(op.Range(0, prefix, 1), op.Concat(op.Shape(size, start=0, end=1), start, axis=0))
    keep = op.Concat(protected, op.Slice(order, [0], cut, [1]) + start, axis=1)
    drop = op.Slice(order, cut, LAST, [1]) + start
    return keep, drop


FUNCTIONS = (divprune_distance, kcenter_distance, farthest_point)
_MEASURES = {"divprune": node(divprune_distance), "kcenter": node(kcenter_distance)}
_select = node(farthest_point)


def translation(metric, size, r, prefix: int, method: str):
    """Compose the two functions that ``method`` needs."""
    distance, first = _MEASURES[method](metric, size, prefix)
    return _select(distance, first, size, r, prefix)


def arguments(given: Given) -> Given:
    """The distances come from a function of their own, named by the method."""
    measured = maker(given["distance"])
    return {"metric": measured.inputs[0], "method": measured.op_type.removesuffix("_distance")}
