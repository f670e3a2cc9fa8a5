"""The library of CPU kernels as Python and hosts see it: what it offers, and what is said where it cannot be used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import pytest

from tokopt.errors import MissingDependencyError, TokoptError
from tokopt.kernels import cpu

ROOT = Path(__file__).resolve().parents[2]
needs_library = pytest.mark.skipif(cpu.library() is None, reason=cpu.problem())


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was found about the library is looked up anew, in this test and after it."""
    caches = (cpu.problem, cpu._loaded)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_asking_takes_neither_torch_nor_onnxruntime() -> None:
    code = "import sys; from tokopt.kernels import cpu; cpu.library(); print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "onnx", "onnxruntime", "numpy"} & set(done.stdout.splitlines())


@needs_library
def test_every_op_has_its_source() -> None:
    named = {path.parent.name.title().replace("_", "") for path in (ROOT / "kernels").glob("*/cpu.cpp")}
    assert named == cpu.OPS


@needs_library
def test_the_fastest_instruction_set_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKOPT_ISA", raising=False)
    assert cpu.isas()[-1] == "plain"
    assert cpu.isa() == cpu.isas()[0]


@needs_library
@pytest.mark.parametrize("wanted", cpu.isas() if cpu.library() else [])
def test_an_instruction_set_can_be_forced(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setenv("TOKOPT_ISA", wanted)
    assert cpu.isa() == wanted
    onnxruntime.SessionOptions().register_custom_ops_library(str(cpu.library()))


@needs_library
@pytest.mark.parametrize("wanted", ["sse9", "neon avx2", "AVX2"])
def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    """By Python and by the library, in the same words."""
    monkeypatch.setenv("TOKOPT_ISA", wanted)
    with pytest.raises(TokoptError, match="cannot be used on this processor; use one of ") as caught:
        cpu.isa()
    with pytest.raises(Exception, match="cannot be used on this processor") as refused:
        onnxruntime.SessionOptions().register_custom_ops_library(str(cpu.library()))
    assert str(caught.value) in str(refused.value)


@needs_library
def test_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    monkeypatch.setattr(cpu, "VERSION", cpu.VERSION + 1)
    assert cpu.library() is None
    assert f"are of version {cpu.VERSION - 1} and tokopt needs {cpu.VERSION}; " in cpu.problem()


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "installed without its CPU kernels"), (b"no library", "cannot be loaded")],
    ids=["missing", "damaged"],
)
def test_a_library_that_is_missing_or_damaged_is_not_used(
    monkeypatch: pytest.MonkeyPatch, forgotten: None, tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "libtokopt_cpu.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(cpu, "_PATH", path)
    assert cpu.library() is None
    assert words in cpu.problem()
    with pytest.raises(MissingDependencyError, match=words):
        cpu.isas()


def test_a_library_without_our_symbols_is_not_used(
    monkeypatch: pytest.MonkeyPatch, forgotten: None, tmp_path: Path
) -> None:
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    path = tmp_path / "libtokopt_cpu.so"
    subprocess.run(["gcc", "-shared", "-x", "c", "/dev/null", "-o", str(path)], check=True)
    monkeypatch.setattr(cpu, "_PATH", path)
    assert cpu.library() is None and "cannot be loaded" in cpu.problem()


def test_a_machine_without_a_compiler_installs_all_the_same(tmp_path: Path) -> None:
    """The build says that the library is missing, and succeeds."""
    environment = {**os.environ, "CC": "no-such-compiler", "CXX": "no-such-compiler"}
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        "lib",
        "--build-temp",
        "temp",
        "--force",
    ]
    copy = tmp_path / "source"
    for name in (
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "kernels",
        "passes",
        "runtime",
        "tokopt",
    ):
        source, to = ROOT / name, copy / name
        to.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, to, symlinks=True, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, to)
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "libtokopt_cpu" in done.stdout + done.stderr
    assert not [*copy.rglob("*.so")]


@pytest.mark.parametrize("name", ["products", "attends", "int8_products", "row_draws"])
def test_the_arm_kernels_equal_plain_c(tmp_path: Path, name: str) -> None:
    """Compiled for Arm, they run on an emulated processor."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no compiler for Arm, or nothing that emulates it")
    program = tmp_path / name
    sources = [ROOT / "tests" / "kernels" / f"{name}.cpp", ROOT / "kernels" / "cpu" / "isa.cpp"]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-static"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], check=True)
    done = subprocess.run([emulator, str(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["neon", "plain"])
