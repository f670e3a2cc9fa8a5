"""The ONNX form of tokopt::latest_repeat: one comparison of the whole text for each entry that is looked for."""

from tokopt.kernels.opset import BOOL, INT64, TOKOPT, TensorType, node, op, script


@script(TOKOPT, default_opset=op)
def entry_repeats(text: TensorType, end: INT64, back: INT64) -> BOOL:
    """Whether the entry ``back`` [1] before each place is that before ``end`` [batch, 1]; not where there is none."""
    size = op.Shape(text, start=1, end=2)
    padded = op.Pad(text, op.Concat([0], back, [0, 0], axis=0), op.CastLike(0, text))
    same = op.Equal(op.Slice(padded, [0], size, [1]), op.GatherElements(text, op.Max(end - back, 0), axis=1))
    return op.And(same, op.GreaterOrEqual(op.Range(0, op.Squeeze(size), 1), back))


@script(TOKOPT, default_opset=op)
def latest_repeat(text: TensorType, end: INT64) -> tuple[INT64, INT64]:
    """See :func:`tokopt.kernels.latest_repeat.reference.latest_repeat`."""
    size = op.Shape(text, start=1, end=2)
    place = op.Range(0, op.Squeeze(size), 1)
    last = op.Unsqueeze(end, [1])
    one = op.And(entry_repeats(text, last, [0]), op.Less(place, last))
    two = op.And(one, entry_repeats(text, last, [1]))
    three = op.And(two, entry_repeats(text, last, [2]))
    length = op.Cast(one, to=INT64.dtype) + op.Cast(two, to=INT64.dtype) + op.Cast(three, to=INT64.dtype)
    best = op.ReduceMax(length * size + place, [1], keepdims=0)
    agreed = best / size
    return op.Where(op.Greater(agreed, 0), best - agreed * size, -1), agreed


FUNCTIONS = (entry_repeats, latest_repeat)
translation = node(latest_repeat)
