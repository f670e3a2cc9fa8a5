"""The ONNX form of tokopt::source_map."""

from tokopt.kernels.opset import INT64, TOKOPT, node, op, script


@script(TOKOPT, default_opset=op)
def source_map(keep: INT64, drop: INT64, dest: INT64) -> INT64:
    """See :func:`tokopt.kernels.source_map.reference.source_map`."""
    slots = op.Range(0, op.Squeeze(op.Shape(keep, start=1, end=2)), 1)
    old = op.Concat(keep, drop, axis=1)
    new = op.Concat(op.Expand(slots, op.Shape(keep)), dest, axis=1)
    return op.ScatterElements(old, old, new, axis=1)  # every index once


FUNCTIONS = (source_map,)
translation = node(source_map)
