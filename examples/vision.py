"""Merge the tokens of a real DINOv2, export it, run it without torch's help, and look at what was merged.

    python examples/vision.py [--pipeline "tome{r=16}"] [--size 518] [--output out]

Captures DINOv2 ViT-S/14 with its trained weights, optimizes and exports it, runs both artifacts with ONNX Runtime on
real photographs, and prints the speed-up beside the fidelity it costs. Writes the token picture to
``out/tokens.png``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tokopt
from examples.data import class_feature, crops, dinov2_small, photograph, preprocess
from tokopt.ir.bundle import Bundle
from tokopt.measure.picture import save_picture, token_groups, token_picture
from tokopt.measure.timing import interleaved_times
from tokopt.runtime import load
from tokopt.runtime.numerics import cosines

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "motorcycle")
PICTURED = "chelsea"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pipeline", default="tome{r=16}", help="the passes to run")
    parser.add_argument("--size", type=int, default=224, help="image size, a multiple of 14")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each artifact")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for artifacts and picture")
    return parser.parse_args()


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """A function that says which stage begins: beside a clock on a terminal, as one line each elsewhere."""
    console = Console()
    if not console.is_terminal:
        yield lambda stage: print(f"{stage} ...", flush=True)
        return
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def begin(stage: str) -> None:
            end()
            progress.add_task(stage, total=1)

        def end() -> None:
            for task in progress.tasks:
                progress.update(task.id, completed=1)

        yield begin
        end()


def export(bundle: Bundle, path: Path, say: Callable[[str], None]) -> Path:
    return tokopt.export(bundle, path, overwrite=True, progress=lambda step: say(f"{path.name}: {step}"))


def main() -> None:
    args = options()
    args.output.mkdir(parents=True, exist_ok=True)
    with stages() as say:
        compare(args, say)


def compare(args: argparse.Namespace, say: Callable[[str], None]) -> None:
    say("reading photographs and weights")
    images = preprocess([crops(photograph(name))[0] for name in PHOTOGRAPHS], args.size)
    model = class_feature(dinov2_small(args.size))

    say("capturing the model")
    bundle = tokopt.capture(model, (torch.from_numpy(images[:2]),))
    say(f"optimizing with {args.pipeline}")
    merged = tokopt.optimize(bundle, args.pipeline, strict=True)
    for step in merged.history:
        print(f"{step.text}: {step.matches} blocks reduced; {'; '.join(step.notes)}; {step.semantics}")

    plain_path = export(bundle, args.output / "dinov2.tokopt", say)
    merged_path = export(merged, args.output / "dinov2-merged.tokopt", say)

    say("running both")
    plain, reduced = load(plain_path)(images), load(merged_path)(images)
    cosine = cosines(plain, reduced)
    say(f"timing both, {args.rounds} rounds")
    seconds = list(interleaved_times([str(plain_path), str(merged_path)], args.rounds, 1, None))
    before, after = (median(times) for times in zip(*seconds, strict=True))
    print(f"one image: {before * 1e3:.1f} ms -> {after * 1e3:.1f} ms, {before / after:.2f} times as fast")
    print(f"class feature, cosine to the unmerged model: mean {cosine.mean():.4f}, worst {cosine.min():.4f}")

    say(f"drawing the tokens of {PICTURED}")
    photo = crops(photograph(PICTURED))[0]
    groups = token_groups(merged.main, torch.from_numpy(preprocess([photo], args.size)))
    picture = token_picture(Image.fromarray(photo), groups, prefix=1)
    print(f"picture: {save_picture(picture, args.output / 'tokens.png')}")


if __name__ == "__main__":
    main()
