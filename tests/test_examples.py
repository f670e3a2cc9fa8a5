"""Every example runs as a script on real input and prints what it promises."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import tokopt
from benchmarks.kv.quality import documentation
from examples import early_exit, quantize, tune
from examples.data import gemma3, smollm2
from examples.self_speculating import PROMPT
from examples.tune import TEXTS, TOKENS, library_text
from tests import node
from tests.commands import execute, furnish, short_dinov2
from tests.shared import once
from tokopt.cli import main as tokopt_command
from tokopt.errors import InputError
from tokopt.runtime import LanguageModel, load

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("skimage", "sklearn", "transformers")),
    reason="real photographs and weights need the extra tokopt[bench]",
)


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def verified(*artifacts: Path) -> bool:
    """Whether ``tokopt verify`` is content with each of the artifacts, of which there is at least one."""
    return bool(artifacts) and all(tokopt.verify(artifact).ok for artifact in artifacts)


# --- a language model with real weights: one artifact for all ------------------------------------------------

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "import numpy as",
)


def answered(folder: Path) -> None:
    """Run ``examples/generate.py`` in ``folder``: its artifact, and in ``printed.txt`` what it says."""
    command = (sys.executable, "examples/generate.py", "What is gravity?", "--max-tokens", "40")
    printed = run(*command, "--output", folder)
    (folder / "printed.txt").write_text(printed)


@pytest.fixture(scope="session")
def answer() -> tuple[str, Path]:
    """What ``examples/generate.py`` prints, and the artifact it made."""
    folder = once("smollm2", answered)
    return (folder / "printed.txt").read_text(), folder / "smollm2.tokopt"


@pytest.fixture(scope="session")
def language_model(answer: tuple[str, Path]) -> LanguageModel:
    model = load(answer[1], threads=1)
    assert isinstance(model, LanguageModel)
    return model


def test_generate_streams_a_chat_answer_without_torch(
    answer: tuple[str, Path], language_model: LanguageModel
) -> None:
    printed = answer[0]
    ids = language_model.chat_prompt([{"role": "user", "content": "What is gravity?"}])
    text = "".join(language_model.stream(ids, max_tokens=40))
    assert text.strip() and text.strip() in printed
    assert "torch was not imported" in printed
    assert verified(answer[1])


def test_the_command_says_what_the_library_says(
    answer: tuple[str, Path], language_model: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tokopt_command(["generate", str(answer[1]), PROMPTS[0], "--max-tokens", "20", "--stream"]) == 0
    wanted = "".join(language_model.stream(PROMPTS[0], max_tokens=20))
    assert capsys.readouterr().out.rstrip("\n") == wanted.rstrip("\n")


VOCABULARY = 32768


def likeliest(reference: Any, prompt: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """The token that transformers finds likeliest after the prompt and after each of ``tokens`` but the last.

    A text is a greedy continuation if and only if these are its tokens.
    """
    with torch.no_grad():
        logits = reference(input_ids=torch.tensor([[*prompt, *tokens[:-1]]])).logits
    return logits[0, len(prompt) - 1 :].argmax(-1).tolist()


def test_greedy_equals_transformers_on_real_weights(language_model: LanguageModel) -> None:
    """100 tokens, and a batch of unequal prompts equals one by one."""
    reference: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    together = language_model.generate(PROMPTS, max_tokens=100)
    for text, got in zip(PROMPTS, together, strict=True):
        ids = language_model.tokenizer.encode(text)
        assert list(got.tokens) == likeliest(reference, ids, got.tokens)
        assert len(got.tokens) == 100 or got.tokens[-1] in language_model.settings.eos
        alone = language_model.generate(text, max_tokens=20)
        wanted = reference.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :]
        assert list(alone.tokens) == wanted.tolist() == list(got.tokens[:20])


def test_greedy_equals_transformers_on_sliding_windows(tmp_path: Path) -> None:
    """Gemma 3 across the end of its window.

    Of its layers the first six, of which five see 512 positions and one all, and an eighth of its vocabulary.
    """
    reference: Any = AutoModelForCausalLM.from_pretrained(gemma3(), dtype=torch.float32)
    reference.resize_token_embeddings(VOCABULARY)
    reference.model.layers = reference.model.layers[:6]
    reference.config.num_hidden_layers = 6
    assert set(reference.config.layer_types[:6]) == {"sliding_attention", "full_attention"}
    tokopt.export(tokopt.capture_lm(reference), tmp_path / "gemma3.tokopt")
    model = load(tmp_path / "gemma3.tokopt", threads=1)
    assert isinstance(model, LanguageModel)
    ids = Tokenizer.from_file(str(gemma3() / "tokenizer.json")).encode(documentation()[:8000]).ids
    ids = [token for token in ids if token < VOCABULARY][:500]
    got = model.generate(ids, max_tokens=40)
    assert list(got.tokens) == likeliest(reference, ids, got.tokens)
    assert len(ids) < reference.config.sliding_window < len(ids) + len(got.tokens)


def test_node_generates_the_same_tokens(answer: tuple[str, Path], language_model: LanguageModel) -> None:
    """Following the manifest alone, in another language and another build of ONNX Runtime."""
    ids = language_model.tokenizer.encode(PROMPTS[1])
    wanted = language_model.generate(ids, max_tokens=32).tokens
    assert node.generate(answer[1], ids, 32) == list(wanted)
    assert len(wanted) == 32


def test_an_artifact_that_speculates_in_bare_onnx_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two hosts that know nothing of tokopt, and the command: the same text with and without, in fewer calls."""
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    for command in (
        "optimize ./smollm2 speculate -o speculating.tokopt",
        "export speculating.tokopt -o fast.tokopt",
    ):
        execute(f"tokopt {command}")  # as docs/speculation.md does
    path, count = tmp_path / "fast.tokopt", 40
    script = (sys.executable, "-X", "importtime", ROOT / "examples" / "self_speculating.py", path)
    done = subprocess.run(
        [*script, "--max-tokens", str(count)], capture_output=True, text=True, timeout=600, check=True
    )
    assert not re.search(r"\| +(tokopt|torch)$", done.stderr, re.MULTILINE) and "| onnxruntime" in done.stderr
    calls = [int(found) for found in re.findall(rf"{count} tokens in (\d+) calls", done.stdout)]
    assert "the same text" in done.stdout and calls[1] < calls[0] == count - 1

    model = load(path, threads=1)
    assert isinstance(model, LanguageModel)
    ids = model.tokenizer.encode(PROMPT)
    tokens, line = node.compare(path, ids, count)
    assert tokens == list(model.generate(ids, max_tokens=count).tokens)
    assert line.startswith("the same text with and without speculation")

    capsys.readouterr()
    checked = ["generate", str(path), PROMPT, "--check-lossless", "--max-tokens", str(count), "--json"]
    assert tokopt_command(checked) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lossless"] and found["with"]["tokens_per_call"] > 1 == found["without"]["tokens_per_call"]
    assert model.tokenizer.decode(tokens) == found["text"]
    assert tokopt_command(["generate", str(path), PROMPT, "--max-tokens", "12"]) == 0
    assert "tokens per call" in capsys.readouterr().err


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
    with pytest.raises(InputError, match=r"slots for a batch of 1000 takes .* GiB"):
        language_model.generate([(1,) * 8000] * 1000)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, and it would be compiled")
def test_torch_tensorrt_says_what_it_takes(tmp_path: Path) -> None:
    out = run(sys.executable, ROOT / "examples" / "torch_tensorrt.py", "--layers", "2", cwd=tmp_path)
    assert "tome{r=8}: 2 blocks changed" in out and "PyTorch finds, and it finds none" in out
    assert out.endswith("it takes a GPU, PyTorch's CUDA build, and: pip install 'tokopt[torch-tensorrt]'\n")


def test_texts_for_tuning_hold_its_windows() -> None:
    """The language model itself takes half an hour: ``python examples/tune.py smollm2``."""
    words = library_text().split()
    assert len(words) > TEXTS * TOKENS / 2 and "argparse" in " ".join(words)


# --- a vision model with real weights -----------------------------------------------------------------------


class Main(Protocol):
    def __call__(self, example: ModuleType, *words: str | Path) -> str: ...


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Main:
    """Run the ``main`` of an example in this process, which has imported torch already: what it prints.

    And what the processes print that it starts.
    """

    def run(example: ModuleType, *words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [str(example.__file__), *map(str, words)])
        example.main()
        return capfd.readouterr().out

    return run


@REAL_DATA
def test_vision_merges_a_real_dinov2_and_draws_it(tmp_path: Path) -> None:
    script = ROOT / "examples" / "vision.py"
    out = run(sys.executable, script, "--rounds", "2", "--output", tmp_path, cwd=tmp_path)
    assert "12 blocks reduced" in out and "times as fast" in out
    cosine = float(out.split("cosine to the unmerged model: mean ")[1].split(",")[0])
    assert cosine > 0.95
    assert (tmp_path / "tokens.png").stat().st_size > 10_000
    assert verified(tmp_path / "dinov2.tokopt", tmp_path / "dinov2-merged.tokopt")


@REAL_DATA
def test_quantizing_a_real_dinov2(main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Static 8 bits keep the features and a quarter of the bytes, of its first layers; the others are like them."""
    monkeypatch.setattr(quantize, "dinov2_small", short_dinov2)
    pipeline = "smoothquant,int8{activations=static}"
    out = main(quantize, pipeline, "--size", "112", "--rounds", "2", "--output", tmp_path)
    table = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in out.splitlines()[-2:]}
    full, small = table["float32"], table[pipeline]
    assert full[1:3] == [1, 1] and small[1] > 0.99
    assert small[0] < 0.3 * full[0]
    assert verified(tmp_path / "dinov2-0.tokopt", tmp_path / "dinov2-1.tokopt")


@REAL_DATA
def test_tuning_finds_a_pipeline_for_a_real_dinov2(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small image, and the first layers: what is measured is real, what wins is the machine's affair."""
    monkeypatch.setattr(tune, "dinov2_small", short_dinov2)
    command = (tune, "--size", "112", "--folder", tmp_path / "tuned")
    out = main(*command, "--minutes", "0.05")
    assert "tome{target=0.5}" in out and "best:" in out
    assert {"trials.json", "pipeline.txt"} <= {p.name for p in (tmp_path / "tuned").iterdir()}
    assert verified(tmp_path / "tuned" / "original.tokopt", *(tmp_path / "tuned").glob("best.tokopt"))
    assert "optimizing" not in main(*command, "--minutes", "0")  # it goes on


@REAL_DATA
def test_photographs_leave_a_real_dinov2_in_bare_onnx_runtime(main: Main, tmp_path: Path) -> None:
    """Small images; each leaves at an exit, or at the end, of one file that no torch and no tokopt has opened."""
    exits = ("--after", "4,7,9", "--tolerance", "0.2", "--size", "112", "--views", "120")
    out = main(early_exit, *exits, "--output", tmp_path)
    left = re.findall(r"^(\w+) +left after +(\d+) of 12 blocks +[\d.]+ ms$", out, re.MULTILINE)
    assert len(left) == 8 and {int(depth) for _, depth in left} <= {7, 9, 12}
    assert "of 60 inputs" in out and "with confidence 0.95 it is at most 0.2 on such inputs" in out
    assert "torch and tokopt were not imported" in out
    assert (tmp_path / "depths.png").stat().st_size > 10_000
    assert verified(tmp_path / "dinov2-exits.tokopt")
