"""``tokopt inspect``: the blocks of a model's programs, or the manifest of an artifact that holds none."""

from __future__ import annotations

import dataclasses
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tokopt.cli.blocks import HEADERS, rows_by_kind
from tokopt.cli.models import deployed_manifest, read_bundle
from tokopt.cli.options import add_model
from tokopt.cli.schedule import RUN_HEADERS, runs
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
    from tokopt.ir.bundle import AppliedPass
    from tokopt.ir.program import Program
    from tokopt.runtime.format.entries import PassEntry, ProgramEntry
    from tokopt.runtime.format.manifest import Manifest
    from tokopt.runtime.format.schedule import Schedule


def add_options(parser: ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--provider",
        choices=("cuda",),
        help="of an ONNX artifact: the nodes that this provider of ONNX Runtime has no kernels for",
    )


def run(args: Namespace, screen: Screen) -> int:
    """Blocks of all programs, or the manifest of an artifact that only holds ONNX."""
    if args.provider is not None:
        return _inspect_nodes(args, screen)
    if manifest := deployed_manifest(args.artifact):
        return _inspect_manifest(manifest, screen)
    if (stored := _stored_outline(Path(args.artifact))) is not None:
        return _inspect_model(stored, screen)
    with screen.step(f"Reading {args.artifact}"):
        bundle = read_bundle(args.artifact)
        from tokopt.analysis.outline import outline

        found = dataclasses.asdict(outline(bundle))
    return _inspect_model(_Model(bundle, bundle.history, bundle.main_name, found), screen)


class _Described(Protocol):
    """What a bundle and a manifest both say."""

    @property
    def programs(self) -> Mapping[str, Program | ProgramEntry]: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def pipeline(self) -> str: ...
    @property
    def semantics(self) -> str: ...


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
class _Model:
    """What is shown of a model whose main program is ``main``.

    ``outline`` is :class:`tokopt.analysis.outline.Outline` as a mapping.
    """

    described: _Described
    passes: Sequence[AppliedPass | PassEntry]
    main: str
    outline: Mapping[str, Any]

    @property
    def programs(self) -> Mapping[str, Mapping[str, Any]]:
        """The outlines by the names of their programs."""
        return self.outline["programs"] or {self.main: self.outline}


def _stored_outline(folder: Path) -> _Model | None:
    """What an artifact of target torch says of itself, without its weights; None for other models and older ones."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    if OUTLINE not in manifest.files:
        return None
    if fault := file_fault(folder, OUTLINE, manifest.files[OUTLINE]):
        raise ArtifactError(fault)
    main = manifest.schedule.entry("decode") or manifest.schedule.entries[-1]
    try:
        found = json.loads(file_path(folder, OUTLINE).read_text(encoding="utf-8"))
        for one in (found, *found.get("programs", {}).values()):
            rows_by_kind(one["blocks"])
            _summary(one)
        if found.get("programs", {}).keys() - manifest.programs.keys():
            raise ValueError("it has programs that the manifest has not")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{folder / OUTLINE} is damaged ({error}); export the artifact again") from error
    return _Model(manifest, manifest.passes, main.program, found) if "programs" in found else None


def _inspect_model(model: _Model, screen: Screen) -> int:
    signatures, found = model.described.programs, model.programs
    for name in found:
        screen.line((f"{name}: " if len(found) > 1 else "") + _signature(signatures[name]))
    screen.line(f"passes: {model.described.pipeline or 'none'} ({model.described.semantics})")
    steps = runs(model.described.schedule, signatures)
    if len(found) > 1:
        screen.line()
        _show_passes(model.passes, screen)
        screen.line()
        costs = [found[run.program]["cost"] for run in steps]
        rows = [
            (*run.cells, si(cost["flops"]), si(cost["parameters"]), cost["nodes"])
            for run, cost in zip(steps, costs, strict=True)
        ]
        screen.table((*RUN_HEADERS, "FLOPs", "parameters", "nodes"), rows)
    for name, outline in found.items():
        if outline["blocks"] or len(found) == 1:
            screen.line()
            if len(found) > 1:
                screen.line(f"{name}:")
            screen.table(HEADERS, rows_by_kind(outline["blocks"]))
            screen.line(_summary(outline))
    main = signatures[model.main]
    screen.finish(
        {
            "pipeline": model.described.pipeline,
            "semantics": model.described.semantics,
            "passes": [dataclasses.asdict(step) for step in model.passes],
            "blocks": model.outline["blocks"],
            "cost": model.outline["cost"],
            "inputs": tensor_data(main.inputs),
            "outputs": tensor_data(main.outputs),
            "programs": found,
            "schedule": [dataclasses.asdict(run) for run in steps],
        }
    )
    return OK


def _signature(program: Program | ProgramEntry) -> str:
    return f"{spell(program.inputs)} -> {spell(program.outputs)}"


def _show_passes(passes: Sequence[AppliedPass | PassEntry], screen: Screen) -> None:
    for step in passes:
        screen.line(f"{step.text}: {step.matches} sites changed, {step.semantics}")
        for note in step.notes:
            screen.line(f"  {note}")


def _summary(outline: Mapping[str, Any]) -> str:
    cost = outline["cost"]
    return (
        f"{si(cost['flops'])}FLOPs, {si(cost['parameters'])}parameters, {cost['nodes']} nodes, "
        f"at the example's batch of {outline['batch']}"
    )


def _inspect_manifest(manifest: Manifest, screen: Screen) -> int:
    for name, program in manifest.programs.items():
        screen.line(f"{name}: {_signature(program)}")
    screen.line(f"passes: {manifest.pipeline or 'none'} ({manifest.semantics})")
    screen.line("made with " + ", ".join(f"{k} {v}" for k, v in manifest.versions.items()))
    screen.line()
    _show_passes(manifest.passes, screen)
    if len(manifest.programs) > 1:
        screen.line()
        screen.table(RUN_HEADERS, [run.cells for run in runs(manifest.schedule, manifest.programs)])
        screen.line()
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
