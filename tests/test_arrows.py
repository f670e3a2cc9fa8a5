"""The arrows between packages point one way, imports are light, and the packaging is complete."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("tokopt", "passes", "runtime", "kernels")

ALLOWED = {
    "tokopt.errors": (),
    "tokopt.arguments": ("errors",),
    "tokopt.progress": (),
    "tokopt.runtime": ("errors", "arguments", "place", "kernels.cpu"),
    "tokopt.kernels": ("errors", "arguments"),
    "tokopt.ir": ("errors", "arguments", "runtime.format"),
    "tokopt.analysis": ("errors", "arguments", "progress", "ir", "kernels", "runtime.text"),
    "tokopt.rewrite": ("errors", "arguments", "ir", "kernels", "analysis"),
    "tokopt.pipeline": (
        "errors",
        "arguments",
        "ir",
        "analysis",
        "runtime.numerics",
        "artifact",
        "place",
        "passes",
    ),
    "tokopt.passes": ("errors", "arguments", "ir", "kernels", "analysis", "rewrite", "pipeline"),
}
"""Package -> what of tokopt its modules may import beside itself, for type checkers too; the rest may import all.

The pipeline imports passes by name, and artifacts for the reproducer of a pass that failed, both inside functions.
"""

FORBIDDEN = {
    "tokopt.runtime": ("torch", "transformers", "onnx"),
    "tokopt.kernels": ("transformers",),
    "tokopt.passes": ("onnx", "onnxruntime", "transformers"),
}
"""Package -> what of others its modules must not import, at any depth."""

EXCEPTIONS = {"tokopt.runtime.engines.openvino": ("onnx",)}
"""OpenVINO reads no model-local functions; its extra brings the package that inlines them."""


def imports(path: Path, *, at_module_level: bool = False) -> Iterator[str]:
    """The dotted names that a file imports, for type checkers too; inside functions unless ``at_module_level``."""
    tree = ast.parse(path.read_text())
    stack: list[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
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


def module_name(path: Path) -> str:
    """``passes/kv/h2o.py`` -> ``tokopt.passes.kv.h2o``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "tokopt" else ("tokopt", *parts)).removesuffix(".__init__")


@cache
def arrows() -> dict[str, set[str]]:
    """Module -> the modules of tokopt that it imports."""
    paths = {module_name(path): path for folder in FOLDERS for path in sources(folder)}

    def module_of(name: str) -> str | None:
        while name and name not in paths:
            name = name.rpartition(".")[0]
        return name or None

    found = {name: {module_of(imported) for imported in imports(path)} for name, path in paths.items()}
    return {name: {other for other in others if other and other != name} for name, others in found.items()}


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_follow_the_arrows(package: str) -> None:
    homes = (package, *(f"tokopt.{name}" for name in ALLOWED[package]))
    modules = [name for name in arrows() if inside(name, package)]
    wrong = [
        f"{name} imports {other}"
        for name in modules
        for other in arrows()[name] - {"tokopt"}
        if not any(inside(other, home) for home in homes)
    ]
    assert modules and not wrong


@pytest.mark.parametrize("package", FORBIDDEN)
def test_heavy_packages_stay_out(package: str) -> None:
    wrong = [
        f"{module_name(path)} imports {name}"
        for folder in FOLDERS
        for path in sources(folder)
        if inside(module_name(path), package)
        for name in imports(path)
        for other in FORBIDDEN[package]
        if inside(name, other) and other not in EXCEPTIONS.get(module_name(path), ())
    ]
    assert not wrong


def test_no_two_modules_import_each_other() -> None:
    """Imports for type checkers count: a reader follows them too. A package that only names its modules does not."""
    known = arrows()
    packages = {name for name in known if any(other.startswith(name + ".") for other in known)}
    pairs = [
        (name, other)
        for name, others in known.items()
        for other in others
        if name < other and name in known[other]
    ]
    assert known and not [pair for pair in pairs if not packages & set(pair)]


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
    for folder in FOLDERS:
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
