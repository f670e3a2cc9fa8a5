"""The ONNX form of tokopt::move_entries: what is moved is gathered, and then written in place."""

from tokopt.kernels.opset import INT64, TOKOPT, TensorType, node, op24, script


@script(TOKOPT, default_opset=op24)
def move_entries(cache: TensorType, path: INT64, length: INT64) -> TensorType:
    """See :func:`tokopt.kernels.move_entries.reference.move_entries`."""
    slot = op24.Unsqueeze(op24.Unsqueeze(length, [1]) + path, [1, 3])
    # Of the path, and not of the cache, where it can be: those nodes are then the same for all caches.
    batch, nodes = op24.Shape(path, start=0, end=1), op24.Shape(path, start=1, end=2)
    heads, channels = op24.Shape(cache, start=1, end=2), op24.Shape(cache, start=3, end=4)
    index = op24.Expand(slot, op24.Concat(batch, heads, nodes, channels, axis=0))
    return op24.TensorScatter(cache, op24.GatherElements(cache, index, axis=2), length, axis=-2)


FUNCTIONS = (move_entries,)
translation = node(move_entries)
