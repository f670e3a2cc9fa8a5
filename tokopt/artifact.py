"""Artifacts: a bundle as a directory that a program without tokopt, or without torch, can run.

``vit.tokopt/`` holds ``manifest.json``, one file per program (``forward.onnx`` or ``forward.pt2``), the
weights (``weights.data``), ``selftest.safetensors`` and, for text models, ``tokenizer.json``. It is written
under a temporary name beside its place and put there when it is complete and checked (:mod:`tokopt.place`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from tokopt.arguments import check_callable, check_flag, check_kind, check_number, check_path, check_text
from tokopt.errors import ArtifactError, InputError, TokoptError
from tokopt.ir.bundle import AppliedPass, Bundle, check_bundle
from tokopt.ir.program import Program
from tokopt.kernels import cpu
from tokopt.place import check_place, replacing
from tokopt.runtime.engines.onnxruntime import Sessions
from tokopt.runtime.format.check_files import check_files, find_faults
from tokopt.runtime.format.manifest import (
    ENGINE,
    MANIFEST,
    ONE_ROW,
    OUTLINE,
    OWN,
    PORTABLE,
    SELFTEST,
    EngineEntry,
    FileEntry,
    Manifest,
    PassEntry,
    ProgramEntry,
    describe_file,
    file_path,
    read_manifest,
)
from tokopt.runtime.numerics import OutputCheck
from tokopt.runtime.selftest import FormChecks, TaskCheck, check_forms, compared, read_selftest
from tokopt.runtime.text import read_tokenizer

if TYPE_CHECKING:
    import torch

    from tokopt.lower.onnx.rule import Outcome
    from tokopt.lower.onnx.whole import Whole
    from tokopt.lower.tensorrt.engine import EngineBuilder, EngineOptions
    from tokopt.lower.torch_tensorrt.build import Compiled, TorchTensorRT

TARGETS = ("onnx", "torch", "tensorrt", "torch-tensorrt")

BUILT = ("tensorrt", "torch-tensorrt")
"""The targets of which engines are built."""

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
    :func:`open_bundle`, and beside them what ``tokopt inspect`` shows; ``target="torch-tensorrt"`` does so too, and
    puts beside each what Torch-TensorRT compiles of it on this machine's GPU, for :func:`open_compiled`. ``overwrite``
    replaces an artifact that is already there. ``progress`` is called with a line per step.

    Raises LoweringError when a program cannot be lowered or does not compute the same, ArtifactError when
    ``path`` is taken (at the start, or meanwhile), its parent is missing, or it cannot be written,
    MissingDependencyError without the TensorRT that an engine takes, and InputError for engine options that do not fit
    and without the GPU that a build takes.
    Nothing is left behind when it fails, and what was there stays; a process that is killed leaves the old artifact or
    the new one, and beside it what the next export to the same place removes.
    """
    check_bundle("bundle", bundle)
    path = check_path("path", path)
    if check_text("target", target) not in TARGETS:
        raise ArtifactError(f"there is no target {target!r}; choose among {', '.join(TARGETS)}")
    check_flag("overwrite", overwrite)
    check_flag("check", check)
    if tolerance is not None:
        tolerance = check_number("tolerance", tolerance, lambda x: x >= 0, "of at least 0")
    if progress is not None:
        check_callable("progress", progress, "a function of a line of text")
    if engine is not None:
        _check_engine(engine)
    if engine is not None and target not in BUILT:
        raise InputError(
            f"engine options mean nothing to the target {target!r}; leave them out, or export to {' or '.join(BUILT)}"
        )
    as_torch = target in ("torch", "torch-tensorrt")
    from tokopt.analysis.outline import outline
    from tokopt.lower.onnx.whole import check_whole, lower_whole
    from tokopt.lower.selftest import write_examples, write_selftest

    say = progress or (lambda line: None)
    check_place(path, overwrite)
    cleaned = bundle if target == "torch" else _clean_up(bundle, say)
    builder = _engine_builder(cleaned, engine) if target == "tensorrt" else None
    compiler = _compiler(cleaned, engine) if target == "torch-tensorrt" else None
    with replacing(path, overwrite) as folder:
        metadata = {"tokopt.pipeline": cleaned.pipeline, "tokopt.semantics": cleaned.semantics}
        if as_torch:
            files = _save_programs(cleaned, folder, say)
        else:
            files = _lower_programs(cleaned, bundle, folder, metadata, say, check=check, tolerance=tolerance)
        whole = lower_whole(cleaned, folder, files, metadata) if target == "onnx" else None
        engines: dict[str, EngineEntry] = {}
        if builder is not None:
            for name, forms in files.items():
                say(f"building the engine of {name}")
                portable = folder / forms[PORTABLE]
                made, engines[name] = builder.build(portable, name, check=check, tolerance=tolerance)
                forms[ENGINE] = made.name
            for reason in builder.without_plugin:
                say(f"no plugin for {reason}")
        if compiler is not None:
            engines = _compile_programs(compiler, folder, files, say, check=check, tolerance=tolerance)
        # Of the programs before their cleanup, which changes no output.
        if as_torch or not check:
            say("writing the self-test")
            write_examples(bundle, folder, whole)
        else:
            written = {
                item.name: FileEntry("", 0) for item in folder.iterdir()
            }  # they are hashed once, below
            manifest = _manifest(cleaned, files, engines, written, whole)
            if whole is not None:
                say("comparing the stages with the program of all")
                check_whole(cleaned, folder, manifest)
            say("running the self-test")
            write_selftest(bundle, folder, manifest, whole, tolerance=tolerance)
        if as_torch:
            (folder / OUTLINE).write_text(outline(bundle).to_json(), encoding="utf-8")
        if bundle.tokenizer is not None:
            (folder / _TOKENIZER).write_text(bundle.tokenizer, encoding="utf-8")
        entries = {item.name: describe_file(item) for item in sorted(folder.iterdir())}
        (folder / MANIFEST).write_text(
            _manifest(cleaned, files, engines, entries, whole).to_json(), encoding="utf-8"
        )
        read_manifest(folder)  # what is written can be read: names from the model are checked here
    return path


def compile(  # as torch.compile
    bundle: Bundle,
    backend: str = "torch-tensorrt",
    *,
    engine: EngineOptions | None = None,
    progress: Callable[[str], None] | None = None,
) -> Compiled:
    """Compile ``bundle`` for use in this process, on this machine's GPU; its programs are called with tensors.

    What goes into the engines is compared with the bundle's programs first. ``engine`` says the sizes, and whether
    what would be left to PyTorch is refused (``strict``). ``progress`` is called with a line per step: what is left is
    named there, and in ``report`` of what is returned.

    Raises InputError without a GPU and for options that do not fit, MissingDependencyError without torch_tensorrt, and
    LoweringError for a program that it cannot compile.
    """
    check_bundle("bundle", bundle)
    if check_text("backend", backend) != "torch-tensorrt":
        raise InputError(
            f"there is no backend {backend!r} that compiles in the process; write 'torch-tensorrt', or export and load"
        )
    if engine is not None:
        _check_engine(engine)
    if progress is not None:
        check_callable("progress", progress, "a function of a line of text")
    from tokopt.lower.tensorrt.engine import EngineOptions
    from tokopt.lower.torch_tensorrt.build import compile_bundle

    say = progress or (lambda line: None)
    return compile_bundle(_clean_up(bundle, say), engine or EngineOptions(), say)


def open_compiled(path: str | Path) -> Compiled:
    """Open the programs of an artifact of the target torch-tensorrt, which are called with tensors on the GPU.

    Only those who trust the artifact should: Torch-TensorRT unpickles what it saved. Raises ArtifactError when the
    artifact is damaged or was built by another builder or version or for another GPU, InputError without a GPU,
    MissingDependencyError without torch_tensorrt.
    """
    from tokopt.lower.torch_tensorrt.build import open_compiled as opened

    return opened(path)


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
    check_files(path, manifest)
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
    """What :func:`verify` found: faults of files, and what the self-test of every form of an ONNX program found.

    ``outputs`` are its outputs in float32 arithmetic, ``tasks`` what callers see as this machine computes it, which is
    empty where the two agree (see :mod:`tokopt.runtime.selftest`).
    """

    path: str
    pipeline: str
    semantics: str
    files: int
    faults: tuple[str, ...]
    outputs: Mapping[str, tuple[OutputCheck, ...]]
    tasks: Mapping[str, tuple[TaskCheck, ...]] = field(default_factory=dict[str, tuple[TaskCheck, ...]])

    @property
    def ok(self) -> bool:
        """No fault, and every output as close as it was when it was exported."""
        checks = (check for side in (self.outputs, self.tasks) for found in side.values() for check in found)
        return not self.faults and all(check.ok for check in checks)

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        sides = {
            key: {
                name: [{**asdict(check), "ok": check.ok} for check in found] for name, found in side.items()
            }
            for key, side in (("outputs", self.outputs), ("task", self.tasks))
        }
        return {**asdict(self), **sides, "ok": self.ok}


def verify(path: str | Path) -> VerifyReport:
    """Check every file's size and SHA-256, then run the self-test of an ONNX artifact, without torch.

    Of a torch artifact the files are checked and nothing is opened: a ``.pt2`` file is for those who trust it. Raises
    ArtifactError when there is no readable manifest; everything found after that is in the report.
    """
    path = check_path("path", path)
    manifest = read_manifest(path)
    faults = list(find_faults(path, manifest))
    found: dict[str, FormChecks] = {}
    if not faults and all(PORTABLE in entry.files for entry in manifest.programs.values()):
        try:
            tests = {name: read_selftest(path, manifest, name) for name in manifest.programs}
            found = check_forms(manifest, tests, lambda: Sessions(path, manifest, spins=False))
        except TokoptError as error:
            faults = [str(error)]
    return VerifyReport(
        str(path),
        manifest.pipeline,
        manifest.semantics,
        len(manifest.files),
        tuple(faults),
        {key: checks.outputs for key, checks in found.items()},
        {key: checks.tasks for key, checks in found.items() if checks.tasks},
    )


def _check_engine(engine: object) -> None:
    from tokopt.lower.tensorrt.engine import EngineOptions

    check_kind("engine", engine, EngineOptions, "an EngineOptions, as in EngineOptions(arch='sm_86')")


def _engine_builder(bundle: Bundle, options: EngineOptions | None) -> EngineBuilder:
    from tokopt.lower.tensorrt.engine import EngineBuilder, EngineOptions

    return EngineBuilder(bundle, options or EngineOptions())


def _compiler(bundle: Bundle, options: EngineOptions | None) -> TorchTensorRT:
    from tokopt.lower.tensorrt.engine import EngineOptions
    from tokopt.lower.torch_tensorrt.build import TorchTensorRT

    return TorchTensorRT(bundle, options or EngineOptions())


def _compile_programs(
    compiler: TorchTensorRT,
    folder: Path,
    files: dict[str, dict[str, str]],
    say: Callable[[str], None],
    *,
    check: bool,
    tolerance: float | None,
) -> dict[str, EngineEntry]:
    """Put a compiled program beside every ``.pt2`` file, and its file into ``files``; return the engine of each."""
    engines = {}
    for name, forms in files.items():
        say(f"compiling {name}" + (" and comparing" if check else ""))
        made = compiler.compile(name, check=check, tolerance=tolerance)
        say(str(made.conversion))
        forms[ENGINE] = f"{name}.{compiler.gpu.arch}.pt2"
        engines[name] = compiler.save(made, folder / forms[ENGINE])
    return engines


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
        with (folder / f"{name}.pt2").open("wb") as file:
            stream = _Deferred(file)
            torch.export.save(assemble(program), cast(IO[bytes], stream))
            stream.finish()
    return files


class _Deferred(io.RawIOBase):
    """A file whose failure is raised at the end: torch's writer ends the process when a write fails."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: BaseException | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)  # torch goes back to the front when all is written

    def write(self, data: Any) -> int:
        try:
            if self.error is None:
                self.file.write(data)
        except BaseException as error:
            self.error = error
        return len(data)

    def finish(self) -> None:
        """Raise the first error."""
        if self.error is not None:
            raise self.error


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
    from tokopt.ir.memory import trim
    from tokopt.lower.cpu.form import lower_with_kernels
    from tokopt.lower.onnx.export import WeightFile, lower
    from tokopt.lower.onnxruntime.cpu import lower_for_cpu

    files: dict[str, dict[str, str]] = {}
    weights = WeightFile(folder)
    for name, program in bundle.programs.items():
        say(f"lowering {name} to ONNX" + (" and comparing" if check else ""))

        def report(outcome: Outcome, name: str = name) -> None:
            say(f"{name}: {outcome}")

        original = originals.programs[name]
        seen = compared(original.outputs, originals.states)
        path = lower(
            program,
            folder,
            name,
            weights=weights,
            metadata=metadata,
            check=check,
            tolerance=tolerance,
            original=original,
            compared=seen,
            report=report,
        )
        trim()
        fused = lower_for_cpu(
            program,
            path,
            check=check,
            tolerance=tolerance,
            original=original,
            compared=seen,
            report=report,
        )
        trim()
        forms = {PORTABLE: path} | ({ONE_ROW: fused} if fused else {})
        own = lower_with_kernels(
            program,
            path,
            weights,
            alike=bundle.schedule.speculates,
            check=check,
            tolerance=tolerance,
            original=original,
            compared=seen,
            report=report,
        )
        forms |= {OWN: own} if own else {}
        files[name] = {form: made.name for form, made in forms.items()}
        trim()
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
            f"{path} was exported for {', '.join(entry.files)}, which cannot become a bundle again; give "
            "what it was exported from, or export the bundle with target='torch' too"
        )
    import tokopt.kernels.registry  # noqa: F401  # registers the ops that the program may call
    from tokopt.frontend.pt2 import load_pt2
    from tokopt.ir.export import unlifted

    try:
        module = unlifted(load_pt2(file_path(path, entry.files["torch"])))
    except ArtifactError as error:
        raise ArtifactError(f"{error} (this one by torch {manifest.versions.get('torch', '?')})") from error
    return Program(
        module,
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
    whole: Whole | None,
) -> Manifest:
    programs = {
        name: ProgramEntry(
            program.inputs,
            program.outputs,
            program.ranges,
            files[name],
            engine=engines.get(name),
            aliases=program.aliases,
            kernels=cpu.VERSION if OWN in files[name] else None,
        )
        for name, program in bundle.programs.items()
    }
    manifest = Manifest(
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
    return manifest if whole is None else whole.listed(manifest)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("tokopt", "torch", "onnx", "onnxscript", "onnxruntime"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
