"""Every model with every pass as engines of Torch-TensorRT, without a GPU: ``python -m tests.lower.every_engine``.

The tests build each model and each pass once; this builds all of them for two GPUs, in some five minutes. Prints a line
for each and ends with 1 where a program is not one engine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

import tokopt
from tests.lower.test_torch_tensorrt import EVICTION, captured, optimized, smollm2
from tests.lower.without_gpu import torch_tensorrt
from tokopt import EngineOptions
from tokopt.errors import TokoptError

ARCHITECTURES = ("sm_86", "sm_89")

QUANTIZED = ("int8{activations=static}", "rtn{group=16}")

PASSES = {
    "vit": ("tome{r=4}", "pitome{r=4}", "evit{keep=0.7}", "divprune{keep=0.5}", "int8", *QUANTIZED),
    "dinov2": ("tome{r=4}", "pitome{r=4}", "evit{keep=0.7}", "divprune{keep=0.5}", "int8", *QUANTIZED),
    "bert": (
        "tome{r=2 layers=[0]}",
        "pitome{r=2 layers=[0]}",
        "evit{keep=0.7}",
        "divprune{keep=0.5}",
        "int8",
        *QUANTIZED,
    ),
    "smollm2": (f"h2o{{{EVICTION}}}", "int8_kv", f"h2o{{{EVICTION}}},int8_kv", *QUANTIZED),
}

PROFILES = {"smollm2": ("slots=64", "tokens=1:1:16")}


def outcomes() -> Iterator[tuple[str, bool]]:
    """A line about every model, pass and GPU, and whether each program is one engine."""
    for name, passes in PASSES.items():
        plain = smollm2() if name == "smollm2" else captured(name)
        for pipeline in ("", *passes):
            bundle = optimized(name, pipeline) if pipeline else plain
            for arch in ARCHITECTURES:
                report = build(bundle, arch, PROFILES.get(name, ("batch=1:4:16",)))
                whole = all(line.endswith(": 1 engine, and nothing is left to PyTorch") for line in report)
                yield f"{name} {pipeline or 'as it is'} {arch}: {'; '.join(report)}", whole


def build(bundle: tokopt.Bundle, arch: str, profiles: tuple[str, ...]) -> tuple[str, ...]:
    """What became of every program, or why it is refused."""
    try:
        with torch_tensorrt(arch):
            return tokopt.compile(bundle, engine=EngineOptions(profiles=profiles, strict=True)).report
    except TokoptError as error:
        return (str(error),)


def main() -> int:
    torch.set_num_threads(1)
    failed = 0
    for line, whole in outcomes():
        failed += not whole
        print(line, flush=True)
    print(f"{failed} programs are not one engine")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
