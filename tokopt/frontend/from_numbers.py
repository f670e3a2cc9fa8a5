"""What follows from numbers that a model holds, as the grid of its pictures, is computed when the model is captured.

``torch.export`` traces a tensor that is made of numbers like any other, and then knows no size that is read off it.
Under :class:`FromNumbers`, functions of such tensors alone run for what they are, and the graph gets constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]
from torch.utils._pytree import tree_leaves

from tokopt.frontend.imaginary import InReal

_MAKES = (torch.tensor, torch.as_tensor, torch.arange, torch.zeros, torch.ones, torch.full)


class FromNumbers(InReal):
    """Runs functions of numbers, and of tensors that such functions made, outside the trace."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        symbolic = any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in leaves)
        # What is traced is of a class of its own: inputs, parameters, and all that follows from them.
        numbers = all(type(tensor) is Tensor for tensor in tensors) and (bool(tensors) or func in _MAKES)
        if numbers and not symbolic:
            with _disable_current_modes():
                return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)
