"""Tuning: what it picks follows from what it measured, and what it measured is never measured twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokopt
from tests.lower.encoders import Vision, vision
from tests.matrix.language import artifact, prompt
from tests.matrix.language import bundle as decoder
from tests.zoo.blocks import Encoder, FunctionalAttention, PreNormBlock
from tests.zoo.entries import randomize
from tokopt.errors import InputError
from tokopt.measure import text_times, tuning
from tokopt.measure.candidate import Candidate
from tokopt.measure.judge import FEATURES, PREDICTIONS, Floor, judge
from tokopt.measure.space import default_space
from tokopt.measure.timing import interleaved_times
from tokopt.measure.tuning import GAIN, Machine, Trial, Tuning
from tokopt.runtime import LanguageModel
from tokopt.runtime.format.manifest import read_manifest

FLOOR = Floor.parse("cosine>=0.9", FEATURES)


@pytest.fixture(scope="module")
def model() -> tokopt.Bundle:
    return vision()


def images(count: int = 4) -> list[torch.Tensor]:
    return [vision().main.example[0][:1] + 0.01 * i for i in range(count)]


def speeds(monkeypatch: pytest.MonkeyPatch, ratios: list[float]) -> list[list[str]]:
    """Let timing say these ratios, one trial after another; what was timed is noted."""
    timed: list[list[str]] = []

    def times(paths: list[str], *rest: Any) -> Iterator[tuple[float, float]]:
        timed.append(paths)
        yield (ratios[len(timed) - 1], 1.0)

    monkeypatch.setattr(tuning, "interleaved_times", times)
    return timed


# --- laws -------------------------------------------------------------------------------------------------


def test_floors_are_read_and_compared() -> None:
    assert Floor.parse(" KL <= 5e-2 ", PREDICTIONS) == Floor("KL", "<=", 0.05)
    assert str(Floor.parse("cosine>=0.990", FEATURES)) == "cosine>=0.99"
    assert Floor("KL", "<=", 0.05).holds({"KL": 0.05}) and not Floor("KL", "<=", 0.05).holds({"KL": 0.051})
    for text in ("cosine", "cosine>0.9", "cosine>=x", ">=1"):
        with pytest.raises(InputError, match="is no floor; write one like"):
            Floor.parse(text, FEATURES)
    for text, known in (("cosine>=0.9", PREDICTIONS), ("kl<=1", PREDICTIONS), ("KL<=1", FEATURES)):
        with pytest.raises(InputError, match="is not measured of this model; choose among"):
            Floor.parse(text, known)


POINTS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=8)


@given(POINTS)
def test_front_and_winner_by_definition(points: list[tuple[int, int]]) -> None:
    """On the front nothing is as fast and better, or faster and as good; the winner is the fastest above the floor."""
    trials = tuple(Trial(str(i), {"cosine": q / 6}, speedup=s / 2) for i, (s, q) in enumerate(points))
    found = Tuning(FLOOR, trials)
    beaten = {
        i
        for i, (s, q) in enumerate(points)
        if any((t >= s and p > q) or (t > s and p >= q) for t, p in points)
    }
    front = {points[int(trial.pipeline)] for trial in found.front}
    assert front == {point for i, point in enumerate(points) if i not in beaten}
    good = [s / 2 for s, q in points if q / 6 >= 0.9 and s / 2 >= GAIN]
    assert (found.winner.speedup if found.winner else None) == max(good, default=None)


# --- what is tried ----------------------------------------------------------------------------------------


def blocks(count: int = 4) -> list[PreNormBlock]:
    return [PreNormBlock(32, 48, FunctionalAttention(32, 2)) for _ in range(count)]


DEEP = {
    "margin": lambda: (Encoder(16, 4, 32, blocks()), torch.nn.Linear(32, 5)),
    "convergence": lambda: (Encoder(16, 4, 32, blocks()),),
    "": blocks,
}
"""Four blocks: for classes, for features, for outputs per token."""


def deep(rule: str) -> tokopt.Bundle:
    size = (3, 3, 16, 16) if rule else (3, 9, 32)
    return tokopt.capture(randomize(torch.nn.Sequential(*DEEP[rule]())), (torch.randn(size),))


@pytest.mark.parametrize("rule", DEEP)
def test_depth_is_tried_where_a_model_has_it(rule: str) -> None:
    """Rows leave by classes, by features, or not at all; and what is tried is refused by nobody."""
    bundle = deep(rule)
    fewer, *others = default_space(bundle)
    assert fewer == ("drop_blocks{count=1 heal=true}",)
    exits = [text for kind in others for text in kind if text.startswith("exit")]
    assert all(f"rule={rule} " in text for text in exits) and len(exits) == (2 if rule else 0)
    calibration = [torch.randn(8, *bundle.main.example[0].shape[1:]) for _ in range(3)]
    for text in (*fewer, *exits):
        assert tokopt.optimize(bundle, text, calibration=calibration, strict=True).history[-1].matches


def test_depth_is_not_tried_where_there_is_none() -> None:
    """Models of two layers, and of several programs."""
    assert default_space(decoder("llama"))[0][0].startswith("streaming")
    cut = tokopt.optimize(deep("margin"), "split{at=2}", strict=True)
    assert not any(text.startswith(("drop", "exit")) for kind in default_space(cut) for text in kind)


# --- the search -------------------------------------------------------------------------------------------

CANDIDATES = (("tome{r=1}", "tome{r=6}"), ("rtn{bits=8 group=16}", "keep_grid"))


def test_search_combines_what_reached_the_floor(
    model: tokopt.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused candidates are trials with a reason; the best artifact stays, losers do not."""
    timed = speeds(monkeypatch, [1.2, 1.3, 1.1, 1.4, 1.5])
    found = tokopt.tune(model, images(), tmp_path / "t", floor="cosine>=0.9", candidates=CANDIDATES)
    singles = [text for kind in CANDIDATES for text in kind]
    assert [trial.pipeline for trial in found.trials[:4]] == singles
    good = [trial.pipeline for trial in found.trials[:2] if FLOOR.holds(trial.quality)]
    assert good  # the milder of the two at least
    combined = [f"{text},rtn{{bits=8 group=16}}" for text in reversed(good)]  # the faster one first
    assert [trial.pipeline for trial in found.trials[4:]] == combined
    assert len(timed) == 3 + len(combined)
    assert found.trials[3].reason == "keep_grid changed nothing; tokopt optimize says why"
    assert found.winner is found.trials[-1]
    kept = sorted(path.name for path in (tmp_path / "t").iterdir())
    assert kept == [
        "best.tokopt",
        "options.txt",
        "original.tokopt",
        "pareto.png",
        "pipeline.txt",
        "trials.json",
    ]
    assert found.winner is not None
    text = (tmp_path / "t/pipeline.txt").read_text().strip()
    assert text == found.winner.pipeline
    again = tokopt.export(tokopt.optimize(model, text, calibration=images()[::2]), tmp_path / "again.tokopt")
    assert judge(tmp_path / "t/original.tokopt", again, images()[1::2], 1) == pytest.approx(
        dict(found.winner.quality)
    )


def test_a_users_own_metric_decides(
    model: tokopt.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees every artifact, and another metric is another search."""
    speeds(monkeypatch, [1.2, 1.6])
    candidates = [["tome{r=1}", "tome{r=5}"]]

    def tokens_kept(artifact: Path) -> float:
        return -float(read_manifest(artifact).pipeline.removeprefix("tome{r=").removesuffix("}"))

    found = tokopt.tune(
        model, images(), tmp_path / "t", candidates=candidates, metric=tokens_kept, floor="metric>=-3"
    )
    assert [trial.quality["metric"] for trial in found.trials] == [-1, -5]
    assert found.winner is found.trials[0]
    with pytest.raises(InputError, match="choose another folder"):
        tokopt.tune(model, images(), tmp_path / "t", candidates=candidates)
    with pytest.raises(InputError, match="'metric' is not measured of this model"):
        tokopt.tune(model, images(), tmp_path / "u", candidates=candidates, floor="metric>=-3")


def test_search_goes_on_where_it_stopped(
    model: tokopt.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured is not measured again; another search does not mix with it."""
    timed = speeds(monkeypatch, [1.2, 1.3])
    tokopt.tune(model, images(), tmp_path / "t", candidates=[["tome{r=1}"]], floor="cosine>=0")
    both = tokopt.tune(
        model, images(), tmp_path / "t", candidates=[["tome{r=1}", "tome{r=2}"]], floor="cosine>=0"
    )
    assert len(timed) == 2 and [trial.speedup for trial in both.trials] == [1.2, 1.3]
    assert [trial.quartiles for trial in both.trials] == [(1.2, 1.2), (1.3, 1.3)]
    assert json.loads((tmp_path / "t/trials.json").read_text())["trials"][1]["pipeline"] == "tome{r=2}"
    with pytest.raises(InputError, match="choose another folder"):
        tokopt.tune(model, images(6), tmp_path / "t", candidates=[["tome{r=1}"]])


def test_a_killed_search_leaves_the_best_or_exports_it_again(
    model: tokopt.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed where one best artifact takes the place of another."""

    class Killed(BaseException):
        pass

    def fail(*arguments: object) -> None:
        raise Killed

    def search(*candidates: str) -> Tuning:
        return tokopt.tune(model, images(), tmp_path / "t", candidates=[candidates], floor="cosine>=-1")

    speeds(monkeypatch, [1.1, 1.3])
    search("tome{r=1}")
    best = tmp_path / "t/best.tokopt"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tuning, "move_artifact", fail)
        search("tome{r=1}", "tome{r=2}")
    assert read_manifest(best).pipeline == "tome{r=1}"
    found = search("tome{r=1}", "tome{r=2}")
    assert found.winner is not None and read_manifest(best).pipeline == found.winner.pipeline == "tome{r=2}"
    assert not [path for path in (tmp_path / "t").iterdir() if path.name.startswith(".")]


def test_a_damaged_search_is_refused(model: tokopt.Bundle, tmp_path: Path) -> None:
    tokopt.tune(model, images(), tmp_path / "t", candidates=[["tome{r=1}"]], minutes=0)
    file = tmp_path / "t/trials.json"
    whole = file.read_text()
    for text in (whole[:40], "{}", whole.replace('"trials": []', '"trials": [1]'), "[" * 100_000):
        file.write_text(text)
        with pytest.raises(InputError, match="is damaged"):
            tokopt.tune(model, images(), tmp_path / "t", candidates=[["tome{r=1}"]], minutes=0)


def test_a_batch_is_timed_as_asked(
    model: tokopt.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another batch is another search; a batch that cannot run is refused before any trial."""
    batches: list[int | None] = []

    def times(paths: list[str], rounds: int, batch: int | None, *rest: Any) -> Iterator[tuple[float, float]]:
        batches.append(batch)
        yield (2.0, 1.0)

    monkeypatch.setattr(tuning, "interleaved_times", times)
    given = {"candidates": [["tome{r=1}"]], "floor": "cosine>=0"}
    tokopt.tune(model, images(), tmp_path / "t", machine=Machine(batch=3), **given)
    assert batches == [3]
    with pytest.raises(InputError, match="choose another folder"):
        tokopt.tune(model, images(), tmp_path / "t", **given)
    fixed = tokopt.capture(Vision().eval(), (torch.cat(images(2)),), dynamic={})
    with pytest.raises(InputError, match="cannot run a batch of 3"):
        tokopt.tune(
            fixed,
            [image.repeat(2, 1, 1) for image in images()],
            tmp_path / "u",
            machine=Machine(batch=3),
            **given,
        )
    with pytest.raises(InputError, match="one text at a time"):
        tokopt.tune(decoder("llama"), [[1, 2]] * 2, tmp_path / "v", machine=Machine(batch=2))
    assert batches == [3]


@pytest.mark.parametrize(("batch", "shapes"), [(None, [1, 1, 1]), (2, [2]), (5, [5])])
def test_exits_are_timed_on_the_samples(
    batch: int | None,
    shapes: list[int],
    model: tokopt.Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Time depends on what they hold; a stored example may leave early, or never."""
    timed: list[list[dict[str, Any]]] = []

    def times(paths: list[str], *rest: Any) -> Iterator[tuple[float, float]]:
        *_, feeds, _, _ = rest
        timed.append(feeds)
        yield (2.0, 1.0)

    monkeypatch.setattr(tuning, "interleaved_times", times)
    candidates = [["tome{r=1}", "exit{after=[1] rule=margin threshold=0.5 fit=own}"]]
    machine = Machine(batch=batch)
    tokopt.tune(model, images(6), tmp_path, candidates=candidates, floor="cosine>=-1", machine=machine)
    plain, feeds = timed
    assert plain == []
    (name,) = model.inputs
    assert [len(feed[name]) for feed in feeds] == shapes
    judged = torch.cat(images(6)[1::2]).numpy()
    rows = np.concatenate([feed[name] for feed in feeds])
    np.testing.assert_array_equal(rows, judged[np.arange(len(rows)) % len(judged)])


def test_another_model_is_another_search(model: tokopt.Bundle, tmp_path: Path) -> None:
    """Even before the first trial."""
    tokopt.tune(model, images(), tmp_path / "t", candidates=[["tome{r=1}"]], minutes=0)
    other = tokopt.optimize(model, "rtn{bits=8 group=16}")
    with pytest.raises(InputError, match="choose another folder"):
        tokopt.tune(other, images(), tmp_path / "t", candidates=[["tome{r=1}"]], minutes=0)


def test_another_floor_chooses_among_what_was_measured(
    model: tokopt.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact that stays is the one that the text names."""
    timed = speeds(monkeypatch, [1.2, 1.6])
    candidates = [["tome{r=1}", "tome{r=5}"]]

    def winner(floor: str) -> str:
        tokopt.tune(model, images(), tmp_path / "t", candidates=candidates, floor=floor)
        text = (tmp_path / "t/pipeline.txt").read_text().strip()
        best = tmp_path / "t/best.tokopt"
        assert (read_manifest(best).pipeline if best.exists() else "") == text
        return text

    assert winner("cosine>=-1") == "tome{r=5}"
    trials = json.loads((tmp_path / "t/trials.json").read_text())["trials"]
    qualities = [trial["quality"]["cosine"] for trial in trials]
    assert qualities[0] > qualities[1]
    assert winner(f"cosine>={sum(qualities) / 2}") == "tome{r=1}"
    assert winner("cosine>=1.1") == ""
    assert len(timed) == 2


def test_no_trial_begins_when_the_time_is_up(model: tokopt.Bundle, tmp_path: Path) -> None:
    found = tokopt.tune(model, images(), tmp_path / "t", candidates=[["tome{r=1}"]], minutes=0)
    assert (found.trials, found.untried, found.winner) == ((), ("tome{r=1}",), None)
    assert (tmp_path / "t/pipeline.txt").read_text() == ""


def test_no_gain_is_said(model: tokopt.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what is faster and too bad, nor what is good and no faster."""
    speeds(monkeypatch, [2.0, 1.0])
    found = tokopt.tune(
        model, images(), tmp_path / "t", candidates=[["tome{r=6}", "tome{r=1}"]], floor="cosine>=0.999999"
    )
    assert found.winner is None and not (tmp_path / "t/best.tokopt").exists()


def test_bad_input_is_refused_before_anything_runs(model: tokopt.Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least two samples"):
        tokopt.tune(model, images(1), tmp_path / "t")
    with pytest.raises(tokopt.TokoptError, match="tomme"):
        tokopt.tune(model, images(), tmp_path / "t", candidates=[["tomme{r=1}"]])
    assert not (tmp_path / "t").exists()


# --- language models --------------------------------------------------------------------------------------


def test_texts_are_judged_after_eviction() -> None:
    """The model against itself: nothing; a cache of 8 slots against all 40: something, and less than nonsense."""
    whole, small = (artifact("llama", passes).path for passes in ("", "streaming{budget=8}"))
    texts = [prompt(40, seed=i) for i in range(2)]
    assert judge(whole, whole, texts, 1) == {"KL": 0.0, "top1": 1.0, "perplexity": 1.0}
    lost = judge(whole, small, texts, 1)
    assert lost["KL"] > 1e-4 and lost["top1"] < 1
    with pytest.raises(InputError, match="too short to judge by"):
        judge(whole, whole, [[1, 2]], 1)


def test_language_models_are_timed_by_tokens() -> None:
    path = str(artifact("llama").path)
    rounds = list(interleaved_times([path, path], 2, None, 1, prompt=16))
    assert len(rounds) == 2 and all(seconds > 0 for row in rounds for seconds in row)


def test_a_language_models_time_is_that_of_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that decodes STEPS tokens in STEPS seconds takes one."""
    path = str(artifact("llama").path)
    measure = text_times.DecodeTimer(16, 1).open(path)
    clock = iter([0.0, float(text_times.STEPS)])
    monkeypatch.setattr(text_times, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert measure() == 1.0


def test_the_time_of_a_token_is_a_mean_over_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model decodes the first 8 of 32 tokens and takes 4 s for each, the shallower one 1 s."""
    path = str(artifact("llama", "skipdecode{min=1 over=8}").path)
    measure = text_times.DecodeTimer(16, 1, 32).open(path)
    steps = float(text_times.STEPS)
    clock = iter([0.0, 4 * steps, 5 * steps, 6 * steps])
    monkeypatch.setattr(text_times, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert measure() == (8 * 4 + 24 * 1) / 32


def test_a_model_that_speculates_is_timed_by_what_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first half of each text in turn, as far back as the prompt goes; the seconds of a token."""
    written: list[tuple[list[int], int]] = []

    def generate(
        self: LanguageModel, ids: np.ndarray, *, max_tokens: int, inputs: object, drafter: object
    ) -> Any:
        assert not self.settings.eos and not inputs and drafter is None
        written.append((ids.tolist(), max_tokens))
        return SimpleNamespace(statistics=SimpleNamespace(decode_seconds=6.0, new_tokens=4))

    monkeypatch.setattr(LanguageModel, "generate", generate)
    texts = [{"tokens": np.array([ids])} for ids in ([1, 2, 3, 4, 5, 6, 7], [8, 9])]
    measure = text_times.WritingTimer(tuple(texts), 2, 1, 9).open(str(artifact("llama", "speculate").path))
    assert [measure() for _ in range(3)] == [2.0] * 3
    assert written == [([2, 3], 9), ([8], 9), ([2, 3], 9)]


def test_drafters_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What speculates has the quality of the pipeline without, and is timed on the judging samples.

    What verifies is timed with its host's drafter, which is said beside its pipeline.
    """
    assert {"speculate{drafter=hybrid}", "verify --drafter suffix"} < set(
        default_space(decoder("hand_rotary"))[-1]
    )
    given: list[Any] = []

    def times(paths: list[str], *rest: Any) -> Iterator[tuple[float, float]]:
        given.append(rest[-2:])
        yield ([1.4, 1.2, 1.3, 1.8, 1.7][len(given) - 1], 1.0)

    def export(made: tokopt.Bundle, path: Path, **options: Any) -> None:
        shutil.copytree(artifact("llama").path, path)  # any artifact, which may be moved

    def judged(original: Path, other: Path, *rest: Any) -> dict[str, float]:
        return {"KL": float(original != other), "top1": 1.0, "perplexity": 1.0}

    for name, function in (("interleaved_times", times), ("export", export), ("judge", judged)):
        monkeypatch.setattr(tuning, name, function)
    found = tokopt.tune(
        decoder("hand_rotary"),
        [prompt(24, seed=i) for i in range(4)],
        tmp_path / "t",
        floor="KL<=5",
        candidates=[
            ["streaming{budget=0.5}"],
            ["speculate{drafter=prompt_lookup}", "verify  --drafter suffix", "speculate{accept=typical}"],
        ],
        machine=Machine(threads=1, prompt=16),
    )
    evicting, alone, hosted, lossy, verifying, both = found.trials
    assert both.quality == evicting.quality != alone.quality and alone.quality["KL"] == 0
    assert given[0] == ([], "")
    drafters = [drafter for texts, drafter in given[1:] if len(texts) == 2]
    assert drafters == ["", "suffix", "suffix", ""]
    assert (hosted.pipeline, hosted.drafter) == ("verify", "suffix") and "'typical' is lossy" in lossy.reason
    assert found.winner == verifying and both.text == "streaming{budget=0.5},speculate"
    assert found.as_dict()["winner"] == "streaming{budget=0.5},verify --drafter suffix"
    texts = [(tmp_path / "t" / name).read_text() for name in ("pipeline.txt", "options.txt")]
    assert texts == ["streaming{budget=0.5},verify\n", "--drafter suffix\n"]


def test_a_hosts_drafter_is_timed_where_the_model_verifies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model itself, with which it takes turns, writes without one."""
    drafters: list[str | None] = []

    def generate(self: LanguageModel, ids: np.ndarray, *, drafter: str | None, **options: Any) -> Any:
        drafters.append(drafter)
        return SimpleNamespace(statistics=SimpleNamespace(decode_seconds=6.0, new_tokens=4))

    paths = [str(artifact("llama", passes).path) for passes in ("", "verify{neighbours=6}")]
    monkeypatch.setattr(LanguageModel, "generate", generate)
    timer = text_times.WritingTimer(({"tokens": np.array([[1, 2, 3]])},), 2, 1, 9, "suffix")
    for path in paths:
        timer.open(path)()
    assert drafters == [None, "suffix"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("verify --drafter sufix", "'sufix' is no drafter; choose from suffix,"),
        ("speculate --drafter suffix", "a host drafts for a pipeline that ends with verify"),
    ],
)
def test_a_drafter_of_no_host_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Candidate.parse(text)


def test_language_model_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds(monkeypatch, [1.4])
    texts = [prompt(24, seed=i) for i in range(4)]
    found = tokopt.tune(
        decoder("llama"),
        texts,
        tmp_path / "t",
        floor="KL<=5",
        candidates=[["rtn{bits=8 group=16}"]],
        machine=Machine(threads=1, prompt=16),
    )
    assert found.winner is not None and set(found.winner.quality) == {"KL", "top1", "perplexity"}
