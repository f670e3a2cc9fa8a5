"""Bad arguments raised AttributeError, TypeError, OverflowError, or were taken for something else.

The law: whatever a public function is given, it takes it for what it is, or refuses it by one sentence, before any
program runs or a file is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

import tokopt
from tests.faults.cases import Call, Stage, spelled
from tests.faults.compiler_arguments import COMPILER
from tests.faults.runtime_arguments import RUNTIME
from tests.runtime.artifacts import doubling
from tests.runtime.toys import save, speaking
from tokopt.arguments import check_items, check_number, described
from tokopt.errors import InputError, TokoptError
from tokopt.runtime import Sampling, Stream, buffers, load
from tokopt.runtime.engines.onnxruntime import Sessions

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"

ARGUMENTS = RUNTIME | COMPILER


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    folder = tmp_path_factory.mktemp("stage")
    module, x = torch.nn.Linear(3, 5), torch.ones(2, 3)
    return Stage(
        speaker=load(save(folder / "speaking.tokopt", *speaking(chat_template=TEMPLATE)), threads=1),
        encoder=load(doubling(folder / "doubling.tokopt"), threads=1),
        module=module,
        x=x,
        bundle=tokopt.capture(module, (x,)),
        folder=folder,
    )


def test_the_lists_are_long() -> None:
    assert len(RUNTIME) + len(COMPILER) == len(ARGUMENTS)  # no name hides another
    assert sum(len(argument.bad) for argument in ARGUMENTS.values()) >= 322
    assert sum(len(argument.good) for argument in ARGUMENTS.values()) >= 120


def fault(call: Call, stage: Stage, value: Any) -> str | None:
    """What is wrong with the way in which a call refuses a value; None for one good sentence."""
    try:
        call(stage, value)
    except TokoptError as error:
        sentence = str(error)
        good = 20 < len(sentence) < 700 and "\n" not in sentence
        return None if good else f"no sentence: {sentence[:200]}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_values_are_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def runs(*arguments: object, **named: object) -> NoReturn:
        raise AssertionError("a program runs")

    for method in ("run", "bind", "buffers"):
        monkeypatch.setattr(Sessions, method, runs)
    argument = ARGUMENTS[name]
    before = {path: path.stat().st_mtime_ns for path in stage.folder.rglob("*")}
    found = [(spelled(value), fault(argument.call, stage, value)) for value in argument.bad]
    assert not [f"{value}: {wrong}" for value, wrong in found if wrong]
    assert {path: path.stat().st_mtime_ns for path in stage.folder.rglob("*")} == before


@pytest.mark.parametrize("name", [name for name, argument in ARGUMENTS.items() if argument.good])
def test_good_values_are_taken(stage: Stage, name: str) -> None:
    wrong = []
    for value in ARGUMENTS[name].good:
        try:
            made = ARGUMENTS[name].call(stage, value)
            assert not isinstance(made, Stream) or list(made)
        except Exception as error:
            wrong.append(f"{spelled(value)}: {type(error).__name__}: {error}")
    assert not wrong


# --- siblings that no list of single values shows -----------------------------------------------------------


def test_numbers_become_pythons_own() -> None:
    made = Sampling(np.float32(0.5), np.int64(3), seed=True)  # type: ignore[arg-type]
    assert [type(value) for value in (made.temperature, made.top_k, made.seed)] == [float, int, int]
    assert made == Sampling(0.5, 3, seed=1)


def test_a_tensor_is_what_an_array_is(stage: Stage) -> None:
    """Ids and images of torch are read without importing it; a gradient is left behind."""
    ids = np.array([3, 4])
    assert stage.speaker.generate(torch.from_numpy(ids)) == stage.speaker.generate(ids)
    x = torch.arange(6.0, requires_grad=True)
    np.testing.assert_array_equal(stage.encoder((x * 1).reshape(2, 3)), 2 * x.detach().reshape(2, 3).numpy())


def test_a_hostile_value_is_described_all_the_same() -> None:
    class Hostile:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    for value in (Hostile(), 10**5000, "x" * 10**6, np.zeros((1000, 1000)), ["\n" * 100]):
        sentence = described(value)
        assert "\n" not in sentence and len(sentence) < 150
        with pytest.raises(InputError, match=r"^a is "):
            check_number("a", [value])
    with pytest.raises(InputError, match=r"^a is 'text' \(str\), it must be a list$"):
        check_items("a", "text", "a list")


def test_a_batch_is_refused_before_its_memory_is_taken(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of all rows at once takes more than the cache."""
    monkeypatch.setattr(buffers, "available_memory", lambda: 10**6)
    assert stage.speaker.generate([[1] * 40] * 20, max_tokens=1)
    monkeypatch.setattr(Sessions, "buffers", None)
    with pytest.raises(
        InputError, match=r"attention of 40 tokens to 4\d slots for a batch of 2000 takes .* GiB"
    ):
        stage.speaker.generate([[1] * 40] * 2000, max_tokens=1)


ONE = np.ones((2, 1), np.int64)


@pytest.mark.parametrize(
    "given",
    [([[1], [1]], ONE), (ONE, None), (ONE.astype(np.int32), ONE), (ONE[:1], ONE[:1]), (ONE, ONE.repeat(2, 1))]
    + [(ONE[0], ONE[0]), (ONE[:, :0], ONE[:, :0]), (ONE > 0, ONE), (torch.ones(2, 1).long(), ONE)],
)
def test_a_request_driven_by_hand_takes_tokens_of_its_batch(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, given: tuple[Any, Any]
) -> None:
    request = stage.speaker.open(2, 8)
    monkeypatch.setattr(Sessions, "bind", None)
    with pytest.raises(InputError, match=r"^(tokens|positions) "):
        request.step(*given)
    for prompts in ([], [[1]], [[1], []], [[1], [1], [1]]):
        with pytest.raises(InputError, match="give 2, none of them empty"):
            request.prefill(prompts)


def test_nothing_is_written_where_an_argument_is_wrong(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        tokopt.export(stage.bundle, tmp_path / "a.tokopt", tolerance=float("nan"))
    with pytest.raises(InputError):
        tokopt.tune(stage.bundle, [stage.x] * 2, tmp_path / "tuning", minutes=-1)
    assert not list(tmp_path.iterdir())
