"""The ONNX form of tokopt::uniforms: words of 32 bits in int64, whose standard ops have no unsigned arithmetic."""

from tokopt.kernels.opset import FLOAT, INT64, TOKOPT, node, op, script
from tokopt.kernels.uniforms.reference import PARITY, WORD

BASE = WORD + 1


@script(TOKOPT, default_opset=op)
def threefry_round(x: INT64, y: INT64, factor: int) -> tuple[INT64, INT64]:
    """One round; ``factor`` is 2 to the power of the bits that it rotates by."""
    added = op.BitwiseAnd(x + y, WORD)
    wide = y * op.Constant(value_int=factor)
    rotated = op.BitwiseAnd(wide, WORD) + wide / BASE
    return added, op.BitwiseXor(rotated, added)


@script(TOKOPT, default_opset=op)
def threefry_rounds(
    x: INT64, y: INT64, a: INT64, b: INT64, first: int, second: int, third: int, fourth: int, group: int
) -> tuple[INT64, INT64]:
    """Four rounds, after which two words of the key are added, and the group's number."""
    x, y = threefry_round(x, y, factor=first)
    x, y = threefry_round(x, y, factor=second)
    x, y = threefry_round(x, y, factor=third)
    x, y = threefry_round(x, y, factor=fourth)
    return op.BitwiseAnd(x + a, WORD), op.BitwiseAnd(y + b + op.Constant(value_int=group), WORD)


@script(TOKOPT, default_opset=op)
def uniforms(seed: INT64, stream: INT64, counter: INT64, count: INT64) -> FLOAT:
    """See :func:`tokopt.kernels.uniforms.reference.uniforms`."""
    a = op.BitwiseAnd(op.Unsqueeze(seed, [1]), WORD)
    b = op.BitwiseAnd(op.Unsqueeze(stream, [1]), WORD)
    c = op.BitwiseXor(op.BitwiseXor(a, b), PARITY)
    number = op.Unsqueeze(counter, [1]) + op.Unsqueeze(op.Range(0, op.Squeeze(count), 1), [0])
    x = op.BitwiseAnd(number + a, WORD)
    y = op.BitwiseAnd(op.Unsqueeze(seed, [1]) / BASE + b, WORD)
    y = y + x * 0  # of the shape of x
    x, y = threefry_rounds(x, y, b, c, first=2**13, second=2**15, third=2**26, fourth=2**6, group=1)
    x, y = threefry_rounds(x, y, c, a, first=2**17, second=2**29, third=2**16, fourth=2**24, group=2)
    x, y = threefry_rounds(x, y, a, b, first=2**13, second=2**15, third=2**26, fourth=2**6, group=3)
    x, y = threefry_rounds(x, y, b, c, first=2**17, second=2**29, third=2**16, fourth=2**24, group=4)
    x, y = threefry_rounds(x, y, c, a, first=2**13, second=2**15, third=2**26, fourth=2**6, group=5)
    return op.Cast(x / 256, to=FLOAT.dtype) * 5.9604644775390625e-08


FUNCTIONS = (threefry_round, threefry_rounds, uniforms)
translation = node(uniforms)
