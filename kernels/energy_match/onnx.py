"""The ONNX form of tokopt::energy_match."""

from tokopt.kernels.opset import BOOL, FLOAT, INFINITY, INT64, LAST, TOKOPT, TensorType, node, op, script
from tokopt.kernels.shared import MISMATCH, TINY


@script(TOKOPT, default_opset=op)
def energies(unit: FLOAT, real: BOOL, margin: float) -> FLOAT:
    """Of unit vectors [batch, tokens, channels], over those that are real; the others get infinity."""
    one = op.Cast(real, to=FLOAT.dtype)
    weight = one / op.Max(op.ReduceSum(one, [-1], keepdims=1), 1.0)
    near = op.Elu(op.MatMul(unit, op.Transpose(unit, perm=[0, 2, 1])) - margin)
    return op.Where(real, op.Squeeze(op.MatMul(near, op.Unsqueeze(weight, [2])), [2]), INFINITY)


@script(TOKOPT, default_opset=op)
def energy_order(metric: TensorType, size: FLOAT, prefix: int, margin: float) -> tuple[FLOAT, BOOL, INT64]:
    """The unit vectors of the unprotected tokens, which of them are real, and their order by energy, highest first."""
    start = op.Reshape(op.Constant(value_int=prefix), [1])
    x = op.Cast(op.Slice(metric, start, LAST, [1]), to=FLOAT.dtype)
    unit = x / op.Max(op.ReduceL2(x, [-1], keepdims=1), TINY)
    real = op.Greater(op.Slice(size, start, LAST, [1]), 0.0)
    energy = energies(unit, real, margin=margin)
    _, order = op.TopK(energy, op.Shape(energy, start=1, end=2), axis=-1, largest=1, sorted=1)
    return unit, real, order


@script(TOKOPT, default_opset=op)
def energy_match(
    metric: TensorType, size: FLOAT, r: INT64, prefix: int, margin: float
) -> tuple[INT64, INT64, INT64]:
    """See :func:`tokopt.kernels.energy_match.reference.energy_match`."""
    unit, real, order = energy_order(metric, size, prefix=prefix, margin=margin)
    start = op.Reshape(op.Constant(value_int=prefix), [1])
    one = op.Cast(real, to=FLOAT.dtype)
    count = op.Shape(order, start=1, end=2)
    removed = op.Reshape(r, [1])
    cut = removed * 2
    a = op.Slice(order, [0], cut, [1], [2])
    b = op.Slice(order, [1], cut, [1], [2])
    others = op.Slice(order, cut, LAST, [1])
    rest, _ = op.TopK(others, op.Shape(others, start=1, end=2), axis=-1, largest=0, sorted=1)
    # One b stays in the comparison when r is 0: ArgMax needs something to choose from.
    candidates = op.Slice(order, [1], op.Max(cut, [2]), [1], [2])
    unit_a = op.GatherND(unit, op.Unsqueeze(a, [2]), batch_dims=1)
    unit_b = op.GatherND(unit, op.Unsqueeze(candidates, [2]), batch_dims=1)
    one_a = op.Unsqueeze(op.GatherElements(one, a, axis=1), [2])
    one_b = op.Unsqueeze(op.GatherElements(one, candidates, axis=1), [1])
    score = op.MatMul(unit_a, op.Transpose(unit_b, perm=[0, 2, 1])) - op.Abs(one_a - one_b) * MISMATCH
    protected = op.Expand(op.Range(0, prefix, 1), op.Concat(op.Shape(size, start=0, end=1), start, axis=0))
    keep = op.Concat(protected, rest + start, b + start, axis=1)
    drop = a + start
    dest = op.ArgMax(score, axis=-1, keepdims=0) + (start + count - cut)
    return keep, drop, dest


FUNCTIONS = (energies, energy_order, energy_match)
translation = node(energy_match)
