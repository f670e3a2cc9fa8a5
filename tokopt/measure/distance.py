"""How far two language models are apart: what their predictions of the same tokens have in common."""

from __future__ import annotations

import numpy as np

from tokopt.runtime.numerics import divergences, log_softmax


def predictions(before: np.ndarray, after: np.ndarray, following: np.ndarray) -> np.ndarray:
    """A row of numbers per token [tokens, 4] float64, for the logits of two models [tokens, vocabulary].

    The KL divergence of the second model from the first in nats, whether their first choices are equal, and the
    negative log-likelihoods by both of the token that does follow (``following`` [tokens]).
    """
    old, new = log_softmax(before), log_softmax(after)
    places = np.arange(len(following))
    columns = (
        divergences(before, after),
        old.argmax(-1) == new.argmax(-1),
        -old[places, following],
        -new[places, following],
    )
    return np.stack(columns, axis=1)
