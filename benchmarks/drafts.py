"""How often a drafter's proposals are right, by their rank: ``python -m benchmarks.drafts logitspec``.

SmolLM2-135M (``keep_grid``) writes after the prompts of :mod:`benchmarks.speculate`. At every place of the texts the
drafter of ``speculate`` is asked for children of the last token, each with one child of its own. Printed are the shares
of places at which the child of each rank is right, and of those at which the child below it is right as well: what the
drafter's ``rates`` and ``below`` should say.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.speculate import ENGINES, KINDS, TEMPERATURES, artifact, prompts
from tokopt.ir.format import BATCH, Generation, State
from tokopt.passes.speculate.drafters import DRAFTERS, Drafter, load_drafter
from tokopt.passes.speculate.tree import tree
from tokopt.runtime import LanguageModel, Sampling, load

RANKS = 9
"""Children of the root; below them is one of each."""

SHAPE = tree(torch.tensor([-1, *[0] * RANKS, *range(1, RANKS + 1)]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drafts", description=__doc__)
    parser.add_argument(
        "drafter", choices=[name for name in DRAFTERS if name in ("prompt_lookup", "logitspec")]
    )
    parser.add_argument("--prompts", type=int, default=2, help="of a kind, 8 at most (default: 2)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each (default: 64)")
    options = parser.parse_args()
    model, drafter = load(artifact(ENGINES["without"].pipeline), verify=False), load_drafter(options.drafter)
    assert isinstance(model, LanguageModel)
    given = prompts(model)
    for temperature in TEMPERATURES:
        right, places = np.zeros((2, RANKS), int), 0
        for ids in (ids for kind in KINDS for ids in given[kind][: options.prompts]):
            for found in each_place(model, drafter, ids, temperature, options.tokens):
                right, places = right + found, places + 1
        below = right[1] / np.maximum(right[0], 1)
        print(f"temperature {temperature:g}, {places} places")
        print(f"  right by rank: {(right[0] / places).round(3).tolist()}")
        print(f"  below, given the parent: first {below[0]:.2f}, others {_others(right):.2f}")


def _others(right: np.ndarray) -> float:
    return float(right[1, 1:].sum() / max(right[0, 1:].sum(), 1))


def each_place(
    model: LanguageModel, drafter: Drafter, ids: list[int], temperature: float, tokens: int
) -> Iterator[np.ndarray]:
    """Whether the first right child of each rank, and the one below it, is right [2, ranks], place by place."""
    sampling = Sampling(temperature=temperature, seed=1)
    done = model.generate(ids, max_tokens=tokens, logprobs=RANKS, sampling=sampling)
    assert done.top_logprobs is not None
    settings = Generation(len(ids) + tokens, model.settings.vocabulary)
    blank = [_blank(state) for state in drafter.states(settings)]
    for place in range(1, len(done.tokens) - 1):
        text = torch.tensor([[*ids, *done.tokens[:place]]])
        logits = torch.full((1, 1, settings.vocabulary), -torch.inf)
        for token, logprob in done.top_logprobs[place - 1].items():
            logits[0, 0, token] = logprob
        held = drafter.read(text, torch.arange(text.shape[1])[None], logits, *blank)
        proposed = drafter.propose(text[:, -1], torch.tensor([text.shape[1] - 1]), SHAPE, *held)[0].numpy()
        first, below = proposed[1 : RANKS + 1], proposed[RANKS + 1 :]
        right = (first == done.tokens[place]) & (np.cumsum(first == done.tokens[place]) == 1)
        yield np.stack([right, right & (below == done.tokens[place + 1])])


def _blank(state: State) -> torch.Tensor:
    shape = [1 if axis == BATCH else axis for axis in state.axes]
    return torch.full(shape, int(state.initial), dtype=getattr(torch, state.dtype))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
