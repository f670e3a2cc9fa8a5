"""Rotary embeddings that are written with complex numbers, computed with real ones: no engine has complex numbers.

Under :class:`InReal`, ``torch.polar`` and ``torch.view_as_complex`` give pairs of a real and an imaginary part,
which are multiplied, indexed and viewed as the complex tensor would be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class InReal(TorchFunctionMode):
    """Makes pairs where torch would make complex tensors of real ones."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.polar and not kwargs:
            size, angle = args
            return Pair(size * angle.cos(), size * angle.sin())
        if func is torch.view_as_complex and not kwargs:
            return Pair(*args[0].unbind(-1))
        return func(*args, **kwargs)


class Pair:
    """A complex tensor as two real ones."""

    def __init__(self, real: Tensor, imaginary: Tensor) -> None:
        self.real, self.imag = real, imaginary

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.view_as_real:
            (pair,) = args
            return torch.stack([pair.real, pair.imag], dim=-1)
        if func in (torch.Tensor.mul, torch.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__):
            first, second = args
            return first * second if isinstance(first, Pair) else second * first
        return NotImplemented

    def __mul__(self, other: object) -> Pair:
        if isinstance(other, Pair):
            return Pair(
                self.real * other.real - self.imag * other.imag,
                self.real * other.imag + self.imag * other.real,
            )
        factor: Any = other
        return Pair(self.real * factor, self.imag * factor)

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> Pair:
        return Pair(self.real[index], self.imag[index])

    def __getattr__(self, name: str) -> Any:
        """The methods that move axes or devices."""
        if name in ("device", "shape", "ndim"):
            return getattr(self.real, name)
        if name in ("unsqueeze", "squeeze", "transpose", "view", "reshape", "expand", "to", "contiguous"):
            return lambda *a, **k: Pair(getattr(self.real, name)(*a, **k), getattr(self.imag, name)(*a, **k))
        raise AttributeError(name)
