"""The ONNX form of tokopt::keep_slots."""

from tokopt.kernels.opset import BOOL, FLOAT, INFINITY, INT64, LAST, TOKOPT, TensorType, node, op, script


@script(TOKOPT, default_opset=op)
def keep_slots(score: TensorType, used: BOOL, budget: INT64, sinks: int, recent: int) -> BOOL:
    """See :func:`tokopt.kernels.keep_slots.reference.keep_slots`."""
    oldest = op.Constant(value_int=sinks)
    newest = op.Constant(value_int=recent)
    older = op.CumSum(op.Cast(used, to=INT64.dtype), 1) - 1
    last = op.Slice(older, [-1], LAST, [1])
    guarded = op.Or(op.Less(older, oldest), op.Less(last - older, newest))
    protected = op.Unsqueeze(op.And(used, guarded), [1])
    priority = op.Where(op.Unsqueeze(used, [1]), op.Cast(score, to=FLOAT.dtype), -INFINITY)
    priority = op.Where(protected, INFINITY, priority)
    slots = op.Shape(score, start=2)
    _, order = op.TopK(priority, slots, axis=-1, largest=1, sorted=1)
    count = op.Min(op.Unsqueeze(budget, [1]), last + 1)
    first = op.Less(op.Range(0, op.Squeeze(slots), 1), op.Unsqueeze(count, [1]))
    first = op.Expand(first, op.Shape(order))
    return op.ScatterElements(first, order, first, axis=-1)


FUNCTIONS = (keep_slots,)
translation = node(keep_slots)
