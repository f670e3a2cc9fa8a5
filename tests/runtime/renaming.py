"""Artifacts and bundles with other names of all that has one: programs, states, inputs, outputs and axes."""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import onnx
from safetensors.numpy import load_file, save

from tokopt.ir.bundle import Bundle
from tokopt.ir.export import copied, placeholders
from tokopt.ir.program import Program
from tokopt.runtime.format.link import Port
from tokopt.runtime.format.manifest import FileEntry, Manifest, read_manifest
from tokopt.runtime.format.signature import Tensor

CALLERS = ("input", "output")
"""Roles of what callers give and get."""

Names = Mapping[str, str]
Choose = Callable[[Iterable[str]], Names]
"""New names for old ones, all different."""

Described = TypeVar("Described", Manifest, Bundle)
"""What holds programs, states, links and a schedule."""


def random_words(seed: int) -> Choose:
    """Words of random letters."""
    rng = random.Random(seed)
    return lambda names: {name: "".join(rng.choices(string.ascii_letters, k=12)) for name in names}


def shuffled(seed: int) -> Choose:
    """The same names, each of something else."""
    rng = random.Random(seed)

    def choose(names: Iterable[str]) -> Names:
        old = list(names)
        return dict(zip(old, rng.sample(old, len(old)), strict=True))

    return choose


def renamed(source: Path, folder: Path, choose: Choose) -> Path:
    """Write the artifact at ``source`` to ``folder`` in the newest format, with names that ``choose`` gives."""
    manifest = read_manifest(source)
    values = value_names(manifest, choose)
    programs = choose(list(manifest.programs))
    folder.mkdir()
    files = {name: (source / name).read_bytes() for name in manifest.files}
    for name, entry in manifest.programs.items():
        for file in entry.files.values():
            files[file] = _renamed_model(source / file, values[name])
    if manifest.selftest is not None:
        files[manifest.selftest] = _renamed_selftest(source / manifest.selftest, programs, values)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    made = with_names(manifest, programs, values, choose)
    listed = {name: FileEntry(hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()}
    (folder / "manifest.json").write_text(replace(made, files=listed).to_json())
    return folder


def renamed_bundle(bundle: Bundle, choose: Choose) -> Bundle:
    """The bundle with names that ``choose`` gives, the nodes of its inputs included."""
    values, programs = value_names(bundle, choose), choose(list(bundle.programs))
    made = with_names(bundle, programs, values, choose)
    for name, program in made.programs.items():
        made = made.with_program(name, _with_named_nodes(program))
    return made


def _with_named_nodes(program: Program) -> Program:
    """The program whose inputs are nodes of their names."""
    module = copied(program.module)
    for number, node in enumerate(placeholders(module)):
        node._rename(f"input_{number}")  # so that no name is taken when the nodes get theirs
    for node, spec in zip(placeholders(module), program.inputs, strict=True):
        node._rename(spec.name)
        node.target = spec.name
    module.recompile()
    return replace(program, module=module)


def with_names(
    described: Described, programs: Names, values: Mapping[str, Names], choose: Choose
) -> Described:
    """The description of a model with other names of its programs and of their inputs and outputs (``values``).

    States and all axes but the batch get names that ``choose`` gives.
    """
    states = choose([state.name for state in described.states])
    axes = choose(
        sorted({axis for entry in described.programs.values() for axis in entry.ranges} - {"batch"})
    )

    def axis(one: Any) -> Any:
        return axes.get(one, one) if isinstance(one, str) else one

    def tensor(one: Tensor, names: Names) -> Tensor:
        state = None if one.state is None else states[one.state]
        return replace(one, name=names[one.name], axes=tuple(map(axis, one.axes)), state=state)

    def program(entry: Any, names: Names) -> Any:
        return replace(
            entry,
            inputs=tuple(tensor(one, names) for one in entry.inputs),
            outputs=tuple(tensor(one, names) for one in entry.outputs),
            ranges={axis(name): bounds for name, bounds in entry.ranges.items()},
            aliases={names[made]: names[given] for made, given in entry.aliases.items()},
        )

    def port(one: Port) -> Port:
        return Port(programs[one.program], values[one.program][one.name])

    schedule = described.schedule
    return replace(
        described,
        programs={programs[name]: program(entry, values[name]) for name, entry in described.programs.items()},
        states=tuple(
            replace(
                state,
                name=states[state.name],
                axes=tuple(map(axis, state.axes)),
                occupancy=state.occupancy and replace(state.occupancy, state=states[state.occupancy.state]),
            )
            for state in described.states
        ),
        links=tuple(
            replace(link, source=port(link.source), target=port(link.target)) for link in described.links
        ),
        schedule=replace(
            schedule,
            entries=tuple(
                replace(
                    entry,
                    program=programs[entry.program],
                    slots=axis(entry.slots),
                    then=tuple(programs[name] for name in entry.then),
                )
                for entry in schedule.entries
            ),
            whole=schedule.whole and programs[schedule.whole],
            commit=schedule.commit and programs[schedule.commit],
            triggers=tuple(
                replace(trigger, program=programs[trigger.program]) for trigger in schedule.triggers
            ),
        ),
    )


def value_names(described: Manifest | Bundle, choose: Choose) -> dict[str, Names]:
    """New names of the inputs and outputs of every program; what callers give and get has one in all programs."""
    sides = {name: (*entry.inputs, *entry.outputs) for name, entry in described.programs.items()}
    callers = sorted({tensor.name for side in sides.values() for tensor in side if tensor.role in CALLERS})
    shared = choose(callers)
    return {
        name: {
            **choose([tensor.name for tensor in side if tensor.role not in CALLERS]),
            **{tensor.name: shared[tensor.name] for tensor in side if tensor.role in CALLERS},
        }
        for name, side in sides.items()
    }


def _renamed_selftest(file: Path, programs: Names, values: Mapping[str, Names]) -> bytes:
    found = {}
    for key, array in load_file(file).items():
        program, side, name = key.split("/")
        found[f"{programs[program]}/{side}/{values[program][name]}"] = array
    return save(found)


def _renamed_model(file: Path, names: Names) -> bytes:
    """The ONNX file with other names of its inputs and outputs; every other value gets out of their way."""
    model = onnx.load(file, load_external_data=False)

    def name(old: str) -> str:
        return names.get(old, f"inner {old}" if old else "")

    def rename(graph: onnx.GraphProto) -> None:
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            value.name = name(value.name)
        for node in graph.node:
            node.input[:] = [name(one) for one in node.input]
            node.output[:] = [name(one) for one in node.output]
            for attribute in node.attribute:
                for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    rename(inner)

    rename(model.graph)
    return model.SerializeToString()
