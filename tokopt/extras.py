"""Optional packages, and the extra of tokopt that brings each."""

from __future__ import annotations

from tokopt.errors import MissingDependencyError

EXTRAS = {
    "torch": "compile",
    "onnx": "compile",
    "onnx_ir": "compile",
    "onnxscript": "compile",
    "rich": "compile",
    "transformers": "hf",
    "gguf": "gguf",
    "accelerate": "gguf",
    "tokenizers": "text",
    "jinja2": "text",
    "PIL": "viz",
}
"""Package as it is imported -> extra. What an artifact runs with is always there."""


def missing(package: str) -> MissingDependencyError:
    """The error for a package of :data:`EXTRAS` that is not installed."""
    return MissingDependencyError(
        f"{package} is not installed; install it with: pip install 'tokopt[{EXTRAS[package]}]'"
    )


def explained(error: ModuleNotFoundError) -> MissingDependencyError | None:
    """The error that names the extra, where one brings what could not be imported."""
    package = (error.name or "").partition(".")[0]
    return missing(package) if package in EXTRAS else None
