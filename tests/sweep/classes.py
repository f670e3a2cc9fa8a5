"""The classes of the installed transformers that the sweep is about."""

# transformers is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

LANGUAGE, TEXT, IMAGE, SOUND = FAMILIES = ("language", "text", "image", "sound")

_BY_INPUT = {
    "pixel_values": IMAGE,
    "pixel_values_videos": IMAGE,
    "input_values": SOUND,
    "input_features": SOUND,
}


@cache
def classes() -> dict[str, str]:
    """Class -> its family, in the order of the alphabet."""
    from transformers.models.auto import modeling_auto as auto

    found = dict.fromkeys(_names(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()), LANGUAGE)
    base = auto.MODEL_MAPPING_NAMES
    text = [
        *auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.values(),
        *(base[kind] for kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES if kind in base),
    ]
    for name in _names(text):
        if name not in found and _reads(name, encoder="EncoderModel" in name) == "input_ids":
            found[name] = TEXT
    for name in _names([*auto.MODEL_FOR_IMAGE_MAPPING_NAMES.values(), *base.values()]):
        if name not in found and (family := _BY_INPUT.get(_reads(name) or "")):
            found[name] = family
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0].lower())))


def find(name: str) -> Any:
    """The class of that name."""
    import transformers

    return getattr(transformers, name)


def _reads(name: str, encoder: bool = False) -> str | None:
    """The main input of a class; None for one that has a decoder, several towers, or a package that is not there."""
    try:
        found = find(name)
        if getattr(found.config_class(), "is_encoder_decoder", False) and not encoder:
            return None
    except Exception:
        return None
    parts = getattr(found.config_class, "sub_configs", {})
    several = len(parts) > 1 and not encoder
    writes = found.can_generate() if hasattr(found, "can_generate") else False
    return None if several or writes or not isinstance(found.main_input_name, str) else found.main_input_name


def _names(found: Iterable[Any]) -> list[str]:
    return [name for entry in found for name in ([entry] if isinstance(entry, str) else entry)]
