"""``model.statistics`` was one object for all: of several threads each read another's numbers.

The law: a model keeps nothing of a call. What a generation took is on what it returns.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.runtime.toys import VOCABULARY, save, speaking, text
from tokopt.runtime import LanguageModel, Sampling, load

THREADS, CALLS = 8, 200


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load(save(tmp_path_factory.mktemp("speaking") / "toy.tokopt", *speaking()), threads=1)


def test_every_thread_reads_its_own(model: LanguageModel) -> None:
    """Texts and statistics of 200 generations by 8 threads, some with a penalty, which looks at the history."""

    def call(seed: int) -> None:
        random = np.random.default_rng(seed)
        prompts = [random.integers(0, VOCABULARY, n).tolist() for n in random.integers(1, 9, 1 + seed % 3)]
        count = int(random.integers(1, 12))
        made = model.generate(prompts, max_tokens=count)
        assert [list(row.tokens) for row in made] == [text(prompt, 1, count) for prompt in prompts]
        for row in made:
            assert row.statistics.prompt_tokens == sum(map(len, prompts))
            assert row.statistics.new_tokens == len(prompts) * count
        penalized = Sampling(repetition_penalty=3.0)
        alone = model.generate(prompts[0], max_tokens=count, sampling=penalized)
        assert alone.statistics.new_tokens == len(alone.tokens) == count
        assert len({*prompts[0], *alone.tokens}) >= min(VOCABULARY, 1 + count // 2)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(call, range(CALLS)))


def test_streams_side_by_side_have_their_own(model: LanguageModel) -> None:
    streams = [model.stream("abc", max_tokens=count) for count in (3, 7, 5)]
    shown = ["", "", ""]
    for _ in range(8):
        for i, stream in enumerate(streams):
            shown[i] += next(stream, "")
    assert shown == ["def", "defghij", "defgh"]
    for stream, wanted in zip(streams, shown, strict=True):
        assert stream.generated.text == wanted and stream.generated.finish == "length"
        assert stream.generated.statistics.new_tokens == len(wanted)


def test_a_stream_tells_what_there_is_so_far(model: LanguageModel) -> None:
    stream = model.tokens([0, 1], max_tokens=5)
    assert stream.generated.tokens == () and stream.generated.statistics.new_tokens == 0
    assert [next(stream), next(stream)] == [2, 3]
    part = stream.generated
    assert (part.tokens, part.finish, part.statistics.new_tokens) == ((2, 3), "", 2)
    assert list(stream) == [4, 5, 6]
    assert part.statistics.new_tokens == 2  # what was taken does not change any more


def test_a_model_has_no_statistics(model: LanguageModel) -> None:
    before = dict(vars(model))
    model.generate("abc", max_tokens=2)
    assert vars(model) == before and not hasattr(model, "statistics")
