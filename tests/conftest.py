"""Every test runs on one thread, without a network, and with the same random examples each time."""

import os
from copy import copy
from functools import cache
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from hypothesis import settings
from torch.onnx._internal.exporter._registration import ONNXRegistry

torch.set_num_threads(1)
settings.register_profile("tokopt", deadline=None, derandomize=True)
settings.load_profile("tokopt")


def share_torchlib() -> None:
    """Let ``torch.onnx.export`` read the signatures of all its ops once per process: it takes a second every time."""
    read = cache(ONNXRegistry.from_torchlib)

    def from_torchlib(*version: Any, **named: Any) -> ONNXRegistry:
        registry = copy(read(*version, **named))
        registry.functions = {op: list(forms) for op, forms in registry.functions.items()}
        return registry

    setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))  # noqa: B010


share_torchlib()
