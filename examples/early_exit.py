"""Let photographs leave a real DINOv2 as soon as their features have converged, in bare ONNX Runtime.

    python examples/early_exit.py [--tolerance 0.05] [--size 224] [--output out]
    python examples/early_exit.py --run out/dinov2-exits.tokopt

The first line captures DINOv2 ViT-S/14 with its trained weights, adds exits whose heads and threshold are fitted to
views of photographs, exports the artifact and runs the second line. That one imports numpy and ONNX Runtime and nothing
else: it opens the one file in which all stages are, reads the photographs that were put beside it, and prints for each
after how many blocks it left and how long that took. The picture ``out/depths.png`` shows them sorted by depth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 5
"""Runs of a photograph, of which the fastest counts."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, metavar="ARTIFACT", help="only run an artifact that is there")
    parser.add_argument("--after", default="6,7,8,9,10,11", help="blocks after which a photograph may leave")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="mean cosine distance from the full model"
    )
    parser.add_argument("--size", type=int, default=224, help="image size, a multiple of 14")
    parser.add_argument("--views", type=int, default=400, help="views of photographs to calibrate with")
    parser.add_argument(
        "--output", type=Path, default=Path("out"), help="folder for the artifact and the picture"
    )
    return parser.parse_args()


# --- what a host does: numpy and ONNX Runtime alone ---------------------------------------------------------


def run(artifact: Path) -> None:
    """Run every photograph beside an artifact, and say when it left."""
    manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    name = manifest["schedule"]["whole"]
    whole = manifest["programs"][name]
    (given,) = whole["inputs"]
    depth = next(output["name"] for output in whole["outputs"] if output["role"] == "depth")
    deepest = manifest["schedule"]["entries"][-1]["depth"]
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(artifact / whole["files"]["onnx"], settings)
    depths: dict[str, int] = {}
    with np.load(artifact.parent / "photographs.npz", allow_pickle=False) as photographs:
        for photograph in photographs.files:
            feed = {given["name"]: photographs[photograph]}
            (left,), seconds = timed(lambda feed=feed: session.run([depth], feed)[0])
            depths[photograph] = int(left)
            print(f"{photograph:24} left after {int(left):2} of {deepest} blocks  {seconds * 1e3:6.1f} ms")
    print(f"mean depth {np.mean(list(depths.values())):.1f} of {deepest}")
    print("torch and tokopt were " + ("" if {"torch", "tokopt"} & set(sys.modules) else "not ") + "imported")
    (artifact.parent / "depths.json").write_text(json.dumps(depths), encoding="utf-8")


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call gives, and the seconds of the fastest of several."""
    call()
    times: list[float] = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        made = call()
        times.append(time.perf_counter() - begun)
    return made, min(times)


# --- what makes the artifact --------------------------------------------------------------------------------


def build(args: argparse.Namespace) -> Path:
    """Export DINOv2 with exits, and write the photographs for the host beside it."""
    sys.path.insert(0, str(ROOT))
    import torch

    import tokopt
    from examples.data import class_feature, crops, dinov2_small, photographs, preprocess

    args.output.mkdir(parents=True, exist_ok=True)
    print("reading photographs and weights ...", flush=True)
    photos = photographs()
    views = preprocess(random_views(photos, args.views), args.size)
    bundle = tokopt.capture(class_feature(dinov2_small(args.size)), (torch.from_numpy(views[:2]),))
    text = f"exit{{after=[{args.after}] rule=convergence tolerance={args.tolerance}}}"
    print(f"calibrating {text} on {len(views)} views ...", flush=True)
    batches = [torch.from_numpy(part) for part in np.array_split(views, max(len(views) // 8, 1))]
    made = tokopt.optimize(bundle, text, strict=True, calibration=batches)
    print("\n".join(made.history[-1].notes))
    path = tokopt.export(made, args.output / "dinov2-exits.tokopt", overwrite=True)
    whole = {name: crops(photo)[0] for name, photo in photos.items()}
    pixels: dict[str, Any] = {name: preprocess([view], args.size) for name, view in whole.items()}
    np.savez(args.output / "photographs.npz", **pixels)
    return path


def random_views(photos: Mapping[str, NDArray[np.uint8]], count: int) -> list[NDArray[np.uint8]]:
    """Square views of photographs: of any place and size from a third of the shorter side, half of them mirrored."""
    random = np.random.default_rng(0)
    views: list[NDArray[np.uint8]] = []
    for i in range(count):
        photo = list(photos.values())[i % len(photos)]
        height, width, _ = photo.shape
        side = int(min(height, width) * random.uniform(1 / 3, 1))
        top, left = random.integers(0, height - side + 1), random.integers(0, width - side + 1)
        view = photo[top : top + side, left : left + side]
        views.append(view[:, ::-1] if random.random() < 0.5 else view)
    return views


def draw(folder: Path) -> Path:
    """The photographs by the depth at which they left, a row for each depth."""
    from PIL import Image, ImageDraw

    from examples.data import crops, photograph, resize

    depths: dict[str, int] = json.loads((folder / "depths.json").read_text(encoding="utf-8"))
    rows = [
        [name for name, left in depths.items() if left == depth] for depth in sorted(set(depths.values()))
    ]
    side, label = 128, 70
    picture = Image.new("RGB", (label + side * max(map(len, rows)), side * len(rows)), "white")
    pen = ImageDraw.Draw(picture)
    for y, names in enumerate(rows):
        pen.text((8, y * side + side // 2), f"block {depths[names[0]]}", fill="black")
        for x, name in enumerate(names):
            view = Image.fromarray(resize(crops(photograph(name))[0], side))
            picture.paste(view, (label + x * side, y * side))
    picture.save(folder / "depths.png")
    return folder / "depths.png"


def main() -> None:
    args = options()
    if args.run is not None:
        run(args.run)
        return
    path = build(args)
    subprocess.run([sys.executable, __file__, "--run", path], check=True)
    print(f"picture: {draw(args.output)}")


if __name__ == "__main__":
    main()
