"""A model for NVIDIA Triton Inference Server: a folder of its model repository, written from an artifact.

``models/vit/`` holds ``config.pbtxt``, ``1/model.onnx`` with the weights that it refers to and, for a language
model, ``initial_state/``. The first axis of an encoder becomes Triton's batch. The state of a language model becomes
implicit state: Triton keeps it for every sequence, and batches steps of different sequences.

The configuration is built as the message that Triton publishes (tokopt[triton]), so its text is valid.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from tokopt.artifact import export
from tokopt.errors import InputError, LoweringError, MissingDependencyError
from tokopt.lower.triton.sequences import weight_files, write_sequence_step
from tokopt.place import replacing
from tokopt.runtime.format.check_files import check_files
from tokopt.runtime.format.manifest import (
    ENGINE,
    PORTABLE,
    Manifest,
    ProgramEntry,
    file_path,
    read_manifest,
)
from tokopt.runtime.format.signature import BATCH, Axis, Tensor, find_role

if TYPE_CHECKING:
    from tokopt.ir.bundle import Bundle

CONFIG, VERSION, INITIAL_STATE = "config.pbtxt", "1", "initial_state"

IDLE_SECONDS = 60
"""After so long without a request Triton ends a sequence and drops its state; its own default is 1."""

_BACKENDS = {ENGINE: ("tensorrt", "model.plan"), PORTABLE: ("onnxruntime", "model.onnx")}
"""Form of a program -> Triton's backend and the file that it loads."""

_DTYPES = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32", "float64": "FP64"}
"""The names that are not numpy's in capitals."""


@dataclass(frozen=True)
class Serving:
    """How Triton runs a model.

    Each of ``instances`` copies, on the CPU or with ``gpu`` on every GPU, computes at most ``max_batch`` rows at once;
    ``threads`` bounds the threads of one operator on the CPU. ``slots`` is for language models: the tokens that a
    sequence can hold (default: the model's context). Raises InputError for a number below 1.
    """

    max_batch: int = 8
    instances: int = 1
    gpu: bool = False
    threads: int | None = None
    slots: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch", "instances", "threads", "slots"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}, it must be at least 1")


@dataclass(frozen=True)
class _State:
    """A state as Triton keeps it: the input that reads it, and the output that is its next value."""

    name: str
    output: str
    dtype: str
    axes: tuple[Axis, ...]
    initial: float
    in_place: bool


@dataclass(frozen=True)
class _Model:
    """What Triton is told of a program: its file in the artifact, its signature without the state, its state.

    ``max_batch`` is 0 where the first axis is not the batch of every input and output. The axes of states are numbers,
    without the batch. ``rows`` is the input that names the tokens whose logits are wanted.
    """

    file: Path
    form: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    max_batch: int
    states: tuple[_State, ...] = ()
    rows: Tensor | None = None


def write_model(source: Bundle | str | Path, path: str | Path, serving: Serving | None = None) -> Path:
    """Write the folder ``path`` of a Triton model repository and return it; its name is the model's.

    ``source`` is a bundle, which is exported first, or an artifact that holds ONNX, whose files are checked and copied.

    Raises ArtifactError when the artifact is damaged or ``path`` is taken, LoweringError when Triton cannot
    serve the model, InputError for an option of language models, MissingDependencyError without tokopt[triton].
    Nothing is left behind when it fails.
    """
    schema, serving, path = _schema(), serving or Serving(), Path(path)
    with replacing(path) as folder:
        if isinstance(source, (str, Path)):
            _write(schema, Path(source), folder, path.name, serving)
        else:
            with TemporaryDirectory(dir=folder) as scratch:
                _write(schema, export(source, Path(scratch) / "artifact"), folder, path.name, serving)
    return path


def _write(schema: Any, artifact: Path, folder: Path, name: str, serving: Serving) -> None:
    from google.protobuf import text_format

    manifest = read_manifest(artifact)
    model = _describe(manifest, artifact, serving)
    check_files(artifact, manifest)
    _write_program(model, artifact, folder / VERSION)
    _write_initial_states(model, folder / INITIAL_STATE)
    text = text_format.MessageToString(_config(schema, model, serving, name), as_utf8=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")


# --- what is served ---------------------------------------------------------------------------------------


def _describe(manifest: Manifest, artifact: Path, serving: Serving) -> _Model:
    """The program of an artifact as Triton sees it; raises LoweringError when it cannot serve it."""
    (name, program), *others = manifest.programs.items()
    if others:
        raise LoweringError(
            f"the programs {', '.join(manifest.programs)} of {artifact} share a state, which Triton keeps for one of "
            f"them only; leave out the pass that added them ({manifest.pipeline}), or run it with tokopt.runtime"
        )
    if serving.slots is not None and not manifest.schedule.generates:
        raise InputError(f"{artifact} is no language model, so it has no slots; leave them out")
    form = _form(program, manifest, serving)
    if form not in program.files:
        raise LoweringError(
            f"{artifact} holds program {name!r} as {', '.join(program.files)} only; export it with target='onnx'"
        )
    inputs = tuple(tensor for tensor in program.inputs if tensor.state is None)
    outputs = tuple(tensor for tensor in program.outputs if tensor.state is None)
    limits = program.engine.profiles if program.engine and form == ENGINE else program.ranges
    most = limits[BATCH].max if BATCH in limits else None
    rows = min(serving.max_batch, most or serving.max_batch)
    model = _Model(file_path(artifact, program.files[form]), form, inputs, outputs, rows)
    if manifest.schedule.generates:
        return _as_sequence(model, program, manifest, serving)
    return model if _is_batched(inputs + outputs) else replace(model, max_batch=0)


def _form(program: ProgramEntry, manifest: Manifest, serving: Serving) -> str:
    """The form of a program to serve: an engine only on GPUs, and only where the program is served as it is.

    Triton loads engines of TensorRT, not those of TensorRT for RTX.
    """
    loads = program.engine is not None and program.engine.builder == "tensorrt"
    return ENGINE if loads and serving.gpu and not manifest.schedule.generates else PORTABLE


def _as_sequence(model: _Model, program: ProgramEntry, manifest: Manifest, serving: Serving) -> _Model:
    """The program with Triton's implicit state, and with the logits of the last token only.

    Triton gives an axis of varying size the size 1 at the start of a sequence, so all slots are allocated at once.
    """
    assert manifest.generation is not None
    states, slots = _states(program, manifest), serving.slots or manifest.generation.context
    if [state.output for state in sorted(states, key=lambda s: s.name)] != sorted(s.output for s in states):
        raise LoweringError(
            f"the states of {model.file} are in another order when sorted by their outputs than by their inputs, and "
            "Triton pairs the two by that order; rename the outputs"
        )
    rows = find_role(program.inputs, "rows")
    inputs = tuple(tensor for tensor in model.inputs if tensor != rows)
    outputs = tuple(
        replace(tensor, axes=tuple(1 if rows and axis == rows.axes[0] else axis for axis in tensor.axes))
        for tensor in model.outputs
    )
    if not _is_batched((*inputs, *outputs, *states)):
        raise LoweringError(
            f"{model.file} has inputs, outputs or states without a batch in front, so Triton cannot tell its sequences "
            "apart; run the artifact with tokopt.runtime"
        )
    fixed = (replace(state, axes=_dims(state.axes[1:], slots)) for state in states)
    return replace(model, inputs=inputs, outputs=outputs, states=tuple(fixed), rows=rows)


def _states(program: ProgramEntry, manifest: Manifest) -> tuple[_State, ...]:
    """The states that the program reads and writes, with their ends; raises LoweringError for others."""
    reads = {tensor.state: tensor.name for tensor in program.inputs}
    writes = {tensor.state: tensor.name for tensor in program.outputs}
    found = []
    for state in manifest.states:
        if state.name not in reads or state.name not in writes:
            raise LoweringError(
                f"the state {state.name!r} is not both read and written, as Triton wants it; run the artifact with "
                "tokopt.runtime"
            )
        given, made = reads[state.name], writes[state.name]
        in_place = program.aliases.get(made) == given
        found.append(_State(given, made, state.dtype, state.axes, state.initial, in_place))
    return tuple(found)


def _is_batched(tensors: Iterable[Tensor | _State]) -> bool:
    return all(tensor.axes[:1] == (BATCH,) for tensor in tensors)


def _dims(axes: tuple[Axis, ...], named: int = -1) -> tuple[int, ...]:
    """Sizes, those of axes with a name ``named``; one axis for none, since Triton has no shape without axes."""
    return tuple(named if isinstance(axis, str) else axis for axis in axes) or (1,)


# --- the files --------------------------------------------------------------------------------------------


def _write_program(model: _Model, artifact: Path, folder: Path) -> None:
    """The file that the backend loads, and beside it the weights that it refers to."""
    folder.mkdir()
    target = folder / _BACKENDS[model.form][1]
    if model.states:
        written = write_sequence_step(
            model.file, target, {state.name: state.output for state in model.states}, model.rows
        )
    else:
        shutil.copyfile(model.file, target)
        if model.form != PORTABLE:
            return  # an engine holds its weights
        written = ir.load(target)
    for name in weight_files(written):
        shutil.copyfile(file_path(artifact, name), folder / name)


def _write_initial_states(model: _Model, folder: Path) -> None:
    """A file per state that does not start with zeros: one row, in row-major order."""
    for state in model.states:
        if state.initial:
            folder.mkdir(exist_ok=True)
            values = np.full(_dims(state.axes), state.initial, state.dtype)
            (folder / _initial_file(state)).write_bytes(values.tobytes())


def _initial_file(state: _State) -> str:
    return re.sub(r"\W", "_", state.name)  # a manifest's names may hold anything that is printable


# --- the configuration ------------------------------------------------------------------------------------


def _schema() -> Any:
    """The published messages: what is not a field of them cannot be written."""
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise MissingDependencyError(
            "tritonclient, which brings the schema of Triton's configuration, is not installed; install it with: "
            "pip install 'tokopt[triton]'"
        ) from error
    return model_config_pb2


def _config(schema: Any, model: _Model, serving: Serving, name: str) -> Any:
    group = schema.ModelInstanceGroup
    config = schema.ModelConfig(
        name=name,
        backend=_BACKENDS[model.form][0],
        max_batch_size=model.max_batch,
        input=[_tensor(schema, schema.ModelInput, tensor, model) for tensor in model.inputs],
        output=[_tensor(schema, schema.ModelOutput, tensor, model) for tensor in model.outputs],
        instance_group=[
            group(count=serving.instances, kind=group.KIND_GPU if serving.gpu else group.KIND_CPU)
        ],
    )
    if model.states:
        config.sequence_batching.CopyFrom(_sequences(schema, model))
    elif model.max_batch:
        config.dynamic_batching.SetInParent()
    if serving.threads is not None:
        config.parameters["intra_op_thread_count"].string_value = str(serving.threads)
    return config


def _tensor(schema: Any, kind: Any, tensor: Tensor, model: _Model) -> Any:
    """An input or output; where nothing is left beside the batch, Triton is told to drop the axis that it wants."""
    axes = tensor.axes[1:] if model.max_batch else tensor.axes
    reshape = {"reshape": schema.ModelTensorReshape()} if model.max_batch and not axes else {}
    return kind(name=tensor.name, data_type=_dtype(schema, tensor), dims=_dims(axes), **reshape)


def _sequences(schema: Any, model: _Model) -> Any:
    """Requests of a sequence in their order, those of different sequences in one batch, with the state kept between."""
    messages = schema.ModelSequenceBatching
    return messages(
        max_sequence_idle_microseconds=IDLE_SECONDS * 1_000_000,
        oldest=messages.StrategyOldest(max_candidate_sequences=model.max_batch),
        state=[_state(schema, state) for state in model.states],
    )


def _state(schema: Any, state: _State) -> Any:
    messages, dtype, dims = schema.ModelSequenceBatching, _dtype(schema, state), _dims(state.axes)
    start = {"data_file": _initial_file(state)} if state.initial else {"zero_data": True}
    return messages.State(
        input_name=state.name,
        output_name=state.output,
        data_type=dtype,
        dims=dims,
        initial_state=[messages.InitialState(name=state.name, data_type=dtype, dims=dims, **start)],
        use_same_buffer_for_input_output=state.in_place,
    )


def _dtype(schema: Any, tensor: Tensor | _State) -> int:
    return schema.DataType.Value(f"TYPE_{_DTYPES.get(tensor.dtype, tensor.dtype.upper())}")
