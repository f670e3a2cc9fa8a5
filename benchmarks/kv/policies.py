"""What is compared, and its artifacts: every policy at one budget, which the quality runs then change by state."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from examples.data import cache_folder, gemma3, smollm2

BUDGET = 1024
"""Slots that the exported artifacts keep."""

EVERY = 64
"""Tokens between evictions."""

MODELS: Mapping[str, Callable[[], Path]] = MappingProxyType(
    {"SmolLM2-135M-Instruct": smollm2, "Gemma-3-270M": gemma3}
)

_COMMON = f"budget={BUDGET} every={EVERY}"
POLICIES: Mapping[str, str] = MappingProxyType(
    {
        "full": "",
        "random": f"random_kv{{{_COMMON}}}",
        "streaming": f"streaming{{{_COMMON}}}",
        "streaming, re-rotated": f"streaming{{{_COMMON} rerotate=true}}",
        "h2o": f"h2o{{{_COMMON}}}",
        "h2o, recent 32": f"h2o{{{_COMMON} recent=32}}",
        "keyformer": f"keyformer{{{_COMMON}}}",
        "keyformer, recent 32": f"keyformer{{{_COMMON} recent=32}}",
        "snapkv": f"snapkv{{{_COMMON}}}",
        "snapkv, window 128": f"snapkv{{{_COMMON} window=128 recent=128}}",
        "tova": f"tova{{{_COMMON}}}",
        "knorm": f"knorm{{{_COMMON}}}",
        "keydiff": f"keydiff{{{_COMMON}}}",
        "expected_attention": f"expected_attention{{{_COMMON}}}",
        "kivi": f"kivi{{every={EVERY}}}",
        "h2o, kivi": f"h2o{{{_COMMON}}},kivi",
    }
)
"""Name in the tables -> pipeline."""

COMPLETE = ("full", "kivi")
"""Those that hold every token."""

_EXPORT = "import sys, tokopt; "
_EXPORT += "tokopt.export(tokopt.optimize(tokopt.capture_lm(sys.argv[1]), sys.argv[2]), sys.argv[3])"


def work_folder() -> Path:
    """Where artifacts and finished parts are kept, so that a run that was cut off goes on."""
    folder = cache_folder() / "benchmark-kv"
    folder.mkdir(exist_ok=True)
    return folder


def artifact(model: str, policy: str) -> Path:
    """The artifact of a policy, exported in a process of its own the first time."""
    path = work_folder() / f"{model} {policy}.tokopt"
    if not path.exists():
        subprocess.run([sys.executable, "-c", _EXPORT, MODELS[model](), POLICIES[policy], path], check=True)
    return path
