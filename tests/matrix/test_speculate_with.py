"""What docs/speculation.md says that the pass goes with is what it does: every row of its table is tried here."""

from __future__ import annotations

import re

import pytest

import tokopt
from tests.matrix.language import bundle, prompt
from tests.matrix.test_kivi import TEXT as KIVI
from tests.pages import ROOT
from tokopt.errors import TokoptError
from tokopt.passes import PASSES

PAGE = ROOT / "docs" / "speculation.md"

EVICTIONS = (
    "streaming",
    "knorm",
    "keydiff",
    "random_kv",
    "expected_attention",
    "h2o",
    "tova",
    "snapkv",
    "keyformer",
)

BEFORE = {
    **{name: f"{name}{{budget=48}}" for name in EVICTIONS},
    "adakv of knorm": "adakv{press=knorm{budget=48}}",
    "adakv of h2o": "adakv{press=h2o{budget=48}}",
    "chunk of knorm": "chunk{press=knorm{budget=48}}",
    "int8_kv": "int8_kv",
    "kivi": KIVI,
    "rtn": "rtn{group=16}",
    "sample": "sample",
}
"""Row of the table -> the passes before ``speculate``, which are tried."""

WEIGHTS = {
    **{name: f"{name}{{group=16}}" for name in ("gptq", "awq", "nupes")},
    **{
        name: name
        for name in ("int8", "fp8", "cast", "smoothquant", "keep_grid", "fold_scales", "drop_unread")
    },
}
"""The same for passes that change weights alone, so that they go with ``speculate`` as ``rtn`` does."""

CALIBRATION = [prompt(24, seed) for seed in (3, 4)]


def rows() -> dict[str, str]:
    """Pass -> ``yes``, or ``no:`` and the reason."""
    text = PAGE.read_text().replace("` of `", " of ")
    return dict(re.findall(r"^\| `(.+?)` \| (yes|no: .+?) \|$", text, re.MULTILINE))


@pytest.mark.parametrize("name", BEFORE)
def test_a_row_is_what_the_pass_does(name: str) -> None:
    made = tokopt.optimize(bundle("llama"), BEFORE[name], calibration=CALIBRATION)
    assert made.history[-1].matches
    said = rows()[name]
    for passes in ("verify", "speculate{drafter=prompt_lookup}"):  # the drafter that is traced quickest
        found = "yes"
        try:
            tokopt.optimize(made, passes, strict=True)
        except TokoptError as error:
            found = str(error)
        assert said.removeprefix("no: ") in found and said.startswith("no: ") == (found != "yes"), found


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_changes_weights_alone_is_like_any_other_weights(name: str) -> None:
    given = bundle("llama")
    made = tokopt.optimize(given, WEIGHTS[name], calibration=CALIBRATION)
    assert rows()[name] == rows()["rtn"] == "yes" and made.states == given.states
    for old, new in zip(given.programs.values(), made.programs.values(), strict=True):
        assert (new.inputs, new.outputs, new.aliases) == (old.inputs, old.outputs, old.aliases)


def test_every_pass_for_language_models_has_a_row() -> None:
    families = ("kv", "quantize", "cleanup", "sample")
    expected = {name for name, home in PASSES.items() if home.split(".")[2] in families}
    assert set(rows()) == {*BEFORE, *WEIGHTS}
    assert {name.split()[0] for name in rows()} == expected
