"""Statistics of the inputs of linear layers over a user's own data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from tokopt.arguments import check_items
from tokopt.errors import InputError
from tokopt.ir.bundle import Bundle
from tokopt.ir.graph import dtype_name, sizes
from tokopt.ir.program import TensorSpec
from tokopt.progress import track

Array = Tensor | np.ndarray | Sequence[int]
Sample = Array | Sequence[Array] | Mapping[str, Array]
"""What a caller gives: tensors by name, or in order, or one alone; for a language model the ids of a text.

What a tokenizer of transformers returns is tensors by name, for language models too.
"""

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


def read_samples(bundle: Bundle, samples: Iterable[Sample]) -> Iterator[dict[str, Tensor]]:
    """The tensors of every sample by name, one after another.

    Raises InputError for samples that do not fit, and when there are none.
    """
    count = 0
    for sample in track(samples, "Calibrating"):
        yield caller_tensors(bundle, sample)
        count += 1
    if not count:
        raise InputError("the calibration data is empty; pass a list of inputs")


def caller_tensors(bundle: Bundle, sample: Sample) -> dict[str, Tensor]:
    """The tensors of a sample by name: those of :attr:`Bundle.inputs`.

    Raises InputError for a sample that does not fit the bundle.
    """
    specs, names = bundle.inputs, ", ".join(bundle.inputs)
    if isinstance(sample, Mapping):
        tokens = next((name for name, spec in specs.items() if spec.role == "tokens"), None)
        given = dict(sample) if tokens is None else _text(dict(sample), tokens)
    else:
        alone = isinstance(sample, (Tensor, np.ndarray)) or (bundle.schedule.generates and len(specs) == 1)
        takes = "tensors by name, in their order, or one alone"
        parts: Sequence[Array] = (
            [cast(Array, sample)] if alone else check_items("a calibration sample", sample, takes)
        )
        if len(parts) != len(specs):
            raise InputError(f"a calibration sample has {len(parts)} tensors, the model takes {names}")
        given = dict(zip(specs, parts, strict=True))
    if given.keys() != specs.keys():
        raise InputError(
            f"a calibration sample has {', '.join(map(str, given)) or 'nothing'}, the model takes {names}"
        )
    return {name: _tensor(bundle, spec, given[name]) for name, spec in specs.items()}


def _text(given: dict[str, Array], name: str) -> dict[str, Array]:
    """What a tokenizer gives, as the tokens ``name``: its mask says that nothing is padding, and is left out."""
    if name in given or "input_ids" not in given:
        return given
    mask = given.pop("attention_mask", None)
    if mask is not None and not bool(_array("attention_mask", mask).all()):
        raise InputError("a calibration sample is padded; give every text on its own, without padding")
    return {name: given.pop("input_ids"), **given}


def _array(name: str, value: Array) -> Tensor:
    try:
        return torch.as_tensor(value if isinstance(value, Tensor) else np.asarray(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"a calibration sample gives a {type(value).__name__} for {name!r} that is no array of numbers; give a "
            "tensor, or for a language model token ids"
        ) from error


def _tensor(bundle: Bundle, spec: TensorSpec, value: Array) -> Tensor:
    tensor = _array(spec.name, value)
    if spec.role == "tokens":
        assert bundle.generation is not None
        return _token_ids(tensor, bundle.generation.vocabulary)
    if tensor.ndim != len(spec.axes) or any(
        isinstance(axis, int) and axis != size for axis, size in zip(spec.axes, tensor.shape, strict=True)
    ):
        raise InputError(
            f"a calibration sample has shape {list(tensor.shape)} for {spec.name!r}, which is {spec.axes}"
        )
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if tensor.dtype != dtype and not (tensor.is_floating_point() and dtype.is_floating_point):
        raise InputError(
            f"a calibration sample has {dtype_name(tensor.dtype)} for {spec.name!r}, which is {spec.dtype}"
        )
    return tensor.to(dtype)


def _token_ids(ids: Tensor, vocabulary: int) -> Tensor:
    """Ids of one text or of several [batch, tokens]."""
    ids = ids[None] if ids.ndim == 1 else ids
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if (
        not whole
        or ids.ndim != 2
        or not ids.numel()
        or not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary
    ):
        raise InputError(
            f"a calibration sample of shape {list(ids.shape)} is no text: give token ids below {vocabulary}"
        )
    return ids.long()


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
