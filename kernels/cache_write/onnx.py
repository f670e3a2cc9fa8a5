"""The ONNX form of tokopt::cache_write: one node, so that the engine can write in place."""

from tokopt.kernels.opset import INT64, TOKOPT, TensorType, node, op24, script


@script(TOKOPT, default_opset=op24)
def cache_write(cache: TensorType, new: TensorType, length: INT64) -> TensorType:
    """See :func:`tokopt.kernels.cache_write.reference.cache_write`."""
    return op24.TensorScatter(cache, new, length, axis=-2)


FUNCTIONS = (cache_write,)
translation = node(cache_write)
