"""The ONNX form of tokopt::cache_mask: what is seen of past and new tokens, and where the new ones are."""

from tokopt.kernels.opset import BOOL, INT64, TOKOPT, node, op, script


@script(TOKOPT, default_opset=op)
def full_view(slots: INT64, positions: INT64, own: BOOL) -> tuple[BOOL, BOOL]:
    """Past [B, heads, 1, slots] and new tokens [B, tokens, tokens] that are no padding."""
    past = op.GreaterOrEqual(op.Transpose(slots, perm=[0, 1, 3, 2]), 0)
    return past, op.And(own, op.Unsqueeze(op.GreaterOrEqual(positions, 0), [1]))


@script(TOKOPT, default_opset=op)
def sliding_view(slots: INT64, positions: INT64, own: BOOL, window: int) -> tuple[BOOL, BOOL]:
    """Past [B, heads, tokens, slots] and new tokens [B, tokens, tokens] inside the window."""
    reach = op.Constant(value_int=window)
    held = op.Transpose(slots, perm=[0, 1, 3, 2])
    near = op.Less(op.Unsqueeze(positions, [1, 3]) - held, reach)
    past = op.And(op.GreaterOrEqual(held, 0), near)
    new = op.Less(op.Unsqueeze(positions, [2]) - op.Unsqueeze(positions, [1]), reach)
    return past, op.And(op.And(own, new), op.Unsqueeze(op.GreaterOrEqual(positions, 0), [1]))


@script(TOKOPT, default_opset=op)
def cache_mask(past: BOOL, new: BOOL, length: INT64) -> BOOL:
    """See :func:`tokopt.kernels.cache_mask.reference.cache_mask`: ``new`` goes to the slots written last."""
    tokens = op.Shape(new, start=1, end=2)
    index = op.Range(0, op.Squeeze(tokens), 1)
    sees = op.Or(new, op.Equal(op.Unsqueeze(index, [1]), op.Unsqueeze(index, [0])))
    slot = op.Range(0, op.Squeeze(op.Shape(past, start=3)), 1)
    column = op.Unsqueeze(slot, [0]) - op.Unsqueeze(length, [1])
    written = op.And(op.GreaterOrEqual(column, 0), op.Less(column, tokens))
    inside = op.Unsqueeze(op.Min(op.Max(column, 0), tokens - 1), [1])
    moved = op.GatherElements(sees, op.Expand(inside, op.Concat([1], tokens, [1], axis=0)), axis=2)
    here = op.Unsqueeze(written, [1, 2])  # ONNX Runtime has no Where of booleans
    return op.Or(op.And(here, op.Unsqueeze(moved, [1])), op.And(op.Not(here), past))


FUNCTIONS = (full_view, sliding_view, cache_mask)
_full, _sliding, _mask = node(full_view), node(sliding_view), node(cache_mask)


def translation(slots, positions, own, length, window: int):
    """Compose the view that ``window`` needs and the placing of the new tokens."""
    view = _sliding(slots, positions, own, window) if window else _full(slots, positions, own)
    return _mask(*view, length)
