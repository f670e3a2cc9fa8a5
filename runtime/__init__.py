"""The runtime: executes artifacts with numpy and ONNX Runtime; torch is never imported.

>>> from tokopt.runtime import load                # doctest: +SKIP
>>> features = load("vit.tokopt")(images)          # doctest: +SKIP
"""

from tokopt.errors import ArtifactError, InputError
from tokopt.runtime.manifest import Manifest
from tokopt.runtime.session import Model, Outputs, load

__all__ = ["ArtifactError", "InputError", "Manifest", "Model", "Outputs", "load"]
