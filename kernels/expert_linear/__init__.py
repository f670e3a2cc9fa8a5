"""tokopt::expert_linear, and ``tokopt.cpu::ExpertLinear``: products with weights of the experts that were chosen."""

from __future__ import annotations

import math

from tokopt.kernels.declaration import Op, Shape, Work


def work(x: Shape, chosen: Shape, weight: Shape) -> Work:
    """Every chosen expert is multiplied once for its token; of the weights those are read that some token chose."""
    pairs, (experts, outputs, inputs) = math.prod(chosen), weight
    numbers = min(pairs, experts) * outputs * inputs
    return Work(2.0 * pairs * outputs * inputs, 4.0 * (numbers + math.prod(x) + pairs * outputs))


OP = Op(work=work)
