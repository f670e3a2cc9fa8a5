"""The arrows between packages point one way, imports are light, and the packaging is complete."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = tuple(
    f"tokopt.{m}" for m in ("analysis", "frontend", "ir", "lower", "measure", "pipeline", "rewrite")
)
FORBIDDEN = {
    "runtime": ("torch", "transformers", "onnx", "tokopt.passes", "tokopt.kernels", *COMPILER),
    "kernels": ("transformers", "tokopt.passes", "tokopt.runtime", *COMPILER),
    "passes": ("onnx", "onnxruntime", "transformers", "tokopt.runtime", "tokopt.lower", "tokopt.cli"),
    "tokopt": (),
}
"""Package folder -> what its modules must not import, at any depth."""

EXCEPTIONS = {"runtime/engines/openvino.py": ("onnx",)}
"""OpenVINO reads no model-local functions; its extra brings the package that inlines them."""


def imports(path: Path, *, at_module_level: bool = False) -> Iterator[str]:
    """The dotted names that a file imports; ``if TYPE_CHECKING:`` does not count."""
    tree = ast.parse(path.read_text())
    stack: list[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if at_module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively; write tokopt...."
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        stack.extend(ast.iter_child_nodes(node))


def sources(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*.py") if not p.is_symlink())


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_follow_the_arrows(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(folder)
        for name in imports(path)
        for package in FORBIDDEN[folder]
        if inside(name, package) and package not in EXCEPTIONS.get(str(path.relative_to(ROOT)), ())
    ]
    assert not wrong


def test_compiler_imports_passes_lazily() -> None:
    """Passes are imported inside functions, by name: a new pass touches no file of the compiler."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("tokopt")
        for name in imports(path, at_module_level=True)
        if inside(name, "tokopt.passes")
    ]
    assert not wrong


def test_packaging_lists_every_package() -> None:
    """setuptools takes the packages from a list, so that a folder missing there would miss from the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = set()
    for folder in FORBIDDEN:
        for path in sources(folder):
            parts = path.relative_to(ROOT).parent.parts
            found.add(".".join(parts if parts[0] == "tokopt" else ("tokopt", *parts)))
    assert sorted(listed) == sorted(found)


def fresh_process(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("module", ["tokopt", "tokopt.runtime", "tokopt.cli"])
def test_import_brings_no_heavy_package(module: str) -> None:
    loaded = fresh_process(f"import sys, {module}; print(*sys.modules, sep='\\n')")
    assert not {"torch", "onnx", "onnxscript", "transformers", "rich", "PIL"} & set(loaded)


@pytest.mark.parametrize("module", ["tokopt", "tokopt.cli"])
def test_import_takes_under_0_3_seconds(module: str) -> None:
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    assert min(float(fresh_process(code)[0]) for _ in range(3)) < 0.3
