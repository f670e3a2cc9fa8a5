"""Draws of tokens: every form on every instruction set, what is no distribution, bad input, sanitizers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.draws import FORMS, Draws, draws, is_right, log_probabilities, onnx_model
from tests.kernels.linears import FAILURES, needs_library, session
from tests.kernels.sanitizers import WATCHED, check_watched, examples, skip_when_watched
from tokopt.errors import InputError

forms = pytest.mark.parametrize("form", FORMS)

VOCABULARY = 4097 if WATCHED else 49153
"""The tokens of a language model, or what sanitizers have the time for."""

LARGEST = 1 - 2**-24
"""The largest random number."""

KINDS = {
    "normal": lambda random, shape: random.standard_normal(shape) * 4,
    "flat": lambda random, shape: random.standard_normal(shape) / 100,
    "peaked": lambda random, shape: random.standard_normal(shape) * 30,
    "few values": lambda random, shape: random.integers(-3, 3, shape),
    "equal": lambda random, shape: np.full(shape, 7.25),
    "neighbours": lambda random, shape: 1 + random.integers(0, 9, shape) * 2.0**-23,
    "huge": lambda random, shape: random.choice([-3e38, -1e30, 1e-30, 1, 3e38], shape),
}
"""What logits may be like; every one makes numbers of a shape."""

OPTIONS = {
    "temperature": st.sampled_from([0.0, 1e-40, 0.05, 0.7, 1.0, 3.0]),
    "top_k": st.sampled_from([0, 0, 1, 2, 5, 40, 9999]),
    "top_p": st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 1e-6]),
    "min_p": st.sampled_from([0.0, 0.0, 0.05, 1.0]),
}


def assert_right(given: Draws, got: tuple[np.ndarray, np.ndarray]) -> None:
    """Every token is right, and every log-probability as close as float32 comes to it."""
    tokens, logprobs = got
    logits = given.inputs["logits"]
    assert tokens.dtype == np.int64 and logprobs.dtype == np.float32
    assert tokens.shape == logprobs.shape == logits.shape[:2]
    wrong = [place for place in np.ndindex(tokens.shape) if not is_right(given, place, int(tokens[place]))]
    assert not wrong
    finite = np.where(np.isfinite(logits), np.abs(logits), 0)
    error = np.abs(logprobs - log_probabilities(logits, tokens))
    assert (np.isnan(error) == (tokens < 0)).all()
    assert not (error > 1e-6 * (20 + finite.max(-1, initial=0))).any()


@forms
@examples(80)
@given(st.data())
def test_every_token_is_right(form: str, data: st.DataObject) -> None:
    """Any options and sizes, numbers of every kind at any address, forbidden tokens."""
    random = np.random.default_rng(data.draw(st.integers(0, 999), "seed"))
    batch, rows = data.draw(st.integers(1, 3), "batch"), data.draw(st.integers(0, 4), "rows")
    vocabulary = data.draw(st.sampled_from([1, 2, 3, 15, 16, 17, 63, 64, 65, 129, 300, 2000]), "vocabulary")
    shape = (batch, rows, vocabulary)
    forbidden = random.random(shape) < data.draw(st.sampled_from([0, 0.3]), "forbidden")
    made = KINDS[data.draw(st.sampled_from([*KINDS]), "kind")](random, shape)
    logits = np.where(forbidden, -np.inf, made)
    uniform = random.choice([0, LARGEST, *random.random(9) * LARGEST], (batch, rows))
    given = draws(logits, uniform)
    for name, choices in OPTIONS.items():
        chosen = [data.draw(choices, name) for _ in range(batch)]
        given = given.but(**{name: np.array(chosen, given.inputs[name].dtype)})
    assert_right(given, FORMS[form](given, data.draw(st.sampled_from([1, 2]), "threads")))


@forms
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 2.0, "top_k": 6, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_the_distribution_is_that_of_the_definition(form: str, options: dict[str, Any]) -> None:
    """Of 4,096 evenly spaced random numbers, as many draw a token as its probability says, but for one."""
    logits = np.array([0.3, -1, 2, 2, -np.inf, 0.3, 1, -0.2])
    given = draws(np.tile(logits, (1, 4096, 1)), np.arange(4096) / 4096, **options)
    tokens, _ = FORMS[form](given, 1)
    probability = distribution(logits, **options)
    counts = np.bincount(tokens[0], minlength=len(logits))
    assert (np.abs(counts - 4096 * probability) <= 1).all()
    assert (counts[probability == 0] == 0).all()


def distribution(
    logits: np.ndarray, temperature: float = 1, top_k: int = 0, top_p: float = 1, min_p: float = 0
) -> np.ndarray:
    """What tokens are drawn with: everything that is as likely as the last that stays, stays."""
    weight = np.exp((logits - logits.max()) / temperature)
    if top_k:
        weight[weight < np.sort(weight)[-top_k]] = 0
    masses = {least: weight[weight >= least].sum() for least in np.unique(weight)}
    weight[weight < max(least for least, mass in masses.items() if mass >= top_p * weight.sum() - 1e-9)] = 0
    weight[weight < min_p] = 0
    return weight / weight.sum()


@forms
@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.9}, {"top_k": 300, "top_p": 0.99, "min_p": 1e-4}], ids=str
)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.5])
def test_vocabularies_of_language_models(form: str, options: dict[str, Any], temperature: float) -> None:
    """Rows as long as those of a model, peaked and flat, on several threads."""
    random = np.random.default_rng(0)
    logits = random.standard_normal((2, 6, VOCABULARY)) * np.array([1, 2, 3, 4, 6, 9])[:, None] - 5
    given = draws(logits, random.random((2, 6)) * LARGEST, temperature=temperature, **options)
    assert_right(given, FORMS[form](given, 2))


@forms
@pytest.mark.parametrize("top_k", [1, 2, 1500, 2999, 3000, 3001])
def test_equal_logits_stay_together(form: str, top_k: int) -> None:
    """A thousand of three logits each: all tokens of the last that top-k needs may be drawn."""
    logits = np.resize([1.0, 3, 2], (1, 1, 3000)).repeat(300, 1)
    given = draws(logits, np.linspace(0, LARGEST, 300), top_k=top_k)
    tokens, _ = FORMS[form](given, 1)
    values = set(logits[0, 0][tokens[0]])
    assert values == {3.0, *([2.0] if top_k > 1000 else []), *([1.0] if top_k > 2000 else [])}
    assert_right(given, (tokens, log_probabilities(logits, tokens).astype(np.float32)))


@forms
def test_thresholds_lie_between_neighbours(form: str) -> None:
    """Logits a step of float32 apart, in an order that is not theirs: exactly ``top_k`` of them can be drawn."""
    steps = np.random.default_rng(0).permutation(100)
    logits = np.tile(-8 - steps * 2.0**-20, (1, 4096, 1))
    logits[..., 0] = 0
    for top_k in (2, 40, 99):
        given = draws(logits, np.arange(4096) / 4096, top_k=top_k)
        tokens, _ = FORMS[form](given, 1)
        likeliest = np.argsort(-logits[0, 0], kind="stable")[:top_k]
        assert set(tokens[0]) == set(likeliest)


@forms
@pytest.mark.parametrize("wrong", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 70, 199])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_distribution_draws_nothing(
    form: str, wrong: float, place: int, temperature: float
) -> None:
    """Its token is -1, its log-probability NaN; the rows beside it are as they were."""
    random = np.random.default_rng(0)
    given = draws(random.standard_normal((1, 4, 200)), 0.5, temperature=temperature, top_k=9, top_p=0.9)
    want = FORMS[form](given, 1)
    logits = given.inputs["logits"].copy()
    logits[0, 1, place], logits[0, 2] = wrong, -np.inf
    tokens, logprobs = FORMS[form](given.but(logits=logits), 1)
    assert (tokens[0, 1:3] == -1).all() and np.isnan(logprobs[0, 1:3]).all()
    for got, before in zip((tokens, logprobs), want, strict=True):
        np.testing.assert_array_equal(got[0, [0, 3]], before[0, [0, 3]])


@forms
def test_each_row_of_a_batch_has_its_own_options(form: str) -> None:
    logits = np.random.default_rng(0).standard_normal((3, 5, 90)) * 3
    options: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_k": 3}, {"temperature": 2.0, "top_p": 0.5}]
    uniform = np.linspace(0, LARGEST, 5)[None]
    alone = [draws(logits[[b]], uniform, **option) for b, option in enumerate(options)]
    joined = Draws({name: np.concatenate([one.inputs[name] for one in alone]) for name in alone[0].inputs})
    want = [FORMS[form](one, 1) for one in alone]
    for got, parts in zip(FORMS[form](joined, 2), zip(*want, strict=True), strict=True):
        np.testing.assert_array_equal(got, np.concatenate(parts))


@needs_library
def test_log_probabilities_that_nobody_reads_are_left_out() -> None:
    given = draws(np.random.default_rng(0).standard_normal((2, 3, 70)), 0.4, top_p=0.8)
    (tokens,) = session(onnx_model(given, logprobs=False)).run(None, dict(given.inputs))
    np.testing.assert_array_equal(tokens, session(onnx_model(given)).run(None, dict(given.inputs))[0])


@needs_library
def test_the_outputs_have_the_axes_of_the_logits() -> None:
    given = draws(np.zeros((1, 1, 5)), 0.5)
    for logprobs in (True, False):
        for output in session(onnx_model(given, logprobs=logprobs)).get_outputs():
            assert output.shape == ["batch", "rows"]


GOOD = draws(np.random.default_rng(0).standard_normal((2, 3, 70)), 0.5)


def one_wrong(number: float, kind: type = np.float32) -> np.ndarray:
    """Options of two rows, of which the second has a number that it may not have."""
    return np.array([1, number]).astype(kind)


BAD_SHAPES: dict[str, tuple[Draws, str]] = {
    "axes": (
        GOOD.but(logits=GOOD.inputs["logits"][0]),
        "logits must be .batch, rows, vocabulary., got .3, 70.",
    ),
    "empty": (
        GOOD.but(logits=np.zeros((2, 3, 0), np.float32)),
        "logits must be .batch, rows, vocabulary., got ",
    ),
    "uniform": (GOOD.but(uniform=np.zeros((2, 4), np.float32)), "uniform must be .2, 3., got .2, 4."),
    "temperature": (GOOD.but(temperature=np.ones(3, np.float32)), "temperature must be .2., got .3."),
    "top_k": (GOOD.but(top_k=np.zeros((2, 1), np.int64)), "top_k must be .2., got .2, 1."),
    "top_p": (GOOD.but(top_p=np.ones(1, np.float32)), "top_p must be .2., got .1."),
    "min_p": (GOOD.but(min_p=np.ones(0, np.float32)), "min_p must be .2., got .0."),
}

BAD_NUMBERS: dict[str, tuple[Draws, str]] = {
    "cold": (
        GOOD.but(temperature=one_wrong(-1)),
        "temperature of row 1 must be a number that is not negative",
    ),
    "temperature": (GOOD.but(temperature=one_wrong(np.nan)), "temperature of row 1 must be a number"),
    "hot": (GOOD.but(temperature=one_wrong(np.inf)), "temperature of row 1 must be a number"),
    "top_k": (GOOD.but(top_k=one_wrong(-1, np.int64)), "top_k of row 1 must be 0 or more"),
    "top_p": (GOOD.but(top_p=one_wrong(0)), "top_p of row 1 must be above 0"),
    "no top_p": (GOOD.but(top_p=one_wrong(np.nan)), "top_p of row 1 must be above 0"),
    "min_p": (GOOD.but(min_p=one_wrong(1.5)), "min_p of row 1 must be 0 to 1"),
    "no min_p": (GOOD.but(min_p=one_wrong(np.nan)), "min_p of row 1 must be 0 to 1"),
    "uniform": (GOOD.but(uniform=np.ones((2, 3), np.float32)), "uniform of row 0 must be in .0, 1."),
    "no uniform": (
        GOOD.but(uniform=np.full((2, 3), np.nan, np.float32)),
        "uniform of row 0 must be in .0, 1.",
    ),
}


@needs_library
@pytest.mark.parametrize("name", {**BAD_SHAPES, **BAD_NUMBERS})
def test_bad_input_is_refused(name: str) -> None:
    """In one sentence that names the op, before anything is computed."""
    given, words = {**BAD_SHAPES, **BAD_NUMBERS}[name]
    with pytest.raises(FAILURES, match=words) as caught:
        session(onnx_model(given)).run(None, dict(given.inputs))
    assert "tokopt.cpu::DrawTokens 'draw': " in str(caught.value)


@pytest.mark.parametrize("name", ["logits", "uniform", "temperature", "top_k", "top_p", "min_p"])
def test_the_reference_refuses_other_numbers_of_axes(name: str) -> None:
    with pytest.raises(
        InputError, match=r"logits must be .batch, rows, vocabulary., uniform .batch, rows., and"
    ):
        FORMS["reference"](GOOD.but(**{name: GOOD.inputs[name][None]}), 1)


@needs_library
@skip_when_watched
def test_sanitizers_find_nothing() -> None:
    check_watched(__file__)
