"""The benchmark's own arithmetic: classifier, ratios, pipelines, and errors for data that is not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("psutil")
pytest.importorskip("rich")

import tokopt
from benchmarks.peers.report import fastest_ratio, floors
from benchmarks.peers.report import markdown as peers_markdown
from benchmarks.quality import cosines, predict
from benchmarks.timing import _timing
from benchmarks.vision import FULL, QUICK, Scale, with_options
from examples import data
from tokopt.errors import MissingDependencyError


def test_neighbours_classify_separate_clusters_perfectly() -> None:
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((10, 32))
    labels = np.arange(400) % 10

    def noisy() -> np.ndarray:
        return (centres[labels] + 0.1 * generator.standard_normal((400, 32))).astype(np.float32)

    assert (predict(noisy(), labels, noisy()) == labels).all()


def test_cosine_ignores_scale() -> None:
    x = np.random.default_rng(0).standard_normal((7, 12)).astype(np.float32)
    np.testing.assert_allclose(cosines(3 * x, x), 1.0, rtol=1e-6)
    np.testing.assert_allclose(cosines(-x, x), -1.0, rtol=1e-6)


def test_a_ratio_compares_turns_of_the_same_round() -> None:
    """A machine that is twice as slow in one round changes no ratio."""
    control, variant = [[2.0, 2.2], [4.0, 4.4]], [[1.0, 1.1], [2.0, 2.2]]
    timing = _timing("variant", control, variant, rejected=1)
    assert timing.ratio_median == pytest.approx(2.0)
    assert timing.ratio_quartiles == pytest.approx((2.0, 2.0))
    assert (timing.minimum, timing.rounds, timing.rejected) == (1.0, 2, 1)


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
        {"name": name, "median": seconds, "minimum": seconds}
        for name, seconds in (("torch", 4.0), ("int8", 1.0), ("tokopt", 3.0), ("tokopt `tome`", 0.5))
    ]
    quality = {
        "torch": {"cosine": 1.0},
        "int8": {"cosine": 0.98},
        "tokopt": {"cosine": 0.999},
        "tokopt `tome`": {"cosine": 0.975},
    }
    assert fastest_ratio(timings, quality, 0.99) == ("tokopt", "torch", 4 / 3)
    assert fastest_ratio(timings, quality, 0.97) == ("tokopt `tome`", "int8", 2.0)
    assert fastest_ratio(timings, quality, 1.01) is None
    assert floors(timings, quality) == [0.98, 0.99, 0.97]
    assert floors(timings[2:], quality) == [0.99, 0.97]


def test_peers_report_is_written_from_what_there_is() -> None:
    """Nothing measured, no section; an engine that did not start is named with its reason."""
    rows = [
        {"name": name, "median": seconds, "minimum": seconds}
        for name, seconds in (("llama.cpp", 0.08), ("tokopt keep_grid", 0.04))
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
    assert "| llama.cpp | – | 100.0 | 100.0 | 10.0 |" in text
    assert "| tokopt keep_grid | 0.004 | 200.0 | 200.0 | 5.0 |" in text
    assert "Against the fastest peer (llama.cpp): tokopt keep_grid 2.00x." in text
    assert "KL at most" not in text  # llama.cpp's was not measured
    judged = {"tokopt keep_grid": {"KL": 0.0041}, "llama.cpp": {"KL": 0.02}}
    text = peers_markdown({"machine": {}, "language/decode/64": rows, "language/quality": judged})
    assert "- KL at most 0.1: tokopt keep_grid is 2.00x as fast as llama.cpp." in text
    assert "KL at most 0.01:" not in text
