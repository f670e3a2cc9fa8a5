"""Run the program of an encoder artifact on ONNX Runtime, with every input checked first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokopt.errors import ArtifactError, InputError, TokoptError
from tokopt.runtime.engines.onnxruntime import PORTABLE, Backend, Provider, Session, Sessions, open_backend
from tokopt.runtime.format.manifest import (
    Manifest,
    ProgramEntry,
    Tensor,
    file_fault,
    file_path,
    read_manifest,
)
from tokopt.runtime.language import LanguageModel
from tokopt.runtime.numerics import OutputCheck
from tokopt.runtime.selftest import run_selftest


def load(
    path: str | Path,
    *,
    backend: Backend = "onnxruntime",
    providers: Sequence[Provider] | None = None,
    threads: int | None = None,
    verify: bool = True,
) -> Any:
    """Load an artifact directory written by ``tokopt.export(..., target="onnx")``.

    An encoder is loaded as a :class:`Model`, a causal language model as a
    :class:`~tokopt.runtime.language.LanguageModel`.

    ``backend`` is ``"onnxruntime"``, or for encoders ``"openvino"`` (extra ``tokopt[openvino]``), which may come with
    OpenVINO's properties: ``("openvino", {"INFERENCE_PRECISION_HINT": "bf16"})``; it computes in float32 unless
    told so. ``"tensorrt"`` executes the engines of an artifact that was exported for the TensorRT and the GPU that
    are here (extra ``tokopt[tensorrt-rtx]``, or ``tokopt[tensorrt]``). ``providers`` are ONNX Runtime execution
    providers in order of preference, by default the CPU alone; ``threads`` bounds the threads of one operator
    (default: all cores). ``verify=False`` skips the SHA-256 of every file, not the checks of the manifest.

    Raises ArtifactError when the artifact is damaged, foreign, newer or reaches outside its folder,
    InputError for an unknown provider or thread count, MissingDependencyError for a provider that is not
    installed.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    for name, entry in manifest.programs.items():
        if PORTABLE not in entry.files:
            raise ArtifactError(
                f"{folder} holds no ONNX form of program {name!r}, only {', '.join(entry.files)}; open it with "
                "tokopt.open_bundle, or export the bundle with target='onnx'"
            )
    for name, file in manifest.files.items() if verify else ():
        if fault := file_fault(folder, name, file):
            raise ArtifactError(fault)
    if backend == "tensorrt":
        return _load_engines(folder, manifest, providers, threads)
    if backend != "onnxruntime":
        return _other_backend(folder, manifest, backend, providers, threads)
    sessions = Sessions(folder, manifest, providers, threads)
    if manifest.task == "causal-lm":
        return LanguageModel(folder, manifest, sessions)
    return Model(folder, manifest, manifest.programs["forward"], sessions.get("forward"))


def _load_engines(
    folder: Path, manifest: Manifest, providers: Sequence[Provider] | None, threads: int | None
) -> Any:
    from tokopt.runtime.engines.tensorrt import Engines, narrowed

    if providers is not None or threads is not None:
        raise InputError("providers and threads belong to the backend onnxruntime; leave them out")
    manifest = narrowed(folder, manifest)
    engines = Engines(folder, manifest)
    if manifest.task == "causal-lm":
        return LanguageModel(folder, manifest, engines)
    return Model(folder, manifest, manifest.programs["forward"], engines.get("forward"))


def _other_backend(
    folder: Path,
    manifest: Manifest,
    backend: Backend,
    providers: Sequence[Provider] | None,
    threads: int | None,
) -> Model:
    if providers is not None:
        raise InputError("providers belong to the backend onnxruntime; leave them out")
    if manifest.task == "causal-lm":
        raise InputError(
            f"{folder} is a language model, whose cache OpenVINO cannot write in place; run it with the default "
            "backend"
        )
    program = manifest.programs["forward"]
    session = open_backend(backend, file_path(folder, program.files[PORTABLE]), threads)
    return Model(folder, manifest, program, session)


class Model:
    """A loaded encoder: call it with numpy arrays.

    ``model(images)`` takes the inputs in the order of ``signature.inputs``, ``model(input_ids=..., ...)`` by
    name. One output is returned as an array, several as :class:`Outputs`.
    """

    def __init__(self, path: Path, manifest: Manifest, program: ProgramEntry, session: Session) -> None:
        self.path, self.manifest, self.signature, self.session = path, manifest, program, session
        self._outputs = [tensor.name for tensor in program.outputs]
        self._dtypes = [np.dtype(tensor.dtype) for tensor in program.inputs]

    def __call__(self, *arrays: Any, **named: Any) -> Any:
        """Run the program; returns an array, or :class:`Outputs` when there are several.

        Raises InputError, before anything runs, for a wrong name, count, dtype, rank or size, for a named
        axis that differs between inputs or leaves its range, for an empty axis, and for NaN or infinity.
        Raises TokoptError when the engine fails on inputs that fit the signature (a token id outside the
        vocabulary, for example).
        """
        values = self.run(*arrays, **named)
        return next(iter(values.values())) if len(values) == 1 else values

    def run(self, *arrays: Any, **named: Any) -> Outputs:
        """As calling the model, but always by output name."""
        feed = self._bind(arrays, named)
        self._check(feed)
        try:
            values = self.session.run(self._outputs, feed)
        except Exception as error:  # engines raise several unrelated classes
            reason = " ".join(str(error).split())
            raise TokoptError(f"the engine failed in {self.path} on inputs that fit: {reason}") from error
        return Outputs(zip(self._outputs, values, strict=True))

    def selftest(self) -> tuple[OutputCheck, ...]:
        """Run the inputs stored in the artifact and compare every output with the one stored."""
        return run_selftest(self.path, self.manifest, "forward", self.session)

    def __repr__(self) -> str:
        sides = [", ".join(map(_spell, side)) for side in (self.signature.inputs, self.signature.outputs)]
        return f"<Model {self.path.name}: {sides[0]} -> {sides[1]}>"

    def _bind(self, arrays: tuple[Any, ...], named: dict[str, Any]) -> dict[str, np.ndarray]:
        names = [tensor.name for tensor in self.signature.inputs]
        if len(arrays) > len(names):
            raise InputError(
                f"{len(arrays)} inputs were given, the program takes {len(names)}: {', '.join(names)}"
            )
        feed = dict(zip(names, arrays, strict=False))
        for name, value in named.items():
            if name not in names:
                raise InputError(f"there is no input {name!r}; the program takes {', '.join(names)}")
            if name in feed:
                raise InputError(f"input {name!r} was given twice, by position and by name; give it once")
            feed[name] = value
        for tensor in self.signature.inputs:
            if tensor.name not in feed:
                raise InputError(f"input {tensor.name!r} is missing; give {_spell(tensor)}")
            feed[tensor.name] = _as_array(feed[tensor.name], tensor)
        return feed

    def _check(self, feed: dict[str, np.ndarray]) -> None:
        seen: dict[str, tuple[int, str]] = {}
        for tensor, dtype in zip(self.signature.inputs, self._dtypes, strict=True):
            array = feed[tensor.name]
            if array.dtype != dtype:
                raise InputError(
                    f"input {tensor.name!r} is {array.dtype}, the program takes {dtype}; convert it with "
                    f".astype({tensor.dtype!r})"
                )
            _check_shape(tensor, array.shape)
            for axis, size in zip(tensor.axes, array.shape, strict=True):
                if isinstance(axis, str):
                    self._check_axis(tensor.name, axis, size, seen)
            if dtype.kind == "f" and not _is_finite(array):
                raise InputError(
                    f"input {tensor.name!r} holds NaN or infinity; clean it, for example with "
                    "numpy.nan_to_num"
                )

    def _check_axis(self, name: str, axis: str, size: int, seen: dict[str, tuple[int, str]]) -> None:
        bounds = self.signature.ranges[axis]
        if size < max(bounds.min, 1) or (bounds.max is not None and size > bounds.max):
            most = "" if bounds.max is None else f" and at most {bounds.max}"
            raise InputError(
                f"axis {axis!r} of input {name!r} has size {size}, it must be at least "
                f"{max(bounds.min, 1)}{most}"
            )
        first, where = seen.setdefault(axis, (size, name))
        if first != size:
            raise InputError(
                f"axis {axis!r} has size {size} in input {name!r} but {first} in {where!r}; make them equal"
            )


class Outputs(Mapping[str, np.ndarray]):
    """The outputs of one call by name: ``outputs["pooled"]`` or ``outputs.pooled``."""

    def __init__(self, items: Any) -> None:
        self._values: dict[str, np.ndarray] = dict(items)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._values[name]

    def __getattr__(self, name: str) -> np.ndarray:
        if name != "_values" and name in self._values:
            return self._values[name]
        raise AttributeError(
            f"there is no output {name!r}; there are {', '.join(self.__dict__.get('_values', ()))}"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __repr__(self) -> str:
        return "Outputs(" + ", ".join(f"{k}={v.dtype}{list(v.shape)}" for k, v in self.items()) + ")"


def _as_array(value: Any, tensor: Tensor) -> np.ndarray:
    try:
        return np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)
    except Exception as error:  # whatever a foreign __array__ raises
        raise InputError(
            f"input {tensor.name!r} is a {type(value).__name__} that numpy cannot read; give {_spell(tensor)}"
        ) from error


def _check_shape(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if len(shape) != len(tensor.axes):
        raise InputError(
            f"input {tensor.name!r} has {len(shape)} axes (shape {list(shape)}), the program takes "
            f"{_spell(tensor)}"
        )
    for i, (axis, size) in enumerate(zip(tensor.axes, shape, strict=True)):
        if isinstance(axis, int) and axis != size:
            raise InputError(
                f"axis {i} of input {tensor.name!r} has size {size} (shape {list(shape)}), the program takes "
                f"{_spell(tensor)}"
            )


def _is_finite(array: np.ndarray) -> bool:
    """Whether every element is finite.

    One pass without a temporary: NaN and infinity survive a sum. A sum may also overflow by itself, so only
    the exact test may say no.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = array.sum(dtype=np.float32 if array.dtype == np.float16 else None)
    return bool(np.isfinite(total)) or bool(np.isfinite(array).all())


def _spell(tensor: Tensor) -> str:
    """``images: float32[batch, 3, 224, 224]``."""
    return f"{tensor.name}: {tensor.dtype}[{', '.join(map(str, tensor.axes))}]"
