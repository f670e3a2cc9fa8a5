"""The one command for a GPU, walked on a fake device: its launches are noted, and executed by the host shim."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import models, ops, timing
from tests.kernels.host import library
from tokopt.kernels import cuda
from tokopt.kernels.catalogue import CUDA_OPS
from tokopt.kernels.launch import BLOCK


class OnCpu(TorchFunctionMode):
    """Tensors that are asked for on the GPU are made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class Event:
    """Every turn takes a millisecond."""

    def __init__(self, enable_timing: bool) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class Generator(torch.Generator):
    """One of the CPU, whichever is asked for."""

    def __new__(cls, device: str) -> Generator:
        return super().__new__(cls, "cpu")  # pyright: ignore[reportCallIssue]  # its stub has no device


Launches = list[tuple[str, str]]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Launches]:
    """A fake GPU; yields the op and the kernel of every launch. Sizes are small, and nothing is compiled."""
    launches: Launches = []

    def driver(function: str, *arguments: Any) -> Any:
        if function == "cuModuleGetFunction":
            return (*arguments[0], arguments[1].decode())
        assert function == "cuLaunchKernel"
        (op, scalar, kernel), x, y, z, *block = arguments[:7]
        address = arguments[9]
        assert (z, *block) == (1, BLOCK, 1, 1)
        launches.append((op, kernel))
        getattr(library(op, scalar), f"host_{kernel}")(ctypes.c_void_p(address), x, y, BLOCK, False)
        return None

    cuda._function.cache_clear()
    monkeypatch.setattr(cuda, "_driver", driver)
    monkeypatch.setattr(cuda, "_module", lambda name, scalar, device: (name, scalar))
    for name, value in {
        "is_available": lambda: True,
        "get_device_name": lambda: "a fake device",
        "current_device": lambda: 0,
        "current_stream": lambda: SimpleNamespace(cuda_stream=0),
        "device": lambda device: nullcontext(),
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    kernels = SimpleNamespace(**{op: cuda.implementation(op) for op in CUDA_OPS})
    monkeypatch.setattr(ops, "ops", kernels)
    monkeypatch.setattr(models, "ops", kernels)
    monkeypatch.setattr(models, "module_on", lambda exported, device: exported.module(check_guards=False))
    monkeypatch.setattr(ops, "MATCHES", [(1, 9, 8)])
    monkeypatch.setattr(ops, "WIDTH", 16)
    monkeypatch.setattr(ops, "ATTENTIONS", [(1, 2, 5)])
    monkeypatch.setitem(models.MODELS, "ViT-L/16, 224 px", (2, 32, 2, 8, 32, 2))
    monkeypatch.setattr(models, "BATCHES", (1,))
    for name, value in {"ROUNDS": 2, "CALLS": 1, "WARM_UP": 1, "FLUSHED": 8, "COPIED": 8}.items():
        monkeypatch.setattr(timing, name, value)
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    with OnCpu():
        yield launches
    cuda._function.cache_clear()


def measured(part: str, folder: Path) -> dict[str, Any]:
    command.main(["--part", part, "--output", str(folder / "part.json")])
    return json.loads((folder / "part.json").read_text())


@pytest.mark.parametrize(
    ("part", "op", "rows"),
    [
        ("match and merge", "bipartite_match", 2),
        ("attention tap", "attention_mass", 1),
        ("ViT-L/16, 224 px", "merge_tokens", 1),
    ],
)
def test_every_part_is_measured(part: str, op: str, rows: int, device: Launches, tmp_path: Path) -> None:
    found = measured(part, tmp_path)
    assert found["done"] and not found["failures"]
    assert len(found["rows"]) == rows and op in {name for name, _ in device}


def test_a_kernel_that_fails_does_not_stop_the_others(
    device: Launches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ops.MATCHES
    monkeypatch.setattr(ops, "MATCHES", [(1, 1, 8), *sizes])  # one token has no partner
    found = measured("match and merge", tmp_path)
    assert found["done"] and len(found["failures"]) == len(found["rows"]) == 2
    assert "InputError" in found["failures"][0]["error"] and found["failures"][0]["what"] == "1x1x8 float32"


def test_one_table_comes_last(
    device: Launches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts and tests are processes, of which each may die: what the others found is printed and written."""
    asked: list[list[str]] = []

    def last_line(arguments: list[str], seconds: float) -> str:
        asked.append(arguments)
        if "pytest" in arguments:
            return "3 passed"
        part, output = arguments[-3], Path(arguments[-1])
        if part == "attention tap":
            return "Segmentation fault"
        rows = [{"batch": 1, "kernels, ms": 0.5, "times PyTorch": 3.0}]
        output.write_text(json.dumps({"rows": rows, "failures": [], "done": True}))
        return ""

    monkeypatch.setattr(command, "_last_line", last_line)
    command.main([])
    printed = capsys.readouterr().out
    assert "| match and merge | 1 | 0.5 | 3 |" in printed
    assert "| attention tap | all | failed | Segmentation fault |" in printed
    assert "| tests | test_kernels.py |  | 3 passed |" in printed
    assert [arguments[0] for arguments in asked] == [sys.executable] * len(asked)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["failures"] == [{"part": "attention tap", "what": "all", "error": "Segmentation fault"}]
    assert "## match and merge" in (tmp_path / "gpu.md").read_text()


def test_a_command_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import time; print('begun', flush=True); time.sleep(60)"
    assert command._last_line([sys.executable, "-c", code], 2) == "begun (ended after 2 s)"


def test_without_a_device_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        command.main([])
