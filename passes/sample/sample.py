"""Drawing the next token inside the program: what goes out is a token, not logits over the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tokopt.errors import PassError
from tokopt.ir.bundle import Bundle, Semantics, fresh
from tokopt.ir.format import BATCH, DRAWING, State, emits_tokens
from tokopt.ir.program import TensorSpec
from tokopt.kernels import ops
from tokopt.pipeline.base import Context, Pass, PassResult
from tokopt.rewrite.cache import ProgramEdit, language_program
from tokopt.rewrite.edit import call, open_graph


@dataclass(frozen=True)
class SampleTokens(Pass):
    """Let the program that reads and decodes give the next token of every row instead of logits.

    Temperature, top-k, top-p, min-p and the seed become inputs, a number for each row; a temperature of 0, which hosts
    give by default, takes the likeliest token. Random numbers follow from the seed, the row and a counter in the state
    (Threefry-2x32, Salmon et al., SC 2011), so that a seed gives the same text in every host. The thresholds of top-k
    and top-p are bisected, and nothing is sorted (:mod:`tokopt.kernels.truncated_softmax.reference`).

    A host that can only call programs then generates texts, and is told how probable each token was. What needs logits
    is gone: scores of given texts, penalties and a caller's own processors.
    """

    name: ClassVar[str] = "sample"
    semantics: ClassVar[Semantics] = "lossless"

    def requires(self, bundle: Bundle) -> None:
        """Language models whose one program gives logits."""
        name = language_program(self.name, bundle)
        if emits_tokens(bundle.programs[name]):
            raise PassError(f"{self.name}: program {name!r} draws its tokens already; use the pass once")

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Draw from the logits of the last token."""
        name = language_program(self.name, bundle)
        edit = ProgramEdit(bundle, name, open_graph(bundle.programs[name]))
        edit.fix_input("rows", torch.tensor([-1]))
        batch = edit.example[0].shape[0]
        counter = State(edit.free("drawn"), "counter", "int64", (BATCH,))
        operands = [edit.take(counter, torch.arange(batch))]
        operands += [edit.add_input(spec, value) for spec, value in _inputs(edit, batch)]
        place = [spec.role for spec in edit.outputs].index("logits")
        logits, graph = edit.results[place], edit.module.graph
        with graph.inserting_before(graph.output_node()):
            tokens, count, logprobs, drawn = call(graph, draw_next, logits, *operands, like=logits)
        taken = [spec.name for spec in (*edit.inputs, *edit.outputs)]
        edit.results[place : place + 1] = [tokens, count, logprobs]
        edit.outputs[place : place + 1] = [
            TensorSpec(fresh("next_tokens", taken), "int64", (BATCH, 1), "tokens"),
            TensorSpec(fresh("count", taken), "int64", (BATCH,), "count"),
            TensorSpec(fresh("logprobs", taken), "float32", (BATCH, 1), "logprobs"),
        ]
        edit.give(counter, drawn)
        programs = {**bundle.programs, name: edit.finish()}
        return PassResult(replace(bundle, programs=programs, states=tuple(edit.states.values())), 1)


def _inputs(edit: ProgramEdit, batch: int) -> Iterator[tuple[TensorSpec, Tensor]]:
    """What says how many tokens a row may have, and how they are drawn; examples in which all of it matters."""
    example = {
        "limit": 1,
        "temperature": 0.8,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.05,
        "seed": 7,
        "stream": 1,
    }
    for role, dtype in (("limit", "int64"), *((role, dtype) for role, (dtype, _) in DRAWING.items())):
        spec = TensorSpec(edit.free(role), dtype, (BATCH,), role)
        yield spec, torch.full((batch,), example[role], dtype=getattr(torch, dtype))


def draw_next(
    logits: Tensor,
    counter: Tensor,
    limit: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    stream: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The token [batch, 1] that follows ``logits`` [batch, 1, vocabulary], and the next counter [batch].

    Between them the token's count [batch], and the logarithm of the probability that the model itself gives it
    [batch, 1]. Operands are [batch]; a row whose ``limit`` is 0 gets no token and uses no random number.
    """
    uniform = ops.uniforms(seed, stream, counter, 1)
    token, logprobs = ops.draw_tokens(logits.float(), uniform, temperature, top_k, top_p, min_p)
    count = limit.clamp(0, 1)
    return token, count, logprobs, counter + count
