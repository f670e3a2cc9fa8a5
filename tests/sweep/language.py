"""A causal language model: captured, optimised, exported, loaded, and asked beside transformers' own ``generate``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tokopt
from tests.sweep.exceptions import CONTEXT, PADDING, UNLIMITED, VOCABULARY
from tests.sweep.outcome import EQUAL, UNBUILT, WRONG, Ending
from tests.sweep.trial import ending_of, first_line, optimized
from tokopt.runtime import Generation, LanguageModel, load

PROMPTS, LONG, NEW = (3, 17, 8), 200, 24
"""Tokens of the prompts of one batch, of a long text, and those generated."""

QUANTIZED, EVICTED = "rtn{bits=8 group=16}", "knorm{budget=64 every=8}"

_CLOSE, _QUANTIZED = 1e-7, 0.05
"""Largest mean squared error of log-probabilities, as a part of their variance."""

_TIE = 1e-3
"""A gap between the two likeliest logits below which float32 may choose either."""


@dataclass(frozen=True)
class Reference:
    """What the model itself says: greedy ``tokens`` of every prompt, with the ``gaps`` between the two likeliest logits
    of each step, and the log-probabilities of a long text; ``note`` where it contradicts itself."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    gaps: list[list[float]]
    text: list[int]
    scores: np.ndarray
    note: str = ""


def trial(model: Any, folder: Path, passes: bool = True) -> Iterator[tuple[str, Ending]]:
    """The ending without a pass (named ``""``), then that of every pass."""
    try:
        wanted = reference(model)
    except Exception as error:
        yield "", Ending(UNBUILT, first_line(error))
        return

    def plain() -> Ending:
        nonlocal bundle
        bundle = tokopt.capture_lm(model, generation=_generation(model))
        ending = compared(_exported(bundle, folder / "plain.tokopt"), wanted)
        return Ending(EQUAL, wanted.note) if ending.outcome == EQUAL else ending

    bundle: Any = None
    ending = ending_of(plain)
    yield "", ending
    if ending.outcome != EQUAL or not passes:
        return

    def quantized() -> Ending:
        made = optimized(bundle, QUANTIZED)
        allowed = max(_QUANTIZED, 4 * _rounding(model, wanted))
        return scored(_exported(made, folder / "quantized.tokopt"), wanted, allowed)

    def evicted() -> Ending:
        made = optimized(bundle, EVICTED)
        runs = _exported(made, folder / "evicted.tokopt")
        runs.generate(wanted.text, max_tokens=NEW)  # evicts on its way, and NaN would stop it
        return generated(runs, wanted)

    yield QUANTIZED, ending_of(quantized)
    yield EVICTED, ending_of(evicted)


def _generation(model: Any) -> Generation | None:
    """What a user gives where the model does not say its context."""
    unlimited = type(model).__name__ in UNLIMITED
    return Generation(CONTEXT, VOCABULARY) if unlimited else None


def _exported(bundle: Any, path: Path) -> LanguageModel:
    tokopt.export(bundle, path)
    made = load(path, threads=1)
    assert isinstance(made, LanguageModel)
    return made


def text(length: int) -> list[int]:
    return np.random.default_rng(length).integers(5, VOCABULARY, length).tolist()


@torch.no_grad()
def reference(model: Any) -> Reference:
    prompts = [text(length) for length in PROMPTS]
    tokens: list[list[int]] = []
    gaps: list[list[float]] = []
    for ids in prompts:
        made = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            forced_eos_token_id=None,
            forced_bos_token_id=None,
            output_scores=True,
            return_dict_in_generate=True,
        )
        tokens.append(made.sequences[0, len(ids) :].tolist())
        best = [score[0].topk(2).values for score in made.scores]
        gaps.append([float(first - second) for first, second in best])
    note = ""
    whole = [_whole(model, ids) for ids in prompts]
    if any(
        _differs(one, row[: len(one)], gap) is not None for (one, gap), row in zip(whole, tokens, strict=True)
    ):
        tokens, gaps = [one for one, _ in whole], [two for _, two in whole]
        note = "as the model reads whole texts; transformers' generate says something else"
    long = text(LONG)
    scores = _scores(model, long)
    if not np.isfinite(scores).all():
        raise ValueError("the small random model gives NaN")
    return Reference(prompts, tokens, gaps, long, scores, note)


def _scores(model: Any, ids: list[int]) -> np.ndarray:
    """The log-probability of every token but the first."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].float()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


@torch.no_grad()
def _rounding(model: Any, wanted: Reference) -> float:
    """How far the model's own log-probabilities move where its weights are rounded: models with loops go far."""
    rounded = copy.deepcopy(model)
    for part in rounded.modules():
        if isinstance(part, torch.nn.Linear) and part.in_features % 16 == 0:
            groups = part.weight.data.unflatten(-1, (-1, 16))
            least = groups.amin(-1, keepdim=True)
            step = (groups.amax(-1, keepdim=True) - least) / 255
            part.weight.data = ((groups - least) / step).round().mul(step).add(least).flatten(-2)
    return _off(_scores(rounded, wanted.text), wanted.scores)


def _off(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(((got - wanted) ** 2).mean() / wanted.var())


def _whole(model: Any, ids: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens and gaps of a model that reads the whole text again for every token, up to one that it takes for
    padding."""
    made, gaps = list(ids), list[float]()
    while len(gaps) < NEW and PADDING not in made[len(ids) :]:
        best = model(input_ids=torch.tensor([made]), use_cache=False).logits[0, -1].topk(2)
        made.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
    return made[len(ids) :], gaps


def compared(model: LanguageModel, wanted: Reference) -> Ending:
    """Greedy tokens of a padded batch, and the log-probabilities of a text far longer than the example."""
    ending = generated(model, wanted)
    return scored(model, wanted, _CLOSE) if ending.outcome == EQUAL else ending


def generated(model: LanguageModel, wanted: Reference) -> Ending:
    made = model.generate(wanted.prompts, max_tokens=NEW)
    for got, tokens, gaps, ids in zip(made, wanted.tokens, wanted.gaps, wanted.prompts, strict=True):
        if (at := _differs(list(got.tokens[: len(tokens)]), tokens, gaps)) is not None:
            return Ending(WRONG, f"token {at} after a prompt of {len(ids)} in a padded batch is another one")
    return Ending(EQUAL)


def _differs(got: list[int], wanted: list[int], gaps: list[float]) -> int | None:
    """The first token that is another one, unless two were as likely; what follows it means nothing."""
    if len(got) != len(wanted):
        return min(len(got), len(wanted))
    for at, (one, other, gap) in enumerate(zip(got, wanted, gaps, strict=True)):
        if one != other:
            return at if gap > _TIE else None
    return None


def scored(model: LanguageModel, wanted: Reference, limit: float) -> Ending:
    error = _off(model.score(wanted.text), wanted.scores)
    if not error <= limit:
        return Ending(
            WRONG, f"log-probabilities of a text of {LONG} tokens are off by {error:.1g} of their variance"
        )
    return Ending(EQUAL)
