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

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokopt.arguments import check_kind, check_path
from tokopt.errors import CaptureError
from tokopt.frontend.arguments import check_module, check_tokenizer
from tokopt.frontend.hugging_face import HuggingFace, traceable
from tokopt.frontend.imaginary import InReal
from tokopt.frontend.module import evaluation, explain, place_in_model
from tokopt.frontend.normalize import normalize
from tokopt.frontend.positions import first_position
from tokopt.frontend.pretrained import load_pretrained
from tokopt.frontend.purity import check_captured, refuse_random
from tokopt.frontend.replay import check_replay, readings
from tokopt.frontend.rope import longest_fixed
from tokopt.frontend.sight import Sight
from tokopt.frontend.supported import check_supported
from tokopt.frontend.texts import Texts, without_padding
from tokopt.ir.bundle import Bundle
from tokopt.ir.export import export_flat, output_specs
from tokopt.ir.format import Entry, Generation, Occupancy, Schedule, State
from tokopt.ir.graph import dtype_name
from tokopt.ir.program import AxisRange, Program, TensorSpec
from tokopt.kernels import ops
from tokopt.runtime.text import Tokenizer

Result = TypeVar("Result")

BATCH, TOKENS, ROWS, SLOTS, HELD = 2, 5, 3, 11, 4
"""Sizes of the example, all different, since ``torch.export`` takes equal ones for one axis; HELD are in use."""


def capture_lm(
    model: nn.Module | str | Path,
    *,
    tokenizer: str | None = None,
    generation: Generation | None = None,
) -> Bundle:
    """Capture a causal language model as a bundle with the program ``step``.

    ``model`` is a Hugging Face causal language model, the folder of one or a GGUF file (loaded in float32, with its
    tokenizer, chat template and stop tokens), or a hand-written :class:`Decoder`. ``tokenizer`` is the text of
    a ``tokenizer.json``, whose truncation and padding are left out. ``generation`` gives the context length, the
    vocabulary size and the stop tokens; a hand-written decoder needs it, a Hugging Face model has its own.

    Raises CaptureError when the model cannot be traced, when its masks are of a kind that tokopt does not
    know, or when ``step`` does not reproduce the model's own logits; ArtifactError when the tokenizer does not
    match.
    """
    check_tokenizer(tokenizer)
    if generation is not None:
        check_kind("generation", generation, Generation, "a Generation, as in Generation(1024, 32000)")
    if isinstance(model, (str, Path)):
        loaded, texts = load_pretrained(check_path("model", model), tokenizer)
        check_supported(loaded)
        generation = _with_texts(_generation(loaded), texts) if generation is None else generation
        return capture_lm(loaded, tokenizer=texts.tokenizer, generation=generation)
    check_module("model", model, "a module, the folder of a Hugging Face model, or a GGUF file")
    hugging_face = hasattr(model, "get_decoder") and hasattr(model, "config")
    if hugging_face:
        check_supported(model)
    generation = _generation(model) if generation is None else generation
    if hugging_face:
        _check_context(model, generation)
    if tokenizer is not None:
        tokenizer = without_padding(tokenizer)
        Tokenizer(tokenizer, generation.vocabulary)  # refuse another model's before anything is traced
    decoder: Any = HuggingFace(model) if hugging_face else model
    step = _Step(decoder, decoder.sights if hugging_face else (Sight(),), not hugging_face)
    with evaluation(model):
        wanted = _tried(model, lambda: readings(step.read, generation.vocabulary))
        with traceable(model) if hugging_face else nullcontext():
            if hugging_face:
                _tried(model, lambda: decoder.settle(step.whole, wanted[0]), _UNTOLD)
            program, states = _export(step, generation, model)
        check_replay(type(model).__name__, program, states, wanted)
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

    def __init__(self, decoder: nn.Module, sights: Sequence[Sight], plain: bool) -> None:
        super().__init__()
        self.decoder, self.sights, self.plain = decoder, tuple(sights), plain

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        tokens, positions, mask, rows, length, slots, *cache = tensors
        held = ops.cache_write(slots, positions[:, None, :, None], length)
        masks = {sight: sight.mask(held, positions, mask, length) for sight in self.sights}
        store = _Slots(length, cache)
        logits = self.call(tokens, positions, masks, store, rows, held)
        return (logits, length + tokens.shape[1], held, *store.tensors)

    def call(
        self,
        tokens: Tensor,
        positions: Tensor,
        masks: dict[Sight, Tensor],
        cache: _Slots,
        rows: Tensor,
        held: Tensor,
    ) -> Tensor:
        real = positions.clamp(min=0)
        with InReal():
            if self.plain:
                return self.decoder(tokens, real, masks[Sight()], cache, rows)
            return self.decoder(tokens, real, masks, cache, rows, held[:, 0, :, 0].clamp(min=0))

    def read(self, tokens: Tensor) -> Tensor:
        """The logits [batch, tokens, vocabulary] of whole texts, of a Hugging Face model by its own means."""
        if not self.plain:
            model: Any = self.decoder.model
            return model(input_ids=tokens, use_cache=False).logits
        return self.whole(tokens)

    def uncached(self, tokens: Tensor, notes: _Slots) -> Tensor:
        """The logits of whole texts; ``notes`` only notes what it is given."""
        rows = torch.arange(tokens.shape[1])
        masks = {sight: sight.causal(rows).expand(len(tokens), 1, -1, -1) for sight in self.sights}
        places = rows.expand(len(tokens), -1)
        return self.call(tokens, places, masks, notes, rows, places[:, None, :, None])

    def whole(self, tokens: Tensor) -> Tensor:
        """The logits of whole texts [batch, tokens, vocabulary], without a cache."""
        return self.uncached(tokens, _Slots(None, ()))

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer for the example's new tokens, from one run without a cache."""
        notes = _Slots(None, ())
        with torch.no_grad(), _Real():
            self.uncached(torch.zeros(BATCH, TOKENS, dtype=torch.int64), notes)
        if sorted(notes.shapes) != list(range(len(notes.shapes))) or not notes.shapes:
            raise CaptureError(
                f"it updated the cache of the layers {sorted(notes.shapes)}; number them from 0 without a gap"
            )
        return [notes.shapes[layer] for layer in sorted(notes.shapes)]


class _Real(TorchDispatchMode):
    """Runs what has no complex numbers."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.is_complex():
            raise CaptureError(
                f"it computes with complex numbers ({func}), which no engine knows; turn keys and queries with sines "
                "and cosines"
            )
        return made


_UNREAD = "fails on a text of a few tokens{}; capture_lm takes models that run there as they are"
_UNTOLD = (
    "does not run with positions, a mask and a cache that are given to it{}, so there is no step to capture; make it "
    "compute with those, or capture it whole with tokopt.capture"
)


def _tried(model: nn.Module, run: Callable[[], Result], fault: str = _UNREAD) -> Result:
    """What a run of the model gives; what goes wrong in it is a CaptureError of one sentence, ``fault``."""
    try:
        return run()
    except CaptureError as error:
        raise CaptureError(f"{type(model).__name__} cannot be captured: {error}") from error
    except Exception as error:
        raise CaptureError(f"{type(model).__name__} {fault.format(place_in_model(error))}") from error


def _export(step: _Step, generation: Generation, model: nn.Module) -> tuple[Program, tuple[State, ...]]:
    layers = _tried(model, step.layers, _UNTOLD)
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
        graph, ranges = export_flat(step, example, inputs, ranges)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(explain(error, model, inputs, fixable=False)) from error
    aliases = {f"next_{state.name}": state.name for state in states if state.occupancy is not None}
    program = Program(graph, inputs, outputs, ranges, example, aliases)
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


def _generation(model: Any) -> Generation:
    """Context length, vocabulary and special tokens, as the model's configuration has them."""
    name = type(model).__name__
    config: Any = model.config.get_text_config() if hasattr(model, "config") else None
    vocabulary = getattr(config, "vocab_size", None)
    context = next((size for key in _CONTEXTS if (size := getattr(config, key, None)) is not None), None)
    if context is None or vocabulary is None:
        raise CaptureError(
            f"{name} does not say its context length and vocabulary; pass "
            "generation=Generation(context=..., vocabulary=...)"
        )
    context -= first_position(model)
    exact = longest_fixed(config)
    if exact is not None and exact < context:
        warnings.warn(
            f"the context of {name} is {exact} positions instead of {context}: {_TURNED}", stacklevel=3
        )
    own = getattr(model, "generation_config", None)
    eos = getattr(own, "eos_token_id", None)
    eos = getattr(config, "eos_token_id", None) if eos is None else eos
    return Generation(
        context=min(context, exact or context),
        vocabulary=vocabulary,
        eos=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,),
        bos=getattr(config, "bos_token_id", None),
    )


_CONTEXTS = ("max_position_embeddings", "max_seq_len", "max_target_positions", "n_positions")
"""How configurations call the context length."""

_TURNED = (
    "a longer text is turned by other rotary frequencies as a whole, which keys in a cache cannot follow"
)


def _check_context(model: Any, generation: Generation) -> None:
    exact = longest_fixed(model.config.get_text_config())
    if exact is not None and generation.context > exact:
        raise CaptureError(
            f"{type(model).__name__} cannot have a context of {generation.context} positions: {_TURNED}; "
            f"pass a generation with context={exact}"
        )


def _with_texts(generation: Generation, texts: Texts) -> Generation:
    """What a model's own files say of chats and special tokens, beside its context and vocabulary."""
    others = dict(texts.chat_templates)
    return replace(
        generation,
        chat_template=others.pop("default", None),
        chat_templates=others,
        special_tokens=texts.special_tokens,
    )
