"""Every decoder of the zoo, captured, exported and run without torch, says what the model itself says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.matrix.language import artifact, bundle, prompt, reference
from tests.zoo.decoders import CONTEXT, DECODERS, VOCABULARY
from tokopt.errors import TokoptError
from tokopt.ir.calls import first_call
from tokopt.runtime import buffers, loop

decoders = pytest.mark.parametrize("name", DECODERS)


@decoders
def test_greedy_equals_the_model(name: str) -> None:
    ids = prompt(9)
    got = artifact(name).generate(ids, max_tokens=200)
    assert list(got.tokens) == reference(name, ids, 200)
    assert len(set(got.tokens)) > 2  # a text, not one token again and again


@decoders
def test_padded_batch_equals_one_by_one(name: str) -> None:
    prompts = [prompt(n, seed=n) for n in (3, 17, 8)]
    together = artifact(name).generate(prompts, max_tokens=20)
    assert [row.tokens for row in together] == [
        artifact(name).generate(p, max_tokens=20).tokens for p in prompts
    ]


@decoders
def test_chunked_prefill_equals_one_prefill(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt(n, seed=n) for n in (23, 11)]
    whole = artifact(name).generate(prompts, max_tokens=20)
    monkeypatch.setattr(loop, "PREFILL", 5)
    assert artifact(name).generate(prompts, max_tokens=20) == whole


@decoders
def test_score_is_the_log_probability_of_what_is_generated(name: str) -> None:
    ids = prompt(9)
    text = ids + list(artifact(name).generate(ids, max_tokens=10).tokens)
    scores = artifact(name).score(text)
    assert scores.shape == (len(text) - 1,) and (scores <= 0).all()
    others = [artifact(name).score([*text[:-1], other])[-1] for other in range(5)]
    assert scores[-1] >= max(others)  # greedy chose the likeliest


@decoders
def test_growing_the_cache_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt(9)
    whole = artifact(name).generate(ids, max_tokens=30)
    for module in (loop, buffers):
        monkeypatch.setattr(module, "BLOCK", 1)
    grown = artifact(name).generate(ids, max_tokens=30)
    assert grown == whole
    assert grown.statistics.cache_slots == 9 + 29  # the last token is never written


def test_generation_ends_at_the_context() -> None:
    got = artifact("llama").generate(prompt(CONTEXT - 3), max_tokens=50)
    assert len(got.tokens) == 3 and got.finish == "length"


def test_statistics_count_what_was_done() -> None:
    model = artifact("llama")
    first, second = model.generate([prompt(5), prompt(7)], max_tokens=4)
    done = first.statistics
    assert second.statistics == done  # of the batch
    assert (done.prompt_tokens, done.new_tokens) == (12, 8)
    assert done.prefill_seconds > 0 and done.tokens_per_second > 0
    states = [s for s in model.manifest.states if s.kind in ("key", "value")]
    per_slot = sum(4 * int(np.prod([a for a in s.axes if isinstance(a, int)])) for s in states)
    assert done.cache_bytes == 2 * (done.cache_slots * (per_slot + 8) + 8)


def test_nan_logits_stop_with_the_step_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(request: loop.Request, tokens: np.ndarray, *rest: object, **more: object) -> loop.Emission:
        return loop.Emission(np.full((len(tokens), 1, VOCABULARY), np.nan, np.float32))

    monkeypatch.setattr(loop.Request, "step", damaged)
    with pytest.raises(TokoptError, match="the model gave NaN at step 2"):
        artifact("llama").generate(prompt(5), max_tokens=4)


@decoders
def test_only_the_wanted_rows_are_multiplied_with_the_vocabulary(name: str) -> None:
    """Logits of chosen tokens, in their order, are those among all tokens' logits."""
    step, states = bundle(name).main, bundle(name).states
    tokens = torch.tensor([prompt(9)])
    everything = step(*first_call(step, tokens, states))[0]
    names = [spec.name for spec in step.inputs]
    inputs = list(first_call(step, tokens, states))
    inputs[names.index("rows")] = torch.tensor([-1, 2, 0])
    torch.testing.assert_close(step(*inputs)[0], everything[:, [8, 2, 0]])
