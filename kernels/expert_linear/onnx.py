"""The ONNX forms of tokopt::expert_linear, whose weight they take as [experts, in, out].

One expert after another multiplies the tokens that chose it, if any did: ``Scan`` hands each its weight without a copy.
"""

from typing import Any

from onnxscript import graph

from tokopt.kernels.opset import BOOL, FLOAT, INT64, TOKOPT, node, op, script


@script(TOKOPT, default_opset=op)
def multiplied(made: FLOAT, rows: FLOAT, pairs: INT64, readers: INT64, matrix: FLOAT) -> FLOAT:
    """``made`` [pairs, out] with those of ``pairs`` [1, n]: ``readers`` pairs in a row read one of ``rows``."""
    own = op.Reshape(pairs, [-1])
    product = op.MatMul(op.Gather(rows, own / readers, axis=0), matrix)
    return op.ScatterND(made, op.Unsqueeze(own, [1]), product)


@script(TOKOPT, default_opset=op)
def expert_linear(x: FLOAT, chosen: INT64, weight: FLOAT) -> FLOAT:
    """See :func:`tokopt.kernels.expert_linear.reference.expert_linear`; here ``weight`` is [experts, in, out]."""
    inputs, outputs = op.Shape(weight, start=1, end=2), op.Shape(weight, start=2, end=3)
    rows = op.Reshape(x, op.Concat([-1], inputs, axis=0))
    readers = op.Shape(chosen, start=1, end=2) / op.Shape(x, start=1, end=2)
    pairs = op.Reshape(chosen, [-1])
    nothing = op.Expand(op.CastLike(0, x), op.Concat(op.Shape(pairs), outputs, axis=0))
    experts = op.Range(0, op.Squeeze(op.Shape(weight, start=0, end=1)), 1)

    wanted = op.ReduceMax(
        op.Cast(op.Equal(pairs, op.Unsqueeze(experts, [1])), to=INT64.dtype), [1], keepdims=0
    )

    @graph()
    def with_expert(made: FLOAT[...], expert: INT64, hit: BOOL, matrix: FLOAT[...]) -> FLOAT[...]:
        if hit:
            after = multiplied(made, rows, op.NonZero(op.Equal(pairs, expert)), readers, matrix)
        else:
            after = op.Identity(made)
        return after

    hits = op.Cast(wanted, to=BOOL.dtype)
    made = op.Scan(nothing, experts, hits, weight, body=with_expert, num_scan_inputs=3)
    return op.Reshape(made, op.Concat(op.Shape(chosen), outputs, axis=0))


@script(TOKOPT, default_opset=op)
def take_expert(every: FLOAT, chosen: INT64, experts: int) -> FLOAT:
    """See :func:`tokopt.kernels.expert_linear.reference.take_expert`."""
    count = op.Reshape(op.Constant(value_int=experts), [1])
    outputs = op.Shape(every, start=2, end=3) / count
    split = op.Reshape(every, op.Concat(op.Shape(every, start=0, end=2), count, outputs, axis=0))
    place = op.Range(0, op.Squeeze(count), 1)
    own = op.CastLike(op.Equal(op.Unsqueeze(chosen, [2]), place), every)
    return op.Squeeze(op.MatMul(op.Unsqueeze(own, [2]), split), [2])


@script(TOKOPT, default_opset=op)
def every_expert_linear(x: FLOAT, chosen: INT64, weight: FLOAT) -> FLOAT:
    """``expert_linear`` without sizes that depend on what was chosen, at the cost of all experts."""
    experts, inputs = op.Shape(weight, start=0, end=1), op.Shape(weight, start=1, end=2)
    outputs = op.Shape(weight, start=2, end=3)
    every = op.MatMul(x, op.Reshape(op.Transpose(weight, perm=[1, 0, 2]), op.Concat(inputs, [-1], axis=0)))
    split = op.Reshape(every, op.Concat(op.Shape(every, start=0, end=2), experts, outputs, axis=0))
    place = op.Range(0, op.Squeeze(experts), 1)
    own = op.CastLike(op.Equal(op.Unsqueeze(chosen, [2]), place), every)
    return op.Squeeze(op.MatMul(op.Unsqueeze(own, [2]), split), [2])


FUNCTIONS = (multiplied, expert_linear, take_expert)
_record = node(expert_linear)


def translation(x: Any, chosen: Any, weight: Any) -> Any:
    """A call of the function, which wants the weight the other way round."""
    return _record(x, chosen, op.Transpose(weight, perm=[0, 2, 1]))
