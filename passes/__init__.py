"""The passes, one method per file, imported on first use.

Adding a pass takes one file and one line in :data:`PASSES`; see CONTRIBUTING.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokopt.passes.kv.expected_attention import ExpectedAttention
    from tokopt.passes.kv.h2o import H2O
    from tokopt.passes.kv.int8_kv import Int8KV
    from tokopt.passes.kv.keydiff import KeyDiff
    from tokopt.passes.kv.keyformer import Keyformer
    from tokopt.passes.kv.kivi import KIVI
    from tokopt.passes.kv.knorm import KNorm
    from tokopt.passes.kv.random import RandomEviction
    from tokopt.passes.kv.snapkv import SnapKV
    from tokopt.passes.kv.streaming import Streaming
    from tokopt.passes.kv.tova import TOVA
    from tokopt.passes.quantize.awq import AWQ
    from tokopt.passes.quantize.cast import Cast
    from tokopt.passes.quantize.gptq import GPTQ
    from tokopt.passes.quantize.int8 import Int8
    from tokopt.passes.quantize.keep_grid import KeepGrid
    from tokopt.passes.quantize.nupes import NUPES
    from tokopt.passes.quantize.rtn import RTN
    from tokopt.passes.quantize.smoothquant import SmoothQuant
    from tokopt.passes.reduce.divprune import DivPrune
    from tokopt.passes.reduce.evit import EViT
    from tokopt.passes.reduce.kcenter import KCenter
    from tokopt.passes.reduce.pitome import PiToMe
    from tokopt.passes.reduce.random import RandomPrune
    from tokopt.passes.reduce.tome import ToMe
    from tokopt.pipeline.base import Pass

PASSES = {
    "tome": "tokopt.passes.reduce.tome:ToMe",
    "pitome": "tokopt.passes.reduce.pitome:PiToMe",
    "evit": "tokopt.passes.reduce.evit:EViT",
    "divprune": "tokopt.passes.reduce.divprune:DivPrune",
    "kcenter": "tokopt.passes.reduce.kcenter:KCenter",
    "random": "tokopt.passes.reduce.random:RandomPrune",
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
    "int8_kv": "tokopt.passes.kv.int8_kv:Int8KV",
    "rtn": "tokopt.passes.quantize.rtn:RTN",
    "gptq": "tokopt.passes.quantize.gptq:GPTQ",
    "awq": "tokopt.passes.quantize.awq:AWQ",
    "nupes": "tokopt.passes.quantize.nupes:NUPES",
    "int8": "tokopt.passes.quantize.int8:Int8",
    "keep_grid": "tokopt.passes.quantize.keep_grid:KeepGrid",
    "cast": "tokopt.passes.quantize.cast:Cast",
    "smoothquant": "tokopt.passes.quantize.smoothquant:SmoothQuant",
}
"""Text spelling of every pass -> ``module:class``."""

__all__ = [
    "AWQ",
    "GPTQ",
    "H2O",
    "KIVI",
    "NUPES",
    "PASSES",
    "RTN",
    "TOVA",
    "Cast",
    "DivPrune",
    "EViT",
    "ExpectedAttention",
    "Int8",
    "Int8KV",
    "KCenter",
    "KNorm",
    "KeepGrid",
    "KeyDiff",
    "Keyformer",
    "PiToMe",
    "RandomEviction",
    "RandomPrune",
    "SmoothQuant",
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
