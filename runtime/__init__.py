"""The runtime: executes artifacts with numpy and ONNX Runtime; torch is never imported.

>>> from tokopt.runtime import load                # doctest: +SKIP
>>> features = load("vit.tokopt")(images)          # doctest: +SKIP

Public names are imported on first use, so that the compiler imports ``tokopt.runtime.format`` alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokopt.errors import ArtifactError, InputError
    from tokopt.runtime.conversation import Chat
    from tokopt.runtime.encoder import Model, Outputs, load
    from tokopt.runtime.format.generation import Generation
    from tokopt.runtime.format.manifest import Manifest
    from tokopt.runtime.generate import Generated, Statistics, Stream
    from tokopt.runtime.grammar import Grammar
    from tokopt.runtime.language import LanguageModel
    from tokopt.runtime.sampling import LogitsProcessor, Sampling

_HOME = {
    "ArtifactError": "tokopt.errors",
    "Chat": "tokopt.runtime.conversation",
    "Generated": "tokopt.runtime.generate",
    "Generation": "tokopt.runtime.format.generation",
    "Grammar": "tokopt.runtime.grammar",
    "InputError": "tokopt.errors",
    "LanguageModel": "tokopt.runtime.language",
    "LogitsProcessor": "tokopt.runtime.sampling",
    "Manifest": "tokopt.runtime.format.manifest",
    "Model": "tokopt.runtime.encoder",
    "Outputs": "tokopt.runtime.encoder",
    "Sampling": "tokopt.runtime.sampling",
    "Statistics": "tokopt.runtime.generate",
    "Stream": "tokopt.runtime.generate",
    "load": "tokopt.runtime.encoder",
}

__all__ = [
    "ArtifactError",
    "Chat",
    "Generated",
    "Generation",
    "Grammar",
    "InputError",
    "LanguageModel",
    "LogitsProcessor",
    "Manifest",
    "Model",
    "Outputs",
    "Sampling",
    "Statistics",
    "Stream",
    "load",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
