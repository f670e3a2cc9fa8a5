"""Compiles the CPU kernels; all else about the package is in pyproject.toml.

The library is loaded by ONNX Runtime and not by Python, so one wheel serves every version of Python. Where there is no
compiler, or one that cannot do it, tokopt is installed without the library.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = [
    "kernels/cpu/isa.cpp",
    "kernels/cpu/library.cpp",
    *map(str, sorted(Path("kernels").glob("*/cpu.cpp"))),
]
HEADERS = [*map(str, sorted(Path("kernels").glob("*/*.h")))]

# Products and sums are rounded one after the other, so that instruction sets differ as little as they can.
COMPILE = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
# Threads of ONNX Runtime may end, and free what they held, after the last session that used the library.
LINK = ["-Wl,-z,nodelete"] if sys.platform == "linux" else []


class Library(build_ext):
    """Builds a plain shared library: no module of Python, and no version of Python in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ["RegisterCustomOps"]


class Wheel(bdist_wheel):
    """Names the wheel after the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "tokopt.kernels.cpu.libtokopt_cpu",
            sources=SOURCES,
            depends=HEADERS,
            extra_compile_args=COMPILE,
            extra_link_args=LINK,
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": Library, "bdist_wheel": Wheel},
)
