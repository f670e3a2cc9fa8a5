"""Artifacts: a bundle as a directory that a program without tokopt, or without torch, can run.

``vit.tokopt/`` holds ``manifest.json``, one file per program (``forward.onnx`` or ``forward.pt2``), the
weights (``weights.data``), ``selftest.safetensors`` and, for text models, ``tokenizer.json``. It is written
under a temporary name beside its place and renamed when it is complete and checked.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokopt.arguments import check_callable, check_flag, check_kind, check_number, check_path, described
from tokopt.errors import ArtifactError, InputError, TokoptError
from tokopt.ir.bundle import AppliedPass, Bundle, check_bundle
from tokopt.ir.program import Program
from tokopt.runtime.engines.onnxruntime import Sessions
from tokopt.runtime.format.manifest import (
    ENGINE,
    MANIFEST,
    ONE_ROW,
    OUTLINE,
    PORTABLE,
    SELFTEST,
    EngineEntry,
    FileEntry,
    Manifest,
    PassEntry,
    ProgramEntry,
    describe_file,
    file_fault,
    file_path,
    read_manifest,
)
from tokopt.runtime.numerics import SELFTEST_LIMITS, OutputCheck, check_output
from tokopt.runtime.selftest import FormChecks, TaskCheck, check_forms, read_selftest
from tokopt.runtime.text import read_tokenizer

if TYPE_CHECKING:
    import torch

    from tokopt.lower.onnx.rule import Outcome
    from tokopt.lower.tensorrt.engine import EngineBuilder, EngineOptions

TARGETS = ("onnx", "torch", "tensorrt")

CLEANUP = ("drop_unread", "fold_scales")
"""The passes that run before every lowering: exact, and nobody has to ask for them."""

_TOKENIZER = "tokenizer.json"


def export(
    bundle: Bundle,
    path: str | Path,
    target: str = "onnx",
    *,
    overwrite: bool = False,
    check: bool = True,
    tolerance: float | None = None,
    engine: EngineOptions | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write ``bundle`` as an artifact directory at ``path`` and return that path.

    ``target="onnx"`` lowers every program to ONNX for :func:`tokopt.runtime.load`, after the passes of
    :data:`CLEANUP`, which stand in the artifact's history where they changed something. ``check`` compares the
    result with the program in ``bundle`` first, with ``tolerance`` in place of the largest NMSE that a dtype
    allows, and runs the self-test that :func:`verify` will run. ``target="tensorrt"`` builds an engine beside each of
    these ONNX files, as ``engine`` says. ``target="torch"`` keeps the programs as they are, as ``.pt2`` files for
    :func:`open_bundle`, and beside them what ``tokopt inspect`` shows. ``overwrite`` replaces an
    artifact that is already there. ``progress`` is called with a line per step.

    Raises LoweringError when a program cannot be lowered or does not compute the same, ArtifactError when
    ``path`` is taken or its parent is missing, MissingDependencyError without the TensorRT that an engine takes, and
    InputError for engine options that do not fit. Nothing is left behind when it fails.
    """
    check_bundle("bundle", bundle)
    path = check_path("path", path)
    if not isinstance(target, str) or target not in TARGETS:
        raise ArtifactError(f"there is no target {described(target)}; choose among {', '.join(TARGETS)}")
    check_flag("overwrite", overwrite)
    check_flag("check", check)
    if tolerance is not None:
        tolerance = check_number("tolerance", tolerance, lambda x: x >= 0, "of at least 0")
    if progress is not None:
        check_callable("progress", progress, "a function of a line of text")
    if engine is not None:
        _check_engine(engine)
    if engine is not None and target != "tensorrt":
        raise InputError(
            f"engine options mean nothing to the target {target!r}; leave them out, or export to tensorrt"
        )
    from tokopt.analysis.outline import outline
    from tokopt.lower.selftest import write_examples, write_selftest

    say = progress or (lambda line: None)
    check_place(path, overwrite)
    cleaned = bundle if target == "torch" else _clean_up(bundle, say)
    builder = _engine_builder(cleaned, engine) if target == "tensorrt" else None
    with replacing(path.absolute()) as folder:
        metadata = {"tokopt.pipeline": cleaned.pipeline, "tokopt.semantics": cleaned.semantics}
        if target == "torch":
            files = _save_programs(bundle, folder, say)
        else:
            files = _lower_programs(cleaned, bundle, folder, metadata, say, check=check, tolerance=tolerance)
        engines: dict[str, EngineEntry] = {}
        if builder is not None:
            for name, forms in files.items():
                say(f"building the engine of {name}")
                portable = folder / forms[PORTABLE]
                made, engines[name] = builder.build(portable, name, check=check, tolerance=tolerance)
                forms[ENGINE] = made.name
            for reason in builder.without_plugin:
                say(f"no plugin for {reason}")
        # Of the programs before their cleanup, which changes no output.
        if target == "torch" or not check:
            say("writing the self-test")
            write_examples(bundle, folder)
        else:
            say("running the self-test")
            write_selftest(bundle, folder, _manifest(cleaned, files, engines, {}), tolerance=tolerance)
        if target == "torch":
            (folder / OUTLINE).write_text(outline(bundle).to_json(), encoding="utf-8")
        if bundle.tokenizer is not None:
            (folder / _TOKENIZER).write_text(bundle.tokenizer, encoding="utf-8")
        entries = {item.name: describe_file(item) for item in sorted(folder.iterdir())}
        (folder / MANIFEST).write_text(
            _manifest(cleaned, files, engines, entries).to_json(), encoding="utf-8"
        )
        read_manifest(folder)  # what is written can be read: names from the model are checked here
    return path


def open_bundle(path: str | Path) -> Bundle:
    """Load the bundle of a ``target="torch"`` artifact, or capture a ``.pt2`` file of ``torch.export``.

    Every file's SHA-256 is checked first. Raises ArtifactError when the artifact is damaged, foreign, newer,
    or was exported for another target.
    """
    path = check_path("path", path)
    if path.is_file() and path.suffix == ".pt2":
        from tokopt.frontend.module import capture

        return capture(path)
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        if fault := file_fault(path, name, entry):
            raise ArtifactError(fault)
    programs = {name: _load_program(path, manifest, name) for name in manifest.programs}
    tokenizer = manifest.tokenizer and read_tokenizer(file_path(path, manifest.tokenizer))
    bundle = Bundle(
        programs,
        manifest.schedule,
        manifest.states,
        manifest.links,
        history=tuple(AppliedPass(**vars(step)) for step in manifest.passes),
        tokenizer=tokenizer,
        generation=manifest.generation,
    )
    from tokopt.ir.verifier import verify_bundle

    try:
        verify_bundle(bundle)
    except TokoptError as error:
        raise ArtifactError(f"{path} disagrees with its manifest: {error}; export it again") from error
    return bundle


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found: faults of files, and what the self-test of every form of a program found.

    ``outputs`` are its outputs in float32 arithmetic, ``task`` what callers see as this machine computes it, which is
    empty where the two agree (see :mod:`tokopt.runtime.selftest`).
    """

    path: str
    pipeline: str
    semantics: str
    files: int
    faults: tuple[str, ...]
    outputs: Mapping[str, tuple[OutputCheck, ...]]
    task: Mapping[str, tuple[TaskCheck, ...]] = field(default_factory=dict[str, tuple[TaskCheck, ...]])

    @property
    def ok(self) -> bool:
        """No fault, and every output as close as it was when it was exported."""
        checks = (check for side in (self.outputs, self.task) for found in side.values() for check in found)
        return not self.faults and all(check.ok for check in checks)

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        sides = {
            key: {
                name: [{**asdict(check), "ok": check.ok} for check in found] for name, found in side.items()
            }
            for key, side in (("outputs", self.outputs), ("task", self.task))
        }
        return {**asdict(self), **sides, "ok": self.ok}


def verify(path: str | Path) -> VerifyReport:
    """Check every file's size and SHA-256, then run the self-test.

    An ONNX artifact is run by the runtime, without torch; a torch artifact by torch. Raises ArtifactError
    when there is no readable manifest; everything found after that is in the report.
    """
    path = check_path("path", path)
    manifest = read_manifest(path)
    faults = [
        fault
        for name, entry in manifest.files.items()
        if (fault := file_fault(path, name, entry)) is not None
    ]
    found: dict[str, FormChecks] = {}
    if not faults:
        try:
            found = _selftest(path, manifest)
        except TokoptError as error:
            faults = [str(error)]
    return VerifyReport(
        str(path),
        manifest.pipeline,
        manifest.semantics,
        len(manifest.files),
        tuple(faults),
        {key: checks.outputs for key, checks in found.items()},
        {key: checks.task for key, checks in found.items() if checks.task},
    )


def _selftest(path: Path, manifest: Manifest) -> dict[str, FormChecks]:
    if all(PORTABLE in entry.files for entry in manifest.programs.values()):
        tests = {name: read_selftest(path, manifest, name) for name in manifest.programs}
        return check_forms(manifest, tests, lambda: Sessions(path, manifest))
    bundle = open_bundle(path)
    return {name: FormChecks(_selftest_torch(path, manifest, name, p)) for name, p in bundle.programs.items()}


def _selftest_torch(path: Path, manifest: Manifest, name: str, program: Program) -> tuple[OutputCheck, ...]:
    expected = _read_tensors(path, manifest, name, "outputs")
    actual = program(*program.example)
    return tuple(
        check_output(spec.name, _as_numpy(want), _as_numpy(got), SELFTEST_LIMITS[manifest.semantics])
        for spec, want, got in zip(program.outputs, expected, actual, strict=True)
    )


def _as_numpy(tensor: torch.Tensor) -> Any:
    import torch

    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(force=True)


def check_place(path: Path, overwrite: bool) -> None:
    if not path.parent.is_dir():
        raise ArtifactError(f"the folder {path.parent} does not exist; create it first")
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise ArtifactError(f"{path} exists already; pass overwrite=True or choose another path")
    if path.is_symlink() or not (path / MANIFEST).is_file():
        raise ArtifactError(f"{path} is no tokopt artifact and will not be overwritten; choose another path")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` that takes its name at the end, or disappears on any failure."""
    token = secrets.token_hex(4)
    folder = path.with_name(f".{path.name}.{token}.tmp")
    try:
        folder.mkdir()
    except OSError as error:
        raise ArtifactError(f"{path.parent} cannot be written to ({error}); choose another path") from error
    try:
        yield folder
        _rename(folder, path, path.with_name(f".{path.name}.{token}.old"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rename(folder: Path, path: Path, aside: Path) -> None:
    """Put ``folder`` in the place of ``path``; what was there stays until the new one is in place."""
    try:
        if not path.exists():
            folder.rename(path)
            return
        path.rename(aside)
        try:
            folder.rename(path)
        except BaseException:
            aside.rename(path)
            raise
    except OSError as error:
        raise ArtifactError(
            f"the artifact cannot be moved to {path} ({error}); choose another path"
        ) from error
    shutil.rmtree(aside, ignore_errors=True)


def _check_engine(engine: object) -> None:
    from tokopt.lower.tensorrt.engine import EngineOptions

    check_kind("engine", engine, EngineOptions, "an EngineOptions, as in EngineOptions(arch='sm_86')")


def _engine_builder(bundle: Bundle, options: EngineOptions | None) -> EngineBuilder:
    from tokopt.lower.tensorrt.engine import EngineBuilder, EngineOptions

    return EngineBuilder(bundle, options or EngineOptions())


def _clean_up(bundle: Bundle, say: Callable[[str], None]) -> Bundle:
    """The bundle after the passes of :data:`CLEANUP`, each in its history only if it changed something."""
    from tokopt.pipeline.manager import parse

    for text in CLEANUP:
        cleaned, done = parse(text).run(bundle)
        record = done.records[-1]
        for line in (*(record.notes if record.matches else ()), *record.refusals):
            say(f"{text}: {line}")
        bundle = cleaned if record.matches else bundle
    return bundle


def _save_programs(bundle: Bundle, folder: Path, say: Callable[[str], None]) -> dict[str, dict[str, str]]:
    """Keep every program as a ``.pt2`` file; return the file of each."""
    import torch

    from tokopt.ir.assemble import assemble

    files: dict[str, dict[str, str]] = {}
    for name, program in bundle.programs.items():
        files[name] = {"torch": f"{name}.pt2"}
        say(f"saving {name}.pt2")
        torch.export.save(assemble(program), folder / f"{name}.pt2")
    return files


def _lower_programs(
    bundle: Bundle,
    originals: Bundle,
    folder: Path,
    metadata: Mapping[str, str],
    say: Callable[[str], None],
    *,
    check: bool,
    tolerance: float | None,
) -> dict[str, dict[str, str]]:
    """Write every program in ONNX; return the file of each form. ``originals`` are what they were before cleanup."""
    from tokopt.lower.onnx.export import WeightFile, lower
    from tokopt.lower.onnxruntime.cpu import lower_for_cpu

    files: dict[str, dict[str, str]] = {}
    weights = WeightFile(folder)
    for name, program in bundle.programs.items():
        say(f"lowering {name} to ONNX" + (" and comparing" if check else ""))

        def report(outcome: Outcome, name: str = name) -> None:
            say(f"{name}: {outcome}")

        path = lower(
            program,
            folder,
            name,
            weights=weights,
            metadata=metadata,
            check=check,
            tolerance=tolerance,
            original=originals.programs[name],
            report=report,
        )
        fused = lower_for_cpu(
            program,
            path,
            check=check,
            tolerance=tolerance,
            original=originals.programs[name],
            report=report,
        )
        files[name] = {PORTABLE: path.name} | ({ONE_ROW: fused.name} if fused else {})
    return files


def _read_tensors(path: Path, manifest: Manifest, program: str, side: str) -> tuple[torch.Tensor, ...]:
    from safetensors import SafetensorError, safe_open

    if manifest.selftest is None:
        raise ArtifactError(f"{path} has no self-test, which holds the example inputs; export it again")
    specs = getattr(manifest.programs[program], side)
    try:
        with safe_open(file_path(path, manifest.selftest), framework="pt") as tensors:
            return tuple(tensors.get_tensor(f"{program}/{side}/{spec.name}") for spec in specs)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path / SELFTEST} is damaged ({error}); export the artifact again") from error


def _load_program(path: Path, manifest: Manifest, name: str) -> Program:
    entry = manifest.programs[name]
    if "torch" not in entry.files:
        raise ArtifactError(
            f"{path} was exported for {', '.join(entry.files)}, which cannot become a bundle again; export "
            "the bundle with target='torch' too"
        )
    import torch

    import tokopt.kernels  # noqa: F401  # registers the ops that the program may call
    from tokopt.ir.export import unlifted

    file = file_path(path, entry.files["torch"])
    try:
        exported = torch.export.load(file)
    except Exception as error:  # whatever the archive's reader raises
        raise ArtifactError(
            f"{file} cannot be loaded by torch {torch.__version__} ({type(error).__name__}: {error}); it was "
            f"saved by torch {manifest.versions.get('torch', '?')}"
        ) from error
    return Program(
        unlifted(exported),
        entry.inputs,
        entry.outputs,
        entry.ranges,
        _read_tensors(path, manifest, name, "inputs"),
        entry.aliases,
    )


def _manifest(
    bundle: Bundle,
    files: Mapping[str, Mapping[str, str]],
    engines: Mapping[str, EngineEntry],
    entries: Mapping[str, FileEntry],
) -> Manifest:
    programs = {
        name: ProgramEntry(
            program.inputs,
            program.outputs,
            program.ranges,
            files[name],
            engine=engines.get(name),
            aliases=program.aliases,
        )
        for name, program in bundle.programs.items()
    }
    return Manifest(
        programs=programs,
        files=entries,
        states=bundle.states,
        links=bundle.links,
        schedule=bundle.schedule,
        generation=bundle.generation,
        semantics=bundle.semantics,
        pipeline=bundle.pipeline,
        passes=tuple(PassEntry(**vars(step)) for step in bundle.history),
        tokenizer=None if bundle.tokenizer is None else _TOKENIZER,
        selftest=SELFTEST,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in ("tokopt", "torch", "onnx", "onnxscript", "onnxruntime"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
