"""Compile programs by Torch-TensorRT, keep what it makes in an artifact, and open that again.

Torch-TensorRT builds engines for the GPU that it finds, and leaves to PyTorch what it cannot convert.
"""

# torch_tensorrt is untyped, and need not be installed.
# pyright: reportMissingImports=false

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.fx import GraphModule, Node

from tokopt.arguments import check_path
from tokopt.errors import ArtifactError, InputError, LoweringError, MissingDependencyError
from tokopt.ir.bundle import Bundle
from tokopt.ir.graph import aten, describe, is_call
from tokopt.ir.program import Program, TensorSpec
from tokopt.lower.parity.precision import half_precision_limit
from tokopt.lower.parity.selections import selects
from tokopt.lower.tensorrt.engine import EngineOptions, check_float8
from tokopt.lower.tensorrt.profiles import choose_profiles, parse_profiles
from tokopt.lower.torch_tensorrt.program import aten_program, sized, with_usual_sizes
from tokopt.runtime.engines.tensorrt import Installed, check_engine
from tokopt.runtime.format.check_files import check_files
from tokopt.runtime.format.manifest import ENGINE, EngineEntry, Profile, file_path, read_manifest
from tokopt.runtime.numerics import SELFTEST_LIMITS, check_output

TARGET = "torch-tensorrt"

NO_GPU = (
    "Torch-TensorRT builds for the GPU that PyTorch finds, and it finds none; compile where there is one, or export "
    "with target='tensorrt' and an arch, which takes none"
)
MISSING = "torch_tensorrt is not installed; install it with: pip install 'tokopt[torch-tensorrt]'"


@dataclass(frozen=True)
class Conversion:
    """What became of a program: how many engines, and the operators that PyTorch runs, with their number."""

    program: str
    engines: int
    fallback: Mapping[str, int]

    def __str__(self) -> str:
        """One line for a report."""
        engines = f"{self.program}: {self.engines} {'engine' if self.engines == 1 else 'engines'}"
        left = ", ".join(f"{name} ({count})" for name, count in self.fallback.items())
        return f"{engines}; PyTorch runs {left}" if left else f"{engines}, and nothing is left to PyTorch"


@dataclass(frozen=True)
class CompiledProgram:
    """A program of engines: called with tensors on the GPU in the order of ``inputs``, it returns its outputs' tensors.

    Sizes are those of ``profiles``, by named axis. ``conversion`` is None of one that was opened.
    """

    module: Callable[..., Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: Mapping[str, Profile]
    conversion: Conversion | None = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the program without gradients; raises InputError for another number of tensors."""
        if len(tensors) != len(self.inputs):
            names = ", ".join(spec.name for spec in self.inputs)
            raise InputError(f"the program takes {len(self.inputs)} tensors, {names}, and got {len(tensors)}")
        with torch.no_grad():
            return tuple(self.module(*tensors))


@dataclass(frozen=True)
class Compiled:
    """The programs of a bundle, compiled; ``main`` names the one that a call runs."""

    programs: Mapping[str, CompiledProgram]
    main: str

    @property
    def report(self) -> tuple[str, ...]:
        """A line per program: its engines, and what is left to PyTorch."""
        return tuple(str(program.conversion) for program in self.programs.values() if program.conversion)

    def __call__(self, *tensors: Tensor) -> dict[str, Tensor]:
        """The outputs of the main program, by name."""
        program = self.programs[self.main]
        return {spec.name: made for spec, made in zip(program.outputs, program(*tensors), strict=True)}


@dataclass(frozen=True)
class Gpu:
    """Where programs are compiled: a device of PyTorch, and its compute capability."""

    device: str
    arch: str


def find_gpu() -> Gpu:
    """PyTorch's current GPU; raises InputError without one."""
    if not torch.cuda.is_available():
        raise InputError(NO_GPU)
    major, minor = torch.cuda.get_device_capability()
    return Gpu("cuda", f"sm_{major}{minor}")


class TorchTensorRT:
    """Compiles the programs of one bundle."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        """Raise InputError without a GPU, and for options that do not fit; MissingDependencyError without
        torch_tensorrt."""
        self.bundle, self.options = bundle, options
        if options.plugins:
            raise InputError("Torch-TensorRT gets token ops in operators of PyTorch; leave plugins out")
        self.profiles = choose_profiles(bundle, parse_profiles(options.profiles))
        self.gpu = find_gpu()
        self.installed = _installed(self.gpu.arch)
        if options.arch not in (None, self.gpu.arch):
            raise LoweringError(
                f"Torch-TensorRT builds for the GPU that it finds, {self.gpu.arch}, not for {options.arch}; compile on "
                "a machine with that GPU"
            )
        check_float8(bundle, self.gpu.arch)

    def compile(self, name: str, *, check: bool, tolerance: float | None) -> CompiledProgram:
        """Compile program ``name``.

        ``check`` compares what Torch-TensorRT is given with the program, both run by PyTorch on the CPU. Raises
        LoweringError when they disagree, when Torch-TensorRT fails, and under ``strict`` when it leaves something to
        PyTorch.
        """
        program, profiles = self.bundle.programs[name], self.profiles[name]
        within = sized(program, profiles)
        exported = aten_program(within)
        if check:
            check_aten(name, within, exported, tolerance)
        module = self._compiled(name, within, exported)
        conversion = _conversion(name, module)
        if self.options.strict and (conversion.fallback or not conversion.engines):
            raise LoweringError(
                f"{conversion}; leave strict out, or the pass or the module that makes these operators"
            )
        return CompiledProgram(module, program.inputs, program.outputs, profiles, conversion)

    def save(self, made: CompiledProgram, path: Path) -> EngineEntry:
        """Write a compiled program to ``path``; raises LoweringError when Torch-TensorRT cannot."""
        trt = _module()
        try:
            with _quiet():
                trt.save(made.module, str(path), output_format="exported_program", retrace=False)
        except Exception as error:  # of torch.export's writer, for what crosses between engines and PyTorch
            raise LoweringError(
                f"Torch-TensorRT compiles {path.stem} and cannot save it ({_line(error)}); use it in the process "
                "(tokopt.compile), or build with strict"
            ) from error
        found = self.installed
        return EngineEntry(found.builder, found.version, found.arch, made.profiles)

    def _compiled(self, name: str, program: Program, exported: ExportedProgram) -> GraphModule:
        trt = _module()
        import_module("tokopt.lower.torch_tensorrt.converters")
        lowering = import_module("torch_tensorrt.dynamo.lowering")
        options: dict[str, Any] = {"offload_module_to_cpu": True}
        if self.options.workspace is not None:
            options["workspace_size"] = int(self.options.workspace * 2**30)
        if self.options.timing_cache is not None:
            options["timing_cache_path"] = str(self.options.timing_cache)
        try:
            with _quiet():
                moved = move_to_device_pass(exported, self.gpu.device)
                ready = moved.run_decompositions(lowering.get_decompositions())
                with with_usual_sizes(ready, program, self.profiles[name]):
                    given = [trt.Input(shape=tuple(x.shape), dtype=x.dtype) for x in program.example]
                    return trt.dynamo.compile(ready, arg_inputs=given, **options)
        except Exception as error:  # torch_tensorrt raises whatever its converters do
            raise LoweringError(
                f"Torch-TensorRT {self.installed.version} cannot compile program {name!r}: {_line(error)}; run the "
                "portable ONNX (target='onnx'), or leave out the pass or the module that makes this operator"
            ) from error


def compile_bundle(bundle: Bundle, options: EngineOptions, say: Callable[[str], None]) -> Compiled:
    """Every program of a bundle, compiled for use in this process; ``say`` gets the report."""
    compiler = TorchTensorRT(bundle, options)
    programs = {}
    for name in bundle.programs:
        say(f"compiling {name}")
        programs[name] = compiler.compile(name, check=True, tolerance=None)
        say(str(programs[name].conversion))
    return Compiled(programs, bundle.main_name)


def open_compiled(path: str | Path) -> Compiled:
    """The programs of an artifact of the target torch-tensorrt, on the GPU that they were built for.

    A compiled program is a file for those who trust it: Torch-TensorRT unpickles it. Raises ArtifactError when the
    artifact is damaged or was built by another builder or version or for another GPU, InputError without a GPU,
    MissingDependencyError without torch_tensorrt.
    """
    path = check_path("path", path)
    manifest = read_manifest(path)
    check_files(path, manifest)
    for name, entry in manifest.programs.items():
        if entry.engine is None or not entry.engine.builder.startswith(TARGET):
            raise ArtifactError(
                f"program {name!r} of {path} was not compiled by Torch-TensorRT; compile it with: tokopt export MODEL "
                f"-o {path} --target {TARGET}"
            )
    found = _installed(find_gpu().arch)
    programs = {}
    for name, entry in manifest.programs.items():
        assert entry.engine is not None
        check_engine(
            path, name, entry.engine, found, TARGET, "open the program without it (tokopt.open_bundle)"
        )
        module = _module().load(str(file_path(path, entry.files[ENGINE]))).module()
        programs[name] = CompiledProgram(module, entry.inputs, entry.outputs, entry.engine.profiles)
    decode = manifest.schedule.entry("decode") or manifest.schedule.entries[-1]
    return Compiled(programs, decode.program)


def check_aten(name: str, program: Program, exported: ExportedProgram, limit: float | None) -> None:
    """Compare what Torch-TensorRT is given with ``program`` on its example, both run by PyTorch on the CPU.

    ``limit`` is the largest NMSE, by default what the dtype of an output allows, or more where rounding may choose
    other tokens or steps. Raises LoweringError naming the output and its NMSE.
    """
    if limit is None:
        limit = SELFTEST_LIMITS["approximate"] if selects(program) else half_precision_limit(program)
    wanted = program(*program.example)
    with torch.no_grad():
        made = exported.module(check_guards=False)(*program.example)
    for spec, want, got in zip(program.outputs, wanted, made, strict=True):
        check = check_output(spec.name, want.numpy(force=True), got.numpy(force=True), limit)
        if not check.ok:
            raise LoweringError(
                f"program {name!r}: output {spec.name!r} of the program for Torch-TensorRT differs: NMSE "
                f"{check.nmse:.2g}, at most {check.limit:.2g} is allowed; report it, or pass check=False"
            )


def _conversion(name: str, module: GraphModule) -> Conversion:
    """Engines are sub-modules that hold no graph; what else is called, PyTorch runs.

    Copies are not counted (of an input that is an output, for example): they compute nothing.
    """
    engines, left = 0, Counter[str]()
    for node in module.graph.nodes:
        part = getattr(module, str(node.target)) if node.op == "call_module" else None
        if isinstance(part, GraphModule):
            left.update(map(describe, _operators(part)))
        elif part is not None:
            engines += 1
        elif node in _operators(module):
            left[describe(node)] += 1
    return Conversion(name, engines, dict(left))


def _operators(module: GraphModule) -> list[Node]:
    """Calls of operators of PyTorch that compute: neither of Python's own functions, nor copies, nor sizes."""
    calls = [node for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return [
        n
        for n in calls
        if not is_call(n, aten.clone) and isinstance(n.meta.get("val"), (Tensor, tuple, list))
    ]


def _installed(arch: str) -> Installed:
    """The Torch-TensorRT that is here; its version is of no use without that of the TensorRT below."""
    module = _module()
    tensorrt = import_module("tensorrt")  # torch_tensorrt has put there the one that it uses
    rtx = bool(module.ENABLED_FEATURES.tensorrt_rtx)
    version = f"{module.__version__} with TensorRT {tensorrt.__version__}"
    return Installed(f"{TARGET}-rtx" if rtx else TARGET, version, arch)


def _module() -> Any:
    try:
        return import_module("torch_tensorrt")
    except ImportError as error:
        raise MissingDependencyError(MISSING) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of torch_tensorrt: what fails is raised, and what falls back is reported."""
    log = logging.getLogger("torch_tensorrt")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _line(error: Exception) -> str:
    return " ".join(str(error).split("\n\n")[0].split())[:300]
