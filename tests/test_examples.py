"""Every example runs as a script on real input and prints what it promises."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tokopt
from benchmarks.kv.quality import documentation
from examples.data import gemma3, smollm2
from examples.tune import TEXTS, TOKENS, library_text
from tests import node
from tokopt.cli import main
from tokopt.errors import InputError
from tokopt.runtime import Generated, LanguageModel, load

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = all(importlib.util.find_spec(name) for name in ("skimage", "sklearn", "transformers"))


@pytest.mark.skipif(not REAL_DATA, reason="real photographs and weights need the extra tokopt[bench]")
def test_vision_merges_a_real_dinov2_and_draws_it(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "examples" / "vision.py"),
        "--rounds",
        "2",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "12 blocks reduced" in done.stdout and "times as fast" in done.stdout
    cosine = float(done.stdout.split("cosine to the unmerged model: mean ")[1].split(",")[0])
    assert cosine > 0.95
    assert (tmp_path / "tokens.png").stat().st_size > 10_000
    assert (tmp_path / "dinov2-merged.tokopt" / "manifest.json").exists()


@pytest.mark.skipif(not REAL_DATA, reason="real photographs and weights need the extra tokopt[bench]")
def test_quantizing_a_real_dinov2(tmp_path: Path) -> None:
    """Static 8 bits keep the features and a quarter of the bytes."""
    command = [sys.executable, ROOT / "examples" / "quantize.py", "smoothquant,int8{activations=static}"]
    out = run(*command, "--size", "112", "--rounds", "2", "--output", tmp_path, cwd=tmp_path)
    table = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in out.splitlines()[-2:]}
    full, small = table["float32"], table["smoothquant,int8{activations=static}"]
    assert full[1:3] == [1, 1] and small[1] > 0.99
    assert small[0] < 0.3 * full[0]


# --- a language model with real weights: one artifact for all ------------------------------------------------

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "import numpy as",
)


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# Of the session: a module's fixture is made again when a worker runs another module in between.
@pytest.fixture(scope="session")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """What ``examples/generate.py`` prints, and the artifact it made."""
    folder = tmp_path_factory.mktemp("smollm2")
    printed = run(
        sys.executable, "examples/generate.py", "What is gravity?", "--max-tokens", "40", "--output", folder
    )
    yield printed, folder / "smollm2.tokopt"


@pytest.fixture(scope="session")
def language_model(answer: tuple[str, Path]) -> LanguageModel:
    model = load(answer[1], threads=1)
    assert isinstance(model, LanguageModel)
    return model


def test_generate_streams_a_chat_answer_without_torch(
    answer: tuple[str, Path], language_model: LanguageModel
) -> None:
    printed, _ = answer
    ids = language_model.chat_prompt([{"role": "user", "content": "What is gravity?"}])
    text = "".join(language_model.stream(ids, max_tokens=40))
    assert text.strip() and text.strip() in printed
    assert "torch was not imported" in printed


def test_the_command_says_what_the_library_says(
    answer: tuple[str, Path], language_model: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(answer[1]), PROMPTS[0], "--max-tokens", "20", "--stream"]) == 0
    wanted = "".join(language_model.stream(PROMPTS[0], max_tokens=20))
    assert capsys.readouterr().out.rstrip("\n") == wanted.rstrip("\n")


def test_greedy_equals_transformers_on_real_weights(language_model: LanguageModel) -> None:
    """200 tokens, and a batch of unequal prompts equals one by one."""
    import torch
    from transformers import AutoModelForCausalLM

    reference: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    together = language_model.generate(PROMPTS, max_tokens=200)
    for text, got in zip(PROMPTS, together, strict=True):
        ids = language_model.tokenizer.encode(text)
        wanted = reference.generate(torch.tensor([ids]), max_new_tokens=200, do_sample=False)[0, len(ids) :]
        assert list(got.tokens) == wanted.tolist()
        alone = language_model.generate(text, max_tokens=200)
        assert isinstance(alone, Generated) and alone.tokens == got.tokens


def test_greedy_equals_transformers_on_sliding_windows(tmp_path: Path) -> None:
    """Gemma 3, whose layers see 512 positions or all: 200 tokens across the end of the window."""
    import torch
    from transformers import AutoModelForCausalLM

    tokopt.export(tokopt.capture_lm(gemma3()), tmp_path / "gemma3.tokopt")
    model = load(tmp_path / "gemma3.tokopt", threads=1)
    assert isinstance(model, LanguageModel)
    ids = model.tokenizer.encode(documentation())[:450]
    got = model.generate(ids, max_tokens=200)
    reference: Any = AutoModelForCausalLM.from_pretrained(gemma3(), dtype=torch.float32)
    wanted = reference.generate(torch.tensor([ids]), max_new_tokens=200, do_sample=False)[0, len(ids) :]
    assert isinstance(got, Generated) and list(got.tokens) == wanted.tolist()
    assert len(ids) + len(got.tokens) > reference.config.sliding_window


def test_node_generates_the_same_tokens(answer: tuple[str, Path], language_model: LanguageModel) -> None:
    """Following the manifest alone, in another language and another build of ONNX Runtime."""
    ids = language_model.tokenizer.encode(PROMPTS[1])
    wanted = language_model.generate(ids, max_tokens=32).tokens
    assert node.generate(answer[1], ids, 32) == list(wanted)
    assert len(wanted) == 32


def test_bad_prompts_are_refused_before_anything_runs(language_model: LanguageModel) -> None:
    context = language_model.settings.context
    for prompt, reason in {
        "": "the prompt is empty",
        (0, 49152): "token id 49152 of the prompt is outside the vocabulary of 49152",
        (-1,): "token id -1 of the prompt is outside",
        (1,) * (context + 1): f"has {context + 1} tokens and the model's context holds {context}",
    }.items():
        with pytest.raises(InputError, match=reason):
            language_model.generate(prompt)
    with pytest.raises(InputError, match="there is no prompt"):
        language_model.generate([])
    with pytest.raises(InputError, match=r"a cache of \d+ slots for a batch of \d+ takes .* GiB"):
        language_model.generate([(1,) * 8000] * 1000)


def test_texts_for_tuning_hold_its_windows() -> None:
    """The language model itself takes half an hour: ``python examples/tune.py smollm2``."""
    words = library_text().split()
    assert len(words) > TEXTS * TOKENS / 2 and "argparse" in " ".join(words)


@pytest.mark.skipif(not REAL_DATA, reason="real photographs and weights need the extra tokopt[bench]")
def test_tuning_finds_a_pipeline_for_a_real_dinov2(tmp_path: Path) -> None:
    """A small image: what is measured is real, what wins is the machine's affair."""
    script = ROOT / "examples" / "tune.py"
    command = (sys.executable, script, "--size", "112", "--minutes", "0.2", "--folder", tmp_path / "tuned")
    out = run(*command, cwd=tmp_path)
    assert "tome{target=0.5}" in out and "best:" in out
    assert {"original.tokopt", "trials.json", "pipeline.txt"} <= {
        p.name for p in (tmp_path / "tuned").iterdir()
    }
    assert "optimizing" not in run(*command[:-4], "--minutes", "0", *command[-2:], cwd=tmp_path)  # it goes on
