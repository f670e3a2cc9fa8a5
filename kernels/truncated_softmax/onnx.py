"""The ONNX form of tokopt::truncated_softmax: two loops of bisections, without a turn where no row asks for them."""

from tokopt.kernels.opset import FLOAT, INT64, TOKOPT, TensorType, node, op, script
from tokopt.kernels.shared import TINY
from tokopt.kernels.truncated_softmax.reference import HALVINGS, LOWEST


@script(TOKOPT, default_opset=op)
def largest_threshold(scaled: FLOAT, weight: FLOAT, wanted: FLOAT, halvings: INT64) -> FLOAT:
    """The largest threshold [.., 1] such that the weights of what lies at or above it sum to ``wanted`` or more."""
    low = wanted * 0.0 + LOWEST
    high = wanted * 0.0 + 1.0
    for _ in range(halvings):
        middle = (low + high) * 0.5
        inside = op.Where(op.GreaterOrEqual(scaled, middle), weight, 0.0)
        enough = op.GreaterOrEqual(op.ReduceSum(inside, [-1], keepdims=1), wanted)
        low = op.Where(enough, middle, low)
        high = op.Where(enough, high, middle)
    return low


@script(TOKOPT, default_opset=op)
def truncated_softmax(
    logits: TensorType, temperature: FLOAT, top_k: INT64, top_p: FLOAT, min_p: FLOAT
) -> FLOAT:
    """See :func:`tokopt.kernels.truncated_softmax.reference.truncated_softmax`."""
    wide = op.Cast(logits, to=FLOAT.dtype)
    warm = op.Unsqueeze(temperature, [1, 2])
    below = wide - op.ReduceMax(wide, [-1], keepdims=1)
    scaled = op.Where(op.Equal(below, 0.0), 0.0, below / op.Max(warm, TINY))
    weight = op.Exp(scaled)
    nothing = op.ReduceSum(weight, [-1], keepdims=1) * 0.0
    count = op.Where(op.Greater(top_k, 0), top_k, op.Shape(logits, start=2, end=3))
    wanted = op.Cast(op.Unsqueeze(count, [1, 2]), to=FLOAT.dtype) + nothing
    halvings = op.Where(op.Greater(op.ReduceMax(top_k, keepdims=0), 0), HALVINGS, 0)
    least = largest_threshold(scaled, op.CastLike(1.0, weight), wanted, halvings)
    kept = op.Where(op.GreaterOrEqual(scaled, least), weight, 0.0)
    share = op.Unsqueeze(top_p, [1, 2])
    halvings = op.Where(op.Less(op.ReduceMin(top_p, keepdims=0), 1.0), HALVINGS, 0)
    least = largest_threshold(scaled, kept, share * op.ReduceSum(kept, [-1], keepdims=1), halvings)
    likely = op.Where(op.Or(op.GreaterOrEqual(share, 1.0), op.GreaterOrEqual(scaled, least)), kept, 0.0)
    left = op.Where(op.GreaterOrEqual(weight, op.Unsqueeze(min_p, [1, 2])), likely, 0.0)
    index = op.Range(0, op.Squeeze(op.Shape(logits, start=2, end=3)), 1)
    first = op.Cast(op.Equal(op.ArgMax(wide, axis=-1, keepdims=1), index), to=FLOAT.dtype)
    return op.Where(op.Greater(warm, 0.0), left / op.ReduceSum(left, [-1], keepdims=1), first) + nothing


FUNCTIONS = (largest_threshold, truncated_softmax)
translation = node(truncated_softmax)
