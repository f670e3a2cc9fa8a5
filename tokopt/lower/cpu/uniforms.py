"""Random numbers as one ``tokopt.cpu::Uniforms``."""

from __future__ import annotations

from typing import ClassVar

from onnxscript import OnnxFunction

from tokopt.kernels.uniforms.onnx import uniforms
from tokopt.lower.cpu.functions import WholeCall


class Uniforms(WholeCall):
    """``uniforms``, whose arguments are the op's."""

    name: ClassVar[str] = "random numbers as one op of tokopt's CPU kernels"
    op: ClassVar[str] = "Uniforms"
    function: ClassVar[OnnxFunction] = uniforms
