"""One tower of CLIP was refused because the other is causal, and an encoder because a decoder has other tokens.

The law: every stream of tokens is reduced, or refused, on its own. What is reduced gives what the stream gives alone,
and merging equal tokens changes nothing, across the attention between two streams too. A mask that makes attention
causal counts as much as ``is_causal``, and learned queries stay, since each is read by its place.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, DetrConfig, DetrModel, ResNetConfig

import tokopt
from tests.zoo.blocks import Encoder, FunctionalAttention, PreNormBlock
from tests.zoo.entries import randomize
from tokopt.errors import PassError, PassRefused
from tokopt.ir.bundle import AppliedPass, Bundle
from tokopt.runtime import load

WIDTH = 32
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TEXTS = torch.randn(5, 12, WIDTH, generator=torch.Generator().manual_seed(2))


def blocks(count: int = 2) -> list[PreNormBlock]:
    return [PreNormBlock(WIDTH, 48, FunctionalAttention(WIDTH, 2)) for _ in range(count)]


class Text(nn.Module):
    """Tokens [batch, tokens, channels] through two blocks, then their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks())

    def forward(self, texts: Tensor) -> Tensor:
        return self.blocks(texts).mean(1)


class Towers(nn.Module):
    """Images and texts, and how similar they are."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text = Encoder(16, 4, WIDTH, blocks()), Text()

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vision, text = self.vision(images), self.text(texts)
        return vision, text, vision @ text.T


DYNAMIC = {"images": ("batch", None, None, None), "texts": ("texts", None, None)}


@cache
def towers() -> tuple[Towers, Bundle]:
    model = Towers()
    randomize(model)
    return model, tokopt.capture(model, (IMAGES, TEXTS), dynamic=DYNAMIC)


def exactly(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def reduced(model: nn.Module, text: str, *inputs: Tensor) -> tuple[Tensor, ...]:
    """What a model in float64 gives after a pass."""
    doubled = tuple(one.double() for one in inputs)
    bundle = tokopt.capture(model.double(), doubled, dynamic={})
    return tokopt.optimize(bundle, text, strict=True)(*doubled)


@pytest.mark.parametrize("text", ["tome{r=2},divprune{r=1}", "tome{r=[3,0,2,1]}"])
def test_both_towers_give_what_each_gives_alone(text: str) -> None:
    model = randomize(Towers())
    vision, other, both = reduced(model, text, IMAGES, TEXTS)
    for got, tower, inputs, counts in ((vision, "vision", IMAGES, "[3,0]"), (other, "text", TEXTS, "[2,1]")):
        (wanted,) = reduced(getattr(model, tower), text.replace("[3,0,2,1]", counts), inputs)
        exactly(got, wanted)
    exactly(both, vision @ other.T)


class Tokens(nn.Module):
    """Tokens through two blocks, and all of them out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.blocks(tokens)


class Meeting(nn.Module):
    """Two streams, and what becomes of them where they meet."""

    one: Tokens
    other: Tokens

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Tokens(), Tokens()

    def meet(self, one: Tensor, other: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return self.meet(self.one(one), self.other(other))


class LateInteraction(Meeting):
    """Every token of the one finds the most alike of the other (ColBERT, 2020)."""

    def meet(self, one: Tensor, other: Tensor) -> Tensor:
        return (one @ other.mT).amax(-1).sum(-1)


class Fusion(Meeting):
    """A third stream, of both."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion = nn.Sequential(*blocks(1))

    def meet(self, one: Tensor, other: Tensor) -> Tensor:
        return self.fusion(torch.cat([one, other], 1))[:, 0]


class Chosen(Meeting):
    """A third stream, whose attention sees the tokens that the one says."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(WIDTH, 3 * WIDTH)

    def meet(self, one: Tensor, other: Tensor) -> Tensor:
        query, key, value = self.projection(other)[:, None].chunk(3, -1)
        shown = (one.mean(-1) > 0)[:, None, None].expand(-1, 1, other.shape[1], -1)
        return (other + F.scaled_dot_product_attention(query, key, value, shown)[:, 0]).mean(1)


@pytest.mark.parametrize("kind", [LateInteraction, Fusion])
def test_where_streams_meet_each_is_what_it_gives_alone(kind: type[Meeting]) -> None:
    """With all of its tokens back."""
    model, other = kind(), TEXTS.flip(1)
    randomize(model)
    (got,) = reduced(model, "tome{r=2 layers=[0,1,2,3]}", TEXTS, other)
    wanted = model.meet(
        *(reduced(part, "tome{r=2}", x)[0] for part, x in ((model.one, TEXTS), (model.other, other)))
    )
    exactly(got, wanted)
    assert not torch.allclose(got, model(TEXTS.double(), other.double()), rtol=1e-3)


def test_a_stream_that_chooses_what_another_attends_to_is_reduced_and_the_other_is_not() -> None:
    """Its tokens are the keys of a mask, in their places."""
    model, other = Chosen(), TEXTS.flip(1).double()
    randomize(model)
    bundle = tokopt.capture(model.double(), (TEXTS.double(), other))
    made = tokopt.optimize(bundle, "tome{r=2 layers=[0,1,2,3]}")
    assert made.history[-1].matches == 2
    assert any("its tokens meet those of one.blocks" in note for note in made.history[-1].notes)
    (one,) = reduced(model.one, "tome{r=2}", TEXTS)
    exactly(made(TEXTS.double(), other)[0], model.meet(one, model.other(other)))


class Beside(FunctionalAttention):
    """Attention, and a convolution over tokens beside it (ConvBERT, 2020)."""

    def __init__(self) -> None:
        super().__init__(WIDTH, 2)
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.convolution(x.transpose(1, 2)).transpose(1, 2)


def test_a_block_that_reads_the_tokens_of_another_stream_is_refused() -> None:
    """Its attention has fewer tokens than its stream, which got them back for the convolution."""
    model = nn.Sequential(*(PreNormBlock(WIDTH, 48, Beside()) for _ in range(2)))
    bundle = tokopt.capture(randomize(model).double(), (TEXTS.double(),))
    made = tokopt.optimize(bundle, "tome{r=2}")
    assert made.history[-1].matches == 1
    met = "block 1 (1.attention): its tokens meet those of 0.attention"
    assert any(note.startswith(met) for note in made.history[-1].notes)
    exactly(made(TEXTS.double())[0], tokopt.optimize(bundle, "tome{r=2 layers=[0]}")(TEXTS.double())[0])
    with pytest.raises(PassRefused, match="its tokens meet those of"):
        tokopt.optimize(bundle, "tome{r=2}", strict=True)


def test_a_tower_without_enough_tokens_is_refused_on_its_own() -> None:
    """12 tokens lose 4 and then 4 of the 8 left, but not 5 and then 5."""
    _, both = towers()
    assert tokopt.optimize(both, "tome{r=4}", strict=True).history[-1].matches == 4
    made = tokopt.optimize(both, "tome{r=5}")
    assert made.history[-1].matches == 2
    assert any(
        note.startswith("text.blocks: r=5 is too large for block 3") for note in made.history[-1].notes
    )
    assert torch.equal(made(IMAGES, TEXTS)[1], both(IMAGES, TEXTS)[1])
    with pytest.raises(PassError, match="r=9 is too large for block 0"):
        tokopt.optimize(both, "tome{r=9}")


def test_an_artifact_of_two_streams(tmp_path: Path) -> None:
    made = tokopt.optimize(towers()[1], "tome{r=2}")
    tokopt.export(made, tmp_path / "a")
    assert len(load(tmp_path / "a").run(IMAGES.numpy(), TEXTS.numpy())) == 3


def test_one_encoder_that_is_called_twice() -> None:
    """Its calls are streams of their own."""
    encoder = randomize(Encoder(16, 4, WIDTH, blocks()))

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
            return self.encoder(one), self.encoder(two)

    made = tokopt.optimize(tokopt.capture(Siamese(), (IMAGES, IMAGES.flip(0))), "tome{r=2}", strict=True)
    (wanted,) = tokopt.optimize(tokopt.capture(encoder, (IMAGES,)), "tome{r=2}")(IMAGES)
    one, two = made(IMAGES, IMAGES.flip(0))
    torch.testing.assert_close(one, wanted)
    torch.testing.assert_close(two, wanted.flip(0))


class Cross(FunctionalAttention):
    """Attention of ``x`` to ``memory``, where ``shown`` [batch, queries, keys] says so."""

    def forward(self, x: Tensor, memory: Tensor, shown: Tensor | None = None) -> Tensor:  # type: ignore[override]
        (query, _, _), (_, key, value) = self.split(x), self.split(memory)
        mask = None if shown is None else shown[:, None]
        return self.out(
            F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).reshape(x.shape)
        )


class Decoding(nn.Module):
    """Two blocks on a memory, and two on targets that attend to it in between."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.cross = nn.Sequential(*blocks()), Cross(WIDTH, 2)
        self.first, self.second = blocks()

    def forward(self, memory: Tensor, targets: Tensor, shown: Tensor | None = None) -> Tensor:
        x = self.first(targets)
        x = x + self.cross(x, self.encoder(memory), shown)
        return self.second(x).mean(1)


@pytest.mark.parametrize("masked", [False, True])
def test_merging_equal_tokens_changes_nothing_across_streams(masked: bool) -> None:
    """Every token stands twice in both streams; the pairs merge, and the attention between counts each twice.

    A mask of the attention between loses queries with the one stream and keys with the other.
    """
    memory, targets = (TEXTS[:3, start : start + 4].repeat_interleave(2, 1).double() for start in (0, 5))
    inputs = [memory, targets]
    if masked:
        shown = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(3)) > 0.4
        inputs += [(shown | torch.eye(4).bool()).repeat_interleave(2, 1).repeat_interleave(2, 2)]
    bundle = tokopt.capture(randomize(Decoding()).double(), tuple(inputs))
    made = tokopt.optimize(bundle, "tome{r=4 layers=[0,2]}", strict=True)
    assert made.history[-1].matches == 2
    # the logarithm of a size is a float32
    torch.testing.assert_close(made(*inputs)[0], bundle(*inputs)[0], rtol=1e-5, atol=1e-6)
    assert any(
        note.startswith("cross: cross attention")
        for note in tokopt.optimize(bundle, "tome{r=1}").history[-1].notes
    )


class Masked(nn.Module):
    """Two blocks under a mask that is built from sizes, additive or boolean."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.projections = nn.ModuleList([nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2)])

    def forward(self, texts: Tensor) -> Tensor:
        places = torch.arange(texts.shape[1])
        apart = places[:, None] - places[None]
        shown = {"causal": apart >= 0, "reversed": apart <= 0, "window": apart.abs() <= 3}[self.kind]
        mask = torch.zeros(shown.shape).masked_fill(~shown, -torch.inf) if self.kind == "causal" else shown
        for project in self.projections:
            query, key, value = project(texts)[:, None].chunk(3, -1)
            texts = texts + F.scaled_dot_product_attention(query, key, value, mask)[:, 0]
        return texts.mean(1)


def applied(model: nn.Module, inputs: Tensor, text: str = "tome{r=1}") -> AppliedPass:
    return tokopt.optimize(tokopt.capture(model, (inputs,)), text).history[-1]


@pytest.mark.parametrize("kind", ["causal", "reversed"])
def test_a_causal_mask_is_causal_attention(kind: str) -> None:
    done = applied(Masked(kind), TEXTS)
    assert not done.matches and all("causal attention" in note for note in done.notes)


def test_a_window_is_none() -> None:
    assert applied(Masked("window"), TEXTS).matches == 2


def test_clip() -> None:
    """The text tower is causal, and the vision tower is what it is alone."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": 99, "max_position_embeddings": 20, "eos_token_id": 98, "bos_token_id": 97}
    config = CLIPConfig(
        text_config=text, vision_config=tower | {"image_size": 16, "patch_size": 4}, projection_dim=16
    )
    model = randomize(CLIPModel(config)).eval()
    inputs = {"input_ids": torch.randint(3, 96, (5, 13)), "pixel_values": IMAGES}
    dynamic = {"input_ids": ("texts", None), "pixel_values": ("batch", None, None, None)}
    bundle = tokopt.capture(model, (), inputs, dynamic=dynamic)
    made = tokopt.optimize(bundle, "tome{r=2 layers=[0,1]}", strict=True)
    assert made.history[-1].matches == 2
    place = [spec.name for spec in made.main.outputs].index("image_embeds")
    got = made(*inputs.values())

    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> Tensor:
            tower: Any = self.model
            return F.normalize(tower.visual_projection(tower.vision_model(images).pooler_output), dim=-1)

    (wanted,) = tokopt.optimize(tokopt.capture(Vision(), (IMAGES,)), "tome{r=2}", strict=True)(IMAGES)
    torch.testing.assert_close(got[place], wanted, rtol=1e-5, atol=1e-6)
    place = [spec.name for spec in made.main.outputs].index("text_embeds")
    assert torch.equal(got[place], bundle(*inputs.values())[place])
    with pytest.raises(PassRefused, match=r"text_model.*causal attention"):
        tokopt.optimize(bundle, "tome{r=2}", strict=True)


def test_detr() -> None:
    """The encoder loses tokens, the learned queries of the decoder stay."""
    backbone: dict[str, Any] = {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    }
    backbone["out_features"] = ["stage2"]
    options: dict[str, Any] = {"d_model": 32, "num_queries": 11, "backbone": None}
    options |= {"use_timm_backbone": False, "use_pretrained_backbone": False}
    for part in ("encoder", "decoder"):
        options |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 40}
    config = DetrConfig(backbone_config=ResNetConfig(**backbone), **options)
    model = randomize(DetrModel(config)).eval()
    done = applied(model, torch.randn(2, 3, 64, 64), "tome{r=3}")
    assert done.matches == 1
    assert sum("learned queries" in note for note in done.notes) == 1
