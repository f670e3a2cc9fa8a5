"""The benchmark's own arithmetic: classifier, ratios, pipelines, and errors for data that is not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("psutil")
pytest.importorskip("rich")

from tokenizers import Tokenizer

import benchmarks
import tokopt
from benchmarks import cpu_attention, machine, timing
from benchmarks.peers.report import fastest_ratio, floors
from benchmarks.peers.report import markdown as peers_markdown
from benchmarks.quality import predict
from benchmarks.quantize import MODELS
from benchmarks.vision import FULL, QUICK, Scale, with_options
from benchmarks.worker import Worker, medians
from examples import data
from examples.tune import library_text
from tests.commands import inputs
from tests.kernels.linears import needs_library
from tokopt.errors import MissingDependencyError
from tokopt.passes import Int8KV
from tokopt.passes.quantize.base import Quantization
from tokopt.runtime import machine as runtime_machine


def test_neighbours_classify_separate_clusters_perfectly() -> None:
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((10, 32))
    labels = np.arange(400) % 10

    def noisy() -> np.ndarray:
        return (centres[labels] + 0.1 * generator.standard_normal((400, 32))).astype(np.float32)

    assert (predict(noisy(), labels, noisy()) == labels).all()


@pytest.mark.parametrize(
    ("field", "names", "found"),
    [
        ("flags", "fpu avx2 avx512f avx512_bf16", True),
        ("flags", "fpu avx2", False),
        ("Features", "fp asimd bf16", True),
        ("Features", "fp asimd", False),
    ],
)
def test_bfloat16_is_read_from_the_processor(
    monkeypatch: pytest.MonkeyPatch, field: str, names: str, found: bool
) -> None:
    monkeypatch.setattr(runtime_machine, "_reported", lambda asked: names if asked == field else "")
    assert machine.has_bfloat16() is found


class _Machine:
    """Engines of known cost on a machine whose speed changes, instead of processes."""

    def __init__(self, slowness: list[float]) -> None:
        self.slowness = iter(slowness)

    def __call__(self, engine: timing.Engine) -> SimpleNamespace:
        turn = lambda: [engine.size * next(self.slowness)]  # noqa: E731
        return SimpleNamespace(engine=engine, turn=turn, close=lambda: None)


def _timings(
    monkeypatch: pytest.MonkeyPatch, slowness: list[float], rounds: int
) -> tuple[timing.Timing, timing.Timing]:
    """A control that takes 4 seconds, and an engine that takes 2."""
    monkeypatch.setattr(timing, "Turns", _Machine(slowness))
    engines = [timing.Engine(str(size), "", Path(), 1, size, 1) for size in (4, 2)]
    control, engine = timing.compare(engines, rounds)
    return control, engine


def test_a_ratio_compares_turns_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is twice as slow from one round to the next changes no ratio."""
    control, engine = _timings(monkeypatch, [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2], rounds=2)
    assert (control.ratio_median, engine.ratio_median) == (1.0, 2.0)
    assert engine.ratio_quartiles == (2.0, 2.0)
    assert (engine.minimum, engine.median, engine.rounds, engine.rejected) == (2.0, 3.0, 2, 0)


def test_a_turn_counts_only_between_equal_turns_of_the_control(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's first turn lies in a change of speed: it alone is repeated."""
    control, engine = _timings(monkeypatch, [1, 1, 1, 1, 2, 2, 2], rounds=1)
    assert (control.rounds, control.rejected, engine.rounds, engine.rejected) == (1, 0, 1, 1)
    assert (control.median, engine.median, engine.ratio_median) == (4.0, 4.0, 2.0)


def test_a_machine_that_never_rests_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(timing.Disturbed, match="5 of 5 turns of 4"):
        _timings(monkeypatch, [1.5**i for i in range(30)], rounds=1)


@pytest.mark.parametrize("scale", [*FULL, *QUICK], ids=lambda scale: f"{scale.size}-{scale.train}")
def test_every_pipeline_of_the_benchmark_parses_to_itself(scale: Scale) -> None:
    for text in scale.pipelines:
        assert str(tokopt.parse(str(tokopt.parse(text)))) == str(tokopt.parse(text))
    assert any(text.startswith("random") for text in scale.pipelines)


def test_options_join_those_of_the_method() -> None:
    assert with_options("tome", "r=8") == "tome{r=8}"
    assert with_options("evit{fuse=false}", "keep=0.5") == "evit{keep=0.5 fuse=false}"


def test_missing_fashion_mnist_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.FASHION_FOLDER, str(tmp_path))
    with pytest.raises(MissingDependencyError, match="dataset-fashion-mnist"):
        data.fashion_mnist("test", 3)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        data.write_atomically(tmp_path / "weights", fail)
    assert list(tmp_path.iterdir()) == []


def test_images_become_normalised_squares() -> None:
    pytest.importorskip("PIL")
    photo = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    views = data.crops(photo)
    assert [view.shape for view in views] == [(60, 60, 3)] + 4 * [(40, 40, 3)]
    pixels = data.preprocess([*views, photo[:28, :28, 0]], 42)
    assert pixels.shape == (6, 3, 42, 42) and pixels.dtype == np.float32
    grey = data.preprocess([np.full((28, 28), 255, np.uint8)], 14)[0]
    np.testing.assert_allclose(grey[:, 0, 0], (1 - data.MEAN) / data.DEVIATION, rtol=1e-6)


def test_peers_report_compares_equal_fidelity() -> None:
    """A peer or an artifact below the floor does not count, however fast it is."""
    timings = [
        _row(name, seconds, 4.0 / seconds)
        for name, seconds in (("torch", 4.0), ("int8", 1.0), ("tokopt", 3.0), ("tokopt `tome`", 0.5))
    ]
    quality = {
        "torch": {"cosine": 1.0},
        "int8": {"cosine": 0.98},
        "tokopt": {"cosine": 0.999},
        "tokopt `tome`": {"cosine": 0.975},
    }
    assert fastest_ratio(timings, quality, 0.99) == ("tokopt", "torch", 4.0 / 3.0)
    assert fastest_ratio(timings, quality, 0.97) == ("tokopt `tome`", "int8", 2.0)
    assert fastest_ratio(timings, quality, 1.01) is None
    assert floors(timings, quality) == [0.98, 0.99, 0.97]
    assert floors(timings[2:], quality) == [0.99, 0.97]


def _row(name: str, seconds: float, speed: float) -> dict[str, Any]:
    quartiles = (speed, speed)
    return {
        "name": name,
        "median": seconds,
        "minimum": seconds,
        "ratio_median": speed,
        "ratio_quartiles": quartiles,
    }


def test_peers_report_is_written_from_what_there_is() -> None:
    """Nothing measured, no section; an engine that did not start is named with its reason."""
    rows = [
        _row(name, seconds, speed)
        for name, seconds, speed in (("llama.cpp", 0.08, 1.0), ("tokopt keep_grid", 0.04, 2.0))
    ]
    text = peers_markdown(
        {
            "machine": {},
            "language/decode/64": rows,
            "language/missing": {"genai": "ImportError: no module"},
            "language/quality": {"tokopt keep_grid": {"KL": 0.0041}, "llama.cpp": {"reason": "it fails"}},
        }
    )
    assert "DINOv2" not in text and "Left out: genai: ImportError: no module" in text
    assert "| llama.cpp | – | 100.0 | 100.0 | 10.0 | 1.00 (1.00 to 1.00) |" in text
    assert "| tokopt keep_grid | 0.004 | 200.0 | 200.0 | 5.0 | 2.00 (2.00 to 2.00) |" in text
    assert "Against the fastest peer (llama.cpp): tokopt keep_grid 2.00x." in text
    assert "KL at most" not in text  # llama.cpp's was not measured
    judged = {"tokopt keep_grid": {"KL": 0.0041}, "llama.cpp": {"KL": 0.02}}
    text = peers_markdown({"machine": {}, "language/decode/64": rows, "language/quality": judged})
    assert "- KL at most 0.1: tokopt keep_grid is 2.00x as fast as llama.cpp." in text
    assert "KL at most 0.01:" not in text


def test_what_the_quantizers_store_passes_verify(tmp_path: Path) -> None:
    """Every method that ``benchmarks.quantize`` measures, each on a linear of its own of real weights."""
    passes = [
        step for model in MODELS.values() for text in model.values() for step in tokopt.parse(text).passes
    ]
    methods = {str(step): step for step in passes if isinstance(step, Quantization)}
    bundle = tokopt.capture_lm(inputs() / "smollm2")
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    linears = [f"*layers.{layer}.{name}" for layer in (0, 1) for name in names]
    assert 10 < len(methods) <= len(linears)
    kept_first = sorted(
        methods.values(), key=lambda step: step.name != "keep_grid"
    )  # others scale what it keeps
    pipeline = [replace(step, only=(linear,)) for step, linear in zip(kept_first, linears, strict=False)]
    assert bundle.tokenizer is not None
    ids = Tokenizer.from_str(bundle.tokenizer).encode(library_text()[:2000]).ids
    made = tokopt.optimize(bundle, [*pipeline, Int8KV()], calibration=[ids])
    assert all(step.matches for step in made.history)
    assert tokopt.verify(tokopt.export(made, tmp_path / "quantized.tokopt")).ok


@needs_library
def test_every_kernel_that_is_timed_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each table has a line for every instruction set, whose nodes the kernels accept."""
    sizes = {"SHAPES": ((1, 1024), (2, 16)), "LAYERS": 1, "ENCODERS": {"two images": (2, 9, 6, 64)}}
    for name, small in sizes.items():
        monkeypatch.setattr(cpu_attention, name, small)

    def called(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        for call in calls.values():
            call()
        return dict.fromkeys(calls, 1.0)

    for table in (cpu_attention.attending, cpu_attention.encoders_attending):
        lines = list(table(called, 1))
        assert all(any(f"`{isa}`" in line for line in lines) for isa in cpu_attention.vectors())


ECHO = """
import sys
from benchmarks.worker import answer_all

def answer(question):
    print("a message of the engine")
    return {"twice": 2 * question if question else 1.0} if question != "end" else sys.exit(3)

answer_all(answer)
"""


def test_engines_answer_from_processes_of_their_own(tmp_path: Path) -> None:
    """What else they print is no answer, they take turns, and one that ends is named with its status."""
    (tmp_path / "echo.py").write_text(ECHO)
    paths = os.pathsep.join([str(tmp_path), str(Path(benchmarks.__file__).parents[1])])

    def echo(name: str) -> Worker:
        return Worker(name, "echo", environment={**os.environ, "PYTHONPATH": paths})

    answers = medians([partial(echo, "one"), partial(echo, "other")], 3)
    assert answers == {"one": {"twice": 1.0}, "other": {"twice": 1.0}}
    with closing(echo("mine")) as worker:
        assert worker.ask([1, "a"]) == {"twice": [1, "a", 1, "a"]}
        with pytest.raises(RuntimeError, match="the engine mine ended with status 3"):
            worker.ask("end")
