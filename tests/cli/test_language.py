"""The command on language models: from a Hugging Face folder to text, with and without eviction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.cli.command import answer, complaint
from tests.zoo.decoders import DECODERS, GROUPED, VOCABULARY, _hugging_face
from tokopt.cli import main
from tokopt.cli.screen import Screen
from tokopt.cli.verbs.generate import check_lossless
from tokopt.errors import InputError
from tokopt.runtime import LanguageModel, Sampling, load
from tokopt.runtime.generate import UNCHANGED, Generated
from tokopt.runtime.speculation.lossless import Lossless


def tokenizer() -> Library:
    """One token per letter."""
    letters = [chr(33 + i) for i in range(VOCABULARY - 1)]
    library: Any = Library(models.WordLevel({letter: i for i, letter in enumerate([*letters, "?!"])}, "?!"))
    library.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    library.decoder = decoders.Fuse()
    return library


# Of the session: a module's fixture is made again when a worker runs another module in between.
@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported artifacts of one model: ``full`` and ``small``, whose cache is bounded."""
    folder = tmp_path_factory.mktemp("language")
    model: Any = _hugging_face("Llama", **{**GROUPED, "num_hidden_layers": 1}, tie_word_embeddings=True)()
    model.save_pretrained(folder / "llama")
    library = tokenizer()
    library.enable_truncation(max_length=4)  # which prompts are not read with
    wrapped = PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    wrapped.save_pretrained(folder / "llama")
    steps = [
        ("capture", folder / "llama", "-o", folder / "full.bundle.tokopt"),
        (
            "optimize",
            folder / "full.bundle.tokopt",
            "h2o{budget=16 sinks=2 recent=4 every=4}",
            "-o",
            folder / "b",
        ),
        ("export", folder / "full.bundle.tokopt", "-o", folder / "full.tokopt"),
        ("export", folder / "b", "-o", folder / "small.tokopt"),
        ("optimize", folder / "full.bundle.tokopt", "verify", "-o", folder / "v"),
        ("export", folder / "v", "-o", folder / "verifying.tokopt"),
    ]
    for step in steps:
        assert main([*map(str, step), "--json"]) == 0
    return folder


def test_generate_says_what_it_took(capsys: pytest.CaptureFixture[str], artifacts: Path) -> None:
    prompt = "abcdefgh" * 5
    full = answer(capsys, "generate", artifacts / "full.tokopt", prompt, "--max-tokens", 30)
    small = answer(capsys, "generate", artifacts / "small.tokopt", prompt, "--max-tokens", 30)
    assert (full["prompt_tokens"], full["new_tokens"]) == (40, 30)
    assert small["cache_slots"] == 20 < full["cache_slots"]
    assert len(full["text"]) == len(small["text"]) == 30


def test_conversations_are_those_of_transformers(artifacts: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    wanted = AutoTokenizer.from_pretrained(artifacts / "llama").apply_chat_template(
        messages, return_dict=False
    )
    assert wanted[0] == VOCABULARY  # <s> is behind all letters; config.json says 1
    for name in ("full.tokopt", "small.tokopt"):
        model = load(artifacts / name)
        assert isinstance(model, LanguageModel) and model.chat_prompt(messages) == wanted


def test_stream_prints_the_same_text(capsys: pytest.CaptureFixture[str], artifacts: Path) -> None:
    command = ["generate", str(artifacts / "full.tokopt"), "hello", "--max-tokens", "12"]
    assert main(command) == 0
    whole = capsys.readouterr().out
    assert main([*command, "--stream"]) == 0
    assert capsys.readouterr().out == whole and len(whole.strip()) == 12


def test_quantize_with_text_and_compare(
    capsys: pytest.CaptureFixture[str], artifacts: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("abcdefghij" * 70)
    text, given, made = tmp_path / "text.txt", artifacts / "full.bundle.tokopt", tmp_path / "w4"
    done = answer(capsys, "optimize", given, "gptq{group=16}", "-o", made, "--calibrate", text)
    assert done["passes"][0]["matches"] == 8
    found = answer(capsys, "compare", given, made, text)
    assert 0 < found["KL divergence"] < 1 and found["perplexity before"] > 1
    assert answer(capsys, "compare", given, given, text)["KL divergence"] == 0


def test_seeds_repeat_a_draw(capsys: pytest.CaptureFixture[str], artifacts: Path) -> None:
    def draw(seed: int) -> str:
        command = ("generate", artifacts / "full.tokopt", "hello", "--temperature", 2, "--seed", seed)
        return answer(capsys, *command)["text"]

    assert draw(1) == draw(1) != draw(2)


def test_several_texts_and_what_their_tokens_are_worth(
    capsys: pytest.CaptureFixture[str], artifacts: Path
) -> None:
    """Texts of one prompt with the tokens' log-probabilities, for programs and for people."""
    command = ("generate", artifacts / "full.tokopt", "hello", "--max-tokens", 4, "--seed", 1)
    drawn = (*command, "--temperature", 2, "--samples", 3, "--logprobs", 2)
    texts = answer(capsys, *drawn)["texts"]
    assert len({text["text"] for text in texts}) == 3
    for text in texts:
        assert [len(top) for top in text["top_logprobs"]] == [2] * 4
        assert len(text["logprobs"]) == len(text["tokens"]) == 4 and text["finish"] == "length"
    assert main(list(map(str, drawn))) == 0
    shown = capsys.readouterr().out
    assert "--- 3 of 3: length" in shown and all(text["text"] in shown for text in texts)
    assert "log-probability" in shown and f"{texts[0]['logprobs'][0]:.4g}"[:5] in shown
    assert "leave it or --samples out" in complaint(capsys, 2, *command, "--samples", 2, "--stream")


@pytest.mark.parametrize("option", ["--json-schema", "--grammar"])
def test_a_grammar_is_read_from_its_file(
    capsys: pytest.CaptureFixture[str], artifacts: Path, tmp_path: Path, option: str
) -> None:
    """These models have no end token, which a sentence says."""
    pytest.importorskip("llguidance")
    command = ("generate", artifacts / "full.tokopt", "hello")
    assert "there is no file" in complaint(capsys, 2, *command, option, tmp_path / "nope")
    (tmp_path / "file").write_text('{"type": "integer"}' if option == "--json-schema" else "start: /a/")
    assert "the model has none" in complaint(capsys, 2, *command, option, tmp_path / "file")
    if option == "--json-schema":
        (tmp_path / "file").write_text('{"type": ')
        assert f"{tmp_path / 'file'}: the schema is no JSON" in complaint(
            capsys, 2, *command, option, tmp_path / "file"
        )


def test_a_drafter_of_the_host_changes_no_token(
    capsys: pytest.CaptureFixture[str], artifacts: Path, tmp_path: Path
) -> None:
    """One that knows the text beforehand, which is then written in fewer calls; and what lossy rules say of theirs."""
    command = ("generate", artifacts / "verifying.tokopt", "abcdefgh" * 3, "--max-tokens", 30)
    plain = answer(capsys, *command)
    (tmp_path / "known.txt").write_text(plain["text"])
    drafting = ("--drafter", "suffix", "--corpus", tmp_path / "known.txt")
    found = answer(capsys, *command, *drafting)
    assert found["text"] == plain["text"] and found["lossless"] and found["drafting_seconds"] > 0
    checked = answer(capsys, *command, *drafting, "--check-lossless")
    assert checked["lossless"] and checked["with"]["decode_calls"] < checked["without"]["decode_calls"] == 29
    assert not answer(capsys, *command, *drafting, "--accept", "typical")["lossless"]


@dataclass
class Unfaithful:
    """A model that speculates, whose text differs where it proposes something: by a token, or by its end."""

    proposed: tuple[int, ...]
    nodes: int = 8
    lossless: Lossless = UNCHANGED
    path: str = "here"

    def generate(self, *_: object, nodes: int, **__: object) -> Generated:
        return Generated(self.proposed if nodes > 1 else (5, 3, 8), "", "length")


@pytest.mark.parametrize(
    ("proposed", "code", "said"),
    [
        ((5, 3, 8), 0, "the same 3 tokens"),
        ((5, 4, 8), 1, "from new token 1 on: 4 and 3,"),
        ((5, 3), 1, "from new token 2 on: the end and 8,"),
    ],
)
def test_a_text_that_speculation_changes_is_found(
    capsys: pytest.CaptureFixture[str], proposed: tuple[int, ...], code: int, said: str
) -> None:
    model: Any = Unfaithful(proposed)
    assert check_lossless(model, "a", Sampling(), {"max_tokens": 3}, Screen(False)) == code
    assert said in capsys.readouterr().out


def test_a_text_that_a_rule_changes_is_not_compared() -> None:
    model: Any = Unfaithful((5, 3), lossless=Lossless(False, "the rule 'typical' is lossy"))
    with pytest.raises(InputError, match="does, since the rule 'typical' is lossy; make it without"):
        check_lossless(model, "a", Sampling(), {"max_tokens": 3}, Screen(False))


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_other_verbs_know_language_models(
    capsys: pytest.CaptureFixture[str], artifacts: Path, verb: str
) -> None:
    for name in ("full", "small"):
        assert answer(capsys, verb, artifacts / f"{name}.tokopt")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    {
        ("generate", "full.tokopt", ""): "the prompt is empty",
        ("generate", "full.tokopt", "a" * 400): "the prompt has 400 tokens and the model's context holds 320",
        ("generate", "full.tokopt", "a", "--temperature", "-1"): "temperature",
        ("generate", "full.tokopt", "a", "--chat"): "token id 97 of the prompt is outside",
        ("generate", "nowhere.tokopt", "a"): "make one with: tokopt export",
        (
            "generate",
            "full.tokopt",
            "a",
            "--check-lossless",
        ): "does not speculate by itself, so there is nothing to check; name a --drafter",
        (
            "generate",
            "full.tokopt",
            "a",
            "--drafter",
            "suffix",
        ): "tokopt optimize MODEL verify -o verifying.tokopt",
        (
            *("generate", "verifying.tokopt", "a", "--drafter", "suffix", "--samples", "2"),
            "--check-lossless",
        ): "leave it or --samples out",
        ("generate", "full.tokopt", "a", "--accept", "chain"): "--accept belongs to --drafter",
        ("generate", "full.tokopt", "a", "--corpus", "x"): "--corpus belongs to --drafter",
        ("generate", "verifying.tokopt", "a", "--drafter", "prompt"): "choose from suffix, prompt_lookup",
        (
            "generate",
            "verifying.tokopt",
            "a",
            "--drafter",
            "suffix",
            "--accept",
            "none",
        ): "choose from same_text",
        (
            "generate",
            "verifying.tokopt",
            "a",
            "--drafter",
            "lookahead",
            "--corpus",
            "no.txt",
        ): "there is no file no.txt",
        (
            "generate",
            "verifying.tokopt",
            "a",
            "--drafter",
            "lookahead",
            "--accept",
            "k_seq",
        ): "take a drafter that draws",
        (
            *("generate", "verifying.tokopt", "a", "--drafter", "suffix", "--accept", "typical"),
            "--check-lossless",
        ): "writes other texts than plain decoding does",
        ("run", "full.tokopt"): "tokopt generate",
        ("export", "small.tokopt", "-o", "x", "--target", "triton"): "step, compact",
        ("export", "full.tokopt", "-o", "x", "--slots", "9"): "--slots belongs to --target triton",
        (
            "optimize",
            "full.bundle.tokopt",
            "gptq",
            "-o",
            "x",
            "--calibrate",
            "photo.png",
        ): "photo.png is no text (.txt, .md, .rst), of which the samples",
        (
            "optimize",
            "full.bundle.tokopt",
            "gptq",
            "-o",
            "x",
            "--calibrate",
            "no.txt",
        ): "there is no file no.txt",
    }.items(),
)
def test_bad_input_is_one_sentence(
    capsys: pytest.CaptureFixture[str], artifacts: Path, argv: tuple[str, ...], sentence: str
) -> None:
    verb, name, *rest = argv
    assert sentence in complaint(capsys, 2, verb, artifacts / name, *rest)


def test_estimate_predicts_time_and_memory(capsys: pytest.CaptureFixture[str], artifacts: Path) -> None:
    """The time depends on the machine; what a bounded cache and 4-bit weights save of memory does not."""
    command = ("estimate", artifacts / "full.bundle.tokopt", "rtn{group=16},h2o{budget=50}")
    found = answer(capsys, *command, "--prompt", 200)
    before, after = found["before"], found["after"]
    assert found["passes"][1]["matches"] == 1 and found["predicted_speedup"] > 0
    assert after["weight_bytes"] < before["weight_bytes"] and after["cache_bytes"] < before["cache_bytes"] / 2
    assert list(before["cost_by_rows"]) == ["2", "4", "8", "16"] and before["read_ms"] > 0


def test_bench_times_texts(capsys: pytest.CaptureFixture[str], artifacts: Path) -> None:
    paths = [artifacts / "full.tokopt", artifacts / "small.tokopt"]
    found = answer(capsys, "bench", *paths, "--rounds", 2, "--prompt", 40, "--threads", 1)["results"]
    assert [r["artifact"] for r in found] == list(map(str, paths)) and found[0]["speedup"] == 1
    for result in found:
        assert min(result["ms_per_token"], result["read_ms"], *result["cost_by_rows"].values()) > 0
    assert found[1]["cache_bytes"] < found[0]["cache_bytes"]


def test_bench_takes_one_kind(capsys: pytest.CaptureFixture[str], artifacts: Path) -> None:
    encoder = Path(__file__).parents[1] / "data" / "artifacts" / "format2" / "encoder"
    assert "time them apart" in complaint(capsys, 2, "bench", artifacts / "full.tokopt", encoder)


def test_a_tokenizer_of_another_vocabulary_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    DECODERS["llama"]().save_pretrained(tmp_path / "llama")  # type: ignore[operator]
    other = Library(models.WordLevel({f"w{i}": i for i in range(VOCABULARY + 5)}, "w0"))
    other.save(str(tmp_path / "llama" / "tokenizer.json"))
    assert main(["capture", str(tmp_path / "llama"), "-o", str(tmp_path / "out.tokopt")]) == 2
    assert "tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out.tokopt").exists()


def test_bench_counts_new_tokens(capsys: pytest.CaptureFixture[str], artifacts: Path) -> None:
    """Every form that runs here, with the machine it was timed on."""
    path = artifacts / "full.tokopt"
    found = answer(capsys, "bench", "--rows", "1,2", "--prompt", 6, "--rounds", 1, "--threads", 1, path)
    assert [(r["artifact"], r["form"]) for r in found["results"]] == [
        (str(path), form) for form in load(path).sessions.forms("step")
    ]
    assert all(set(r["ms"]) == {"1", "2"} and r["ratio"]["1"] == 1 for r in found["results"])
    assert found["machine"]["threads"] == 1 and found["kernels"][str(path)] == str(load(path).kernels)
    said = complaint(capsys, 2, "bench", "--rows", "1,2", "--batch", 2, path)
    assert "--rows counts the new tokens of one text" in said
