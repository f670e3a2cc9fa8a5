"""Statistics of the inputs of linear layers over a user's own data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from tokopt.errors import InputError
from tokopt.ir.bundle import Bundle
from tokopt.ir.calls import first_call
from tokopt.ir.graph import sizes
from tokopt.progress import track

Sample = Tensor | np.ndarray | Sequence[Tensor] | Sequence[np.ndarray] | Sequence[int]
"""The inputs of ``forward`` in order, or one alone; for a language model the ids of a text."""

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
        """Count further inputs [..., in]."""
        x = x.detach().float().flatten(0, -2)
        before, self.rows = self.rows, self.rows + x.shape[0]
        self.gram.mul_(before / self.rows).addmm_(x.T, x, alpha=1 / self.rows)
        self.mean.mul_(before / self.rows).add_(x.abs().sum(0), alpha=1 / self.rows)
        self.largest = torch.maximum(self.largest, x.abs().amax(0))
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))


def collect(
    bundle: Bundle, module: GraphModule, nodes: Sequence[Node], samples: Iterable[Sample]
) -> dict[Node, Moments]:
    """The moments of ``nodes`` over all samples; see :func:`observe`."""
    moments = {node: Moments.empty(sizes(node)[-1]) for node in nodes}
    observe(bundle, module, {node: moment.add for node, moment in moments.items()}, samples)
    return moments


def observe(
    bundle: Bundle, module: GraphModule, observers: Mapping[Node, Observer], samples: Iterable[Sample]
) -> None:
    """Show every observer the values of its node, sample after sample.

    ``module`` is the graph of the bundle's main program. Only what observers keep is held, never the activations.
    Raises InputError for samples that do not fit the program, and when there are none.
    """
    watch = _Watch(module, observers)
    count = 0
    for sample in track(samples, "Calibrating"):
        with torch.no_grad():
            watch.run(*program_inputs(bundle, sample), enable_io_processing=False)
        count += 1
    if not count:
        raise InputError("the calibration data is empty; pass a list of inputs")


def program_inputs(bundle: Bundle, sample: Sample) -> tuple[Tensor, ...]:
    """The inputs of the main program for one sample.

    Raises InputError for one that does not fit it.
    """
    if bundle.schedule.generates:
        ids = torch.as_tensor(np.asarray(sample), dtype=torch.int64)
        ids = ids[None] if ids.ndim == 1 else ids
        assert bundle.generation is not None
        if (
            ids.ndim != 2
            or not ids.numel()
            or not 0 <= int(ids.min()) <= int(ids.max()) < bundle.generation.vocabulary
        ):
            raise InputError(
                f"a calibration sample of shape {list(ids.shape)} is no text: give token ids below "
                f"{bundle.generation.vocabulary}"
            )
        return first_call(bundle.main, ids, bundle.states)
    single = isinstance(sample, (Tensor, np.ndarray))
    tensors = tuple(torch.as_tensor(x) for x in ([sample] if single else sample))
    for spec, tensor in zip(bundle.main.inputs, tensors, strict=False):
        if tensor.ndim != len(spec.axes) or any(
            isinstance(axis, int) and axis != size for axis, size in zip(spec.axes, tensor.shape, strict=True)
        ):
            raise InputError(
                f"a calibration sample has shape {list(tensor.shape)} for {spec.name!r}, which is {spec.axes}"
            )
    if len(tensors) != len(bundle.main.inputs):
        names = ", ".join(spec.name for spec in bundle.main.inputs)
        raise InputError(f"a calibration sample has {len(tensors)} tensors, the program takes {names}")
    return tensors


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
