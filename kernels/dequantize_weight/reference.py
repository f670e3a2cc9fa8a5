"""The weight of a linear back from codes."""

from torch import Tensor

from tokopt.kernels.shared import refuse


def dequantize_weight(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """``(codes - zero) * scale``, with a scale and a zero point for every ``group`` inputs of an output.

    Args:
        codes: [out, in] uint8.
        scale: [out, in / group] floating point.
        zero: [out, in / group] uint8.
        group: inputs that share a scale.

    Returns:
        [out, in] in the dtype of ``scale``.

    Raises:
        InputError: tensors that are not two-dimensional, or sizes that do not fit.
    """
    check(codes, scale, zero, group)
    grouped = codes.unflatten(1, (-1, group)).to(scale.dtype, copy=True)
    return grouped.sub_(zero[..., None]).mul_(scale[..., None]).flatten(1)  # in place: a weight is large


def fake(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """An empty output of the right shape."""
    check(codes, scale, zero, group)
    return scale.new_empty(codes.shape)


def check(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        (codes.ndim, scale.ndim, zero.ndim) != (2, 2, 2),
        "tokopt::dequantize_weight: codes must be [out, in], scale and zero [out, in / group], got "
        f"{codes.ndim}, {scale.ndim} and {zero.ndim} dimensions.",
    )
    refuse(group < 1, f"tokopt::dequantize_weight: group={group} must be positive.")
    refuse(
        codes.shape[1] != scale.shape[1] * group,
        f"tokopt::dequantize_weight: {codes.shape[1]} inputs are not {scale.shape[1]} groups of {group}.",
    )
