"""The token ops of the domain ``tokopt``: each has a PyTorch reference and an ONNX form.

Importing this package (it needs torch) registers them as ``torch.ops.tokopt.*``.
"""

from tokopt.kernels.catalogue import OPS
from tokopt.kernels.registry import attach_functions, declared, onnx_translations, ops

__all__ = ["OPS", "attach_functions", "declared", "onnx_translations", "ops"]
