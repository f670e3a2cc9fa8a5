"""A sample of the sweep, of what single classes do in a way of their own; and the page says what the outcomes say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sweep import encoders, language
from tests.sweep.classes import LANGUAGE, find
from tests.sweep.outcome import EQUAL, REFUSED, UNBUILT, read_outcomes
from tests.sweep.table import OUTCOMES, PAGE, table
from tests.sweep.tiny import build

SAMPLE = {
    "BloomForCausalLM": EQUAL,  # ALiBi
    "GptOssForCausalLM": EQUAL,  # attention sinks, and experts
    "Llama4ForCausalLM": EQUAL,  # attention in chunks, rotary embeddings in complex numbers
    "PegasusForCausalLM": EQUAL,  # positions counted from the length of the cache
    "MambaForCausalLM": REFUSED,
    "AlbertModel": EQUAL,  # layers that share their weights
}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_class_ends_as_it_did(name: str, tmp_path: Path) -> None:
    """And as the page says."""
    known = read_outcomes(OUTCOMES)[name]
    trial = language.trial if known.family == LANGUAGE else encoders.trial
    endings = dict(trial(build(find(name)), tmp_path, passes=False))
    assert endings == {"": known.plain}
    assert known.plain.outcome == SAMPLE[name]


def test_the_page_is_made_of_the_outcomes() -> None:
    assert PAGE.read_text(encoding="utf-8") == table(OUTCOMES), "run python -m tests.sweep, which writes it"


def test_no_class_ends_as_it_must_not() -> None:
    """Neither a wrong number nor an error that is not tokopt's; what is refused is refused in a sentence."""
    found = read_outcomes(OUTCOMES).values()
    assert not [(one.name, text, end) for one in found for text, end in one.faults]
    for one in found:
        for end in (one.plain, *one.passes.values()):
            assert end.outcome in (EQUAL, REFUSED, UNBUILT) and "\n" not in end.detail
            assert end.detail or end.outcome == EQUAL
