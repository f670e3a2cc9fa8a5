"""Compile a merged vision transformer with Torch-TensorRT and call it like a module.

    python examples/torch_tensorrt.py [--pipeline "tome{r=8}"] [--batch 8]

Captures a ViT, merges its tokens, compiles it in this process and compares its features and its time with the model's
own. Where there is no GPU it says what it would take.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTModel

if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file, which has the name of the package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tokopt
from tokopt.errors import InputError, MissingDependencyError

REPETITIONS = 20


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pipeline", default="tome{r=8}", help="the passes to run")
    parser.add_argument("--batch", type=int, default=8, help="images per call")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the model")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=384, num_hidden_layers=chosen.layers, num_attention_heads=6, intermediate_size=1536
    )
    model: Any = ViTModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    images = torch.randn(chosen.batch, 3, 224, 224)
    bundle = tokopt.capture(model, (images[:2],))
    merged = tokopt.optimize(bundle, chosen.pipeline)
    print(f"{chosen.pipeline}: {merged.history[-1].matches} blocks changed")
    profiles = (f"batch=1:{chosen.batch}:{max(32, chosen.batch)}",)
    try:
        compiled = tokopt.compile(merged, engine=tokopt.EngineOptions(profiles=profiles), progress=print)
    except (InputError, MissingDependencyError) as error:
        print(f"not compiled: {error}")
        print("it takes a GPU, PyTorch's CUDA build, and: pip install 'tokopt[torch-tensorrt]'")
        return
    compare(model.cuda(), compiled, images.cuda())


def compare(model: torch.nn.Module, compiled: tokopt.Compiled, images: torch.Tensor) -> None:
    """Print how alike the class tokens are, and how long a call of each takes."""
    with torch.no_grad():
        wanted = model(images).last_hidden_state[:, 0]
    made = next(iter(compiled(images).values()))[:, 0]
    print(f"cosine of the class tokens: {torch.nn.functional.cosine_similarity(wanted, made).min():.4f}")
    for name, call in (("PyTorch", lambda: model(images)), ("compiled", lambda: compiled(images))):
        print(f"{name}: {milliseconds(call):.2f} ms")


@torch.no_grad()
def milliseconds(call: Callable[[], object]) -> float:
    """The mean time of a call on the GPU, after it has run three times."""
    for _ in range(3):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPETITIONS):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / REPETITIONS


if __name__ == "__main__":
    main()
