"""SmoothQuant: move the outliers of activations into the weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from tokopt.analysis.calibration import Site, collect
from tokopt.analysis.linears import find_linears, matches
from tokopt.analysis.samples import Sample
from tokopt.errors import PassError
from tokopt.ir.bundle import Bundle, Semantics
from tokopt.pipeline.base import Context, Pass, PassResult, Refusal, on_entries
from tokopt.rewrite.edit import close_graph, open_graph
from tokopt.rewrite.scales import by_input, division, rescale

SMALLEST = 1e-5


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Exact rewrite before ``int8`` (arXiv 2211.10438): channel j of a linear's input is divided by s_j.

    ``s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)``, over the calibration inputs and over all linears that read x, at
    least 1e-5. The division goes into the norm before, or into the linear before. In floating point nothing changes.

    Rules. Linears whose input cannot take the division (attention's output, say) are left alone: a multiplication of
    its own would cost more than it helps.
    """

    alpha: float = 0.5
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    name: ClassVar[str] = "smoothquant"
    semantics: ClassVar[Semantics] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise PassError(f"{self.name}: alpha={self.alpha} must be 0 to 1")

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Rescale every group of linears that reads the output of a norm or of another linear."""
        samples = context.samples(self.name)
        return on_entries(bundle, lambda before, name: self._smooth(before, name, samples))

    def _smooth(self, bundle: Bundle, name: str, samples: Iterable[Sample]) -> PassResult:
        """Rescale the groups of one program."""
        program = bundle.programs[name]
        module = open_graph(program)
        linears = [one for one in find_linears(module.graph) if matches(one.path, self.only, self.skip)]
        groups = [group for group in by_input(linears) if division(module, group) is not None]
        left = [group for group in by_input(linears) if group not in groups]
        refusals = tuple(Refusal(group[0].path, "nothing before it can take the division") for group in left)
        if not groups:
            return PassResult(bundle, 0, (), refusals)
        known = collect(Site(bundle, name, module), [group[0].input for group in groups], samples)
        for group in groups:
            moments = known[group[0].input]
            columns = torch.stack([linear.matrix(module).abs().amax(0) for linear in group]).amax(0)
            scale = moments.largest.clamp(min=SMALLEST) ** self.alpha
            scale = scale / columns.clamp(min=SMALLEST) ** (1 - self.alpha)
            rescale(module, group, scale.clamp(min=SMALLEST))
        changed = bundle.with_program(name, close_graph(program, module))
        return PassResult(changed, sum(map(len, groups)), (), refusals)
