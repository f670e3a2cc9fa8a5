"""The weight of a linear back from floats of 8 bits."""

import torch
from torch import Tensor

from tokopt.kernels.shared import refuse


def dequantize_float8(codes: Tensor, scale: Tensor) -> Tensor:
    """``codes * scale``, with a scale for every output; see :mod:`tokopt.kernels.fake_float8.reference` for E4M3.

    Args:
        codes: [out, in] uint8, the bytes of numbers of E4M3.
        scale: [out, 1] floating point.

    Returns:
        [out, in] in the dtype of ``scale``.

    Raises:
        InputError: sizes that do not fit, or codes that are no bytes.
    """
    check(codes, scale)
    return codes.view(torch.float8_e4m3fn).to(scale.dtype) * scale


def fake(codes: Tensor, scale: Tensor) -> Tensor:
    """An empty output of the right shape."""
    check(codes, scale)
    return scale.new_empty(codes.shape)


def check(codes: Tensor, scale: Tensor) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        codes.ndim != 2 or tuple(scale.shape) != (codes.shape[0], 1),
        f"tokopt::dequantize_float8: codes must be [out, in] and scale [out, 1], got {list(codes.shape)} and "
        f"{list(scale.shape)}.",
    )
    refuse(
        codes.dtype != torch.uint8,
        f"tokopt::dequantize_float8: codes must be bytes (uint8), got {codes.dtype}.",
    )
