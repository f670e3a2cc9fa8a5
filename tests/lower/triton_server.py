"""What Triton Inference Server does with the folder of a model, played with ONNX Runtime and the folder alone.

The rules are those of its documentation and of its ONNX Runtime backend: shapes and dtypes must be the configuration's,
inputs of several requests are joined on the batch axis, states begin as configured and are fed back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

Arrays = dict[str, np.ndarray]

schema: Any = model_config_pb2
"""The published messages; their fields are not typed."""

NUMPY = {"BOOL": "bool", "FP16": "float16", "FP32": "float32", "FP64": "float64"}
ONNX = {"float": "float32", "double": "float64"}


def read_config(folder: Path) -> Any:
    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, schema.ModelConfig())


def dtype(message: Any) -> np.dtype:
    name = schema.DataType.Name(message.data_type).removeprefix("TYPE_")
    return np.dtype(NUMPY.get(name, name.lower()))


class Server:
    """One model, loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, read_config(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", options)
        self.states = self.config.sequence_batching.state
        self._check_signature()

    def _check_signature(self) -> None:
        """What the backend checks when it loads a model."""
        lead = [-1] if self.config.max_batch_size else []
        given = {value.name: value for value in self.session.get_inputs()}
        made = {value.name: value for value in self.session.get_outputs()}
        assert set(given) == {i.name for i in self.config.input} | {s.input_name for s in self.states}
        assert set(made) == {o.name for o in self.config.output} | {s.output_name for s in self.states}
        wired = {state.input_name: state.output_name for state in self.states}
        assert [wired[name] for name in sorted(wired)] == sorted(wired.values())  # how the server pairs them
        for message in (*self.config.input, *self.config.output):
            value = (given | made)[message.name]
            dims = list(message.reshape.shape) if message.HasField("reshape") else list(message.dims)
            assert message.dims, "every input and output has dims"
            assert [d if isinstance(d, int) else -1 for d in value.shape] == lead + dims
            kind = value.type.removeprefix("tensor(").removesuffix(")")
            assert ONNX.get(kind, kind) == dtype(message).name

    def start(self) -> Arrays:
        """The state at the start of a sequence, by input."""
        return {state.input_name: self._initial(state) for state in self.states}

    def _initial(self, state: Any) -> np.ndarray:
        (initial,) = state.initial_state
        assert initial.name and initial.data_type == state.data_type
        assert -1 not in state.dims and list(initial.dims) == list(state.dims)
        if initial.zero_data:
            return np.zeros((1, *initial.dims), dtype(state))
        data = (self.folder / "initial_state" / initial.data_file).read_bytes()
        return np.frombuffer(data, dtype(state)).reshape(1, *initial.dims).copy()

    def infer(self, requests: Sequence[Arrays], sequences: Sequence[Arrays] = ()) -> list[Arrays]:
        """Answer requests in one batch; the states of their sequences move on."""
        rows = [len(next(iter(request.values()))) for request in requests]
        assert sum(rows) <= self.config.max_batch_size or len(requests) == 1
        feed = {
            m.name: np.concatenate([self._checked(m, request) for request in requests])
            for m in self.config.input
        }
        feed |= {s.input_name: np.concatenate([one[s.input_name] for one in sequences]) for s in self.states}
        names = [value.name for value in self.session.get_outputs()]
        parts = [np.split(np.asarray(value), np.cumsum(rows)[:-1]) for value in self.session.run(names, feed)]
        by_name = dict(zip(names, parts, strict=True))
        for index, sequence in enumerate(sequences):
            for state in self.states:
                value = by_name[state.output_name][index]
                assert value.shape == (1, *state.dims) and value.dtype == dtype(state)
                sequence[state.input_name] = value
        return [
            {m.name: by_name[m.name][index] for m in self.config.output} for index in range(len(requests))
        ]

    def _checked(self, message: Any, request: Arrays) -> np.ndarray:
        """An input as the server accepts it, in the shape that the model takes."""
        value = request[message.name]
        shape = value.shape[1:] if self.config.max_batch_size else value.shape
        assert len(shape) == len(message.dims)
        assert all(want in (-1, got) for want, got in zip(message.dims, shape, strict=True))
        assert value.dtype == dtype(message)
        return value.reshape(len(value), *message.reshape.shape) if message.HasField("reshape") else value
