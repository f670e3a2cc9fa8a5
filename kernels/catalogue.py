"""The token ops there are: the folders of this package, with what each declares of itself."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from tokopt.kernels.declaration import Op

_FOLDER = Path(__file__).parent

OPS: Mapping[str, Op] = {
    folder.name: import_module(f"tokopt.kernels.{folder.name}").OP
    for folder in sorted(iter_modules([str(_FOLDER)]), key=lambda folder: folder.name)
    if (_FOLDER / folder.name / "onnx.py").is_file()
}
"""Every op of the domain ``tokopt``; ``kernels/<op>/reference.py`` holds its meaning."""

CUDA_OPS = tuple(name for name in OPS if (_FOLDER / name / "kernel.cu").is_file())
"""The ops that have a ``kernel.cu``."""
