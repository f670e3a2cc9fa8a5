"""Token reduction on a real vision transformer: time against quality, for every pass.

``python -m benchmarks.vision`` builds an artifact of DINOv2-S/14 per pipeline and measures, at 224 px (257
tokens) and 518 (1370 tokens): the time of a batch of 1 and of 8 relative to the unmerged artifact on the same
engine, the cosine between its class features and the unmerged ones on photographs, and the accuracy of a
k-nearest-neighbour classifier on Fashion-MNIST features, with train and test features both from the same
artifact. It prints the table and writes ``benchmarks/results/vision.json`` and ``vision.md``.

Interrupted, it goes on where it stopped as long as tokopt's sources are the same. ``--quick`` is a smoke run
of a few minutes whose numbers mean little; it writes nothing to the results folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import tokopt
from benchmarks.machine import describe
from benchmarks.progress import Progress, write_report
from benchmarks.quality import fashion_features, photograph_features, predict
from benchmarks.timing import Disturbed, Engine, Timing, compare
from examples.data import cache_folder, fashion_mnist
from tokopt.runtime.numerics import cosines

RESULTS = Path(__file__).parent / "results"
UNMERGED = ""
TOGETHER = 5
"""Engines that are timed in one set of processes beside the control."""

STEPS = ("build", "cosine", "classify", "time", "overhead")
"""What is done, in this order; only the first is always done."""

METHODS = ("tome", "pitome", "evit", "evit{fuse=false}", "divprune", "kcenter", "random")


@dataclass(frozen=True)
class Scale:
    """What is measured at one image size: pipelines, batch sizes, and the number of Fashion-MNIST images.

    The classifier takes most of the time: it is measured for the pipelines in ``classified`` only, and
    ``None`` is all of them.
    """

    size: int
    pipelines: tuple[str, ...]
    batches: tuple[int, ...]
    train: int
    test: int
    classified: tuple[str, ...] | None = None

    def limited(self, options: argparse.Namespace) -> Scale:
        """This scale with fewer pipelines or batch sizes, or with other counts of images."""
        chosen = tuple(p for p in self.pipelines if not options.match or any(t in p for t in options.match))
        batches = tuple(b for b in self.batches if not options.batches or b in options.batches)
        train, test = options.train or self.train, options.test or self.test
        return replace(self, pipelines=chosen, batches=batches, train=train, test=test)


def with_options(method: str, options: str) -> str:
    """``evit{fuse=false}`` and ``keep=0.7`` -> ``evit{fuse=false keep=0.7}``."""
    name, _, own = method.partition("{")
    return f"{name}{{{' '.join(filter(None, (options, own.rstrip('}'))))}}}"


def every_block(methods: Sequence[str], counts: Sequence[int]) -> tuple[str, ...]:
    """Each method removing the same number of tokens in all blocks."""
    return tuple(with_options(method, f"r={r}") for r in counts for method in methods)


def decreasing(methods: Sequence[str], counts: Sequence[int]) -> tuple[str, ...]:
    """Each method removing twice the number of tokens in the first block and none in the last."""
    return tuple(with_options(method, f"r={r} schedule=decreasing") for r in counts for method in methods)


def share(methods: Sequence[str], fractions: Sequence[float]) -> tuple[str, ...]:
    """Each method keeping the same fraction of the tokens in all blocks, PiToMe's schedule."""
    return tuple(with_options(method, f"keep={keep}") for keep in fractions for method in methods)


def three_blocks(methods: Sequence[str], fractions: Sequence[float]) -> tuple[str, ...]:
    """Each method keeping a fraction of the tokens in blocks 3, 6 and 9, EViT's schedule."""
    return tuple(with_options(m, f"keep={keep} layers=[3,6,9]") for keep in fractions for m in methods)


MERGING = ("tome", "pitome", "random")
VARIANTS = (
    "tome{proportional=false}",
    "pitome{proportional=false}",
    "pitome{matching=bipartite}",
    "pitome{matching=algorithm1}",
)
"""What the papers of the merging methods have as well."""

FULL = (
    Scale(
        224,
        every_block(MERGING, (8, 12, 16))
        + every_block(VARIANTS, (16,))
        + share((*MERGING, *VARIANTS), (0.9125,))
        + decreasing(MERGING, (12,))
        + three_blocks(METHODS, (0.7, 0.5)),
        (1, 8),
        2000,
        1000,
        classified=every_block(MERGING, (16,)) + decreasing(MERGING, (12,)) + three_blocks(METHODS, (0.7,)),
    ),
    Scale(
        518,
        every_block(MERGING, (64, 80))
        + share((*MERGING, *VARIANTS), (0.9125,))
        + decreasing(MERGING, (80, 96))
        + three_blocks(METHODS, (0.5,)),
        (1, 8),
        2000,
        1000,
        classified=decreasing(("tome", "random"), (96,)),
    ),
)
QUICK = (
    Scale(224, ("tome{r=16}", "random{r=16}", *three_blocks(("evit", "divprune"), (0.7,))), (1, 8), 200, 100),
)


# ---------------------------------------------------------------------------------------------- resuming


def work_folder() -> Path:
    """The folder of the artifacts made by tokopt's present sources; those of other sources are removed."""
    package = Path(tokopt.__file__).parent
    digest = hashlib.sha256()
    for source in sorted(files(package)):
        digest.update(source.read_bytes())
    root = cache_folder() / "benchmark-vision"
    folder = root / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for other in root.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def files(folder: Path) -> Iterator[Path]:
    """The Python files below ``folder``, also through links to folders."""
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from (Path(root) / name for name in names if name.endswith(".py"))


# --------------------------------------------------------------------------------------------- measuring


class Benchmark:
    """The measurements of the scales; each step says what it does and keeps what it measured."""

    def __init__(self, scales: Sequence[Scale], rounds: int, threads: int, console: Console) -> None:
        self.scales, self.rounds, self.threads, self.console = scales, rounds, threads, console
        self.folder = work_folder()
        self.progress = Progress(self.folder)
        self.disturbed = 0

    def artifact(self, size: int, pipeline: str) -> Path:
        slug = "".join(c if c.isalnum() else "-" for c in pipeline).strip("-") or "unmerged"
        return self.folder / f"{size}-{slug}.tokopt"

    def usable(self, scale: Scale) -> list[str]:
        """The pipelines that could be built, the unmerged model first."""
        everything = (UNMERGED, *scale.pipelines)
        return [p for p in everything if "error" not in self.progress.values[f"build {scale.size} {p}"]]

    def build(self) -> None:
        for scale in self.scales:
            for pipeline in (UNMERGED, *scale.pipelines):
                self.say(f"{scale.size} px: building {pipeline or 'the unmerged model'}")
                target = self.artifact(scale.size, pipeline)
                self.progress.once(
                    f"build {scale.size} {pipeline}",
                    lambda s=scale.size, p=pipeline, t=target: build(s, p, t),
                )

    def time(self) -> None:
        for scale in self.scales:
            variants = self.usable(scale)[1:]
            for batch in scale.batches:
                for start in range(0, len(variants), TOGETHER):
                    self.time_together(scale, batch, variants[start : start + TOGETHER])

    def time_together(self, scale: Scale, batch: int, pipelines: list[str]) -> None:
        keys = {p: f"time {scale.size} {batch} {p}" for p in pipelines}
        missing = [p for p in pipelines if keys[p] not in self.progress.values]
        if not missing:
            return
        self.say(f"{scale.size} px, batch {batch}: timing {', '.join(missing)}")
        timings = self.compared([self.engine(scale, batch, p) for p in (UNMERGED, *missing)], self.rounds)
        if timings is None:
            return
        self.progress.put(f"time {scale.size} {batch} {UNMERGED}", asdict(timings[0]))
        for pipeline, timing in zip(missing, timings[1:], strict=True):
            self.progress.put(keys[pipeline], asdict(timing))

    def engine(self, scale: Scale, batch: int, pipeline: str, kind: Any = "session") -> Engine:
        artifact = self.artifact(scale.size, pipeline)
        return Engine(pipeline or "unmerged", kind, artifact, batch, scale.size, self.threads)

    def overhead(self) -> None:
        """tokopt's runtime against a bare session on the same file."""
        scale = self.scales[0]
        for batch in scale.batches:
            for pipeline in self.usable(scale)[:2]:
                self.say(f"batch {batch}: runtime overhead on {pipeline or 'the unmerged model'}")
                pair = [self.engine(scale, batch, pipeline, kind) for kind in ("session", "runtime")]
                key = f"overhead {scale.size} {batch} {pipeline}"
                if key not in self.progress.values and (timings := self.compared(pair, 2 * self.rounds)):
                    self.progress.put(key, asdict(timings[1]))

    def compared(self, engines: Sequence[Engine], rounds: int) -> list[Timing] | None:
        """The timings, or None when the machine was too busy to take them; the next run tries again."""
        try:
            return compare(engines, rounds)
        except Disturbed as error:
            self.disturbed += 1
            self.say(f"not measured: {error}")
            return None

    def cosine(self) -> None:
        """How close the features of photographs are to those of the unmerged model."""
        for scale in self.scales:
            for pipeline in self.usable(scale):
                self.progress.once(
                    f"cosine {scale.size} {pipeline}", lambda s=scale, p=pipeline: self.measure_cosine(s, p)
                )

    def classify(self) -> None:
        """How well a classifier does on the features."""
        for scale in self.scales:
            for pipeline in self.usable(scale):
                if pipeline in (UNMERGED, *(scale.classified or scale.pipelines)):
                    self.say(f"{scale.size} px: classifying with {pipeline or 'the unmerged model'}")
                    self.progress.once(
                        f"knn {scale.size} {scale.train} {scale.test} {pipeline}",
                        lambda s=scale, p=pipeline: self.measure_knn(s, p),
                    )

    def measure_cosine(self, scale: Scale, pipeline: str) -> dict[str, float]:
        similar = cosines(
            photograph_features(self.artifact(scale.size, pipeline), scale.size, self.threads),
            photograph_features(self.artifact(scale.size, UNMERGED), scale.size, self.threads),
        )
        return {"cosine_mean": float(similar.mean()), "cosine_min": float(similar.min())}

    def measure_knn(self, scale: Scale, pipeline: str) -> dict[str, float]:
        _, labels = fashion_mnist("train", scale.train)
        _, truth = fashion_mnist("test", scale.test)

        def predicted(path: Path) -> np.ndarray:
            train = fashion_features(path, scale.size, "train", scale.train, self.threads)
            return predict(
                train, labels, fashion_features(path, scale.size, "test", scale.test, self.threads)
            )

        mine = predicted(self.artifact(scale.size, pipeline))
        theirs = predicted(self.artifact(scale.size, UNMERGED))
        change = (mine == truth).astype(float) - (theirs == truth)
        return {
            "knn_accuracy": float((mine == truth).mean()),
            "knn_change": float(change.mean()),
            "knn_change_error": float(change.std() / np.sqrt(len(change))),
            "knn_agreement": float((mine == theirs).mean()),
        }

    def say(self, text: str) -> None:
        self.console.print(f"[dim]{text}[/dim]", highlight=False)

    # ------------------------------------------------------------------------------------------- report

    def rows(self) -> list[dict[str, Any]]:
        """One JSON object per size and pipeline, with whatever was measured of it."""
        known = self.progress.values
        rows = []
        for scale in self.scales:
            for pipeline in (UNMERGED, *scale.pipelines):
                row: dict[str, Any] = {"size": scale.size, "pipeline": pipeline or "unmerged"}
                row["build"] = known.get(f"build {scale.size} {pipeline}")
                row["time"] = {str(b): known.get(f"time {scale.size} {b} {pipeline}") for b in scale.batches}
                row["quality"] = {
                    **known.get(f"cosine {scale.size} {pipeline}", {}),
                    **known.get(f"knn {scale.size} {scale.train} {scale.test} {pipeline}", {}),
                }
                rows.append(row)
        return rows

    def report(self) -> dict[str, Any]:
        known = self.progress.values
        return {
            "machine": describe(self.threads),
            "model": "DINOv2 ViT-S/14, float32, ONNX Runtime CPU",
            "protocol": {
                "ratio": "median over rounds of unmerged / variant, processes taking turns",
                "photographs": 40,
                "change": "difference of kNN accuracy, plus or minus its standard error over the test images",
                "knn": {str(s.size): {"train": s.train, "test": s.test} for s in self.scales},
            },
            "overhead": {
                k.removeprefix("overhead "): v for k, v in known.items() if k.startswith("overhead ")
            },
            "rows": self.rows(),
        }


def build(size: int, pipeline: str, target: Path) -> dict[str, Any]:
    """Build an artifact in its own process; ``{"error": ...}`` when tokopt refuses."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.build", str(size), pipeline, str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(report: dict[str, Any]) -> Table:
    """The report as a table: one row per size and pipeline."""
    batches = sorted({batch for row in report["rows"] for batch in row["time"]}, key=int)
    machine = report["machine"]
    made = Table(title=f"{report['model']}, {machine['threads_used']} threads, {machine['cpu']}")
    made.add_column("px", justify="right")
    made.add_column("pipeline", min_width=30)
    numbers = ["GFLOPs", *(f"ms b{b}" for b in batches), *(f"ratio b{b}" for b in batches)]
    for column in (*numbers, "cosine", "lowest", "kNN %", "change"):
        made.add_column(column, justify="right")
    size = None
    for row in report["rows"]:
        if size not in (None, row["size"]):
            made.add_section()
        size = row["size"]
        made.add_row(*cells(row, batches))
    return made


def cells(row: dict[str, Any], batches: Sequence[str]) -> list[str]:
    built, quality = row["build"] or {}, row["quality"] or {}
    times = [row["time"].get(b) or {} for b in batches]
    if "error" in built:
        return [str(row["size"]), f"{row['pipeline']}: {built['error']}"]

    def show(source: dict[str, Any], key: str, spec: str, scale: float = 1.0, before: str = "") -> str:
        return before + format(source[key] * scale, spec) if key in source else ""

    return [
        str(row["size"]),
        row["pipeline"],
        show(built, "gflops", ".1f"),
        *(show(t, "median", ".1f", 1000) for t in times),
        *(show(t, "ratio_median", ".2f") for t in times),
        show(quality, "cosine_mean", ".4f"),
        show(quality, "cosine_min", ".3f"),
        show(quality, "knn_accuracy", ".1f", 100),
        show(quality, "knn_change", "+.1f", 100) + show(quality, "knn_change_error", ".1f", 100, " ± "),
    ]


def markdown(report: dict[str, Any]) -> str:
    """The table and the other numbers, for reading in a browser."""
    made = table(report)
    names = [str(column.header) for column in made.columns]
    batches = sorted({batch for row in report["rows"] for batch in row["time"]}, key=int)
    lines = [f"# {made.title}", "", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    filled = ([*cells(row, batches), *[""] * len(names)][: len(names)] for row in report["rows"])
    lines.extend("| " + " | ".join(row) + " |" for row in filled)
    lines += ["", summary(report), "", "```json", json.dumps(report["machine"], indent=1), "```", ""]
    return "\n".join(lines)


def summary(report: dict[str, Any]) -> str:
    """Runtime overhead, and what building cost."""
    lines = []
    for what, timing in report["overhead"].items():
        size, batch, pipeline = (what.split(" ", 2) + [""])[:3]
        where = f"{size} px, batch {batch}, {pipeline or 'unmerged'}"
        lines.append(f"tokopt's runtime over a bare session, {where}: {1 / timing['ratio_median'] - 1:+.1%}")
    built = [r["build"] for r in report["rows"] if r["build"] and "optimize_s" in r["build"]]
    if built:
        slowest = max(b["optimize_s"] + b["export_s"] for b in built)
        memory = max(b["peak_rss_gb"] for b in built)
        lines.append(
            f"Slowest optimize + export: {slowest:.0f} s; highest peak memory of a build: {memory:.1f} GB"
        )
    return "  \n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vision", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: few images, few rounds, 224 only")
    parser.add_argument("--sizes", type=int, nargs="+", help="measure only these image sizes")
    parser.add_argument("--only", choices=STEPS, nargs="+")
    parser.add_argument("--batches", type=int, nargs="+", help="time only these batch sizes")
    parser.add_argument("--match", nargs="+", help="measure only pipelines that contain one of these texts")
    parser.add_argument("--train", type=int, help="Fashion-MNIST images that the classifier learns from")
    parser.add_argument("--test", type=int, help="Fashion-MNIST images that it is tested on")
    parser.add_argument("--rounds", type=int, help="timing rounds (default 10; quick: 3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="folder of vision.json and vision.md")
    options = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=150)
    scales = [
        scale.limited(options)
        for scale in (QUICK if options.quick else FULL)
        if options.sizes is None or scale.size in options.sizes
    ]
    benchmark = Benchmark(scales, options.rounds or (3 if options.quick else 10), options.threads, console)
    for step in STEPS:
        if step == "build" or options.only is None or step in options.only:
            getattr(benchmark, step)()
    report = benchmark.report()
    console.print(table(report))
    console.print(summary(report))
    output = options.output or (benchmark.folder if options.quick else RESULTS)
    output.mkdir(parents=True, exist_ok=True)
    write_report(output, "vision", report, markdown(report))
    console.print(f"written: {output / 'vision.json'} and vision.md")
    return 1 if benchmark.disturbed else 0


if __name__ == "__main__":
    raise SystemExit(main())
