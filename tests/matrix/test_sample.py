"""A model that draws its tokens itself writes the texts that the host draws from its logits."""

from __future__ import annotations

import numpy as np
import pytest

import tokopt
from tests import node
from tests.matrix.language import artifact, bundle, prompt
from tokopt.errors import InputError, PassError
from tokopt.runtime import Sampling

MODELS = (
    ("llama", ""),
    ("llama", "h2o{budget=48 every=8},rtn{bits=8 group=16}"),
)
"""Decoder, and the passes before ``sample``: what a trigger and codes change."""

OPTIONS = (
    Sampling(),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.7, top_k=5, seed=1),
    Sampling(temperature=1.3, top_p=0.8, min_p=0.05, seed=2**40 + 5),
)

models = pytest.mark.parametrize(("name", "passes"), MODELS)


def drawing(name: str, passes: str) -> str:
    return f"{passes},sample" if passes else "sample"


@models
@pytest.mark.parametrize("sampling", OPTIONS, ids=["greedy", "drawn", "top_k", "top_p"])
def test_the_model_draws_what_the_host_draws(name: str, passes: str, sampling: Sampling) -> None:
    """One by one and in a padded batch; greedily, and for one seed."""
    prompts = [prompt(n, seed=n) for n in (3, 17, 8)]
    ours, hosts = artifact(name, drawing(name, passes)), artifact(name, passes)
    for given in (prompts[1], prompts):
        assert ours.generate(given, max_tokens=40, sampling=sampling) == hosts.generate(
            given, max_tokens=40, sampling=sampling
        )


def test_seeds_and_rows_differ() -> None:
    model, ids = artifact("llama", "sample"), prompt(9)
    hot = Sampling(temperature=2.0, seed=1)
    rows = model.generate([ids, ids], max_tokens=20, sampling=hot)
    assert rows[0].tokens != rows[1].tokens
    assert rows[0] == model.generate(ids, max_tokens=20, sampling=hot)
    assert rows[0] != model.generate(ids, max_tokens=20, sampling=Sampling(temperature=2.0, seed=2**32 + 1))


def test_the_log_probabilities_are_those_of_the_model() -> None:
    """Whatever the options are by which a token was drawn."""
    ids = prompt(9)
    made = artifact("llama", "sample").generate(ids, max_tokens=12, sampling=OPTIONS[2])
    assert made.logprobs is not None
    want = artifact("llama").score([*ids, *made.tokens])[len(ids) - 1 :]
    np.testing.assert_allclose(made.logprobs, want, atol=1e-5)


def test_a_seed_gives_one_text_in_every_host() -> None:
    model, ids = artifact("llama", "sample"), prompt(9)
    options = {"temperature": 0.9, "top_p": 0.9, "seed": 12345}
    want = model.generate(ids, max_tokens=24, sampling=Sampling(**options))  # type: ignore[arg-type]
    assert node.generate(model.path, ids, 24, sampling=options) == list(want.tokens)


def test_what_needs_logits_is_refused() -> None:
    model, ids = artifact("llama", "sample"), prompt(9)
    with pytest.raises(InputError, match="gives no probabilities"):
        model.score(ids)
    with pytest.raises(InputError, match="without typical_p"):
        model.generate(ids, sampling=Sampling(temperature=1.0, typical_p=0.9))
    with pytest.raises(InputError, match="leave processors out"):
        model.generate(ids, processors=[lambda history, logits: logits])


def test_an_option_that_the_program_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of another maker may take some of them; none of the others is passed over in silence."""
    model = artifact("llama", "sample")
    monkeypatch.setattr(model, "_takes", model._takes - {"top_k"})
    with pytest.raises(InputError, match="without top_k; leave top_k out"):
        model.generate(prompt(9), sampling=Sampling(temperature=1.0, top_k=5, seed=1))


def test_it_is_used_once() -> None:
    with pytest.raises(PassError, match="draws its tokens already"):
        tokopt.optimize(bundle("llama"), "sample,sample")


def test_order_does_not_matter() -> None:
    """Passes that follow work on the drawing program as on the other."""
    name, passes = MODELS[-1]
    first, last = artifact(name, f"sample,{passes}"), artifact(name, drawing(name, passes))
    given = {"max_tokens": 30, "sampling": OPTIONS[1]}
    assert first.generate(prompt(60), **given) == last.generate(prompt(60), **given)
