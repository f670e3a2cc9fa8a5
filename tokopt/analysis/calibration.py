"""Statistics of the inputs of linear layers over a user's own data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from tokopt.analysis.samples import Sample, read_samples
from tokopt.errors import InputError
from tokopt.ir.bundle import Bundle
from tokopt.ir.graph import sizes

Observer = Callable[[Tensor], None]
"""What is called with every value of a node."""


@dataclass
class Moments:
    """What is kept of the inputs x [rows, in] of a layer.

    ``gram`` [in, in] float32 is the mean of ``x^T x``, ``mean`` [in] that of ``|x|``, ``largest`` [in] the largest
    ``|x|``, ``low`` and ``high`` the range of all.
    """

    gram: Tensor
    mean: Tensor
    largest: Tensor
    low: float = 0.0
    high: float = 0.0
    rows: int = 0

    @classmethod
    def empty(cls, channels: int) -> Moments:
        return cls(torch.zeros(channels, channels), torch.zeros(channels), torch.zeros(channels))

    def add(self, x: Tensor) -> None:
        """Count further inputs [..., in]; raises InputError for NaN and infinite ones, which say nothing of a layer."""
        x = x.detach().float().flatten(0, -2)
        before, self.rows = self.rows, self.rows + x.shape[0]
        self.gram.mul_(before / self.rows).addmm_(x.T, x, alpha=1 / self.rows)
        self.mean.mul_(before / self.rows).add_(x.abs().sum(0), alpha=1 / self.rows)
        self.largest = torch.maximum(self.largest, x.abs().amax(0))
        if not bool(self.largest.isfinite().all()):
            raise InputError(
                "a calibration sample gives a layer inputs that are NaN or infinite; give samples of finite numbers"
            )
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))


@dataclass(frozen=True)
class Site:
    """A program of a bundle, and its graph while a pass edits it."""

    bundle: Bundle
    name: str
    module: GraphModule


def collect(site: Site, nodes: Sequence[Node], samples: Iterable[Sample]) -> dict[Node, Moments]:
    """The moments of ``nodes`` over all samples; see :func:`observe`."""
    moments = {node: Moments.empty(sizes(node)[-1]) for node in nodes}
    observe(site, {node: moment.add for node, moment in moments.items()}, samples)
    return moments


def observe(site: Site, observers: Mapping[Node, Observer], samples: Iterable[Sample]) -> None:
    """Show every observer the values of its node of the site's graph, sample after sample.

    Programs that the site's program reads from run before it. Only what observers keep is held, never the activations.
    Raises InputError for samples that do not fit, and when there are none.
    """
    watch = _Watch(site.module, observers)
    for given in read_samples(site.bundle, samples):
        with torch.no_grad():
            watch.run(*site.bundle.calls(given).inputs(site.name), enable_io_processing=False)


class _Watch(Interpreter):
    """Runs a graph and shows the values of some nodes."""

    def __init__(self, module: GraphModule, observers: Mapping[Node, Observer]) -> None:
        super().__init__(module)
        self.observers = observers

    def run_node(self, n: Node) -> object:
        result = super().run_node(n)
        if n in self.observers:
            assert isinstance(result, Tensor)
            self.observers[n](result)
        return result
