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
    # Sums of ONNX Runtime's reductions lose digits over a vocabulary, those of its LogSoftmax do not.
    known = op.LogSoftmax(op.Cast(logits, to=FLOAT.dtype), axis=-1)
    logprob = op.Squeeze(op.GatherElements(known, op.Unsqueeze(op.Max(token, 0), [2]), axis=2), [2])
    return token, op.Where(op.Less(token, 0), NAN, logprob)


FUNCTIONS = (draw_tokens,)
translation = node(draw_tokens)
