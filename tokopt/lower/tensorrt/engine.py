"""Lower programs to TensorRT engines: the portable ONNX, rewritten, and built with TensorRT or TensorRT-RTX.

The network is strongly typed: it computes in the types that the program says, so half precision and 8-bit products come
from passes (``cast``, ``int8``, ``fp8``), and from nowhere else. TensorRT-RTX builds for a GPU that need not be there;
TensorRT builds for the one it finds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from tokopt.arguments import check_flag, check_items, check_number, check_path, check_text
from tokopt.errors import InputError, LoweringError
from tokopt.ir.bundle import Bundle
from tokopt.ir.graph import describe, is_call
from tokopt.ir.program import Program
from tokopt.kernels import ops
from tokopt.kernels.plugins import register_plugins
from tokopt.lower.parity.check import check_rewritten, resized
from tokopt.lower.tensorrt.graph import rewrite_for_tensorrt
from tokopt.lower.tensorrt.plugins import use_plugins, used_plugins
from tokopt.lower.tensorrt.profiles import choose_profiles, parse_profiles
from tokopt.place import writing
from tokopt.runtime.engines.cuda import device_arch
from tokopt.runtime.engines.tensorrt import RTX, import_tensorrt
from tokopt.runtime.format.manifest import ARCH, EngineEntry, Profile

NO_ARCH = "say what to build for: EngineOptions(arch='sm_86'), --arch sm_86"
NO_GPU = "TensorRT builds on the GPU; export where there is one, or install tokopt[tensorrt-rtx] alone"


FLOAT8_SINCE = 89
"""The first compute capability with products of 8-bit floats."""


@dataclass(frozen=True)
class EngineOptions:
    """What to build engines for.

    ``arch`` is the compute capability of the GPU, ``"sm_86"``; by default that of this machine's GPU. ``profiles``
    spell sizes of named axes: ``"batch=1:8:32"`` are the smallest, the most frequent and the largest, ``"slots=1024"``
    is the only one. ``workspace`` bounds the builder's scratch memory in GiB. ``timing_cache`` is a file in which
    TensorRT keeps what it has measured for the next build. ``plugins`` computes token ops by their CUDA kernels inside
    the engine, which takes TensorRT (TensorRT-RTX has no plugins in Python) and the extra ``cuda``. ``strict`` refuses
    a program of which Torch-TensorRT would leave operators to PyTorch; engines of the target tensorrt hold all of it.

    Raises InputError for values that mean nothing.
    """

    arch: str | None = None
    profiles: Sequence[str] = ()
    workspace: float | None = None
    timing_cache: Path | None = None
    plugins: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        if self.arch is not None and not re.fullmatch(ARCH, check_text("arch", self.arch)):
            raise InputError(f"{self.arch!r} is no compute capability; write for example sm_86")
        if self.workspace is not None:
            check_number("workspace", self.workspace, lambda x: x > 0, "of GiB above 0")
        if self.timing_cache is not None:
            object.__setattr__(self, "timing_cache", check_path("timing_cache", self.timing_cache))
        check_flag("plugins", self.plugins)
        check_flag("strict", self.strict)
        takes = "a list of profiles such as 'batch=1:8:32'"
        parse_profiles(
            [check_text("a profile", text) for text in check_items("profiles", self.profiles, takes)]
        )


class EngineBuilder:
    """Builds the engines of one bundle; ``without_plugin`` says which ops of the last one have none, and why."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        """Raise MissingDependencyError without TensorRT, InputError for profiles that do not fit the bundle and
        without a GPU that could say its ``arch``, LoweringError for an ``arch`` that TensorRT does not build for, or
        that lacks what the bundle computes with."""
        self.bundle, self.options = bundle, options
        self.builder, self.trt = import_tensorrt()
        self.arch = options.arch or device_arch(NO_ARCH)
        self.profiles = choose_profiles(bundle, parse_profiles(options.profiles))
        self._check_options()
        check_float8(bundle, self.arch)
        self._log = _log(self.trt)
        self.without_plugin: list[str] = []

    def build(
        self, portable: Path, name: str, *, check: bool, tolerance: float | None
    ) -> tuple[Path, EngineEntry]:
        """Write the engine of program ``name`` beside its portable ONNX file; return it and its manifest entry.

        ``check`` compares the graph that TensorRT gets with the portable one, on ONNX Runtime, since the engine may be
        for a GPU that is not here. Raises LoweringError when they disagree and when TensorRT refuses the
        graph, naming the operator and the module of the model that it comes from.
        """
        profiles = self.profiles[name]
        fixed = {axis: profile.min for axis, profile in profiles.items() if profile.min == profile.max}
        with _rewritten(portable, fixed) as path:
            if check:
                check_rewritten(_resized(self.bundle.programs[name], fixed), portable, path, tolerance)
            if self.options.plugins:
                self._use_plugins(portable, path, fixed)
            if loop := _loop(path):
                raise self._refusal(name, f"{loop} is a Loop, on which its builder crashes")
            plugins = used_plugins(ir.load(path), self.arch)
            engine = self._serialize(path, name, profiles)
        target = portable.with_name(f"{name}.{self.arch}.engine")
        target.write_bytes(engine)
        return target, EngineEntry(self.builder, self.trt.__version__, self.arch, profiles, plugins)

    def _use_plugins(self, portable: Path, path: Path, fixed: Mapping[str, int]) -> None:
        """Write the graph at ``path`` again with plugins, after it was compared without: ONNX Runtime has none."""
        register_plugins(self.arch)
        model = ir.load(portable)
        self.without_plugin = use_plugins(model)
        rewrite_for_tensorrt(model, fixed)
        ir.save(model, path)

    def _check_options(self) -> None:
        if self.builder == RTX:
            known = [
                f"sm_{cc.removeprefix('SM')}"
                for cc in self.trt.ComputeCapability.__members__
                if cc[-1].isdigit()
            ]
            if self.arch not in known:
                raise LoweringError(
                    f"TensorRT-RTX {self.trt.__version__} builds no engines for {self.arch}, only for "
                    f"{', '.join(known)}; choose one of them, or build with TensorRT on that GPU"
                )
            if self.options.timing_cache is not None:
                raise InputError("TensorRT-RTX measures nothing while it builds; leave the timing cache out")
            if self.options.plugins:
                raise InputError(
                    "TensorRT-RTX has no plugins in Python; leave plugins out, or install TensorRT"
                )
        elif (own := device_arch(NO_GPU)) != self.arch:
            raise LoweringError(
                f"TensorRT {self.trt.__version__} builds for the GPU that it finds, {own}, not for {self.arch}; "
                "export on a machine with that GPU, or install tokopt[tensorrt-rtx] alone"
            )

    def _serialize(self, path: Path, name: str, profiles: Mapping[str, Profile]) -> Any:
        """The engine of the ONNX file at ``path``, as a buffer."""
        self._log.errors.clear()
        builder = self.trt.Builder(self._log)
        flags = self.trt.NetworkDefinitionCreationFlag
        chosen = 1 << int(flags.STRONGLY_TYPED)
        if self.options.plugins:
            chosen |= 1 << int(flags.PREFER_AOT_PYTHON_PLUGINS)
        network = builder.create_network(chosen)
        parser = self.trt.OnnxParser(network, self._log)
        if not parser.parse_from_file(str(path)):
            raise self._refusal(name, _parser_fault(parser, path))
        self._allow_decomposition(network)
        config = builder.create_builder_config()
        config.add_optimization_profile(self._profile(builder, name, profiles))
        if self.builder == RTX:
            config.num_compute_capabilities = 1
            config.set_compute_capability(
                getattr(self.trt.ComputeCapability, self.arch.upper().replace("_", "")), 0
            )
        if self.options.workspace is not None:
            limit = int(self.options.workspace * 2**30)
            config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, limit)
        with self._timing_cache(config):
            engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise self._refusal(name, self._log.errors[0] if self._log.errors else "it does not say why")
        return engine

    def _profile(self, builder: Any, name: str, profiles: Mapping[str, Profile]) -> Any:
        made = builder.create_optimization_profile()
        for tensor in self.bundle.programs[name].inputs:
            sizes = [Profile(a, a, a) if isinstance(a, int) else profiles[a] for a in tensor.axes]
            made.set_shape(
                tensor.name, *([getattr(size, end) for size in sizes] for end in ("min", "opt", "max"))
            )
        return made

    def _allow_decomposition(self, network: Any) -> None:
        """Attention that no fused kernel computes, in float32 for example, may become two products and a softmax."""
        kind = getattr(
            self.trt.LayerType, "ATTENTION_INPUT", None
        )  # older versions parse Attention into its parts
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            if layer.type == kind:
                layer.__class__ = self.trt.IAttentionInputLayer  # how TensorRT's Python casts
                layer.attention.decomposable = True

    @contextmanager
    def _timing_cache(self, config: Any) -> Iterator[None]:
        path = self.options.timing_cache
        if path is None:
            yield
            return
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
        yield
        with writing(path) as partial:
            partial.write_bytes(config.get_timing_cache().serialize())

    def _refusal(self, name: str, reason: str) -> LoweringError:
        title = {"tensorrt": "TensorRT"}.get(self.builder, "TensorRT-RTX")
        return LoweringError(
            f"{title} {self.trt.__version__} refuses program {name!r}: {' '.join(reason.split())}; run the portable "
            "ONNX (target='onnx'), or leave out the pass that made this operator"
        )


def check_float8(bundle: Bundle, arch: str) -> None:
    """Raise LoweringError for 8-bit floats on a GPU that does not multiply them."""
    if int(arch.removeprefix("sm_")) >= FLOAT8_SINCE:
        return
    for name, program in bundle.programs.items():
        for node in program.module.graph.nodes:
            if is_call(node, ops.fake_float8, ops.dequantize_float8):
                raise LoweringError(
                    f"{describe(node)} of program {name!r} is of 8-bit floats, which {arch} does not multiply "
                    f"(sm_{FLOAT8_SINCE} and later do); use int8 in the place of fp8, or run the portable ONNX "
                    "(target='onnx')"
                )


def _resized(program: Program, sizes: Mapping[str, int]) -> Program:
    """``program`` with an example of these sizes."""
    for axis, size in sizes.items():
        program = replace(program, example=resized(program, axis, size))
    return program


@contextmanager
def _rewritten(portable: Path, fixed: Mapping[str, int]) -> Iterator[Path]:
    """The graph for TensorRT, as a file beside the portable one whose weights it shares."""
    model = ir.load(portable)
    rewrite_for_tensorrt(model, fixed)
    path = portable.with_name(f"{portable.stem}.tensorrt.onnx")
    try:
        ir.save(model, path)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _parser_fault(parser: Any, path: Path) -> str:
    """The first error: the operator, the module of the user's model that it comes from, and the parser's words."""
    error = parser.get_error(0)
    operator = error.node_operator() or error.func().removeprefix(
        "import"
    )  # attributes are read without a node
    nodes = [node for node in ir.load(path).graph.all_nodes() if node.op_type == operator]
    named = [node for node in nodes if node.name == error.node_name()] or nodes
    what = f"{operator} of {_where(named[0])}" if len(named) == 1 else operator
    return f"{what} cannot be read ({error.desc().split(' [checkMacros')[0].strip()})"


def _loop(path: Path) -> str | None:
    """Where the first loop of the graph is; None without one."""
    node = next((node for node in ir.load(path).graph.all_nodes() if node.op_type == "Loop"), None)
    return None if node is None else _where(node)


def _where(node: ir.Node) -> str:
    """The operator in the program, and the module of the user's model that it comes from.

    Scopes are written as ``: Flat/model: ViTModel/model.layers.0: ViTLayer/farthest_point: tokopt.farthest_point``.
    """
    scopes = [scope.partition(":") for scope in node.metadata_props.get("namespace", "").split("/")]
    if len(scopes) < 2:
        return node.op_type
    return f"{scopes[-1][2].strip()} at {scopes[-2][0] or 'the top'}"


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):
        """Keeps errors, since what fails is raised; drops the rest."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

    return Log()
