"""Capture of causal language models: one program, ``step``, whose cache is data.

``step`` serves prefill, decoding and the verification of a tree alike. With named axes:

========================  =======================================  ==========================================
input                     shape, dtype                             meaning
========================  =======================================  ==========================================
``tokens``                [batch, tokens] int64                    new tokens
``positions``             [batch, tokens] int64                    their positions, -1 for padding
``mask``                  [batch, tokens, tokens] bool             which new token sees which: causal, or a tree
``rows``                  [rows] int64                             the tokens whose logits are wanted
``length``                [batch] int64, state                     slots in use; the next token goes there
``slots``                 [batch, 1, slots, 1] int64, state        position of the token in each slot, or -1
``key_i``, ``value_i``    [batch, heads, slots, channels], state   the cache of layer i, preallocated
========================  =======================================  ==========================================

It returns ``logits`` [batch, rows, vocabulary] and the next state. Slots and positions are separate: nothing
assumes that slot i holds position i, so passes may evict and move what a layer holds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokopt.errors import CaptureError, MissingDependencyError
from tokopt.frontend.module import evaluation, explain
from tokopt.frontend.normalize import normalize
from tokopt.frontend.purity import check_captured, refuse_random
from tokopt.frontend.texts import Texts, read_texts, without_padding
from tokopt.ir.bundle import Bundle
from tokopt.ir.calls import first_call
from tokopt.ir.export import export_flat, output_specs, unlifted
from tokopt.ir.format import Entry, Generation, Occupancy, Schedule, State
from tokopt.ir.graph import dtype_name
from tokopt.ir.program import AxisRange, Program, TensorSpec
from tokopt.kernels import ops
from tokopt.runtime.text import Tokenizer

BATCH, TOKENS, ROWS, SLOTS, HELD = 2, 5, 3, 11, 4
"""Sizes of the example, all different, since ``torch.export`` takes equal ones for one axis; HELD are in use."""


class Cache(Protocol):
    """What a decoder is given to keep its keys and values in."""

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values [batch, heads, tokens, channels]; return all [batch, heads, slots, channels]."""
        ...


class Decoder(Protocol):
    """A hand-written language model that :func:`capture_lm` takes: a module whose ``forward`` has this form."""

    def __call__(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Cache, rows: Tensor) -> Tensor:
        """Return the logits [batch, rows, vocabulary] of the tokens ``rows`` [rows] int64.

        ``tokens`` and ``positions`` are [batch, tokens] int64. Attention is
        ``scaled_dot_product_attention(queries, *cache.update(layer, keys, values), attn_mask=mask)`` with
        ``mask`` [batch, 1, tokens, slots] bool.
        """
        ...


def capture_lm(
    model: nn.Module | str | Path,
    *,
    tokenizer: str | None = None,
    generation: Generation | None = None,
) -> Bundle:
    """Capture a causal language model as a bundle with the program ``step``.

    ``model`` is a Hugging Face causal language model, the folder of one (loaded in float32, with its
    tokenizer, chat template and stop tokens), or a hand-written :class:`Decoder`. ``tokenizer`` is the text of
    a ``tokenizer.json``, whose truncation and padding are left out. ``generation`` gives the context length, the
    vocabulary size and the stop tokens; a hand-written decoder needs it, a Hugging Face model has its own.

    Raises CaptureError when the model cannot be traced, when its masks are of a kind that tokopt does not
    know, or when ``step`` does not reproduce the model's own logits; ArtifactError when the tokenizer does not
    match.
    """
    if isinstance(model, (str, Path)):
        loaded, texts, generation = _from_folder(Path(model), tokenizer, generation)
        return capture_lm(loaded, tokenizer=texts.tokenizer, generation=generation)
    hugging_face = hasattr(model, "get_decoder") and hasattr(model, "config")
    if generation is None:
        if not hugging_face:
            raise CaptureError(
                f"{type(model).__name__} does not say its context length and vocabulary; pass "
                "generation=Generation(context=..., vocabulary=...)"
            )
        generation = _generation(model)
    if tokenizer is not None:
        tokenizer = without_padding(tokenizer)
        Tokenizer(tokenizer, generation.vocabulary)  # refuse another model's before anything is traced
    with evaluation(model), _fused_attention(model if hugging_face else None):
        decoder: Any = _HuggingFace(model) if hugging_face else model
        windows = decoder.windows if hugging_face else (0,)
        program, states = _export(_Step(decoder, windows, not hugging_face), generation, model)
        if hugging_face:
            _check_against(model, program, states, generation.vocabulary)
    schedule = Schedule((Entry("step", "prefill", "tokens"), Entry("step", "decode", "tokens")))
    return Bundle({"step": program}, schedule, states, tokenizer=tokenizer, generation=generation)


# --- the program ------------------------------------------------------------------------------------------


class _Slots:
    """The cache of all layers: tensors in, tensors out. Without ``tensors`` it only notes what it is given."""

    def __init__(self, length: Tensor | None, tensors: Sequence[Tensor]) -> None:
        self.length, self.tensors = length, list(tensors)
        self.shapes: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.length is None:
            self.shapes[layer] = (keys, values)
            return keys, values
        for at, new in ((2 * layer, keys), (2 * layer + 1, values)):
            self.tensors[at] = ops.cache_write(self.tensors[at], new, self.length)
        return self.tensors[2 * layer], self.tensors[2 * layer + 1]


class _Step(nn.Module):
    """A decoder in the calling convention of ``step``."""

    def __init__(self, decoder: nn.Module, windows: Sequence[int], plain: bool) -> None:
        super().__init__()
        self.decoder, self.windows, self.plain = decoder, tuple(windows), plain

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        tokens, positions, mask, rows, length, slots, *cache = tensors
        held = ops.cache_write(slots, positions[:, None, :, None], length)
        masks = {w: ops.cache_mask(held, positions, mask, length, w) for w in self.windows}
        store = _Slots(length, cache)
        logits = self.call(tokens, positions, masks, store, rows)
        return (logits, length + tokens.shape[1], held, *store.tensors)

    def call(
        self, tokens: Tensor, positions: Tensor, masks: dict[int, Tensor], cache: _Slots, rows: Tensor
    ) -> Tensor:
        real = positions.clamp(min=0)
        return self.decoder(tokens, real, masks[0] if self.plain else masks, cache, rows)

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer for the example's new tokens, from one run without a cache."""
        tokens = torch.zeros(BATCH, TOKENS, dtype=torch.int64)
        causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(BATCH, 1, -1, -1)
        notes = _Slots(None, ())
        with torch.no_grad():
            positions = torch.arange(TOKENS).expand(BATCH, -1)
            self.call(tokens, positions, dict.fromkeys(self.windows, causal), notes, torch.tensor([-1]))
        if sorted(notes.shapes) != list(range(len(notes.shapes))) or not notes.shapes:
            raise CaptureError(
                f"{type(self.decoder).__name__} updated the cache of the layers {sorted(notes.shapes)}; number "
                "them from 0 without a gap"
            )
        return [notes.shapes[layer] for layer in sorted(notes.shapes)]


def _export(step: _Step, generation: Generation, model: nn.Module) -> tuple[Program, tuple[State, ...]]:
    try:
        layers = step.layers()
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} fails on {TOKENS} tokens: {type(error).__name__}: {error}"
        ) from error
    if layers[0][0].dtype == torch.bfloat16:
        raise CaptureError(
            f"{type(model).__name__} computes in bfloat16, which numpy cannot hold; capture it in float32 "
            "(model.float(), or dtype=torch.float32 when it is loaded) and make it small by a pass"
        )
    states = _states(layers)
    inputs = (
        TensorSpec("tokens", "int64", ("batch", "tokens"), "tokens"),
        TensorSpec("positions", "int64", ("batch", "tokens"), "positions"),
        TensorSpec("mask", "bool", ("batch", "tokens", "tokens"), "mask"),
        TensorSpec("rows", "int64", ("rows",), "rows"),
        *(TensorSpec(state.name, state.dtype, state.axes, "state", state.name) for state in states),
    )
    outputs = (
        TensorSpec("logits", "float32", (), "logits"),
        *(TensorSpec(f"next_{state.name}", state.dtype, (), "state", state.name) for state in states),
    )
    ranges: Mapping[str, AxisRange] = {
        "batch": AxisRange(),
        "tokens": AxisRange(1, generation.context),
        "rows": AxisRange(),
        "slots": AxisRange(),
    }
    example = _example(layers, generation.vocabulary)
    try:
        exported, ranges = export_flat(step, example, inputs, ranges)
    except Exception as error:
        raise CaptureError(explain(error, model, inputs)) from error
    aliases = {f"next_{state.name}": state.name for state in states if state.occupancy is not None}
    program = Program(unlifted(exported), inputs, outputs, ranges, example, aliases)
    refuse_random(program.module, type(model).__name__)
    program = replace(program, outputs=output_specs(program))
    with torch.no_grad():
        check_captured(program, step(*example), type(model).__name__)
    return normalize(program), states


def _states(layers: Sequence[tuple[Tensor, Tensor]]) -> tuple[State, ...]:
    used = Occupancy("length")
    states = [
        State("length", "length", "int64", ("batch",)),
        State("slots", "position", "int64", ("batch", 1, "slots", 1), initial=-1, occupancy=used),
    ]
    for layer, pair in enumerate(layers):
        for kind, value in zip(("key", "value"), pair, strict=True):
            axes = ("batch", value.shape[1], "slots", value.shape[3])
            dtype = dtype_name(value.dtype)
            states.append(State(f"{kind}_{layer}", kind, dtype, axes, layer=layer, occupancy=used))
    return tuple(states)


def _example(layers: Sequence[tuple[Tensor, Tensor]], vocabulary: int) -> tuple[Tensor, ...]:
    """Two rows in the middle of a text, the first of which began with padding; new tokens, causal."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (BATCH, TOKENS), generator=generator)
    start = torch.tensor([[HELD - 1], [HELD]])
    slots = torch.full((BATCH, 1, SLOTS, 1), -1)
    slots[:, 0, :HELD, 0] = torch.arange(HELD) - torch.tensor([[1], [0]])
    cache = [
        torch.randn(BATCH, like.shape[1], SLOTS, like.shape[3], generator=generator).to(like.dtype)
        for pair in layers
        for like in pair
    ]
    return (
        tokens,
        start + torch.arange(TOKENS),
        torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().repeat(BATCH, 1, 1),
        torch.tensor([-1, 0, -1]),
        torch.full((BATCH,), HELD),
        slots,
        *cache,
    )


# --- Hugging Face -----------------------------------------------------------------------------------------


class _HuggingFace(nn.Module):
    """A Hugging Face causal language model as a decoder that takes one mask per sliding window."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config.get_text_config()
        self.kinds = _attention_windows(self.config)
        self.windows = tuple(sorted(set(self.kinds.values())))

    def forward(
        self, tokens: Tensor, positions: Tensor, masks: dict[int, Tensor], cache: _Slots, rows: Tensor
    ) -> Tensor:
        from transformers.cache_utils import Cache as TransformersCache

        layers = [_layer(cache, i) for i in range(self.config.num_hidden_layers)]
        mask: Any = {kind: masks[window] for kind, window in self.kinds.items()}
        return self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask if len(mask) > 1 else next(iter(mask.values())),
            past_key_values=TransformersCache(layers=layers),
            use_cache=True,
            logits_to_keep=rows,
        ).logits


def _layer(cache: _Slots, index: int) -> Any:
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


def _attention_windows(config: Any) -> dict[str, int]:
    """Kind of attention layer -> its sliding window in positions, 0 for none."""
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return {"sliding_attention": window} if window else {"full_attention": 0}
    known = {"full_attention": 0, "sliding_attention": window}
    for kind in kinds:
        if kind not in known:
            raise CaptureError(
                f"layers of the kind {kind!r} are not supported; tokopt knows full and sliding attention"
            )
    return {kind: known[kind] for kind in sorted(set(kinds))}


def _generation(model: Any) -> Generation:
    """Context length, vocabulary and special tokens, as the model's configuration has them."""
    config, own = model.config.get_text_config(), getattr(model, "generation_config", None)
    eos = getattr(own, "eos_token_id", None)
    eos = config.eos_token_id if eos is None else eos
    return Generation(
        context=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        eos=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,),
        bos=config.bos_token_id,
    )


def _from_folder(
    folder: Path, tokenizer: str | None, generation: Generation | None
) -> tuple[Any, Texts, Generation]:
    """The model, and what its files say of text and of generation, where the caller does not."""
    if not (folder / "config.json").is_file():
        raise CaptureError(f"{folder} has no config.json, so it is no folder of a Hugging Face model")
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise MissingDependencyError(
            "language models are loaded by transformers; run: pip install 'tokopt[hf]'"
        ) from error
    texts = read_texts(folder, tokenizer)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except Exception as error:  # transformers raises several unrelated classes
        line = " ".join(str(error).split())
        raise CaptureError(f"transformers cannot load {folder}: {type(error).__name__}: {line}") from error
    if generation is None:
        others = dict(texts.chat_templates)
        usual = others.pop("default", None)
        generation = replace(
            _generation(model),
            chat_template=usual,
            chat_templates=others,
            special_tokens=texts.special_tokens,
        )
    return model, texts, generation


@contextmanager
def _fused_attention(model: Any | None) -> Iterator[None]:
    """Attention as one op with shared keys and values unrepeated; everything as it was afterwards."""
    if model is None:
        yield
        return
    variable = "TRANSFORMERS_SDPA_FORCE_GQA"
    before, spelling = os.environ.get(variable), model.config._attn_implementation
    os.environ[variable] = "1"
    try:
        model.set_attn_implementation("sdpa")
        yield
    except ValueError as error:
        raise CaptureError(f"{type(model).__name__} has no fused attention: {error}") from error
    finally:
        model.set_attn_implementation(spelling)
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _check_against(model: Any, program: Program, states: Sequence[State], vocabulary: int) -> None:
    """``step`` on an empty cache must give the logits that the model itself gives without one."""
    from tokopt.runtime.numerics import check_output

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocabulary, (1, SLOTS), generator=generator)
    with torch.no_grad():
        wanted = model(input_ids=tokens, use_cache=False).logits
    got = program(*first_call(program, tokens, states))[0]
    check = check_output("logits", wanted.float().numpy(), got.float().numpy(), 1e-8)
    if not check.ok:
        raise CaptureError(
            f"the captured step of {type(model).__name__} does not reproduce the model's logits (NMSE "
            f"{check.nmse:.2g}); please report this model"
        )
