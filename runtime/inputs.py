"""The arrays that a caller gives: named, and checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokopt.errors import InputError
from tokopt.runtime.format.manifest import Manifest, ProgramEntry
from tokopt.runtime.format.signature import BATCH, Range, Tensor, with_role


@dataclass(frozen=True)
class Interface:
    """What a caller gives and gets: the inputs of role ``"input"`` and the outputs of role ``"output"``.

    They belong to the programs that run once per request. An input that several of them take is given once.
    """

    programs: tuple[ProgramEntry, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    ranges: Mapping[str, Range]

    @classmethod
    def of(cls, manifest: Manifest) -> Interface:
        """The interface of an artifact."""
        programs = tuple(manifest.programs[entry.program] for entry in manifest.schedule.of_role("encode"))
        inputs = {t.name: t for program in programs for t in with_role(program.inputs, "input")}
        outputs = {t.name: t for program in programs for t in with_role(program.outputs, "output")}
        ranges = {axis: bounds for program in reversed(programs) for axis, bounds in program.ranges.items()}
        return cls(programs, tuple(inputs.values()), tuple(outputs.values()), ranges)

    def feed(self, arrays: Sequence[Any], named: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The arrays by name, in the order of ``inputs``; raises InputError for what does not fit."""
        values = self._bind(arrays, named)
        batch: dict[str, tuple[int, str]] = {}
        for program in self.programs:
            seen = dict(batch)
            _check(program, values, seen)
            batch |= {axis: place for axis, place in seen.items() if axis == BATCH}
        return values

    def _bind(self, arrays: Sequence[Any], named: Mapping[str, Any]) -> dict[str, np.ndarray]:
        names = [tensor.name for tensor in self.inputs]
        if len(arrays) > len(names):
            raise InputError(
                f"{len(arrays)} inputs were given, the program takes {len(names)}: {', '.join(names)}"
            )
        given: dict[str, Any] = dict(zip(names, arrays, strict=False))
        for name, value in named.items():
            if name not in names:
                raise InputError(
                    f"there is no input {name!r}; the program takes {', '.join(names) or 'none'}"
                )
            if name in given:
                raise InputError(f"input {name!r} was given twice, by position and by name; give it once")
            given[name] = value
        for tensor in self.inputs:
            if tensor.name not in given:
                raise InputError(f"input {tensor.name!r} is missing; give {tensor}")
        return {tensor.name: _as_array(given[tensor.name], tensor) for tensor in self.inputs}


def count_rows(tensors: Sequence[Tensor], feed: Mapping[str, np.ndarray]) -> int | None:
    """The size of the batch; None when no array has one."""
    found = (feed[t.name].shape[t.axes.index(BATCH)] for t in tensors if t.name in feed and BATCH in t.axes)
    return next(found, None)


def _check(program: ProgramEntry, feed: Mapping[str, np.ndarray], seen: dict[str, tuple[int, str]]) -> None:
    """``seen`` collects the size of every named axis, and the input that had it first."""
    for tensor in with_role(program.inputs, "input"):
        array, dtype = feed[tensor.name], np.dtype(tensor.dtype)
        if array.dtype != dtype:
            raise InputError(
                f"input {tensor.name!r} is {array.dtype}, the program takes {dtype}; convert it with "
                f".astype({tensor.dtype!r})"
            )
        _check_shape(tensor, array.shape)
        for axis, size in zip(tensor.axes, array.shape, strict=True):
            if isinstance(axis, str):
                _check_axis(tensor.name, axis, size, program.ranges[axis], seen)
        if dtype.kind == "f" and not _is_finite(array):
            raise InputError(
                f"input {tensor.name!r} holds NaN or infinity; clean it, for example with numpy.nan_to_num"
            )


def _check_axis(name: str, axis: str, size: int, bounds: Range, seen: dict[str, tuple[int, str]]) -> None:
    if size < max(bounds.min, 1) or (bounds.max is not None and size > bounds.max):
        most = "" if bounds.max is None else f" and at most {bounds.max}"
        raise InputError(
            f"axis {axis!r} of input {name!r} has size {size}, it must be at least {max(bounds.min, 1)}{most}"
        )
    first, where = seen.setdefault(axis, (size, name))
    if first != size:
        raise InputError(
            f"axis {axis!r} has size {size} in input {name!r} but {first} in {where!r}; make them equal"
        )


def as_array(name: str, value: Any, takes: str) -> np.ndarray:
    """``value`` as an array of this machine's byte order; raises InputError for what numpy cannot read.

    Tensors of torch are read as they are, detached and from any device, without torch: they offer themselves to numpy,
    and by ``numpy(force=True)`` where that would drop a gradient.
    """
    try:
        try:
            array = np.asarray(value)
        except (RuntimeError, TypeError):
            if not hasattr(value, "detach"):
                raise
            array = value.numpy(force=True)
        if np.ma.is_masked(value):
            raise ValueError("some of it is masked")
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    except Exception as error:  # whatever a foreign __array__ raises
        raise InputError(
            f"{name} is a {type(value).__name__} that numpy cannot read; give {takes}"
        ) from error


def _as_array(value: Any, tensor: Tensor) -> np.ndarray:
    array = as_array(f"input {tensor.name!r}", value, str(tensor))
    return np.ascontiguousarray(array) if array.ndim else array


def _check_shape(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if len(shape) != len(tensor.axes):
        raise InputError(
            f"input {tensor.name!r} has {len(shape)} axes (shape {list(shape)}), the program takes {tensor}"
        )
    for i, (axis, size) in enumerate(zip(tensor.axes, shape, strict=True)):
        if isinstance(axis, int) and axis != size:
            raise InputError(
                f"axis {i} of input {tensor.name!r} has size {size} (shape {list(shape)}), the program takes "
                f"{tensor}"
            )


def _is_finite(array: np.ndarray) -> bool:
    """Whether every element is finite.

    One pass without a temporary: NaN and infinity survive a sum. A sum may also overflow by itself, so only
    the exact test may say no.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = array.sum(dtype=np.float32 if array.dtype == np.float16 else None)
    return bool(np.isfinite(total)) or bool(np.isfinite(array).all())
