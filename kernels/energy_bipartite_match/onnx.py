"""The ONNX form of tokopt::energy_bipartite_match."""

from tokopt.kernels.bipartite_match.onnx import bipartite_match
from tokopt.kernels.energy_match.onnx import energy_order
from tokopt.kernels.opset import FLOAT, INT64, LAST, TOKOPT, TensorType, node, op, script


@script(TOKOPT, default_opset=op)
def energy_bipartite_match(
    metric: TensorType, size: FLOAT, r: INT64, prefix: int, margin: float
) -> tuple[INT64, INT64, INT64]:
    """See :func:`tokopt.kernels.energy_bipartite_match.reference.energy_bipartite_match`."""
    unit, _, order = energy_order(metric, size, prefix=prefix, margin=margin)
    start = op.Reshape(op.Constant(value_int=prefix), [1])
    ranked = op.GatherND(unit, op.Unsqueeze(order, [2]), batch_dims=1)
    sizes = op.GatherElements(op.Slice(size, start, LAST, [1]), order, axis=1)
    kept, dropped, joined = bipartite_match(ranked, sizes, r, prefix=0)
    protected = op.Expand(op.Range(0, prefix, 1), op.Concat(op.Shape(size, start=0, end=1), start, axis=0))
    keep = op.Concat(protected, op.GatherElements(order, kept, axis=1) + start, axis=1)
    drop = op.GatherElements(order, dropped, axis=1) + start
    dest = joined + start
    return keep, drop, dest


FUNCTIONS = (energy_bipartite_match,)
translation = node(energy_bipartite_match)
