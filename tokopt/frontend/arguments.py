"""What a caller of capture gives, checked before the model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch

from tokopt.arguments import check_integer, check_kind, check_text, wrong
from tokopt.errors import InputError
from tokopt.ir.program import AxisRange


def check_example(args: object, kwargs: object) -> None:
    """Example inputs: a tuple, and a mapping from the names of parameters; raises InputError.

    A tensor alone would be taken apart into its rows.
    """
    if not isinstance(args, (tuple, list)):
        raise wrong("args", args, "a tuple of example inputs, as in capture(model, (images,))")
    if kwargs is not None:
        for name in check_kind("kwargs", kwargs, Mapping, "a mapping from parameters to example inputs"):
            check_text("a name in kwargs", name)


def check_axes(dynamic: object, ranges: object) -> None:
    """The names of axes, and the sizes that they may take; raises InputError."""
    if dynamic is not None:
        takes = 'a mapping like {"images": ("batch", None, None, None)} or {"images": {0: "batch"}}'
        axes = cast("Mapping[object, object]", check_kind("dynamic", dynamic, Mapping, takes))
        for name, given in axes.items():
            check_text("the name of an input in dynamic", name)
            where = f"dynamic[{name!r}]"
            if isinstance(given, str) or not isinstance(given, (Mapping, Sequence)):
                raise wrong(where, given, "a name or None for each axis, or a mapping from axes to names")
            named = cast(
                "Mapping[object, object]", given if isinstance(given, Mapping) else dict(enumerate(given))
            )
            for index, axis in named.items():
                check_integer(f"an axis in {where}", index)
                if axis is not None and not check_text(f"axis {index} in {where}", axis).isidentifier():
                    raise wrong(f"axis {index} in {where}", axis, "a name of letters, digits and underscores")
    if ranges is not None:
        takes = 'a mapping like {"batch": AxisRange(1, 32)}'
        for axis, bounds in check_kind("ranges", ranges, Mapping, takes).items():
            check_text("an axis in ranges", axis)
            check_range(f"ranges[{axis!r}]", bounds)


def check_range(name: str, bounds: object) -> None:
    """The sizes of an axis: at least one of 0 or more; raises InputError."""
    known = check_kind(name, bounds, AxisRange, "an AxisRange, as in AxisRange(1, 32)")
    least = check_integer(f"{name}.min", known.min, least=0)
    if known.max is not None and check_integer(f"{name}.max", known.max) < max(least, 1):
        raise InputError(
            f"{name} is from {least} to {known.max}, which no size is; let max be at least min and 1"
        )


def check_tokenizer(tokenizer: object) -> None:
    """The text of a tokenizer.json, or None; raises InputError."""
    if tokenizer is not None and not isinstance(tokenizer, str):
        raise wrong("tokenizer", tokenizer, "the text of a tokenizer.json, or None")


def check_module(name: str, model: object, takes: str) -> torch.nn.Module:
    """A module; raises InputError."""
    return check_kind(name, model, torch.nn.Module, takes)
