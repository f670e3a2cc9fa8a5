"""An encoder in stages: rows leave where their program says that they are done, and the others go on together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokopt.errors import InputError
from tokopt.ir.calls import check_sizes
from tokopt.ir.program import Program
from tokopt.runtime.format.link import Link, Port
from tokopt.runtime.format.schedule import Entry
from tokopt.runtime.format.signature import BATCH, find_role, with_role


@dataclass(frozen=True)
class Staged:
    """The outputs of all rows by name, and ``depths`` [batch] int64: after how many blocks each row left."""

    outputs: Mapping[str, Tensor]
    depths: Tensor


def run_stages(
    entries: Sequence[Entry],
    programs: Mapping[str, Program],
    links: Sequence[Link],
    given: Mapping[str, Tensor],
    depth: int | None = None,
) -> Staged:
    """Run the programs of ``entries`` on the caller's tensors, as the runtime does.

    Raises InputError for a ``depth`` after which no program gives outputs, for programs that keep states, and for sizes
    that a program does not take.
    """
    rows = _Rows(programs, links, dict(given))
    for entry in entries:
        if not len(rows.places):
            break
        results = rows.run(entry.program)
        outputs = with_role(programs[entry.program].outputs, "output")
        done = find_role(programs[entry.program].outputs, "done")
        ends = entry is entries[-1] if depth is None else entry.depth == depth
        if ends and outputs:
            rows.leave(torch.ones_like(rows.places, dtype=torch.bool), results, entry)
        elif done is not None and depth is None:
            rows.leave(results[done.name], results, entry)
    if len(rows.places):
        raise InputError(f"depth={depth} is none after which a program gives outputs")
    return rows.together()


class _Rows:
    """The rows that are still on their way: their places in the batch, and everything that has a row for each."""

    def __init__(
        self, programs: Mapping[str, Program], links: Sequence[Link], given: dict[str, Tensor]
    ) -> None:
        self.programs, self.links, self.given = programs, links, given
        specs = {
            spec.name: spec for program in programs.values() for spec in with_role(program.inputs, "input")
        }
        self.axes = {name: specs[name].axes.index(BATCH) for name in given if BATCH in specs[name].axes}
        name, axis = next(iter(self.axes.items()))
        self.places = torch.arange(given[name].shape[axis])
        self.linked: dict[Port, Tensor] = {}
        self.left: list[tuple[Tensor, int, dict[str, Tensor]]] = []

    def run(self, name: str) -> dict[str, Tensor]:
        program = self.programs[name]
        inputs: list[Tensor] = []
        for spec in program.inputs:
            if spec.role not in ("input", "link"):
                raise InputError(f"{name!r} reads the state {spec.state!r}; call the loaded artifact")
            inputs.append(
                self.given[spec.name] if spec.role == "input" else self.linked[Port(name, spec.name)]
            )
        check_sizes(program, inputs)
        results = dict(zip((spec.name for spec in program.outputs), program(*inputs), strict=True))
        for link in self.links:
            if link.source.program == name:
                self.linked[link.target] = results[link.source.name]
        return results

    def leave(self, done: Tensor, results: dict[str, Tensor], entry: Entry) -> None:
        """Set the rows that are done aside with their outputs."""
        names = [spec.name for spec in with_role(self.programs[entry.program].outputs, "output")]
        self.left.append((self.places[done], entry.depth, {name: results[name][done] for name in names}))
        stay = torch.nonzero(~done)[:, 0]
        self.places = self.places[stay]
        self.given = {
            name: tensor.index_select(self.axes[name], stay) if name in self.axes else tensor
            for name, tensor in self.given.items()
        }
        self.linked = {port: tensor[stay] for port, tensor in self.linked.items()}

    def together(self) -> Staged:
        order = torch.cat([places for places, _, _ in self.left]).argsort()
        depths = torch.cat([torch.full_like(places, depth) for places, depth, _ in self.left])
        names = self.left[0][2]
        outputs = {name: torch.cat([part[name] for _, _, part in self.left])[order] for name in names}
        return Staged(outputs, depths[order])
