"""Early exit on real models: accuracy against mean depth for every rule, and what it saves beside a shorter model.

``python -m benchmarks.exit`` classifies Fashion-MNIST with DINOv2-S/14 and a linear probe, and sentences of Python's
documentation, by the page that they are from, with MiniLM and a linear probe. Exits are fitted to calibration inputs;
every rule's threshold is swept over the test inputs, and the point that a tolerance with its guarantee chooses is
marked. Then exits are timed at which no row leaves, so that it is known what they cost, and of the choices of exits,
rules and tolerances that lose at most one point of accuracy on the calibration inputs the one is taken that should be
fastest by these inputs. It is timed on a stream of test inputs, one by one and in batches of 16, beside the model
itself and beside what an exit has to beat, static models that are as accurate on the test inputs: the model cut short
after a block with a head of its own, and the model without the blocks that ``drop_blocks`` removes, healed and with a
head that is fitted as those of the exits are. It writes ``benchmarks/results/exit.json``, ``exit.md`` and ``exit.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tokopt
from benchmarks.exit_points import (
    MOST_EXITS,
    MOST_LOST,
    TOLERANCES,
    Known,
    curves,
    fit_of,
    heads_of,
    operating_point,
)
from benchmarks.machine import describe
from benchmarks.progress import Progress, write_report
from benchmarks.timing import Disturbed, Engine, compare
from examples.data import (
    cache_folder,
    class_feature,
    dinov2_small,
    fashion_mnist,
    minilm,
    preprocess,
    sentence_embedding,
    write_atomically,
)
from tokopt.ir.assemble import assemble
from tokopt.passes.exit.calibrate import Answers, collect, divide
from tokopt.passes.exit.heads import Affine, Rows, fit_logistic
from tokopt.passes.exit.stages import cut_stages

RESULTS = Path(__file__).parent / "results"
STREAM, BATCHES, ROUNDS = 48, (1, 16), 5
"""Test inputs of a timed stream, rows of a call, and turns of every engine."""

READ = 16
"""Rows of a call while features are computed."""

HEALED = 16
"""Calls that a model without some blocks is healed by."""

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A frozen encoder, labelled inputs in three parts, and the blocks after which rows may leave."""

    name: str
    encoder: nn.Module
    after: tuple[int, ...]
    inputs: Mapping[str, Inputs]
    labels: Mapping[str, Tensor]

    def batches(self, part: str) -> list[Inputs]:
        """The inputs of a part in batches."""
        count = len(self.labels[part])
        return [
            {name: value[i : i + READ] for name, value in self.inputs[part].items()}
            for i in range(0, count, READ)
        ]


PARTS = ("probe", "calibrate", "test")


def images(size: int, counts: Sequence[int]) -> Task:
    """Fashion-MNIST, upsampled; the probe and the calibration are of its training split."""
    pixels, classes = fashion_mnist("train", counts[0] + counts[1])
    test, truth = fashion_mnist("test", counts[2])
    pixels, classes = np.concatenate([pixels, test]), np.concatenate([classes, truth])
    bounds = np.cumsum([0, *counts])
    inputs = {
        part: {"pixel_values": torch.from_numpy(preprocess(list(pixels[a:b]), size))}
        for part, a, b in zip(PARTS, bounds, bounds[1:], strict=False)
    }
    labels = {
        part: torch.from_numpy(classes[a:b]) for part, a, b in zip(PARTS, bounds, bounds[1:], strict=False)
    }
    encoder = class_feature(dinov2_small(size))
    return Task(f"DINOv2-S/14 at {size} px, Fashion-MNIST", encoder, (4, 6, 8, 10), inputs, labels)


DOCUMENTATION = "TOKOPT_PYTHON_DOC"
"""Environment variable that names the folder of the documentation's sources."""

PAGES = (
    *("argparse", "asyncio-task", "collections", "configparser", "ctypes", "datetime"),
    *("decimal", "logging", "multiprocessing", "os", "sqlite3", "ssl"),
)
"""Names of pages of the library reference, of which similar ones are left out."""

WORDS, LENGTH = 8, 48
"""Words of a sentence at least, and tokens at most."""


def page(name: str) -> list[str]:
    """The sentences of a page: prose alone, without directives and examples."""
    places = [os.environ.get(DOCUMENTATION), "/usr/share/doc/python3.11/html/_sources"]
    folder = next((Path(place) for place in places if place and Path(place, "library").is_dir()), None)
    if folder is None:
        raise SystemExit(
            "the sources of Python's documentation are not there; run apt-get install python3.11-doc, or set "
            f"{DOCUMENTATION}"
        )
    source = next(path for path in (folder / "library").iterdir() if path.name.startswith(f"{name}.rst"))
    text = source.read_text(encoding="utf-8")
    text = re.sub(r":[\w:]+:`[!~]?([^`<]+?)( <[^`]*>)?`|``([^`]*)``", r"\1\3", text)
    blocks = re.split(r"\n\s*\n", text)
    prose = [
        re.sub(r"\s+", " ", one)
        for one in blocks
        if not re.search(r"^\s*(\.\.|>>>)|::$|^[=*~-]+$", one, re.M)
    ]
    found = [sentence.strip() for one in prose for sentence in re.split(r"(?<=[.:])\s+", one)]
    return [sentence for sentence in found if len(sentence.split()) >= WORDS]


def sentences(counts: Sequence[int]) -> Task:
    """Sentences of the pages, in random order."""
    from transformers import AutoTokenizer

    found = {sentence: label for label, name in enumerate(PAGES) for sentence in page(name)}
    order = np.random.default_rng(0).permutation(len(found))[: sum(counts)]
    if len(order) < sum(counts):
        raise SystemExit(f"the pages have {len(found)} sentences, and {sum(counts)} are asked for")
    texts = [list(found)[i] for i in order]
    classes = torch.tensor([found[text] for text in texts])
    tokenizer: Any = AutoTokenizer.from_pretrained(minilm())
    made = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    bounds = np.cumsum([0, *counts])
    inputs = {
        part: {name: made[name][a:b] for name in ("input_ids", "attention_mask")}
        for part, a, b in zip(PARTS, bounds, bounds[1:], strict=False)
    }
    labels = {part: classes[a:b] for part, a, b in zip(PARTS, bounds, bounds[1:], strict=False)}
    encoder = sentence_embedding(minilm())
    return Task(
        f"MiniLM-L6, {len(PAGES)} pages of Python's documentation", encoder, (1, 2, 3, 4, 5), inputs, labels
    )


class Probed(nn.Module):
    """An encoder with a linear classifier."""

    def __init__(self, encoder: nn.Module, head: Affine) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(head.weight.shape[1], head.weight.shape[0])
        self.classifier.load_state_dict({"weight": head.weight, "bias": head.bias})

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.classifier(self.encoder(*inputs))


def probe(task: Task) -> nn.Module:
    """The encoder with a classifier that is fitted to its frozen features."""
    with torch.no_grad():
        features = torch.cat([task.encoder(*batch.values()) for batch in task.batches("probe")])
    labels = task.labels["probe"]
    targets = nn.functional.one_hot(labels).float()
    rows = (
        Rows(features[::5], targets[::5]),
        Rows(*(torch.cat([x[i::5] for i in range(1, 5)]) for x in (features, targets))),
    )
    start = Affine(torch.zeros(targets.shape[1], features.shape[1]), torch.zeros(targets.shape[1]))
    return Probed(task.encoder, fit_logistic(rows[1], rows[0], start)).eval().requires_grad_(False)


# --- accuracy against depth -----------------------------------------------------------------------------------


def known_of(task: Task, bundle: tokopt.Bundle) -> Known:
    """What the exits say of the calibration inputs and of the test inputs."""
    stages = cut_stages(bundle.main, task.after)
    probes, links = stages.probes()
    records = {
        part: collect(bundle, probes, links, stages.tail, [tuple(b.values()) for b in task.batches(part)])
        for part in ("calibrate", "test")
    }
    parts = divide(records["calibrate"].count, fits=True, promises=True)
    fitted = heads_of(records["calibrate"], parts, stages.tail.fitted[0].own, len(task.after))
    answers = {
        fit: {part: Answers.of(one, heads, 0) for part, one in records.items()}
        for fit, heads in fitted.items()
    }
    return Known(task.after, stages.blocks, parts, answers, task.labels)


# --- static models --------------------------------------------------------------------------------------------


class Opened(nn.Module):
    """A bundle's program as a module with one output."""

    def __init__(self, bundle: tokopt.Bundle) -> None:
        super().__init__()
        self.program = assemble(bundle.main).module(check_guards=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.program(*inputs)[0]


@dataclass(frozen=True)
class Shorter:
    """A model without ``count`` blocks, and how accurate it is on the test inputs."""

    count: int
    accuracy: float
    bundle: tokopt.Bundle


def without_blocks(task: Task, known: Known, count: int) -> Shorter:
    """The model without the blocks of least influence, healed, and with a classifier fitted as an exit's head is."""
    example = tuple(value[:5] for value in task.inputs["test"].values())
    batches = [tuple(batch.values()) for batch in task.batches("calibrate")]
    text = f"drop_blocks{{count={count} heal=true}}"
    encoder = tokopt.capture(task.encoder, example)
    made = Opened(tokopt.optimize(encoder, text, strict=True, calibration=batches[:HEALED]))
    with torch.no_grad():
        features = torch.cat([made(*batch) for batch in batches])
        tested = torch.cat([made(*batch.values()) for batch in task.batches("test")])
    targets = known.answers["logistic"]["calibrate"].final.softmax(-1)
    rows, held = (Rows(features[part], targets[part]) for part in (known.parts.fitted, known.parts.held))
    start = Affine(torch.zeros(targets.shape[1], features.shape[1]), torch.zeros(targets.shape[1]))
    head = fit_logistic(rows, held, start)
    right = head(tested).argmax(1) == task.labels["test"]
    model = Probed(made, head).requires_grad_(False)
    return Shorter(count, float(right.double().mean()), tokopt.capture(model, example))


def shortest(task: Task, known: Known, accuracy: float) -> list[Shorter]:
    """Models with fewer and fewer blocks, up to the first that is less accurate than that."""
    found: list[Shorter] = []
    while len(found) + 1 < known.blocks and (not found or found[-1].accuracy >= accuracy):
        found.append(without_blocks(task, known, len(found) + 1))
    return found


# --- time -----------------------------------------------------------------------------------------------------


def stream_call(engine: Engine) -> Callable[[], object]:
    """All test inputs of a stream, in batches; ``size`` is the depth at which all rows leave, 0 for exits."""
    from tokopt.runtime import load

    model = load(engine.artifact, threads=engine.threads)
    with np.load(engine.artifact.parent / "stream.npz") as stream:
        feeds = [
            {name: stream[name][i : i + engine.batch] for name in stream.files}
            for i in range(0, STREAM, engine.batch)
        ]

    def call() -> None:
        for feed in feeds:
            model.run(**feed, depth=engine.size or None)

    return call


def prepare(task: Task, bundle: tokopt.Bundle, folder: Path) -> Path:
    """A folder with the stream and the model itself, which is returned."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pairs = zip(bundle.inputs, task.inputs["test"].values(), strict=True)
    count = len(task.labels["test"])
    spread = torch.linspace(0, count - 1, STREAM).round().long()  # inputs of one kind may lie side by side
    arrays: dict[str, Any] = {name: value[spread].numpy() for name, value in pairs}
    np.savez(folder / "stream.npz", **arrays)
    return tokopt.export(bundle, folder / "full.tokopt")


def exit_cost(task: Task, bundle: tokopt.Bundle, full: Path, threads: int) -> float:
    """What an exit takes that lets no row leave, as a share of what the model takes: the mean over batches."""
    text = f"exit{{after=[{_listed(task.after)}] threshold=0 fit=own}}"
    path = tokopt.export(tokopt.optimize(bundle, text, strict=True), full.parent / "never.tokopt")
    shares: list[float] = []
    for batch in BATCHES:
        engines = [Engine("full", "stream", full, batch, 0, threads)]
        engines.append(Engine("exits", "stream", path, batch, 0, threads))
        ratio = compare(engines, ROUNDS)[1].ratio_median
        shares.append(max(1 / ratio - 1, 0.0) / len(task.after))
    return sum(shares) / len(shares)


def times(task: Task, bundle: tokopt.Bundle, known: Known, folder: Path, threads: int) -> dict[str, Any]:
    """Choose an operating point and time it beside static models that are as accurate."""
    full = prepare(task, bundle, folder)
    try:
        cost = exit_cost(task, bundle, full, threads)
    except Disturbed as error:
        return {"times": f"not measured: {error}"}
    best = operating_point(known, cost)
    if best is None:
        return {"times": "no tolerance lets rows leave early and loses little"}
    point = best.point
    text = (
        f"exit{{after=[{_listed(best.after)}] rule={best.rule} fit={fit_of(best.rule)} "
        f"tolerance={point.tolerance}}}"
    )
    samples = [tuple(batch.values()) for batch in task.batches("calibrate")]
    made = tokopt.optimize(bundle, text, strict=True, calibration=samples)
    fixed = next(
        (
            d
            for d, row in zip(task.after, curves(known)["static"], strict=True)
            if row["accuracy"] >= point.accuracy
        ),
        None,
    )
    dropped = shortest(task, known, point.accuracy)
    enough = [one for one in dropped if one.accuracy >= point.accuracy]
    exits = tokopt.export(made, folder / "exits.tokopt")
    static = [("full", full, 0), ("exits", exits, 0)]
    if fixed is not None:
        static.append(("static", folder / "never.tokopt", fixed))
    if enough:
        static.append(("dropped", tokopt.export(enough[-1].bundle, folder / "dropped.tokopt"), 0))
    measured: dict[str, Any] = {}
    for batch in BATCHES:
        engines = [Engine(name, "stream", path, batch, depth, threads) for name, path, depth in static]
        try:
            measured[str(batch)] = {t.name: asdict(t) for t in compare(engines, ROUNDS)}
        except Disturbed as error:
            measured[str(batch)] = str(error)
    return {
        "cost": cost,
        "chosen": {"pipeline": text, "time": best.time, **asdict(point), "notes": made.history[-1].notes},
        "fixed": fixed,
        "dropped": [{"count": one.count, "accuracy": one.accuracy} for one in dropped],
        "times": measured,
    }


def _listed(after: Sequence[int]) -> str:
    return ",".join(map(str, after))


# --- report ---------------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    """A section for each task."""
    lines = ["# Early exit", "", "![Accuracy against mean depth](exit.png)", ""]
    for task, found in report["tasks"].items():
        full = found["full"]
        lines += [
            f"## {task}",
            "",
            f"Full model: accuracy {full['accuracy']:.1%}, {full['depth']:.0f} blocks.",
            "",
        ]
        lines += ["| cut short after block | accuracy |", "|---|---|"]
        lines += [f"| {row['depth']:.0f} | {row['accuracy']:.1%} |" for row in found["static"]]
        if found.get("dropped"):
            lines += ["", "| blocks that drop_blocks removed | accuracy |", "|---|---|"]
            lines += [f"| {row['count']} | {row['accuracy']:.1%} |" for row in found["dropped"]]
        lines += ["", "| rule | " + " | ".join(f"tolerance {t:g}" for t in TOLERANCES) + " |"]
        lines += ["|---" * (len(TOLERANCES) + 1) + "|"]
        for name, rows in found["rules"].items():
            points = {p["tolerance"]: f"{p['accuracy']:.1%} at {p['depth']:.1f}" for p in rows["points"]}
            lines.append(f"| {name} | " + " | ".join(points.get(t, "no exit") for t in TOLERANCES) + " |")
        lines += ["", "Accuracy at mean depth, on the test inputs.", "", *timed(found), ""]
    return "\n".join([*lines, "```json", json.dumps(report["machine"], indent=1), "```", ""])


def timed(found: Mapping[str, Any]) -> list[str]:
    """What was timed."""
    if "chosen" not in found:
        return [str(found["times"])]
    chosen = found["chosen"]
    as_accurate = [row["count"] for row in found["dropped"] if row["accuracy"] >= chosen["accuracy"]]
    columns = {
        "exits": "with exits",
        "static": f"cut short after block {found['fixed']}"
        if found["fixed"]
        else "cut short: none is as accurate",
        "dropped": f"{as_accurate[-1]} blocks dropped"
        if as_accurate
        else "blocks dropped: none is as accurate",
    }
    lost = found["full"]["accuracy"] - chosen["accuracy"]
    lines = [
        f"An exit at which no row leaves takes {found['cost']:.1%} of the model's time. Chosen by calibration inputs, "
        f"which expect {1 / chosen['time']:.2f}x: `{chosen['pipeline']}`, {100 * lost:+.1f} points of accuracy lost at "
        f"mean depth {chosen['depth']:.1f}.",
        "",
    ]
    lines += [*(f"- {note}" for note in chosen["notes"]), ""]
    lines += ["| batch | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for batch, rows in found["times"].items():
        if isinstance(rows, str):
            lines.append(f"| {batch} | not measured: {rows} |" + " |" * (len(columns) - 1))
            continue
        cells = [ratio(rows[name]) if name in rows else "" for name in columns]
        lines.append(f"| {batch} | " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        f"Times as fast as the full model, {STREAM} test inputs, median and quartiles of turns.",
    ]


def ratio(timing: Mapping[str, Any]) -> str:
    """A median with its quartiles."""
    low, high = timing["ratio_quartiles"]
    return f"{timing['ratio_median']:.2f}x ({low:.2f} to {high:.2f})"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Accuracy against mean depth: a curve for each rule, and the shorter models."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(report["tasks"]), figsize=(12, 4.5), constrained_layout=True, squeeze=False
    )
    for axis, (task, found) in zip(axes[0], report["tasks"].items(), strict=True):
        for name, rows in found["rules"].items():
            curve = sorted((p["depth"], p["accuracy"]) for p in rows["curve"])
            (line,) = axis.plot(*zip(*curve, strict=True), label=name)
            for point in rows["points"]:
                axis.plot(point["depth"], point["accuracy"], "o", color=line.get_color(), markersize=4)
        static = [*found["static"], found["full"]]
        axis.plot([r["depth"] for r in static], [r["accuracy"] for r in static], "k--s", label="cut short")
        axis.axhline(found["full"]["accuracy"] - MOST_LOST, color="grey", linewidth=0.8, linestyle=":")
        axis.set_title(task, fontsize=10)
        axis.set_xlabel("mean blocks of a row")
        axis.set_ylim(found["full"]["accuracy"] - 0.15, found["full"]["accuracy"] + 0.02)
    axes[0][0].set_ylabel("accuracy")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {
    "images": lambda options: images(options.size, options.images),
    "sentences": lambda options: sentences(options.sentences),
}


def measure(key: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The report of one task, by its name."""
    print(f"{key}: reading and fitting", flush=True)
    task = TASKS[key](options)
    example = tuple(value[:5] for value in task.inputs["test"].values())
    bundle = tokopt.capture(probe(task), example)
    known = known_of(task, bundle)
    print(f"{key}: timing", flush=True)
    return {task.name: curves(known) | times(task, bundle, known, folder, options.threads)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exit", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--size", type=int, default=112, help="image size, a multiple of 14")
    parser.add_argument("--images", type=int, nargs=3, default=(2000, 1400, 1200), metavar=PARTS)
    parser.add_argument("--sentences", type=int, nargs=3, default=(1500, 2200, 1200), metavar=PARTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = cache_folder() / "benchmark-exit"
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(folder)
    report: dict[str, Any] = {"machine": describe(options.threads), "tasks": {}}
    for key in options.tasks:
        counts = "-".join(map(str, getattr(options, key)))
        asked = f"{key} {counts} {options.size} {options.threads} {MOST_EXITS}"
        progress.once(asked, lambda key=key: measure(key, options, folder / key))
        report["tasks"] |= progress.values[asked]
    text = markdown(report)
    options.output.mkdir(parents=True, exist_ok=True)
    write_report(options.output, "exit", report, text)
    write_atomically(options.output / "exit.png", lambda path: draw(report, path))
    print(text)


if __name__ == "__main__":
    main()
