"""The laws of token reductions: exact limits, schedules, composition, protected tokens, typed refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tokopt
from tests.matrix.language import bundle
from tests.matrix.test_matrix import captured
from tests.zoo import ZOO
from tests.zoo.blocks import FunctionalAttention, PreNormBlock
from tests.zoo.entries import randomize
from tokopt.errors import PassError, PassRefused, TokoptError, UnsupportedModelError
from tokopt.ir.bundle import Bundle
from tokopt.passes import PASSES, load_pass
from tokopt.passes.reduce.base import TokenReduction
from tokopt.pipeline.manager import Pipeline, parse


def tokens(bundle: Bundle, text: str) -> tuple[int, ...]:
    """Key tokens of every attention after the pipeline."""
    _, report = parse(text).run(bundle)
    return report.records[-1].after.tokens


def outputs_equal(a: Bundle, b: Bundle) -> bool:
    inputs = a.main.example
    return all(torch.equal(x, y) for x, y in zip(a(*inputs), b(*inputs), strict=True))


@pytest.mark.parametrize("name", [name for name in PASSES if issubclass(load_pass(name), TokenReduction)])
@pytest.mark.parametrize("options", ["r=0", "r=[0,0,0]", "keep=1.0", "target=1.0"])
def test_removing_nothing_returns_the_very_program(name: str, options: str) -> None:
    bundle = captured("vit")
    result = tokopt.optimize(bundle, f"{name}{{{options}}}")
    assert result.main is bundle.main
    assert result.history[-1].matches == 0 and result.semantics == "exact"


def test_schedules_remove_what_they_say() -> None:
    """37 tokens, 1 protected, 3 blocks; each attention sees what the blocks before it left."""
    bundle = captured("vit")
    assert tokens(bundle, "tome{r=4}") == (37, 33, 29)
    assert tokens(bundle, "tome{r=[4,0,2]}") == (37, 33, 33)
    assert tokens(bundle, "tome{r=4 schedule=decreasing}") == (37, 29, 25)
    assert tokens(bundle, "random{keep=0.5}") == (37, 19, 10)  # ceil(36 / 2) + 1, ceil(18 / 2) + 1
    assert tokens(bundle, "random{target=0.5}") == (37, 31, 25)  # 18 removed: 6, 6, 6
    assert tokens(bundle, "tome{r=5 layers=[1]}") == (37, 37, 32)
    assert tokens(bundle, "tome{r=5 layers=[-2]}") == (37, 37, 32)


def test_a_dynamic_token_axis_keeps_its_fraction_at_every_length() -> None:
    entry = ZOO["minilm"]
    bundle = captured("minilm")
    reduced = tokopt.optimize(bundle, "tome{keep=0.7}", strict=True)
    assert reduced.main.ranges["tokens"].min > bundle.main.ranges["tokens"].min
    for batch in (1, 2):
        inputs = {k: torch.cat([v, v], 1) for k, v in entry.inputs(batch=batch).items()}
        (got,) = reduced(*inputs.values())
        assert got.isfinite().all() and got.shape[0] == batch


@pytest.mark.parametrize("name", ["tome", "pitome", "evit", "divprune", "kcenter", "random"])
def test_blocks_of_one_pass_can_be_given_apart(name: str) -> None:
    """One pass with counts for two blocks is two passes with one block each, bit for bit, in either order."""
    bundle = captured("vit")
    together = tokopt.optimize(bundle, f"{name}{{r=[4,0,3]}}", strict=True)
    for apart in (
        f"{name}{{r=[4,0,0]}},{name}{{r=[0,0,3]}}",
        f"{name}{{r=[0,0,3]}},{name}{{r=[4,0,0]}}",
    ):
        assert outputs_equal(together, tokopt.optimize(bundle, apart, strict=True))


def test_different_methods_compose() -> None:
    bundle = captured("vit")
    both = tokopt.optimize(bundle, "tome{r=4},evit{r=5 layers=[1,2]},divprune{r=3 layers=[2]}", strict=True)
    assert [step.matches for step in both.history] == [3, 2, 1]
    assert both.semantics == "approximate" and both.pipeline.count(",") == 3
    _, report = parse("tome{r=4},evit{r=5 layers=[1]}").run(bundle)
    assert report.records[-1].after.tokens == (37, 33, 24)
    assert all(t.isfinite().all() for t in both(*both.main.example))


def test_the_prefix_can_be_widened_but_not_below_what_is_read() -> None:
    bundle = captured("vit")
    assert tokens(bundle, "tome{r=2 prefix=5}") == (37, 35, 33)
    with pytest.raises(PassError, match="prefix=0 leaves a token unprotected"):
        tokopt.optimize(bundle, "tome{r=2 prefix=0}")


def test_a_pass_leaves_its_input_untouched() -> None:
    bundle = captured("vit")
    before = [t.clone() for t in bundle(*bundle.main.example)]
    tokopt.optimize(bundle, "tome{r=4},random{r=2}")
    assert not bundle.history
    for a, b in zip(before, bundle(*bundle.main.example), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("tome{r=30}", r"r=30 is too large for block 0 \(layers\.0\.attention\), which has 37 tokens"),
        ("tome{r=12}", "for block 2"),
        ("random{r=36}", r"for block 0 \(layers\.0\.attention\), .* can lose at most 35"),
        ("random{r=35}", "for block 1"),
        ("tome{keep=0.3}", "can lose at most 18"),
        ("tome{r=[1,2]}", "lists 2 counts for 3 blocks"),
        ("tome{r=2 layers=[3]}", "layers names block 3, but the model has 3"),
    ],
)
def test_what_a_model_cannot_spare_is_a_typed_sentence(text: str, sentence: str) -> None:
    with pytest.raises(PassError, match=sentence) as caught:
        tokopt.optimize(captured("vit"), text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("tome", "needs exactly one of r=, keep=, target="),
        ("tome{r=2 keep=0.5}", "found r and keep"),
        ("tome{r=-1}", "must be a count"),
        ("tome{r=1.5}", "wrong type"),
        ("tome{keep=0}", r"must be a fraction in \(0, 1\]"),
        ("tome{keep=1.5}", r"must be a fraction in \(0, 1\]"),
        ("tome{r=2 schedule=sometimes}", "schedule='sometimes'|wrong type"),
        ("tome{keep=0.9 schedule=decreasing}", "spreads one number r"),
        ("tome{r=2 prefix=-1}", "must not be negative"),
        ("pitome{r=2 margin=3}", "compared with a cosine"),
        ("pitome{r=2 matching=both}", "matching=both is of the wrong type"),
        ("evit{r=2 fuse=2}", "wrong type"),
    ],
)
def test_options_that_make_no_sense_are_a_typed_sentence(text: str, sentence: str) -> None:
    with pytest.raises(TokoptError, match=sentence) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_a_model_without_attention_has_nothing_to_reduce() -> None:
    bundle = tokopt.capture(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), (torch.randn(2, 4),))
    with pytest.raises(PassError, match="no attention") as caught:
        tokopt.optimize(bundle, "tome{r=1}")
    assert isinstance(caught.value.__cause__, UnsupportedModelError)


def test_a_causal_model_is_refused() -> None:
    with pytest.raises(PassError, match="works on encoders"):
        tokopt.optimize(bundle("llama"), "tome{r=1}")


def test_a_target_on_a_dynamic_axis_is_refused() -> None:
    with pytest.raises(PassError, match="target= needs a fixed number"):
        tokopt.optimize(captured("bert"), "tome{target=0.5}")


def test_a_fraction_that_some_length_cannot_spare_is_refused() -> None:
    """Half of the tokens could merge at odd lengths, but not at even ones, where padding may be among them."""
    with pytest.raises(PassError, match="can lose at most"):
        tokopt.optimize(captured("bert"), "tome{keep=0.5 layers=[0]}")


def test_an_example_too_short_for_a_share_is_refused() -> None:
    """One token of a short example would be exported as one token of every input."""
    with pytest.raises(
        PassError, match=r"would lose 1 of the example's 21 tokens, .*; capture with a longer example"
    ):
        tokopt.optimize(captured("bert"), "tome{keep=0.95}")


def test_strict_mode_turns_a_refusal_into_an_error_and_leaves_the_reason() -> None:
    bundle = captured("swin")
    assert "split into groups" in " ".join(tokopt.optimize(bundle, "tome{r=2}").history[-1].notes)
    with pytest.raises(PassRefused, match="split into groups"):
        tokopt.optimize(bundle, "tome{r=2}", strict=True)


def test_padding_never_reaches_a_real_token() -> None:
    """Whatever stands at padding, the real tokens' outputs are the same to the last bit."""
    entry, bundle = ZOO["bert"], captured("bert")
    inputs = entry.inputs()
    other = dict(inputs)
    other["input_ids"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 7)
    assert not torch.equal(inputs["input_ids"], other["input_ids"])
    real = inputs["attention_mask"].bool()
    for text in (
        "tome{r=4}",
        "pitome{r=3}",
        "evit{r=3 fuse=false}",
        "divprune{r=3}",
        "kcenter{r=3}",
        "random{r=3}",
    ):
        reduced = tokopt.optimize(bundle, text, strict=True)
        a, b = reduced(*inputs.values()), reduced(*other.values())
        assert torch.equal(a[0][real], b[0][real]) and torch.equal(a[1], b[1])


def test_the_pipeline_is_the_sum_of_its_parts() -> None:
    """Running two pipelines one after the other is running them as one."""
    bundle = captured("vit")
    one = tokopt.optimize(tokopt.optimize(bundle, "tome{r=3}"), "random{r=2}")
    both = tokopt.optimize(bundle, "tome{r=3},random{r=2}")
    assert outputs_equal(one, both) and one.pipeline == both.pipeline
    assert str(Pipeline(tuple(parse("tome{r=3},random{r=2}").passes))) == both.pipeline


def test_a_reduced_bundle_that_was_saved_is_refused(tmp_path: Path) -> None:
    """The program before reduction is not in the file, so a further reduction cannot join the rewrite."""
    path = tokopt.export(tokopt.optimize(captured("vit"), "tome{r=3}"), tmp_path / "a.tokopt", target="torch")
    with pytest.raises(PassRefused, match="reduced before it was calibrated or saved"):
        tokopt.optimize(tokopt.open_bundle(path), "tome{r=1}", strict=True)


class Striding(torch.nn.Module):
    """Frames [batch, channels, frames], every other one of which becomes a token."""

    def __init__(self) -> None:
        super().__init__()
        self.stride = torch.nn.Conv1d(4, 32, 3, stride=2)
        self.blocks = torch.nn.Sequential(
            *(PreNormBlock(32, 48, FunctionalAttention(32, 2)) for _ in range(2))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.stride(x).transpose(1, 2)).mean(1)


@pytest.mark.parametrize("text", ["tome{r=3}", "tome{keep=0.7}"])
def test_tokens_may_be_computed_from_an_axis(text: str) -> None:
    """Inputs of every length that is allowed give what they give at that length alone; those too short are refused."""
    model = Striding()
    randomize(model).double()
    sounds = [torch.randn(2, 4, n, generator=torch.Generator().manual_seed(n)).double() for n in (41, 25, 70)]
    frames = tokopt.capture(model, (sounds[0],), dynamic={"x": ("batch", None, "frames")})
    made = tokopt.optimize(frames, text, strict=True)
    shortest = made.main.ranges["frames"].min
    assert shortest > 3 and f"inputs need frames >= {shortest}" in made.history[-1].notes
    for sound in (*sounds, sounds[2][:, :, :shortest]):
        alone = tokopt.optimize(tokopt.capture(model, (sound,)), text, strict=True)
        torch.testing.assert_close(made(sound)[0], alone(sound)[0], rtol=0, atol=1e-12)
    with pytest.raises(TokoptError, match="frames"):
        made(sounds[0][:, :, : shortest - 1])
