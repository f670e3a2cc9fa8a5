"""A linear layer with weights in 4 or 8 bits and activations that are rounded to 8 bits as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from tokopt.kernels.shared import refuse

GATES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
}
"""Activations that the first half of the outputs goes through before it is multiplied by the second."""


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    minimum: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group: int,
    gate: str | None = None,
) -> Tensor:
    """``x @ weight.T + bias``, for weights ``(codes - zero) * scale`` or ``codes * scale + minimum``.

    Every ``group`` numbers of a row of ``x`` are rounded to 255 values: ``a = max|x| / 127`` and ``q = rint(x / a)``.
    An ``a`` below the smallest normal float32 counts as 0 and makes ``q`` 0. Where ``x`` is not finite, the row is NaN.

    Args:
        x: [..., in] floating point; float64 is computed in float64.
        codes: [out, in * bits / 8] uint8; of two codes in a byte the lower bits hold the first.
        scale: [out, in / group] floating point.
        zero: [out, in / group] uint8; ``2 ** (bits - 1)`` if neither this nor ``minimum`` is given.
        minimum: [out, in / group] in the dtype of ``scale``.
        bias: [out] floating point.
        bits: 4 or 8.
        group: inputs that share a scale: 32, 64 or 128.
        gate: one of :data:`GATES`: the result is its value of the first half of the outputs times the second half.

    Returns:
        [..., out] in the dtype of ``x``, or [..., out / 2] with a gate.

    Raises:
        InputError: sizes that do not fit, bits or groups of another size, both ``zero`` and ``minimum``, another gate.
    """
    check(x, codes, scale, zero, minimum, bias, bits, group)
    refuse(
        gate is not None and gate not in GATES,
        f"quantized_linear: gate={gate} must be silu, gelu or gelu_tanh.",
    )
    refuse(
        gate is not None and codes.shape[0] % 2 != 0,
        f"quantized_linear: of {codes.shape[0]} outputs in codes no half gates the other.",
    )
    dtype = x.dtype
    grouped = x.unflatten(-1, (-1, group))
    a = grouped.abs().amax(-1, keepdim=True) / 127
    a = torch.where(a < torch.finfo(torch.float32).tiny, 0, a)
    a = torch.where(a.isfinite(), a, torch.nan)
    q = torch.where(a == 0, 0, (grouped / a).round())
    unpacked = (torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1) if bits == 4 else codes).to(dtype)
    weight = unpacked.unflatten(1, (-1, group))
    if minimum is None:
        middle = torch.full_like(scale, 2 ** (bits - 1)) if zero is None else zero
        weight = (weight - middle.to(dtype)[..., None]) * scale.to(dtype)[..., None]
    else:
        weight = weight * scale.to(dtype)[..., None] + minimum.to(dtype)[..., None]
    y = (q * a).flatten(-2) @ weight.flatten(1).T
    y = y if bias is None else y + bias.to(dtype)
    if gate is None:
        return y
    gates, up = y.chunk(2, dim=-1)
    return GATES[gate](gates) * up


def check(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    minimum: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(bits not in (4, 8), f"quantized_linear: bits={bits} must be 4 or 8.")
    refuse(group not in (32, 64, 128), f"quantized_linear: group={group} must be 32, 64 or 128.")
    refuse(
        zero is not None and minimum is not None,
        "quantized_linear: zero and minimum exclude each other; give one.",
    )
    refuse(
        codes.ndim != 2 or x.ndim < 1, "quantized_linear: codes must be [out, in * bits / 8] and x [..., in]."
    )
    inputs = codes.shape[1] * 8 // bits
    refuse(
        inputs % group != 0 or x.shape[-1] != inputs,
        f"quantized_linear: x has {x.shape[-1]} inputs and codes have {inputs}; both must be whole groups of {group}.",
    )
    sizes = (codes.shape[0], inputs // group)
    for name, given in (("scale", scale), ("zero", zero), ("minimum", minimum)):
        refuse(
            given is not None and tuple(given.shape) != sizes,
            f"quantized_linear: {name} must be [out, in / group], {list(sizes)} here.",
        )
    refuse(
        bias is not None and tuple(bias.shape) != sizes[:1],
        f"quantized_linear: bias must be [out], {list(sizes[:1])}.",
    )
