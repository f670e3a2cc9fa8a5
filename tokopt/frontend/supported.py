"""Which models of transformers :func:`tokopt.capture_lm` cannot take, said before anything of them is traced."""

# transformers is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import inspect
from typing import Any

from tokopt.errors import CaptureError
from tokopt.frontend.positions import finds_positions


def check_supported(model: Any) -> None:
    """Raise CaptureError for a model that has no cache of keys and values alone, or no positions as an input.

    A wrapper of a model, whose ``forward`` need not say what it takes, is left to the check of what was captured.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    name = type(model).__name__
    taken = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder:
        raise CaptureError(
            f"{name} is an encoder-decoder, which capture_lm does not take; capture its encoder with "
            "tokopt.capture(model.get_encoder(), ...)"
        )
    if "past_key_values" not in taken:
        raise CaptureError(
            f"{name} keeps no attention cache, so there is no step to capture; capture it whole with tokopt.capture"
        )
    if getattr(model, "_is_stateful", False):
        raise CaptureError(
            f"{name} keeps a recurrent state, and capture_lm takes models that keep keys and values alone"
        )
    if "position_ids" not in taken and not finds_positions(model):
        raise CaptureError(
            f"{name} does not take position_ids: it finds its positions in the length of its cache or in its mask, and "
            "capture_lm takes models whose positions are an input"
        )
