"""The ONNX forms of tokopt::expert_linear, whose weight they take as [experts, in, out].

Of few tokens the weights of the chosen experts are gathered. Of many, one expert after another multiplies the tokens
that chose it, if any did.
"""

from typing import Any

from tokopt.kernels.opset import FLOAT, INT64, TOKOPT, node, op, script


@script(TOKOPT, default_opset=op)
def gathered_experts(x: FLOAT, chosen: INT64, weight: FLOAT) -> FLOAT:
    """The products of few tokens; what is no expert is taken for the last one."""
    last = op.Shape(weight, start=0, end=1) - 1
    index = op.Where(op.Less(chosen, 0), last, op.Min(chosen, last))
    return op.Squeeze(op.MatMul(op.Unsqueeze(x, [2]), op.Gather(weight, index, axis=0)), [2])


@script(TOKOPT, default_opset=op)
def grouped_experts(x: FLOAT, chosen: INT64, weight: FLOAT) -> FLOAT:
    """The products of many tokens; 0 for what is no expert."""
    experts = op.Shape(weight, start=0, end=1)
    inputs, outputs = op.Shape(weight, start=1, end=2), op.Shape(weight, start=2, end=3)
    shape = op.Concat(op.Shape(chosen), outputs, axis=0)
    rows = op.Reshape(x, op.Concat([-1], inputs, axis=0))
    shared = op.Shape(chosen, start=1, end=2) / op.Shape(x, start=1, end=2)
    pairs = op.Reshape(chosen, [-1])
    made = op.Expand(op.CastLike(0, x), op.Concat(op.Shape(pairs), outputs, axis=0))
    for expert in range(op.Squeeze(experts)):
        own = op.Reshape(op.NonZero(op.Equal(pairs, expert)), [-1])
        first = op.Reshape(expert, [1])
        # Of an expert that no token chose nothing is read: its weight is [0, in, out].
        matrix = op.Slice(weight, first, first + op.Min(op.Shape(own), 1), [0])
        product = op.MatMul(op.Gather(rows, own / shared, axis=0), matrix)
        places = op.Unsqueeze(own, [1])
        made = op.ScatterND(made, places, op.Reshape(product, op.Concat(op.Shape(own), outputs, axis=0)))
    return op.Reshape(made, shape)


@script(TOKOPT, default_opset=op)
def expert_linear(x: FLOAT, chosen: INT64, weight: FLOAT) -> FLOAT:
    """See :func:`tokopt.kernels.expert_linear.reference.expert_linear`; here ``weight`` is [experts, in, out]."""
    experts, tokens = op.Shape(weight, start=0, end=1), op.Shape(chosen, start=0, end=1)
    few = op.Or(op.Equal(tokens, 1), op.LessOrEqual(op.Size(chosen) * 2, experts))
    if op.Squeeze(few):
        made = gathered_experts(x, chosen, weight)
    else:
        made = grouped_experts(x, chosen, weight)
    known = op.And(op.GreaterOrEqual(chosen, 0), op.Less(chosen, experts))
    return op.Where(op.Unsqueeze(known, [2]), made, op.CastLike(0, x))


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


FUNCTIONS = (gathered_experts, grouped_experts, expert_linear, take_expert)
_record = node(expert_linear)


def translation(x: Any, chosen: Any, weight: Any) -> Any:
    """A call of the function, which wants the weight the other way round."""
    return _record(x, chosen, op.Transpose(weight, perm=[0, 2, 1]))
