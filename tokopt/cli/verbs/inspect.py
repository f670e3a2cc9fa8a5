"""``tokopt inspect``: the blocks of a program, or the manifest of an artifact that holds none."""

from __future__ import annotations

import dataclasses
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokopt.cli.blocks import HEADERS, rows_by_kind
from tokopt.cli.models import deployed_manifest, read_bundle
from tokopt.cli.options import add_model
from tokopt.cli.screen import Screen, si
from tokopt.cli.tables import spell, tensor_data
from tokopt.cli.verb import OK, Verb
from tokopt.errors import ArtifactError, InputError
from tokopt.runtime.format.manifest import (
    ENGINE,
    MANIFEST,
    OUTLINE,
    PORTABLE,
    file_fault,
    file_path,
    read_manifest,
)

if TYPE_CHECKING:
    from tokopt.runtime.format.manifest import Manifest, Tensor


def add_options(parser: ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--provider",
        choices=("cuda",),
        help="of an ONNX artifact: the nodes that this provider of ONNX Runtime has no kernels for",
    )


def run(args: Namespace, screen: Screen) -> int:
    """Blocks of a program, or the manifest of an artifact that only holds ONNX."""
    if args.provider is not None:
        return _inspect_nodes(args, screen)
    if manifest := deployed_manifest(args.artifact):
        return _inspect_manifest(manifest, screen)
    if (stored := _stored_outline(Path(args.artifact))) is not None:
        return _inspect_program(stored, screen)
    with screen.step(f"Reading {args.artifact}"):
        bundle = read_bundle(args.artifact)
        from tokopt.analysis.outline import outline

        found = dataclasses.asdict(outline(bundle))
    program = bundle.main
    return _inspect_program(
        _Program(bundle.pipeline, bundle.semantics, program.inputs, program.outputs, found), screen
    )


def _inspect_nodes(args: Namespace, screen: Screen) -> int:
    """The nodes of every portable ONNX file that would run on the CPU, and copy."""
    from tokopt.lower.onnxruntime.cuda import SOURCE, lacking

    manifest = deployed_manifest(args.artifact)
    if manifest is None:
        raise InputError(
            f"{args.artifact} holds no ONNX; export it first: tokopt export {args.artifact} -o PATH"
        )
    folder = Path(args.artifact)
    found = {
        name: lacking(file_path(folder, program.files[PORTABLE]))
        for name, program in manifest.programs.items()
    }
    rows = [(name, node, count) for name, nodes in found.items() for node, count in nodes.items()]
    if rows:
        screen.table(("program", "without a CUDA kernel", "nodes"), rows)
    else:
        screen.line("every node has a CUDA kernel")
    screen.line(f"by {SOURCE}")
    screen.finish({"provider": args.provider, "lacking": found, "source": SOURCE})
    return OK


@dataclasses.dataclass(frozen=True)
class _Program:
    """What is shown of a main program; ``outline`` is :class:`tokopt.analysis.outline.Outline` as a mapping."""

    pipeline: str
    semantics: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    outline: Mapping[str, Any]


def _stored_outline(folder: Path) -> _Program | None:
    """What an artifact of target torch says of itself, without its weights; None for other models and older ones."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    if OUTLINE not in manifest.files:
        return None
    if fault := file_fault(folder, OUTLINE, manifest.files[OUTLINE]):
        raise ArtifactError(fault)
    decode = manifest.schedule.entry("decode") or manifest.schedule.entries[-1]
    program = manifest.programs[decode.program]
    try:
        found = json.loads(file_path(folder, OUTLINE).read_text(encoding="utf-8"))
        rows_by_kind(found["blocks"])
        _summary(found)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / OUTLINE} is damaged ({error}); export the artifact again") from error
    return _Program(manifest.pipeline, manifest.semantics, program.inputs, program.outputs, found)


def _inspect_program(program: _Program, screen: Screen) -> int:
    screen.line(f"{spell(program.inputs)} -> {spell(program.outputs)}")
    screen.line(f"passes: {program.pipeline or 'none'} ({program.semantics})")
    screen.line()
    screen.table(HEADERS, rows_by_kind(program.outline["blocks"]))
    screen.line(_summary(program.outline))
    screen.finish(
        {
            "pipeline": program.pipeline,
            "semantics": program.semantics,
            "blocks": program.outline["blocks"],
            "cost": program.outline["cost"],
            "inputs": tensor_data(program.inputs),
            "outputs": tensor_data(program.outputs),
        }
    )
    return OK


def _summary(outline: Mapping[str, Any]) -> str:
    cost = outline["cost"]
    return (
        f"{si(cost['flops'])}FLOPs, {si(cost['parameters'])}parameters, {cost['nodes']} nodes, "
        f"at the example's batch of {outline['batch']}"
    )


def _inspect_manifest(manifest: Manifest, screen: Screen) -> int:
    for name, program in manifest.programs.items():
        screen.line(f"{name}: {spell(program.inputs)} -> {spell(program.outputs)}")
    screen.line(f"passes: {manifest.pipeline or 'none'} ({manifest.semantics})")
    screen.line("made with " + ", ".join(f"{k} {v}" for k, v in manifest.versions.items()))
    screen.line()
    for step in manifest.passes:
        screen.line(f"{step.text}: {step.matches} sites changed, {step.semantics}")
        for note in step.notes:
            screen.line(f"  {note}")
    _show_engines(manifest, screen)
    if any(program.kernels is not None for program in manifest.programs.values()):
        from tokopt.runtime.engines.kernels import choose_kernels

        screen.line(f"CPU kernels of tokopt, on this machine: {choose_kernels(manifest)}")
        screen.line()
    screen.table(("file", "bytes", "sha256"), [(n, f.size, f.sha256[:16]) for n, f in manifest.files.items()])
    screen.finish(dataclasses.asdict(manifest))
    return OK


def _show_engines(manifest: Manifest, screen: Screen) -> None:
    rows = []
    for name, program in manifest.programs.items():
        engine = program.engine
        if engine is not None:
            size = manifest.files[program.files[ENGINE]].size
            profiles = " ".join(f"{axis}={p}" for axis, p in engine.profiles.items())
            rows.append((name, engine.builder, engine.version, engine.arch, f"{si(size)}B", profiles))
    if rows:
        screen.table(("engine", "builder", "version", "arch", "size", "profiles"), rows)
        screen.line()


VERB = Verb(
    "show attention sites, tokens and cost, or the manifest of an ONNX artifact",
    "tokopt inspect dino.tokopt",
    add_options,
    run,
)
