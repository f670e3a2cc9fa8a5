"""The laws of one program: distinct names, known roles with the dtype and axes they mean, and aliases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokopt.runtime.format.fault import FormatError, require
from tokopt.runtime.format.reader import first_double, short
from tokopt.runtime.format.signature import (
    BATCH,
    DRAWING,
    INPUT_ROLES,
    OUTPUT_ROLES,
    SEVERAL,
    Signature,
    TensorLike,
    find_role,
)

_INPUTS = {
    "tokens": ("int64", "[batch, n]"),
    "positions": ("int64", "[batch, n]"),
    "mask": ("bool", "[batch, n, n]"),
    "rows": ("int64", "[k]"),
    "limit": ("int64", "[batch]"),
    "due": ("bool", "[batch]"),
    "parent": ("int64", "[n]"),
    "path": ("int64", "[batch, n]"),
    "count": ("int64", "[batch]"),
    **{role: (dtype, "[batch]") for role, (dtype, _) in DRAWING.items()},
}
_OUTPUTS = {
    "logits": ("float", "[batch, rows, vocabulary]"),
    "tokens": ("int64", "[batch, n]"),
    "count": ("int64", "[batch]"),
    "logprobs": ("float", "[batch, n]"),
    "confidence": ("int64", "[batch]"),
    "neighbours": ("int64", "[batch, n, k]"),
    "done": ("bool", "[batch]"),
    "depth": ("int64", "[batch]"),
}
"""Role -> dtype (or its beginning) and axes."""


def check_programs(programs: Mapping[str, Signature]) -> None:
    """Every program keeps its laws; raises FormatError."""
    require(bool(programs), "programs is empty")
    for name, program in programs.items():
        where = f"program {short(name)}"
        require(bool(program.outputs), f"{where} has no outputs")
        _check_side(f"inputs of {where}", program.inputs, INPUT_ROLES, _INPUTS)
        _check_side(f"outputs of {where}", program.outputs, OUTPUT_ROLES, _OUTPUTS)
        _check_ranges(where, program)
        _check_new_tokens(where, program)
        _check_aliases(where, program)


def _check_side(
    where: str,
    tensors: Sequence[TensorLike],
    roles: Sequence[str],
    meanings: Mapping[str, tuple[str, str]],
) -> None:
    if double := first_double(tensor.name for tensor in tensors):
        raise FormatError(f"one of the {where} has the name {short(double)} twice")
    found: set[str] = set()
    for tensor in tensors:
        what = f"{short(tensor.name)} of the {where}"
        require(tensor.role in roles, f"{what} has the role {short(tensor.role)}, which is none of theirs")
        require(
            tensor.role in SEVERAL or tensor.role not in found,
            f"the {where} have the role {short(tensor.role)} twice",
        )
        found.add(tensor.role)
        require(
            (tensor.state is not None) == (tensor.role == "state"),
            f"{what} has the role {short(tensor.role)} and the state {short(tensor.state)}, which do not go together",
        )
        if tensor.role in meanings:
            _check_meaning(what, tensor, *meanings[tensor.role])


def _check_meaning(what: str, tensor: TensorLike, dtype: str, axes: str) -> None:
    """The axes of a role begin with the batch where they say so, and are as many."""
    wanted = axes.strip("[]").split(", ")
    fits = tensor.dtype.startswith(dtype) and len(tensor.axes) == len(wanted)
    require(
        fits and (wanted[0] != BATCH or tensor.axes[0] == BATCH),
        f"{what} has the role {tensor.role!r} and must be {dtype} {axes}, not {tensor.dtype}{list(tensor.axes)}"[
            :300
        ],
    )


def _check_ranges(where: str, program: Signature) -> None:
    for tensor in program.inputs:
        for axis in tensor.axes:
            require(
                isinstance(axis, int) or axis in program.ranges,
                f"the ranges of {where} lack the axis {short(axis)} of input {short(tensor.name)}",
            )


def _check_new_tokens(where: str, program: Signature) -> None:
    """Positions and mask are those of the tokens, and count and log-probabilities those of emitted tokens."""
    read = [found for role in ("tokens", "positions", "mask") if (found := find_role(program.inputs, role))]
    for given in read[1:]:
        require(
            all(axis == read[0].axes[1] for axis in given.axes[1:]),
            f"the {given.role} of {where} have not the axes of its {read[0].role}",
        )
    near = find_role(program.outputs, "neighbours")
    require(
        near is None or (bool(read) and near.axes[1] == read[0].axes[1]),
        f"{where} gives neighbours of other tokens than it reads",
    )
    emitted = [find_role(program.outputs, role) is not None for role in ("tokens", "count")]
    require(emitted[0] == emitted[1], f"{where} must emit tokens and their count, or neither")
    made, logprobs = find_role(program.outputs, "tokens"), find_role(program.outputs, "logprobs")
    require(
        logprobs is None or (made is not None and made.axes[1] == logprobs.axes[1]),
        f"{where} gives log-probabilities of other tokens than it emits",
    )
    require(
        made is not None or find_role(program.outputs, "confidence") is None,
        f"{where} is confident of tokens to come and emits none",
    )


def _check_aliases(where: str, program: Signature) -> None:
    inputs = {tensor.name: tensor for tensor in program.inputs}
    outputs = {tensor.name: tensor for tensor in program.outputs}
    for name, source in program.aliases.items():
        made, given = outputs.get(name), inputs.get(source)
        what = f"the alias of output {short(name)} in {where}"
        if made is None or given is None:
            raise FormatError(f"{what} names {short(name if made is None else source)}, which is not there")
        require(
            (made.dtype, tuple(made.axes)) == (given.dtype, tuple(given.axes)),
            f"{what} has another dtype or other axes than input {short(source)}",
        )
        require(given.state is not None, f"{what} is input {short(source)}, which is no state")
        require(
            made.state is None or made.state == given.state,
            f"{what} is input {short(source)}, which is not the state {short(made.state)} that it is the next value of",
        )
