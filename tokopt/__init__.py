"""tokopt: a compiler that makes transformer models do less work per token.

>>> import tokopt                                                    # doctest: +SKIP
>>> bundle = tokopt.capture(model, (images,))                        # doctest: +SKIP
>>> merged = tokopt.optimize(bundle, "tome{r=16}")                   # doctest: +SKIP
>>> tokopt.export(merged, "vit.tokopt", target="onnx")               # doctest: +SKIP

Public names are imported on first use, so ``import tokopt`` is fast and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokopt.artifact import compile, export, open_bundle, open_compiled, verify
    from tokopt.errors import TokoptError
    from tokopt.frontend.language import capture_lm
    from tokopt.frontend.module import capture
    from tokopt.ir.bundle import AppliedPass, Bundle, State
    from tokopt.ir.program import AxisRange, Program, TensorSpec
    from tokopt.lower.tensorrt.engine import EngineOptions
    from tokopt.lower.torch_tensorrt.build import Compiled
    from tokopt.measure.tuning import Machine, Tuning, tune
    from tokopt.pipeline.base import Context, Pass, PassResult
    from tokopt.pipeline.manager import Pipeline, optimize, parse

__version__ = "0.1.0"

_HOME = {
    "capture": "tokopt.frontend.module",
    "capture_lm": "tokopt.frontend.language",
    "optimize": "tokopt.pipeline.manager",
    "parse": "tokopt.pipeline.manager",
    "Pipeline": "tokopt.pipeline.manager",
    "Pass": "tokopt.pipeline.base",
    "PassResult": "tokopt.pipeline.base",
    "Context": "tokopt.pipeline.base",
    "export": "tokopt.artifact",
    "compile": "tokopt.artifact",
    "open_bundle": "tokopt.artifact",
    "open_compiled": "tokopt.artifact",
    "verify": "tokopt.artifact",
    "EngineOptions": "tokopt.lower.tensorrt.engine",
    "Compiled": "tokopt.lower.torch_tensorrt.build",
    "tune": "tokopt.measure.tuning",
    "Tuning": "tokopt.measure.tuning",
    "Machine": "tokopt.measure.tuning",
    "AppliedPass": "tokopt.ir.bundle",
    "AxisRange": "tokopt.ir.program",
    "Bundle": "tokopt.ir.bundle",
    "Program": "tokopt.ir.program",
    "State": "tokopt.ir.bundle",
    "TensorSpec": "tokopt.ir.program",
    "TokoptError": "tokopt.errors",
}

__all__ = [
    "AppliedPass",
    "AxisRange",
    "Bundle",
    "Compiled",
    "Context",
    "EngineOptions",
    "Machine",
    "Pass",
    "PassResult",
    "Pipeline",
    "Program",
    "State",
    "TensorSpec",
    "TokoptError",
    "Tuning",
    "capture",
    "capture_lm",
    "compile",
    "export",
    "open_bundle",
    "open_compiled",
    "optimize",
    "parse",
    "tune",
    "verify",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        try:
            return getattr(import_module(_HOME[name]), name)
        except ModuleNotFoundError as error:
            from tokopt.extras import explained

            raise explained(error) or error from error
    raise AttributeError(f"module 'tokopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
