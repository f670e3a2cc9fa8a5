"""Draws of tokens: random ones, which tokens are right in float64, and every form of the op behind one call.

Needs no torch outside of the reference, so that the sanitizers need not follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from onnx import ModelProto, TensorProto, helper

from tests.kernels.linears import LIBRARY, session, unaligned
from tokopt.kernels import cpu

TYPES = {
    "logits": TensorProto.FLOAT,
    "uniform": TensorProto.FLOAT,
    "temperature": TensorProto.FLOAT,
    "top_k": TensorProto.INT64,
    "top_p": TensorProto.FLOAT,
    "min_p": TensorProto.FLOAT,
}

NEAR = 1e-6
"""The share of all weights by which sums of float32 may differ."""


@dataclass(frozen=True)
class Draws:
    """The inputs of one call by name; they may be wrong on purpose."""

    inputs: Mapping[str, np.ndarray]

    def but(self, **inputs: np.ndarray) -> Draws:
        """With other inputs."""
        return replace(self, inputs={**self.inputs, **inputs})


def draws(
    logits: np.ndarray,
    uniform: np.ndarray | float,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Draws:
    """Draws from ``logits`` [batch, rows, vocabulary] with the same options in every row."""
    batch = logits.shape[:1]
    options = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
    return Draws(
        {
            "logits": logits.astype(np.float32),
            "uniform": np.broadcast_to(np.float32(uniform), logits.shape[:2]),
            **{name: np.full(batch, number, np.float32) for name, number in options.items()},
            "top_k": np.full(batch, top_k),
        }
    )


# --- what is right ----------------------------------------------------------------------------------------


def is_right(given: Draws, place: tuple[int, int], token: int) -> bool:
    """Whether a token may be drawn: by the definition in float64, or by sums that differ from it by :data:`NEAR`."""
    logits, number = given.inputs["logits"][place], float(given.inputs["uniform"][place])
    if np.isnan(logits).any() or not np.isfinite(logits.max()):
        return token == -1
    if given.inputs["temperature"][place[0]] == 0:
        return token == logits.argmax()
    for weight in _weights(given, place):
        sums = np.cumsum(weight)
        before, after = sums[token] - weight[token], sums[token]
        reached, near = number * sums[-1], NEAR * sums[-1]
        if weight[token] > 0 and before - near <= reached < after + near:
            return True
    return False


def _weights(given: Draws, place: tuple[int, int]) -> Iterator[np.ndarray]:
    """The weights of the tokens that stay, for every way in which rounding may decide what does."""
    temperature, top_k, top_p, min_p = (
        given.inputs[name][place[0]] for name in ("temperature", "top_k", "top_p", "min_p")
    )
    logits = given.inputs["logits"][place]
    with np.errstate(over="ignore"):
        scaled = (logits - logits.max()) / max(temperature, np.finfo(np.float32).tiny)
    weight = np.exp(scaled.astype(np.float64))
    if top_k:
        weight = np.where(scaled >= _threshold(scaled, np.ones(len(weight)), top_k), weight, 0)
    for more, larger in product((1, 1 - NEAR, 1 + NEAR), repeat=2):
        kept = weight
        if top_p < 1:
            least = _threshold(scaled, weight, top_p * weight.sum() * more)
            kept = np.where(scaled >= least, weight, 0)
        yield np.where(np.exp(scaled.astype(np.float64)) >= min_p * larger, kept, 0) if min_p else kept


def _threshold(scaled: np.ndarray, weight: np.ndarray, wanted: float) -> np.float32:
    """The least logit without which the weights sum to less than wanted, as close as a bisection comes to it."""
    order = np.argsort(-scaled, kind="stable")
    enough = np.flatnonzero(np.cumsum(weight[order]) >= wanted)
    exact = scaled[order[enough[0]]] if len(enough) else -np.inf
    low, high = np.float32(-104), np.float32(1)
    for _ in range(32):
        middle = (low + high) / np.float32(2)
        low, high = (middle, high) if exact >= middle else (low, middle)
    return low


def log_probabilities(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Of every token in the softmax of the logits as they are; NaN where there is none."""
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        wide = wide - wide.max(-1, keepdims=True)
        everything = np.log(np.exp(wide).sum(-1))
        chosen = np.take_along_axis(wide, np.maximum(tokens, 0)[..., None], -1)[..., 0]
        return np.where(tokens < 0, np.nan, chosen - everything)


# --- forms ------------------------------------------------------------------------------------------------

Pair = tuple[np.ndarray, np.ndarray]


def onnx_model(given: Draws, *, logprobs: bool = True) -> ModelProto:
    """One node of the op."""
    outputs = ["token", "logprob"] if logprobs else ["token"]
    node = helper.make_node("DrawTokens", [*TYPES], outputs, name="draw", domain=cpu.DOMAIN)
    axes = {"logits": ["batch", "rows", "vocabulary"][: given.inputs["logits"].ndim]}
    kinds = {"token": TensorProto.INT64, "logprob": TensorProto.FLOAT}
    graph = helper.make_graph(
        [node],
        "draw",
        [helper.make_tensor_value_info(name, kind, axes.get(name)) for name, kind in TYPES.items()],
        [helper.make_tensor_value_info(name, kinds[name], None) for name in outputs],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(cpu.DOMAIN, cpu.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def reference_form(given: Draws, threads: int) -> Pair:
    import torch

    from tokopt.kernels.draw_tokens.reference import draw_tokens

    token, logprob = draw_tokens(**{name: torch.from_numpy(given.inputs[name].copy()) for name in TYPES})
    return token.numpy(), logprob.numpy()


def library_form(isa: str) -> Callable[[Draws, int], Pair]:
    def run(given: Draws, threads: int) -> Pair:
        inputs = {**given.inputs, "logits": unaligned(given.inputs["logits"])}
        token, logprob = session(onnx_model(given), isa, threads).run(None, inputs)
        return np.asarray(token), np.asarray(logprob)

    return run


FORMS: dict[str, Callable[[Draws, int], Pair]] = {
    "reference": reference_form,
    **({f"library-{isa}": library_form(isa) for isa in cpu.isas()} if LIBRARY else {}),
}
"""``(draws, threads) -> tokens and log-probabilities [batch, rows]``: the reference, and the library on each set."""
