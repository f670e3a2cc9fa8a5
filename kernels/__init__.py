"""The token ops of the domain ``tokopt``: each has a PyTorch reference and an ONNX form.

Importing this package (it needs torch) registers them as ``torch.ops.tokopt.*``.
"""

from tokopt.kernels.registry import OPS, ROUNDINGS, SELECTIONS, attach_functions, onnx_translations, ops

__all__ = ["OPS", "ROUNDINGS", "SELECTIONS", "attach_functions", "onnx_translations", "ops"]
