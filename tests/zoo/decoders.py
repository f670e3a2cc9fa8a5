"""Small random-weight causal language models of every family that ``capture_lm`` must handle."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokopt.frontend.decoder import Cache
from tokopt.runtime import Generation

VOCABULARY, CONTEXT, WINDOW = 97, 320, 7

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}


def _hugging_face(config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        made = getattr(transformers, f"{config}Config")(**settings)
        model = transformers.AutoModelForCausalLM.from_config(made)
        model.generation_config.eos_token_id = None
        for name, parameter in model.named_parameters():  # as it is, every text is one token again and again
            parameter.data.mul_(4 if parameter.ndim > 1 and "embed" not in name else 1)
        return model.eval().requires_grad_(False)

    return build


class HandWritten(nn.Module):
    """What a user writes: learned positions, fused projections, attention over what the cache returns."""

    generation = Generation(context=CONTEXT, vocabulary=VOCABULARY)

    def __init__(self, hidden: int = 48, heads: int = 3, layers: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.place = nn.Embedding(VOCABULARY, hidden), nn.Embedding(CONTEXT, hidden)
        self.qkv = nn.ModuleList(nn.Linear(hidden, 3 * hidden) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.norm = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(layers + 1))
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Cache, rows: Tensor) -> Tensor:
        x = self.embedded(tokens, positions)
        for layer, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            q, k, v = qkv(self.norm[layer](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            q, k = self.turned(q, positions), self.turned(k, positions)
            y = self.attended(layer, q, (k, v), mask, cache)
            x = x + out(y.transpose(1, 2).flatten(2))
        return self.head(self.norm[-1](x)[:, rows])

    def embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.embed(tokens) + self.place(positions)

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        return x

    def attended(
        self, layer: int, queries: Tensor, new: tuple[Tensor, Tensor], mask: Tensor, cache: Cache
    ) -> Tensor:
        keys, values = cache.update(layer, *new)
        return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)

    def whole(self, tokens: Tensor) -> Tensor:
        """Logits [batch, tokens, vocabulary] of texts [batch, tokens], without a cache."""
        places = torch.arange(tokens.shape[1])
        causal = torch.ones(len(places), len(places), dtype=torch.bool).tril()[None, None]
        return self(tokens, places[None], causal, _NoCache(), places)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The reference: the whole text again for every token."""
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.whole(torch.tensor([ids]))[0, -1].argmax()))
        return ids[len(prompt) :]


class HandRotary(HandWritten):
    """Rotary embeddings of neighbouring channels (GPT-J's form) in place of learned positions."""

    def embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.embed(tokens)

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        pairs = x.shape[-1] // 2
        angles = positions[:, None, :, None] * 100.0 ** (-torch.arange(pairs) / pairs)
        even, odd = x[..., ::2], x[..., 1::2]
        turned = even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()
        return torch.stack(turned, dim=-1).flatten(-2)


class _NoCache:
    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values


def _hand_written(kind: type[HandWritten]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return kind().eval().requires_grad_(False)

    return build


_GEMMA = {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}

DECODERS: MappingProxyType[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "llama": _hugging_face("Llama", **GROUPED, tie_word_embeddings=True),
        "qwen2": _hugging_face("Qwen2", **GROUPED),
        "qwen3": _hugging_face("Qwen3", **GROUPED, head_dim=16),
        "mistral": _hugging_face("Mistral", **GROUPED, sliding_window=WINDOW),
        "gemma3": _hugging_face("Gemma3Text", **_GEMMA, layer_types=["sliding_attention", "full_attention"]),
        "gpt2": _hugging_face(
            "GPT2",
            vocab_size=VOCABULARY,
            n_embd=96,
            n_layer=2,
            n_head=4,
            n_positions=CONTEXT,
            bos_token_id=1,
            eos_token_id=None,
        ),
        "opt": _hugging_face(
            "OPT",
            **{key: value for key, value in SHAPE.items() if key != "intermediate_size"},
            ffn_dim=80,
            word_embed_proj_dim=48,
        ),
        "gpt_neox": _hugging_face("GPTNeoX", **SHAPE),
        "phi": _hugging_face("Phi", **SHAPE),
        "hand_written": _hand_written(HandWritten),
        "hand_rotary": _hand_written(HandRotary),
    }
)
"""Name -> build. Sizes differ from each other and from the example's, so that no axis is taken for another."""
