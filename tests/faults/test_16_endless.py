"""The time of a token grew with the text, since the history was copied for every one, and looked through by a penalty.

The law: what a step reads of the past does not depend on how long that is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.runtime.test_text import TOKENIZER
from tests.runtime.toys import STATES, evictor, save, speaking
from tokopt.runtime import LanguageModel, Sampling, language, load
from tokopt.runtime.format.schedule import Trigger
from tokopt.runtime.sampling import RepetitionPenalty, TokenIds
from tokopt.runtime.text import MOST_HELD, TextStream


class Counted(TokenIds):
    """Counts the ids that are read, one by one or in slices."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        Counted.reads += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self) -> Any:
        Counted.reads += len(self)
        return super().__iter__()


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A toy that forgets every 5 tokens, and so writes on for ever."""
    manifest, files = speaking()
    made = replace(
        manifest,
        programs={**manifest.programs, "evict": evictor(due=False)},
        schedule=replace(manifest.schedule, triggers=(Trigger("evict", "tokens", 5, True),), endless=True),
        states=STATES,
    )
    return load(save(tmp_path_factory.mktemp("endless") / "toy.tokopt", made, files), threads=1)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.2, seed=0)],
    ids=["greedy", "drawn"],
)
def test_a_step_reads_no_more_of_a_longer_text(
    endless: LanguageModel, monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    monkeypatch.setattr(language, "TokenIds", Counted)
    stream, reads = endless.stream("abc", max_tokens=400, sampling=sampling), []
    for _ in range(400):
        Counted.reads = 0
        next(stream)
        reads.append(Counted.reads)
    assert reads[0] <= 2 * len("abc") and max(reads[1:]) <= 2  # the first step reads the prompt


def test_a_penalty_looks_at_new_tokens_alone() -> None:
    """And sees the same as one that looks at everything."""
    random = np.random.default_rng(0)
    ids, penalty = Counted([5, 5]), RepetitionPenalty(1.5)
    for _ in range(60):
        ids.append(int(random.integers(0, 40)))
        logits = random.standard_normal((1, 40)).astype(np.float32)
        Counted.reads = 0
        found = penalty([ids], logits)
        assert Counted.reads <= 3
        np.testing.assert_array_equal(found, penalty([list(ids)], logits))
        assert sorted(ids.distinct) == sorted(set(ids))


def test_bytes_that_are_no_text_are_not_held_back_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of random weights writes bytes that never become characters."""
    sizes: list[int] = []
    original = type(TOKENIZER).decode

    def recorded(tokenizer: Any, ids: Any) -> str:
        sizes.append(len(ids))
        return original(tokenizer, ids)

    monkeypatch.setattr(type(TOKENIZER), "decode", recorded)
    stream, half = TextStream(TOKENIZER), TOKENIZER.encode("é")[0]
    pieces = [stream.add(half) for _ in range(300)] + [stream.add(token) for token in TOKENIZER.encode("aé")]
    assert max(sizes) <= 2 * MOST_HELD
    shown = "".join(pieces) + stream.finish()
    assert shown.endswith("aé") and set(shown[:-2]) == {"\N{REPLACEMENT CHARACTER}"}
