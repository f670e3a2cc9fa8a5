"""The search for an earlier occurrence of a text's end as one ``tokopt.cpu::LatestRepeat``."""

from __future__ import annotations

from typing import ClassVar

from onnxscript import OnnxFunction

from tokopt.kernels.latest_repeat.onnx import latest_repeat
from tokopt.lower.cpu.functions import WholeCall


class LatestRepeat(WholeCall):
    """``latest_repeat``, whose arguments are the op's."""

    name: ClassVar[str] = "the search for a repeat as one op of tokopt's CPU kernels"
    op: ClassVar[str] = "LatestRepeat"
    function: ClassVar[OnnxFunction] = latest_repeat
