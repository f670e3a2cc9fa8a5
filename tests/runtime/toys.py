"""Toy models for any schedule, written by hand with onnx: what a program computes follows from its signature.

A text goes on by adding: the token after t is (t + offset) mod VOCABULARY, where the offset comes over a link or is 1.
A program that draws tokens commits 1 + t mod 3 of them, so that the rows of a batch advance by different numbers. The
state ``history`` has the tokens that were read, ``length`` how many they are, ``turns`` how often a trigger ran, which
drops all but the last KEPT.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from onnx import NodeProto, TensorProto, helper

from tests.runtime.artifacts import graph, sealed, write
from tokopt.runtime.format.generation import Generation
from tokopt.runtime.format.link import Link, Port
from tokopt.runtime.format.manifest import Manifest, ProgramEntry
from tokopt.runtime.format.schedule import Entry, Schedule, Trigger
from tokopt.runtime.format.signature import Range, Tensor, find_role, wiring, with_role
from tokopt.runtime.format.state import Occupancy, State

VOCABULARY, DRAWN, KEPT = 11, 4, 2

_KINDS = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT, "bool": TensorProto.BOOL}

STATES = (
    State("length", "length", "int64", ("batch",)),
    State("history", "history", "int64", ("batch", "slots"), initial=-1, occupancy=Occupancy("length")),
    State("turns", "counter", "int64", ("batch",)),
)


def reads(name: str, *, new: bool = False) -> Tensor:
    """The input that reads a state, or the output that is its next value."""
    state = next(state for state in STATES if state.name == name)
    return Tensor(f"next_{name}" if new else name, state.dtype, state.axes, "state", name)


def program(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], aliases: Mapping[str, str] | None = None
) -> ProgramEntry:
    """An entry with the range of every named axis."""
    axes = {axis for tensor in inputs for axis in tensor.axes if isinstance(axis, str)}
    ranges = {axis: Range(1, 64 if axis == "n" else None) for axis in axes}
    return ProgramEntry(tuple(inputs), tuple(outputs), ranges, {}, None, aliases or {})


def reader(*roles: str, emits: str, links: int = 0, count: str | int = "n") -> ProgramEntry:
    """A program that reads tokens; ``roles`` are inputs beside tokens and positions."""
    axes = {
        "mask": ("batch", count, count),
        "rows": ("k",),
        "limit": ("batch",),
        "seed": ("batch",),
        "parent": ("nodes",),
    }
    kinds = {"mask": "bool"}
    inputs = [Tensor(name, "int64", ("batch", count), name) for name in ("tokens", "positions")]
    inputs += [Tensor(role, kinds.get(role, "int64"), axes[role], role) for role in roles]
    inputs += [Tensor(f"offset_{i}", "int64", ("batch", 1), "link") for i in range(links)]
    if emits == "logits":
        wanted = "k" if "rows" in roles else count
        outputs = [Tensor("logits", "float32", ("batch", wanted, VOCABULARY), "logits")]
    else:
        drawn = Tensor("drawn", "int64", ("batch", DRAWN), "tokens")
        outputs = [drawn, Tensor("count", "int64", ("batch",), "count")]
    states = [reads("length"), reads("history")]
    made = [reads("length", new=True), reads("history", new=True)]
    return program([*inputs, *states], [*outputs, *made], {"next_history": "history"})


def half(count: str | int = "n") -> ProgramEntry:
    """A program that others follow in the same call: it makes an offset of the last token."""
    inputs = [Tensor(name, "int64", ("batch", count), name) for name in ("tokens", "positions")]
    return program(inputs, [Tensor("offset_0", "int64", ("batch", 1), "link")])


def halves() -> Manifest:
    """Two programs that read and decode together: the token after t is t + 1 + t mod 3."""
    programs = {"half": half(), "rest": reader("rows", emits="logits", links=1)}
    entries = tuple(Entry("half", role, "n", then=("rest",)) for role in ("prefill", "decode"))
    links = (Link(Port("half", "offset_0"), Port("rest", "offset_0"), "call"),)
    return Manifest(programs, {}, Schedule(entries), STATES[:2], links, Generation(64, VOCABULARY))


def taking_over() -> Manifest:
    """``go`` adds 1 to a token; after 3 decoded tokens ``half`` and ``rest`` take over, which add 1 + t mod 3."""
    made = halves()
    programs = {**made.programs, "go": reader("rows", emits="logits")}
    entries = (
        Entry("go", "prefill", "n"),
        Entry("go", "decode", "n"),
        Entry("half", "decode", "n", then=("rest",), since=3),
    )
    return replace(made, programs=programs, schedule=Schedule(entries))


def taken_over(ids: Sequence[int], count: int) -> list[int]:
    """What :func:`taking_over` writes: one token of the prompt's call, three of the first that decodes, the rest."""
    made = list(ids)
    for place in range(count):
        made.append((made[-1] + 1 + (made[-1] % 3 if place > 3 else 0)) % VOCABULARY)
    return made[len(ids) :]


def choosing() -> Manifest:
    """One program that reads, two that decode: ``go`` proposes nothing, ``guess`` takes a tree; both draw tokens."""
    programs = {
        "read": reader("limit", emits="tokens"),
        "go": reader("limit", emits="tokens", count=1),
        "guess": reader("limit", "parent", emits="tokens", count=1),
    }
    entries = (
        Entry("read", "prefill", "n"),
        Entry("go", "decode", DRAWN),
        Entry("guess", "decode", DRAWN, (-1, 0, 1)),
    )
    return Manifest(programs, {}, Schedule(entries), STATES[:2], generation=Generation(64, VOCABULARY))


def evictor(*, due: bool) -> ProgramEntry:
    """A program for a trigger."""
    given = [Tensor("due", "bool", ("batch",), "due")] if due else []
    names = ("length", "history", "turns")
    return program([*given, *map(reads, names)], [reads(name, new=True) for name in names])


def encoder(*, links: int = 0, given: int = 0, output: bool = False) -> ProgramEntry:
    """A program that makes offsets for ``links`` links of what the caller and ``given`` links give."""
    inputs = [Tensor(f"given_{i}", "int64", ("batch", 1), "link") for i in range(given)]
    inputs = inputs or [Tensor("images", "float32", ("batch", 2), "input")]
    outputs = [Tensor(f"offset_{i}", "int64", ("batch", 1), "link") for i in range(links)]
    if output or not links:
        outputs.append(Tensor("total", "int64", ("batch", 1), "output"))
    return program(inputs, outputs)


def toy() -> Manifest:
    """Three programs that run by themselves and two links: what ``see`` makes is read by ``read`` and by ``go``.

    ``go`` draws tokens, and every 5 of a row ``evict`` runs for it.
    """
    links = (
        Link(Port("see", "offset_0"), Port("read", "offset_0"), "once"),
        Link(Port("see", "offset_1"), Port("go", "offset_0"), "call"),
    )
    return Manifest(
        programs={
            "see": encoder(links=2),
            "read": reader("mask", "rows", emits="logits", links=1),
            "go": reader("limit", emits="tokens", links=1, count=1),
            "evict": evictor(due=True),
        },
        files={},
        states=STATES,
        links=links,
        schedule=Schedule(
            (Entry("see", "encode"), Entry("read", "prefill", "n"), Entry("go", "decode", DRAWN)),
            (Trigger("evict", "prefill"), Trigger("evict", "tokens", 5)),
        ),
        generation=Generation(64, VOCABULARY),
    )


def speaking(**facts: Any) -> tuple[Manifest, dict[str, bytes]]:
    """One program that reads and gives logits, and a tokenizer: ``b`` follows ``a``, and ``a`` follows ``k``.

    ``facts`` are further ones of :class:`Generation`. Any other letter is the token of ``k``.
    """
    schedule = Schedule((Entry("step", "prefill", "n"), Entry("step", "decode", "n")))
    manifest = Manifest(
        {"step": reader("rows", emits="logits")},
        {},
        schedule,
        STATES[:2],
        generation=Generation(64, VOCABULARY, **facts),
        tokenizer="tokenizer.json",
    )
    letters = {letter: i for i, letter in enumerate("abcdefghijk")}
    library: Any = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="k"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    library.decoder = tokenizers.decoders.Fuse()
    return manifest, {"tokenizer.json": library.to_str().encode()}


def save(folder: Path, manifest: Manifest, more: Mapping[str, bytes] | None = None) -> Path:
    """Write the artifact of a toy: its manifest, an ONNX file for every program, and more files."""
    files, programs = dict(more or {}), {}
    for i, (name, entry) in enumerate(manifest.programs.items()):
        files[f"{i}.onnx"] = _model(entry)
        programs[name] = replace(entry, files={"onnx": f"{i}.onnx"})
    return write(folder, asdict(replace(manifest, programs=programs)), files)


def with_file(path: Path, key: str, name: str, data: bytes) -> None:
    """Add a file to an artifact, which its manifest names under ``key``."""
    (path / name).write_bytes(data)
    doc = json.loads((path / "manifest.json").read_text())
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    doc |= {key: name, "files": {**doc["files"], name: entry}}
    (path / "manifest.json").write_text(json.dumps(sealed(doc)))


def text(prompt: Sequence[int], offset: int, count: int) -> list[int]:
    """The tokens that follow a prompt."""
    return [(prompt[-1] + (i + 1) * offset) % VOCABULARY for i in range(count)]


class Graph:
    """Nodes and constants, with names of their own."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; the name of its output."""
        name = f"_{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def const(self, value: object) -> str:
        """Add an int64 constant; its name."""
        name = f"_constant_{len(self.constants)}"
        self.constants[name] = np.asarray(value, np.int64)
        return name

    def give(self, tensor: Tensor, value: str) -> None:
        """Let a value be an output."""
        self.nodes.append(helper.make_node("Identity", [value], [tensor.name]))


def _model(entry: ProgramEntry) -> bytes:
    made = Graph()
    if find_role(entry.inputs, "tokens") is not None:
        (_read if wiring(entry.outputs) else _halve)(made, entry)
    elif any(tensor.state == "turns" for tensor in entry.inputs):
        _evict(made, entry)
    else:
        _encode(made, entry)
    taken, returned = (
        {t.name: (_KINDS[t.dtype], list(t.axes)) for t in side} for side in (entry.inputs, entry.outputs)
    )
    return graph(made.nodes, taken, returned, made.constants)


def _sum_of_links(g: Graph, entry: ProgramEntry) -> str:
    names = [tensor.name for tensor in with_role(entry.inputs, "link")]
    if not names:
        return g.const([[1]])
    total = names[0]
    for name in names[1:]:
        total = g.op("Add", total, name)
    return total


def _encode(g: Graph, entry: ProgramEntry) -> None:
    given = with_role(entry.inputs, "input")
    if given:
        summed = g.op("ReduceSum", given[0].name, g.const([1]), keepdims=1)
        offset = g.op("Cast", summed, to=TensorProto.INT64)
    else:
        offset = g.op("Add", _sum_of_links(g, entry), g.const(1))
    for tensor in entry.outputs:
        g.give(tensor, offset)


def _halve(g: Graph, entry: ProgramEntry) -> None:
    last = g.op("Gather", "tokens", g.const([-1]), axis=1)
    g.give(entry.outputs[0], g.op("Add", g.op("Mod", last, g.const(3)), g.const(1)))


def _read(g: Graph, entry: ProgramEntry) -> None:
    offset, limit = _sum_of_links(g, entry), find_role(entry.inputs, "limit")
    tokens, count = find_role(entry.inputs, "tokens"), find_role(entry.outputs, "count")
    assert tokens is not None
    last = g.op("Gather", tokens.name, g.const([-1]), axis=1)
    new = g.op("Shape", tokens.name, start=1, end=2)
    if count is not None:
        drawn = find_role(entry.outputs, "tokens")
        assert drawn is not None
        steps = g.op("Mul", offset, g.const([range(1, DRAWN + 1)]))
        g.give(drawn, _mod(g, g.op("Add", last, steps)))
        wanted = g.op("Add", g.op("Mod", last, g.const(3)), g.const(1))
        if limit is not None:
            wanted = g.op("Min", wanted, g.op("Unsqueeze", limit.name, g.const([1])))
        committed = g.op("Squeeze", wanted, g.const([1]))
        g.give(count, committed)
    else:
        _logits(g, entry, _mod(g, g.op("Add", tokens.name, offset)))
    place = g.op("Sub", g.op("Range", g.const(0), _slots(g), g.const(1)), _column(g, "length"))
    if count is not None and tokens.axes[1] == 1:
        value = _mod(g, g.op("Add", last, g.op("Mul", place, offset)))
        written = g.op("Squeeze", wanted, g.const([1]))
    else:
        top = g.op("Squeeze", g.op("Sub", new, g.const([1])))
        value = g.op("GatherElements", tokens.name, g.op("Clip", place, g.const(0), top), axis=1)
        written = new
    end = g.op("Unsqueeze", written, g.const([1])) if written != new else new
    inside = g.op("And", g.op("GreaterOrEqual", place, g.const(0)), g.op("Less", place, end))
    g.give(reads("history", new=True), g.op("Where", inside, value, "history"))
    g.give(reads("length", new=True), g.op("Add", "length", written))


def _logits(g: Graph, entry: ProgramEntry, following: str) -> None:
    logits, rows = find_role(entry.outputs, "logits"), find_role(entry.inputs, "rows")
    assert logits is not None
    chosen = g.op("Gather", following, rows.name, axis=1) if rows else following
    g.constants["_values"] = np.array([0, 1], np.float32)
    g.give(logits, g.op("OneHot", chosen, g.const(VOCABULARY), "_values"))


def _evict(g: Graph, entry: ProgramEntry) -> None:
    due = find_role(entry.inputs, "due")
    fewer = g.op("Min", "length", g.const(KEPT))
    kept = g.op("Where", due.name, fewer, "length") if due else fewer
    ran = g.op("Cast", due.name, to=TensorProto.INT64) if due else g.const(1)
    moved = g.op("Unsqueeze", g.op("Sub", "length", kept), g.const([1]))
    place = g.op("Add", g.op("Range", g.const(0), _slots(g), g.const(1)), moved)
    top = g.op("Sub", _slots(g), g.const(1))
    taken = g.op("GatherElements", "history", g.op("Clip", place, g.const(0), top), axis=1)
    g.give(reads("history", new=True), taken)
    g.give(reads("length", new=True), kept)
    g.give(reads("turns", new=True), g.op("Add", "turns", ran))


def _slots(g: Graph) -> str:
    return g.op("Squeeze", g.op("Shape", "history", start=1, end=2))


def _column(g: Graph, name: str) -> str:
    return g.op("Unsqueeze", name, g.const([1]))


def _mod(g: Graph, value: str) -> str:
    return g.op("Mod", value, g.const(VOCABULARY))
