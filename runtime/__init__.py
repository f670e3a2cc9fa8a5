"""The runtime: executes artifacts with numpy and ONNX Runtime; torch is never imported.

>>> from tokopt.runtime import load                # doctest: +SKIP
>>> features = load("vit.tokopt")(images)          # doctest: +SKIP
"""

from tokopt.errors import ArtifactError, InputError
from tokopt.runtime.encoder import Model, Outputs, load
from tokopt.runtime.format.manifest import Generation, Manifest
from tokopt.runtime.language import Generated, LanguageModel, Statistics
from tokopt.runtime.sampling import LogitsProcessor, Sampling

__all__ = [
    "ArtifactError",
    "Generated",
    "Generation",
    "InputError",
    "LanguageModel",
    "LogitsProcessor",
    "Manifest",
    "Model",
    "Outputs",
    "Sampling",
    "Statistics",
    "load",
]
