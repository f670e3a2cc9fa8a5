"""The token ops of the domain ``tokopt``, and ops of ONNX Runtime of our own (:mod:`tokopt.kernels.cpu`).

Each token op has a PyTorch reference and an ONNX form. They are registered as ``torch.ops.tokopt.*`` when one of the
names below is first used, which takes torch; importing the package alone does not.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokopt.kernels.catalogue import OPS
    from tokopt.kernels.registry import attach_functions, declared, onnx_translations, ops

__all__ = ["OPS", "attach_functions", "declared", "onnx_translations", "ops"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module("tokopt.kernels.registry"), name)
    raise AttributeError(f"module 'tokopt.kernels' has no attribute {name!r}")
