"""The table of zoo models. Sizes are chosen so that no two axes of a model can be mistaken for each other."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests.zoo import blocks

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def declare_torchvision_operators() -> torch.library.Library | None:
    """Make a torchvision importable whose compiled operators do not load (a CUDA wheel beside a CPU torch).

    timm needs torchvision, and transformers imports whichever it finds. The returned library must stay alive.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


sys.path.append(str(Path(sys.prefix) / "zoo"))  # where `make test` installs timm and torchvision
_TORCHVISION = declare_torchvision_operators()

HIDDEN, HEADS, INNER, LAYERS = 48, 4, 80, 2
DEEP = {"num_hidden_layers": 3}
"""For models of every kind (a class token, a pooling head, padded text, layers of two kinds): a block of these can be
left alone between two that are reduced."""

VOCABULARY, TOKENS = 97, 21
BATCH = 5
"""The batch size of examples: neither 0, 1, the channels of an image, nor any other size of a model."""

Inputs = dict[str, Tensor]
Style = Literal["pre", "post", "parallel", "windows"]


@dataclass(frozen=True)
class Entry:
    """One zoo model.

    ``build()`` gives the seeded model in eval mode without gradients, ``inputs(batch)`` its named example
    tensors. ``dynamic`` names the axes of every input (None: static), as ``tokopt.capture`` takes them.
    ``tokens`` is the length of the token axis inside the blocks for ``inputs``, ``prefix`` the number of
    leading tokens that the model adds (class, registers) or an output singles out, ``layers`` the number of
    self-attention blocks. ``per_token`` names outputs with a token axis; ``mask`` the input that marks
    padding; ``rope`` and ``bias`` tell of per-token side tensors; ``pooling`` of an attention pooling head.
    ``needs`` is a package that must be importable.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[..., Inputs]
    dynamic: Mapping[str, tuple[str | None, ...]]
    tokens: int
    prefix: int = 0
    layers: int = LAYERS
    style: Style = "pre"
    per_token: tuple[str, ...] = ()
    mask: str | None = None
    rope: bool = False
    bias: bool = False
    pooling: bool = False
    needs: str | None = None

    @property
    def available(self) -> bool:
        """Whether the package that this model comes from is installed."""
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a seeded random value of realistic scale; eval mode, no gradients.

    Default initialisations leave biases zero, norms one and features nearly equal, which hides mistakes.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and name.endswith("weight"):
                parameter.copy_(noise * 1.2 / math.sqrt(parameter[0].numel()))
            elif parameter.ndim >= 2:
                parameter.copy_(noise * 0.5)
            else:
                centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
                layer_scale = any(word in name for word in ("lambda", "gamma", "ls1", "ls2"))
                parameter.copy_((0.8 if layer_scale else centre) + 0.1 * noise)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------- vision


def images(size: int, name: str = "pixel_values") -> Callable[..., Inputs]:
    """A maker of random images ``name`` [batch, 3, size, size]."""

    def make(batch: int = BATCH, seed: int = 1) -> Inputs:
        return {name: torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))}

    return make


def image_axes(name: str = "pixel_values") -> dict[str, tuple[str | None, ...]]:
    return {name: ("batch", None, None, None)}


def hugging_face(model: str, config: str, seed: int = 0, **options: Any) -> Callable[[], nn.Module]:
    """A builder of ``transformers.<model>(transformers.<config>(**sizes of the zoo, **options))``."""

    def build() -> nn.Module:
        import transformers

        sizes = {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": INNER,
        }
        settings = getattr(transformers, config)(**{**sizes, **options})
        return randomize(getattr(transformers, model)(settings), seed)

    return build


def swin() -> nn.Module:
    from transformers import SwinConfig, SwinModel

    sizes = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    return randomize(SwinModel(SwinConfig(image_size=32, patch_size=4, **sizes)))


def mae() -> nn.Module:
    return hugging_face("ViTMAEModel", "ViTMAEConfig", image_size=32, patch_size=4, mask_ratio=0.25)()


def mae_inputs(batch: int = BATCH, seed: int = 1) -> Inputs:
    """Images and the masking noise [batch, patches], an input so that the encoder is deterministic."""
    noise = torch.rand(batch, 64, generator=torch.Generator().manual_seed(seed + 1))
    return {**images(32)(batch, seed), "noise": noise}


def encoder(block: type[blocks.PreNormBlock], attention: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A builder of the hand-written encoder on 28x28 images with patches of 4: 50 tokens."""

    def build() -> nn.Module:
        return randomize(
            blocks.Encoder(28, 4, HIDDEN, [block(HIDDEN, INNER, attention()) for _ in range(LAYERS)])
        )

    return build


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        timm = importlib.import_module("timm")
        return randomize(timm.create_model(name, img_size=28, depth=LAYERS, **options))

    return build


# ------------------------------------------------------------------------------------------------ text


def text(batch: int = BATCH, tokens: int = TOKENS, seed: int = 1) -> Inputs:
    """Token ids and attention mask [batch, tokens], padded on the right to different lengths.

    Row 0 has no padding; row 1 is padded more than any other.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (batch, tokens), generator=generator)
    lengths = torch.tensor([tokens, tokens - 9, tokens - 2, tokens, tokens - 5])[torch.arange(batch) % 5]
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}


TEXT_AXES: dict[str, tuple[str | None, ...]] = {
    "input_ids": ("batch", "tokens"),
    "attention_mask": ("batch", "tokens"),
}
BERT_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "pad_token_id": 1,
}


def minilm() -> nn.Module:
    encoder = hugging_face("BertModel", "BertConfig", seed=3, **BERT_SIZES, **DEEP)()
    return blocks.MeanPooledText(encoder).eval()


def spectrogram(batch: int = BATCH, seed: int = 1) -> Inputs:
    """Log-mel features [batch, 16, 60]: 30 tokens after the strided convolution."""
    return {"input_features": torch.randn(batch, 16, 60, generator=torch.Generator().manual_seed(seed))}


def whisper() -> nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=HIDDEN,
        encoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=INNER,
        num_mel_bins=16,
        max_source_positions=30,
    )
    return randomize(WhisperEncoder(config))


# ----------------------------------------------------------------------------------------------- table

HIDDEN_STATE = ("last_hidden_state",)


def image_entry(name: str, build: Callable[[], nn.Module], size: int, tokens: int, **facts: Any) -> Entry:
    argument = facts.pop("argument", "pixel_values")
    return Entry(name, build, images(size, argument), image_axes(argument), tokens, **facts)


def text_entry(name: str, build: Callable[[], nn.Module], **facts: Any) -> Entry:
    facts = {"style": "post", "mask": "attention_mask", **facts}
    return Entry(name, build, text, TEXT_AXES, TOKENS, **facts)


_ENTRIES = (
    image_entry(
        "vit",
        hugging_face("ViTModel", "ViTConfig", image_size=24, patch_size=4, pooler_output_size=56, **DEEP),
        *(24, 37),
        layers=3,
        prefix=1,
        per_token=HIDDEN_STATE,
    ),
    image_entry(
        "deit",
        hugging_face("DeiTModel", "DeiTConfig", image_size=24, patch_size=4, pooler_output_size=56),
        *(24, 38),
        prefix=2,
        per_token=HIDDEN_STATE,
    ),
    image_entry(
        "dinov2",
        hugging_face("Dinov2Model", "Dinov2Config", image_size=28, patch_size=4, mlp_ratio=2),
        *(28, 50),
        prefix=1,
        per_token=HIDDEN_STATE,
    ),
    image_entry(
        "dinov2_registers",
        hugging_face(
            "Dinov2WithRegistersModel",
            "Dinov2WithRegistersConfig",
            image_size=28,
            patch_size=4,
            mlp_ratio=2,
            num_register_tokens=3,
        ),
        *(28, 53),
        prefix=4,
        per_token=HIDDEN_STATE,
    ),
    image_entry(
        "dinov3",
        hugging_face("DINOv3ViTModel", "DINOv3ViTConfig", image_size=28, patch_size=4, num_register_tokens=2),
        *(28, 52),
        prefix=3,
        per_token=HIDDEN_STATE,
        rope=True,
    ),
    image_entry(
        "clip",
        hugging_face("CLIPVisionModel", "CLIPVisionConfig", image_size=24, patch_size=4, projection_dim=56),
        *(24, 37),
        prefix=1,
        per_token=HIDDEN_STATE,
    ),
    image_entry(
        "siglip",
        hugging_face("SiglipVisionModel", "SiglipVisionConfig", image_size=28, patch_size=4, **DEEP),
        *(28, 49),
        layers=3,
        per_token=HIDDEN_STATE,
        pooling=True,
    ),
    image_entry(
        "beit",
        hugging_face(
            "BeitModel",
            "BeitConfig",
            image_size=24,
            patch_size=4,
            use_relative_position_bias=True,
            use_mean_pooling=True,
        ),
        *(24, 37),
        prefix=1,
        per_token=HIDDEN_STATE,
        bias=True,
    ),
    Entry(
        "mae",
        mae,
        mae_inputs,
        {**image_axes(), "noise": ("batch", None)},
        tokens=49,
        prefix=1,
        per_token=HIDDEN_STATE,
    ),
    image_entry(
        "swin",
        swin,
        *(32, 64),
        layers=4,
        style="windows",
        per_token=HIDDEN_STATE,
        bias=True,
    ),
    text_entry(
        "bert",
        hugging_face("BertModel", "BertConfig", **BERT_SIZES, **DEEP),
        layers=3,
        prefix=1,
        per_token=HIDDEN_STATE,
    ),
    text_entry(
        "roberta",
        hugging_face("RobertaModel", "RobertaConfig", **BERT_SIZES),
        prefix=1,
        per_token=HIDDEN_STATE,
    ),
    text_entry(
        "distilbert",
        hugging_face(
            "DistilBertModel",
            "DistilBertConfig",
            dim=HIDDEN,
            n_layers=LAYERS,
            n_heads=HEADS,
            hidden_dim=INNER,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            pad_token_id=1,
        ),
        per_token=HIDDEN_STATE,
    ),
    text_entry("minilm", minilm, layers=3),
    text_entry(
        "modernbert",
        hugging_face(
            "ModernBertModel",
            "ModernBertConfig",
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
            cls_token_id=2,
            sep_token_id=3,
            local_attention=8,
            global_attn_every_n_layers=2,
            **DEEP,
        ),
        layers=3,
        style="pre",
        per_token=HIDDEN_STATE,
        rope=True,
    ),
    Entry(
        "whisper",
        whisper,
        spectrogram,
        {"input_features": ("batch", None, None)},
        tokens=30,
        per_token=HIDDEN_STATE,
    ),
    image_entry(
        "explicit_softmax",
        encoder(blocks.PreNormBlock, lambda: blocks.ExplicitAttention(HIDDEN, HEADS)),
        *(28, 50),
        prefix=1,
        argument="images",
    ),
    image_entry(
        "mha",
        encoder(blocks.PreNormBlock, lambda: blocks.ModuleAttention(HIDDEN, HEADS, need_weights=True)),
        *(28, 50),
        prefix=1,
        argument="images",
    ),
    image_entry(
        "mha_fused",
        encoder(blocks.PreNormBlock, lambda: blocks.ModuleAttention(HIDDEN, HEADS, need_weights=False)),
        *(28, 50),
        prefix=1,
        argument="images",
    ),
    image_entry(
        "parallel",
        encoder(blocks.ParallelBlock, lambda: blocks.FunctionalAttention(HIDDEN, HEADS)),
        *(28, 50),
        prefix=1,
        style="parallel",
        argument="images",
    ),
    image_entry(
        "timm_vit",
        timm_model(
            "vit_tiny_patch16_224",
            patch_size=4,
            embed_dim=HIDDEN,
            num_heads=HEADS,
            num_classes=11,
        ),
        *(28, 50),
        prefix=1,
        argument="x",
        needs="timm",
    ),
    image_entry(
        "timm_eva02",
        timm_model(
            "eva02_tiny_patch14_224",
            patch_size=4,
            embed_dim=HIDDEN,
            num_heads=HEADS,
            num_classes=11,
        ),
        *(28, 50),
        prefix=1,
        argument="x",
        rope=True,
        needs="timm",
    ),
)

ZOO: Mapping[str, Entry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
