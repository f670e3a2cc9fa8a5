"""Load artifacts, and run those that are no language models, with every input checked first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokopt.arguments import check_choice, check_flag, check_path, is_integer
from tokopt.errors import ArtifactError, InputError, TokoptError
from tokopt.runtime.encode import encode, exit_depths
from tokopt.runtime.engines.base import Programs
from tokopt.runtime.engines.kernels import Kernels
from tokopt.runtime.engines.onnxruntime import (
    BACKENDS,
    Backend,
    Provider,
    Sessions,
    check_threads,
    named_options,
)
from tokopt.runtime.format.check_files import check_files
from tokopt.runtime.format.manifest import PORTABLE, Manifest, read_manifest
from tokopt.runtime.inputs import Interface, count_rows
from tokopt.runtime.language import LanguageModel
from tokopt.runtime.numerics import OutputCheck
from tokopt.runtime.selftest import TaskCheck, run_selftests


def load(
    path: str | Path,
    *,
    backend: Backend = "onnxruntime",
    providers: Sequence[Provider] | None = None,
    threads: int | None = None,
    verify: bool = True,
    kernels: bool = True,
) -> Any:
    """Load an artifact directory written by ``tokopt.export(..., target="onnx")``.

    A model that generates is loaded as a :class:`~tokopt.runtime.language.LanguageModel`, every other as a
    :class:`Model`.

    ``backend`` is ``"onnxruntime"``, or for encoders ``"openvino"`` (extra ``tokopt[openvino]``), which may come with
    OpenVINO's properties: ``("openvino", {"INFERENCE_PRECISION_HINT": "bf16"})``; it computes in float32 unless
    told so. ``"tensorrt"`` executes the engines of an artifact that was exported for the TensorRT and the GPU that
    are here (extra ``tokopt[tensorrt-rtx]``, or ``tokopt[tensorrt]``). ``providers`` are ONNX Runtime execution
    providers in order of preference, by default the CPU alone; ``threads`` bounds the threads of one operator
    (default: all cores). ``verify=False`` skips the SHA-256 of every file, not the checks of the manifest.
    ``kernels=False`` leaves out tokopt's own CPU kernels, which ONNX Runtime otherwise calls where they are installed
    in the version that the artifact takes; the property ``kernels`` of what is loaded says what is used.

    Raises ArtifactError when the artifact is damaged, foreign, newer or reaches outside its folder,
    InputError for an unknown provider or thread count, MissingDependencyError for a provider that is not
    installed.
    """
    folder, verify = check_path("path", path), check_flag("verify", verify)
    check_flag("kernels", kernels)
    name, options = named_options("backend", backend, f"one of {', '.join(BACKENDS)}")
    check_choice("backend", name, BACKENDS)
    if options and name != "openvino":
        raise InputError(f"the backend {name} takes no options; leave them out")
    threads = check_threads(threads)
    manifest = read_manifest(folder)
    for program, entry in manifest.programs.items():
        if PORTABLE not in entry.files:
            raise ArtifactError(
                f"{folder} holds no ONNX form of program {program!r}, only {', '.join(entry.files)}; export it for the "
                f"runtime with: tokopt export {folder} -o DIR, or open it with tokopt.open_bundle"
            )
    if verify:
        check_files(folder, manifest)
    if name == "tensorrt":
        return _load_engines(folder, manifest, providers, threads)
    if name == "openvino":
        return _load_openvino(folder, manifest, options, providers, threads)
    sessions = Sessions(folder, manifest, providers, threads, kernels=kernels)
    if manifest.schedule.generates:
        return LanguageModel(folder, manifest, sessions)
    return Model(folder, manifest, sessions)


def _load_engines(
    folder: Path, manifest: Manifest, providers: Sequence[Provider] | None, threads: int | None
) -> Any:
    from tokopt.runtime.engines.tensorrt import Engines, narrowed

    if providers is not None or threads is not None:
        raise InputError("providers and threads belong to the backend onnxruntime; leave them out")
    manifest = narrowed(folder, manifest)
    engines = Engines(folder, manifest)
    if manifest.schedule.generates:
        return LanguageModel(folder, manifest, engines)
    return Model(folder, manifest, engines)


def _load_openvino(
    folder: Path,
    manifest: Manifest,
    options: Mapping[str, object],
    providers: Sequence[Provider] | None,
    threads: int | None,
) -> Model:
    if providers is not None:
        raise InputError("providers belong to the backend onnxruntime; leave them out")
    if manifest.states or manifest.schedule.generates:
        raise InputError(
            f"{folder} keeps states between calls, which OpenVINO cannot write in place; run it with the default "
            "backend"
        )
    from tokopt.runtime.engines.openvino import OpenVINOSessions

    return Model(folder, manifest, OpenVINOSessions(folder, manifest, options, threads))


class Model:
    """A loaded model that gives arrays for arrays: call it with numpy arrays.

    ``model(images)`` takes the inputs in the order of ``signature.inputs``, ``model(input_ids=..., ...)`` by
    name. One output is returned as an array, several as :class:`Outputs`.

    A model with exits has ``depths``, the numbers of blocks after which rows may leave. ``model(images, depth=6)``
    gives the outputs after so many blocks, of all rows. (An input that is itself named ``depth`` is then meant.)
    """

    def __init__(self, path: Path, manifest: Manifest, sessions: Programs) -> None:
        self.path, self.manifest, self.sessions = path, manifest, sessions
        self.signature = Interface.of(manifest)
        entries = tuple(manifest.schedule.of_role("encode"))
        for entry in entries:
            sessions.best(entry.program, batch=1)  # what cannot be loaded is refused now
        self.depths = exit_depths(manifest)
        self._single = entries[0].program if len(entries) == 1 and not manifest.states else None

    @property
    def kernels(self) -> Kernels:
        """What is used of tokopt's own CPU kernels, and why not."""
        return self.sessions.kernels

    def __call__(self, *arrays: Any, depth: Any = None, **named: Any) -> Any:
        """Run the programs; returns an array, or :class:`Outputs` when there are several.

        Raises InputError, before anything runs, for a wrong name, count, dtype, rank or size, for a named
        axis that differs between inputs or leaves its range, for an empty axis, for NaN or infinity, and for a depth
        at which the model has no exit.
        Raises TokoptError when the engine fails on inputs that fit the signature (a token id outside the
        vocabulary, for example).
        """
        values = self.run(*arrays, depth=depth, **named)
        return next(iter(values.values())) if len(values) == 1 else values

    def run(self, *arrays: Any, depth: Any = None, **named: Any) -> Outputs:
        """As calling the model, but always by output name; ``run(images).depths`` says where each row left."""
        if depth is not None and any(tensor.name == "depth" for tensor in self.signature.inputs):
            named["depth"], depth = depth, None
        self._check_depth(depth)
        feed = self.signature.feed(arrays, named)
        try:
            return self._run(feed, depth)
        except TokoptError:
            raise
        except Exception as error:  # engines raise several unrelated classes
            reason = " ".join(str(error).split())
            raise TokoptError(f"the engine failed in {self.path} on inputs that fit: {reason}") from error

    def _check_depth(self, depth: object) -> None:
        if depth is None or (is_integer(depth) and depth in self.depths):
            return
        known = ", ".join(map(str, self.depths))
        raise InputError(
            f"depth={depth!r} is none at which rows may leave; choose among {known}"
            if known
            else f"depth={depth!r} means nothing to a model without exits; leave it out, or use the pass exit"
        )

    def _run(self, feed: Mapping[str, np.ndarray], depth: int | None) -> Outputs:
        names = [tensor.name for tensor in self.signature.outputs]
        if self._single is not None:
            found = self.sessions.run(self._single, feed)
            return Outputs((name, found[name]) for name in names)
        batch = count_rows(self.signature.inputs, feed)
        made = encode(self.manifest, self.sessions, feed, 1 if batch is None else batch, depth)
        return Outputs(((name, made.outputs[name]) for name in names), made.depths)

    def selftest(self) -> tuple[OutputCheck | TaskCheck, ...]:
        """Run the inputs stored in the artifact and compare every output with the one stored."""
        checks = run_selftests(self.path, self.manifest, lambda: self.sessions)
        return tuple(check for found in checks.values() for check in found)

    def __repr__(self) -> str:
        sides = [", ".join(map(str, side)) for side in (self.signature.inputs, self.signature.outputs)]
        return f"<Model {self.path.name}: {sides[0]} -> {sides[1]}>"


class Outputs(Mapping[str, np.ndarray]):
    """The outputs of one call by name: ``outputs["pooled"]`` or ``outputs.pooled``.

    ``depths`` [batch] says after how many blocks each row left; None for a model without exits.
    """

    def __init__(self, items: Any, depths: np.ndarray | None = None) -> None:
        self._values: dict[str, np.ndarray] = dict(items)
        self.depths = depths

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
