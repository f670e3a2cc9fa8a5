"""Options of a text: grammars, the fewest tokens, biases, log-probabilities, and several texts for one prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

import tokopt
from tests.runtime.test_conversation import EVICTING, LETTERS
from tests.runtime.test_conversation import tokenizer as lettered
from tests.zoo.decoders import GROUPED, VOCABULARY, _hugging_face
from tokopt.errors import InputError
from tokopt.ir.format import Generation
from tokopt.runtime import Grammar, LanguageModel, Sampling, load
from tokopt.runtime.grammar import Constraints
from tokopt.runtime.loop import Emission, Request
from tokopt.runtime.sampling import LogitBias, MinTokens
from tokopt.runtime.speculation.rules.lantern import Lantern

END = VOCABULARY - 1
"""The token that ends a text; each other one is a letter, ``chr(33 + token)``."""

PIPELINES = ("", "sample", "verify", EVICTING)


def tokenizer() -> str:
    """Every letter is one of a byte, as grammars want it."""
    return lettered([*LETTERS[:94], "Ġ", "Ċ", "ĉ"], decoders.ByteLevel())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LanguageModel]:
    """One Llama of two layers by pipeline."""
    folder = tmp_path_factory.mktemp("options")
    model: Any = _hugging_face("Llama", **{**GROUPED, "num_hidden_layers": 2}, tie_word_embeddings=True)()
    about = Generation(256, VOCABULARY, eos=(END,))
    bundle = tokopt.capture_lm(model, tokenizer=tokenizer(), generation=about)
    made: dict[str, LanguageModel] = {}
    for place, pipeline in enumerate(PIPELINES):
        done = tokopt.optimize(bundle, pipeline) if pipeline else bundle
        loaded = load(tokopt.export(done, folder / f"{place}.tokopt"), threads=1)
        assert isinstance(loaded, LanguageModel)
        made[pipeline] = loaded
    return made


def ids(text: str) -> list[int]:
    return [ord(letter) - 33 for letter in text]


# --- grammars ---------------------------------------------------------------------------------------------

LANGUAGE = ("12", "1", "135", "ab")


@pytest.fixture(scope="module")
def constraints() -> Constraints:
    pytest.importorskip("llguidance")
    return Constraints(tokenizer(), VOCABULARY, (END,))


@pytest.mark.parametrize("start", ["", "x"])
def test_the_tokens_left_are_those_that_some_text_goes_on_with(constraints: Constraints, start: str) -> None:
    """Every beginning of every text of a small language, in any order, as a tree of drafts has them."""
    process = constraints.processor(Grammar.regex("|".join(LANGUAGE)), [len(start)])
    beginnings = {text[:n] for text in LANGUAGE for n in range(len(text) + 1)}
    for one, other in product(sorted(beginnings), repeat=2):
        for begun in (one, other):
            follow = {text[len(begun)] for text in LANGUAGE if text.startswith(begun) and text != begun}
            wanted = {*map(ord, follow)} | ({END + 33} if begun in LANGUAGE else set())
            left = process([ids(start + begun)], np.zeros((1, VOCABULARY), np.float32))[0]
            assert {33 + token for token in np.flatnonzero(np.isfinite(left))} == wanted


def test_the_name_of_a_special_token_is_spelled() -> None:
    """The token itself would end the text, or show nothing of itself."""
    pytest.importorskip("llguidance")
    library: Any = Tokenizer.from_str(tokenizer())
    library.add_special_tokens(["<e>", "<s>"])
    end, size = library.token_to_id("<e>"), library.get_vocab_size()
    process = Constraints(library.to_str(), size, (end,)).processor(Grammar.regex("a(<e>|<s>b)<s>"), [0])
    for text, follow in {"": "a", "a": "<", "a<": "es", "a<e": ">", "a<e>": "<", "a<e><": "s"}.items():
        left = process([ids(text)], np.zeros((1, size), np.float32))[0]
        assert np.flatnonzero(np.isfinite(left)).tolist() == sorted(ids(follow)), text
    left = process([ids("a<e><s>")], np.zeros((1, size), np.float32))[0]
    assert np.flatnonzero(np.isfinite(left)).tolist() == [end]


def test_a_token_that_may_not_follow_does_no_harm(constraints: Constraints) -> None:
    """A draft may propose anything; what it stands beside is still followed."""
    process = constraints.processor(Grammar.regex("12+"), [0])
    logits = np.zeros((1, VOCABULARY), np.float32)
    assert np.isfinite(process([ids("19")], logits)).all()  # nobody chooses what follows a forbidden token
    assert np.flatnonzero(np.isfinite(process([ids("1")], logits)[0])).tolist() == ids("2")


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_every_text_fits_with_and_without_a_drafter(
    models: dict[str, LanguageModel], temperature: float
) -> None:
    pytest.importorskip("llguidance")
    pattern = "[0-9]{2,4}(ab|cd)+"
    options: dict[str, Any] = {"grammar": Grammar.regex(pattern), "max_tokens": 12}
    for seed in range(4 if temperature else 1):
        sampling = Sampling(temperature, seed=seed)
        plain = models[""].generate(["abcab", "hi"], sampling=sampling, **options)
        drafted = models["verify"].generate(
            ["abcab", "hi"], sampling=sampling, drafter="prompt_lookup", nodes=4, **options
        )
        assert [done.tokens for done in plain] == [done.tokens for done in drafted]
        for done in plain:
            assert done.text is not None
            fits = re.fullmatch(pattern, done.text)
            assert fits if done.finish == "stop" else re.fullmatch("[0-9]{0,4}[abcd]*", done.text)


def test_neighbours_do_not_bring_back_what_is_forbidden(models: dict[str, LanguageModel]) -> None:
    """Where every token is near every other, one that the grammar or a bias forbids is still not accepted."""
    pytest.importorskip("llguidance")
    model = models["verify"]
    near = (np.arange(VOCABULARY)[:, None] + np.arange(1, VOCABULARY)) % VOCABULARY
    drafter = model.drafter("suffix", corpus=["11x11y22x9"])
    options: dict[str, Any] = {
        "accept": Lantern(near, delta=1.0),
        "drafter": drafter,
        "nodes": 6,
        "max_tokens": 9,
    }
    for seed in range(4):
        sampling = Sampling(1.5, seed=seed, logit_bias={ids("y")[0]: -np.inf})
        done = model.generate(
            "12x12x1", grammar=Grammar.regex("([12]{2}[xy])+"), sampling=sampling, **options
        )
        assert re.fullmatch("([12]{2}x)*[12]{0,2}", done.text or "")


def test_a_schema_gives_its_json(models: dict[str, LanguageModel]) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "array", "items": {"enum": [1, "b"]}, "minItems": 1, "maxItems": 2}
    for kind in (schema, json.dumps(schema)):
        done = models[""].generate("abc", grammar=Grammar.json_schema(kind), max_tokens=20)
        assert done.text is not None and done.finish == "stop"
        made = json.loads(done.text)
        assert 1 <= len(made) <= 2 and all(item in (1, "b") for item in made)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Grammar.json_schema("{"), "the schema is no JSON"),
        (lambda: Grammar.json_schema("[1]"), r"the schema is \[1\]; give an object"),
        (lambda: Grammar.json_schema({"a": {1}}), "the schema is no JSON"),  # pyright: ignore[reportArgumentType]
        (lambda: Grammar.regex(5), "pattern is 5"),  # pyright: ignore[reportArgumentType]
        (lambda: Grammar.json_schema({"const": np.nan}), "the schema is no JSON"),
        (lambda: Grammar.json_schema('{"not":' * 10_000 + "{}" + "}" * 10_000), "the schema is no JSON"),
        (lambda: Grammar.regex("\ud800"), "the regex is no text"),
        (lambda: Grammar("words", "a"), "kind is 'words'"),
        (lambda: Grammar("regex", 5), "the regex is 5"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_what_is_no_grammar_is_refused(make: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize(
    "grammar", [Grammar.regex("[0-9"), Grammar.lark('start: "a'), Grammar.lark("a: /b/")]
)
def test_a_grammar_that_cannot_be_read_is_refused(models: dict[str, LanguageModel], grammar: Grammar) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(InputError, match=rf"the grammar \({grammar.kind}\) cannot be used"):
        models[""].generate("abc", grammar=grammar)


@pytest.mark.parametrize(
    ("text", "eos", "words"),
    [
        (tokenizer(), (), "the model has none"),
        (lettered(), (END,), "cannot be used with the model's tokenizer"),
    ],
    ids=["no end", "no bytes"],
)
def test_a_model_that_cannot_follow_a_grammar_says_so(text: str, eos: tuple[int, ...], words: str) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(InputError, match=words):
        Constraints(text, VOCABULARY, eos)


# --- logits -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 6), min_size=1, max_size=3), st.integers(0, 4))
def test_end_tokens_wait_for_the_fewest_tokens(new: list[int], least: int) -> None:
    """A row's own number of new tokens counts, whatever its prompt is; other logits stay."""
    histories = [[1] * (3 + row + count) for row, count in enumerate(new)]
    prompts = [3 + row for row in range(len(new))]
    x = np.arange(5, dtype=np.float32) + np.zeros((len(new), 1), np.float32)
    made = MinTokens(least, (1, 4), prompts)(histories, x)
    for row, count in enumerate(new):
        hidden = {1, 4} if count < least else set[int]()
        assert {int(i) for i in np.flatnonzero(np.isneginf(made[row]))} == hidden
        assert (made[row] == x[row]).sum() == 5 - len(hidden)


def test_a_text_has_the_fewest_tokens_that_are_asked_for(models: dict[str, LanguageModel]) -> None:
    """With a bias that makes the end the likeliest, a text ends as soon as it may; a drafter changes nothing."""
    sampling = Sampling(logit_bias={END: 1e4})
    for least in (0, 1, 5):
        options: dict[str, Any] = {"min_tokens": least, "sampling": sampling, "max_tokens": 9}
        done = models[""].generate("abc", **options)
        assert (len(done.tokens), done.finish) == (least + 1, "stop")
        drafted = models["verify"].generate("abc", drafter="prompt_lookup", nodes=4, **options)
        assert drafted.tokens == done.tokens


def test_a_bias_is_added_to_its_tokens_alone() -> None:
    x = np.array([[1, 2, 3, 4]], np.float32)
    made = LogitBias(((0, 2.5), (3, -np.inf)))([[0]], x)
    assert made.tolist() == [[3.5, 2, 3, -np.inf]] and x.tolist() == [[1, 2, 3, 4]]


def test_a_forbidden_token_is_not_written(models: dict[str, LanguageModel]) -> None:
    free = models[""].generate("abc", max_tokens=6).tokens
    sampling = Sampling(logit_bias={free[0]: -np.inf})
    assert free[0] not in models[""].generate("abc", max_tokens=6, sampling=sampling).tokens
    assert Sampling(logit_bias=sampling.logit_bias) == sampling and hash(sampling)
    with pytest.raises(InputError, match=f"logit_bias names token {VOCABULARY}"):
        models[""].generate("abc", sampling=Sampling(logit_bias={VOCABULARY: 1.0}))


def test_a_bias_beyond_float32_stays_a_number() -> None:
    """With -inf beside it: the largest of several is still the largest, and none is NaN."""
    x = np.array([[1, 2, -np.inf]], np.float32)
    most = np.finfo(np.float32).max
    assert LogitBias(((0, 1e300), (2, 1e300)))([[0]], x).tolist() == [[most, 2, -np.inf]]
    assert LogitBias(((0, -1e300), (1, 1.0)))([[0]], x).tolist() == [[-most, 3, -np.inf]]


@pytest.mark.parametrize("bias", [((0,),), (5,), ((0, 1.0), (0, 2.0))])
def test_a_bias_that_is_no_number_for_each_token_is_refused(bias: Any) -> None:
    with pytest.raises(InputError, match="logit_bias"):
        Sampling(logit_bias=bias)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafting", [{}, {"drafter": "prompt_lookup", "nodes": 4}], ids=["plain", "drafted"])
@pytest.mark.parametrize("kind", ["bias", "bias and grammar", "grammar and min_tokens"])
def test_options_that_together_forbid_every_token_are_refused(
    models: dict[str, LanguageModel], kind: str, drafting: dict[str, Any], temperature: float
) -> None:
    """Else the first token of the vocabulary would be written."""
    options: dict[str, Any] = {}
    bias: dict[int, float] = {}
    if "grammar" in kind:
        pytest.importorskip("llguidance")
        options["grammar"] = Grammar.regex("12")
    if "bias" in kind:
        bias = dict.fromkeys(ids("2") if "grammar" in kind else range(VOCABULARY), -np.inf)
    if "min_tokens" in kind:
        options["min_tokens"] = 5
    sampling = Sampling(temperature, seed=1, logit_bias=bias)
    with pytest.raises(InputError, match="no token is left for row 0"):
        models["verify"].generate(["abcabc", "x"], sampling=sampling, **options, **drafting)


# --- log-probabilities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafting", [{}, {"drafter": "prompt_lookup", "nodes": 4}], ids=["plain", "drafted"])
def test_log_probabilities_are_those_of_scoring_the_text(
    models: dict[str, LanguageModel], drafting: dict[str, Any]
) -> None:
    """Of the model's own logits, whatever sampling does; the likeliest come first, and greedy takes the first."""
    model = models["verify" if drafting else ""]
    options: dict[str, Any] = {"max_tokens": 7, "logprobs": 3, **drafting}
    for prompt, done in zip(
        ("abcabcab", "x"),
        model.generate(["abcabcab", "x"], sampling=Sampling(0.8, top_k=5, seed=2), **options),
        strict=True,
    ):
        scored = model.score([*ids(prompt), *done.tokens])[-len(done.tokens) :]
        assert done.logprobs is not None and done.top_logprobs is not None
        np.testing.assert_allclose(done.logprobs, scored, atol=2e-5)
        for token, own, top in zip(done.tokens, done.logprobs, done.top_logprobs, strict=True):
            assert len(top) == 3 and list(top.values()) == sorted(top.values(), reverse=True)
            assert top.get(token, own) == own and own <= next(iter(top.values()))
    greedy = model.generate("abcabcab", **options)
    assert greedy.top_logprobs is not None
    assert [next(iter(top)) for top in greedy.top_logprobs] == list(greedy.tokens)


def test_log_probabilities_are_there_when_they_are_asked_for(models: dict[str, LanguageModel]) -> None:
    without, alone = (models[""].generate("abc", max_tokens=3, logprobs=n) for n in (None, 0))
    assert without.logprobs is None and without.top_logprobs is None
    assert alone.logprobs is not None and len(alone.logprobs) == 3 and alone.top_logprobs is None


# --- several texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_samples_are_the_texts_of_a_prompt_given_so_often(
    models: dict[str, LanguageModel], pipeline: str, temperature: float
) -> None:
    model, prompts = models[pipeline], ["abcde" * 5, "xy"]
    options: dict[str, Any] = {"max_tokens": 9, "sampling": Sampling(temperature, seed=5)}
    if pipeline == "verify":
        options |= {"drafter": "prompt_lookup", "nodes": 4}
    wanted = model.generate([prompt for prompt in prompts for _ in range(3)], **options)
    got = model.generate(prompts, samples=3, **options)
    assert [done.tokens for row in got for done in row] == [done.tokens for done in wanted]
    single = model.generate(prompts[0], samples=3, **options)
    assert [done.tokens for done in single] == [
        done.tokens for done in model.generate([prompts[0]] * 3, **options)
    ]


def test_a_prompt_is_read_once_for_all_its_samples(
    models: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    prefill = Request.prefill

    def counted(request: Request, prompts: Sequence[Sequence[int]], *rest: Any) -> Emission:
        rows.append(len(prompts))
        return prefill(request, prompts, *rest)

    monkeypatch.setattr(Request, "prefill", counted)
    assert len(models[""].generate("abc", samples=4, max_tokens=2)) == 4
    assert rows == [1]


# --- what does not fit ------------------------------------------------------------------------------------


def test_an_option_that_there_is_not_is_named(models: dict[str, LanguageModel]) -> None:
    for call in (models[""].generate, models[""].stream, models[""].tokens, models[""].chat().say):
        with pytest.raises(TypeError, match="there is no option 'max_token'; the options are accept, "):
            call("abc", max_token=3)  # pyright: ignore[reportCallIssue]
        with pytest.raises(TypeError, match=r"write sampling=Sampling\(top_p=0.9\)"):
            call("abc", top_p=0.9)  # pyright: ignore[reportCallIssue]
        if call != models[""].generate:
            with pytest.raises(TypeError, match="samples is an option of generate alone"):
                call("abc", samples=2)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="there is no option 'stop'"):
        models[""].tokens("abc", stop="a")  # pyright: ignore[reportCallIssue]


def test_a_model_that_draws_its_tokens_says_what_it_cannot(models: dict[str, LanguageModel]) -> None:
    given: dict[str, Any] = {
        "min_tokens": 2,
        "logprobs": 1,
        "grammar": Grammar.regex("a"),
        "processors": [len],
    }
    for name, value in given.items():
        with pytest.raises(InputError, match=f"draws its tokens itself; leave {name} out"):
            models["sample"].generate("abc", **{name: value})
    with pytest.raises(InputError, match="without logit_bias; leave logit_bias out"):
        models["sample"].generate("abc", sampling=Sampling(logit_bias={1: 2.0}))


def test_fewer_tokens_than_the_fewest_cannot_be(models: dict[str, LanguageModel]) -> None:
    with pytest.raises(InputError, match="min_tokens is 5 and max_tokens 4"):
        models[""].generate("abc", min_tokens=5, max_tokens=4)


@pytest.mark.parametrize("pipeline", ["", "sample"])
def test_more_samples_than_memory_holds_are_refused_before_there_are_texts(
    models: dict[str, LanguageModel], pipeline: str
) -> None:
    with pytest.raises(InputError, match="use a smaller batch"):
        models[pipeline].generate("abc", samples=2**40)
