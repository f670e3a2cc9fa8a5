"""tokopt's own CPU kernels, where they can run an artifact: those installed with tokopt, never a library out of it."""

# ONNX Runtime is untyped.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from tokopt.kernels import cpu
from tokopt.runtime.format.manifest import Manifest


@dataclass(frozen=True)
class Kernels:
    """What a loaded artifact uses of tokopt's CPU kernels.

    ``library`` is the shared library and ``isa`` the instruction set that it uses, for example ``"avx2"``; both are
    empty where an artifact runs without them, for the ``reason`` in words.
    """

    library: Path | None = None
    isa: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return f"{cpu.DOMAIN} {cpu.VERSION} ({self.isa})" if self.library else f"none: {self.reason}"


def choose_kernels(manifest: Manifest, wanted: bool = True, on_cpu: bool = True) -> Kernels:
    """The installed kernels, if an artifact has a form for their version and they are wanted.

    Raises TokoptError where the environment variable TOKOPT_ISA names what this processor lacks.
    """
    versions = {entry.kernels for entry in manifest.programs.values()} - {None}
    if not versions:
        return Kernels(reason="the artifact has no attention, draw or product that they compute")
    if not wanted:
        return Kernels(reason="they were not asked for")
    if not on_cpu:
        return Kernels(reason="they run on the CPU provider alone")
    if cpu.VERSION not in versions:
        names = ", ".join(map(str, sorted(versions, key=str)))
        return Kernels(reason=f"the artifact takes their version {names} and {cpu.VERSION} is installed")
    library = cpu.library()
    if library is None:
        return Kernels(reason=cpu.problem())
    isa = cpu.isa()
    try:
        onnxruntime.SessionOptions().register_custom_ops_library(str(library))
    except Exception as error:  # ONNX Runtime raises several unrelated classes
        return Kernels(reason=f"ONNX Runtime cannot load them ({' '.join(str(error).split())})")
    return Kernels(library, isa)
