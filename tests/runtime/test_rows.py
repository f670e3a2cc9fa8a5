"""The cost of a call by the number of its new tokens; nothing is said of how large it is."""

from __future__ import annotations

import numpy as np
import pytest

from tests.matrix.language import artifact, prompt
from tokopt.errors import InputError
from tokopt.runtime.engines.onnxruntime import ONE_ROW, PORTABLE
from tokopt.runtime.rows import RowTimer, measure_rows


def test_every_number_is_timed_from_the_same_state() -> None:
    """The cache neither fills nor grows, whatever is timed and however often."""
    timer = RowTimer(artifact("llama"), (1, 4, 2), prompt=10)
    slots = dict(timer.request.buffers.slots)
    before = {name: timer.request.buffers.read(name) for name in timer.request.buffers.states}
    for _ in range(3):
        found = timer.measure()
        assert list(found) == [1, 4, 2] and all(seconds > 0 for seconds in found.values())
        assert timer.request.buffers.slots == slots
    timer.request.buffers.load(timer._states)
    for name, array in before.items():
        np.testing.assert_array_equal(timer.request.buffers.read(name), array)


def test_the_text_goes_on_as_if_nothing_was_timed() -> None:
    model = artifact("llama")
    ids, wanted = prompt(12), artifact("llama").generate(prompt(12), max_tokens=8)
    measure_rows(model, (1, 3), prompt=5, turns=1)
    assert model.generate(ids, max_tokens=8) == wanted


@pytest.mark.parametrize("form", [None, PORTABLE, ONE_ROW])
def test_every_form_can_be_timed(form: str | None) -> None:
    assert list(RowTimer(artifact("llama"), (1, 2), prompt=3, form=form).measure()) == [1, 2]


def test_costs_are_medians_with_their_machine() -> None:
    costs = measure_rows(artifact("llama"), (2, 1), prompt=4, turns=3, threads=1)
    assert costs.ratio(1) == 1 and costs.ratio(2) == costs.seconds[2] / costs.seconds[1]
    assert {"cpu", "instructions", "cores", "onnxruntime"} < set(costs.machine)
    assert costs.machine["threads"] == 1


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"rows": ()}, "takes none of"),
        ({"rows": (0,)}, "an item of rows is 0"),
        ({"rows": 4}, "rows is 4"),
        ({"prompt": 0}, "prompt is 0"),
        ({"turns": 0}, "turns is 0"),
    ],
)
def test_bad_arguments(given: dict, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        measure_rows(artifact("llama"), **given)
