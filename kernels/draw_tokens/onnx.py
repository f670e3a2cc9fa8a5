"""The ONNX form of tokopt::draw_tokens: a distribution over the vocabulary, and a draw from it."""

from tokopt.kernels.draw.onnx import draw
from tokopt.kernels.opset import FLOAT, INT64, TOKOPT, TensorType, node, op, script
from tokopt.kernels.truncated_softmax.onnx import truncated_softmax

NAN = float("nan")


@script(TOKOPT, default_opset=op)
def draw_tokens(
    logits: TensorType, uniform: FLOAT, temperature: FLOAT, top_k: INT64, top_p: FLOAT, min_p: FLOAT
) -> tuple[INT64, FLOAT]:
    """See :func:`tokopt.kernels.draw_tokens.reference.draw_tokens`."""
    token = draw(truncated_softmax(logits, temperature, top_k, top_p, min_p), uniform)
    wide = op.Cast(logits, to=FLOAT.dtype)
    below = wide - op.ReduceMax(wide, [-1], keepdims=1)
    chosen = op.Squeeze(op.GatherElements(below, op.Unsqueeze(op.Max(token, 0), [2]), axis=2), [2])
    logprob = chosen - op.Log(op.ReduceSum(op.Exp(below), [-1], keepdims=0))
    return token, op.Where(op.Less(token, 0), NAN, logprob)


FUNCTIONS = (draw_tokens,)
translation = node(draw_tokens)
