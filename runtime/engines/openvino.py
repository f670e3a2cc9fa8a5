"""Encoder programs on OpenVINO, which reads the same ONNX file."""

# OpenVINO and onnx leave the types of files open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tokopt.errors import ArtifactError, InputError, MissingDependencyError
from tokopt.runtime.engines.kernels import Kernels
from tokopt.runtime.format.check_files import check_onnx
from tokopt.runtime.format.manifest import PORTABLE, Manifest

DEFAULTS: Mapping[str, object] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
"""OpenVINO would round to bfloat16 where the processor can, and compute what no export has checked."""


class OpenVINOSessions:
    """The programs of an encoder, opened when first asked for; what :class:`.Sessions` is for ONNX Runtime."""

    kernels = Kernels(reason="OpenVINO has its own")

    def __init__(
        self, folder: Path, manifest: Manifest, options: Mapping[str, object], threads: int | None
    ) -> None:
        self.folder, self.manifest, self.options, self.threads = folder, manifest, options, threads
        self._open: dict[str, OpenVINOSession] = {}

    def forms(self, program: str) -> tuple[str, ...]:
        """The one form that OpenVINO reads."""
        return (PORTABLE,)

    def get(self, program: str, form: str = PORTABLE) -> OpenVINOSession:
        """A program compiled for the CPU; raises as :class:`OpenVINOSession` does."""
        if program not in self._open:
            path = check_onnx(self.folder, self.manifest.programs[program], form, self.manifest.files)
            self._open[program] = OpenVINOSession(path, self.options, self.threads)
        return self._open[program]

    def best(self, program: str, batch: int) -> OpenVINOSession:
        """The same for every batch."""
        return self.get(program)

    def run(
        self, program: str, feed: Mapping[str, np.ndarray], form: str | None = None
    ) -> dict[str, np.ndarray]:
        """The outputs of a program for arrays."""
        names = [tensor.name for tensor in self.manifest.programs[program].outputs]
        return dict(zip(names, self.get(program, form or PORTABLE).run(names, feed), strict=True))

    def in_float(self) -> None:
        """None: how OpenVINO multiplies quantized weights is its own choice."""


class OpenVINOSession:
    """A program compiled by OpenVINO for the CPU, run like a session of ONNX Runtime."""

    def __init__(self, path: Path, options: Mapping[str, object], threads: int | None) -> None:
        """Compile the ONNX file at ``path``; ``options`` are OpenVINO's own properties.

        Raises MissingDependencyError without the extra ``openvino``, ArtifactError when OpenVINO cannot read the
        file, InputError for options it does not know.
        """
        try:
            import openvino
        except ImportError as error:
            raise MissingDependencyError(
                "the backend openvino needs OpenVINO; install tokopt[openvino]"
            ) from error
        core = openvino.Core()
        try:
            program = core.read_model(*_source(path))
        except RuntimeError as error:
            raise ArtifactError(
                f"OpenVINO {openvino.__version__} cannot read {path}: {_reason(error)}; run it with the default backend"
            ) from error
        settings = {**DEFAULTS, **options}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            compiled = core.compile_model(program, "CPU", settings)
        except (RuntimeError, TypeError) as error:
            raise InputError(
                f"OpenVINO cannot compile {path} with {settings}: {_reason(error)}; check the options"
            ) from error
        self._places = {name: i for i, output in enumerate(compiled.outputs) for name in output.names}
        self._request = compiled.create_infer_request()

    def run(self, outputs: Sequence[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The named outputs for named inputs, as arrays of their own."""
        results = self._request.infer(dict(feed), share_inputs=True)
        return [results[self._places[name]].copy() for name in outputs]


def _source(path: Path) -> tuple[Any, ...]:
    """What OpenVINO reads: the file itself, or its content with the model-local functions inlined."""
    try:
        import onnx
        import onnx.inliner
    except ImportError as error:
        raise MissingDependencyError("the backend openvino needs onnx; install tokopt[openvino]") from error
    plain = onnx.load(path, load_external_data=False)
    if not plain.functions and not (multiplies_bytes() and _byte_weights(plain)):
        return (str(path),)
    operators = {node.op_type for function in plain.functions for node in function.node}
    kinds = {given.type.tensor_type.elem_type for given in plain.graph.input}
    if "TopK" in operators and kinds != {onnx.TensorProto.FLOAT}:
        raise ArtifactError(
            f"{path} chooses tokens of a text, whose padding has equal scores, and OpenVINO orders equal scores "
            "arbitrarily; run it with the default backend"
        )
    model = onnx.inliner.inline_local_functions(onnx.load(path))
    if multiplies_bytes():
        sign_weights(model)
    return model.SerializeToString(), b""


@cache
def multiplies_bytes() -> bool:
    """Whether the processor has sums of products of bytes (VNNI); where nobody says, it has not."""
    information = Path("/proc/cpuinfo")
    return information.is_file() and bool(
        re.search(r"\b(avx512_vnni|avx_vnni|asimddp)\b", information.read_text())
    )


def sign_weights(model: Any) -> None:
    """Let weights of unsigned bytes around 128 be signed bytes, in place.

    These OpenVINO was measured with; the unsigned are in the file since sums of products saturate without VNNI.
    """
    from onnx import TensorProto, numpy_helper

    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in _byte_weights(model):
        codes, middle = (initializers[name] for name in (node.input[0], node.input[2]))
        array = numpy_helper.to_array(codes)
        if codes.data_type == TensorProto.UINT8 and (numpy_helper.to_array(middle) == 128).all():
            codes.CopyFrom(numpy_helper.from_array((array ^ 128).view(np.int8), codes.name))
        if codes.data_type == TensorProto.INT8:  # it may have several readers
            del node.input[2]


def _byte_weights(model: Any) -> list[Any]:
    """The nodes that expand a weight of unsigned bytes with zero points."""
    from onnx import TensorProto

    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return [
        node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        and len(node.input) == 3
        and kinds.get(node.input[0]) == TensorProto.UINT8
        and node.input[2] in kinds
    ]


def _reason(error: Exception) -> str:
    """The lines of an OpenVINO error that say something, without the places in its own source."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("Exception from", "Check '")))
