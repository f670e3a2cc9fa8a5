"""The passes, one method per file, imported on first use.

Adding a pass takes one file and one line in :data:`PASSES`; see CONTRIBUTING.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokopt.passes.kv.expected_attention import ExpectedAttention
    from tokopt.passes.kv.h2o import H2O
    from tokopt.passes.kv.keydiff import KeyDiff
    from tokopt.passes.kv.keyformer import Keyformer
    from tokopt.passes.kv.kivi import KIVI
    from tokopt.passes.kv.knorm import KNorm
    from tokopt.passes.kv.random import RandomEviction
    from tokopt.passes.kv.snapkv import SnapKV
    from tokopt.passes.kv.streaming import Streaming
    from tokopt.passes.kv.tova import TOVA
    from tokopt.passes.merge.pitome import PiToMe
    from tokopt.passes.merge.tome import ToMe
    from tokopt.passes.prune.divprune import DivPrune
    from tokopt.passes.prune.evit import EViT
    from tokopt.passes.prune.kcenter import KCenter
    from tokopt.passes.prune.random import RandomPrune
    from tokopt.pipeline import Pass

PASSES = {
    "tome": "tokopt.passes.merge.tome:ToMe",
    "pitome": "tokopt.passes.merge.pitome:PiToMe",
    "evit": "tokopt.passes.prune.evit:EViT",
    "divprune": "tokopt.passes.prune.divprune:DivPrune",
    "kcenter": "tokopt.passes.prune.kcenter:KCenter",
    "random": "tokopt.passes.prune.random:RandomPrune",
    "streaming": "tokopt.passes.kv.streaming:Streaming",
    "h2o": "tokopt.passes.kv.h2o:H2O",
    "keyformer": "tokopt.passes.kv.keyformer:Keyformer",
    "snapkv": "tokopt.passes.kv.snapkv:SnapKV",
    "tova": "tokopt.passes.kv.tova:TOVA",
    "knorm": "tokopt.passes.kv.knorm:KNorm",
    "keydiff": "tokopt.passes.kv.keydiff:KeyDiff",
    "expected_attention": "tokopt.passes.kv.expected_attention:ExpectedAttention",
    "random_kv": "tokopt.passes.kv.random:RandomEviction",
    "kivi": "tokopt.passes.kv.kivi:KIVI",
}
"""Text spelling of every pass -> ``module:class``."""

__all__ = [
    "H2O",
    "KIVI",
    "PASSES",
    "TOVA",
    "DivPrune",
    "EViT",
    "ExpectedAttention",
    "KCenter",
    "KNorm",
    "KeyDiff",
    "Keyformer",
    "PiToMe",
    "RandomEviction",
    "RandomPrune",
    "SnapKV",
    "Streaming",
    "ToMe",
    "load_pass",
]


def load_pass(name: str) -> type[Pass]:
    """The class of the pass spelled ``name``."""
    module, cls = PASSES[name].split(":")
    return getattr(import_module(module), cls)


def __getattr__(name: str) -> object:
    for home in PASSES.values():
        module, cls = home.split(":")
        if cls == name:
            return getattr(import_module(module), cls)
    raise AttributeError(f"module 'tokopt.passes' has no attribute {name!r}")
