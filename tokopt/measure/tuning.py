"""Search the pipeline that is fastest on this machine among those that are good enough.

Every candidate is exported, run by the runtime on inputs that calibration has not seen, and timed in turns with the
model as it was. Methods of one kind come first; what misses the floor is not combined with anything, and combinations
are tried in the order of the speed that their parts promise, until the time is up.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tokopt.analysis.samples import Sample, tensors_of
from tokopt.arguments import (
    check_callable,
    check_integer,
    check_items,
    check_kind,
    check_number,
    check_path,
    check_text,
)
from tokopt.artifact import export
from tokopt.errors import InputError, TokoptError
from tokopt.ir.bundle import Bundle, check_bundle
from tokopt.ir.format import BATCH
from tokopt.measure.candidate import Candidate
from tokopt.measure.judge import FEATURES, OWN, PREDICTIONS, Floor, judge
from tokopt.measure.space import default_space
from tokopt.measure.timing import Feed, interleaved_times, open_runner
from tokopt.pipeline.manager import optimize, parse
from tokopt.place import alone, move_artifact, remove_artifact, writing
from tokopt.runtime.engines.onnxruntime import check_threads

GAIN = 1.05
"""The least speed-up that is called one: two timings of the same program differ by less than this."""

ROUNDS = 21
"""Turns of the model and of a candidate: few seconds beside an export, and a disturbed machine needs them."""

Metric = Callable[[Path], float]
"""A user's own measure of an artifact of target onnx, by its folder."""


@dataclass(frozen=True)
class Trial:
    """One candidate: its quality, and its speed as a ratio to the model itself; or the reason why there is none.

    ``speedup`` is the median of the rounds' ratios and ``quartiles`` are theirs. ``milliseconds`` are the median of a
    batch of an encoder, or of a token that a language model decodes. ``drafter`` is the host's, of a pipeline that ends
    with ``verify``; :attr:`text` names both.
    """

    pipeline: str
    quality: Mapping[str, float] = field(default_factory=dict)
    speedup: float | None = None
    quartiles: tuple[float, float] | None = None
    milliseconds: float | None = None
    megabytes: float | None = None
    reason: str = ""
    drafter: str = ""

    @property
    def text(self) -> str:
        """The candidate, as it was given."""
        return str(Candidate(self.pipeline, self.drafter))


@dataclass(frozen=True)
class Tuning:
    """All trials of a search, in order, and what was not tried for want of time."""

    floor: Floor
    trials: tuple[Trial, ...]
    untried: tuple[str, ...] = ()

    @property
    def winner(self) -> Trial | None:
        """The fastest trial that reaches the floor and is faster than the model itself; None: no gain."""
        good = [t for t in self.trials if t.speedup and t.speedup >= GAIN and self.floor.holds(t.quality)]
        return max(good, key=lambda t: t.speedup or 0.0, default=None)

    @property
    def front(self) -> tuple[Trial, ...]:
        """Trials that no other beats in speed and quality both, the fastest first."""
        timed = [trial for trial in self.trials if trial.speedup]
        timed.sort(key=lambda trial: (trial.speedup or 0.0, self._quality(trial)), reverse=True)
        found: list[Trial] = []
        for trial in timed:
            if not found or self._quality(trial) > self._quality(found[-1]):
                found.append(trial)
        return tuple(found)

    def _quality(self, trial: Trial) -> float:
        value = trial.quality[self.floor.measure]
        return value if self.floor.sign == ">=" else -value

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "floor": str(self.floor),
            "winner": self.winner.text if self.winner else None,
            "front": [trial.text for trial in self.front],
            "trials": [asdict(trial) for trial in self.trials],
            "untried": list(self.untried),
        }


@dataclass(frozen=True)
class Machine:
    """How candidates are timed: threads of the engine, tokens that a language model has read before, and images or
    texts at once of an encoder (None: as many as the model was captured with).
    """

    threads: int | None = None
    prompt: int = 256
    batch: int | None = None

    def __post_init__(self) -> None:
        """Raise InputError for numbers that mean nothing."""
        check_threads(self.threads)
        check_integer("prompt", self.prompt, least=1)
        if self.batch is not None:
            check_integer("batch", self.batch, least=1)


def tune(
    bundle: Bundle,
    samples: Sequence[Sample],
    folder: str | Path,
    *,
    floor: str = "",
    candidates: Sequence[Sequence[str]] = (),
    metric: Metric | None = None,
    minutes: float = 30.0,
    machine: Machine | None = None,
    progress: Callable[[str], None] | None = None,
) -> Tuning:
    """Find the fastest pipeline for ``bundle`` whose quality on ``samples`` reaches ``floor``.

    Samples of even places calibrate, the others judge; a long text is several. ``floor`` is a
    :class:`~tokopt.measure.judge.Floor` in words, by default ``cosine>=0.99`` or ``KL<=0.05``. ``candidates`` replaces
    :func:`~tokopt.measure.space.default_space`: kinds of methods, of which a pipeline takes at most one each;
    ``"verify --drafter suffix"`` is one for whose artifact the host drafts. ``metric`` is called with the folder of
    every candidate's artifact, and a floor can speak of it: ``metric>=0.8``. No trial begins after ``minutes``.
    ``progress`` is called with a line per step.

    ``folder`` keeps what was measured (``trials.json``), so that the same search goes on where it stopped; the winner's
    artifact (``best.tokopt``), its pipeline (``pipeline.txt``, empty when nothing gains), the options with which
    ``tokopt generate`` runs it (``options.txt``, mostly empty) and, with matplotlib, the picture ``pareto.png``.

    Raises InputError for fewer than two samples, a bad floor or candidate, a batch that the model cannot run, a folder
    of another search, and one in which another process searches.
    """
    check_bundle("bundle", bundle)
    folder = check_path("folder", folder)
    samples = check_items("samples", samples, "a list of inputs")
    candidates = [
        check_items("an item of candidates", kind, "a list of pipelines of one kind")
        for kind in check_items("candidates", candidates, "a list of lists of pipelines")
    ]
    minutes = check_number("minutes", minutes, lambda x: x >= 0, "of at least 0")
    machine = Machine() if machine is None else check_kind("machine", machine, Machine, "a Machine, or None")
    if metric is not None:
        check_callable("metric", metric, "a function of the folder of an artifact")
    if progress is not None:
        check_callable("progress", progress, "a function of a line of text")
    inputs = [given for sample in samples for given in tensors_of(bundle, sample)]
    if len(inputs) < 2:
        raise InputError(
            "tuning needs at least two samples, one to calibrate with and one to judge by; give more"
        )
    generates = bundle.schedule.generates
    if generates and machine.batch not in (None, 1):
        raise InputError("tuning times a language model one text at a time; leave the batch out")
    measures = PREDICTIONS if generates else FEATURES
    usual = "KL<=0.05" if generates else "cosine>=0.99"
    wanted = Floor.parse(check_text("floor", floor) or usual, (*measures, *([OWN] if metric else [])))
    # One spelling of each; a misspelt candidate is refused before anything runs.
    kinds = [[Candidate.parse(text) for text in kind] for kind in candidates or default_space(bundle)]
    say = progress or (lambda line: None)
    with alone(folder):
        search = _Search(bundle, inputs, folder, machine, metric, say)
        return _run(search, kinds, wanted, minutes)


def _run(search: _Search, kinds: Sequence[Sequence[Candidate]], wanted: Floor, minutes: float) -> Tuning:
    end = time.monotonic() + 60 * minutes
    untried: list[str] = []
    for candidate in _candidates(kinds, search.trials, wanted):
        if str(candidate) in search.trials:
            continue
        if time.monotonic() >= end:
            untried.append(str(candidate))
            continue
        search.try_one(candidate, wanted)
    found = Tuning(wanted, tuple(search.trials.values()), tuple(untried))
    search.finish(found)
    return found


def _candidates(
    kinds: Sequence[Sequence[Candidate]], trials: Mapping[str, Trial], floor: Floor
) -> Iterator[Candidate]:
    """Single methods; then combinations of those that reached the floor, the most promising first."""
    for kind in kinds:
        yield from kind
    combined: list[tuple[tuple[Candidate, ...], float]] = [((), 1.0)]
    for kind in kinds:
        known = [(one, trials[str(one)]) for one in kind if str(one) in trials]
        good = [(one, trial.speedup or 0.0) for one, trial in known if _reaches(trial, floor)]
        combined += [((*parts, one), speed * own) for parts, speed in combined for one, own in good]
    pairs = [(Candidate.joined(parts), speed) for parts, speed in combined if len(parts) > 1]
    for candidate, _ in sorted(pairs, key=lambda pair: -pair[1]):
        yield candidate


def _reaches(trial: Trial, floor: Floor) -> bool:
    return trial.speedup is not None and trial.speedup >= 1.0 and floor.holds(trial.quality)


class _Search:
    """One search and its folder."""

    def __init__(
        self,
        bundle: Bundle,
        inputs: Sequence[dict[str, Tensor]],
        folder: Path,
        machine: Machine,
        metric: Metric | None,
        say: Callable[[str], None],
    ) -> None:
        self.bundle, self.folder, self.machine, self.say = bundle, folder, machine, say
        self.metric = metric
        self.calibration, self.judged = inputs[::2], inputs[1::2]
        self.baseline, self.best = folder / "original.tokopt", ""
        self.key = self._key(inputs)
        self.trials = self._read()
        if not (folder / "trials.json").exists() or not self.baseline.exists():
            say("exporting the model as it is")
            export(bundle, self.baseline, overwrite=True)
            self._keep()
        if machine.batch is not None and not bundle.schedule.generates:
            open_runner(self.baseline, machine.threads).example(machine.batch)  # refuses what cannot run

    def try_one(self, candidate: Candidate, floor: Floor) -> None:
        """Measure one candidate and keep what was found."""
        path, text = self.folder / "candidate.tokopt", str(candidate)
        try:
            trial = self._measure(candidate, path)
        except TokoptError as error:
            trial = Trial(candidate.pipeline, reason=str(error), drafter=candidate.drafter)
        best = Tuning(floor, tuple(self.trials.values())).winner
        self.trials[text] = trial
        if Tuning(floor, tuple(self.trials.values())).winner not in (None, best):
            self._replace(lambda best: move_artifact(path, best), text)
        remove_artifact(path)
        self._keep()

    def _replace(self, change: Callable[[Path], object], text: str) -> None:
        """Change ``best.tokopt``; a search that is killed meanwhile exports it again."""
        self.best = ""
        self._keep()
        change(self.folder / "best.tokopt")
        self.best = text
        self._keep()

    def _keep(self) -> None:
        rows = [asdict(trial) for trial in self.trials.values()]
        content = {"search": self.key, "best": self.best, "trials": rows}
        _write(self.folder / "trials.json", json.dumps(content, indent=1))

    def _measure(self, candidate: Candidate, path: Path) -> Trial:
        text, pipeline, drafter = str(candidate), candidate.pipeline, candidate.drafter
        self.say(f"{text}: optimizing")
        made = optimize(self.bundle, pipeline, calibration=self.calibration)
        idle = [step.text for step in made.history[len(self.bundle.history) :] if not step.matches]
        if idle:
            reason = f"{', '.join(idle)} changed nothing; tokopt optimize says why"
            return Trial(pipeline, reason=reason, drafter=drafter)
        proposing = made.schedule.proposing
        if proposing is not None and proposing.lossy:
            raise InputError(f"no quality is known of it: {proposing.lossy}; leave accept out")
        self.say(f"{text}: exporting")
        export(made, path, overwrite=True)
        self.say(f"{text}: judging and timing")
        quality = self._judged(pipeline, made, path)
        if self.metric is not None:
            quality[OWN] = float(self.metric(path))
        prompt = self.machine.prompt if self.bundle.schedule.generates else None
        paths = [str(self.baseline), str(path)]
        machine, feeds = self.machine, self._feeds() if made.exits else []
        texts = self._texts() if proposing is not None or drafter else []
        timed = interleaved_times(
            paths, ROUNDS, machine.batch, machine.threads, prompt, "onnxruntime", feeds, texts, drafter
        )
        rounds = list(timed)
        low, middle, high = np.quantile([before / after for before, after in rounds], [0.25, 0.5, 0.75])
        return Trial(
            pipeline,
            quality,
            speedup=float(middle),
            quartiles=(float(low), float(high)),
            milliseconds=1e3 * statistics.median(after for _, after in rounds) / (len(feeds) or 1),
            megabytes=sum(file.stat().st_size for file in path.iterdir()) / 1e6,
            drafter=drafter,
        )

    def _judged(self, text: str, made: Bundle, path: Path) -> dict[str, float]:
        """The quality of a candidate; one that speculates writes the texts of the same pipeline without."""
        if not made.schedule.proposing:
            return judge(self.baseline, path, self.judged, self.machine.threads)
        before = ",".join(str(step) for step in parse(text).passes if step.name != "speculate")
        if not before:
            return judge(self.baseline, self.baseline, self.judged, self.machine.threads)
        known = self.trials.get(before)
        if known is not None and known.quality:
            return {name: value for name, value in known.quality.items() if name != OWN}
        plain = path.with_name("plain.tokopt")
        try:
            export(optimize(self.bundle, before, calibration=self.calibration), plain, overwrite=True)
            return judge(self.baseline, plain, self.judged, self.machine.threads)
        finally:
            remove_artifact(plain)

    def _texts(self) -> list[Feed]:
        """The judging samples, which what is timed writes on."""
        return [{name: tensor.numpy() for name, tensor in sample.items()} for sample in self.judged]

    def _feeds(self) -> list[Feed]:
        """The judging samples in batches: where rows leave early, time depends on what they hold.

        Raises InputError where samples of several sizes make no batch.
        """
        given = [{name: tensor.numpy() for name, tensor in sample.items()} for sample in self.judged]
        batch = self.machine.batch
        if batch is None:
            return given
        axes = {
            name: spec.axes.index(BATCH) for name, spec in self.bundle.inputs.items() if BATCH in spec.axes
        }
        try:
            whole = {name: np.concatenate([one[name] for one in given], axis) for name, axis in axes.items()}
        except ValueError as error:
            raise InputError(
                f"samples of several sizes make no batch of {batch}; give them one size, or leave the batch out"
            ) from error
        rows = min(array.shape[axes[name]] for name, array in whole.items())
        places = np.arange(max(rows // batch, 1) * batch).reshape(-1, batch) % rows
        return [
            given[0] | {name: np.take(array, place, axes[name]) for name, array in whole.items()}
            for place in places
        ]

    def finish(self, found: Tuning) -> None:
        """Write the winning pipeline, its artifact if another floor chose it, and the picture."""
        best = found.winner
        winner, pipeline = (best.text, best.pipeline) if best else ("", "")
        if not winner:
            self._replace(remove_artifact, "")
        elif winner != self.best or not (self.folder / "best.tokopt").exists():
            self.say(f"{winner}: exporting the best again")
            made = optimize(self.bundle, pipeline, calibration=self.calibration)
            self._replace(lambda best: export(made, best, overwrite=True), winner)
        _write(self.folder / "pipeline.txt", f"{pipeline}\n" if winner else "")
        _write(self.folder / "options.txt", f"--drafter {best.drafter}\n" if best and best.drafter else "")
        if find_spec("matplotlib") is None:
            self.say("pareto.png needs matplotlib; install tokopt[bench]")
        else:
            _draw(found, self.folder / "pareto.png")

    def _key(self, samples: Sequence[Mapping[str, Tensor]]) -> str:
        """What the measurements depend on: the model, how it is timed and judged, and the samples."""
        module = self.bundle.main.module
        own = getattr(self.metric, "__qualname__", "")
        digest = hashlib.sha256(f"{self.machine} {own} {module.graph}".encode())
        for tensor in module.state_dict().values():
            digest.update(np.ascontiguousarray(tensor.detach().float().numpy()).data)
        for sample in samples:
            for name, tensor in sample.items():
                digest.update(name.encode() + np.ascontiguousarray(tensor).tobytes())
        return digest.hexdigest()

    def _read(self) -> dict[str, Trial]:
        path = self.folder / "trials.json"
        if not path.exists():
            return {}
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["search"] == self.key:
                self.best = stored["best"]
                return {trial.text: trial for trial in map(_trial, stored["trials"])}
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise InputError(f"{path} is damaged ({error}); remove it, or choose another folder") from error
        raise InputError(
            f"{self.folder} holds a search with another model, other samples or settings; choose another folder"
        )


def _trial(row: dict[str, Any]) -> Trial:
    return Trial(**{**row, "quartiles": tuple(row["quartiles"] or ()) or None})


def _write(path: Path, text: str) -> None:
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _draw(found: Tuning, path: Path) -> None:
    """Quality against speed: every trial a point, the front a line, the floor dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    timed = [trial for trial in found.trials if trial.speedup]
    for trial in timed:
        point = trial.speedup or 0.0, trial.quality[found.floor.measure]
        axes.plot(*point, "o", color="tab:green" if trial is found.winner else "tab:blue")
        axes.annotate(trial.text, point, textcoords="offset points", xytext=(5, 4), fontsize=7)
    front = [(trial.speedup or 0.0, trial.quality[found.floor.measure]) for trial in found.front]
    axes.plot(*zip(*front, strict=True), color="tab:blue", alpha=0.4) if front else None
    axes.axhline(found.floor.limit, linestyle="--", color="gray", label=f"floor: {found.floor}")
    axes.set_xlabel("speed, times that of the model itself")
    axes.set_ylabel(found.floor.measure)
    axes.legend()
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)
