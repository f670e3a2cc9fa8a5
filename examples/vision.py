"""Merge the tokens of a real DINOv2, export it, run it without torch's help, and look at what was merged.

    python examples/vision.py [--pipeline "tome{r=16}"] [--size 518] [--output out]

Captures DINOv2 ViT-S/14 with its trained weights, optimizes and exports it, runs both artifacts with ONNX Runtime on
real photographs, and prints the speed-up beside the fidelity it costs. Writes the token picture to
``out/tokens.png``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tokopt
from examples.data import class_feature, crops, dinov2_small, photographs, preprocess
from tokopt.ir.bundle import Bundle
from tokopt.measure.picture import save_picture, token_groups, token_picture
from tokopt.measure.timing import interleaved_times
from tokopt.runtime import load
from tokopt.runtime.numerics import cosines

PICTURED = "chelsea"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pipeline", default="tome{r=16}", help="the passes to run")
    parser.add_argument("--size", type=int, default=224, help="image size, a multiple of 14")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each artifact")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for artifacts and picture")
    return parser.parse_args()


def export(bundle: Bundle, path: Path) -> Path:
    print(f"exporting {path} ...", flush=True)
    return tokopt.export(bundle, path, overwrite=True)


def main() -> None:
    args = options()
    args.output.mkdir(parents=True, exist_ok=True)
    views = [crops(photo)[0] for photo in photographs().values()]
    images = preprocess(views, args.size)

    model = class_feature(dinov2_small(args.size))
    bundle = tokopt.capture(model, (torch.from_numpy(images[:2]),))
    merged = tokopt.optimize(bundle, args.pipeline, strict=True)
    for step in merged.history:
        print(f"{step.text}: {step.matches} blocks reduced; {'; '.join(step.notes)}; {step.semantics}")

    plain_path = export(bundle, args.output / "dinov2.tokopt")
    merged_path = export(merged, args.output / "dinov2-merged.tokopt")

    plain, reduced = load(plain_path)(images), load(merged_path)(images)
    cosine = cosines(plain, reduced)
    seconds = list(interleaved_times([str(plain_path), str(merged_path)], args.rounds, 1, None))
    before, after = (median(times) for times in zip(*seconds, strict=True))
    print(f"one image: {before * 1e3:.1f} ms -> {after * 1e3:.1f} ms, {before / after:.2f} times as fast")
    print(f"class feature, cosine to the unmerged model: mean {cosine.mean():.4f}, worst {cosine.min():.4f}")

    photo = crops(photographs()[PICTURED])[0]
    groups = token_groups(merged.forward, torch.from_numpy(preprocess([photo], args.size)))
    picture = token_picture(Image.fromarray(photo), groups, prefix=1)
    print(f"picture: {save_picture(picture, args.output / 'tokens.png')}")


if __name__ == "__main__":
    main()
