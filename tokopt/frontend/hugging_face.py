"""A causal language model of transformers as a decoder whose cache, masks and positions come from outside."""

# transformers is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from tokopt.errors import CaptureError
from tokopt.frontend.decoder import Cache
from tokopt.frontend.experts import experts_as_ops
from tokopt.frontend.positions import first_position, placed
from tokopt.frontend.replay import Reading, reproduces
from tokopt.frontend.rope import fixed_frequencies
from tokopt.frontend.sight import Sight
from tokopt.frontend.tables import replaced, tables


class HuggingFace(nn.Module):
    """A Hugging Face causal language model as a decoder that takes one mask per kind of layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config.get_text_config()
        self.kinds = _sights(type(model).__name__, self.config)
        self.tables = tables(model)
        self.sights = tuple(dict.fromkeys((*self.kinds.values(), *self.tables.values())))
        self.taken = inspect.signature(model.forward).parameters
        self.additive = False
        """Whether masks are numbers that are added to the logits, as attention that is written out has them."""
        self.first = 0
        """What the model calls the first position."""

    def settle(self, whole: Callable[[Tensor], Tensor], wanted: Reading) -> None:
        """Spell masks and positions as the model takes them; what it says of itself is not always so.

        ``whole`` gives the logits [batch, tokens, vocabulary] of whole texts by this module.
        """
        written_out = self.model.config._attn_implementation == "eager"
        spellings = [
            (additive, first)
            for first in dict.fromkeys((0, first_position(self.model)))
            for additive in (written_out, not written_out)
        ]
        for self.additive, self.first in spellings:
            with torch.no_grad(), suppress(Exception):
                if reproduces(wanted, whole(wanted.text[None])[0]):
                    return
        self.additive, self.first = spellings[0]  # the check of what was captured will say what is wrong

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        masks: dict[Sight, Tensor],
        cache: Cache,
        rows: Tensor,
        held: Tensor | None = None,
    ) -> Tensor:
        """As :class:`tokopt.frontend.decoder.Decoder`; ``held`` [batch, slots] are the positions of the keys."""
        from transformers.cache_utils import Cache as TransformersCache

        layers = [_layer(cache, i) for i in range(self.config.num_hidden_layers)]
        mask: Any = {kind: self._spelled(masks[sight]) for kind, sight in self.kinds.items()}
        given: dict[str, Any] = {
            "position_ids": positions + self.first if self.first else positions,
            "logits_to_keep": rows,
        }
        given = {name: value for name, value in given.items() if name in self.taken}
        keys = positions if held is None else held
        with placed(self.model, positions, keys), replaced(self.tables, masks):
            logits = self.model(
                input_ids=tokens,
                attention_mask=mask if len(mask) > 1 else next(iter(mask.values())),
                past_key_values=TransformersCache(layers=layers),
                use_cache=True,
                **given,
            ).logits
        return logits if "logits_to_keep" in given else logits[:, rows]

    def _spelled(self, mask: Tensor) -> Tensor:
        """The mask as the model's attention takes it: written out, it adds a number to the logits."""
        if not self.additive:
            return mask
        return torch.where(mask, 0.0, torch.finfo(self.model.dtype).min).to(self.model.dtype)


def _layer(cache: Cache, index: int) -> Any:
    """A cache layer of transformers that hands everything to ``cache``."""
    from transformers.cache_utils import CacheLayerMixin

    class Layer(CacheLayerMixin):
        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            self.is_initialized = True

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            return cache.update(index, key_states, value_states)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            raise CaptureError("the model builds its own attention mask, which tokopt cannot replace")

        def get_seq_length(self) -> int:
            return 0

        def get_max_length(self) -> int:
            return -1

    return Layer()


def _sights(name: str, config: Any) -> dict[str, Sight]:
    """Kind of attention layer -> what it sees."""
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return {"sliding_attention": Sight(window)} if window else {"full_attention": Sight()}
    known = {
        "full_attention": Sight(),
        "sliding_attention": Sight(window),
        "chunked_attention": Sight(chunk=getattr(config, "attention_chunk_size", None) or 0),
    }
    for kind in kinds:
        if kind not in known:
            raise CaptureError(
                f"{name} has layers of the kind {kind!r}, and capture_lm knows full, sliding and chunked attention "
                "alone"
            )
    return {kind: known[kind] for kind in sorted(set(kinds))}


@contextmanager
def traceable(model: Any) -> Iterator[None]:
    """A model whose rotary frequencies are fixed, whose attention is one op and whose experts are no loop; all is as it
    was afterwards."""
    with fixed_frequencies(model), _fused_attention(model), experts_as_ops(model):
        yield


@contextmanager
def _fused_attention(model: Any) -> Iterator[None]:
    """Attention as one op with shared keys and values unrepeated, or written out where the model has no such form."""
    variable = "TRANSFORMERS_SDPA_FORCE_GQA"
    before, spelling = os.environ.get(variable), model.config._attn_implementation
    os.environ[variable] = "1"
    try:
        _choose_attention(model, "sdpa")
        yield
    finally:
        model.set_attn_implementation(spelling)
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _choose_attention(model: Any, spelling: str) -> None:
    try:
        model.set_attn_implementation(spelling)
    except ValueError:
        model.set_attn_implementation("eager")
