"""The laws of links: both ends exist and fit, and the value is there before it is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokopt.runtime.format.fault import require
from tokopt.runtime.format.link import WHEN, Link, Port
from tokopt.runtime.format.reader import short
from tokopt.runtime.format.schedule import Schedule
from tokopt.runtime.format.signature import BATCH, Signature, TensorLike, with_role


def check_links(programs: Mapping[str, Signature], links: Sequence[Link], schedule: Schedule) -> None:
    """Every link keeps its laws, and every input that wants one has one; raises FormatError."""
    fed = [link.target for link in links]
    for link in links:
        _check_link(programs, link)
        _check_order(link, schedule)
        require(fed.count(link.target) == 1, f"{_spell(link.target)} has more than one link")
    targets = set(fed)
    for name, program in programs.items():
        for tensor in with_role(program.inputs, "link"):
            port = Port(name, tensor.name)
            require(port in targets, f"{_spell(port)} has the role 'link' and no link leads to it")


def _check_link(programs: Mapping[str, Signature], link: Link) -> None:
    require(
        link.when in WHEN, f"the link to {_spell(link.target)} has when {short(link.when)}, not once or call"
    )
    for port, side in ((link.source, "outputs"), (link.target, "inputs")):
        require(
            _find(programs, port, side) is not None,
            f"a link names {_spell(port)}, which is not among the {side}",
        )
    source = _find(programs, link.source, "outputs")
    target = _find(programs, link.target, "inputs")
    assert source is not None and target is not None
    require(
        target.role == "link", f"a link leads to {_spell(link.target)}, whose role is {short(target.role)}"
    )
    require(
        source.role in ("link", "output"),
        f"a link comes from {_spell(link.source)}, whose role is {short(source.role)}",
    )
    require(
        (source.dtype, tuple(source.axes)) == (target.dtype, tuple(target.axes))
        and source.axes[:1] == (BATCH,),
        f"the link from {_spell(link.source)} to {_spell(link.target)} needs one dtype and the same axes on both "
        "ends, with the batch in front",
    )


def _check_order(link: Link, schedule: Schedule) -> None:
    """What a link carries is there when its target first runs."""
    runs = schedule.programs
    if link.target.program == schedule.commit:
        require(
            link.when == "call" and link.source.program in (e.program for e in schedule.of_role("decode")),
            f"the link to {_spell(link.target)} tells what the last call left, so it must be 'call', and come from the "
            "program that decodes",
        )
    if link.target.program not in runs:
        return
    require(
        link.source.program in runs and runs.index(link.source.program) < runs.index(link.target.program),
        f"the link to {_spell(link.target)} comes from {_spell(link.source)}, which does not run before it",
    )
    require(
        link.when == "call"
        or all(entry.role != "decode" for entry in schedule.entries if link.target.program in entry.programs),
        f"the link to {_spell(link.target)} is of a program that runs more than once per request, so it must be 'call'",
    )


def _find(programs: Mapping[str, Signature], port: Port, side: str) -> TensorLike | None:
    program = programs.get(port.program)
    if program is None:
        return None
    tensors = program.inputs if side == "inputs" else program.outputs
    return next((tensor for tensor in tensors if tensor.name == port.name), None)


def _spell(port: Port) -> str:
    return f"{short(port.name)} of program {short(port.program)}"
