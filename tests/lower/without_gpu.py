"""Torch-TensorRT without a GPU: it partitions, converts and builds; only reading an engine back takes one.

``torch_tensorrt`` for TensorRT-RTX lies in a folder of its own (``make`` installs it there), since its libraries take
PyTorch's CUDA build. What stands in for the GPU is here: the functions of ``torch.cuda`` that describe one, a builder
that builds for that one and notes the network, and a runtime that keeps an engine's bytes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

FOLDER = Path(sys.prefix) / "torch_tensorrt"
"""Where ``make`` installs it."""


@dataclass
class Built:
    """What was built: the layers of every network by kind and name, the sizes
    of its inputs, the kinds of what reads a layer, by its name, and the engine."""

    layers: list[tuple[str, str]]
    profiles: dict[str, tuple[tuple[int, ...], ...]]
    readers: dict[str, tuple[str, ...]]
    engine: bytes = field(repr=False)

    def of(self, kind: str) -> list[str]:
        """The names of the layers of a kind."""
        return [name for found, name in self.layers if found == kind]


class _Kept:
    """In the place of an engine: its bytes, and what is asked of its inputs and outputs when it is opened."""

    streamable_weights_size = 0

    def __init__(self, data: Any) -> None:
        self.data = bytes(data)

    def serialize(self) -> bytes:
        return self.data

    def get_tensor_dtype(self, name: str) -> Any:
        return import_module("tensorrt_rtx").float32

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (1,)

    def is_shape_inference_io(self, name: str) -> bool:
        return False


class _Runtime:
    def __init__(self, log: Any) -> None: ...

    def deserialize_cuda_engine(self, data: Any) -> _Kept:
        return _Kept(data)


class _StandIn:
    """A module with some of its attributes replaced."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@cache
def _imported() -> tuple[ModuleType, ModuleType]:
    """``torch_tensorrt``, and what it calls ``tensorrt``; to be asked for where a GPU seems to be there."""
    isfile = os.path.isfile

    def without_libraries(path: Any) -> bool:
        return not str(path).endswith(("libtorchtrt.so", "libtorchtrt_runtime.so")) and isfile(path)

    with patch("os.path.isfile", without_libraries), patch.object(sys, "path", [str(FOLDER), *sys.path]):
        module = import_module("torch_tensorrt")
    return module, sys.modules["tensorrt"]


@contextmanager
def torch_tensorrt(arch: str) -> Iterator[list[Built]]:
    """Let Torch-TensorRT find a GPU of this compute capability meanwhile; yields what it builds."""
    from tokopt.lower.torch_tensorrt import build

    major, minor = int(arch[3:-1]), int(arch[-1])
    described = SimpleNamespace(
        major=major, minor=minor, name="none", total_memory=2**34, multi_processor_count=80
    )
    answers = {
        "get_device_properties": lambda device=None: described,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_name": lambda device=None: described.name,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "default_stream": lambda device=None: None,
    }
    built: list[Built] = []
    names = {name: module for name, module in sys.modules.items() if name == "tensorrt"}
    with (
        patch.multiple(torch.cuda, **answers),
        patch.object(torch._C, "_CudaDeviceProperties", object, create=True),
        patch.object(build, "find_gpu", lambda: build.Gpu("cpu", arch)),
    ):
        module, trt = _imported()
        sys.modules["tensorrt"] = trt
        stand_in = _StandIn(
            trt, Runtime=_Runtime, Builder=_builder(trt, arch.upper().replace("_", ""), built)
        )
        places = (
            "torch_tensorrt.dynamo.conversion._TRTInterpreter",
            "torch_tensorrt.dynamo.runtime._TRTEngine",
        )
        to = module.Device.to

        def on_cpu(device: Any, kind: Any) -> Any:
            return torch.device("cpu") if kind is torch.device else to(device, kind)

        try:
            with (
                patch.object(import_module(places[0]), "trt", stand_in),
                patch.object(import_module(places[1]), "trt", stand_in),
                patch.object(module.Device, "to", on_cpu),
            ):
                yield built
        finally:
            del sys.modules["tensorrt"]  # others mean TensorRT by that name
            sys.modules.update(names)


def _builder(trt: Any, capability: str, built: list[Built]) -> type:
    class Builder(trt.Builder):
        def create_optimization_profile(self) -> Any:
            self.profile = super().create_optimization_profile()
            return self.profile

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
            layers = [network.get_layer(i) for i in range(network.num_layers)]
            inputs = [network.get_input(i) for i in range(network.num_inputs)]
            readers: dict[str, list[str]] = {}
            for layer in layers:
                for i in range(layer.num_inputs):
                    if layer.get_input(i) is not None:
                        readers.setdefault(layer.get_input(i).name, []).append(layer.type.name)
            engine = super().build_serialized_network(network, config)
            profile = getattr(self, "profile", None)
            found = {
                one.name: tuple(tuple(shape) for shape in profile.get_shape(one.name))
                for one in inputs
                if profile is not None and -1 in tuple(one.shape)
            }
            after = {layer.name: tuple(readers.get(layer.get_output(0).name, ())) for layer in layers}
            built.append(
                Built([(layer.type.name, layer.name) for layer in layers], found, after, bytes(engine))
            )
            return engine

    return Builder
