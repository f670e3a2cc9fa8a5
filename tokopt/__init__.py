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
    from tokopt.artifact import export, open_bundle, verify
    from tokopt.bundle import AppliedPass, AxisRange, Bundle, Program, State, TensorSpec
    from tokopt.causal_lm import capture_lm
    from tokopt.errors import TokoptError
    from tokopt.frontend import capture
    from tokopt.lower.tensorrt import EngineOptions
    from tokopt.pipeline import Context, Pass, PassResult, Pipeline, optimize, parse
    from tokopt.tuning import Machine, Tuning, tune

__version__ = "0.1.0"

_HOME = {
    "capture": "tokopt.frontend",
    "capture_lm": "tokopt.causal_lm",
    "optimize": "tokopt.pipeline",
    "parse": "tokopt.pipeline",
    "Pipeline": "tokopt.pipeline",
    "Pass": "tokopt.pipeline",
    "PassResult": "tokopt.pipeline",
    "Context": "tokopt.pipeline",
    "export": "tokopt.artifact",
    "open_bundle": "tokopt.artifact",
    "verify": "tokopt.artifact",
    "EngineOptions": "tokopt.lower.tensorrt",
    "tune": "tokopt.tuning",
    "Tuning": "tokopt.tuning",
    "Machine": "tokopt.tuning",
    "AppliedPass": "tokopt.bundle",
    "AxisRange": "tokopt.bundle",
    "Bundle": "tokopt.bundle",
    "Program": "tokopt.bundle",
    "State": "tokopt.bundle",
    "TensorSpec": "tokopt.bundle",
    "TokoptError": "tokopt.errors",
}

__all__ = [
    "AppliedPass",
    "AxisRange",
    "Bundle",
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
    "export",
    "open_bundle",
    "optimize",
    "parse",
    "tune",
    "verify",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tokopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
