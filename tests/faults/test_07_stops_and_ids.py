"""A str as ``stop`` ended a text at any of its letters, 5.5 and True became token ids, NaN from a processor token 0.

The law: what a caller gives means what it says, or it is refused. A str is one stop; an id is an integer; the logits
from which a token is chosen are numbers, at least one of them finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tests.runtime.toys import VOCABULARY, save, speaking
from tokopt.errors import InputError, TokoptError
from tokopt.runtime import LanguageModel, Sampling, load, loop
from tokopt.runtime.sampling import RepetitionPenalty, Temperature, softmax

GREEDY, DRAWN = Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """``abc`` goes on as ``defghijkab``."""
    return load(save(tmp_path_factory.mktemp("speaking") / "toy.tokopt", *speaking()), threads=1)


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("hgf", "defghijkab"),
        ("fg", "de"),
        (["hgf", "gh"], "def"),
        ({"fg"}, "de"),
        ("", "defghijkab"),
        (["", ""], "defghijkab"),
        (None, "defghijkab"),
    ],
    ids=str,
)
def test_a_str_is_one_stop(model: LanguageModel, stop: Any, shown: str) -> None:
    assert model.generate("abc", max_tokens=10, stop=stop).text == shown
    assert "".join(model.stream("abc", max_tokens=10, stop=stop)) == shown


@pytest.mark.parametrize(
    "item", [5.5, 5.0, True, "5", None, np.float32(5), np.bool_(True), 1j, [5]], ids=repr
)
def test_what_is_no_integer_is_no_id(model: LanguageModel, item: Any) -> None:
    calls: tuple[Callable[[Any], object], ...] = (
        model.stream,
        model.tokens,
        model.score,
        lambda ids: model.generate([ids]),
    )
    for call in calls:
        with pytest.raises(
            InputError, match=r"token 1 of (the prompt|the text) is .*, it must be an integer"
        ):
            call([3, item])


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, object])
def test_integers_of_any_kind_are_ids(model: LanguageModel, dtype: Any) -> None:
    wanted = model.generate([0, 1, 2], max_tokens=3)
    ids = np.array([0, 1, 2], dtype)
    assert model.generate(ids, max_tokens=3) == wanted
    assert model.generate(ids[None], max_tokens=3) == [wanted]
    assert model.generate(list(ids), max_tokens=3) == wanted


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    ("process", "message"),
    [
        (lambda logits: logits * math.nan, "returned NaN or infinity for row 0"),
        (lambda logits: logits + math.inf, "returned NaN or infinity for row 0"),
        (lambda logits: logits - math.inf, "-infinity for all of its tokens"),
        (lambda logits: None, r"returned None; return an array of numbers"),
        (lambda logits: logits.tolist(), r"\(list\); return an array of numbers"),
        (lambda logits: logits > 0, "return an array of numbers"),
        (lambda logits: logits[0], r"of shape \[11\]; return those that it is given, \[1, 11\]"),
        (lambda logits: np.pad(logits, ((0, 0), (0, 1))), r"of shape \[1, 12\]"),
        (lambda logits: logits[5], "raised IndexError"),
    ],
)
def test_a_processor_leaves_something_to_choose_from(
    model: LanguageModel, sampling: Sampling, process: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(InputError, match=r"^processor 1 \(<lambda>\) at step 1 .*" + message) as caught:
        model.generate(
            [1],
            processors=[lambda history, logits: logits, lambda history, logits: process(logits)],
            sampling=sampling,
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64])
def test_a_processor_may_give_other_numbers(model: LanguageModel, dtype: Any) -> None:
    """Its array may be read-only and used again, by a penalty behind it too."""
    kept = np.zeros((1, VOCABULARY), dtype)
    kept[0, 4] = 5
    kept.flags.writeable = False
    for sampling in (
        Sampling(repetition_penalty=1.01),
        Sampling(temperature=1e-300, repetition_penalty=1.01),
    ):
        made = model.generate([1], max_tokens=3, processors=[lambda history, logits: kept], sampling=sampling)
        assert made.tokens == (4, 4, 4)
    assert kept[0, 4] == 5


def test_what_a_finished_text_would_be_is_of_no_account(model: LanguageModel) -> None:
    """A processor may forbid everything to a text that has ended, since nothing is chosen for it."""

    def end_of_first(history: Sequence[Sequence[int]], logits: np.ndarray) -> np.ndarray:
        if len(history[0]) == 4:
            logits[0] = -np.inf
        return logits

    made = model.generate(["abc", "abc"], max_tokens=5, stop="d", processors=[end_of_first])
    assert [text.text for text in made] == ["", ""]


@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_logits_of_the_model_are_numbers(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, value: float, name: str
) -> None:
    def damaged(request: loop.Request, tokens: np.ndarray, *rest: object, **more: object) -> loop.Emission:
        return loop.Emission(np.full((len(tokens), 1, VOCABULARY), value, np.float32))

    monkeypatch.setattr(loop.Request, "step", damaged)
    with pytest.raises(TokoptError, match=f"the model gave {name} at step 2"):
        model.generate([1])


@pytest.mark.parametrize("value", [5e-324, 1e-300, 1e-30, 1e30, 1e300])
def test_extreme_options_overflow_nothing(value: float) -> None:
    """A tiny temperature is greedy and a huge one uniform; a penalty leaves numbers."""
    logits = np.array([[3.0, -2.0, 0.0, -np.inf, 3e38, -3e38]], np.float32)
    drawn = softmax(Temperature(value)([], logits))
    assert drawn[0, 3] == 0 and np.isclose(drawn.sum(), 1)
    if value < 1:
        assert drawn[0, 4] == 1
    if value > 1e100:
        assert np.allclose(np.delete(drawn[0], 3), 0.2)
    penalized = RepetitionPenalty(value)([range(6)], logits)
    assert np.isfinite(np.delete(penalized[0], 3)).all() and penalized[0, 3] == -np.inf
