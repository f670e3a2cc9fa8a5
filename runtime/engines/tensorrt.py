"""Programs as TensorRT engines, with the state of a language model in GPU memory.

Only what an engine was built for executes it: the same builder and version, on the same compute capability. Everything
else is refused with the command that builds it again; the portable ONNX form is beside it in any case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from tokopt.errors import ArtifactError, InputError, MissingDependencyError, TokoptError
from tokopt.runtime.buffers import Buffers, shared_states
from tokopt.runtime.engines.cuda import DeviceArray, Staged, bindings, call, device_arch, free_memory
from tokopt.runtime.engines.kernels import Kernels
from tokopt.runtime.format.manifest import (
    ENGINE,
    EngineEntry,
    Manifest,
    ProgramEntry,
    Range,
    file_path,
)
from tokopt.runtime.format.signature import BATCH, wiring
from tokopt.runtime.format.state import State

RTX = "tensorrt-rtx"

MODULES = {"tensorrt": "tensorrt", RTX: "tensorrt_rtx"}
"""Builder -> its module, in order of preference. The extra of tokopt that brings it has the builder's name."""

GRAPHS = 4
"""Captured calls that are kept: states that are not written in place alternate between two buffers."""


@dataclass(frozen=True)
class Installed:
    """A TensorRT that is here: its name, its version, and the compute capability of the GPU."""

    builder: str
    version: str
    arch: str


def import_tensorrt() -> tuple[str, Any]:
    """Name and module of the TensorRT that is installed; raises MissingDependencyError without one."""
    for name, module in MODULES.items():
        try:
            found = import_module(module)
        except (ImportError, OSError):  # OSError: the module is there and its libraries are not
            continue
        # Torch-TensorRT for TensorRT-RTX goes by the name of TensorRT once it is imported.
        return (RTX if getattr(found, "_package_name", "") == MODULES[RTX] else name), found
    raise MissingDependencyError(
        "TensorRT is not installed; install tokopt[tensorrt-rtx], or tokopt[tensorrt]"
    )


def check_engine(
    folder: Path,
    program: str,
    engine: EngineEntry,
    found: Installed,
    target: str = "tensorrt",
    otherwise: str = "load it with the default backend",
) -> None:
    """Raise ArtifactError unless ``found`` executes the engine, with the command that builds one which it does."""
    needed = (engine.builder, engine.version, engine.arch)
    if needed == (found.builder, found.version, found.arch):
        return
    raise ArtifactError(
        f"the engine of program {program!r} in {folder} needs {engine.builder} {engine.version} on {engine.arch}, and "
        f"here is {found.builder} {found.version} on {found.arch}; build it again with: tokopt export MODEL "
        f"-o {folder} --target {target} --arch {found.arch}, or {otherwise}"
    )


def narrowed(folder: Path, manifest: Manifest) -> Manifest:
    """``manifest`` with the sizes of every program's axes as its engine takes them.

    Raises ArtifactError when a program has no engine.
    """
    programs = {}
    for name, entry in manifest.programs.items():
        if entry.engine is None:
            raise ArtifactError(
                f"program {name!r} of {folder} has no engine; build it with: tokopt export MODEL -o {folder} "
                "--target tensorrt --arch sm_XX"
            )
        profiles = {axis: Range(profile.min, profile.max) for axis, profile in entry.engine.profiles.items()}
        programs[name] = replace(entry, ranges={**entry.ranges, **profiles})
    return replace(manifest, programs=programs)


class Engines:
    """The engines of an artifact, opened when first asked for; what :class:`.Sessions` is for ONNX Runtime."""

    kernels = Kernels(reason="TensorRT runs on the GPU")

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """``manifest`` is :func:`narrowed`. Raises ArtifactError for engines that cannot run here, InputError without a
        GPU, MissingDependencyError without TensorRT."""
        self.folder, self.manifest = folder, manifest
        builder, self.trt = import_tensorrt()
        found = Installed(builder, self.trt.__version__, device_arch("load it with the default backend"))
        for name, entry in manifest.programs.items():
            assert entry.engine is not None
            check_engine(folder, name, entry.engine, found)
        self.stream = int(call("cudaStreamCreate"))
        self._open: dict[str, Engine] = {}

    def forms(self, program: str) -> tuple[str, ...]:
        """Raise InputError: the stored inputs of a self-test have other sizes than the engines."""
        raise InputError(
            f"the stored inputs of {self.folder} have another number of slots than its engines; run the self-test with "
            "the default backend"
        )

    def best(self, program: str, batch: int) -> Engine:
        """The engine of a program, which takes any batch of its profile."""
        return self.get(program)

    def get(self, program: str, form: str = ENGINE) -> Engine:
        """The engine of a program, of which there is one form; raises ArtifactError when TensorRT cannot load it."""
        if program not in self._open:
            entry = self.manifest.programs[program]
            path = file_path(self.folder, entry.files[form])
            self._open[program] = Engine(self.trt, path, entry, self.stream)
        return self._open[program]

    def buffers(self, batch: int, slots: int) -> DeviceBuffers:
        """The initial states of a language model."""
        return DeviceBuffers(self.manifest.states, batch, slots, shared_ranges(self.manifest))

    def check_reading(self, batch: int, tokens: int, slots: int) -> None:
        """Nothing is to be refused: an engine has all the memory that its calls take."""

    def bind(self, program: str, buffers: DeviceBuffers) -> BoundEngine:
        """A program whose states stay in ``buffers``."""
        return BoundEngine(self.get(program), buffers)

    def run(
        self, program: str, feed: Mapping[str, np.ndarray], form: str | None = None
    ) -> dict[str, np.ndarray]:
        """The outputs of a program for arrays, states among them."""
        engine = self.get(program, form or ENGINE)
        given = {name: DeviceArray.of(feed[name]) for name in set(engine.entry.aliases.values())}
        kept = {output: given[name] for output, name in engine.entry.aliases.items()}
        results = engine.call({n: a for n, a in feed.items() if n not in given}, given, kept)
        return {
            tensor.name: kept[tensor.name].numpy() if tensor.name in kept else results[tensor.name].copy()
            for tensor in engine.entry.outputs
        }

    def in_float(self) -> None:
        """None: an engine computes as it was built."""


def shared_ranges(manifest: Manifest) -> dict[str, Range]:
    """The sizes that all programs take of the axes that states have: the batch and the slot axes."""
    axes = {axis for state in manifest.states for axis in state.axes if isinstance(axis, str)}
    found: dict[str, Range] = {}
    for entry in manifest.programs.values():
        for axis in axes & set(entry.ranges):
            low, high = found.get(axis, Range()), entry.ranges[axis]
            most = [bound.max for bound in (low, high) if bound.max is not None]
            found[axis] = Range(max(low.min, high.min), min(most, default=None))
    return found


class Engine:
    """A deserialized engine with its execution context; its calls are ordered by one stream."""

    def __init__(self, trt: Any, path: Path, entry: ProgramEntry, stream: int) -> None:
        self.entry, self.stream = entry, stream
        self._log = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ArtifactError(f"TensorRT {trt.__version__} cannot load {path}; export the artifact again")
        self._captures = not hasattr(trt, "CudaGraphStrategy")
        if self._captures:
            self._context = self._engine.create_execution_context()
        else:  # TensorRT-RTX captures by itself whatever can be captured
            settings = self._engine.create_runtime_config()
            settings.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self._context = self._engine.create_execution_context(settings)
        self._staged: dict[str, Staged] = {}
        self._graphs: dict[tuple[object, ...], Any] = {}

    def run(self, outputs: Sequence[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The named outputs for named inputs, as arrays of their own."""
        results = self.call(feed, {}, {})
        return [results[name].copy() for name in outputs]

    def call(
        self,
        feed: Mapping[str, np.ndarray],
        given: Mapping[str, DeviceArray],
        kept: Mapping[str, DeviceArray],
    ) -> dict[str, np.ndarray]:
        """One call on arrays of the host and of the GPU (``given``).

        The outputs ``kept`` are written to these GPU arrays; the others are returned, valid until the next call. Raises
        InputError for shapes outside the engine's profiles, TokoptError when the GPU fails.
        """
        arrays = dict(given)
        for name, array in feed.items():
            staged = self._stage(name, array.shape, array.dtype)
            staged.upload(array, self.stream)
            arrays[name] = staged.device
        for name, array in arrays.items():
            if not self._context.set_input_shape(name, array.shape):
                raise InputError(
                    f"the engine takes no {name!r} of shape {list(array.shape)}; export with a --profile that holds it"
                )
        returned: dict[str, Staged] = {}
        for tensor in self.entry.outputs:
            if tensor.name not in kept:
                shape = tuple(self._context.get_tensor_shape(tensor.name))
                returned[tensor.name] = self._stage(tensor.name, shape, np.dtype(tensor.dtype))
        self._launch(arrays | dict(kept) | {name: staged.device for name, staged in returned.items()})
        for staged in returned.values():
            staged.download(self.stream)
        call("cudaStreamSynchronize", self.stream)
        return {name: staged.host for name, staged in returned.items()}

    def writes_in_place(self, output: str) -> bool:
        """Whether the engine writes an output into the memory of an input."""
        find = getattr(self._engine, "get_aliased_input_tensor", None)  # newer than the oldest version
        return bool(find is not None and find(output))

    def _stage(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Staged:
        """The staging of an input or output, kept while its shape stays the same."""
        known = self._staged.get(name)
        if known is None or known.host.shape != shape:
            known = self._staged[name] = Staged(shape, dtype)
        return known

    def _launch(self, arrays: Mapping[str, DeviceArray]) -> None:
        """Enqueue the engine on these arrays; from the third call on the same memory as one captured graph."""
        for name, array in arrays.items():
            self._context.set_tensor_address(name, array.address)
        key = tuple((name, array.address, array.shape) for name, array in sorted(arrays.items()))
        if not self._captures or key not in self._graphs:
            if len(self._graphs) >= GRAPHS:
                self._drop_graphs()
            self._graphs[key] = None  # TensorRT has to run once on new shapes before it is captured
            self._enqueue()
            return
        if self._graphs[key] is None:
            self._graphs[key] = self._capture()
        if self._graphs[key] is None:
            self._captures = False
            self._enqueue()
        else:
            call("cudaGraphLaunch", self._graphs[key], self.stream)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self.stream):
            raise TokoptError(
                "TensorRT failed on inputs that fit; load the artifact with the default backend"
            )

    def _capture(self) -> Any:
        """The call as a graph; None where it cannot be captured (a loop, for example)."""
        cuda = bindings()
        call(
            "cudaStreamBeginCapture", self.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )
        enqueued = self._context.execute_async_v3(self.stream)
        error, graph = cuda.cudaStreamEndCapture(self.stream)
        if not enqueued or error != cuda.cudaError_t.cudaSuccess:
            return None
        made = call("cudaGraphInstantiate", graph, 0)
        call("cudaGraphDestroy", graph)
        return made

    def _drop_graphs(self) -> None:
        for graph in self._graphs.values():
            if graph is not None:
                call("cudaGraphExecDestroy", graph)
        self._graphs.clear()


class DeviceBuffers(Buffers):
    """The state of a language model in GPU memory, with as many slots as the engines take."""

    def __init__(self, states: Sequence[State], batch: int, slots: int, ranges: Mapping[str, Range]) -> None:
        """Raise InputError for a batch or slots that the profiles do not hold, and for what does not fit the memory."""
        self.ranges = ranges
        most = ranges[BATCH].max if BATCH in ranges else None
        if most is not None and batch > most:
            raise InputError(
                f"the engines take at most {most} rows, not {batch}; export with --profile batch=1:{batch}:{batch}"
            )
        super().__init__(states, batch, slots)

    def advance(self, session: Engine, entry: ProgramEntry, feed: Mapping[str, np.ndarray]) -> None:
        """Run a program of nothing but states and ``feed``; what it does not write in place is in new memory."""
        given = {name: self.values[state] for name, state in wiring(entry.inputs).items()}
        shared, written = shared_states(entry), wiring(entry.outputs)
        kept: dict[str, DeviceArray] = {
            name: self.values[state] if name in shared else self.like(self.values[state])
            for name, state in written.items()
        }
        session.call(feed, given, kept)
        self.values.update({state: kept[name] for name, state in written.items()})

    def like(self, value: DeviceArray) -> DeviceArray:
        """New memory of the size of a value."""
        return DeviceArray(value.shape, value.dtype)

    def roomy(self, slots: Mapping[str, int]) -> dict[str, int]:
        """As many more as the engines have."""
        wanted = super().roomy(slots)
        return {
            axis: max(needed, min(wanted[axis], self.ranges[axis].max or wanted[axis]))
            for axis, needed in slots.items()
        }

    def fitting(self, slots: Mapping[str, int]) -> dict[str, int]:
        """At least so many slots by axis; raises InputError when an engine holds fewer."""
        sizes: dict[str, int] = {}
        for axis, wanted in slots.items():
            bounds = self.ranges[axis]
            if bounds.max is not None and wanted > bounds.max:
                raise InputError(
                    f"the text needs {wanted} {axis} and the engines have {bounds.max}; export with "
                    f"--profile {axis}={wanted}, or use an eviction pass"
                )
            sizes[axis] = max(wanted, bounds.min)
        return sizes

    def _free_bytes(self) -> int | None:
        return free_memory()

    def _value(self, array: np.ndarray) -> DeviceArray:
        return DeviceArray.of(array)


class BoundEngine:
    """A program whose states stay in GPU memory; what comes and goes with a call is copied."""

    def __init__(self, engine: Engine, buffers: DeviceBuffers) -> None:
        self.engine, self.buffers = engine, buffers
        self.read, self.written = wiring(engine.entry.inputs), wiring(engine.entry.outputs)
        self.shared = shared_states(engine.entry)
        self.spare: dict[str, DeviceArray] = {}
        self.bind()

    def bind(self) -> None:
        """Have a second buffer for every state that is not written in place; to be called after a resize."""
        for name, state in self.written.items():
            value, spare = self.buffers.values[state], self.spare.get(name)
            if not self.engine.writes_in_place(name) and (spare is None or spare.shape != value.shape):
                self.spare[name] = self.buffers.like(value)

    def follow(self) -> None:
        """States are looked up in every call, wherever another program left them."""

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call: the states move on, the other outputs are returned (valid until the next call)."""
        values = self.buffers.values
        given = {name: values[state] for name, state in self.read.items()}
        kept = {name: values[state] for name, state in self.shared.items()}
        kept |= {name: self.spare.get(name, values[state]) for name, state in self.written.items()}
        results = self.engine.call(feed, given, kept)
        for name, spare in self.spare.items():
            state = self.written[name]
            values[state], self.spare[name] = spare, values[state]
        return results
