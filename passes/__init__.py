"""The passes, one method per file, imported on first use.

Adding a pass takes one file and one line in :data:`PASSES`; see CONTRIBUTING.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
}
"""Text spelling of every pass -> ``module:class``."""

__all__ = ["PASSES", "DivPrune", "EViT", "KCenter", "PiToMe", "RandomPrune", "ToMe", "load_pass"]


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
