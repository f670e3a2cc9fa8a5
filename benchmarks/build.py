"""Build one benchmark artifact in its own process, so that its time and peak memory are its own.

``python -m benchmarks.build SIZE PIPELINE FOLDER`` prints one JSON object on its last line. An empty pipeline
gives the unmerged model.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

import tokopt
from examples.data import class_feature, dinov2_small, photograph_views
from tokopt.analysis.cost import program_cost


def build(size: int, pipeline: str, folder: Path) -> dict[str, object]:
    """Capture DINOv2-S/14 at ``size``, optimise it with ``pipeline``, export it to ``folder``."""
    model = class_feature(dinov2_small(size))
    torch.set_num_threads(2)
    clock = [time.perf_counter()]
    bundle = tokopt.capture(model, (torch.from_numpy(photograph_views(size)[:2]),))
    clock.append(time.perf_counter())
    if pipeline:
        bundle = tokopt.optimize(bundle, pipeline)
    clock.append(time.perf_counter())
    tokopt.export(bundle, folder, target="onnx")
    clock.append(time.perf_counter())
    capture, optimize, export = (round(b - a, 2) for a, b in pairwise(clock))
    return {
        "capture_s": capture,
        "optimize_s": optimize,
        "export_s": export,
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "gflops": round(program_cost(bundle.main).flops / 2e9, 2),  # of one image; the example holds two
        "matches": [step.matches for step in bundle.history],
    }


if __name__ == "__main__":
    print(json.dumps(build(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))))
