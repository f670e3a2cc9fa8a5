"""The typed errors of tokopt: one sentence each, saying what, where, and what to do.

This module is a leaf: it imports nothing, so that the torch-free runtime shares it.
"""


class TokoptError(Exception):
    """Base of every error that tokopt raises on purpose."""


class CaptureError(TokoptError):
    """A model could not be captured as a Program."""


class UnsupportedModelError(CaptureError):
    """The model was captured but holds nothing that a pass could work on (no attention, for example)."""


class PipelineSyntaxError(TokoptError, ValueError):
    """The text of a pipeline cannot be parsed, or names an unknown pass or option."""


class PassError(TokoptError):
    """A pass failed or broke one of its promises; the input bundle is untouched."""


class PassRefused(PassError):
    """A pass could not prove itself legal where it was asked to work (raised only in strict mode)."""


class LoweringError(TokoptError):
    """A Program could not be lowered to the target, or the lowered form disagrees with it."""


class ArtifactError(TokoptError):
    """An artifact is damaged, foreign, of a newer format, or reaches outside its own directory."""


class InputError(TokoptError, ValueError):
    """An input does not fit the signature: wrong name, shape, dtype, an empty batch, or NaN."""


class MissingDependencyError(TokoptError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""
