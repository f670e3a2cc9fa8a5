"""``tokopt inspect``: the blocks of a program, or the manifest of an artifact that holds none."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from tokopt.cli.models import deployed_manifest, read_bundle
from tokopt.cli.options import add_model
from tokopt.cli.screen import Screen, si
from tokopt.cli.tables import spell, tensor_data
from tokopt.cli.verb import OK, Verb
from tokopt.runtime.format.manifest import ENGINE

if TYPE_CHECKING:
    from tokopt.runtime.format.manifest import Manifest


def add_options(parser: ArgumentParser) -> None:
    add_model(parser)


def run(args: Namespace, screen: Screen) -> int:
    """Blocks of a program, or the manifest of an artifact that only holds ONNX."""
    if manifest := deployed_manifest(args.artifact):
        return _inspect_manifest(manifest, screen)
    with screen.step(f"Reading {args.artifact}"):
        bundle = read_bundle(args.artifact)
        from tokopt.analysis.cost import program_cost
        from tokopt.cli.blocks import describe_blocks

        program = bundle.main
        blocks, cost = describe_blocks(program), program_cost(program)
    screen.line(f"{spell(program.inputs)} -> {spell(program.outputs)}")
    screen.line(f"passes: {bundle.pipeline or 'none'} ({bundle.semantics})")
    screen.line()
    headers = ("block", "attention", "kind", "tokens", "heads", "FLOPs", "note")
    rows = [(b.index, b.path, b.kind, b.tokens, b.heads, si(b.flops), b.note) for b in blocks]
    screen.table(headers, rows)
    screen.line(
        f"{si(cost.flops)}FLOPs, {si(cost.parameters)}parameters, {cost.nodes} nodes, "
        f"at the example's batch of {program.example[0].shape[0]}"
    )
    blocks_data = [dataclasses.asdict(block) for block in blocks]
    screen.finish(
        {"pipeline": bundle.pipeline, "semantics": bundle.semantics, "blocks": blocks_data}
        | {
            "cost": dataclasses.asdict(cost),
            "inputs": tensor_data(program.inputs),
            "outputs": tensor_data(program.outputs),
        }
    )
    return OK


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
