"""The table of token ops: names the ops, registers them with torch, and collects their ONNX forms.

A new op is a folder ``kernels/<op>/`` and one line in :data:`OPS`.
"""

from collections.abc import Callable
from importlib import import_module

import torch

OPS = (
    "bipartite_match",
    "energy_match",
    "farthest_point",
    "gather_tokens",
    "log_size",
    "merge_tokens",
    "nearest_kept",
    "source_map",
    "top_tokens",
)
"""Every op of the domain ``tokopt``; ``kernels/<op>/reference.py`` holds its meaning."""


def _register(name: str) -> None:
    reference = import_module(f"tokopt.kernels.{name}.reference")
    op = torch.library.custom_op(f"tokopt::{name}", getattr(reference, name), mutates_args=())
    op.register_fake(reference.fake)


for _name in OPS:
    _register(_name)

ops = torch.ops.tokopt
"""The registered ops: ``ops.log_size(size)`` is ``torch.ops.tokopt.log_size(size)``."""


def onnx_translations() -> dict[Callable, Callable]:
    """The ONNX form of every op, for ``torch.onnx.export(custom_translation_table=...)``."""
    return {
        getattr(ops, name).default: import_module(f"tokopt.kernels.{name}.onnx").translation for name in OPS
    }
