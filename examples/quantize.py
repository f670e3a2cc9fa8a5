"""Quantize a real DINOv2, and see what every pipeline saves and costs: ``python examples/quantize.py [PIPELINE ...]``.

Captures DINOv2 ViT-S/14 with its trained weights, calibrates on half of the photographs, exports, and prints for the
other half how far the features are from those of float32, beside the bytes and the time of a batch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tokopt
from examples.data import class_feature, dinov2_small, photograph_views
from tokopt.measure.timing import interleaved_times
from tokopt.runtime import load
from tokopt.runtime.numerics import cosines

PIPELINES = ("rtn{bits=8}", "gptq", "int8", "smoothquant,int8{activations=static}")
BATCH = 8


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pipelines", nargs="*", metavar="PIPELINE", help=f"default: {' '.join(PIPELINES)}")
    parser.add_argument("--size", type=int, default=224, help="image size, a multiple of 14")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each artifact")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for the artifacts")
    return parser.parse_args()


def main() -> None:
    args = options()
    args.output.mkdir(parents=True, exist_ok=True)
    views = photograph_views(args.size)
    calibration, judged = list(views[::2, None]), views[1::2]

    bundle = tokopt.capture(class_feature(dinov2_small(args.size)), (torch.from_numpy(views[:BATCH]),))
    pipelines = ["", *(args.pipelines or PIPELINES)]
    paths = [args.output / f"dinov2-{number}.tokopt" for number in range(len(pipelines))]
    for pipeline, path in zip(pipelines, paths, strict=True):
        print(f"exporting {path}: {pipeline or 'float32'} ...", flush=True)
        quantized = tokopt.optimize(bundle, pipeline, calibration=calibration)
        tokopt.export(quantized, path, overwrite=True)

    rounds = list(interleaved_times([str(path) for path in paths], args.rounds, BATCH, None))
    wanted = load(paths[0])(judged)
    print(f"{'pipeline':40} {'MB':>6} {'cosine':>8} {'worst':>8} {'ms':>7} {'times as fast':>14}")
    for number, (pipeline, path) in enumerate(zip(pipelines, paths, strict=True)):
        cosine = cosines(wanted, load(path)(judged))
        megabytes = (path / "weights.data").stat().st_size / 1e6
        milliseconds = 1e3 * median(times[number] for times in rounds)
        ratio = median(times[0] / times[number] for times in rounds)
        print(
            f"{pipeline or 'float32':40} {megabytes:6.1f} {cosine.mean():8.4f} {cosine.min():8.4f} "
            f"{milliseconds:7.1f} {ratio:14.2f}"
        )


if __name__ == "__main__":
    main()
